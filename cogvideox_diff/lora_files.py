"""Files with low-rank adapters: what the diffusers/PEFT and SAT namings mean in our module names.

An adapter of one linear map W is a pair A [R, I], B [O, R]; it adds alpha/R * B A to W [O, I]. Two of our
modules may be one matrix in a file (SAT: q, k and v). Its pairs are then read and written through the same
tables as its weights: B is cut and joined by rows as W is, A is one for all rows, or one for each part.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cogvideox_diff.checkpoints import DIFFUSERS_TRANSFORMER, SAT_TRANSFORMER
from shared import torch_files
from shared.checkpoints import Table, convert, invert, load_metadata, load_tensors, save_tensors
from shared.config_cli import pick
from shared.errors import SettingError, WeightsError, shown
from shared.files import atomic_path
from shared.json_files import parse_json

Naming = Literal["diffusers", "sat"]
TABLES: dict[str, Table] = {"diffusers": DIFFUSERS_TRANSFORMER, "sat": SAT_TRANSFORMER}
LORA_FILE = "pytorch_lora_weights.safetensors"
FILES = (LORA_FILE, "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")
PEFT_PREFIX = "transformer."
PEFT_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's own configuration
OWN_METADATA = "cogvideo_lab"  # rank, alpha, targets, base and notes as JSON
SAT_ALPHA = 1.0
UNREACHED = ("patch_embed.proj",)  # its kernel is used without calling the layer

_PREFIXES = r"(?:base_model\.model\.|module\.|model\.(?!diffusion_model)|transformer\.)*"
_ENTRY = {  # part: A or B (or an older word for it); index: of the pair, where several share a matrix
    "diffusers": re.compile(
        rf"{_PREFIXES}(?P<module>.+?)\.(?:lora_(?P<part>[AB])(?:\.\w+)?\.weight"
        r"|lora[._](?P<old>down|up)\.weight|(?P<alpha>alpha))"
    ),
    "sat": re.compile(r"(?P<module>.+)\.matrix_(?P<part>[AB])\.(?P<index>\d+)"),
}
_UNSUPPORTED = re.compile(r"dora_scale|lora_magnitude_vector|lokr_|hada_w|lora_[AB](?:\.\w+)?\.bias")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The adapter of one linear map: A = `down` [R, I], B = `up` [O, R]."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> Tensor:
        """What is added to the weight: alpha/R * B A [O, I], in float32 or better."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        return self.alpha / self.rank * (self.up.to(wide) @ self.down.to(wide))

    def folded(self) -> Pair:
        """The same with alpha = rank, for readers that do not know alpha."""
        return self.with_alpha(float(self.rank))

    def with_alpha(self, alpha: float) -> Pair:
        """The same with another alpha; B makes up for it."""
        up = (self.alpha / alpha * self.up.float()).to(self.up.dtype)
        return Pair(down=self.down, up=up, alpha=alpha)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a file holds. `pairs`: by the name of our module. `unmatched`: names of adapted modules in the
    file that no CogVideoX transformer has. `base`: what it was made for (`base_of`), if the file says so."""

    pairs: dict[str, Pair]
    naming: Naming = "diffusers"
    alpha_source: str = "given"
    unmatched: tuple[str, ...] = ()
    base: dict[str, Any] | None = None
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> list[int]:
        return sorted({pair.rank for pair in self.pairs.values()})

    @property
    def alphas(self) -> list[float]:
        return sorted({pair.alpha for pair in self.pairs.values()})

    @property
    def targets(self) -> list[str]:
        """Names of adapted modules without their block: "attn.q", ..."""
        return sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in self.pairs})


def base_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells one variant's weights (in our names) from another's, by shapes alone."""
    shapes = {name: list(x.shape) for name, x in weights.items()}
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return {
        "layers": len(blocks),
        "width": shapes["text_proj.weight"][0],
        "head": shapes["blocks.0.attn.norm_q.weight"][0],
        "text_width": shapes["text_proj.weight"][1],
        "patch_kernel": shapes["patch_embed.proj.weight"][1:],
        "outputs": shapes["proj_out.weight"][0],
        "offset_input": "ofs_embed.fc1.weight" in shapes,
    }


def base_difference(made_for: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """ "width 3072, here 1920; ..."; empty where both are the same variant."""
    keys = [key for key in found if made_for.get(key) != found[key]]
    return "; ".join(f"{key} {made_for.get(key)}, here {found[key]}" for key in keys)


# ---- reading


def read_adapter(path: str | Path, *, alpha: float | None = None) -> Adapter:
    """The adapter in a file or folder, in diffusers/PEFT or SAT naming, told by content.

    alpha is, in this order: the argument; the file's per-module values; its metadata, or the
    `adapter_config.json` beside it; 1 in SAT files, whose trainer knows no other; the rank elsewhere, as in
    diffusers.
    Raises WeightsError where there are no pairs, or halves of pairs are absent or do not fit each other."""
    file = _adapter_file(Path(path))
    tensors = load_tensors(file)
    naming: Naming = "sat" if any(_ENTRY["sat"].fullmatch(name) for name in tensors) else "diffusers"
    if odd := sorted(name for name in tensors if _UNSUPPORTED.search(name)):
        raise WeightsError(f"{path} is not a plain LoRA (DoRA, LoKr, LoHa or biases): {shown(odd)}")
    entries = _entries(tensors, naming)
    if not entries:
        names = shown(sorted(tensors))
        raise WeightsError(f"{path} holds no LoRA pairs: 0 of {len(tensors)} tensors are named so ({names})")
    parts, unmatched = _our_parts(entries, naming, path)
    metadata = _metadata(file)
    alphas, source = _alphas(entries, naming, metadata, alpha)
    pairs = {name: Pair(down=a, up=b, alpha=alphas[key]) for name, (a, b, key) in parts.items()}
    base, notes = _own_metadata(metadata)
    return Adapter(
        pairs=pairs, naming=naming, alpha_source=source, unmatched=unmatched, base=base, notes=notes
    )


@dataclass
class _Entry:
    """One adapted matrix of the file."""

    downs: dict[int, Tensor] = field(default_factory=dict)
    ups: dict[int, Tensor] = field(default_factory=dict)
    alpha: float | None = None


def _entries(tensors: Mapping[str, Tensor], naming: Naming) -> dict[str, _Entry]:
    found: dict[str, _Entry] = {}
    for name, x in tensors.items():
        match = _ENTRY[naming].fullmatch(name)
        if match is None:
            continue
        groups = match.groupdict()
        entry = found.setdefault(groups["module"], _Entry())
        if groups.get("alpha"):
            entry.alpha = float(x)
            continue
        side = entry.downs if "A" in (groups["part"] or "") or groups.get("old") == "down" else entry.ups
        side[int(groups.get("index") or 0)] = x
    return found


def _our_parts(
    entries: Mapping[str, _Entry], naming: Naming, path: str | Path
) -> tuple[dict[str, tuple[Tensor, Tensor, str]], tuple[str, ...]]:
    """Our module -> (A, B, module in the file), and the file's modules that have no counterpart here."""
    broken = [f"{name} {problem}" for name, entry in entries.items() if (problem := _problem(entry))]
    if broken:
        count = f"{len(broken)} of {len(entries)} adapted matrices are broken"
        raise WeightsError(f"{path}: {count}: {shown(sorted(broken))}")
    parts, unmatched = {}, []
    for name, entry in entries.items():
        try:
            ups = convert({f"{name}.weight": torch.cat(_ordered(entry.ups))}, TABLES[naming])
        except WeightsError:
            unmatched.append(name)
            continue
        downs = _ordered(entry.downs)
        downs = downs * len(ups) if len(downs) == 1 else downs
        for (ours, up), down in zip(ups.items(), downs, strict=True):
            parts[ours.removesuffix(".weight")] = (down, up, name)
    return parts, tuple(sorted(unmatched))


def _ordered(parts: Mapping[int, Tensor]) -> list[Tensor]:
    return [parts[index] for index in sorted(parts)]


def _problem(entry: _Entry) -> str:
    """Why the halves of an entry do not make pairs; "" if they do."""
    if entry.downs.keys() != entry.ups.keys() or not entry.downs:
        return f"has {len(entry.downs)} A and {len(entry.ups)} B"
    pairs = list(zip(_ordered(entry.downs), _ordered(entry.ups), strict=True))
    wrong = [(a, b) for a, b in pairs if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[-1] or not len(a)]
    wrong += [(a, b) for a, b in pairs if (len(a), len(b)) != (len(pairs[0][0]), len(pairs[0][1]))]
    return f"has A {list(wrong[0][0].shape)} and B {list(wrong[0][1].shape)}" if wrong else ""


def _adapter_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    named = [path / name for name in FILES if (path / name).is_file()]
    files = named or sorted(path.glob("*.safetensors"))
    return files[0] if named or len(files) == 1 else path


def _metadata(file: Path) -> dict[str, str]:
    """The text entries of a safetensors file; PEFT's configuration file beside it counts as one."""
    entries: dict[str, str] = {}
    if file.is_file():
        with suppress(WeightsError):  # a torch file has none
            entries = load_metadata(file)
    beside = file.parent / "adapter_config.json"
    if PEFT_METADATA not in entries and file.is_file() and beside.is_file():
        entries[PEFT_METADATA] = beside.read_text(encoding="utf-8")
    return entries


def _own_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Base and notes, where this project wrote the file."""
    try:
        said = parse_json(metadata.get(OWN_METADATA, "{}"))
        return said.get("base"), dict(said.get("notes") or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise WeightsError(f"the adapter's metadata entry {OWN_METADATA!r} is unreadable: {error}") from error


def _alphas(
    entries: Mapping[str, _Entry], naming: Naming, metadata: Mapping[str, str], given: float | None
) -> tuple[dict[str, float], str]:
    """alpha of every adapted module in the file, and where it comes from."""
    if given is not None:
        if not math.isfinite(given) or given <= 0:
            raise SettingError(f"alpha must be positive, got {given}")
        return dict.fromkeys(entries, float(given)), "given"
    ranks = {name: float(len(entry.downs[min(entry.downs)])) for name, entry in entries.items()}
    own = {name: entry.alpha for name, entry in entries.items() if entry.alpha is not None}
    if own:
        return ranks | own, "one value per module"
    if PEFT_METADATA in metadata:
        return _peft_alphas(metadata[PEFT_METADATA], ranks), "the file's metadata"
    if naming == "sat":
        return dict.fromkeys(entries, SAT_ALPHA), "SAT, always 1"
    return ranks, "not in the file, taken as the rank"


def _peft_alphas(text: str, ranks: Mapping[str, float]) -> dict[str, float]:
    """PEFT: `lora_alpha`, and other values for modules whose names end as in `alpha_pattern`; scale is
    alpha/rank, with `use_rslora` alpha/sqrt(rank)."""
    try:
        plain = {key.removeprefix(PEFT_PREFIX): value for key, value in parse_json(text).items()}
        patterns = {key.removeprefix("^"): float(x) for key, x in (plain.get("alpha_pattern") or {}).items()}
        default = plain.get("lora_alpha")
        alphas = {name: float(rank if default is None else default) for name, rank in ranks.items()}
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise WeightsError(f"the adapter's PEFT metadata is unreadable: {error}") from error
    for name in alphas:
        special = [x for key, x in patterns.items() if name == key or name.endswith(f".{key}")]
        alphas[name] = special[0] if special else alphas[name]
    if plain.get("use_rslora"):
        return {name: alpha * ranks[name] ** 0.5 for name, alpha in alphas.items()}
    return alphas


# ---- fitting


@dataclass(frozen=True, kw_only=True)
class LoRAReport:
    """What was read and where it went. `matched` counts layers; `unmatched` names what found none."""

    naming: str
    ranks: list[int]
    alphas: list[float]
    alpha_source: str
    targets: list[str]
    matched: int
    unmatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        rank, alpha = ", ".join(map(str, self.ranks)), ", ".join(f"{x:g}" for x in self.alphas)
        text = f"{self.naming} naming, rank {rank}, alpha {alpha} ({self.alpha_source})"
        text += f", on {', '.join(self.targets)}: {self.matched} matched, {len(self.unmatched)} unmatched"
        return f"{text} ({shown(self.unmatched)})" if self.unmatched else text


def fit(
    adapter: Adapter, weights: Mapping[str, Tensor], path: str | Path, *, any_base: bool = False
) -> LoRAReport:
    """What of an adapter fits a transformer's weights (in our names, also on the meta device).

    Raises WeightsError with the counts where nothing matches, a size differs, or, without `any_base`, where
    the adapter was made for another variant."""
    matched = [name for name in adapter.pairs if adaptable(name, weights)]
    lost = (*(name for name in adapter.pairs if not adaptable(name, weights)), *adapter.unmatched)
    counts = f"{len(matched)} layers matched, {len(lost)} unmatched"
    difference = base_difference(adapter.base, base_of(weights)) if adapter.base else ""
    if difference and not any_base:
        raise WeightsError(f"{path} was made for another model ({difference}); {counts}")
    texts = [_misfit(name, adapter.pairs[name], weights[f"{name}.weight"]) for name in matched]
    if wrong := [text for text in texts if text]:
        raise WeightsError(
            f"{path} does not fit this model: {counts}, {len(wrong)} of another size ({shown(wrong)})"
        )
    if not matched:
        raise WeightsError(f"{path} fits no layer of this model: {counts} ({shown(lost)})")
    return LoRAReport(
        naming=adapter.naming,
        ranks=adapter.ranks,
        alphas=adapter.alphas,
        alpha_source=adapter.alpha_source,
        targets=adapter.targets,
        matched=len(matched),
        unmatched=lost,
    )


def adaptable(name: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether the named module is a linear layer that is called as one."""
    weight = weights.get(f"{name}.weight")
    return weight is not None and weight.ndim == 2 and name not in UNREACHED


def _misfit(name: str, pair: Pair, weight: Tensor) -> str:
    got, wanted = [len(pair.up), pair.down.shape[1]], list(weight.shape)
    return "" if got == wanted else f"{name} {got} instead of {wanted}"


# ---- writing


def file_deltas(deltas: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Changes of our modules' weights under the names that the weights have in a file: "... .weight"."""
    return invert({f"{name}.weight": x for name, x in deltas.items()}, TABLES[naming])


def file_pairs(pairs: Mapping[str, Pair], naming: Naming) -> dict[str, list[Pair]]:
    """Module in a file -> the pairs of its parts. WeightsError where only some parts of a matrix have one."""
    ups = {name: pair.up for name, pair in pairs.items()}
    table = TABLES[naming]
    grouped = {name: convert({name: x}, table) for name, x in file_deltas(ups, naming).items()}
    return {
        name.removesuffix(".weight"): [pairs[ours.removesuffix(".weight")] for ours in parts]
        for name, parts in grouped.items()
    }


def write_adapter(
    adapter: Adapter, path: str | Path, naming: str = "diffusers", *, fold: bool = False
) -> Path:
    """Write a file (.safetensors; SAT also .pt) or, into a folder, what the naming's owners look for.

    diffusers naming keeps alpha in the metadata; with `fold` it becomes the rank, B making up for it, so
    that readers without that metadata agree. SAT knows only alpha 1, so there B always makes up for it.
    Returns the file.
    """
    write = pick("naming", naming, {"diffusers": _write_diffusers, "sat": _write_sat})
    pairs = {name: pair.folded() if fold else pair for name, pair in adapter.pairs.items()}
    if not pairs:
        raise WeightsError(f"nothing to write to {path}: 0 adapted modules")
    return write(replace(adapter, pairs=pairs), Path(path))


def _write_diffusers(adapter: Adapter, path: Path) -> Path:
    joined = {name: _joined(parts) for name, parts in file_pairs(adapter.pairs, "diffusers").items()}
    tensors = {}
    for name, pair in joined.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = pair.down
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = pair.up
    if path.suffix in (".pt", ".bin"):
        raise SettingError(f"diffusers adapters are .safetensors files or folders, got {path}")
    file = path if path.suffix == ".safetensors" else path / LORA_FILE
    return save_tensors(tensors, file, {"format": "pt"} | _told(adapter) | _peft_metadata(joined))


def _joined(parts: Sequence[Pair]) -> Pair:
    """One pair for a matrix of several parts: where they do not share A, all As side by side."""
    first = parts[0]
    if all(p.alpha == first.alpha and torch.equal(p.down, first.down) for p in parts):
        return replace(first, up=torch.cat([p.up for p in parts]))
    down = torch.cat([p.down for p in parts])
    return Pair(down=down, up=torch.block_diag(*(p.folded().up for p in parts)), alpha=float(len(down)))


def _told(adapter: Adapter) -> dict[str, str]:
    """What the file says about itself, to people and to `read_adapter`."""
    said = {
        "rank": adapter.ranks,
        "alpha": adapter.alphas,
        "targets": adapter.targets,
        "base": adapter.base,
        "notes": adapter.notes,
    }
    return {OWN_METADATA: json.dumps(said, ensure_ascii=False)}


def _peft_metadata(pairs: Mapping[str, Pair]) -> dict[str, str]:
    """PEFT's configuration as diffusers stores it: the commonest rank and alpha, others by module."""
    rank = _commonest(pair.rank for pair in pairs.values())
    alpha = _commonest(pair.alpha for pair in pairs.values())
    settings = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: pair.rank for name, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {name: pair.alpha for name, pair in pairs.items() if pair.alpha != alpha},
        "target_modules": sorted(pairs),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    return {PEFT_METADATA: json.dumps({PEFT_PREFIX + key: value for key, value in settings.items()})}


def _commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _write_sat(adapter: Adapter, path: Path) -> Path:
    tensors = {}
    for name, parts in file_pairs(adapter.pairs, "sat").items():
        for index, pair in enumerate(parts):
            tensors[f"{name}.matrix_A.{index}"] = pair.down
            tensors[f"{name}.matrix_B.{index}"] = pair.with_alpha(SAT_ALPHA).up
    if path.suffix == ".safetensors":
        return save_tensors(tensors, path, _told(adapter))
    return save_sat(tensors, path)


def save_sat(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Write a torch file as SAT reads it, or into a folder with its `latest`. Returns the torch file."""
    if path.suffix != ".pt":
        file = save_sat(tensors, path / "1" / "mp_rank_00_model_states.pt")
        with atomic_path(path / "latest") as temporary:
            temporary.write_text("1", encoding="utf-8")
        return file
    return save_torch({"module": tensors}, path)


def save_torch(content: Mapping[str, Mapping[str, Tensor]], path: Path) -> Path:
    """Write named tensors below one key with torch, atomically; of a view its own numbers alone."""
    plain = {key: {name: _alone(x) for name, x in tensors.items()} for key, tensors in content.items()}
    return torch_files.save_torch(plain, path)


def _alone(x: Tensor) -> Tensor:
    x = x.detach().cpu().contiguous()
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()
