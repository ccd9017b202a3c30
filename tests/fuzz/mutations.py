"""Damage: to the bytes of a file, and to the values of a JSON file. Everything follows from the random
generator, so a seed makes the same damage again."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

EDGES = (0, 1, 7, 8, 15, 16, 127, 128, 255, *(2**n for n in (15, 16, 31, 32, 63)), 2**31 - 1, 2**64 - 1)
_TEXTS = """../../x /etc/passwd C:\\x . .. %s%n {0} ${x} nan NaN 1e999 -1 true null demo a/b
frame_{:06d}.png <n> __import__('os') <image_99999999999> </s><pad>"""
_MORE = ("", " ", "\0", "\n", "a\nb", "\x1b[2J\x07", "\ud800", "\udcff.mp4", "\u202e\u200d", "中文 العربية")
TEXTS = (*_TEXTS.split(), *_MORE, "ﷺ" * 50, "x" * 300, "y" * 5000)
NUMBERS = (
    *(0, 1, -1, 2, 3, 5, 7, 10, 64, 255, 1000, 10**6, 2**31, 2**63, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, -0.5, 1.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
)


def damaged(data: bytes, rng: random.Random, *, times: int | None = None) -> bytes:
    """`data` after one to four changes."""
    for _ in range(times or rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_CHANGES)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if content:
            content[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(content)


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    value = (rng.choice(EDGES) % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "big")))
    at = _place(data, rng)
    return data[:at] + value + data[at + size :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _behead(data: bytes, rng: random.Random) -> bytes:
    return data[rng.randrange(min(len(data), 64) + 1) :]


def _remove(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 16, 256)) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    part = data[at : at + rng.choice((1, 4, 16, 64, 1024))]
    return data[:at] + part * rng.choice((2, 3, 10)) + data[at + len(part) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[at:]


def _swap(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted((_place(data, rng), _place(data, rng)))
    size = min(b - a, len(data) - b, rng.choice((1, 8, 64)))
    return data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]


def _digits(data: bytes, rng: random.Random) -> bytes:
    """Another number where digits stand, as in headers and lists."""
    places = [i for i, byte in enumerate(data[:100_000]) if 48 <= byte <= 57]
    if not places:
        return _flip(data, rng)
    at = rng.choice(places)
    return data[:at] + str(rng.choice(NUMBERS)).encode()[:40] + data[at + 1 :]


def _zeros(data: bytes, rng: random.Random) -> bytes:
    at, size = _place(data, rng), rng.choice((4, 64, 4096))
    return data[:at] + rng.choice((b"\0", b"\xff")) * size + data[at + size :]


def _random(data: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 8, 100, len(data) % 10_000)))


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _overwrite, _overwrite, _cut, _behead, _remove, _repeat, _insert, _swap, _digits, _zeros),
    _random,
)


def _place(data: bytes | bytearray, rng: random.Random) -> int:
    """Mostly near the beginning or the end, where formats keep their tables."""
    size = len(data)
    if size == 0:
        return 0
    kind = rng.random()
    if kind < 0.45:
        return rng.randrange(min(size, 600))
    if kind < 0.65:
        return size - 1 - rng.randrange(min(size, 600))
    return rng.randrange(size)


# ---- JSON


def damaged_json(text: str, rng: random.Random) -> bytes:
    """A JSON file, or one of JSON lines, with other values in one to three places; at times other bytes."""
    if rng.random() < 0.15:
        return damaged(text.encode(), rng)
    if rng.random() < 0.06:
        return rng.choice(RAW)
    try:
        plain, lines = json.loads(text), False
    except ValueError:
        plain, lines = [json.loads(line) for line in text.splitlines() if line.strip()], True
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        plain = changed(plain, rng)
    if lines and isinstance(plain, list):
        return "\n".join(map(json.dumps, plain)).encode()
    return json.dumps(plain).encode()


RAW = (
    *(
        b"",
        b"\xef\xbb\xbf{}",
        b"[]",
        b"{}",
        b"null",
        b"0",
        b'"text"',
        b"{",
        b"\xff\xfe{\0}\0",
        b"[" * 100_000,
    ),
    *(
        b'{"a":' * 100_000,
        b"[" * 990 + b"]" * 990,
        b"9" * 5000,
        b'{"config": {}}',
        b'{"config": []}',
        b"\0" * 64,
    ),
    *(b'{"family": "x", "format": 1, "config": {}}', b'{"a": 1, "a": 2}', b"NaN", b'{"\\ud800": "\\udfff"}'),
)


def changed(value: Any, rng: random.Random) -> Any:
    """One place of a nested value changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.10:
            return {k: v for k, v in value.items() if k != key}
        if kind < 0.15:
            return value | {rng.choice(TEXTS): hostile(rng)}
        if kind < 0.18:
            return {(rng.choice(TEXTS) if k == key else k): v for k, v in value.items()}
        return value | {key: changed(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.1:
            return value[:at] + value[at + 1 :]
        if kind < 0.2:
            return value[:at] + [value[at]] * rng.choice((2, 3, 50)) + value[at + 1 :]
        return [*value[:at], changed(value[at], rng), *value[at + 1 :]]
    return like(value, rng) if rng.random() < 0.5 else hostile(rng)


def like(value: Any, rng: random.Random) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2, *NUMBERS))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value * 50, value.upper(), *TEXTS))
    return hostile(rng)


def hostile(rng: random.Random) -> Any:
    """A value of any kind."""
    deep: Any = 0
    for _ in range(rng.choice((1, 3, 500))):
        deep = [deep]
    return rng.choice(
        (None, True, False, {}, [], deep, rng.choice(NUMBERS), rng.choice(TEXTS), {"a": {"b": [1]}})
    )
