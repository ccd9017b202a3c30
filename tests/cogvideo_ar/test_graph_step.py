"""The static step: the plain step's logits, and nothing in it that a recorded graph could not replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideo_ar import graph_step
from cogvideo_ar.__main__ import main
from cogvideo_ar.config import cogvideo
from cogvideo_ar.generation import generate_tokens
from cogvideo_ar.graph_step import GraphStep, attend_wide, check_compile, graph_pool, padded_size
from cogvideo_ar.layout import image_layout, interpolation_layout, keyframe_layout
from cogvideo_ar.pipeline import CogVideoPipeline
from cogvideo_ar.sampling import CogLMSampler
from cogvideo_ar.slot_attention import SlotAttention
from cogvideo_ar.speculation import generate_tokens_with_guesses
from cogvideo_ar.transformer import CogVideoTransformer, DecodeState, layer_cache
from cogvideo_ar.wavefront import _with_lanes as with_lanes
from cogvideo_ar.wavefront import generate_tokens_in_waves
from shared import graphs
from shared.attention import attend
from shared.errors import SettingError
from shared.graphs import Replay
from shared.memory import peak_bytes
from tests.cogvideo_ar.test_fast_decode import calm_model
from tests.cogvideo_ar.tiny import NUM_IMAGE_TOKENS, configs, kind_of, tiny_config, wild_model
from tests.cogvideo_ar.tiny_pipeline import tiny_parts

SAMPLER = CogLMSampler(torch.arange(NUM_IMAGE_TOKENS) % 5, top_k=3)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


# ---- a graph without a GPU


class Operators(TorchDispatchMode):
    """Notes every operator with the very tensors that it reads and makes, as a graph does: what Python knew
    meanwhile is no part of it. Refuses what would wait for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in func.name() for word in WAITING), f"{func.name()} in a graph"
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in tensors_in(args)}
        fresh = [x for x in made if x.untyped_storage().data_ptr() not in known]
        self.calls.append((func, args, kwargs or {}, made if fresh else []))
        return out

    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            out = func(*args, **kwargs)
            again = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
            for kept, new in zip(made, again, strict=False):
                kept.copy_(new)


def tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors_in(value)


class Recorder:
    """Stands in for `SharedPool`; counts."""

    def __init__(self) -> None:
        self.generations, self.graphs, self.replays = 0, 0, 0

    def __call__(self) -> Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]:
        self.generations += 1
        return self.capture

    def capture(self, run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        self.graphs += 1
        with Operators() as operators:
            result = run()
        result.fill_(torch.nan)  # nothing is there before the first replay

        def replay() -> None:
            self.replays += 1
            operators.replay()

        return result, replay


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """What nobody has written spoils every sum that it enters."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_step, "BUCKET", 8)


# ---- logits and tokens


def decoded(
    generate: Any, model: CogVideoTransformer, layout: Any, texts: list[list[int]], **options: Any
) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that they were drawn from, by number."""
    random = torch.Generator().manual_seed(1)
    batch = len(texts) // (2 if "guidance_alpha" in options else 1)
    frames = torch.randint(NUM_IMAGE_TOKENS, (batch, layout.num_given, layout.frame_len), generator=random)
    uniforms = torch.rand(layout.length, batch, 2, generator=random, dtype=torch.float64)
    repeat = torch.rand(layout.length, generator=random) < 0.7
    seen: dict[int, Tensor] = {}

    def sample(logits: Tensor, number: int) -> Tensor:
        """Often the token of the last given frame, so that guesses are sometimes right."""
        seen[number] = logits
        drawn = SAMPLER.sample(logits, uniforms[number])
        again = layout.num_given and bool(repeat[number])
        return frames[:, -1, number % layout.frame_len] if again else drawn

    with unwritten_is_nan():
        tokens = generate(model, layout, texts, frames, sample, **options)
    return tokens, torch.stack([seen[number] for number in sorted(seen)])


def texts_of(layout: Any, rows: int, *, padded: bool) -> list[list[int]]:
    """The first is as long as the layout says."""
    return [
        [30 + row] * (max(1, layout.text_len - row) if padded else layout.text_len) for row in range(rows)
    ]


WAYS = {
    "serial": (generate_tokens, 2),
    "waves": (generate_tokens_in_waves, 2),
    "guesses": (generate_tokens_with_guesses, 1),
}


@settings(max_examples=25, deadline=None)
@given(
    config=configs(),
    make=st.sampled_from([image_layout, keyframe_layout, interpolation_layout]),
    way=st.sampled_from(list(WAYS)),
    padded=st.booleans(),
    rare=st.integers(0, 2),
    options=st.sampled_from(
        [{}, {"guidance_alpha": 3.0}, {"text_weight": 1.4}, {"release": True, "guidance_alpha": 2.0}]
    ),
)
def test_logits_are_the_plain_ones(
    config: Any, make: Any, way: str, padded: bool, rare: int, options: dict[str, Any]
) -> None:
    (generate, batch), layout = WAYS[way], make(config, 3)
    if way == "guesses" and not layout.num_given:
        layout = keyframe_layout(config, 3)
    texts = texts_of(layout, batch * (2 if "guidance_alpha" in options else 1), padded=padded)
    model = calm_model(config, torch.float64)
    plain_tokens, plain = decoded(generate, model, layout, texts, **options)
    model.recorder = recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_step, "RARE", rare)
        tokens, logits = decoded(generate, model, layout, texts, **options)
    assert torch.equal(tokens, plain_tokens) and recorder.generations == 1
    assert (logits - plain).abs().max() < 1e-10
    assert recorder.graphs > 0 or rare


@pytest.mark.parametrize("kind", ["full", "window", "local"])
def test_text_that_the_released_cache_loses(kind: str) -> None:
    """The release allots room for 74 text tokens: of a longer text a slot sees less, but always itself."""
    config = tiny_config(**kind_of(kind), image_position_offset=80, num_positions=100)
    layout, model = keyframe_layout(config, 78), wild_model(config)
    options = {"guidance_alpha": 2.0, "release": True}
    texts = [[30] * 78, [31] * 70]
    plain_tokens, plain = decoded(generate_tokens_in_waves, model, layout, texts, **options)
    model.recorder = recorder = Recorder()
    tokens, logits = decoded(generate_tokens_in_waves, model, layout, texts, **options)
    assert torch.equal(tokens, plain_tokens) and recorder.replays > 0
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-10 * float(plain.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_wide(dtype: torch.dtype) -> None:
    q, k, v = (
        (3 * torch.randn(2, 3, size, 16, generator=torch.Generator().manual_seed(size))).to(dtype)
        for size in (1, 9, 10)
    )
    v, bias = v[:, :, :9], torch.randn(2, 1, 1, 9, generator=torch.Generator().manual_seed(1))
    exact = attend(q.double(), k.double(), v.double(), bias=bias.double())
    error = (attend_wide(q, k, v, bias).double() - exact).norm() / exact.norm()
    assert error < (2e-3 if dtype == torch.float16 else 1e-2)
    on_meta = attend_wide(*(x.to("meta") for x in (q, k, v, bias)))  # as on a GPU
    assert on_meta.shape == q.shape and on_meta.dtype == dtype


# ---- which graphs


def test_graphs_of_a_generation() -> None:
    """Text and 5 frames of 16 slots in buckets of 8: the first frame is given, so keys 19 .. 82 follow."""
    layout, model = keyframe_layout(tiny_config(), 2), calm_model(tiny_config(), torch.float64)
    model.recorder = recorder = Recorder()
    decoded(generate_tokens, model, layout, texts_of(layout, 1, padded=False))
    buckets = {min(-(-keys // 8) * 8, 82) for keys in range(19, 83)}
    assert recorder.graphs == len(buckets) - 1  # 81 and 82 keys: two steps are not worth it
    assert recorder.replays == 64 - 2 * len(buckets)
    decoded(generate_tokens, model, layout, texts_of(layout, 2, padded=False))
    assert recorder.generations == 2 and recorder.graphs == 2 * (len(buckets) - 1)


def test_waves_share_graphs_by_their_size() -> None:
    config = tiny_config(grid=(8, 8), num_extra_positions=256, num_positions=80, temporal="window", window=4)
    layout, model = interpolation_layout(config, 1), calm_model(config, torch.float64)
    model.recorder = recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_step, "BUCKET", 256)
        decoded(generate_tokens_in_waves, model, layout, [[30]])
    # a slot of either frame, or of both, which lie behind one another in an even layer's window, or do not
    assert recorder.graphs == 4


def test_waves_are_filled_up() -> None:
    assert [padded_size(number) for number in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]


def test_rare_steps_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_step, "RARE", 1000)
    layout, model = keyframe_layout(tiny_config(), 2), calm_model(tiny_config(), torch.float64)
    model.recorder = recorder = Recorder()
    decoded(generate_tokens, model, layout, texts_of(layout, 1, padded=False))
    assert recorder.graphs == recorder.replays == 0


def test_a_recording_runs_the_step_once_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shape has run before."""
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(graphs, "capture_cuda", lambda run, **options: given.append(options))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    pool = graph_pool()
    for _ in range(2):
        pool(lambda: torch.zeros(1))
    assert given == [{"pool": "pool", "device": None, "warm_ups": 1}] * 2


def test_a_step_that_waits_is_found_out() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense in a graph"):
        Recorder().capture(lambda: torch.zeros(1) + float(torch.ones(1).sum()))


def test_caches_are_held_once() -> None:
    layout = keyframe_layout(config := tiny_config(num_heads=8, head_dim=16, num_frames=5), 3)
    model, text = wild_model(config).float(), torch.full((2, 3), 30)
    given_slots, tokens = torch.zeros(2, layout.frame_len, dtype=torch.long), torch.zeros(2, dtype=torch.long)

    def held() -> int:
        def run() -> None:
            state = model.start(text, given_slots, layout)
            state.quick = None
            for _ in range(4):
                model.step(tokens, state)

        return peak_bytes(run)

    plain, model.recorder = held(), Recorder()
    assert held() < 1.1 * plain


def test_a_pipelines_video_is_the_same(tmp_path: Path) -> None:
    pipeline = CogVideoPipeline(tiny_parts(tmp_path))
    models = (pipeline.parts.keyframes.double(), pipeline.parts.interpolation.double())
    plain, recorder = pipeline("a red circle", num_frames=9), Recorder()
    for model in models:
        model.recorder = recorder
    assert torch.equal(pipeline("a red circle", num_frames=9).frames, plain.frames)
    assert recorder.generations == 3 and recorder.replays > 0
    assert pipeline.settings()["compile"] == "graph"
    with pytest.raises(SettingError, match="needs a CUDA device"):
        pipeline.accelerate("graph")
    pipeline.accelerate("none")
    assert "compile" not in pipeline.settings() and models[0].recorder is None


@torch.inference_mode()
@pytest.mark.parametrize("wave", [((4, 399),), ((3, 150), (4, 0)), tuple((4, slot) for slot in range(7))])
@pytest.mark.parametrize("stage", ["keyframes", "interpolation"])
def test_shapes_of_the_released_model(stage: str, wave: tuple[tuple[int, int], ...]) -> None:
    """Two of its layers, in float16 and without memory, by the operators that a GPU would run."""
    config = replace(getattr(cogvideo(), stage), num_layers=2)
    with torch.device("meta"):
        model = CogVideoTransformer(config).half().eval()
        like = torch.empty(2, 0, config.hidden_size, dtype=torch.float16)
    make = keyframe_layout if stage == "keyframes" else interpolation_layout
    layout = make(config, 30)
    state = DecodeState(
        layout=layout,
        caches=[layer_cache(config, layout, layer, like) for layer in range(config.num_layers)],
        context=SlotAttention(layout, window=config.window, like=like),
        positions=like.new_empty(5 * config.frame_len, config.hidden_size),
        graph=GraphStep(model, Recorder().capture, num_given=layout.num_given),
    )
    state.context.num_lanes = 2
    state.caches = [with_lanes(cache, layout, 2) for cache in state.caches]
    tokens = torch.zeros(2, len(wave), dtype=torch.long, device="meta")
    assert model.feed(tokens, wave, state).shape == (2, len(wave), config.num_image_tokens)


# ---- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["full", "window", "local"])
@pytest.mark.parametrize("way", WAYS)
def test_graphs_on_a_gpu(kind: str, way: str) -> None:
    generate, batch = WAYS[way]
    config = tiny_config(**kind_of(kind))
    layout, model = keyframe_layout(config, 3), calm_model(config, torch.float64).cuda()
    frames = torch.zeros(batch, 1, layout.frame_len, dtype=torch.long, device="cuda")
    texts = texts_of(layout, 2 * batch, padded=True)
    seen: list[list[Tensor]] = []

    def tokens() -> Tensor:
        def sample(logits: Tensor, number: int) -> Tensor:
            seen[-1].append(logits)
            return logits.argmax(1)

        seen.append([])
        return generate(model, layout, texts, frames, sample, guidance_alpha=2.0)

    plain, model.recorder = tokens(), graph_pool
    for _ in range(2):  # every generation has graphs of its own
        assert torch.equal(tokens(), plain)
        torch.testing.assert_close(torch.stack(seen[-1]), torch.stack(seen[0]), rtol=0, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_graphs_of_a_gpu_round_no_more_than_the_plain_blocks(dtype: torch.dtype) -> None:
    config = tiny_config(num_heads=4, head_dim=16)
    layout, model = keyframe_layout(config, 3), calm_model(config, dtype).cuda()
    text, fed = torch.full((2, 3), 30).cuda(), torch.arange(64).cuda() % NUM_IMAGE_TOKENS

    def logits() -> Tensor:
        state = model.start(text, torch.zeros(2, layout.frame_len, dtype=torch.long).cuda(), layout)
        return torch.stack([model.step(token.expand(2), state) for token in fed]).double()

    plain, model.recorder = logits(), graph_pool
    graphed, model.recorder = logits(), None
    model.double()
    exact = logits()
    assert (graphed - exact).norm() <= 1.3 * (plain - exact).norm()


# ---- refusals


@pytest.mark.parametrize(
    ("chosen", "device", "offload", "words"),
    [
        ("graph", "cpu", "none", "compile graph needs a CUDA device, got cpu; legal here: none"),
        ("blocks", "cuda", "none", "unknown compile 'blocks'; legal: none, graph"),
        ("graph", "cuda", "sequential", "needs weights that stay; got offload sequential, nearest: model"),
    ],
)
def test_refusals(chosen: str, device: str, offload: str, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        check_compile(chosen, torch.device(device), offload=offload)
    check_compile("none", torch.device(device), offload=offload)
    check_compile("graph", torch.device("cuda"), offload="model")


def test_the_command_refuses_it_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--prompt", "a red circle moving left", "--device", "cpu", "--compile", "graph"]
    assert main(words) != 0
    assert "compile graph needs a CUDA device, got cpu" in capsys.readouterr().err
