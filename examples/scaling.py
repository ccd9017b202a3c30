"""How the cost grows: with frames, frame size, batch and processes as measured here, beside the cost model;
and what the model says of 8 and 64 GPUs, which is simulated, not measured.

The diffusion rows are a guided step and a decoding of a middle-sized net with random weights, the
autoregressive rows the demo model's tokens. CPU seconds of one thread (of several processes those of the
busiest), the least of the repeats: on a machine with other work the wall says nothing.
Run: python examples/scaling.py [--repeats 3] [--only simulated] [--page docs/scaling.md]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from approximations import write_page
from torch import Tensor

from cogvideo_ar.config import PRESETS as AR_PRESETS
from cogvideo_ar.costs import stage_costs as ar_costs
from cogvideo_ar.options import Options, resolve
from cogvideo_ar.pipeline import CogVideoPipeline
from cogvideox_diff.config import PRESETS, CogVideoXConfig, TransformerConfig, cogvideox_demo
from cogvideox_diff.costs import decode_parts, stage_costs, transformer_parts
from cogvideox_diff.memory import native_plan
from cogvideox_diff.parallel import InferenceGroups, ParallelTransformer
from cogvideox_diff.planning import Plan
from cogvideox_diff.transformer import ExpertTransformer
from cogvideox_diff.vae.autoencoder import CausalVAE
from shared.costs import CPU_GBYTES, DEVICES, Device, Part, StageCost, cpu_device
from shared.cpu_linear import quick_linear
from shared.distributed import Launch, started
from shared.files import atomic_path, write_json
from shared.protocol import GenerationRequest

# Assumed, not measured: shares of the nominal one-way figures that all-to-all reaches.
NODE_GPUS = 8
NODE_LINK = 0.7 * 450e9  # bytes/s of a GPU inside a node: NVLink 4
NET_LINK = 0.8 * 50e9  # bytes/s of a GPU between nodes: 400 Gbit/s

NET = TransformerConfig(
    num_layers=4, num_heads=8, head_dim=64, in_channels=16, out_channels=16, position="rope",
    sample_size=(5, 16, 24), time_embed_dim=128, text_dim=256, text_len=64,
)  # fmt: skip
BASE = (5, 16, 24)  # latent frames, rows, columns: 17 frames of 128 x 192


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured size; `predicted` is the cost model's."""

    what: str  # what grows
    size: str
    seconds: float
    predicted: float


def least_seconds(run: Callable[[], object], repeats: int) -> float:
    """CPU seconds, after one run that does not count."""
    found = []
    for _ in range(repeats + 1):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found[1:])


def this_cpu() -> Device:
    """One thread, its matrix products measured."""
    x = torch.randn(1536, 1536)
    with torch.no_grad():
        seconds = least_seconds(lambda: quick_linear(x, x), 5)
    return cpu_device(2 * 1536**3 / seconds / 1e9, CPU_GBYTES, 2**34)


# ---- diffusion


def sizes() -> list[tuple[str, str, tuple[int, int, int], int]]:
    """(what grows, size, latents, videos)."""
    t, h, w = BASE
    frames = [("frames", f"{4 * n - 3}", (n, h, w), 1) for n in (3, 5, 9)]
    frame = [
        ("frame size", f"{8 * h * k // 4}x{8 * w * k // 4}", (t, h * k // 4, w * k // 4), 1)
        for k in (2, 4, 6)
    ]
    return frames + frame + [("batch", f"{n}", BASE, n) for n in (1, 2, 4)]


def denoising(repeats: int, device: Device) -> list[Row]:
    model = net()
    rows = []
    for what, size, latents, videos in sizes():
        inputs = step_inputs(latents, 2 * videos)
        with torch.no_grad():
            seconds = least_seconds(lambda inputs=inputs: model(*inputs), repeats)
        parts = transformer_parts(NET, grid_of(latents), 2 * videos, 4)
        predicted = device.seconds(parts, torch.float32)
        rows.append(Row(what=f"step: {what}", size=size, seconds=seconds, predicted=predicted))
    return rows


def net() -> ExpertTransformer:
    model = ExpertTransformer(NET)
    model.init_weights(torch.Generator().manual_seed(0), zero_modulation=False)
    return model.eval().requires_grad_(False)


def grid_of(latents: tuple[int, int, int]) -> tuple[int, int, int]:
    return latents[0], latents[1] // 2, latents[2] // 2


def step_inputs(latents: tuple[int, int, int], rows: int) -> tuple[Tensor, Tensor, Tensor]:
    t, h, w = latents
    text = torch.randn(rows, NET.text_len, NET.text_dim)
    return torch.randn(rows, t, NET.in_channels, h, w), text, torch.full((rows,), 500)


def decoding(repeats: int, device: Device) -> list[Row]:
    config = replace(cogvideox_demo().vae, widths=(32, 32, 64, 64))
    torch.manual_seed(0)
    vae = CausalVAE(config).eval().requires_grad_(False)
    rows = []
    for what, size, latents, videos in sizes():
        if videos > 1:
            continue  # one at a time
        t, h, w = latents
        z = torch.randn(1, config.latent_channels, t, h // 2, w // 2)
        with torch.no_grad():
            seconds = least_seconds(lambda z=z: vae.decode(z), repeats)
        parts = decode_parts(config, (t, h // 2, w // 2), 4)
        predicted = device.seconds(parts, torch.float32)
        if what == "frame size":
            size = "x".join(str(int(side) // 2) for side in size.split("x"))
        rows.append(Row(what=f"decoding: {what}", size=size, seconds=seconds, predicted=predicted))
    return [row for row in rows if not row.what.endswith("batch")]


# ---- tokens


def tokens(repeats: int, device: Device) -> list[Row]:
    model = CogVideoPipeline.from_pretrained("demo", device="cpu")
    rows = []
    for what, frames, videos in [("frames", n, 1) for n in (5, 9, 17)] + [
        ("batch", 5, n) for n in (1, 2, 4, 8)
    ]:
        options = Options(num_frames=frames)
        called = model.configured(options)
        requests = [GenerationRequest(prompt="a red circle moving left", seed=seed) for seed in range(videos)]
        seconds = least_seconds(lambda c=called, r=requests: c.generate_batch(r), repeats)
        plan = resolve(model.parts.config, options)
        stages = ar_costs(model.parts.config, plan, torch.float32, samples=videos)
        predicted = sum(device.stage_seconds(stage, torch.float32) for stage in stages)
        size = str(frames if what == "frames" else videos)
        rows.append(Row(what=f"tokens: {what}", size=size, seconds=seconds, predicted=predicted))
    return rows


# ---- processes


def processes(repeats: int) -> list[Row]:
    """A guided step by one process and by two that share its rows or its tokens."""
    inputs = step_inputs(BASE, 2)
    model = net()
    with torch.no_grad():
        alone = least_seconds(lambda: model(*inputs), repeats)
    rows = [Row(what="processes: guidance", size="1", seconds=alone, predicted=alone)]
    rows += [Row(what="processes: Ulysses", size="1", seconds=alone, predicted=alone)]
    for name, guidance in (("guidance", 2), ("Ulysses", 1)):
        share = 0.5 if guidance == 2 else own_share(NET, BASE, 2)
        seconds = max(two_processes(guidance, repeats))
        rows.append(Row(what=f"processes: {name}", size="2", seconds=seconds, predicted=share * alone))
    return sorted(rows, key=lambda row: (row.what, row.size))


def own_share(config: TransformerConfig, latents: tuple[int, int, int], degree: int) -> float:
    """Of the operations: the tokens are shared, in attention the heads."""
    parts = transformer_parts(config, grid_of(latents), 1, 4)
    return sum(p.flops for p in on_one_of(parts, config, grid_of(latents), degree)) / sum(
        p.flops for p in parts
    )


def two_processes(guidance: int, repeats: int) -> list[float]:
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = [spawn.Process(target=_work, args=(folder, rank, guidance, repeats)) for rank in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError("a process failed; its reason is above")
        written = [Path(folder, f"{rank}.json").read_text(encoding="utf-8") for rank in (0, 1)]
    return [json.loads(text)["seconds"] for text in written]


def _work(folder: str, rank: int, guidance: int, repeats: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with started(Launch.from_file(Path(folder, "store"), rank, 2), "gloo") as world, torch.no_grad():
        model = ParallelTransformer.of(net(), InferenceGroups.of(world, guidance=guidance, clip=False))
        inputs = step_inputs(BASE, 2)
        seconds = least_seconds(lambda: model(*inputs), repeats)
        write_json(Path(folder, f"{rank}.json"), {"seconds": seconds})


# ---- simulated


def on_one_of(
    parts: Iterable[Part], config: TransformerConfig, grid: tuple[int, int, int], degree: int
) -> list[Part]:
    """The work of the busiest of `degree` ranks that share the tokens and the heads."""
    length = config.text_len + math.prod(grid)
    tokens = math.ceil(length / degree) / length
    heads = math.ceil(config.num_heads / degree) / config.num_heads
    shares = {"attention": heads}
    return [
        replace(
            part,
            flops=round(part.flops * shares.get(part.kind, tokens)),
            moved=round(part.moved * shares.get(part.kind, tokens)),
        )
        for part in parts
    ]


def exchange_seconds(config: TransformerConfig, grid: tuple[int, int, int], degree: int) -> float:
    """Of a step's all-to-alls of one row: q, k and v there, the result back."""
    if degree == 1:
        return 0.0
    own = (config.text_len + math.prod(grid)) / degree
    sent = config.num_layers * config.hidden_dim * 2 * 4 * own * (degree - 1) / degree
    outside = max(0, degree - NODE_GPUS) / (degree - 1)  # of the partners
    return sent * ((1 - outside) / NODE_LINK + outside / NET_LINK)


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """One video on `gpus` of a kind, and what they make when each makes its own videos."""

    model: str
    gpus: int
    shared: str
    seconds: float
    speedup: float
    exchanging: float  # share of the seconds
    videos_per_hour: float


@cache
def planned(name: str) -> tuple[CogVideoXConfig, Plan, list[StageCost]]:
    """A model, a call that sets nothing, and its stages text, model and decode."""
    config = PRESETS[name]()
    plan = native_plan(config)
    return config, plan, [s for s in stage_costs(config, plan, torch.bfloat16) if s.name != "encode"]


def simulated(name: str, device: Device, gpus: int) -> Simulated:
    """Guidance over two groups, the tokens over each group's GPUs, pieces of the VAE over all."""
    config, plan, (text, model, decode) = planned(name)
    alone = sum(device.stage_seconds(stage, torch.bfloat16) for stage in (text, model, decode))
    if gpus == 1:
        seconds, exchanging, shared = alone, 0.0, ""
    else:
        degree = min(gpus // 2, config.transformer.num_heads)
        step = transformer_parts(config.transformer, plan.geometry.grid, 1, 2)
        own = device.seconds(on_one_of(step, config.transformer, plan.geometry.grid, degree), torch.bfloat16)
        exchange = exchange_seconds(config.transformer, plan.geometry.grid, degree)
        turns = math.ceil(decode.steps / gpus) / decode.steps
        ends = device.stage_seconds(text, torch.bfloat16) + turns * device.stage_seconds(
            decode, torch.bfloat16
        )
        seconds, exchanging = plan.num_steps * (own + exchange) + ends, plan.num_steps * exchange
        shared = f"guidance 2 x tokens {degree}"
    return Simulated(
        model=name,
        gpus=gpus,
        shared=shared,
        seconds=seconds,
        speedup=alone / seconds,
        exchanging=exchanging / seconds,
        videos_per_hour=gpus * 3600 / alone,
    )


def simulated_tokens(device: Device, gpus: int, batch: int = 4) -> Simulated:
    """CogVideo, whose videos are not shared: every GPU makes `batch` at a time."""
    config = AR_PRESETS["cogvideo"]()
    plan = resolve(config, Options())
    stages = ar_costs(config, plan, torch.float16, samples=batch)
    seconds = sum(device.stage_seconds(stage, torch.float16) for stage in stages)
    return Simulated(
        model=f"cogvideo {plan.height}x{plan.width}, {batch} at a time",
        gpus=gpus,
        shared="",
        seconds=seconds,
        speedup=1.0,
        exchanging=0.0,
        videos_per_hour=gpus * batch * 3600 / seconds,
    )


# ---- tables and plot


def measured_table(rows: list[Row], device: Device) -> str:
    lines = [
        f"One thread; {device.single / 1e9:.0f} GFLOP/s in float32 products, measured in the same run.",
        "",
        "| what grows | size | CPU s | predicted s | growth | predicted growth |",
        "|---|---|---|---|---|---|",
    ]
    first: dict[str, Row] = {}
    for row in rows:
        base = first.setdefault(row.what, row)
        growth = (row.seconds / base.seconds, row.predicted / base.predicted)
        numbers = f"{row.seconds:.3f} | {row.predicted:.3f} | {growth[0]:.2f} | {growth[1]:.2f}"
        lines.append(f"| {row.what} | {row.size} | {numbers} |")
    return "\n".join(lines)


def simulated_table(rows: list[Simulated]) -> str:
    lines = [
        "**Simulated from the cost model, not measured.**",
        "",
        "| model | H100s | one video's shares | s | speed-up | exchanging | videos an hour, each its own |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = f"{row.seconds:.1f} | {row.speedup:.1f} | {row.exchanging:.0%} | {row.videos_per_hour:.0f}"
        lines.append(f"| {row.model} | {row.gpus} | {row.shared or 'none'} | {shown} |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Growth from the first size on, measured (dots) and predicted (lines)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.what, []).append(row)
    columns = 4
    figure = Figure(figsize=(13, 3 * math.ceil(len(groups) / columns)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(math.ceil(len(groups) / columns), columns, squeeze=False).flatten()
    for axes, (what, group) in zip(panels, groups.items(), strict=False):
        labels = [row.size for row in group]
        axes.plot(
            labels, [row.predicted / group[0].predicted for row in group], color="#6b7280", label="predicted"
        )
        axes.plot(
            labels, [row.seconds / group[0].seconds for row in group], "o", color="#1a7f4b", label="measured"
        )
        axes.set_title(what, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    panels[0].legend(fontsize=8, frameon=False)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("measured", "simulated"))
    parser.add_argument("--output_path", type=Path, default=Path("out/scaling"))
    parser.add_argument("--page", type=Path, help="a document whose tables are written anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output_path.mkdir(parents=True, exist_ok=True)
    texts: dict[str, str] = {}
    if options.only != "simulated":
        device, rows = this_cpu(), []
        for measure in (denoising, decoding, tokens):
            rows += measure(options.repeats, device)
            print(f"{measure.__name__}: done", flush=True)
        rows += processes(options.repeats)
        write_json(options.output_path / "scaling.json", {"rows": [asdict(row) for row in rows]})
        draw(rows, options.output_path / "scaling.png")
        texts["measured"] = measured_table(rows, device)
    if options.only != "measured":
        found: list[Any] = [
            simulated(name, DEVICES["h100"], gpus)
            for name in ("cogvideox-2b", "cogvideox-5b", "cogvideox-1.5-5b")
            for gpus in (1, 8, 64)
        ]
        found += [simulated_tokens(DEVICES["h100"], gpus) for gpus in (1, 8, 64)]
        texts["simulated"] = simulated_table(found)
    for name, text in texts.items():
        print(text)
        if options.page:
            write_page(options.page, name, text)


if __name__ == "__main__":
    main()
