"""What the training of both demo families cost: operations, counted, and minutes, from the logs.

One update of every stage is run for real (forward, backward, optimizer; attention in plain matrix products,
so that the counter sees it) from the folders of finished runs, and multiplied by the stage's steps. Encoding
the data once with each codec is counted too. `--match` says after how many steps of the diffusion transformer
both families have cost the same.
Run: python examples/training_compute.py --ar_path runs/ar --diffusion_path runs/diff [--match]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cogvideo_ar.training import recipes as autoregressive
from cogvideox_diff.training import recipes as diffusion
from cogvideox_diff.training.recipes import Phase
from shared.clips import shapes

TERA = 1e12


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One line of the table; `each` is the operations of a step (or of a clip that is encoded)."""

    family: str
    name: str
    steps: int
    each: float
    log: str = ""  # folder of the stage's log
    share: float = 1.0  # of the log's minutes

    @property
    def total(self) -> float:
        return self.steps * self.each


def counted(work: Callable[[], Any]) -> int:
    """Operations of all matrix products and convolutions."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def of_a_step(run: Any, stage: str, source: Path, given: Iterable[str], recipe: Any) -> float:
    """Operations of one update: what two steps cost more than one, halved start-up left out."""
    totals = []
    for steps in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            for name in given:
                (Path(folder) / name).symlink_to((source / name).resolve())
            short = replace(recipe, **{stage: replace(getattr(recipe, stage), steps=steps)})
            work = run(short, Path(folder), quiet=True)
            totals.append(counted(lambda work=work: work.stage(stage)))
    return float(totals[1] - totals[0])


def autoregressive_stages(folder: Path) -> list[Stage]:
    """CogVideo's codec, tokens and three transformer stages."""
    recipe, run = autoregressive.demo(), autoregressive.Run
    coded = replace(recipe, continuous_steps=0)  # the steps before the codebook cost about the same
    ready = ("ice_text.model", "tokens", "vqvae")
    frame = counted(lambda: run(recipe, folder).vqvae().encode(torch.zeros(1, 3, shapes.SIZE, shapes.SIZE)))
    frames = recipe.num_clips * shapes.NUM_FRAMES + recipe.num_stills
    each = {
        "vqvae": of_a_step(run, "vqvae", folder, (), coded),
        "base": of_a_step(run, "base", folder, ready, recipe),
        "keyframes": of_a_step(run, "keyframes", folder, (*ready, "base"), recipe),
        "interpolation": of_a_step(run, "interpolation", folder, (*ready, "keyframes"), recipe),
    }
    found = [
        Stage(family="CogVideo", name=name, steps=getattr(recipe, name).steps, each=value, log=name)
        for name, value in each.items()
    ]
    return [*found, Stage(family="CogVideo", name="tokens of frames", steps=frames, each=frame)]


def diffusion_stages(folder: Path, steps: int) -> list[Stage]:
    """CogVideoX's codec by length of clips, latents, and the transformer alone on stills, then on both."""
    recipe, run = diffusion.demo(), diffusion.Run
    vae = run(recipe, folder).vae()
    begins = [round(phase.begin * recipe.vae.steps) for phase in recipe.vae_phases] + [recipe.vae.steps]
    found = []
    for phase, first, last in zip(recipe.vae_phases, begins, begins[1:], strict=False):
        alone = replace(
            recipe, vae_phases=(Phase(begin=0.0, num_frames=phase.num_frames, batch=phase.batch),)
        )
        each = of_a_step(run, "vae", folder, (), alone)
        name = f"vae, {phase.num_frames} frame{'s' if phase.num_frames > 1 else ''}"
        found.append(Stage(family="CogVideoX", name=name, steps=last - first, each=each, log="vae",
                           share=(last - first) / recipe.vae.steps))  # fmt: skip
    for frames, count in ((shapes.NUM_FRAMES, recipe.num_clips), (1, recipe.num_stills)):
        pixels = torch.zeros(1, 3, frames, shapes.SIZE, shapes.SIZE)
        each = counted(lambda pixels=pixels: vae.encode(pixels))
        found.append(Stage(family="CogVideoX", name=f"latents of {frames} frame{'s' * (frames > 1)}",
                           steps=count, each=each))  # fmt: skip
    ready = ("tokenizer", "vae", "latents")
    for name, stills, count in (
        ("transformer, stills", 10, recipe.still_steps),
        ("transformer, clips and stills", 0, steps - recipe.still_steps),
    ):
        each = of_a_step(run, "transformer", folder, ready, replace(recipe, still_steps=stills))
        found.append(Stage(family="CogVideoX", name=name, steps=count, each=each, log="transformer",
                           share=count / steps))  # fmt: skip
    return found


def matching_steps(ours: list[Stage], other: list[Stage]) -> int:
    """Steps of the diffusion transformer after which the totals are equal."""
    *fixed, last = ours
    left = sum(stage.total for stage in other) - sum(stage.total for stage in fixed)
    stills = next(stage.steps for stage in fixed if stage.name == "transformer, stills")
    return stills + round(left / last.each)


def minutes(log: Path, steps: int) -> tuple[float, float]:
    """(as the clock went, on a machine that was busy with other things too; as the quickest tenth of the
    logged steps went)."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["step"] <= steps and "elapsed" in row]
    clock = [row["elapsed"] for row in rows]
    ends = [now for now, then in zip(clock, [*clock[1:], 0.0], strict=True) if then < now]  # of each process
    quick = statistics.quantiles([row["seconds_per_step"] for row in rows], n=10)[0]
    return sum(ends) / 60, steps * quick / 60


def table(stages: list[Stage], folder: Path) -> list[str]:
    """Markdown rows, and the family's sum."""
    rows, clocks = [], []
    for stage in stages:
        log = folder / stage.log / "log.jsonl"
        if stage.log and log.is_file():
            whole = round(stage.steps / stage.share)
            clocks.append([stage.share * value for value in minutes(log, whole)])
            said = f"{clocks[-1][0]:.0f} | {clocks[-1][1]:.0f}"
        else:
            said = "– | –"
        rows.append(f"| {stage.family} | {stage.name} | {stage.steps:,} | {stage.each / 1e9:.3g} | "
                    f"{stage.total / TERA:.0f} | {said} |")  # fmt: skip
    total, clock = sum(stage.total for stage in stages) / TERA, [sum(c) for c in zip(*clocks, strict=True)]
    rows.append(
        f"| **{stages[0].family}** | **all** | | | **{total:.0f}** | {clock[0]:.0f} | {clock[1]:.0f} |"
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ar_path", type=Path, required=True, help="of a finished `cogvideo-ar train`")
    parser.add_argument("--diffusion_path", type=Path, required=True, help="of a finished `cogvideox train`")
    parser.add_argument("--steps", type=int, default=diffusion.demo().transformer.steps,
                        help="of the diffusion transformer")  # fmt: skip
    parser.add_argument("--match", action="store_true", help="also say which number of steps costs the same")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ar = autoregressive_stages(options.ar_path)
    diff = diffusion_stages(options.diffusion_path, options.steps)
    print("| family | stage | steps | GFLOP each | TFLOP | minutes by the clock | minutes, quiet |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(table(ar, options.ar_path) + table(diff, options.diffusion_path)))
    if options.match:
        print(f"\nthe same operations: {matching_steps(diff, ar):,} steps of the diffusion transformer")


if __name__ == "__main__":
    main()
