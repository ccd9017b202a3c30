"""What a text encoder sees of a tokenizer."""

from __future__ import annotations

from typing import Protocol


class TextTokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def num_tokens(self) -> int:
        """Ids run from 0 to here (excluded)."""
        ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...
