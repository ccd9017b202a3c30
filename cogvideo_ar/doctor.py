"""Recognising CogVideo's weights by their content and comparing them with what their settings ask for, and
with the release. Every next step is a command as a shell takes it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo_ar.checkpoints import ICETK_VQVAE, SAT_DSR, SAT_ITERSR, SAT_STAGE
from cogvideo_ar.clusters import FILE as OWN_CLUSTERS
from cogvideo_ar.clusters import read_clusters
from cogvideo_ar.config import PRESETS, CogVideoConfig, cogview2_dsr, cogview2_itersr
from cogvideo_ar.formats import ModelFolder, OwnFolder, open_folder
from cogvideo_ar.part_paths import NONE, PartPaths
from cogvideo_ar.parts import (
    DEMO,
    FAMILY,
    FINE_STAGES,
    check_super_resolution,
    check_together,
    check_vocabulary,
    load_tokenizer,
)
from cogvideo_ar.sat_layout import (
    CODEC,
    OTHER_FAMILY,
    TEXT_MODEL,
    SatFolder,
    checkpoint_kind,
    codec_config,
    fine_config,
    read_facts,
    stage_config,
)
from cogvideo_ar.sat_parallel import load_checkpoint
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.vqvae import VQVAE
from shared.checkpoints import convert, load_into, load_tensors
from shared.doctor.devices import lacks_bfloat16
from shared.doctor.folders import check_files, unknown_source
from shared.doctor.report import Diagnosis, Finding, bad, note, risk
from shared.errors import WeightsError
from shared.model_folder import needed, without_memory
from shared.tokenizers.icetk import NUM_IMAGE_TOKENS, IceTokenizer

RELEASED = {  # what is known of the released sizes, by kind of part
    "stage": lambda: PRESETS["cogvideo"]().keyframes,
    "codec": lambda: PRESETS["cogvideo"]().vqvae,
    "direct": cogview2_dsr,
    "iterative": cogview2_itersr,
}
FLAGS = {  # that point `generate` to a part
    "stage": "--stage1_path",
    "codec": "--codec_path",
    "direct": "--super_resolution_path",
    "iterative": "--refinement_path",
    "text model": "--text_model_path",
}
RELEASED_PIECES = 130_000
ICETK = Path(".icetk_models")  # below the home folder: where the package icetk keeps what it downloads
OTHERS = (*OTHER_FAMILY, "vae.", "blocks.0.attn.", "encoder.block.", "text_proj.", "encoder.conv_in.conv.")


def examine(path: Path, parts: PartPaths = NONE, device: str = "auto") -> Diagnosis:
    """A model folder ("demo": the one that comes along), with `parts` that lie elsewhere, or a single part;
    never raises on what it finds there, only SettingError for an unknown device."""
    name, path = path, place(str(path))
    lacks_bfloat16(device)
    findings = [x for file in (path, *parts.given.values()) for x in check_files(file)]
    if findings:
        return Diagnosis(path=str(name), findings=tuple(findings))
    try:
        if parts.given or not (path.is_file() or _is_checkpoint(path)):
            return _examine_folder(name, open_folder(name, parts), parts)
        return _examine_part(path)
    except (WeightsError, OSError, RecursionError) as error:
        step = _ask_other(path) if _is_other(path) else _point(path, parts, str(error))
        return Diagnosis(path=str(name), findings=(bad(error, step),))


def place(name: str) -> Path:
    """The folder or file that a name means."""
    return DEMO if name == "demo" else Path(name)


def fetch_for(root: Path) -> Callable[[Path], str]:
    """The released parts come from several places, none of which is known to a command."""
    return unknown_source


def _is_checkpoint(path: Path) -> bool:
    return (path / "latest").is_file() and not (path / "config.json").is_file()


def _is_other(path: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        plain = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return plain.get("family") not in (None, FAMILY)
    return (path / "model_index.json").is_file() or (path / "transformer" / "latest").is_file()


def _ask_other(path: Path) -> str:
    return f"cogvideox doctor {shlex.quote(str(path))}"


def _point(path: Path, parts: PartPaths, reason: str) -> str:
    """The same question with the flags that the reason asks for."""
    words = {"--stage1_path": "STAGE1", "--stage2_path": "STAGE2"}
    for flag, file in (("--codec_path", CODEC), ("--text_model_path", TEXT_MODEL)):
        found = Path.home() / ICETK / file
        words[flag] = shlex.quote(str(found)) if found.is_file() else file
    asked = [flag for flag in words if flag in reason and getattr(parts, flag[2:]) is None]
    given = [f"--{name} {shlex.quote(str(file))}" for name, file in parts.given.items()]
    if not asked or not path.is_dir():
        return ""
    command = f"cogvideo-ar doctor {shlex.quote(str(path))}"
    return " ".join([command, *given, *(f"{flag} {words[flag]}" for flag in asked)])


# ---- whole models


def _examine_folder(name: Path, folder: ModelFolder, parts: PartPaths) -> Diagnosis:
    config = folder.config
    findings: list[Finding] = []
    if isinstance(folder, OwnFolder):
        stored = {} if parts.given else _check_own(folder, findings)
    else:
        stored = _check_sat(folder, findings)
    if not findings:
        findings += _together(folder, config)
    if folder.clusters is None and config.keyframes == PRESETS["cogvideo"]().keyframes:
        step = f"cogvideo-ar clusters --model_path {shlex.quote(str(name))}"
        findings.append(risk("there is no table of token clusters: top_k counts single tokens", step))
    flags = [f" --{part} {shlex.quote(str(file))}" for part, file in parts.given.items()]
    return Diagnosis(
        path=str(name),
        family=FAMILY,
        layout="ours" if isinstance(folder, OwnFolder) else "sat",
        model=_model(config),
        findings=(*findings, *_type_risks(stored)),
        use=f"cogvideo-ar generate --model_path {shlex.quote(str(name))}{''.join(flags)} "
        '--prompt "a red circle"',
    )


def _model(config: CogVideoConfig) -> str:
    for name, make in PRESETS.items():
        known = make()
        if (known.keyframes, known.interpolation, known.vqvae) == (
            config.keyframes,
            config.interpolation,
            config.vqvae,
        ):
            return name
    return "of its own sizes"


def _together(folder: ModelFolder, config: CogVideoConfig) -> Iterator[Finding]:
    """What does not show in one part alone."""
    try:
        check_together(config)
        check_super_resolution(config)
        tokenizer = load_tokenizer(folder.text_model, config.keyframes.num_image_tokens)
        check_vocabulary(tokenizer, config.keyframes)
        if folder.clusters is not None:
            read_clusters(folder.clusters, config.keyframes.num_image_tokens)
    except WeightsError as error:
        yield bad(error)


def _check_own(folder: OwnFolder, findings: list[Finding]) -> dict[str, dict[str, Tensor]]:
    """All nets' tensors on the meta device; what does not fit the settings goes to `findings`."""
    config, path = folder.config, folder.path
    stored: dict[str, dict[str, Tensor]] = {}
    names = ["keyframes", "interpolation", "vqvae", *FINE_STAGES]
    for name in names:
        if (settings := getattr(config, name)) is None:
            continue
        try:
            stored[name] = load_tensors(needed(path / f"{name}.safetensors"), device="meta")
            base = (
                _shared(stored["keyframes"], config)
                if name == "interpolation" and "keyframes" in stored
                else {}
            )
            _fit(_net(name), settings, base | stored[name])
        except WeightsError as error:
            findings.append(bad(f"{name}: {_mistaken(stored.get(name, {}), name)}{error}"))
    return stored


def _net(name: str) -> type[nn.Module]:
    if name in ("keyframes", "interpolation"):
        return CogVideoTransformer
    return VQVAE if name == "vqvae" else SuperResolutionTransformer


def _shared(base: Mapping[str, Tensor], config: CogVideoConfig) -> dict[str, Tensor]:
    with without_memory():
        names = {name for name, _ in CogVideoTransformer(config.keyframes).base_parameters()}
    return {name: x for name, x in base.items() if name in names}


def _mistaken(tensors: Mapping[str, Tensor], name: str) -> str:
    """ "this is ..., " where another part lies in a part's place."""
    if any(key.startswith(OTHERS) for key in tensors):
        return "this is a part of CogVideoX, not of CogVideo; "
    found, wanted = _own_kind(tensors), {"keyframes": "stage", "interpolation": "stage", "vqvae": "codec"}
    if found in ("", wanted.get(name, "super-resolution")):
        return ""
    return f"this is the {found} of CogVideo; "


def _own_kind(tensors: Mapping[str, Tensor]) -> str:
    """Which net has names like these in our layout."""
    marks = {"blocks.0.attention.mix": "stage", "encoder.conv_in.weight": "codec"}
    marks |= {"quantizer.codebook": "codec", "blocks.0.attention.base.qkv.weight": "super-resolution"}
    return next((kind for mark, kind in marks.items() if mark in tensors), "")


def _check_sat(folder: SatFolder, findings: list[Finding]) -> dict[str, dict[str, Tensor]]:
    config = folder.config
    stored: dict[str, dict[str, Tensor]] = {}
    checkpoints = {"keyframes": folder.stages[0], "interpolation": folder.stages[1]}
    checkpoints |= {"vqvae": folder.file(CODEC)}
    kinds = {"super_resolution": ("direct", SAT_DSR), "refinement": ("iterative", SAT_ITERSR)}
    tables = {"keyframes": SAT_STAGE, "interpolation": SAT_STAGE, "vqvae": ICETK_VQVAE}
    for name, (kind, table) in kinds.items():
        if getattr(config, name) is not None and (found := folder.fine_checkpoint(kind)) is not None:
            checkpoints[name], tables[name] = found, table
    for name, path in checkpoints.items():
        try:
            tensors = load_checkpoint(path, shapes_only=True)
            stored[name] = {key: x.to("meta") for key, x in tensors.items()}
            _fit(_net(name), getattr(config, name), convert(stored[name], tables[name]))
        except WeightsError as error:
            findings.append(bad(f"{name} in {path}: {error}"))
    return stored


def _fit(kind: type[nn.Module], config: Any, tensors: Mapping[str, Tensor]) -> None:
    with without_memory():
        net = kind(config)
    load_into(net, tensors)


def _type_risks(stored: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Finding]:
    for name, tensors in stored.items():
        types = {x.dtype for x in tensors.values() if x.is_floating_point()}
        words = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
        if any(kind.itemsize < 2 for kind in types):
            yield risk(f"{name} is stored in {words}: quality is lost, and it is cast when read")
        elif name == "codec" and types - {torch.float32}:
            yield note(f"{name} is stored in {words}, released in float32, in which it runs")
        elif name not in ("vqvae", "codec") and torch.bfloat16 in types:
            yield risk(
                f"{name} is stored in bfloat16, which keeps 8 bits of a weight; float16, as released, 11"
            )


# ---- parts


def _examine_part(path: Path) -> Diagnosis:
    if path.suffix == ".model":
        return _examine_text_model(path)
    if path.suffix == ".npy" or path.name == OWN_CLUSTERS:
        return _examine_clusters(path)
    tensors = load_checkpoint(path, shapes_only=True)
    if any(name.startswith(OTHERS) for name in tensors):
        reason = bad(f"{path} is a part of CogVideoX, not of CogVideo", _ask_other(path))
        return Diagnosis(path=str(path), family="the other one", findings=(reason,))
    if own := _own_kind(tensors):
        return _examine_own_part(path, own, tensors)
    kind = "codec" if "quantize.embed.weight" in tensors else checkpoint_kind(tensors)
    if kind == "other":
        names = ", ".join(sorted(tensors)[:5])
        return Diagnosis(path=str(path), findings=(bad(f"{path} has no names of a known part ({names})"),))
    released = _check_released(path, kind, tensors)
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout="sat",
        model=f"{kind} alone, {'as released' if released else 'of its own sizes'}",
        findings=tuple(_type_risks({kind: tensors})),
        use=_use_of_part(path, kind),
    )


def _check_released(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the sizes are the released ones. WeightsError where names or shapes contradict each other."""
    tables = {"stage": SAT_STAGE, "codec": ICETK_VQVAE, "direct": SAT_DSR, "iterative": SAT_ITERSR}
    nets = {"stage": CogVideoTransformer, "codec": VQVAE}
    shapes = {name: x.to("meta") for name, x in tensors.items()}
    try:
        if kind == "codec":
            config: Any = codec_config(shapes)
        else:
            make = stage_config if kind == "stage" else fine_config
            facts = read_facts(path) if path.is_dir() else {}
            config = make(shapes, facts, _ids(kind, len(shapes["transformer.word_embeddings.weight"])))
        _fit(nets.get(kind, SuperResolutionTransformer), config, convert(shapes, tables[kind]))
    except WeightsError:
        raise
    except (ValueError, TypeError, LookupError) as error:
        raise WeightsError(f"{path} is no {kind} of CogVideo: {error}") from error
    return config == RELEASED[kind]()


def _ids(kind: str, vocab_size: int) -> dict[str, int]:
    """Settings that the codec and the text model decide; without them any that the sizes allow."""
    if vocab_size == RELEASED[kind]().vocab_size:
        return {}
    ids = {"num_image_tokens": max(vocab_size - 2, 1), "start_of_image": max(vocab_size - 1, 1)}
    return ids | ({"pad_token": max(vocab_size - 2, 1)} if kind == "stage" else {})


def _use_of_part(path: Path, kind: str) -> str:
    """The folder's diagnosis where the part lies in a model, else the flag that points to it."""
    for around in list(path.absolute().parents)[:2]:
        if (around / "config.json").is_file() or len(list(around.glob("*/latest"))) > 1:
            return f"cogvideo-ar doctor {shlex.quote(str(around))}"
    words = {flag: flag.strip("-").removesuffix("_path").upper() for flag in FLAGS.values()}
    words |= {"--codec_path": CODEC, "--text_model_path": TEXT_MODEL}
    own = FLAGS[kind]
    whole = ["--stage1_path", "--stage2_path", "--codec_path", "--text_model_path"]
    words |= {own: shlex.quote(str(path)), "--stage2_path": "STAGE2"}
    flags = [f"{flag} {words[flag]}" for flag in dict.fromkeys([*whole, own])]
    return f"cogvideo-ar doctor demo {' '.join(flags)}"


def _examine_own_part(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> Diagnosis:
    home = path.absolute().parent
    beside = (home / "config.json").is_file()
    flags = {"stage": "--stage2_path" if "interpolation" in path.name else "--stage1_path"}
    flags |= {"codec": "--codec_path", "super-resolution": "--super_resolution_path"}
    model = shlex.quote(str(home)) if beside else f"demo {flags[kind]} {shlex.quote(str(path))}"
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout="ours",
        model=f"{kind} alone",
        findings=tuple(_type_risks({kind: tensors})) if kind != "codec" else (),
        use=f"cogvideo-ar doctor {model}",
    )


def _examine_text_model(path: Path) -> Diagnosis:
    pieces = IceTokenizer(path, num_image_tokens=NUM_IMAGE_TOKENS).num_text_tokens
    size = "as released" if pieces == RELEASED_PIECES else f"of {pieces} pieces"
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout="sentencepiece",
        model=f"text model alone, {size}",
        use=_use_of_part(path, "text model"),
    )


def _examine_clusters(path: Path) -> Diagnosis:
    labels = load_tensors(path, device="meta").get("labels") if path.suffix == ".safetensors" else None
    size = NUM_IMAGE_TOKENS if labels is None else labels.numel()
    labels = read_clusters(path, size)
    word = shlex.quote(str(path))
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout="a table",
        model=f"{int(labels.max()) + 1} clusters of {size} image tokens",
        use=f'cogvideo-ar generate --clusters {word} --prompt "a red circle"',
    )
