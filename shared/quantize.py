"""Weights in 8 bits, by torchao (extra `quant`): matrices of the nets' blocks, one scale per output row."""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

import torch
from torch import nn

from shared.errors import SettingError
from shared.offload import Weights, blocks_of

QuantizeMode = Literal["none", "int8", "fp8"]
QUANTIZE_MODES = get_args(QuantizeMode)
SCALE_BYTES = 4
NetT = TypeVar("NetT", bound=nn.Module)


def check_quantize(name: str) -> None:
    """SettingError for an unknown name, and where torchao is needed and absent."""
    if name not in QUANTIZE_MODES:
        raise SettingError(f"unknown quantize {name!r}; legal: {', '.join(QUANTIZE_MODES)}")
    if name != "none":
        _torchao()


def _torchao():  # type: ignore[no-untyped-def]
    try:
        from torchao import quantization  # type: ignore[import-not-found]
    except ImportError as error:
        raise SettingError(
            f"--quantize needs torchao ({error}); install the extra: pip install 'cogvideo-lab[quant]', "
            "or --quantize none"
        ) from error
    return quantization


def quantize(net: NetT, mode: QuantizeMode) -> NetT:
    """`net` with the matrices of its blocks in 8 bits, in place. Computation stays in the net's own type: a
    matrix is read in 8 bits and multiplied as if it were stored exactly so. Embeddings, norms, the first
    and the last layers stay as they are."""
    check_quantize(mode)
    if mode == "none":
        return net
    torchao = _torchao()
    config = {"int8": torchao.Int8WeightOnlyConfig, "fp8": torchao.Float8WeightOnlyConfig}[mode]()
    for block in blocks_of(net):
        torchao.quantize_(block, config)
    return net


def is_quantized(net: nn.Module) -> bool:
    return any(hasattr(x, "__tensor_flatten__") for x in net.parameters())


def quantize_mode(net: nn.Module) -> QuantizeMode:
    """What `quantize` made of `net`."""
    for x in net.parameters():
        if hasattr(x, "__tensor_flatten__"):
            inner = [getattr(x, name) for name in x.__tensor_flatten__()[0]]  # type: ignore[operator]
            return "int8" if any(part.dtype == torch.int8 for part in inner) else "fp8"
    return "none"


def quantized_bytes(block: nn.Module, dtype: torch.dtype, mode: QuantizeMode) -> int:
    """What `block` will take in `dtype` with its matrices in `mode`."""
    weights = Weights.of([block])
    count = sum(x.numel() for x in {id(x): x for _, _, x in weights.slots}.values())
    linears = [part for part in block.modules() if isinstance(part, nn.Linear)]
    if mode == "none":
        return count * dtype.itemsize
    matrices = sum(part.weight.numel() for part in linears)
    return (count - matrices) * dtype.itemsize + matrices + sum(p.out_features for p in linears) * SCALE_BYTES
