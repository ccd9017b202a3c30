"""What approximations save and what they cost, on the demo models: speed, prompt accuracy, likeness to the
exact video, Frechet distance from true clips, each with its interval.

Every way makes the same videos: 64 held-out prompts of the shapes world with the benchmark's seeds. Quality
is measured on videos made in batches, speed in rounds of one video by every way in turn (CPU time of one
thread). Finished parts are kept in the output folder and not repeated. 8 bits need torchao (extra `quant`);
without it they are left out.
Run: python examples/approximations.py [--family cogvideox] [--prompts 64] [--page docs/approximations.md]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.features.extractors import extractors
from benchmarks.features.files import FeatureFiles
from benchmarks.metrics import prompt_accuracy
from benchmarks.metrics.distances import FIXED, SET_METRICS
from benchmarks.metrics.reconstruction import psnr
from benchmarks.runner import CLIP_STREAM
from benchmarks.sets import SetScore, VideoSet, score
from benchmarks.statistics import Interval, mean_interval, paired_difference
from benchmarks.suites import Item, Suite, items, world_captions
from cogvideo_ar.pipeline import CogVideoPipeline
from cogvideox_diff import CogVideoXPipeline
from cogvideox_diff.approximate import Approximation
from cogvideox_diff.planning import CallSettings
from shared.clips import shapes
from shared.errors import SettingError
from shared.files import atomic_path, write_json
from shared.protocol import GenerationRequest
from shared.quantize import QuantizeMode, check_quantize
from shared.video import Video

BATCH = 16
EXACT = "exact"
MARKS = "<!-- {0}: written by the example -->", "<!-- end of {0} -->"


@dataclass(frozen=True, kw_only=True)
class Way:
    """How videos are made: as the model says, but for this."""

    flags: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    quantize: QuantizeMode = "none"


BITS = {
    "int8 weights": Way(flags="--quantize int8", quantize="int8"),
    "fp8 weights": Way(flags="--quantize fp8", quantize="fp8"),
}
WAYS: dict[str, dict[str, Way]] = {
    "cogvideox": {EXACT: Way()}
    | {
        f"feature cache {change}": Way(
            flags=f"--approximate_feature_cache {change}",
            call={"approximation": Approximation(feature_cache=change)},
        )
        for change in (0.3, 0.5, 0.7, 1.0)
    }
    | {
        f"attention every {n} steps": Way(
            flags=f"--approximate_attention_every {n}",
            call={"approximation": Approximation(attention_every=n)},
        )
        for n in (2, 3)
    }
    | {
        f"{n} steps instead of 25": Way(flags=f"--num_inference_steps {n}", call={"num_inference_steps": n})
        for n in (15, 10)
    }
    | BITS,
    "cogvideo": {EXACT: Way()} | BITS,
}


# ---- videos


@cache
def pipeline(family: str, quantize: QuantizeMode) -> CogVideoPipeline | CogVideoXPipeline:
    if family == "cogvideo":
        return CogVideoPipeline.from_pretrained("demo", device="cpu", quantize=quantize)
    return CogVideoXPipeline.from_pretrained("demo", device="cpu", quantize=quantize)


def make(family: str, way: Way, chosen: Sequence[Item]) -> list[Video]:
    requests = [GenerationRequest(prompt=item.prompt, seed=item.seed) for item in chosen]
    model = pipeline(family, way.quantize)
    if isinstance(model, CogVideoPipeline):
        return [result.video for result in model.generate_batch(requests)]
    return [result.video for result in model.generate_batch(requests, CallSettings(**way.call))]


def run_net(family: str, way: Way, item: Item) -> Callable[[], object] | None:
    """The denoising of one video alone; None where the family has nothing of the kind."""
    model = pipeline(family, way.quantize)
    if isinstance(model, CogVideoPipeline):
        return None
    return lambda: model(item.prompt, seed=item.seed, output_type="latent", **way.call)


def batch_of_videos(folder: Path, family: str, name: str, chosen: Sequence[Item]) -> list[Video]:
    """Of the folder, else made and kept there."""
    path = (
        folder / f"{family}-{name.replace(' ', '-')}-{chosen[0].prompt_index:03d}-{len(chosen)}.safetensors"
    )
    if path.exists():
        return [Video(frames=frames, fps=shapes.FPS) for frames in load_file(path)["frames"]]
    videos = make(family, WAYS[family][name], chosen)
    with atomic_path(path) as temporary:
        save_file({"frames": torch.stack([video.frames for video in videos])}, temporary)
    return videos


# ---- quality


@dataclass(kw_only=True)
class Quality:
    """Of one way: a value for every prompt, and the features of all videos."""

    accuracy: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    features: VideoSet


def qualities(
    folder: Path, family: str, names: Sequence[str], suite: Suite, say: Callable[[str], None]
) -> dict[str, Quality]:
    nets, _ = extractors(FeatureFiles.parse([]))
    found = {name: Quality(features=VideoSet(name=name)) for name in names}
    everything = items(suite)
    for start in range(0, len(everything), BATCH):
        chosen = everything[start : start + BATCH]
        exact: list[Video] = []
        for name, quality in found.items():
            videos = batch_of_videos(folder, family, name, chosen)
            exact = exact or videos
            for item, video, original in zip(chosen, videos, exact, strict=True):
                quality.accuracy.append(prompt_accuracy.measure(video, item.prompt)[prompt_accuracy.NAME])
                quality.psnr.append(psnr(_unit(video), _unit(original)))
                quality.features.add(nets, item.prompt_index, video)
            say(f"{family}, {name}: {start + len(chosen)} of {len(everything)} videos")
    return found


def _unit(video: Video) -> torch.Tensor:
    return video.frames.permute(0, 3, 1, 2).double() / 255


def true_clips(suite: Suite) -> VideoSet:
    """A clip of every prompt, made by the shapes world."""
    nets, _ = extractors(FeatureFiles.parse([]))
    clips = VideoSet(name="true clips")
    for index, caption in enumerate(world_captions(suite, suite.num_prompts)):
        rng = np.random.default_rng([suite.seed, CLIP_STREAM, index])
        clips.add(nets, index, shapes.render(shapes.draw_scene(rng, caption=caption)))
    return clips


# ---- speed


def rounds(
    folder: Path, family: str, names: Sequence[str], suite: Suite, count: int, say: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of every round by way: of the whole video and of the net alone."""
    found: dict[str, dict[str, list[float]]] = {name: {"video": [], "net": []} for name in names}
    item = items(suite)[0]
    for number in range(count + 1):  # the first one warms up
        path = folder / f"{family}-round-{number}.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for name in names:
            if name not in kept:
                kept[name] = _one_round(family, WAYS[family][name], item)
        write_json(path, kept)
        say(f"{family}: round {number} of {count}")
        for name in names if number else []:
            for part, seconds in kept[name].items():
                found[name][part].append(seconds)
    return found


def _one_round(family: str, way: Way, item: Item) -> dict[str, float]:
    net = run_net(family, way, item)
    alone = {} if net is None else {"net": seconds_of(net)}
    return {"video": seconds_of(lambda: make(family, way, [item])), **alone}


def seconds_of(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def speed_ratio(exact: Sequence[float], other: Sequence[float]) -> Interval | None:
    """Geometric mean of exact / other over the rounds; above 1 is quicker."""
    if not other:
        return None
    logs = mean_interval([float(np.log(a / b)) for a, b in zip(exact, other, strict=True)])
    value, low, high = (float(np.exp(x)) for x in (logs.value, logs.low, logs.high))
    return Interval(value=value, low=low, high=high, n=logs.n)


# ---- table


def frechet(quality: Quality, truth: VideoSet) -> SetScore:
    return score(SET_METRICS[f"frechet/{FIXED}"], quality.features, truth)


def table(
    family: str,
    found: dict[str, Quality],
    times: dict[str, dict[str, list[float]]],
    truth: VideoSet,
) -> str:
    net = "denoising" if family == "cogvideox" else ""
    head = ["way", *([f"speed of {net}"] if net else []), "speed of the video", "prompt accuracy", "change"]
    head += ["PSNR to exact, dB", "Fréchet distance", "change"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    exact, reference = found[EXACT], frechet(found[EXACT], truth)
    for name, quality in found.items():
        own = frechet(quality, truth)
        flags = WAYS[family][name].flags
        cells = [f"{name} (`{flags}`)" if flags else name]
        cells += [_cell(speed_ratio(times[EXACT]["net"], times[name]["net"]), 2)] if net else []
        cells += [_cell(speed_ratio(times[EXACT]["video"], times[name]["video"]), 2)]
        cells += [f"{np.mean(quality.accuracy):.3f}"]
        others = paired_difference(quality.accuracy, exact.accuracy, proportion=True)
        cells += ["" if name == EXACT else _cell(others, 3, sign="+")]
        cells += ["" if name == EXACT else _cell(mean_interval(quality.psnr), 1)]
        cells += [f"{own.interval().value:.3f}"]
        cells += ["" if name == EXACT else _cell(own.minus(reference), 3, sign="+")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Interval | None, digits: int, sign: str = "") -> str:
    if found is None:
        return ""
    value, low, high = (f"{x:{sign}.{digits}f}" for x in (found.value, found.low, found.high))
    return f"{value} ({low} .. {high})"


def write_page(page: Path, family: str, text: str) -> None:
    """Put the table between the page's marks."""
    first, last = (mark.format(family) for mark in MARKS)
    before, found, rest = page.read_text(encoding="utf-8").partition(first)
    _, closed, after = rest.partition(last)
    if not (found and closed):
        raise SettingError(f"{page} lacks the marks {first!r} and {last!r}")
    with atomic_path(page) as temporary:
        temporary.write_text(f"{before}{first}\n\n{text}\n\n{last}{after}", encoding="utf-8")


def measure(family: str, folder: Path, *, prompts: int, num_rounds: int, say: Callable[[str], None]) -> str:
    """The table of one family, in Markdown."""
    suite = Suite(name="approximations", models=("demo",), num_prompts=prompts, num_clips=0)
    names = [name for name, way in WAYS[family].items() if way.quantize == "none" or _has_torchao(say)]
    times = rounds(folder, family, names, suite, num_rounds, say)
    found = qualities(folder, family, names, suite, say)
    return table(family, found, times, true_clips(suite))


@cache
def _has_torchao(say: Callable[[str], None]) -> bool:
    try:
        check_quantize("int8")
    except SettingError as error:
        say(f"without rows for 8 bits: {error}")
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--family", choices=list(WAYS), help="default: both")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output_path", type=Path, default=Path("out/approximations"))
    parser.add_argument("--page", type=Path, help="a document whose tables are written anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output_path.mkdir(parents=True, exist_ok=True)
    for family in [options.family] if options.family else list(WAYS):
        text = measure(
            family,
            options.output_path,
            prompts=options.prompts,
            num_rounds=options.rounds,
            say=lambda line: print(line, flush=True),
        )
        print(text)
        if options.page:
            write_page(options.page, family, text)


if __name__ == "__main__":
    main()
