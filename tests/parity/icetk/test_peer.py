"""The icetk package live against our readers: text ids in many scripts, and the full-size image codec."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvideo_ar.checkpoints import ICETK_VQVAE
from cogvideo_ar.config import VQVAEConfig
from cogvideo_ar.vqvae import VQVAE
from shared.checkpoints import invert
from shared.tokenizers.icetk import IceTokenizer
from shared.tokenizers.sentencepiece_training import train_text_model
from tests.parity.recorded import case_folder

pytestmark = [pytest.mark.parity, pytest.mark.slow]
PYTHON = os.environ.get("ICETK_PYTHON")
SPECIAL = ["<start_of_image>", "<start_of_english>", "<start_of_chinese>"]
SENTENCES = [
    "a lion is drinking water, high definition",
    "一只狮子在喝水，高清摄影 视频",
    "лев пьёт воду у реки",
    "ライオンが水を飲んでいる",
    "사자가 물을 마시고 있다",
    "أسد يشرب الماء من النهر",
    "ο λέων πίνει νερό",
    "शेर पानी पी रहा है",
    "4.0秒<n>une lionne à l'été",
]
RATES = (4, 8, 16)
IMAGE_ATOL = 2e-5  # of icetk's 0..1 range; a position's code must be exact


def ask(folder: Path, **request: Any) -> dict[str, Any]:
    """What the package answers; skipped where there is no interpreter that has it."""
    if not PYTHON:
        pytest.skip("ICETK_PYTHON names no interpreter with icetk 0.0.7 (tests/parity/icetk/README.md)")
    question, answer = folder / "request.json", folder / "answer.json"
    plain = {"folder": str(folder), "special_tokens": [], "texts": [], "lookups": [], "images": None}
    question.write_text(json.dumps(plain | {"rates": RATES} | request), encoding="utf-8")
    words = [PYTHON, str(Path(__file__).with_name("peer.py")), str(question), str(answer)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(answer.read_text(encoding="utf-8"))


def texts(count: int = 600) -> list[str]:
    """Sentences of nine scripts, mixed, cut, doubled, with special tokens, spaces, line breaks and signs."""
    draw = random.Random(0)
    words = [word for sentence in SENTENCES for word in sentence.split()]
    words += [
        *SPECIAL,
        "<n>",
        "\n",
        "  ",
        "\t",
        "，",
        "！",
        "😀",
        "Ⅳ",
        "ﬁ",
        "１２",
        "é",
        "e\u0301",
        "<pad>",
        "\u3000",
    ]
    made = ["", " ", *SENTENCES]
    while len(made) < count:
        parts = [draw.choice(words)[: draw.randint(1, 12)] for _ in range(draw.randint(1, 9))]
        made.append(draw.choice(["", " "]).join(parts))
    return made


def own_model(folder: Path) -> Path:
    return train_text_model(
        SENTENCES * 5, folder / "ice_text.model", vocab_size=260, user_defined_symbols=("<n>", "秒")
    )


def recorded_model(folder: Path) -> Path:
    path = folder / "ice_text.model"
    path.write_bytes((case_folder("icetk") / "tiny_text.model").read_bytes())
    return path


@pytest.mark.parametrize("special", [[], SPECIAL], ids=["plain", "special"])
@pytest.mark.parametrize("build", [own_model, recorded_model], ids=["own", "recorded"])
def test_text_ids(tmp_path: Path, build: Any, special: list[str]) -> None:
    ours = IceTokenizer(build(tmp_path), special_tokens=special)
    lookups = [*range(19_998, ours.num_tokens), "<image_7>", "<n>", "▁", "no such piece", *SPECIAL]
    theirs = ask(tmp_path, texts=texts(), special_tokens=special, lookups=lookups)
    assert theirs["num_tokens"] == ours.num_tokens
    for number, text in enumerate(texts()):
        ids = ours.encode(text)
        assert ids == theirs["ids"][number], text
        assert ours.encode(text, ignore_linebreak=False) == theirs["ids_keep_linebreak"][number], text
        assert ours.tokenize(text) == theirs["pieces"][number], text
        assert ours.decode(ids) == theirs["decoded"][number], text
    assert [ours[key] for key in lookups] == theirs["lookups"]


def test_the_full_size_codec_with_random_weights(tmp_path: Path) -> None:
    """Codes and images of all rates, through the file that icetk reads."""
    torch.manual_seed(0)
    model = VQVAE(VQVAEConfig()).eval()
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 48, 3), dtype=np.uint8)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():  # codes as far apart as what the encoder gives, so that many are used
        z = model.quantizer.proj(model.features(pixels, 4)[4]).permute(0, 2, 3, 1).flatten(0, 2)
        noise = torch.randn(model.config.codebook_size, model.config.code_dim)
        model.quantizer.codebook.copy_(z.mean(0) + noise * z.std(0))
    own_model(tmp_path)
    torch.save({"module": invert(model.state_dict(), ICETK_VQVAE)}, tmp_path / "ice_image.pt")
    np.save(tmp_path / "images.npy", images)
    ask(tmp_path, images=str(tmp_path / "images.npy"))
    with np.load(tmp_path / "answer.json.npz") as theirs:
        for rate in RATES:
            codes = model.encode(pixels, rate)
            assert np.array_equal(codes.flatten(1).numpy(), theirs[f"codes_{rate}"]), rate
            assert len(codes.unique()) > codes.numel() // 4
            decoded = (model.decode(codes, rate) + 1) / 2
            error = np.abs(decoded.numpy() - theirs[f"decoded_{rate}"]).max()
            assert error <= IMAGE_ATOL, f"rate {rate}: {error:.1e}"
    (tmp_path / "ice_image.pt").unlink()  # half a gigabyte
