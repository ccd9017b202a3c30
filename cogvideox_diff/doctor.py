"""Recognising CogVideoX weights by their content and comparing them with the released models, headers alone.

The manifests are the presets themselves: their nets, built without memory, have the names and shapes of the
released files (`tests/parity` holds them against the recorded ones), in our layout, diffusers' and SAT's.
Every next step is a command as a shell takes it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, DIFFUSERS_VAE, SAT_VAE, sat_transformer_table
from cogvideox_diff.config import PRESETS, CogVideoXConfig
from cogvideox_diff.delta import DELTA
from cogvideox_diff.diffusers_config import config_from_diffusers
from cogvideox_diff.formats import DEMOS, ModelFolder, open_folder
from cogvideox_diff.lora_files import FILES, Adapter, LoRAReport, fit, read_adapter
from cogvideox_diff.model_files import (
    DIFFUSERS_INDEX,
    EMBED,
    FAMILY,
    OUR_CONFIG,
    PARTS,
    Part,
    check_part,
    empty_net,
    read_json,
    read_part,
)
from cogvideox_diff.planning import tasks_of
from cogvideox_diff.sat_layout import VAE_FILE
from shared.checkpoints import Table, convert, load_tensors
from shared.doctor.devices import lacks_bfloat16
from shared.doctor.folders import check_files
from shared.doctor.hub import hub_command
from shared.doctor.report import Diagnosis, Finding, bad, note, risk
from shared.errors import WeightsError
from shared.tokenizers.t5 import check_tokenizer

TRAINED_IN_FLOAT16 = {"cogvideox-2b"}  # the other released models were trained in bfloat16
RELEASED_AS = {
    "cogvideox-2b": "THUDM/CogVideoX-2b",
    "cogvideox-5b": "THUDM/CogVideoX-5b",
    "cogvideox-5b-i2v": "THUDM/CogVideoX-5b-I2V",
    "cogvideox-1.5-5b": "THUDM/CogVideoX1.5-5B",
    "cogvideox-1.5-5b-i2v": "THUDM/CogVideoX1.5-5B-I2V",
}
OTHER_FAMILY = (
    *("transformer.word_embeddings.", "mixins.attention_plus.", "mixins.extra_position_embedding."),
    *(
        "enc.conv_in.",
        "quantize.embed",
        "word_embeddings.",
        "extra_position_embeddings.",
        "encoder.conv_in.w",
    ),
)
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
SCALARS = {  # settings that no tensor shows, by part; a wrong one spoils frames without an error
    "vae": ("scaling_factor", "invert_scale_latents"),
    "schedule": ("num_timesteps", "beta_start", "beta_end", "snr_shift", "zero_terminal_snr"),
}


def examine(path: Path, base: Path | None = None, device: str = "auto") -> Diagnosis:
    """A folder ("demo": the one that comes along), an adapter (for the model in `base`) or a single file, to
    be run on `device`; what is wrong there is not raised."""
    name, path = path, place(str(path))
    old = lacks_bfloat16(device)
    if findings := check_files(path, fetch_for(path)):
        return Diagnosis(path=str(name), model=_named(path) or "unknown", findings=tuple(findings))
    try:
        if path.is_file() or not _is_model(path):
            return _examine_tensors(path, base)
        return _examine_folder(name, open_folder(path), old)
    except (WeightsError, OSError, RecursionError) as error:
        step = _ask_other(path) if _is_other_folder(path) else ""
        absent = step or not path.is_dir() or not _named(path)
        step = step if absent else _fetch_absent(path)
        return Diagnosis(path=str(name), model=_named(path) or "unknown", findings=(bad(error, step),))


def place(name: str) -> Path:
    """The folder or file that a name means."""
    return DEMOS.get(name, Path(name))


def fetch_for(root: Path) -> Callable[[Path], str]:
    """What gets a file of the model folder `root` again."""
    repository = RELEASED_AS.get(_named(root), "")
    return lambda file: hub_command(repository, file, root)


def _named(path: Path) -> str:
    """The released model that diffusers' configurations in a folder describe; "" if none is or does."""
    with suppress(WeightsError, KeyError, TypeError, ValueError, AttributeError, RecursionError):
        parts = ("transformer", "vae", "text_encoder")
        plain = {part: read_json(path / part / "config.json") for part in parts}
        plain["scheduler"] = read_json(path / "scheduler" / "scheduler_config.json")
        net = config_from_diffusers(plain).transformer
        return next((name for name in RELEASED_AS if PRESETS[name]().transformer == net), "")
    return ""


def _fetch_absent(path: Path) -> str:
    """What fetches the parts of a released diffusers folder that are not there."""
    files = ("transformer", "vae", "text_encoder", "tokenizer")
    lost = [part for part in files if not any((path / part).glob("*.[sm]*[lsr]"))]
    command = hub_command(RELEASED_AS.get(_named(path), ""), path / "PART", path)
    return command.replace("PART", f"--include '{lost[0]}/*'") if lost and command else ""


def _is_model(path: Path) -> bool:
    marks = (OUR_CONFIG, DIFFUSERS_INDEX, "transformer/latest", "ice_image.pt", "ice_text.model")
    weights = any(path.glob("*.safetensors")) and not (path / "transformer.safetensors").is_file()
    part = (path / OUR_CONFIG).is_file() and '"family"' not in _text(path / OUR_CONFIG) and weights
    adapter = any((path / name).is_file() for name in FILES)
    return not part and not adapter and any((path / mark).is_file() for mark in marks)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(2**20).decode("utf-8", errors="replace")


def _is_other_folder(path: Path) -> bool:
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        return json.loads(_text(path / OUR_CONFIG)).get("family") not in (None, FAMILY)
    stages = any((path / name / "latest").is_file() for name in ("cogvideo-stage1", "cogvideo-stage2"))
    return stages or any((path / name).is_file() for name in ("ice_image.pt", "ice_text.model"))


def _ask_other(path: Path) -> str:
    return f"cogvideo-ar doctor {shlex.quote(str(path))}"


# ---- whole models


def _examine_folder(name: Path, folder: ModelFolder, old_device: str) -> Diagnosis:
    stored: dict[Part, dict[str, Tensor]] = {}
    findings = [] if folder.base is None else check_files(folder.base, fetch_for(folder.base))
    for part in PARTS:
        try:
            stored[part] = read_part(folder, part, device="meta")
        except WeightsError as error:
            findings.append(bad(f"{part}: {_mistaken(folder, part)}{error}", _fetch_part(folder, part)))
    try:
        check_tokenizer(folder.tokenizer, str(folder.tokenizer))
    except (WeightsError, OSError) as error:
        findings.append(bad(error, fetch_for(folder.path)(folder.tokenizer / "spiece.model")))
    model = _same_shapes("transformer", stored.get("transformer", {}))
    if len(stored) == len(PARTS):
        findings += _folder_risks(name, folder, stored, model, old_device)
    return Diagnosis(
        path=str(name),
        family=FAMILY,
        layout=folder.layout if folder.base is None else "ours, a difference from another folder",
        model=model or "of its own sizes",
        findings=tuple(findings),
        use=_generate(name, folder.config),
    )


def _generate(name: Path, config: CogVideoXConfig, *flags: str) -> str:
    """The command that uses a model."""
    image = ["--image_or_video_path image.png"] if tasks_of(config) == {"i2v"} else []
    words = [f"cogvideox generate --model_path {shlex.quote(str(name))}", *flags, *image]
    return " ".join([*words, '--prompt "a red circle"'])


def _place_of(folder: ModelFolder, part: Part) -> Path:
    if folder.layout == "ours":
        return (folder.base or folder.path) / f"{part}.safetensors"
    if folder.layout == "sat" and part != "transformer":
        return folder.path / VAE_FILE if part == "vae" else folder.tokenizer
    return folder.path / part


def _mistaken(folder: ModelFolder, part: Part) -> str:
    """ "this is ..., " where another part or model lies in a part's place."""
    with suppress(WeightsError, OSError):
        tensors = load_tensors(_place_of(folder, part), device="meta")
        if _is_other(tensors):
            return "this is a part of CogVideo, not of CogVideoX; "
        if (found := _part_of(tensors)) is None:
            return ""
        model, reason = _nearest(*found, tensors)
        if found[0] != part or not reason:
            return f"this is {'nearest to ' if reason else ''}the {found[0]} of {model}; "
    return ""


def _fetch_part(folder: ModelFolder, part: Part) -> str:
    command = hub_command(RELEASED_AS.get(_named(folder.path), ""), folder.path / "PART", folder.path)
    return command.replace("PART", f"--include '{part}/*'")


def _folder_risks(
    name: Path, folder: ModelFolder, stored: Mapping[Part, Mapping[str, Tensor]], model: str, old_device: str
) -> Iterator[Finding]:
    safe = _generate(name, folder.config, "--dtype", "float32" if old_device else "bfloat16")
    for part in PARTS:
        yield from _type_risks(part, stored[part], model, safe)
    if folder.trained_dtype == torch.float16 and is_bfloat16(model):
        yield risk(f"{model} is set to run in float16, but was trained in bfloat16", safe)
    if folder.trained_dtype == torch.bfloat16 and old_device:
        reason = (
            f"{old_device} has no bfloat16, in which {model or 'the model'} runs, and it leaves float16's"
        )
        step = _generate(name, folder.config, "--dtype float32", "--offload model")
        yield risk(f"{reason} range: float32 is right there, at twice the memory", step)
    if model in RELEASED_AS:
        yield from _scalar_risks(folder.config, model)


def _scalar_risks(config: CogVideoXConfig, model: str) -> Iterator[Finding]:
    """Settings of another release beside this one's weights."""
    released = PRESETS[model]()
    for part, names in SCALARS.items():
        got, wanted = getattr(config, part), getattr(released, part)
        for field in (field.name for field in fields(got) if field.name in names):
            if (found := getattr(got, field)) != (right := getattr(wanted, field)):
                yield risk(f"{part}.{field} is {found}, {model} was trained with {right}")


def is_bfloat16(model: str) -> bool:
    """Whether a preset was trained in bfloat16."""
    return bool(model) and model not in TRAINED_IN_FLOAT16 and "demo" not in model


def _type_risks(part: str, tensors: Mapping[str, Tensor], model: str, safe: str = "") -> Iterator[Finding]:
    types = {x.dtype for x in tensors.values() if x.is_floating_point()}
    if part == "transformer" and torch.float16 in types and is_bfloat16(model):
        reason = "its activations leave float16's range: black frames or NaN"
        yield risk(f"{part} is stored in float16, {model} was trained in bfloat16; {reason}", safe)
    if small := sorted(_word(kind) for kind in types if kind.itemsize < 2):
        yield risk(f"{part} is stored in {', '.join(small)}: quality is lost, and it is cast when read")
    usual = torch.float16 if model in TRAINED_IN_FLOAT16 else torch.bfloat16
    if model in RELEASED_AS and (other := types - {usual, torch.float16}) and not small:
        names = ", ".join(sorted(map(_word, other)))
        yield note(f"{part} is stored in {names}; {model} was released in {_word(usual)}")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- parts and adapters


def _is_other(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(OTHER_FAMILY) for name in tensors)


def _part_of(tensors: Mapping[str, Tensor]) -> tuple[Part, str] | None:
    """(part, layout) by the names."""
    for mark, part, layout in MARKS:
        if any(name.startswith(mark) for name in tensors):
            return part, layout
    return None


def _examine_tensors(path: Path, base: Path | None) -> Diagnosis:
    folder_of_adapter = path.is_dir() and any((path / name).is_file() for name in FILES)
    tensors = {} if folder_of_adapter else load_tensors(path, device="meta")
    if path.name == DELTA:
        return _examine_delta(path)
    if folder_of_adapter or _is_adapter(tensors):
        return _examine_adapter(path, base)
    if _is_other(tensors):
        return Diagnosis(
            path=str(path),
            family="the other one",
            findings=(bad(f"{path} is a part of CogVideo, not of CogVideoX", _ask_other(path)),),
        )
    found = _part_of(tensors)
    if found is None:
        names = ", ".join(sorted(tensors)[:5])
        return Diagnosis(path=str(path), findings=(bad(f"{path} has no names of a known model ({names})"),))
    return _examine_part(path, tensors, *found)


def _is_adapter(tensors: Mapping[str, Tensor]) -> bool:
    """A LoRA alone: a SAT checkpoint may hold whole weights beside its pairs."""
    pairs = [n for n in tensors if any(m in n for m in (".lora_", ".lora.", ".matrix_A.", ".matrix_B."))]
    return bool(pairs) and not any(
        name.endswith(("patch_embed.proj.weight", ".original.weight")) for name in tensors
    )


def _examine_delta(path: Path) -> Diagnosis:
    folder = shlex.quote(str(path.parent))
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout="ours, a difference from another folder",
        use=f"cogvideox doctor {folder}",
    )


def _examine_part(path: Path, tensors: Mapping[str, Tensor], part: Part, layout: str) -> Diagnosis:
    model, reason = _nearest(part, layout, tensors)
    home = _home(path)
    if reason and home is not None and _fits_home(part, layout, tensors, home):
        model, reason = "of its own sizes", ""
    findings = [bad(f"{part} fits no released model; nearest is {model}: {reason}")] if reason else []
    findings += _type_risks(part, tensors, model)
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout=layout,
        model=f"{model}, {part} alone",
        findings=tuple(findings),
        use="" if home is None else f"cogvideox doctor {shlex.quote(str(home))}",
    )


def _fits_home(part: Part, layout: str, tensors: Mapping[str, Tensor], home: Path) -> bool:
    """Whether a part has the sizes that the model folder around it asks for."""
    with suppress(WeightsError, OSError, RecursionError):
        config = open_folder(home).config
        ours = _ours(part, layout, tensors, config)
        check_part(part, {n: x for n, x in ours.items() if n != EMBED}, config)
        return True
    return False


def _home(path: Path) -> Path | None:
    """The model folder that a part lies in."""
    for around in list(path.absolute().parents)[:3]:
        if _is_model(around):
            return around
    return None


def _nearest(part: Part, layout: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """(preset, "" or in what it differs): the first that fits, else the one most like it."""
    likeness: dict[str, int] = {}
    reasons: dict[str, str] = {}
    for name, make in PRESETS.items():
        wanted = _wanted(name, part)
        try:
            ours = _ours(part, layout, tensors, make())
        except WeightsError as error:
            ours, reasons[name] = {}, str(error)
        shapes = {n: x.shape for n, x in ours.items() if n != EMBED}
        if shapes == {n: x.shape for n, x in wanted.items()}:
            return name, ""
        likeness[name] = sum(n in wanted and wanted[n].shape == shape for n, shape in shapes.items())
    name = max(likeness, key=lambda name: likeness[name])
    return name, reasons.get(name) or _misfit(part, layout, tensors, name)


def _misfit(part: Part, layout: str, tensors: Mapping[str, Tensor], name: str) -> str:
    config = PRESETS[name]()
    try:
        ours = _ours(part, layout, tensors, config)
        check_part(part, {n: x for n, x in ours.items() if n != EMBED}, config)
    except WeightsError as error:
        return str(error)
    return "other names"


@cache
def _wanted(name: str, part: Part) -> dict[str, Tensor]:
    """Names and shapes of a preset's part, as tensors without memory."""
    return {n: x for n, x in empty_net(part, PRESETS[name]()).state_dict().items() if n != EMBED}


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


def _same_shapes(part: Part, tensors: Mapping[str, Tensor]) -> str:
    shapes = {name: x.shape for name, x in tensors.items()}
    known = ((name, _wanted(name, part)) for name in PRESETS)
    return next((name for name, wanted in known if {n: x.shape for n, x in wanted.items()} == shapes), "")


def _examine_adapter(path: Path, base: Path | None) -> Diagnosis:
    adapter = read_adapter(path)
    models = _fitting(adapter) if base is None else {}
    findings = list(_adapter_risks(adapter))
    use = ""
    if base is not None:
        folder = open_folder(base)
        report = fit(adapter, read_part(folder, "transformer", device="meta"), path)
        findings += _unmatched(report, str(base))
        use = _generate(base, folder.config, f"--lora_path {shlex.quote(str(path))}")
        models = {str(base): report}
    elif models:
        findings += _unmatched(next(iter(models.values())), next(iter(models)))
        use = _use_of_adapter(path, next(iter(models)))
    else:
        reason = f"{path} fits no released model{_made_for(adapter)}"
        findings.insert(0, bad(reason, f"cogvideox lora inspect {shlex.quote(str(path))}"))
    return Diagnosis(
        path=str(path),
        family=FAMILY,
        layout=f"adapter, {adapter.naming} naming",
        model=", ".join(models) or "unknown",
        findings=tuple(findings),
        use=use,
    )


def _use_of_adapter(path: Path, model: str) -> str:
    file = shlex.quote(str(path))
    if model == "cogvideox-demo":
        return _generate(Path("demo"), PRESETS[model](), f"--lora_path {file}")
    return f"cogvideox lora inspect {file} --preset {model}"


def _made_for(adapter: Adapter) -> str:
    words = ", ".join(f"{key} {value}" for key, value in (adapter.base or {}).items())
    return f"; it was made for {words}" if words else ""


def _adapter_risks(adapter: Adapter) -> Iterator[Finding]:
    """What pairs show by their numbers."""
    broken = [n for n, p in adapter.pairs.items() if not (p.up.isfinite().all() and p.down.isfinite().all())]
    if broken:
        yield bad(f"{len(broken)} of {len(adapter.pairs)} pairs hold NaN or infinity ({broken[0]}, ...)")
    idle = [name for name, pair in adapter.pairs.items() if not pair.up.any() or not pair.down.any()]
    if idle and len(idle) == len(adapter.pairs):
        yield risk("all pairs are zero: the adapter changes nothing; was it trained?")
    elif idle:
        yield note(f"{len(idle)} of {len(adapter.pairs)} pairs are zero and change nothing")


def _unmatched(report: LoRAReport, model: str) -> Iterator[Finding]:
    if report.unmatched:
        names = ", ".join(report.unmatched[:5])
        count = f"{len(report.unmatched)} of {report.matched + len(report.unmatched)}"
        yield risk(f"{count} adapted layers are not in {model}, and are left out ({names})")


def _fitting(adapter: Adapter) -> dict[str, LoRAReport]:
    """The presets that have the adapter's layers, those that have all of them first."""
    found: dict[str, LoRAReport] = {}
    for name in PRESETS:
        with suppress(WeightsError):
            found[name] = fit(adapter, _wanted(name, "transformer"), "")
    return dict(sorted(found.items(), key=lambda item: len(item[1].unmatched)))
