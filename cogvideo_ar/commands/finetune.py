"""The verb `finetune`: a stage's temporal channel, or all of it, on a folder of captioned clips."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.training_cli import tell_tuned
from shared.training_memory import RECOMPUTE
from shared.training_parallel import PARALLEL
from shared.verbs import add_output_flags, say

if TYPE_CHECKING:
    from cogvideo_ar.training.tuning import Job


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model_path", default="demo", help="demo (the default) or a model folder")
    parser.add_argument("--data", type=Path, required=True,
                        help="a folder of clips, its metadata.jsonl or videos.txt, or what precompute wrote")
    parser.add_argument("--output_path", type=Path, required=True, help="the run, and the model folder")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1,
                        help="1: key frames (the default), 2: interpolation")
    parser.add_argument("--train", choices=("temporal", "all"), default="temporal", dest="channels",
                        help="what learns: the temporal channel (the default), the base frozen, or all")
    parser.add_argument("--init", choices=("model", "base"), default="model", dest="start",
                        help="base: the temporal channel begins anew, as a copy of the base channel")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--lr", type=float, default=2e-4, help="default: 2e-4, as released")
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--decay_fraction", type=float, default=0.0, help="last share, in which lr falls")
    parser.add_argument("--clip_norm", type=float, default=0.1, help="of the gradient (default: as released)")
    parser.add_argument("--ema_decay", type=float, default=0.0, help="0 (the default): no average")
    parser.add_argument("--autocast", choices=("none", "bfloat16"), default="none")
    parser.add_argument("--text_dropout", type=float, default=0.1, help="share of samples without caption")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_every", type=int, default=200)
    parser.add_argument("--sample_prompts", nargs="+", default=[], metavar="PROMPT",
                        help="videos to log on the way: key frames, or one round of interpolation")
    parser.add_argument("--sample_every", type=int, default=0, help="0 (the default): only at the end")
    parser.add_argument("--num_workers", type=int, default=0,
                        help="processes that decode, and read batches ahead (default: 0)")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:N")
    parser.add_argument("--parallel", choices=PARALLEL, default="none", help="torchrun's processes")
    parser.add_argument("--activation_checkpointing", choices=RECOMPUTE, default="none",
                        help="what blocks compute twice to save memory")
    parser.add_argument("--dry_run", action="store_true", help="check everything, train nothing")
    add_output_flags(parser)
# fmt: on

TRAIN = ("steps", "lr", "accumulation", "warmup_steps", "decay_fraction", "clip_norm", "ema_decay",
         "autocast", "seed", "save_every", "sample_every")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Everything is checked before the weights are read."""
    from cogvideo_ar.training.tuning import tune
    from shared.generation_cli import check_writable
    from shared.runtime import check_workers, parse_device
    from shared.training_parallel import started_strategy

    check_workers(options.num_workers)
    device = parse_device(options.device)
    job = make_job(options)
    told = _told(job, job.check())
    check_writable(options.output_path)
    if options.dry_run:
        say(options, {"ok": True, "exit_code": 0, **told}, [f"{k}: {v}" for k, v in told.items()])
        return
    with started_strategy(
        options.parallel,
        os.environ,
        activation_checkpointing=options.activation_checkpointing,
        device=device,
    ) as strategy:
        tuned = tune(replace(job, strategy=strategy))
    if strategy.is_main:
        tell_tuned(options, tuned.path, told, tuned.skipped)


def make_job(options: argparse.Namespace) -> Job:
    """The run that the flags describe."""
    from cogvideo_ar.formats import open_folder
    from cogvideo_ar.training.tuning import Job
    from shared.training import TrainConfig

    return Job(
        folder=open_folder(options.model_path),
        data=options.data,
        stage=options.stage,
        train=TrainConfig(**{name: getattr(options, name) for name in TRAIN}),
        output=options.output_path,
        batch=options.batch,
        channels=options.channels,
        start=options.start,
        text_dropout=options.text_dropout,
        num_workers=options.num_workers,
        sample_prompts=tuple(options.sample_prompts),
        quiet=options.quiet or options.json,
    )


def _told(job: Job, num_clips: int) -> dict[str, Any]:
    """What will be trained, on what."""
    return {
        "stage": job.stage,
        "train": job.channels,
        "init": job.start,
        "clips": num_clips,
        "rates": list(job.rates),
        "steps": job.train.steps,
        "batch": job.batch,
    }
