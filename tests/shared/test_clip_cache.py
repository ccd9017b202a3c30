"""Encoded clips are kept while codec and clips stay the same; both families' encoders, with tiny codecs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cogvideo_ar.training.data import tokenize_shapes
from cogvideox_diff.training.data import encode_shapes
from shared.checkpoints import load_metadata
from shared.clips.cache import MADE_FROM, cache_key
from shared.errors import WeightsError

NUMBERS = {"num_clips": 3, "seed": 1, "num_frames": 1}


class TinyVAE(nn.Module):
    """Latents are the frames at an eighth of the size, times a weight; counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(1)), 0

    def encode(self, pixels: Tensor) -> Any:
        self.calls += 1
        return SimpleNamespace(mean=pixels[..., ::8, ::8] * self.weight)


class TinyVQVAE(TinyVAE):
    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        return ((pixels[:, 0, ::8, ::8] + 1) * 8 * self.weight).long()


@pytest.fixture(params=["latents", "tokens"])
def encoder(request: pytest.FixtureRequest) -> tuple[TinyVAE, Callable[..., Tensor], str]:
    """A codec, what encodes with it, and the name of the tensor in the file."""
    codec, encode = (
        (TinyVAE(), encode_shapes) if request.param == "latents" else (TinyVQVAE(), tokenize_shapes)
    )

    def encoded(path: Path, **changes: Any) -> Tensor:
        return getattr(encode(codec, path, **NUMBERS | {"quiet": True} | changes), request.param)

    return codec, encoded, request.param


def test_only_the_same_is_read_again(encoder: Any, tmp_path: Path) -> None:
    codec, encode, name = encoder
    path = tmp_path / "a.safetensors"
    first = encode(path)
    assert (len(first), codec.calls) == (3, 1)
    assert torch.equal(encode(path), first) and codec.calls == 1
    assert load_metadata(path)[MADE_FROM] == cache_key(codec, **NUMBERS)
    for calls, changes in enumerate(({"seed": 2}, {"num_clips": 2}, {"num_frames": 5}, {}), start=2):
        again = encode(path, **changes)
        assert codec.calls == calls, changes
        assert torch.equal(encode(path, **changes), again) and codec.calls == calls
    assert torch.equal(again, first)
    codec.weight.data += 1
    assert not torch.equal(encode(path), first) and codec.calls == 6
    assert load_file(path)[name].dtype in (torch.float16, torch.int16)


def test_a_file_of_before_there_were_keys_is_told_by_its_rows(encoder: Any, tmp_path: Path) -> None:
    codec, encode, name = encoder
    path = tmp_path / "a.safetensors"
    old = encode(path) + 1
    save_file({name: old}, path)
    codec.weight.data += 1
    assert torch.equal(encode(path), old) and codec.calls == 1
    assert encode(path, num_clips=2).shape[0] == 2 and codec.calls == 2


def test_a_damaged_file_is_an_error(encoder: Any, tmp_path: Path) -> None:
    _, encode, _ = encoder
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(WeightsError, match="not a safetensors file"):
        encode(tmp_path / "a.safetensors")


def test_quiet_hides_the_bar(encoder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, encode, name = encoder
    encode(tmp_path / "a.safetensors")
    assert capsys.readouterr().err == ""
    encode(tmp_path / "b.safetensors", quiet=False)
    assert f"{name} of 3 clips" in capsys.readouterr().err


def test_the_key_follows_every_weight() -> None:
    key = partial(cache_key, **NUMBERS)
    codec = nn.ModuleDict({"a": nn.Conv2d(2, 3, 3), "b": nn.BatchNorm2d(3)})  # with a buffer without axes
    first = key(codec)
    assert key(codec.to(memory_format=torch.channels_last)) == first
    codec["b"].weight.data[2] += 1e-6
    assert key(codec) != first
    assert key(codec.bfloat16()) != first
