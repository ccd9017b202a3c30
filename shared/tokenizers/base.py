"""What tokenizers share."""

from __future__ import annotations


def whole_characters(text: str) -> str:
    """`text` with a replacement character for each half of a character: tokenizers take no such halves, and
    bytes of a command line that are no text arrive as some."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
