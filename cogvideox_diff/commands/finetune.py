"""The verb `finetune`: an adapter, or all weights, of any model here, on a folder of captioned clips."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.training_cli import tell_tuned
from shared.training_memory import RECOMPUTE
from shared.training_parallel import PARALLEL
from shared.verbs import add_output_flags, say

if TYPE_CHECKING:
    from cogvideox_diff.formats import ModelFolder
    from cogvideox_diff.training.tuning import Job
    from shared.clips.buckets import Bucket


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_path", default="demo", help="demo (the default) or a model folder")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="a folder of clips, its metadata.jsonl or videos.txt, or what precompute wrote",
    )
    parser.add_argument("--output_path", type=Path, required=True, help="the run, and what comes of it")
    parser.add_argument(
        "--cache_path", type=Path, help="where clips are encoded (default: OUTPUT_PATH/cache)"
    )
    parser.add_argument("--num_workers", type=int, default=0,
                        help="processes that decode, and read batches ahead (default: 0)")  # fmt: skip
    parser.add_argument("--task", choices=("t2v", "i2v"), help="default: what the model does")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--rank", type=int, default=128, help="of the adapter (default: 128)")
    parser.add_argument("--alpha", type=float, help="default: half the rank")
    parser.add_argument("--targets", nargs="+", help="adapted layers (default: attention's q, k, v, out)")
    _add_size_flags(parser)
    _add_step_flags(parser)
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:N")
    parser.add_argument("--dtype", help="of the weights; default: float32 where they are trained themselves")
    parser.add_argument("--parallel", choices=PARALLEL, default="none", help="torchrun's processes")
    parser.add_argument("--activation_checkpointing", choices=RECOMPUTE, default="none",
                        help="what blocks compute twice to save memory")  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="check everything, train nothing")
    add_output_flags(parser)


def _add_size_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_frames", type=int, help="of a clip (default: the model's own; so below)")
    parser.add_argument("--height", type=int, help="in pixels")
    parser.add_argument("--width", type=int)
    parser.add_argument("--fit", choices=("cover", "stretch"), default="cover",
                        help="clips of another shape are cut (as SAT) or distorted")  # fmt: skip
    parser.add_argument("--sizes", nargs="+", metavar="TxHxW",
                        help="sizes that clips and images go to, e.g. 17x64x64 1x64x64")  # fmt: skip
    parser.add_argument("--pack_tokens", type=int, default=0, metavar="N",
                        help="pack samples of all sizes into rows of N tokens; no --batch")  # fmt: skip
    parser.add_argument("--tiling", action="store_true", help="encode in tiles: less memory, other values")


def _add_step_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--lr", type=float, help="default: 5e-4 for lora, 1e-5 for full")
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--decay_fraction", type=float, default=0.0, help="last share, in which lr falls")
    parser.add_argument("--ema_decay", type=float, default=0.0, help="0 (the default): no average")
    parser.add_argument("--autocast", choices=("none", "bfloat16"), default="none")
    parser.add_argument("--text_dropout", type=float, default=0.1)
    parser.add_argument("--image_dropout", type=float, default=0.05, help="i2v: of a whole batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=200)
    parser.add_argument("--sample_prompts", nargs="+", default=[], metavar="PROMPT",
                        help="videos to log on the way")  # fmt: skip
    parser.add_argument("--sample_every", type=int, default=0, help="0 (the default): only at the end")


def run(options: argparse.Namespace) -> None:
    from cogvideox_diff.formats import open_folder
    from cogvideox_diff.training.tuning import tune
    from shared.generation_cli import check_writable
    from shared.runtime import check_workers, parse_device
    from shared.training_parallel import started_strategy

    check_workers(options.num_workers)
    folder = open_folder(options.model_path)
    job = make_job(options, folder)
    job.check(options.parallel)
    check_writable(options.output_path)
    told = _told(job)
    if options.dry_run:
        say(options, {"ok": True, "exit_code": 0, **told}, [f"{k}: {v}" for k, v in told.items()])
        return
    from dataclasses import replace

    with started_strategy(
        options.parallel,
        os.environ,
        activation_checkpointing=options.activation_checkpointing,
        device=parse_device(options.device),
    ) as strategy:
        tuned = tune(replace(job, strategy=strategy))
    if strategy.is_main:
        tell_tuned(options, tuned.path, told, tuned.skipped)


def make_job(options: argparse.Namespace, folder: ModelFolder) -> Job:
    """The run that the flags describe, its sizes, clips and settings checked."""
    from cogvideox_diff.lora import TARGETS
    from cogvideox_diff.planning import tasks_of
    from cogvideox_diff.training.finetune import FinetuneConfig
    from cogvideox_diff.training.precompute import KIND, LatentReader, Preparation, check_buckets
    from cogvideox_diff.training.tuning import Job, default_dtype
    from shared.clips.dataset import read_clips
    from shared.clips.precompute import INDEX, plan_clips, read_index
    from shared.runtime import parse_dtype
    from shared.training import TrainConfig

    reads_images = "i2v" in tasks_of(folder.config)
    settings = FinetuneConfig(
        task=options.task or ("i2v" if reads_images else "t2v"),
        method=options.method,
        rank=options.rank,
        alpha=options.rank / 2 if options.alpha is None else options.alpha,
        targets=tuple(options.targets or TARGETS),
        batch=options.batch,
        text_dropout=options.text_dropout,
        image_dropout=options.image_dropout,
    )
    sizes = _sizes(options, folder)
    check_buckets(sizes, folder.config)
    fps = float(folder.config.geometry.fps)
    preparation = Preparation(buckets=sizes, fps=fps, frames="finetune", fit=options.fit)
    quiet = options.quiet or options.json
    clips = ()
    if (options.data / INDEX).is_file():
        read_index(options.data, KIND)
        _refuse_sizes(options)
    else:
        listed = read_clips(options.data, must_exist=False)
        reader = LatentReader(preparation=preparation)
        clips = tuple(plan_clips(listed, reader, num_workers=options.num_workers, quiet=quiet))
    widened = settings.task == "i2v" and not reads_images
    trained = folder.trained_dtype
    names = ("steps", "accumulation", "warmup_steps", "decay_fraction", "ema_decay", "autocast", "seed",
             "save_every", "sample_every")  # fmt: skip
    default_lr = 5e-4 if options.method == "lora" else 1e-5
    return Job(
        folder=folder,
        source=options.model_path,
        data=options.data,
        clips=clips,
        preparation=preparation,
        settings=settings,
        train=TrainConfig(
            lr=default_lr if options.lr is None else options.lr,
            **{name: getattr(options, name) for name in names},
        ),
        output=options.output_path,
        cache=options.cache_path or options.output_path / "cache",
        dtype=parse_dtype(options.dtype)
        if options.dtype
        else default_dtype(trained, settings, widened=widened),
        tiled=options.tiling,
        num_workers=options.num_workers,
        pack_tokens=options.pack_tokens,
        sample_prompts=tuple(options.sample_prompts),
        quiet=quiet,
    )


def _refuse_sizes(options: argparse.Namespace) -> None:
    from shared.errors import SettingError

    given = (options.num_frames, options.height, options.width, options.sizes)
    if any(value is not None for value in given):
        raise SettingError(f"{options.data} was precomputed: its sizes cannot be chosen any more")


def _sizes(options: argparse.Namespace, folder: ModelFolder) -> tuple[Bucket, ...]:
    """Those of --sizes, or the one of --num_frames, --height, --width and the model."""
    from shared.clips.buckets import Bucket, parse_buckets
    from shared.errors import SettingError

    given = (options.num_frames, options.height, options.width)
    if options.sizes:
        if any(value is not None for value in given):
            raise SettingError("--sizes stands instead of --num_frames, --height and --width")
        return parse_buckets(options.sizes)
    size = folder.config.geometry
    native = (size.num_frames, size.height, size.width)
    frames, height, width = (
        own if value is None else value for value, own in zip(given, native, strict=True)
    )
    return (Bucket(num_frames=frames, height=height, width=width),)


def _told(job: Job) -> dict[str, Any]:
    """What will be trained, on what."""
    settings, sizes = job.settings, job.sizes
    adapter = {"rank": settings.rank, "alpha": settings.alpha} if settings.method == "lora" else {}
    return {
        "task": settings.task,
        "method": settings.method,
        **adapter,
        "clips": sum(sizes.values()),
        "unusable": [f"{p.clip.name}: {p.problem}" for p in job.clips if p.problem],
        "sizes": sizes,
        "dtype": str(job.dtype).removeprefix("torch."),
        "steps": job.train.steps,
    }
