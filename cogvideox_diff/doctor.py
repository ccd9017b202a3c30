"""Recognising CogVideoX weights by their content and comparing them with the released models, headers alone.

The manifests are the presets themselves: their nets, built without memory, have the names and shapes of the
released files (`tests/parity` holds them against the recorded ones), in our layout, diffusers' and SAT's.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, DIFFUSERS_VAE, SAT_VAE, sat_transformer_table
from cogvideox_diff.config import PRESETS, CogVideoXConfig
from cogvideox_diff.formats import ModelFolder, check_weights, open_folder
from cogvideox_diff.lora_files import FILES, fit, read_adapter
from cogvideox_diff.model_files import EMBED, FAMILY, PARTS, Part, check_part, empty_net, read_part
from shared.checkpoints import Table, convert, load_tensors
from shared.doctor.folders import check_files
from shared.doctor.report import Diagnosis, Finding, bad, risk
from shared.errors import WeightsError

TRAINED_IN_FLOAT16 = {"cogvideox-2b"}  # the other released models were trained in bfloat16
SAFE_DTYPE = "cogvideox generate --dtype bfloat16, or float32 where the device has no bfloat16"
OTHER_FAMILY = ("transformer.word_embeddings.", "mixins.attention_plus.", "enc.conv_in.", "quantize.embed")
MARKS: tuple[tuple[str, Part, str], ...] = (  # beginning of a name, what has it; the first one that is there
    ("model.diffusion_model.", "transformer", "sat"),
    ("transformer_blocks.", "transformer", "diffusers"),
    ("blocks.", "transformer", "ours"),
    ("t5.", "text_encoder", "ours"),
    ("encoder.block.", "text_encoder", "diffusers"),
    ("encoder.down_blocks.", "vae", "diffusers"),
    ("encoder.down.", "vae", "sat"),
    ("encoder.", "vae", "ours"),
)


def examine(path: Path, base: Path | None = None) -> Diagnosis:
    """A folder, an adapter (for the model in `base`) or a single file; what is wrong there is not raised."""
    findings = check_files(path)
    if findings:
        return Diagnosis(path=str(path), findings=tuple(findings))
    try:
        if path.is_file() or not _is_model(path):
            return _examine_tensors(path, base)
        return _examine_folder(path)
    except (WeightsError, OSError, RecursionError) as error:
        step = _ask_other(path) if _is_other_folder(path) else ""
        return Diagnosis(path=str(path), findings=(bad(error, step),))


def _is_model(path: Path) -> bool:
    marks = ("config.json", "model_index.json", "transformer/latest", "ice_image.pt", "ice_text.model")
    weights = any(path.glob("*.safetensors")) and not (path / "transformer.safetensors").is_file()
    part = (path / "config.json").is_file() and '"family"' not in _text(path / "config.json") and weights
    adapter = any((path / name).is_file() for name in FILES)
    return not part and not adapter and any((path / mark).is_file() for mark in marks)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(2**20).decode("utf-8", errors="replace")


def _is_other_folder(path: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        return json.loads(_text(path / "config.json")).get("family") not in (None, FAMILY)
    return any((path / name).is_file() for name in ("ice_image.pt", "ice_text.model"))


def _ask_other(path: Path) -> str:
    return f"cogvideo-ar doctor {shlex.quote(str(path))}"


# ---- whole models


def _examine_folder(path: Path) -> Diagnosis:
    folder = open_folder(path)
    check_weights(folder)
    tensors = read_part(folder, "transformer", device="meta")
    model = _same_shapes("transformer", tensors)
    word = shlex.quote(str(path))
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout=folder.layout,
        model=model or "of its own sizes",
        findings=tuple(_folder_risks(folder, model)),
        use=f'cogvideox generate --model_path {word} --prompt "a red circle"',
    )


def _folder_risks(folder: ModelFolder, model: str) -> Iterator[Finding]:
    for part in PARTS:
        tensors = read_part(folder, part, device="meta")
        yield from _type_risks(part, tensors, model)
    if folder.trained_dtype == torch.float16 and _is_bfloat16(model):
        yield risk(f"{model} is set to run in float16, but was trained in bfloat16", SAFE_DTYPE)


def _is_bfloat16(model: str) -> bool:
    return bool(model) and model not in TRAINED_IN_FLOAT16 and "demo" not in model


def _type_risks(part: str, tensors: Mapping[str, Tensor], model: str) -> Iterator[Finding]:
    types = {x.dtype for x in tensors.values() if x.is_floating_point()}
    if part == "transformer" and torch.float16 in types and _is_bfloat16(model):
        reason = "its activations leave float16's range: black frames or NaN"
        yield risk(f"{part} is stored in float16, {model} was trained in bfloat16; {reason}", SAFE_DTYPE)
    if small := [str(kind) for kind in types if kind.itemsize < 2]:
        yield risk(f"{part} is stored in {', '.join(small)}: quality is lost, and it is cast when read")


# ---- parts and adapters


def _examine_tensors(path: Path, base: Path | None) -> Diagnosis:
    folder_of_adapter = path.is_dir() and any((path / name).is_file() for name in FILES)
    tensors = {} if folder_of_adapter else load_tensors(path, device="meta")
    if folder_of_adapter or any(".lora_" in name or ".matrix_A." in name for name in tensors):
        return _examine_adapter(path, base)
    if any(name.startswith(OTHER_FAMILY) for name in tensors):
        return Diagnosis(
            path=str(path),
            family="the other one",
            findings=(bad(f"{path} is a part of CogVideo, not of CogVideoX", _ask_other(path)),),
        )
    hits: list[tuple[Part, str]] = [
        (part, layout) for mark, part, layout in MARKS if any(name.startswith(mark) for name in tensors)
    ]
    if not hits:
        names = ", ".join(sorted(tensors)[:5])
        return Diagnosis(path=str(path), findings=(bad(f"{path} has no names of a known model ({names})"),))
    part, layout = hits[0]
    return _examine_part(path, tensors, part, layout)


def _examine_part(path: Path, tensors: Mapping[str, Tensor], part: Part, layout: str) -> Diagnosis:
    model, reason = _nearest(part, layout, tensors)
    findings = [bad(f"{part} fits no released model; nearest is {model}: {reason}")] if reason else []
    findings += _type_risks(part, tensors, model)
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout=layout,
        model=model,
        findings=tuple(findings),
        use=f"put this {part} into a model folder; see `cogvideox convert --help`",
    )


def _nearest(part: Part, layout: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """(preset, "" or in what it differs): the first that fits, else the one most like it."""
    likeness: dict[str, tuple[int, str]] = {}
    for name, make in PRESETS.items():
        config, ours = make(), dict[str, Tensor]()
        try:
            ours = _ours(part, layout, tensors, config)
            check_part(part, {n: x for n, x in ours.items() if n != EMBED}, config)
            return name, ""
        except WeightsError as error:
            likeness[name] = _equal(ours, part, config), str(error)
    name = max(likeness, key=lambda name: likeness[name][0])
    return name, likeness[name][1]


def _ours(
    part: Part, layout: str, tensors: Mapping[str, Tensor], config: CogVideoXConfig
) -> dict[str, Tensor]:
    if layout == "ours":
        return dict(tensors)
    if part == "text_encoder":
        return {f"t5.{n}": x for n, x in tensors.items() if n.startswith(("shared.", "encoder."))}
    if part == "transformer" and layout == "diffusers" and config.transformer.position != "rope+learned":
        tensors = {n: x for n, x in tensors.items() if n != "patch_embed.pos_embedding"}
    tables: dict[tuple[str, str], Table] = {
        ("transformer", "diffusers"): DIFFUSERS_TRANSFORMER,
        ("transformer", "sat"): sat_transformer_table(config.transformer),
        ("vae", "diffusers"): DIFFUSERS_VAE,
        ("vae", "sat"): SAT_VAE,
    }
    return convert(tensors, tables[part, layout])


def _equal(tensors: Mapping[str, Tensor], part: Part, config: CogVideoXConfig) -> int:
    wanted = empty_net(part, config).state_dict()
    return sum(name in wanted and wanted[name].shape == x.shape for name, x in tensors.items())


def _same_shapes(part: Part, tensors: Mapping[str, Tensor]) -> str:
    for name, make in PRESETS.items():
        with suppress(WeightsError):
            check_part(part, tensors, make())
            return name
    return ""


def _examine_adapter(path: Path, base: Path | None) -> Diagnosis:
    adapter = read_adapter(path)
    if base is not None:
        fit(adapter, read_part(open_folder(base), "transformer", device="meta"), path)
    fits = (
        [str(base)]
        if base is not None
        else [name for name, make in PRESETS.items() if _fits(adapter, make())]
    )
    findings = [] if fits else [bad(f"{path} fits no released model", f"cogvideox lora inspect {path}")]
    model = shlex.quote(str(base)) if base else "MODEL"
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout=f"adapter, {adapter.naming} naming",
        model=", ".join(fits) or "unknown",
        findings=tuple(findings),
        use=f"cogvideox doctor {shlex.quote(str(path))} --base {model}" if base is None else "",
    )


def _fits(adapter: object, config: CogVideoXConfig) -> bool:
    with suppress(WeightsError):
        report = fit(adapter, empty_net("transformer", config).state_dict(), "")  # type: ignore[arg-type]
        return not report.unmatched
    return False
