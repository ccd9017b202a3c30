"""Recognising CogVideo's weights by their content and comparing them with what their settings ask for."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_ar.checkpoints import ICETK_VQVAE, SAT_DSR, SAT_ITERSR, SAT_STAGE
from cogvideo_ar.config import CogVideoConfig, cogvideo
from cogvideo_ar.formats import OwnFolder, open_folder
from cogvideo_ar.parts import FAMILY, FINE_STAGES
from cogvideo_ar.sat_layout import CODEC, OTHER_FAMILY, SatFolder, checkpoint_kind
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.vqvae import VQVAE
from shared.checkpoints import Table, convert, load_into, load_tensors
from shared.doctor.folders import check_files
from shared.doctor.report import Diagnosis, Finding, bad, risk
from shared.errors import WeightsError
from shared.model_folder import needed, without_memory

TABLES: dict[str, Table] = {"stage": SAT_STAGE, "direct": SAT_DSR, "iterative": SAT_ITERSR}


def examine(path: Path) -> Diagnosis:
    """A model folder or a single file; never raises on what it finds there."""
    findings = check_files(path)
    if findings:
        return Diagnosis(path=str(path), findings=tuple(findings))
    try:
        return _examine_part(path) if path.is_file() or _is_checkpoint(path) else _examine_folder(path)
    except (WeightsError, OSError, RecursionError) as error:
        return Diagnosis(path=str(path), findings=(bad(error, _ask_other(path) if _is_other(path) else ""),))


def _is_checkpoint(path: Path) -> bool:
    return (path / "latest").is_file() and not (path / "config.json").is_file()


def _is_other(path: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError):
        return json.loads((path / "config.json").read_text(encoding="utf-8")).get("family") not in (
            None,
            FAMILY,
        )
    return (path / "model_index.json").is_file() or (path / "transformer" / "latest").is_file()


def _ask_other(path: Path) -> str:
    return f"cogvideox doctor {shlex.quote(str(path))}"


# ---- whole models


def _examine_folder(path: Path) -> Diagnosis:
    folder = open_folder(path)
    config = folder.config
    stored = _check_own(folder) if isinstance(folder, OwnFolder) else _check_sat(folder)
    released = config.keyframes == cogvideo().keyframes
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout="ours" if isinstance(folder, OwnFolder) else "sat",
        model="cogvideo" if released else "of its own sizes",
        findings=tuple(_type_risks(stored)),
        use=f'cogvideo-ar generate --model_path {shlex.quote(str(path))} --prompt "a red circle"',
    )


def _check_own(folder: OwnFolder) -> dict[str, Tensor]:
    """All parts' tensors on the meta device; WeightsError where they do not fit the settings."""
    config, path = folder.config, folder.path
    base = _read(path, "keyframes")
    _fit(CogVideoTransformer, config.keyframes, base)
    _fit(CogVideoTransformer, config.interpolation, _shared(base, config) | _read(path, "interpolation"))
    _fit(VQVAE, config.vqvae, _read(path, "vqvae"))
    for name in FINE_STAGES:
        if (fine := getattr(config, name)) is not None:
            _fit(SuperResolutionTransformer, fine, _read(path, name))
    needed(path / "ice_text.model")
    return base


def _shared(base: Mapping[str, Tensor], config: CogVideoConfig) -> dict[str, Tensor]:
    with without_memory():
        names = {name for name, _ in CogVideoTransformer(config.keyframes).base_parameters()}
    return {name: x for name, x in base.items() if name in names}


def _check_sat(folder: SatFolder) -> dict[str, Tensor]:
    config = folder.config
    first, second = (load_tensors(stage, device="meta") for stage in folder.stages)
    _fit(CogVideoTransformer, config.keyframes, convert(first, SAT_STAGE))
    _fit(CogVideoTransformer, config.interpolation, convert(second, SAT_STAGE))
    _fit(VQVAE, config.vqvae, convert(load_tensors(folder.file(CODEC), device="meta"), ICETK_VQVAE))
    return first


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    return load_tensors(needed(folder / f"{name}.safetensors"), device="meta")


def _fit(kind: type[nn.Module], config: Any, tensors: Mapping[str, Tensor]) -> None:
    with without_memory():
        net = kind(config)
    load_into(net, tensors)


def _type_risks(tensors: Mapping[str, Tensor]) -> list[Finding]:
    types = {x.dtype for x in tensors.values() if x.is_floating_point()}
    wrong = sorted(str(kind) for kind in types if kind not in (torch.float16, torch.bfloat16, torch.float32))
    return [risk(f"the transformers are stored in {', '.join(wrong)}; released is float16")] if wrong else []


# ---- parts


def _examine_part(path: Path) -> Diagnosis:
    tensors = load_tensors(path, device="meta")
    if any(name.startswith(OTHER_FAMILY) for name in tensors):
        reason = bad(f"{path} is a part of CogVideoX, not of CogVideo", _ask_other(path))
        return Diagnosis(path=str(path), family="the other one", findings=(reason,))
    kind = "codec" if "quantize.embed.weight" in tensors else checkpoint_kind(tensors)
    if kind == "other":
        names = ", ".join(sorted(tensors)[:5])
        return Diagnosis(path=str(path), findings=(bad(f"{path} has no names of a known part ({names})"),))
    convert(tensors, ICETK_VQVAE if kind == "codec" else TABLES[kind])
    word = shlex.quote(str(path.parent))
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout="sat",
        model=f"{kind} alone",
        findings=tuple(_type_risks(tensors)) if kind != "codec" else (),
        use=f"cogvideo-ar doctor {word}",
    )
