"""Text of all scripts, control characters, halves of characters and great length, to whoever reads text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, strategies

from cogvideo_ar.translation import is_chinese, read_translation
from shared.clips import shapes
from shared.config_cli import override
from shared.tokenizers.icetk import IceTokenizer
from shared.tokenizers.t5 import T5Tokenizer
from tests.fuzz.harness import Tally, effort
from tests.fuzz.world import World, programs, tiny_config

CHARACTERS = strategies.characters()  # also surrogates and controls
ODD = ["Cc", "Cf", "Cs", "Co", "Mn", "Zl", "Zp"]  # categories of Unicode
PIECES = ("<n>", "</s>", "<pad>", "<image_7>", "<unk>", "a", "\n", "▁", "秒")
TEXT = strategies.one_of(
    strategies.text(CHARACTERS, max_size=60),
    strategies.text(strategies.characters(categories=ODD), max_size=40),
    strategies.text(CHARACTERS, min_size=1, max_size=5).flatmap(
        lambda text: strategies.sampled_from([text * 20, text * 1000, (text * 100_000)[:100_000]])
    ),
    strategies.lists(strategies.sampled_from(PIECES)).map("".join),
)  # fmt: skip


@pytest.fixture(scope="module")
def icetk(world: World) -> IceTokenizer:
    return IceTokenizer(world / "ar/ice_text.model", num_image_tokens=32)


@pytest.fixture(scope="module")
def t5(world: World) -> T5Tokenizer:
    return T5Tokenizer(world / "diff/tokenizer", text_len=16)


@effort(60)
@given(text=TEXT)
def test_icetk(text: str, icetk: IceTokenizer, tally: Tally) -> None:
    def work() -> None:
        ids = icetk.encode(text, ignore_linebreak=False)
        assert all(32 <= i < icetk.num_tokens for i in ids)
        icetk.decode(ids)
        icetk.tokenize(text)

    tally.read("text to icetk", repr(text[:200]), work)


@effort(40)
@given(text=TEXT)
def test_t5(text: str, t5: T5Tokenizer, tally: Tally) -> None:
    def work() -> None:
        made = t5([text])
        assert made.ids.shape == (1, 16) and int(made.ids.max()) < t5.num_tokens
        assert (made.lengths[0] > 16) == bool(made.truncated[0]) or not made.truncated[0].strip()

    tally.read("text to T5", repr(text[:200]), work)


@effort(40)
@given(text=TEXT)
def test_other_readers_of_text(text: str, tally: Tally) -> None:
    config = tiny_config()
    for target, work in {
        "text to the script finder": lambda: is_chinese(text),
        "text to the parser of prompts": lambda: shapes.parse(text),
        "text as an override": lambda: override(config, text),
        "text as a value": lambda: override(config, f"sampling.num_inference_steps={text}"),
    }.items():
        tally.read(target, repr(text[:200]), work)


@effort(12)
@given(text=TEXT, seed=strategies.integers(0, 2**32))
def test_files_of_text(
    text: str, seed: int, world: World, tally: Tally, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    file: Path = world.scratch.parent / "text.tsv"
    data = text.encode("utf-8", rng.choice(("replace", "surrogatepass"))) + rng.choice(
        (b"", b"\n", b"\xff", b"\ta\n")
    )
    file.write_bytes(data)
    tally.read("a table of translations", repr(data[:200]), lambda: read_translation(file))
    for name, model in (("cogvideo-ar", "ar"), ("cogvideox", "diff")):
        argv = [
            "generate",
            "--model_path",
            str(world / model),
            "--dry_run",
            "--quiet",
            "--prompt_file",
            str(file),
        ]
        tally.command("a file of prompts", programs()[name], argv, world.scratch)


@effort(4)
@given(text=TEXT)
def test_a_prompt_makes_a_video_or_a_reason(text: str, world: World, tally: Tally) -> None:
    """The whole way, sidecar included."""
    prompt = text.replace("\0", "")[:90_000]
    for name, model in (("cogvideo-ar", "ar"), ("cogvideox", "diff")):
        argv = [
            "generate",
            "--model_path",
            str(world / model),
            f"--prompt={prompt}",
            "--output_path",
            "o",
            "--num_frames",
            "9",
        ]
        tally.command("a prompt", programs()[name], [*argv, "--quiet"], world.scratch)
