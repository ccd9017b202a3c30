"""Cover-resize and centre crop against CogVideoX's own training data code."""

from __future__ import annotations

import pytest

from shared.transforms import resize_crop
from tests.parity.recorded import case_folder, read_tensors


@pytest.mark.parity
def test_resize_crop_is_exact():
    tensors = read_tensors(case_folder("cogvideox") / "resize_crop.safetensors")
    names = sorted(name.removesuffix(".input") for name in tensors if name.endswith(".input"))
    assert names and len(names) * 2 == len(tensors)
    for name in names:
        given, expected = tensors[f"{name}.input"], tensors[f"{name}.output"]
        assert resize_crop(given, *expected.shape[-2:]).equal(expected), name
