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


def whole_characters(text: str) -> str:
    """`text` with a replacement character for each half of a character: tokenizers take no such halves, and
    bytes of a command line that are no text arrive as some."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
