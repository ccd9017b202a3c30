"""A model folder of this project with parts that lie elsewhere, in either form.

A part that lies in another model folder (`keyframes.safetensors` beside its `config.json`, or that folder's
name) brings its settings from there, and its stage 2 what it shares with its own stage 1. Any other part must
have the sizes of the model that it joins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_ar.checkpoints import ICETK_VQVAE, SAT_DSR, SAT_ITERSR, SAT_STAGE
from cogvideo_ar.config import CogVideoConfig
from cogvideo_ar.part_paths import WHOLE, PartPaths
from cogvideo_ar.parts import (
    OwnFiles,
    check_together,
    check_vocabulary,
    load_cast,
    load_tokenizer,
    read_config,
)
from cogvideo_ar.sat_layout import check_kind, checkpoint_folder, fine_config, is_own, read_facts
from cogvideo_ar.sat_parallel import load_checkpoint
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.vqvae import VQVAE
from shared.checkpoints import Table, convert, load_into
from shared.errors import WeightsError
from shared.model_folder import needed, without_memory

META = torch.device("meta")


@dataclass(frozen=True)
class Net:
    """A part that is a net: the field of `Parts` and file name of ours, class and released names."""

    field: str
    kind: Callable[[Any], nn.Module]
    table: Table


NETS = {
    "stage1_path": Net("keyframes", CogVideoTransformer, SAT_STAGE),
    "stage2_path": Net("interpolation", CogVideoTransformer, SAT_STAGE),
    "codec_path": Net("vqvae", VQVAE, ICETK_VQVAE),
    "super_resolution_path": Net("super_resolution", SuperResolutionTransformer, SAT_DSR),
    "refinement_path": Net("refinement", SuperResolutionTransformer, SAT_ITERSR),
}
FILES = {f"{net.field}.safetensors": name for name, net in NETS.items()}


class PointedFiles(OwnFiles):
    """The parts of `folder`, but for those that `paths` name."""

    def __init__(self, folder: Path, paths: PartPaths) -> None:
        super().__init__(folder)
        self.paths = paths
        self._of_net = {net.field: path for name, net in NETS.items() if (path := getattr(paths, name))}

    @cached_property
    def config(self) -> CogVideoConfig:
        config = read_config(self.folder)
        for name, net in NETS.items():
            if (path := self._of_net.get(net.field)) is None:
                continue
            if (home := _home(path, net)) is not None:
                if (settings := getattr(read_config(home), net.field)) is None:
                    raise WeightsError(f"{name}: the model in {home} has no {net.field.replace('_', '-')}")
                config = replace(config, **{net.field: settings})
            elif getattr(config, net.field) is None:
                config = replace(config, **{net.field: _fine_config(name, path, config)})
        return config

    @property
    def text_model(self) -> Path:
        return self.paths.text_model_path or super().text_model

    def read(self, net: str, dtype: torch.dtype | None, device: torch.device) -> dict[str, Tensor]:
        path = self._of_net.get(net)
        if path is None:
            return super().read(net, dtype, device)
        if is_own(path):
            return load_cast(_file(path, net), dtype, device)
        table = next(known.table for known in NETS.values() if known.field == net)
        tensors = convert(load_checkpoint(checkpoint_folder(path), shapes_only=device == META), table)
        return {n: x.to(device, dtype if x.is_floating_point() else None) for n, x in tensors.items()}

    def read_interpolation(
        self, keyframes: CogVideoTransformer, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """What stage 2 does not bring is its own stage 1's, if that is there, else `keyframes`'. Equal
        numbers are held once."""
        own, base = self.read("interpolation", dtype, device), dict(keyframes.base_parameters())
        if self._other_base is not None and not base.keys() <= own.keys():
            before = load_cast(self._other_base, dtype, device)
            own = {name: before[name] for name in base} | own
        if device == META:
            return base | own
        shared = {n for n, x in base.items() if n in own and torch.equal(own[n].to(x.dtype), x)}
        return base | {name: x for name, x in own.items() if name not in shared}

    @property
    def _other_base(self) -> Path | None:
        """Stage 1 of the folder that stage 2 comes from, if it is not the one that is used."""
        path = self._of_net.get("interpolation")
        home = self.folder if path is None else _home(path, NETS["stage2_path"])
        file = None if home is None else home / "keyframes.safetensors"
        chosen = self._of_net.get("keyframes")
        used = self.folder / "keyframes.safetensors" if chosen is None else _file(chosen, "keyframes")
        return file if file is not None and file.is_file() and file.resolve() != used.resolve() else None

    def check(self) -> None:
        """WeightsError unless the parts are what they are given for and fit each other; reads no weights."""
        for name in self.paths.given.keys() & NETS.keys():
            _check_form(name, getattr(self.paths, name))
        config = self.config
        check_together(config)
        check_vocabulary(load_tokenizer(self.text_model, config.keyframes.num_image_tokens), config.keyframes)
        for name, net in NETS.items():
            if net.field in self._of_net:
                self._check_fit(name, net)

    def _check_fit(self, name: str, net: Net) -> None:
        with without_memory():
            model, first = (
                kind(settings)
                for kind, settings in (
                    (net.kind, getattr(self.config, net.field)),
                    (CogVideoTransformer, self.config.keyframes),
                )
            )
        path = self._of_net[net.field]
        try:
            if net.field == "interpolation":
                assert isinstance(first, CogVideoTransformer)
                tensors = self.read_interpolation(first, torch.float32, META)
            else:
                tensors = self.read(net.field, None, META)
            load_into(model, tensors)
        except WeightsError as error:
            raise WeightsError(
                f"--{name} {path} does not fit the model {self.folder}: {error}{self._hint(path)}"
            ) from error
        if not is_own(path):
            heads, wanted = read_facts(path).get("num_attention_heads"), getattr(self.config, net.field)
            if heads and heads != wanted.num_heads:
                raise WeightsError(f"--{name} {path} has {heads} heads, the model {wanted.num_heads}")

    def _hint(self, path: Path) -> str:
        if is_own(path):
            return ""
        absent = ", ".join(f"--{name}" for name in WHOLE if name not in self.paths.given)
        return (
            f"; released parts go together: give {absent or 'all in their released form'}, or by "
            "--model_path the folder that has them"
        )


def makes_a_model(paths: PartPaths) -> bool:
    """Whether released parts are given that need no folder."""
    given = paths.given
    nets = [given[name] for name in WHOLE if name in given and name in NETS]
    return all(name in given for name in WHOLE) and not any(is_own(path) for path in nets)


def _check_form(name: str, path: Path) -> None:
    """Refuse what belongs to another flag."""
    if not is_own(path):
        check_kind(name, path)
    elif (right := FILES.get(path.name, name)) != name:
        raise WeightsError(f"--{name} takes {NETS[name].field}.safetensors, {path} is for --{right}")


def _home(path: Path, net: Net) -> Path | None:
    """The model folder that a part of ours belongs to."""
    if (path / "config.json").is_file():
        return path
    is_part = path.name == f"{net.field}.safetensors" and (path.parent / "config.json").is_file()
    return path.parent if is_part else None


def _file(path: Path, net: str) -> Path:
    return needed(path / f"{net}.safetensors") if (path / "config.json").is_file() else path


def _fine_config(name: str, path: Path, config: CogVideoConfig) -> Any:
    """Settings of super-resolution that the model was without."""
    if is_own(path):
        raise WeightsError(
            f"--{name} {path}: its settings are in the config.json of its model folder; name that folder"
        )
    ids = {field: getattr(config.keyframes, field) for field in ("num_image_tokens", "start_of_image")}
    return fine_config(check_kind(name, path), read_facts(path), ids)
