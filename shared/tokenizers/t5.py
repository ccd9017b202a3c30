"""The tokenizer of CogVideoX's text encoder: T5's sentencepiece model, padded to a fixed length."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from torch import Tensor

from shared.errors import WeightsError
from shared.json_files import read_object
from shared.tokenizers.base import whole_characters

SPIECE = "spiece.model"


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """`ids` and `mask` (1 = not padding) are int64 [batch, text_len]; per prompt its true number of ids,
    `</s>` included, and the text that did not fit ("" if all did)."""

    ids: Tensor
    mask: Tensor
    lengths: tuple[int, ...]
    truncated: tuple[str, ...]


class T5Tokenizer:
    """Prompts to ids: pieces, `</s>`, pads up to `text_len`; what is longer loses its end, which is reported.

    `path` is a tokenizer folder or a spiece.model file; nothing is downloaded. WeightsError else.
    """

    def __init__(self, path: str | Path, *, text_len: int) -> None:
        if text_len < 1:
            raise ValueError(f"text_len must be at least 1, got {text_len}")
        self.text_len = text_len
        self._tokenizer = _read_tokenizer(Path(path))

    @property
    def num_tokens(self) -> int:
        return len(self._tokenizer)

    @property
    def pad_id(self) -> int:
        return self._tokenizer.pad_token_id

    @property
    def end_id(self) -> int:
        return self._tokenizer.eos_token_id

    def encode(self, text: str) -> list[int]:
        """All ids of `text` with `</s>`, neither cut nor padded."""
        return self._tokenizer(whole_characters(text), verbose=False).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def __call__(self, prompts: Sequence[str]) -> TokenizedText:
        rows = [self.encode(prompt) for prompt in prompts]
        kept = [self._cut(row) for row in rows]
        ids = torch.full((len(rows), self.text_len), self.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(kept):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        tails = tuple(map(self._tail, rows))
        return TokenizedText(ids=ids, mask=mask, lengths=tuple(map(len, rows)), truncated=tails)

    def _cut(self, row: list[int]) -> list[int]:
        return row if len(row) <= self.text_len else [*row[: self.text_len - 1], self.end_id]

    def _tail(self, row: list[int]) -> str:
        return "" if len(row) <= self.text_len else self.decode(row[self.text_len - 1 :])


def _read_tokenizer(path: Path) -> Any:
    if path.is_file():
        with tempfile.TemporaryDirectory() as folder:  # transformers only finds the file under its own name
            shutil.copyfile(path, Path(folder) / SPIECE)
            return _from_folder(Path(folder), str(path))
    return _from_folder(path, str(path))


def _from_folder(folder: Path, shown: str) -> Any:
    from transformers import T5Tokenizer as HFT5Tokenizer  # takes seconds, so only on use

    check_tokenizer(folder, shown)
    try:
        tokenizer = HFT5Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its reader raises of all kinds, plain Exception among them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{shown} is not a T5 tokenizer: {reason}") from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise WeightsError(f"the tokenizer in {shown} has no <pad> or no </s>")
    return tokenizer


def check_tokenizer(folder: Path, shown: str) -> None:
    """WeightsError unless a tokenizer's files are there and readable; `shown` is what the message calls them.

    transformers turns an empty or absent vocabulary into a tokenizer of four pieces."""
    spiece, fast = folder / SPIECE, folder / "tokenizer.json"
    if not spiece.is_file() and not fast.is_file():
        raise WeightsError(f"no T5 tokenizer in {shown} (looked for {SPIECE} and {fast.name})")
    try:
        if spiece.is_file():
            readable = (
                sentencepiece.SentencePieceProcessor(model_proto=spiece.read_bytes()).get_piece_size() > 0
            )
        else:
            readable = bool(read_object(fast, WeightsError)["model"]["vocab"])
    except (RuntimeError, ValueError, KeyError, TypeError):
        readable = False
    if not readable:
        raise WeightsError(f"{shown} is not a T5 tokenizer: its vocabulary is empty or unreadable")
