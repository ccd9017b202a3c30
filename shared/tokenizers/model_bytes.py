"""Serialized sentencepiece models, edited as bytes.

A model is a protobuf message whose repeated field 1 holds the pieces, and joining bytes appends to repeated
fields: pieces are added and rescored without a protobuf library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_PIECE, _TEXT, _SCORE = (
    b"\x0a",
    b"\x0a",
    b"\x15",
)  # protobuf tags: field 1 (bytes); in it field 1 and 2 (float)
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # protobuf wire types


def piece_record(text: str, score: float) -> bytes:
    """The bytes that add one ordinary piece at the end of a model."""
    encoded = text.encode()
    return _framed(_PIECE, _framed(_TEXT, encoded) + _SCORE + struct.pack("<f", score))


def rescored(model: bytes, pieces: set[int], score: float) -> bytes:
    """`model` with this score for the pieces at these indices; of a field given twice the last counts."""
    result, index = [], 0
    for tag, record in _fields(model):
        if tag == _PIECE:
            payload = record[len(record) - _payload_length(record) :]
            record = (
                _framed(_PIECE, payload + _SCORE + struct.pack("<f", score)) if index in pieces else record
            )
            index += 1
        result.append(record)
    return b"".join(result)


def _framed(tag: bytes, payload: bytes) -> bytes:
    length, size = len(payload), b""
    while length > 0x7F:
        size, length = size + bytes([length & 0x7F | 0x80]), length >> 7
    return tag + size + bytes([length]) + payload


def _fields(message: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(tag, whole record) of every top-level field of a protobuf message."""
    start = 0
    while start < len(message):
        tag, end = _varint(message, start)
        value, after = _varint(message, end) if tag & 7 in (_VARINT, _BYTES) else (0, end)
        end = after + {_VARINT: 0, _FIXED64: 8, _BYTES: value, _FIXED32: 4}[tag & 7]
        yield message[start : start + 1], message[start:end]
        start = end


def _payload_length(record: bytes) -> int:
    return _varint(record, 1)[0]


def _varint(message: bytes, start: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = message[start]
        value, shift, start = value | (byte & 0x7F) << shift, shift + 7, start + 1
        if byte < 0x80:
            return value, start
