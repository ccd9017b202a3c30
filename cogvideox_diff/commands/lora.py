"""The verb `lora`: look into an adapter's file, merge it into weights, rewrite it in another naming. Also the
check of the adapters that `generate` is given.

Every action returns what it found or did as one JSON-like object; `lines_of` says the same in sentences.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_diff.checkpoints import merge_sat_adapters
from cogvideox_diff.config import PRESETS, TransformerConfig
from cogvideox_diff.lora import check_scale
from cogvideox_diff.lora_files import (
    TABLES,
    Adapter,
    LoRAReport,
    Naming,
    file_deltas,
    fit,
    read_adapter,
    save_sat,
    write_adapter,
)
from cogvideox_diff.transformer import ExpertTransformer
from shared.checkpoints import convert, load_tensors, save_tensors
from shared.config_cli import pick
from shared.errors import OutputPathError, SettingError, WeightsError, shown
from shared.model_folder import without_memory
from shared.verbs import say

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
SAT_MARK, DIFFUSERS_MARK, OUR_MARK = "model.diffusion_model.", "transformer_blocks.", "blocks."
JOINT_PREFIX = "transformer."  # of our own files that hold the text encoder too


# ---- inspect


def inspect(
    path: str | Path, *, preset: str | None = None, alpha: float | None = None, any_base: bool = False
) -> dict[str, Any]:
    """Rank, alpha, targets, base and notes of an adapter, and how many of its layers a preset's transformer
    has: WeightsError where it does not fit. Without a preset: which presets it fits."""
    adapter = read_adapter(path, alpha=alpha)
    said = {
        "path": str(path),
        "naming": adapter.naming,
        "rank": adapter.ranks,
        "alpha": adapter.alphas,
        "alpha_source": adapter.alpha_source,
        "targets": adapter.targets,
        "pairs": len(adapter.pairs),
        "parameters": sum(pair.down.numel() + pair.up.numel() for pair in adapter.pairs.values()),
        "base": adapter.base,
        "notes": adapter.notes,
    }
    if preset is not None:
        report = fit(adapter, _shapes_of(preset), path, any_base=any_base)
        return said | {"preset": preset, "matched": report.matched, "unmatched": list(report.unmatched)}
    fits = {name: matched for name in PRESETS if (matched := _fitting_layers(adapter, name))}
    return said | {"fits": fits, "unmatched": list(adapter.unmatched)}


def _shapes_of(preset: str) -> dict[str, Tensor]:
    return _shapes(pick("preset", preset, PRESETS)().transformer)


def _shapes(config: TransformerConfig) -> dict[str, Tensor]:
    """A transformer's weights without any memory for them."""
    with without_memory():
        return ExpertTransformer(config).state_dict()


def _fitting_layers(adapter: Adapter, preset: str) -> int:
    """Matched layers, 0 where the adapter does not fit or goes beyond the model."""
    try:
        report = fit(adapter, _shapes_of(preset), "")
    except WeightsError:
        return 0
    return report.matched if report.matched == len(adapter.pairs) else 0


# ---- generate


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """An adapter that `generate` is to use, checked against the model's shapes."""

    path: Path
    scale: float
    report: LoRAReport
    digest: str

    def settings(self) -> dict[str, Any]:
        """JSON values for the sidecar; `digest` changes with the adapter's numbers."""
        told = asdict(self.report) | {"unmatched": list(self.report.unmatched)}
        return {"path": str(self.path), "digest": self.digest, "scale": self.scale, **told}


def choose(paths: Sequence[Path], scales: Sequence[float], config: TransformerConfig) -> list[Chosen]:
    """Adapters with their strengths: none given is 1, one is for all. WeightsError for an adapter that does
    not fit a transformer of this configuration, whose weights need not be there yet."""
    if scales and (not paths or len(scales) not in (1, len(paths))):
        raise SettingError(
            f"--lora_scale: got {len(scales)} for {len(paths)} --lora_path; legal: one or each"
        )
    for scale in scales:
        check_scale(scale)
    given = list(scales) or [1.0]
    given = given * len(paths) if len(given) == 1 else given
    weights = _shapes(config) if paths else {}
    return [_chosen(path, scale, weights) for path, scale in zip(paths, given, strict=True)]


def _chosen(path: Path, scale: float, weights: Mapping[str, Tensor]) -> Chosen:
    adapter = read_adapter(path)
    return Chosen(path=path, scale=scale, report=fit(adapter, weights, path), digest=_digest(adapter))


def _digest(adapter: Adapter) -> str:
    digest = hashlib.sha256()
    for name, pair in sorted(adapter.pairs.items()):
        digest.update(f"{name} {pair.alpha}".encode())
        for x in (pair.down, pair.up):
            digest.update(f"{x.dtype} {list(x.shape)}".encode())
            digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


# ---- convert


def convert_adapter(
    path: str | Path,
    output: str | Path,
    *,
    to: str,
    alpha: float | None = None,
    fold: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Rewrite an adapter in the naming `to` ("diffusers" or "sat"). From a complete SAT file only the adapter
    is taken. With `fold`, readers that ignore alpha give the same output too."""
    pick("naming", to, TABLES)
    _refuse(output, overwrite)
    adapter = read_adapter(path, alpha=alpha)
    if not adapter.pairs:
        raise WeightsError(
            f"{path}: 0 of {len(adapter.unmatched)} pairs are known ({shown(adapter.unmatched)})"
        )
    file = write_adapter(adapter, output, to, fold=fold)
    return {
        "path": str(path),
        "output": str(file),
        "naming": [adapter.naming, to],
        "rank": adapter.ranks,
        "alpha": adapter.alphas,
        "alpha_source": adapter.alpha_source,
        "matched": len(adapter.pairs),
        "unmatched": list(adapter.unmatched),
    }


# ---- merge


def merge_files(
    path: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    scale: float = 1.0,
    alpha: float | None = None,
    any_base: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Add an adapter to a transformer's weights, keeping their naming (diffusers, SAT, ours) and dtype.
    `base` None: the adapter's own file holds the base, as SAT's do. `output`: a .safetensors file, or a
    folder that SAT or diffusers reads (then with the base folder's `config.json`)."""
    _refuse(output, overwrite)
    adapter = read_adapter(path, alpha=alpha)
    tensors = _base_tensors(path if base is None else base, own=base is None)
    naming, prefix = _naming_of(tensors, base or path)
    report = fit(adapter, _our_names(tensors, naming, prefix), path, any_base=any_base)
    if report.unmatched:
        raise WeightsError(f"{path}: {report}; merging a part would change what it does")
    merged = _merged(tensors, adapter, naming, prefix, scale)
    file = _write_weights(merged, naming, Path(output))
    if base is not None and Path(base, "config.json").is_file() and file.name == WEIGHTS_FILE:
        shutil.copyfile(Path(base, "config.json"), file.parent / "config.json")
    return {
        "path": str(path),
        "base": str(base or path),
        "output": str(file),
        "naming": naming,
        "rank": adapter.ranks,
        "alpha": adapter.alphas,
        "alpha_source": adapter.alpha_source,
        "scale": scale,
        "matched": report.matched,
    }


def _base_tensors(path: str | Path, *, own: bool) -> dict[str, Tensor]:
    """Weights without adapters; a SAT file's own adapters are left out of its base."""
    tensors = load_tensors(path)
    adapted = [name for name in tensors if ".matrix_" in name]
    if not adapted:
        if own:
            raise SettingError(f"{path} holds an adapter without its base: name the weights to merge it into")
        return tensors
    if not own:
        raise WeightsError(f"{path} holds {len(adapted)} adapter tensors itself; merge those first")
    if not any(name.endswith(".original.weight") for name in tensors):
        raise SettingError(f"{path} holds an adapter without its base: name the weights to merge it into")
    dtypes = {name.replace(".original.", "."): x.dtype for name, x in tensors.items()}
    return {name: x.to(dtypes[name]) for name, x in merge_sat_adapters(tensors, alpha=0.0).items()}


def _naming_of(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[str, str]:
    """("diffusers" | "sat" | "own", what stands before our names)."""
    for mark, naming, prefix in (
        (SAT_MARK, "sat", ""),
        (DIFFUSERS_MARK, "diffusers", ""),
        (OUR_MARK, "own", ""),
        (JOINT_PREFIX + OUR_MARK, "own", JOINT_PREFIX),
    ):
        if any(name.startswith(mark) for name in tensors):
            return naming, prefix
    raise WeightsError(f"{path} is no CogVideoX transformer: names are {shown(sorted(tensors))}")


def _merged(
    tensors: dict[str, Tensor], adapter: Adapter, naming: str, prefix: str, scale: float
) -> dict[str, Tensor]:
    deltas = {name: scale * pair.delta() for name, pair in adapter.pairs.items()}
    result = dict(tensors)
    for name, delta in _as_named(deltas, naming, prefix).items():
        result[name] = (tensors[name].float() + delta).to(tensors[name].dtype)
    return result


def _our_names(tensors: Mapping[str, Tensor], naming: str, prefix: str) -> Mapping[str, Tensor]:
    if naming != "own":
        return convert(tensors, TABLES[naming])
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _as_named(deltas: Mapping[str, Tensor], naming: str, prefix: str) -> dict[str, Tensor]:
    if naming == "own":
        return {f"{prefix}{name}.weight": delta for name, delta in deltas.items()}
    typed: Naming = "sat" if naming == "sat" else "diffusers"
    return file_deltas(deltas, typed)


def _write_weights(tensors: Mapping[str, Tensor], naming: str, output: Path) -> Path:
    if output.suffix == ".safetensors":
        return save_tensors(tensors, output)
    if naming == "sat":
        return save_sat(tensors, output)
    return save_tensors(tensors, output / WEIGHTS_FILE)


def _refuse(output: str | Path, overwrite: bool) -> None:
    path = Path(output)
    if not overwrite and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise OutputPathError(
            f"{path} already exists; choose another name or allow overwriting (--overwrite)"
        )


# ---- the command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions and flags of the verb `lora`."""
    parser.add_argument("action", choices=("inspect", "merge", "convert"))
    parser.add_argument(
        "lora_path", type=Path, metavar="LORA", help="a file or folder, of diffusers, PEFT or SAT"
    )
    parser.add_argument("--alpha", type=float, help="instead of what the file says (else: the rank; SAT: 1)")
    parser.add_argument(
        "--any_base", action="store_true", help="also onto another model than it was made for"
    )
    parser.add_argument("--preset", choices=PRESETS, help="inspect: the model that it should fit")
    parser.add_argument("--model_path", type=Path, help="merge: the transformer's weights (SAT: may be LORA)")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="merge: strength, 1 as trained")
    parser.add_argument("--to", choices=TABLES, help="convert: the naming to write")
    parser.add_argument("--keep_alpha", action="store_true",
                        help="convert: leave alpha in the metadata, where not all readers look")  # fmt: skip
    parser.add_argument("--output_path", type=Path, help="merge, convert: a .safetensors file or a folder")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of sentences")


def run(options: argparse.Namespace) -> None:
    """Say what was found or done."""
    result = act(options)
    say(options, {"ok": True, "exit_code": 0, **result}, lines_of(result))


def act(options: argparse.Namespace) -> dict[str, Any]:
    """Do the chosen action; the result for --json, or for `lines_of`."""
    if options.action == "inspect":
        return inspect(
            options.lora_path, preset=options.preset, alpha=options.alpha, any_base=options.any_base
        )
    if options.output_path is None:
        raise SettingError(f"lora {options.action} needs --output_path")
    common = {"alpha": options.alpha, "overwrite": options.overwrite}
    if options.action == "merge":
        return merge_files(
            options.lora_path,
            options.output_path,
            base=options.model_path,
            scale=options.lora_scale,
            any_base=options.any_base,
            **common,
        )
    if options.to is None:
        raise SettingError(f"lora convert needs --to; legal: {', '.join(TABLES)}")
    return convert_adapter(
        options.lora_path, options.output_path, to=options.to, fold=not options.keep_alpha, **common
    )


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """A result in sentences, one entry a line."""
    told = {key: value for key, value in result.items() if value is not None and (value or key != "notes")}
    return [f"{key.replace('_', ' ')}: {_words(value)}" for key, value in told.items()]


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return f"{len(value)} ({shown(value)})" if len(value) > 3 else ", ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
