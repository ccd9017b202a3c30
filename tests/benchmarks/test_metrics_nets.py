"""Metrics that need nets: CLIP, LPIPS, the fixed-seed net, and what a missing or damaged file does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.__main__ import main
from benchmarks.comparison import compare
from benchmarks.evaluation import evaluate
from benchmarks.features.clip import ClipScorer
from benchmarks.features.extractors import extractors
from benchmarks.features.files import KINDS, FeatureFiles
from benchmarks.features.fixed import ConvolutionStack, stack_input
from benchmarks.features.instruments import load_instruments
from benchmarks.features.lpips import LAYERS, load_lpips
from benchmarks.metrics import METRICS, RefusedError
from benchmarks.metrics.distances import SET_METRICS
from benchmarks.report import markdown, up_to_date, write_reports, write_results
from benchmarks.runner import run_suite
from benchmarks.storage import RunFolder, read_json
from benchmarks.suites import Suite
from shared.errors import SettingError, WeightsError
from shared.video import Video
from tests.benchmarks.fakes import FakeGenerator
from tests.benchmarks.nets import SmallC3D, SmallI3D, SmallLogits, clip_folder, noise_videos, script


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


# ---- CLIP


def test_clip_scores_equal_transformers_own_model(clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    video, prompt = noise_videos(1, 4, frames=5)[0], "a red circle"
    scorer, model = ClipScorer(clip), CLIPModel.from_pretrained(clip).eval()
    tokens = CLIPTokenizer.from_pretrained(clip)(
        [prompt], truncation=True, max_length=12, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**tokens, pixel_values=scorer.prepared(video))
    text, frames = output.text_embeds[0].numpy(), output.image_embeds.numpy()  # both normalised
    values = scorer.measure(video, prompt)
    assert values["clip/sim"] == pytest.approx((frames @ text).mean(), abs=1e-6)
    assert values["clip/consistency"] == pytest.approx((frames[1:] * frames[:-1]).sum(1).mean(), abs=1e-6)


def test_clip_sees_the_middle_square_in_the_folders_scale(clip: Path) -> None:
    scorer = ClipScorer(clip)
    frames = torch.zeros(2, 16, 32, 3, dtype=torch.uint8)
    frames[:, :, 8:24] = 255
    pixels = scorer.prepared(Video(frames=frames, fps=8.0))
    white = (1 - torch.tensor([0.48, 0.46, 0.41])) / torch.tensor([0.27, 0.26, 0.28])
    assert pixels.shape == (2, 3, 16, 16)
    torch.testing.assert_close(pixels, white.view(1, 3, 1, 1).expand_as(pixels))
    still = Video(frames=frames[:1].expand(4, -1, -1, -1).contiguous(), fps=8.0)
    assert scorer.measure(still, "a")["clip/consistency"] == pytest.approx(1.0)
    assert scorer.measure(still, "a" * 300).keys() == {"clip/sim", "clip/consistency"}


def test_a_folder_that_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is no CLIP folder"):
        ClipScorer(tmp_path)


# ---- LPIPS


class PlainLPIPS(nn.Module):
    """AlexNet-LPIPS written once more, with torch's own layers and the package's names."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        total = torch.zeros(len(first))
        for number in range(5):
            a, b = (nn.functional.normalize(self.layer(x, number), dim=1, eps=1e-10) for x in (first, second))
            lin = self.weights[f"lin{number}.model.1.weight"].flatten()
            total = total + torch.einsum("tchw,c->thw", (a - b) ** 2, lin).mean((1, 2))
        return total

    def layer(self, x: Tensor, last: int) -> Tensor:
        mean, deviation = (
            torch.tensor([0.485, 0.456, 0.406]),
            torch.tensor([0.229, 0.224, 0.225]),
        )  # ImageNet's
        x = ((x + 1) / 2 - mean.view(1, 3, 1, 1)) / deviation.view(1, 3, 1, 1)
        pool, settings = nn.MaxPool2d(3, 2), ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))
        for number, (stride, padding) in enumerate(settings[: last + 1]):
            key = LAYERS[number][0]
            x = pool(x) if number in (1, 2) else x
            x = nn.functional.conv2d(
                x, self.weights[f"{key}.weight"], self.weights[f"{key}.bias"], stride, padding
            ).relu()
        return x


def lpips_weights() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    channels, kernels = (3, 6, 8, 8, 6, 4), (11, 5, 3, 3, 3)
    weights: dict[str, Tensor] = {}
    for number, (key, *_) in enumerate(LAYERS):
        shape = (channels[number + 1], channels[number], kernels[number], kernels[number])
        weights[f"{key}.weight"] = torch.randn(shape, generator=random) * 0.1
        weights[f"{key}.bias"] = torch.randn(shape[0], generator=random) * 0.1
        weights[f"lin{number}.model.1.weight"] = torch.rand(1, shape[0], 1, 1, generator=random)
    return weights


def test_lpips_from_weights_and_from_torchscript(tmp_path: Path) -> None:
    weights = lpips_weights()
    save_file(weights, tmp_path / "alex.safetensors")
    first, second = noise_videos(2, 5, frames=3, height=64, width=72)
    pixels = [video.to_pixels().transpose(0, 1) for video in (first, second)]
    wanted = float(PlainLPIPS(weights)(*pixels).mean())
    distance = load_lpips(tmp_path / "alex.safetensors")
    assert distance(first, second) == pytest.approx(wanted, rel=2e-3)  # constants rounded to three digits
    assert distance(first, first) == 0.0
    traced = torch.jit.trace(PlainLPIPS(weights), tuple(pixels), check_trace=False)
    traced.save(str(tmp_path / "alex.pt"))
    assert load_lpips(tmp_path / "alex.pt")(first, second) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(RefusedError, match="35 pixels"):
        distance(*noise_videos(2, 5))


def test_lpips_files_that_are_none(tmp_path: Path) -> None:
    weights = lpips_weights()
    del weights["lin3.model.1.weight"]
    save_file(weights, tmp_path / "alex.safetensors")
    with pytest.raises(WeightsError, match=r"lacks lin3.model.1.weight of AlexNet-LPIPS \(1 of 15 missing\)"):
        load_lpips(tmp_path / "alex.safetensors")


# ---- the fixed-seed net, and nets of one's own


def test_the_fixed_net_stays_the_same() -> None:
    """Its numbers compare from version to version, so its weights and its preparation may not change."""
    ramp = torch.arange(256, dtype=torch.uint8).repeat(20 * 16 * 3)[: 20 * 16 * 16 * 3].view(20, 16, 16, 3)
    features = ConvolutionStack.from_seed().features(stack_input(Video(frames=ramp, fps=8.0)))
    assert features.shape == (1, 128) and bool(features.isfinite().all())
    assert float(features.sum()) == pytest.approx(46.2284, rel=1e-4)


def test_the_fixed_net_sees_motion() -> None:
    """Frames in another order have other features: it is no net of single frames."""
    video = noise_videos(1, 8)[0]
    stack = ConvolutionStack.from_seed()
    shuffled = Video(frames=video.frames[torch.randperm(18)], fps=8.0)
    assert not torch.allclose(*(stack.features(stack_input(v)) for v in (video, shuffled)), rtol=1e-3)


def test_a_net_of_ones_own_in_both_forms(tmp_path: Path) -> None:
    stack = ConvolutionStack.from_seed(5)
    tensors = {
        f"layers.{i}.{part}": x
        for i, layer in enumerate(stack.layers)
        for part, x in zip(("weight", "bias"), layer, strict=True)
    }
    save_file(tensors, tmp_path / "own.safetensors")
    video = noise_videos(1, 9)[0]
    found, broken = extractors(FeatureFiles(paths={"features": tmp_path / "own.safetensors"}))
    assert not broken
    assert np.array_equal(found["own"](video), stack.features(stack_input(video))[0].numpy())

    class Means(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=[2, 3, 4])

    found, _ = extractors(FeatureFiles(paths={"features": script(Means(), tmp_path / "own.pt")}))
    assert found["own"](video) == pytest.approx(video.to_pixels().mean((1, 2, 3)).numpy(), abs=1e-6)


def test_a_stack_that_does_not_fit_together(tmp_path: Path) -> None:
    save_file(
        {"layers.0.weight": torch.zeros(4, 1, 3, 3, 3), "layers.0.bias": torch.zeros(4)},
        tmp_path / "a.safetensors",
    )
    _, broken = extractors(FeatureFiles(paths={"features": tmp_path / "a.safetensors"}))
    assert "holds no stack of 3D convolutions" in broken["features"]


# ---- files


def test_every_metric_that_needs_a_file_names_a_kind() -> None:
    assert {metric.needs for metric in METRICS.values()} - {""} == KINDS.keys()


def test_a_missing_file_skips_its_metrics(tmp_path: Path) -> None:
    tools = load_instruments(FeatureFiles.parse([f"clip={tmp_path / 'none'}"]))
    assert "none is not there" in tools.skipped["clip/sim"]
    assert tools.skipped["fvd/videogpt"].startswith("skipped: needs --feature_files i3d_400=PATH")
    assert not any(METRICS[name].needs == "" for name in tools.skipped)


def test_the_files_checksum_is_part_of_the_recipe(tmp_path: Path) -> None:
    one, two = tmp_path / "a.pt", tmp_path / "b.pt"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    ids = {
        FeatureFiles(paths={"i3d": path}).metrics()["fvd/common_metrics/styleganv"].recipe_id
        for path in (one, two)
    }
    assert len(ids) == 2
    assert FeatureFiles(paths={"i3d": one}).metrics()["prompt_accuracy"] == METRICS["prompt_accuracy"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["i3d"], "KIND=PATH, got 'i3d'"),
        (["i3e=x"], "nearest: 'i3d'"),
        (["clip=a", "clip=b"], "given twice"),
    ],
)
def test_mistakes_in_naming_files(words: list[str], reason: str) -> None:
    with pytest.raises(SettingError, match=reason):
        FeatureFiles.parse(words)


def test_fixed_seed_distances_say_so_everywhere() -> None:
    names = [name for name in METRICS if name.startswith(("frechet/fixed", "kid/fixed"))]
    assert len(names) == 6
    for name in names:
        assert "not comparable with published FVD" in METRICS[name].recipe_line


# ---- a whole run with every file


SUITE = Suite(name="nets", models=("good", "poor"), num_prompts=20, num_clips=20)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(path=tmp_path_factory.mktemp("nets") / "run")
    models = {"good": FakeGenerator("good"), "poor": FakeGenerator("poor", kernel=5, wrong_from=0)}
    run_suite(SUITE, folder, build=models.__getitem__, quiet=True)
    return folder


@pytest.fixture(scope="module")
def files(clip: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureFiles:
    folder = tmp_path_factory.mktemp("files")
    save_file(lpips_weights(), folder / "lpips.safetensors")
    layers = ConvolutionStack.from_seed(1).layers
    stack = {
        f"layers.{i}.{p}": x
        for i, pair in enumerate(layers)
        for p, x in zip(("weight", "bias"), pair, strict=True)
    }
    save_file(stack, folder / "own.safetensors")
    paths = {
        "i3d": script(SmallI3D().float(), folder / "i3d.pt"),
        "i3d_400": script(SmallLogits().float(), folder / "i3d_400.pt"),
        "c3d": script(SmallC3D(), folder / "c3d.pt"),
        "clip": clip,
        "lpips": folder / "lpips.safetensors",
        "features": folder / "own.safetensors",
    }
    return FeatureFiles(paths=paths)


@pytest.fixture(scope="module")
def measured(finished: RunFolder, files: FeatureFiles) -> dict:
    return evaluate(finished, files)


def test_every_metric_is_measured_with_all_files(measured: dict) -> None:
    row = measured["models"]["poor"]["metrics"]
    asked = {name for name in METRICS if not name.startswith("diagnostics/")}  # the fakes cannot say
    asked -= {"joules_per_video"}  # few machines can
    assert row.keys() - {"joules_per_video"} == asked and not measured["skipped"]
    for name, value in row.items():
        assert value["low"] <= value["value"] <= value["high"], name
        assert value["recipe"].startswith(measured["recipe"]["metrics"][name]["id"])
    assert row["frechet/fixed"]["n"] == 20


def test_distances_take_the_codec_out(measured: dict) -> None:
    """The codec of "good" loses nothing: both rows are one; the blur of "poor" moves its reference away."""
    good, poor = (measured["models"][name]["metrics"] for name in SUITE.models)
    assert good["frechet/fixed"]["value"] == pytest.approx(good["frechet/fixed/codec"]["value"])
    assert poor["frechet/fixed"]["value"] != pytest.approx(poor["frechet/fixed/codec"]["value"], rel=1e-2)
    assert good["frechet/fixed/limit"]["value"] < good["frechet/fixed"]["value"]


def test_distances_are_compared_on_the_same_prompts(measured: dict) -> None:
    entry = next(e for e in measured["differences"] if e["metric"] == "frechet/fixed")
    models = measured["models"]
    values = [models[name]["metrics"]["frechet/fixed"]["value"] for name in SUITE.models]
    assert entry["n"] == 20 and entry["value"] == pytest.approx(values[0] - values[1])
    assert any("tested together (Holm)" in note for note in measured["notes"])


def kept(path: Path, measured: dict) -> RunFolder:
    """The run's reports for programs, in a folder of their own."""
    write_results(RunFolder(path=path), measured)
    return RunFolder(path=path)


def test_distances_of_two_runs_are_compared_as_within_one(measured: dict, tmp_path: Path) -> None:
    """ "good" of one run against "poor" of another: the same difference and interval as in a common run."""
    parts = [
        {**measured, **{part: {name: measured[part][name]} for part in ("models", "items", "sets")}}
        for name in SUITE.models
    ]
    first, second = (kept(tmp_path / str(i), part) for i, part in enumerate(parts))
    found = {entry["metric"]: entry for entry in compare(first, second)}
    together = {entry["metric"]: entry for entry in measured["differences"]}
    asked = [name for name in SET_METRICS if name in together]
    assert {"fvd/videogpt", "frechet/fixed/codec", "kid/fixed", "inception_score"} < set(asked)
    for name in asked:
        for end in ("value", "low", "high", "n"):
            assert found[name][end] == pytest.approx(together[name][end]), (name, end)
        assert found[name]["verdict"] == together[name]["verdict"]


def test_distances_of_unlike_sets_are_refused_with_the_way_out(measured: dict, tmp_path: Path) -> None:
    whole = kept(tmp_path / "whole", measured)
    changes = {
        "other prompts": {"prompts": ["a circle"] * 20},
        "other true clips": {"reference": "0" * 16},
    }
    for words, change in changes.items():
        sets = {
            model: {name: {**saved, **change} for name, saved in scores.items()}
            for model, scores in measured["sets"].items()
        }
        other = kept(tmp_path / words, {**measured, "sets": sets})
        entry = next(e for e in compare(whole, other) if e["metric"] == "fvd/videogpt")
        assert words in entry["refused"] and "run both with the same" in entry["refused"]
    (whole.path / "sets.json").unlink()
    entry = next(e for e in compare(whole, other) if e["metric"] == "fvd/videogpt")
    assert "`report` it again" in entry["refused"]


def test_without_files_the_report_says_what_is_missing(finished_run: RunFolder) -> None:
    results = write_reports(finished_run)
    row = results["models"]["good"]
    assert "fvd/videogpt" not in row["metrics"] and "frechet/fixed" not in row["metrics"]
    assert row["refused"]["distances between sets"] == "needs 8 prompts or more, got 3"
    text = markdown(results)
    assert "## Skipped" in text and "needs --feature_files clip=PATH" in text
    assert up_to_date(finished_run)


def test_a_damaged_file_skips_too(tmp_path: Path) -> None:
    path = tmp_path / "i3d.pt"
    path.write_bytes(b"half a downl")
    tools = load_instruments(FeatureFiles(paths={"i3d": path, "clip": tmp_path, "lpips": path}))
    assert "is no TorchScript file" in tools.skipped["fvd/stylegan-v/fvd2048_16f"]
    assert "is no CLIP folder" in tools.skipped["clip/sim"]
    assert "is no TorchScript file" in tools.skipped["reconstruction/lpips"]


def test_the_command_line_takes_files(
    finished_run: RunFolder, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished_run.path), "--feature_files", f"clip={clip}", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert "clip/sim" in results["models"]["good"]["metrics"]
    recipes = read_json(finished_run.path / "results.json")["recipe"]["metrics"]
    assert recipes["clip/sim"]["parameters"]["file_sha256"]
    assert main(["list", "metrics"]) == 0
    listed = capsys.readouterr().out
    assert "needs i3d=PATH" in listed and "fixed-seed features, not comparable with published FVD" in listed
    assert main(["run", "demo", "--dry_run", "--feature_files", "i3e=x"]) == 2
    assert "nearest: 'i3d'" in capsys.readouterr().err


def test_a_suite_keeps_its_files(tmp_path: Path) -> None:
    suite = Suite(name="mine", models=("a",), feature_files=("i3d=i3d.pt", "clip=folder"))
    assert suite.command.endswith("--feature_files i3d=i3d.pt clip=folder")
