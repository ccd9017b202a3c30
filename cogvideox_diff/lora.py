"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) in the layers of a live transformer.

Several named adapters may sit on one layer and are summed. Their files: `lora_files`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_diff.lora_files import (
    UNREACHED,
    Adapter,
    LoRAReport,
    Pair,
    base_of,
    file_pairs,
    fit,
    read_adapter,
    write_adapter,
)
from shared.config_cli import nearest
from shared.errors import SettingError, WeightsError

TARGETS = ("attn.q", "attn.k", "attn.v", "attn.out")  # what both released trainers adapt
PEFT_TARGETS = {  # names that users know from PEFT, for the same layers
    "to_q": "attn.q",
    "to_k": "attn.k",
    "to_v": "attn.v",
    "to_out.0": "attn.out",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


class LowRank(nn.Module):
    """x [..., I] -> scale * alpha/R * B A x [..., O], computed in the dtype of A and B."""

    def __init__(self, pair: Pair, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        # a copy: two modules may have been given one A
        self.lora_A = nn.Parameter(pair.down.detach().to(device, dtype, copy=True))
        self.lora_B = nn.Parameter(pair.up.detach().to(device, dtype, copy=True))
        self.alpha = pair.alpha
        self.scale = 1.0

    def pair(self) -> Pair:
        return Pair(down=self.lora_A.detach(), up=self.lora_B.detach(), alpha=self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        up = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return up * (self.scale * self.alpha / len(self.lora_A))


class LoRALinear(nn.Module):
    """A linear layer and its adapters: W x + b + the sum of scale * alpha/R * B A x, [..., I] -> [..., O].

    Merging adds the adapters to W and keeps the original, so that unmerging is exact in any dtype."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.original_OI: Tensor | None = None  # W while merged

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def low_ranks(self) -> dict[str, LowRank]:
        return dict(self.adapters.items())  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.original_OI is not None:
            return y
        for low_rank in self.low_ranks().values():
            if low_rank.scale:
                y = y + low_rank(x).to(y.dtype)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Also brings a merged weight up to date."""
        if self.original_OI is None:
            self.original_OI = self.base.weight.detach().clone()
        weight = self.original_OI.to(torch.promote_types(self.original_OI.dtype, torch.float32))
        for low_rank in self.low_ranks().values():
            weight = weight + low_rank.scale * low_rank.pair().delta()
        self.base.weight.copy_(weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self.original_OI is not None:
            self.base.weight.copy_(self.original_OI)
            self.original_OI = None


# ---- adapters of a model


def inject(
    model: nn.Module,
    rank: int,
    alpha: float,
    targets: Sequence[str] = TARGETS,
    *,
    name: str = "default",
    generator: torch.Generator | None = None,
) -> list[str]:
    """Give every target layer a new float32 adapter that changes nothing yet (A random, B zero) and freeze
    all other weights. A target is the end of a layer's name here ("attn.q") or in PEFT ("to_q"). Returns the
    names of the adapted layers; SettingError for targets that do not exist or that no file can hold."""
    if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise SettingError(f"rank must be at least 1 and alpha positive, got rank {rank}, alpha {alpha}")
    generator = generator or torch.Generator().manual_seed(0)
    pairs = {}
    for path in _matching(model, targets):
        outputs, inputs = linear_layers(model)[path].weight.shape
        down = torch.empty(rank, inputs).uniform_(-1, 1, generator=generator) / math.sqrt(inputs)
        pairs[path] = Pair(down=down, up=torch.zeros(outputs, rank), alpha=float(alpha))
    try:
        file_pairs(pairs, "diffusers")  # better known now than after the training
    except WeightsError as error:
        raise SettingError(f"adapters of {', '.join(targets)} cannot be saved: {error}") from error
    attach(model, pairs, name=name, dtype=torch.float32)
    return list(pairs)


def attach(
    model: nn.Module, pairs: Mapping[str, Pair], *, name: str = "default", dtype: torch.dtype | None = None
) -> None:
    """Put an adapter on the named layers and freeze all other weights; `dtype` None is that of each layer."""
    if name in adapter_names(model):
        raise SettingError(f"adapter name {name!r} is taken; the model has {', '.join(adapter_names(model))}")
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
        raise SettingError(f"an adapter's name has letters, digits, '_' and '-' only, got {name!r}")
    layers = linear_layers(model)
    for path in pairs.keys() - _lora_layers(model).keys():
        _replace(model, path, LoRALinear(layers[path]))
    adapted = {id(p) for p in lora_parameters(model)}
    for parameter in model.parameters():
        if id(parameter) not in adapted:
            parameter.requires_grad_(False)
    for path, layer in _lora_layers(model).items():
        if path in pairs:
            weight = layer.weight
            layer.adapters[name] = LowRank(pairs[path], dtype or weight.dtype, weight.device)
            _refresh([layer])


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All layers that can be adapted, by name, whether they are or not."""
    found = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    plain = {path.removesuffix(".base"): layer for path, layer in found.items()}
    return {path: layer for path, layer in plain.items() if path not in UNREACHED}


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights without adapters, under their names of before."""
    weights = {name.replace(".base.", "."): x for name, x in model.state_dict().items()}
    return {name: x for name, x in weights.items() if ".adapters." not in name}


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters in the order they were added."""
    return list(dict.fromkeys(name for layer in _lora_layers(model).values() for name in layer.adapters))


def adapter_scales(model: nn.Module) -> dict[str, float]:
    """The strength of every adapter by name."""
    layers = _lora_layers(model).values()
    return {name: low_rank.scale for layer in layers for name, low_rank in layer.low_ranks().items()}


def lora_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """The adapters' parameters (of one adapter, or of all): what training changes."""
    return [p for _, low_rank in _low_ranks(model, name) for p in low_rank.parameters()]


def adapter_pairs(model: nn.Module, name: str | None = None) -> dict[str, Pair]:
    """The weights of one adapter (the only one, or `name`) by layer."""
    names = adapter_names(model)
    if name is None and len(names) != 1:
        raise SettingError(f"the model has {len(names)} adapters ({', '.join(names)}); name the one to save")
    return {path: low_rank.pair() for path, low_rank in _low_ranks(model, name)}


def set_scale(model: nn.Module, scale: float, name: str | None = None) -> None:
    """Set the strength of one adapter or of all: 1 as trained, 0 off. A merged model follows."""
    check_scale(scale)
    for _, low_rank in _low_ranks(model, name):
        low_rank.scale = float(scale)
    _refresh(_lora_layers(model).values())


def check_scale(scale: float) -> None:
    """SettingError for what is no strength."""
    if not math.isfinite(scale):
        raise SettingError(f"an adapter's scale must be a finite number, got {scale}")


def merge(model: nn.Module) -> None:
    """Add all adapters, at their scales, to the weights: inference then costs nothing extra."""
    for layer in _lora_layers(model).values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """The exact weights of before `merge`."""
    for layer in _lora_layers(model).values():
        layer.unmerge()


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter away, or all; layers without any become plain again."""
    _low_ranks(model, name)  # refuses an unknown name
    for path, layer in _lora_layers(model).items():
        for key in [key for key in layer.adapters if name in (None, key)]:
            del layer.adapters[key]
        _refresh([layer])
        if not layer.adapters:
            layer.unmerge()
            _replace(model, path, layer.base)


def fuse(model: nn.Module) -> None:
    """Merge for good: the weights keep their names and the adapters are gone."""
    merge(model)
    for path, layer in _lora_layers(model).items():
        _replace(model, path, layer.base)


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def _low_ranks(model: nn.Module, name: str | None) -> list[tuple[str, LowRank]]:
    names = adapter_names(model)
    if name is not None and name not in names:
        there = ", ".join(names) or "none"
        raise SettingError(f"no adapter {name!r}{nearest(name, names)}; the model has: {there}")
    return list(_each(model, name))


def _each(model: nn.Module, name: str | None) -> Iterator[tuple[str, LowRank]]:
    for path, layer in _lora_layers(model).items():
        for key, low_rank in layer.low_ranks().items():
            if name in (None, key):
                yield path, low_rank


def _refresh(layers: Iterable[LoRALinear]) -> None:
    for layer in layers:
        if layer.original_OI is not None:
            layer.merge()


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def _matching(model: nn.Module, targets: Sequence[str]) -> list[str]:
    layers = linear_layers(model)
    wanted = tuple(PEFT_TARGETS.get(target, target) for target in targets)
    legal = sorted({re.sub(r"^blocks\.\d+\.", "", path) for path in layers})
    for given, target in zip(targets, wanted, strict=True):
        if not any(_ends(path, target) for path in layers):
            near = nearest(given, (*legal, *PEFT_TARGETS))
            raise SettingError(f"no layer is named {given!r}{near}; legal targets: {', '.join(legal)}")
    return [path for path in layers if any(_ends(path, target) for target in wanted)]


def _ends(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


# ---- files


def save_lora(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    naming: str = "diffusers",
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write one adapter (the only one, or `name`) for diffusers and PEFT, with rank, alpha, base and `notes`
    (trigger word, data, ...) in the metadata. A folder gets `pytorch_lora_weights.safetensors`. Returns the
    file. The scale of `set_scale` is a matter of use and not saved."""
    adapter = Adapter(
        pairs=adapter_pairs(model, name), base=base_of(base_weights(model)), notes=dict(notes or {})
    )
    return write_adapter(adapter, path, naming)


def load_lora(
    model: nn.Module,
    path: str | Path,
    *,
    name: str = "default",
    alpha: float | None = None,
    any_base: bool = False,
    strict: bool = False,
) -> LoRAReport:
    """Read an adapter in diffusers/PEFT or SAT naming and put it on `model`. `alpha` overrides what the file
    says (`read_adapter`); `any_base` skips the check of what it was made for.

    Raises WeightsError, and leaves the model as it is, where nothing matches, shapes do not fit or the
    adapter was made for another model. A part that finds no layer is a warning, with `strict` an error."""
    adapter = read_adapter(path, alpha=alpha)
    report = fit(adapter, base_weights(model), path, any_base=any_base)
    if report.unmatched and strict:
        raise WeightsError(f"{path}: {report}")
    if report.unmatched:
        warnings.warn(f"{path}: {report}", stacklevel=2)
    layers = linear_layers(model)
    attach(model, {key: pair for key, pair in adapter.pairs.items() if key in layers}, name=name)
    return report
