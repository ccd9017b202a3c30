"""Reader of icetk's text model: one id space of image codes, then the pieces of a sentencepiece model.

Written from the behaviour of icetk 0.0.7, without its protobuf dependency: see `model_bytes.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

import sentencepiece

from shared.errors import WeightsError
from shared.tokenizers.base import whole_characters
from shared.tokenizers.model_bytes import piece_record, rescored

NUM_IMAGE_TOKENS = 20000
LINEBREAK = "<n>"
DISCOURAGED_SCORE = -100.0


class IceTokenizer:
    """Text ids are `num_image_tokens` + piece; ids below that are image codes, written `<image_N>`.

    `model` is the path of `ice_text.model`. Special tokens get the ids after the last piece, in order, and
    match literally inside a text. WeightsError where the file is not a sentencepiece model.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        num_image_tokens: int = NUM_IMAGE_TOKENS,
        special_tokens: Sequence[str] = (),
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self._load(_read_model(Path(model)), str(model))
        self.add_special_tokens(special_tokens)

    @property
    def num_text_tokens(self) -> int:
        return self._processor.get_piece_size()

    @property
    def num_tokens(self) -> int:
        return self.num_image_tokens + self.num_text_tokens

    def encode(self, text: str, *, ignore_linebreak: bool = True) -> list[int]:
        """Ids of `text`, nothing added. Line breaks become spaces, or with `ignore_linebreak=False` `<n>`."""
        return [
            self.num_image_tokens + piece
            for piece in self._processor.encode(self._plain(text, ignore_linebreak))
        ]

    def tokenize(self, text: str, *, ignore_linebreak: bool = True) -> list[str]:
        """The pieces of `text` as strings."""
        return self._processor.encode(self._plain(text, ignore_linebreak), out_type=str)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of text ids, every `<n>` a line break; IndexError for image codes and ids past the end."""
        pieces = [self._piece_index(i) for i in ids]
        return self._processor.decode(pieces).replace(LINEBREAK, "\n")

    @overload
    def __getitem__(self, key: str) -> int: ...

    @overload
    def __getitem__(self, key: int) -> str: ...

    def __getitem__(self, key: str | int) -> str | int:
        """Id of a piece or of `<image_N>`, or the reverse.

        Quirk(icetk_unknown_piece): a text that is no piece gives the id of `<unk>`; `id_of` refuses it.
        """
        if isinstance(key, str):
            return self._id(key)
        if isinstance(key, int):
            return f"<image_{key}>" if key < self.num_image_tokens else self._piece(key)
        raise ValueError(f"a token is looked up by text or id, got {type(key).__name__}")

    def id_of(self, piece: str) -> int:
        """Id of a piece that must exist; ValueError else."""
        index = self._id(piece)
        if self[index] != piece:
            raise ValueError(f"the vocabulary of {self.num_text_tokens} pieces has no {piece!r}")
        return index

    def add_special_tokens(self, tokens: Iterable[str]) -> None:
        """Append pieces of score 0, which beats every learned piece. ValueError for one that is there already
        (a control piece such as `<pad>` excepted: as upstream, that only wastes an id)."""
        tokens = list(tokens)
        if twice := [token for i, token in enumerate(tokens) if self._has_text(token) or token in tokens[:i]]:
            raise ValueError(f"special token {twice[0]!r} is already defined")
        self._load(self._model + b"".join(piece_record(token, 0.0) for token in tokens), "the extended model")

    def discourage(self, pieces: Iterable[str]) -> None:
        """Make pieces all but unusable by the score -100; ValueError for an unknown one."""
        wanted = {self.id_of(piece) - self.num_image_tokens for piece in pieces}
        self._load(rescored(self._model, wanted, DISCOURAGED_SCORE), "the rescored model")

    def _load(self, model: bytes, name: str) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise WeightsError(
                f"{name} is not a sentencepiece model: {str(error).splitlines()[0]}"
            ) from error
        self._model = model

    def _plain(self, text: str, ignore_linebreak: bool) -> str:
        text = whole_characters(text)
        return text if ignore_linebreak else text.replace("\n", LINEBREAK)

    def _id(self, text: str) -> int:
        if match := re.fullmatch(r"<image_(\d+)>", text):
            return int(match[1])
        return self.num_image_tokens + self._processor.piece_to_id(text)

    def _piece(self, index: int) -> str:
        return self._processor.id_to_piece(self._piece_index(index))

    def _piece_index(self, index: int) -> int:
        if not self.num_image_tokens <= index < self.num_tokens:
            raise IndexError(f"text ids are {self.num_image_tokens}..{self.num_tokens - 1}, got {index}")
        return index - self.num_image_tokens

    def _has_text(self, text: str) -> bool:
        piece = self._processor.piece_to_id(text)
        return self._processor.id_to_piece(piece) == text and not self._processor.is_control(piece)


def _read_model(path: Path) -> bytes:
    try:
        model = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read the text model {path}: {error.strerror or error}") from error
    if not model:
        raise WeightsError(f"{path} is empty, not a sentencepiece model")
    return model
