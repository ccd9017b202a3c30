"""Folders with the released parts of CogVideo, and how they are told apart.

| part | found as | told by |
|---|---|---|
| stages 1 and 2 | `*/latest` or `*/*/latest` | mixing vectors among its tensors |
| direct super-resolution, optional | the same | a second set of projections, no mixing vectors |
| iterative super-resolution, optional | the same | extra positions without any of these |
| image codec, text model | `ice_image.pt`, `ice_text.model` | the file name, here or one folder below |
| clusters of image tokens, optional | `cluster_label2.npy` | the same |

The two stages have the same names and shapes, so their weights cannot say which is which. What is looked at,
in this order: paths that the caller names; `cogvideo_stage` in `model_config.json`, where it differs between
the two; the released folder names. Else it is an error. Sizes are those of the tensors; what they do not show
comes from `model_config.json` (heads, frame layout, window of stage 2) or else is as released.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideo_ar.checkpoints import ICETK_VQVAE, SAT_DSR, SAT_ITERSR, SAT_STAGE
from cogvideo_ar.clusters import read_clusters
from cogvideo_ar.config import (
    CogVideoConfig,
    SuperResolutionConfig,
    TransformerConfig,
    VQVAEConfig,
    cogvideo,
    cogview2_dsr,
    cogview2_itersr,
)
from cogvideo_ar.part_paths import NONE, PartPaths
from cogvideo_ar.parts import Parts, build, check_together, load_tokenizer
from cogvideo_ar.sat_parallel import load_checkpoint
from cogvideo_ar.super_resolution.transformer import SuperResolutionTransformer
from cogvideo_ar.transformer import CogVideoTransformer
from cogvideo_ar.vqvae import VQVAE
from shared.checkpoints import Table, convert, load_tensors
from shared.errors import SettingError, WeightsError
from shared.json_files import read_object
from shared.model_folder import combined_mark

Tensors = Mapping[str, Tensor]
STAGE_NAMES = ("cogvideo-stage1", "cogvideo-stage2")  # of the released folders
CODEC, TEXT_MODEL, CLUSTERS = "ice_image.pt", "ice_text.model", "cluster_label2.npy"
SOURCES = {  # of files that are often missing
    CODEC: "the image codec; the package icetk downloads it into ~/.icetk_models",
    TEXT_MODEL: "the text model; the package icetk downloads it into ~/.icetk_models",
}
RELEASED_HEAD_DIM = 64
_MIXING, _SECOND, _EXTRA = (
    "mixins.attention_plus.attn_distribution.0",
    "mixins.attention_plus.dense.0.weight",
    "mixins.extra_position_embedding.position_embeddings.weight",
)


def is_sat(folder: Path) -> bool:
    """Whether checkpoints as SAT writes them lie in `folder`; one of our own has a config.json instead."""
    return not (folder / "config.json").is_file() and bool(_checkpoints(folder))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(file.parent for pattern in ("*/latest", "*/*/latest") for file in folder.glob(pattern))


@dataclass(frozen=True)
class SatFolder:
    """The released parts in `path`. Torch files are mapped, not read, until their numbers are used.

    `parts` name those that lie elsewhere, and the stages where nothing else tells them apart; without a
    `path` there must be at least the stages, codec and text model. WeightsError says what is missing,
    doubtful or does not fit.
    """

    path: Path | None
    parts: PartPaths = NONE

    @property
    def name(self) -> str:
        """What messages call it."""
        return "the given parts" if self.path is None else str(self.path)

    @property
    def mark(self) -> str:
        """16 hex digits that change with the weights."""
        return combined_mark(self.path, self.parts.marked)

    def check(self) -> None:
        """WeightsError unless the parts that are given are what they are given for, and fit the others;
        reads no weights."""
        for name, path in self.parts.given.items():
            if name in KINDS:
                check_kind(name, path)
        check_together(self.config)

    @cached_property
    def config(self) -> CogVideoConfig:
        """The whole model's settings; sampling is the release's."""
        try:
            return self._config()
        except WeightsError:
            raise
        except (ValueError, TypeError, LookupError) as error:
            raise WeightsError(f"the parts in {self.name} do not make a CogVideo: {error}") from error

    def _config(self) -> CogVideoConfig:
        released, vqvae = cogvideo(), codec_config(load_tensors(self.file(CODEC)))
        tokenizer = load_tokenizer(self.file(TEXT_MODEL), vqvae.codebook_size)
        ids = {"num_image_tokens": vqvae.codebook_size, "start_of_image": tokenizer.id_of("<start_of_image>")}
        keyframes, interpolation = (
            stage_config(
                load_checkpoint(folder, shapes_only=True),
                read_facts(folder),
                ids | {"pad_token": tokenizer["<pad>"]},
            )
            for folder in self.stages
        )
        window = read_facts(self.stages[1]).get("window_size", 0)
        window = window if window > 0 else released.interpolation.window
        return CogVideoConfig(
            keyframes=keyframes,
            interpolation=replace(interpolation, temporal="window", window=window),
            vqvae=vqvae,
            super_resolution=self._fine_config("direct", ids),
            refinement=self._fine_config("iterative", ids) if self.fine_checkpoint("direct") else None,
            sampling=released.sampling,
        )

    @cached_property
    def stages(self) -> tuple[Path, Path]:
        """The checkpoints of stage 1 and stage 2."""
        first, second = (
            None if path is None else checkpoint_folder(path)
            for path in (self.parts.stage1_path, self.parts.stage2_path)
        )
        if first is not None and second is not None:
            return first, second
        found = [path for path in self._kinds.get("stage", []) if path not in (first, second)]
        if first is None and second is None:
            return self._told_apart(found)
        other = found[0] if len(found) == 1 else self._told_apart(found)[0 if first is None else 1]
        return (first or other), (second or other)

    def _told_apart(self, found: list[Path]) -> tuple[Path, Path]:
        """Stage 1 and stage 2 among checkpoints that look alike."""
        if len(found) < 2:
            raise WeightsError(
                f"{self.name} has {len(found)} checkpoints of CogVideo's stages, needed are two"
            )
        said = [f"cogvideo-stage{read_facts(folder).get('cogvideo_stage')}" for folder in found]
        for known in (said, [folder.name for folder in found]):
            if all(known.count(name) == 1 for name in STAGE_NAMES):
                first, second = (found[known.index(name)] for name in STAGE_NAMES)
                return first, second
        listed = ", ".join(folder.name for folder in found)
        raise WeightsError(
            f"which is stage 1? {listed} in {self.name} look alike, and no model_config.json says; "
            f"name the folders {' and '.join(STAGE_NAMES)}, or give --stage1_path and --stage2_path"
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of the stored transformers."""
        return load_checkpoint(self.stages[0], shapes_only=True)["transformer.word_embeddings.weight"].dtype

    @property
    def clusters(self) -> Path | None:
        """The table of token clusters, if there is one."""
        return self._find(CLUSTERS)

    @property
    def clusters_target(self) -> Path:
        """Where a table of token clusters belongs."""
        if self.path is None:
            raise SettingError("the given parts have no folder for a table of clusters; name a file")
        return self.path / CLUSTERS

    @property
    def text_model(self) -> Path:
        """The text model."""
        return self.file(TEXT_MODEL)

    def codec(self) -> dict[str, Tensor]:
        """The image codec's tensors, by our names."""
        return convert(load_tensors(self.file(CODEC)), ICETK_VQVAE)

    def codebook(self) -> Tensor:
        """The image codec's codes [V, D], float32."""
        return load_tensors(self.file(CODEC))["quantize.embed.weight"].float()

    def load(self, dtype: torch.dtype, device: torch.device) -> Parts:
        """The model: transformers in `dtype`, the codec in float32. What the stages share is kept once."""
        config = self.config  # before anything large is read
        base, own = (convert(load_checkpoint(folder), SAT_STAGE) for folder in self.stages)
        keyframes = build(CogVideoTransformer, config.keyframes, _moved(base, dtype, device))
        inherited = {
            name: x  # itself: it is moved and pinned once
            for name, x in keyframes.base_parameters()
            if name in own and torch.equal(base[name], own[name])
        }
        own = _moved({name: x for name, x in own.items() if name not in inherited}, dtype, device)
        text_model = self.text_model
        if self.clusters is None:
            warnings.warn(
                f"{self.name} has no {CLUSTERS}: top_k counts single tokens, not clusters "
                "(the verb `clusters` makes a table)",
                stacklevel=2,
            )
        return Parts(
            config=config,
            keyframes=keyframes,
            interpolation=build(CogVideoTransformer, config.interpolation, inherited | own),
            vqvae=build(VQVAE, config.vqvae, _moved(self.codec(), torch.float32, device)),
            tokenizer=load_tokenizer(text_model, config.keyframes.num_image_tokens),
            text_model=text_model.read_bytes(),
            cluster_labels=self._clusters(config.keyframes.num_image_tokens),
            super_resolution=self._load_fine(config.super_resolution, SAT_DSR, dtype, device),
            refinement=self._load_fine(config.refinement, SAT_ITERSR, dtype, device),
        )

    def file(self, name: str) -> Path:
        """The codec or the text model: as given, in the folder or in one just below; WeightsError says what
        it is and where it comes from."""
        found = (self.parts.codec_path if name == CODEC else self.parts.text_model_path) or self._find(name)
        if found is None:
            flag = "--codec_path" if name == CODEC else "--text_model_path"
            raise WeightsError(f"{self.name} lacks {name} ({SOURCES[name]}; {flag} says where it is)")
        return found

    def _find(self, name: str) -> Path | None:
        if self.path is None:
            return None
        files = (self.path / name, *sorted(self.path.glob(f"*/{name}")))
        return next((path for path in files if path.is_file()), None)

    @cached_property
    def _kinds(self) -> dict[str, list[Path]]:
        kinds: dict[str, list[Path]] = {}
        for folder in [] if self.path is None else _checkpoints(self.path):
            kinds.setdefault(checkpoint_kind(load_checkpoint(folder, shapes_only=True)), []).append(folder)
        return kinds

    def _clusters(self, size: int) -> Tensor | None:
        path = self._find(CLUSTERS)
        return None if path is None else read_clusters(path, size)

    def fine_checkpoint(self, kind: str) -> Path | None:
        """The checkpoint of super-resolution of this kind."""
        given = self.parts.super_resolution_path if kind == "direct" else self.parts.refinement_path
        if given is not None:
            return checkpoint_folder(given)
        found = self._kinds.get(kind, [])
        if len(found) > 1:
            listed = ", ".join(map(str, found))
            raise WeightsError(f"{self.name} has several super-resolution checkpoints: {listed}; leave one")
        return found[0] if found else None

    def _fine_config(self, kind: str, ids: Mapping[str, int]) -> SuperResolutionConfig | None:
        folder = self.fine_checkpoint(kind)
        if folder is None:
            return None
        return fine_config(load_checkpoint(folder, shapes_only=True), read_facts(folder), ids)

    def _load_fine(
        self, config: SuperResolutionConfig | None, table: Table, dtype: torch.dtype, device: torch.device
    ) -> SuperResolutionTransformer | None:
        folder = None if config is None else self.fine_checkpoint(config.kind)
        if folder is None:
            return None
        tensors = convert(load_checkpoint(folder), table)
        return build(SuperResolutionTransformer, config, _moved(tensors, dtype, device))


# ---- what tensors say

OTHER_FAMILY = ("model.diffusion_model.", "transformer_blocks.", "encoder.down_blocks.", "t5.")
KINDS = {  # of the parts that are nets
    **{name: "stage" for name in ("stage1_path", "stage2_path")},
    **{"codec_path": "codec", "super_resolution_path": "direct", "refinement_path": "iterative"},
}
_KIND_WORDS = {
    "stage": "a stage of CogVideo",
    "codec": "the image codec",
    "direct": "direct super-resolution",
    "iterative": "iterative super-resolution",
}


def check_kind(flag: str, path: Path) -> Tensors:
    """The tensors of a released part, mapped; WeightsError unless they are what the flag is for."""
    if is_own(path):
        raise WeightsError(
            f"--{flag}: {path} is a part of this project, the others are released ones; write them as a "
            "model folder first (cogvideo-ar convert --model_path FOLDER --output_path MODEL)"
        )
    tensors = load_checkpoint(checkpoint_folder(path), shapes_only=True)
    found = "codec" if "quantize.embed.weight" in tensors else checkpoint_kind(tensors)
    if found != KINDS[flag]:
        what = "a part of CogVideoX" if any(n.startswith(OTHER_FAMILY) for n in tensors) else ""
        what = what or _KIND_WORDS.get(found) or f"no known part ({', '.join(sorted(tensors)[:3])})"
        right = next((f"; nearest: --{name}" for name, kind in KINDS.items() if kind == found), "")
        raise WeightsError(f"--{flag} takes {_KIND_WORDS[KINDS[flag]]}; {path} is {what}{right}")
    return tensors


def is_own(path: Path) -> bool:
    """Whether a part is of this project's form."""
    return path.suffix == ".safetensors" or (path / "config.json").is_file()


def checkpoint_folder(path: Path) -> Path:
    """The folder with `latest`, if `path` holds just one such."""
    if not path.is_dir() or (path / "latest").is_file():
        return path
    found = _checkpoints(path)
    return found[0] if len(found) == 1 else path


def checkpoint_kind(tensors: Tensors) -> str:
    """ "stage", "direct" or "iterative" (super-resolution), or "other"."""
    if _MIXING in tensors:
        return "stage"
    if _SECOND in tensors and _EXTRA in tensors:
        return "direct"
    return "iterative" if _EXTRA in tensors else "other"


def stage_config(tensors: Tensors, facts: Mapping[str, Any], ids: Mapping[str, int]) -> TransformerConfig:
    """The transformer of either stage, with a full temporal channel as the released code samples stage 1;
    `ids` are those settings that the vocabulary decides."""
    layout = facts.get("layout") or [64, 464, 2064]  # ends of text, first frame and all frames
    frame_len = layout[1] - layout[0]
    return replace(
        cogvideo().keyframes,
        **_trunk(tensors, facts),
        **ids,
        num_extra_positions=len(tensors[_EXTRA]),
        max_text_len=layout[0],
        grid=_square(frame_len),
        num_frames=(layout[2] - layout[0]) // frame_len,
    )


def fine_config(tensors: Tensors, facts: Mapping[str, Any], ids: Mapping[str, int]) -> SuperResolutionConfig:
    """Super-resolution of either kind. Text length, coarse grid and kernels are the release's whatever the
    file says, as in the released code."""
    return replace(
        cogview2_dsr() if checkpoint_kind(tensors) == "direct" else cogview2_itersr(),
        **_trunk(tensors, facts),
        **ids,
        fine_grid=_square(len(tensors[_EXTRA])),
    )


def _trunk(tensors: Tensors, facts: Mapping[str, Any]) -> dict[str, int]:
    """Sizes that all SAT transformers have."""
    vocab_size, hidden = tensors["transformer.word_embeddings.weight"].shape
    num_heads = int(facts.get("num_attention_heads") or hidden // RELEASED_HEAD_DIM)
    if num_heads < 1 or hidden % num_heads:
        raise WeightsError(f"a width of {hidden} does not divide into {num_heads} heads")
    return {
        "num_layers": _count(tensors, r"transformer\.layers\.(\d+)\."),
        "num_heads": num_heads,
        "head_dim": hidden // num_heads,
        "vocab_size": vocab_size,
        "num_positions": len(tensors["transformer.position_embeddings.weight"]),
    }


def codec_config(tensors: Tensors) -> VQVAEConfig:
    """The image codec's sizes; groups of its norms and the normalisation of pixels are the release's."""
    try:
        base = len(tensors["enc.conv_in.weight"])
        size, dim = tensors["quantize.embed.weight"].shape
        return VQVAEConfig(
            base_channels=base,
            encoder_multipliers=_multipliers(tensors, "enc.down", base),
            num_res_blocks=_count(tensors, r"enc\.down\.0\.block\.(\d+)\."),
            encoder_out_channels=len(tensors["enc.conv_out.weight"]),
            codebook_size=size,
            code_dim=dim,
            decoder_multipliers=tuple(
                _multipliers(tensors, f"decs.{i}.up", base) for i in range(_count(tensors, r"decs\.(\d+)\."))
            ),
            decoder_res_blocks=_count(tensors, r"decs\.0\.up\.0\.block\.(\d+)\."),
        )
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{CODEC} is not the image codec of icetk: {error}") from error


def _multipliers(tensors: Tensors, part: str, base: int) -> tuple[int, ...]:
    levels = range(_count(tensors, re.escape(part) + r"\.(\d+)\."))
    return tuple(len(tensors[f"{part}.{level}.block.0.conv1.weight"]) // base for level in levels)


def _count(tensors: Tensors, pattern: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _square(length: int) -> tuple[int, int]:
    side = round(length**0.5)
    if side * side != length:
        raise WeightsError(f"frames of {length} tokens are not square")
    return side, side


# ---- files


def read_facts(folder: Path) -> dict[str, Any]:
    """model_config.json of a checkpoint; empty where there is none."""
    path = checkpoint_folder(folder) / "model_config.json"
    if not path.is_file():
        return {}
    return read_object(path, WeightsError)


def _moved(tensors: Tensors, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return {n: x.to(device, dtype if x.is_floating_point() else x.dtype) for n, x in tensors.items()}
