"""Compiled blocks, CUDA graphs, other attention kernels: the same function, refused where they cannot run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideox_diff import CogVideoXPipeline, fast_block
from cogvideox_diff.__main__ import main
from cogvideox_diff.acceleration import Acceleration, Graphed
from cogvideox_diff.approximate import ApproximateTransformer, Approximation
from cogvideox_diff.config import TransformerConfig
from cogvideox_diff.guidance import Predictor
from cogvideox_diff.transformer import ExpertTransformer
from shared.attention import attend
from shared.errors import OutputCheckError, SettingError
from shared.graphs import Replay
from tests.cogvideox_diff.tiny_pipeline import PROMPT, make, write_tokenizer

NET = TransformerConfig(
    num_layers=1,
    num_heads=2,
    head_dim=16,
    in_channels=4,
    out_channels=4,
    position="rope",
    sample_size=(2, 4, 4),
    time_embed_dim=16,
    text_dim=8,
    text_len=3,
)
CPU = torch.device("cpu")


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 2, 4, 4, 4), torch.randn(2, 3, 8), torch.tensor([500]).expand(2)


# ---- one timestep for both halves of guidance


@torch.no_grad()
def test_modulation_is_computed_once_for_one_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_block, "FEWEST_VALUES", 1)
    model, (x, text, one) = ExpertTransformer(NET), inputs()
    rows: list[int] = []
    model.blocks[0].norm1.video.register_forward_hook(lambda layer, x, y: rows.append(y.numel() // len(y)))
    together = model(x, text, one)
    assert len(rows) == 1
    torch.testing.assert_close(together, model(x, text, one.clone()))
    assert len(rows) == 3
    assert not torch.allclose(together, model(x, text, torch.tensor([500, 3])))


@torch.no_grad()
def test_a_guided_step_gives_one_timestep() -> None:
    given: list[tuple[Tensor, Tensor]] = []

    def model(x: Tensor, text: Tensor, timesteps: Tensor, ofs: Tensor) -> Tensor:
        given.append((timesteps, ofs))
        return x

    x, text, _ = inputs()
    Predictor(model=model, text=text[:1], negative=text[1:], ofs=2.0)(x[:1], 7)
    times, ofs = given[0]
    assert times.tolist() == [7, 7] and times.stride() == (0,) and ofs.tolist() == [2.0]


# ---- compiled


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_are_the_same_function() -> None:
    model = ExpertTransformer(NET)
    compiled = copy.deepcopy(model)
    step = Acceleration(compile="blocks").apply(compiled)
    torch.testing.assert_close(step(*inputs_of(0)), model(*inputs_of(0)), rtol=0, atol=2e-6)


def inputs_of(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    return inputs()


# ---- graphs


def recorded_eagerly(run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """As a graph: the same memory is read and written by every replay."""
    result = run().clone()
    return result, lambda: result.copy_(run())  # type: ignore[return-value,func-returns-value]


@torch.no_grad()
def test_a_graph_reads_its_own_inputs_and_gives_results_away() -> None:
    model, captures = ExpertTransformer(NET), []

    def capture(run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        captures.append(run)
        return recorded_eagerly(run)

    step = Graphed(model, capture)
    first, second = inputs_of(1), inputs_of(2)
    kept = step(*first, None)
    torch.testing.assert_close(step(*second, None), model(*second))
    torch.testing.assert_close(kept, model(*first))
    assert len(captures) == 1
    one_row = tuple(x[:1] for x in first)
    torch.testing.assert_close(step(*one_row, None), model(*one_row))
    assert len(captures) == 2


@torch.no_grad()
def test_a_graph_computes_the_modulation_of_one_timestep_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_block, "FEWEST_VALUES", 1)
    model, (x, text, one) = ExpertTransformer(NET), inputs()
    rows: list[int] = []
    model.blocks[0].norm1.video.register_forward_hook(lambda layer, x, y: rows.append(y.numel() // len(y)))
    captures = []

    def capture(run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        captures.append(run)
        result = run()
        return result, lambda: result.copy_(run())  # type: ignore[return-value,func-returns-value]

    step = Graphed(model, capture)
    step(x, text, one)
    assert len(rows) == 2  # recorded and replayed, once each
    other = torch.tensor([20]).expand(2)
    torch.testing.assert_close(step(x, text, other), model(x, text, other))
    two = torch.tensor([500, 3])  # rows that differ are another graph
    torch.testing.assert_close(step(x, text, two), model(x, text, two))
    assert len(captures) == 2


def test_the_layer_of_a_nan_is_found_behind_a_graph(tmp_path: Path) -> None:
    pipe = make("5b", write_tokenizer(tmp_path / "tokenizer"))
    model = pipe.parts.transformer
    pipe.engine.step = Graphed(model, unheard)
    model.blocks[1].mlp.fc1.weight.data[0, 0] = float("nan")  # type: ignore[union-attr,operator]
    with pytest.raises(OutputCheckError, match=r"at step 1 .*; first bad layer: blocks\.1"):
        pipe(PROMPT)


def unheard(run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """Replays call no layer, so hooks hear nothing."""
    result = run().clone()
    return result, lambda: None


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("fast", [False, True])
def test_a_graph_on_a_gpu(monkeypatch: pytest.MonkeyPatch, fast: bool) -> None:
    """Also of the block that leaves the plain layers."""
    if fast:
        monkeypatch.setattr(fast_block, "FEWEST_VALUES", 1)
    model = ExpertTransformer(NET).cuda()
    step = Acceleration(compile="graph").apply(model)
    for seed in range(3):
        given = tuple(x.cuda() for x in inputs_of(seed))
        torch.testing.assert_close(step(*given, None), model(*given))


# ---- kernels


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["math", "flash"])
def test_other_attention_kernels(kernel: str) -> None:
    model = ExpertTransformer(NET)
    wanted = model(*inputs_of(0))
    got = Acceleration(attention=kernel).apply(model)(*inputs_of(0))  # type: ignore[arg-type]
    torch.testing.assert_close(got, wanted)


# ---- refusals and the whole


@pytest.mark.parametrize(
    ("chosen", "options", "words"),
    [
        ({"compile": "graph"}, {}, "compile graph needs a CUDA device, got cpu; legal here: none, blocks"),
        ({"compile": "all"}, {}, "unknown compile 'all'; legal: none, blocks, graph"),
        ({"compile": "blocks"}, {"offload": "model"}, "needs weights that stay and one process"),
        ({"compile": "blocks"}, {"processes": 2}, "needs weights that stay and one process"),
        ({"compile": "graph"}, {"processes": 2}, "compile graph needs"),
        ({"attention": "cudnn"}, {}, "attention cudnn needs a GPU; legal here: sdpa, math, flash"),
        ({"attention": "slow"}, {}, "unknown attention 'slow'; legal: sdpa, math"),
    ],
)
def test_refusals(chosen: dict[str, str], options: dict[str, object], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        Acceleration(**chosen).check(CPU, **options)  # type: ignore[arg-type]


def test_what_the_sidecar_says() -> None:
    assert Acceleration().settings() == {}
    assert Acceleration(compile="blocks").settings() == {"compile": "blocks"}


def test_an_accelerated_pipeline_makes_the_same_video(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    wanted = make("5b", tokenizer)(PROMPT, output_type="latent")
    pipe = make("5b", tokenizer)
    pipe.accelerate(Acceleration(attention="math"))
    assert all(block.attn.attend is not attend for block in pipe.parts.transformer.blocks)
    torch.testing.assert_close(pipe(PROMPT, output_type="latent"), wanted, rtol=0, atol=1e-4)


def test_graphs_and_compiled_blocks_leave_nothing_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work, from Python."""
    pipe = make("5b", write_tokenizer(tmp_path / "tokenizer"))
    monkeypatch.setattr(pipe.engine, "_text", None)
    for compile, settings, words in APPROXIMATED:
        pipe.engine.acceleration = Acceleration(compile=compile)  # type: ignore[arg-type]
        with pytest.raises(SettingError, match=words):
            pipe(PROMPT, approximation=Approximation(**settings))  # type: ignore[arg-type]


APPROXIMATED = [
    ("graph", {"feature_cache": 0.1}, "compile graph does not go with feature_cache; legal: none, blocks$"),
    ("graph", {"attention_every": 2}, "compile graph does not go with attention_every; legal: none$"),
    ("blocks", {"attention_every": 2}, "compile blocks does not go with attention_every; legal: none$"),
]


def test_compiled_blocks_leave_nothing_out_on_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are read."""
    monkeypatch.setattr(CogVideoXPipeline, "from_pretrained", None)
    words = [
        "generate",
        "--device",
        "cpu",
        "--prompt",
        "a",
        "--compile",
        "--approximate_attention_every",
        "2",
    ]
    assert main(words) == 2
    assert "compile blocks does not go with attention_every; legal: none" in capsys.readouterr().err


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_go_with_the_feature_cache() -> None:
    model = ExpertTransformer(NET)
    compiled = copy.deepcopy(model)
    Acceleration(compile="blocks").apply(compiled)
    x, text, _ = inputs_of(0)
    steps = [
        ApproximateTransformer(net, Approximation(feature_cache=10.0), num_steps=3)
        for net in (model, compiled)
    ]
    for timestep in (900, 500, 100):
        wanted, got = (step(x, text, torch.tensor([timestep]).expand(2)) for step in steps)
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
    assert steps[0].report(1) == steps[1].report(1) == [{"steps": 3, "steps_skipped": 1}]
