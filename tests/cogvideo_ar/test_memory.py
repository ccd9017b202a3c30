"""Offload is exact and shares what the stages share; savers are chosen and named by known sizes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cogvideo_ar import fast_decode, memory
from cogvideo_ar.__main__ import main
from cogvideo_ar.config import cogvideo, cogview2_dsr
from cogvideo_ar.kv_cache import ColumnCache, KVCache
from cogvideo_ar.memory import advice, resolve_offload
from cogvideo_ar.options import Options, resolve
from cogvideo_ar.parts import Parts, load_parts, save_parts
from cogvideo_ar.pipeline import CogVideoPipeline
from cogvideo_ar.transformer import CogVideoTransformer
from shared.cpu_attention import bags_take
from shared.errors import OutOfMemoryError, SettingError
from shared.offload import Placement, Weights
from tests.cogvideo_ar.tiny_pipeline import tiny_parts

PROMPT = "a red circle moving left"
GIB = 2**30
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return save_parts(tiny_parts(path), path / "model")


def forced(parts: Parts, mode: str) -> CogVideoPipeline:
    """Offload although the CPU computes."""
    pipe = CogVideoPipeline(parts, placement=Placement("cpu"))
    pipe.placement.mode = mode  # type: ignore[assignment]
    return pipe


# ---- offload


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_offload_changes_nothing_and_has_one_net_at_a_time(folder: Path, mode: str):
    parts = load_parts(folder, torch.float32, torch.device("cpu"))
    wanted = CogVideoPipeline(parts)(PROMPT, seed=3).frames
    pipe = forced(parts, mode)
    places = {name: x.data_ptr() for net in parts.nets for name, x in net.named_parameters()}
    assert torch.equal(pipe(PROMPT, seed=3).frames, wanted)
    assert places == {name: x.data_ptr() for net in parts.nets for name, x in net.named_parameters()}
    largest = max(Weights.of([net]).nbytes for net in parts.nets)
    together = Weights.of(parts.nets).nbytes
    assert 0 < pipe.placement.peak_bytes <= largest < together


def test_offload_with_given_frames_and_settings(folder: Path):
    """Encoding the given frames is a stage too; a configured pipeline keeps its placement."""
    parts = load_parts(folder, torch.float32, torch.device("cpu"))
    image = torch.randint(0, 256, (16, 32, 3), generator=torch.Generator().manual_seed(0)).byte()
    wanted = CogVideoPipeline(parts)(PROMPT, image=image, num_frames=9).frames
    pipe = forced(parts, "model").configured(Options(num_frames=9))
    assert pipe.placement.mode == "model"
    assert torch.equal(pipe(PROMPT, image=image).frames, wanted)


def test_nets_are_elsewhere_when_another_works(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """While the second stage runs, nothing of the first one's own has a copy."""
    parts = load_parts(folder, torch.float32, torch.device("cpu"))
    pipe, seen = forced(parts, "model"), set()
    kept = {id(net): {n: x.data_ptr() for n, x in net.named_parameters()} for net in parts.nets}
    feed = CogVideoTransformer.feed

    def watched(model: CogVideoTransformer, *args: Any) -> torch.Tensor:
        moved = tuple(
            any(x.data_ptr() != kept[id(net)][n] for n, x in net.named_parameters()) for net in parts.nets
        )
        seen.add((model is parts.keyframes, *moved))
        return feed(model, *args)

    monkeypatch.setattr(CogVideoTransformer, "feed", watched)
    pipe(PROMPT, num_frames=9)
    assert seen == {(True, True, False, False), (False, False, True, False)}


def test_the_stages_share_the_base_channel_itself(folder: Path):
    """So that pinning or moving the nets keeps one copy of it."""
    parts = load_parts(folder, torch.float32, torch.device("cpu"))
    base = dict(parts.keyframes.base_parameters())
    assert base and all(x is base[name] for name, x in parts.interpolation.base_parameters())
    own = sum(x.nbytes for _, x in parts.interpolation.temporal_parameters())
    stages = [parts.keyframes, parts.interpolation]
    assert Weights.of(stages).nbytes == Weights.of(stages[:1]).nbytes + own


def test_on_the_cpu_offload_is_none_and_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pipe = CogVideoPipeline.from_pretrained(folder, device="cpu", offload="model")
    assert pipe.placement.mode == "none"
    words = ["generate", "--model_path", str(folder), "--device", "cpu", "--prompt", PROMPT]
    words += ["--num_frames", "5", "--offload", "model", "--output_path", str(tmp_path / "a.mkv")]
    assert main(words) == 0
    assert "memory: offload none (the CPU computes where weights wait)" in capsys.readouterr().err
    with pytest.raises(SettingError, match="unknown offload 'gpu'; legal: none, model, sequential, auto"):
        CogVideoPipeline.from_pretrained(folder, device="cpu", offload="gpu")


# ---- the choice


def test_auto_takes_what_costs_least_and_fits(monkeypatch: pytest.MonkeyPatch):
    """19 GB of both stages, 15.4 GB of one, and 18 GB of keys and values of eight blocks at once."""
    config = cogvideo()
    plan = resolve(config, Options())

    def choice(free: float) -> str:
        monkeypatch.setattr(memory, "free_bytes", lambda device: int(free * GIB))
        return resolve_offload("auto", config, plan, torch.float16, CUDA)[0]

    assert [choice(free) for free in (80, 33, 20)] == ["none", "model", "sequential"]
    with pytest.raises(OutOfMemoryError, match=r"^model/.* needs about .* 1\.00 GiB are free; try "):
        choice(1)
    assert resolve_offload("model", config, plan, torch.float16, CUDA) == ("model", "")


def test_advice_climbs_the_ladder():
    config = replace(cogvideo(), super_resolution=cogview2_dsr())
    plan, half = resolve(config, Options()), torch.float16
    assert advice("model/keyframes", dtype=half, plan=plan) == [
        "--offload model",
        "--offload sequential",
        "fewer frames",
    ]
    assert advice("model/interpolation", dtype=half, plan=plan)[0] == "--set max_batch=1"
    assert advice("decode", dtype=half, plan=plan, offload="sequential")[0] == "--super_resolution none"
    assert advice("loading", dtype=torch.float32, plan=plan, on_cpu=True) == [
        "--dtype bfloat16",
        "a smaller model",
    ]


def test_plan_climbs_to_offload(capsys: pytest.CaptureFixture[str]):
    words = ["plan", "--json", "--preset", "cogvideo", "--device", "rtx4090", "--memory", "21"]
    main(words)
    flags = [rung["flags"] for rung in json.loads(capsys.readouterr().out)["ladder"]]
    assert flags[0] == "" and any("--offload model" in words for words in flags)
    main(["plan", "--json", "--device", "cpu", "--memory", "0.5"])
    assert not any("--offload" in rung["flags"] for rung in json.loads(capsys.readouterr().out)["ladder"])


# ---- running out


class Full(nn.Module):
    def forward(self, *args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has")


@pytest.mark.parametrize(
    ("net", "stage", "tried"),
    [
        ("keyframes", "model/first_frame", "--dtype bfloat16; then fewer frames"),
        ("interpolation", "model/interpolation", "--set max_batch=1; then --dtype bfloat16, fewer frames"),
        ("vqvae", "decode", "--dtype bfloat16; then fewer frames"),
    ],
)
def test_out_of_memory_names_its_stage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, net: str, stage: str, tried: str
):
    parts = load_parts(folder, torch.float32, torch.device("cpu"))
    if net == "vqvae":
        monkeypatch.setattr(type(parts.vqvae), "decode", Full().forward)
    else:
        getattr(parts, net).blocks[1] = Full()
    with pytest.raises(OutOfMemoryError) as caught:
        CogVideoPipeline(parts)(PROMPT)
    said = str(caught.value)
    assert said == f"out of memory in stage '{stage}' (asked for 3.00 GiB more); try {tried}"


def test_loading_that_does_not_fit_names_its_stage(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cogvideo_ar.formats.load_parts", Full().forward)
    with pytest.raises(
        OutOfMemoryError, match=r"stage 'loading' .* try --dtype bfloat16; then a smaller model"
    ):
        CogVideoPipeline.from_pretrained(folder, device="cpu")


def test_the_command_line_ends_with_4(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(CogVideoTransformer, "start", Full().forward)
    words = ["generate", "--json", "--model_path", str(folder), "--device", "cpu", "--prompt", PROMPT]
    assert main([*words, "--output_path", str(tmp_path / "a.mkv")]) == 4
    said = json.loads(capsys.readouterr().out)
    assert said["exit_code"] == 4 and "stage 'model/first_frame'" in said["reason"]


# ---- loading, caches


@pytest.mark.parametrize("in_columns", [False, True])
def test_caches_are_allocated_once_a_run(folder: Path, in_columns: bool, monkeypatch: pytest.MonkeyPatch):
    """A buffer a channel and layer for every run of the loop over slots, however many tokens it draws; in
    waves one more: the spatial one that the prefill fills makes room for several frames."""
    made: list[type[KVCache]] = []

    def counting(kind: type[KVCache]) -> None:
        init = kind.__init__

        def counted(cache: KVCache, *args: Any) -> None:
            init(cache, *args)
            made.append(kind)

        monkeypatch.setattr(kind, "__init__", counted)

    counting(KVCache)
    counting(ColumnCache)
    if in_columns:
        monkeypatch.setattr(fast_decode, "FEWEST_CHANNELS", 1)
    parts = load_parts(folder, torch.float32, torch.device("cpu"))
    layers, most = parts.config.keyframes.num_layers, parts.config.sampling.max_batch
    CogVideoPipeline(parts)(PROMPT)
    batches = [-(-blocks // most) for blocks in (2, 4)]  # of the rounds 5 to 9 and 9 to 17
    assert len(made) == layers * (2 + 2 + 3 * sum(batches))
    assert set(made) == {ColumnCache if in_columns and bags_take(torch.float32) else KVCache}


MEASURE = """
import sys, json, torch
from pathlib import Path
from cogvideo_ar.parts import load_parts
from shared.memory import peak_resident_bytes
from shared.offload import Weights
load_parts(Path(sys.argv[2]), torch.float32, torch.device("cpu"))  # what is imported on the way
for dtype in (torch.float16, torch.float32):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what there is
    base = peak_resident_bytes()
    parts = load_parts(Path(sys.argv[1]), dtype, torch.device("cpu"))
    for net in parts.nets:
        for x in net.parameters():
            x.sum()
    print(json.dumps([peak_resident_bytes() - base, Weights.of(parts.nets).nbytes]))
    del parts, net, x
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of resident memory")
def test_loading_takes_the_weights_size(folder: Path, tmp_path: Path):
    """As stored, and cast while they are read; every page of the weights is looked at."""
    parts = load_parts(folder, torch.float16, torch.device("cpu"))
    wide = {"num_layers": 3, "num_heads": 12, "head_dim": 64}
    config = replace(
        parts.config,
        keyframes=replace(parts.config.keyframes, **wide),
        interpolation=replace(parts.config.interpolation, **wide),
    )
    keyframes = CogVideoTransformer(config.keyframes).half()
    interpolation = CogVideoTransformer(config.interpolation).half()
    own = dict(interpolation.temporal_parameters())
    interpolation.load_state_dict({**keyframes.state_dict(), **own})
    large = replace(parts, config=config, keyframes=keyframes, interpolation=interpolation)
    path = save_parts(large, tmp_path / "large")
    words = [sys.executable, "-c", MEASURE, str(path), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        peak, weights = json.loads(line)
        assert weights > 60e6 and weights * 0.9 < peak < 1.25 * weights + 16e6, (peak, weights)
