"""The icetk package itself, run by an interpreter of its own: `python peer.py REQUEST ANSWER` (README.md).

REQUEST is JSON: `folder` (with `ice_text.model`, and `ice_image.pt` for images), `special_tokens`, `texts`,
`lookups`, `images` (a .npy of uint8 [B, H, W, 3], or null) and `rates`. ANSWER gets what icetk says as JSON,
arrays beside it as ANSWER.npz. Imports nothing of this project.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

OPERATORS = ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a, Tensor b, float c) -> Tensor")


def import_icetk() -> Any:
    """torchvision for another device than torch's lacks its operators, of which icetk needs none: declaring
    them lets it be imported."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import_icetk.library = torch.library.Library("torchvision", "DEF")  # type: ignore[attr-defined]
        for operator in OPERATORS:
            import_icetk.library.define(operator)  # type: ignore[attr-defined]
    return importlib.import_module("icetk")


def text_answers(tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    if request["special_tokens"]:
        tokenizer.add_special_tokens(request["special_tokens"])
    ids = [tokenizer.encode(text) for text in request["texts"]]
    return {
        "num_tokens": tokenizer.num_tokens,
        "ids": ids,
        "ids_keep_linebreak": [tokenizer.encode(t, ignore_linebreak=False) for t in request["texts"]],
        "pieces": [tokenizer.tokenize(text) for text in request["texts"]],
        "decoded": [tokenizer.decode(part) for part in ids],
        "lookups": [tokenizer[key] for key in request["lookups"]],
    }


def image_answers(tokenizer: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Codes [B, h * w] and decoded images (0..1, not clamped) of every rate."""
    images = torch.from_numpy(np.load(request["images"])).permute(0, 3, 1, 2).float() / 255
    answers: dict[str, Any] = {}
    for rate in request["rates"]:
        codes = tokenizer.encode(image_torch=images, compress_rate=rate)
        grid = codes.view(len(images), images.shape[2] // rate, images.shape[3] // rate)
        answers[f"codes_{rate}"] = codes.numpy()
        answers[f"decoded_{rate}"] = tokenizer.decode(image_ids=grid, compress_rate=rate).numpy()
    return answers


def main(request_path: str, answer_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    tokenizer = import_icetk().IceTokenizer(request["folder"], device="cpu", fp16=False)
    answers = text_answers(tokenizer, request)
    if request["images"] is not None:
        np.savez(f"{answer_path}.npz", **image_answers(tokenizer, request))
    Path(answer_path).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
