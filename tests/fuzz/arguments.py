"""Command lines with illegal, odd and huge arguments, made from what the parsers declare."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from shared.verbs import Program
from tests.fuzz.world import PROMPT, World

_INTEGERS = """-1 0 1 2 3 7 8 9 10 17 31 64 1000 99999 2147483648 -2147483649 9223372036854775807 1e3 0x10
9223372036854775808 -9223372036854775809 1_0 １２ ٣ nan None true 1.0 -- - +5"""
INTEGERS = (*_INTEGERS.split(), "1" + "0" * 40, "1" * 5000, "", " ", " 5 ")
_FLOATS = """-1 0 -0.0 0.5 1 1e-320 1e308 -1e308 1e400 nan -nan inf -inf Infinity 1,5 0x1p3 1_0.5 none 8 1e-9
٣٫٥ 7.999"""
FLOATS = (*_FLOATS.split(), "")
_TEXTS = """a demo auto none cpu cuda cuda:99 cuda:-1 mps float16 bf16 tpu ours diffusers sat own ddim dpm
wave direct crop shapes openai: openai:x transformers: transformers:nowhere x:y:z 16,8,64,64
1,1,1 nan,nan,1,1 1e9,1e9,1,1 inf,1,1,1 all vae tokenizer export seed=1 = a= =b a=b=c a.b.c=1
num_frames=5 .. i3d=x num_inference_steps=0 guidance_scale=nan max_batch=0 first_frame.top_k=-1
top_k=1e9 dynamic_cfg=x transformer.steps=0 transformer.lr=inf vqvae.lr=-1 vocab_size=1
num_clips=0 config=1 clip_batch=0 9x64x64 0x0x0 9x64 axbxc 99999999999x64x64 -9x64x64 to_q
attn.* ( static short %s%d{} -h -- Ω≈ç√ 中文"""
_MORE = ("", " ", "\t", "\udc80\udcff", "\x1b[31mred", "\r\n", "a\nb", "\u202eabc", "🙂" * 60, "x" * 70_000)
TEXTS = (*_TEXTS.split(), *_MORE)
_PATHS = """. .. missing missing/a.mp4 a.mp4 a.gif a.txt new/folder ~ - a.json a.npy b.safetensors c.jsonl
/dev/full /proc/self/mem /dev/null/x"""
ODD_PATHS = (*_PATHS.split(), "", "x" * 300, "x" * 300 + ".mp4", "\udcff.mp4", "a\nb.json")
RANGES = ((1, 0x250), (1, 0x3000), (0xDC80, 0xDCFF))  # of characters, of bytes that are no text
FLAGS = tuple("--nope --num-frame --Prompt -x --= -- --- --prompt= --help=1 @file extra --json".split())


def plain_arguments(world: World) -> dict[tuple[str, str], list[str]]:
    """A legal, quick call of every verb."""
    w = lambda name: str(world / name)  # noqa: E731
    ar, diff = ["--model_path", w("ar")], ["--model_path", w("diff")]
    making = ["--prompt", PROMPT, "--dry_run", "--quiet"]
    data, bench, x = "cogvideo-data", "cogvideo-bench", "cogvideox"
    clips = ["--input_path", w("clips")]
    return {
        ("cogvideo-ar", "generate"): [*ar, *making],
        ("cogvideo-ar", "plan"): [*ar],
        ("cogvideo-ar", "doctor"): [w("ar")],
        ("cogvideo-ar", "precompute"): [*ar, *clips, "--output_path", "o", "--quiet"],
        ("cogvideo-ar", "train"): ["--stage", "export", "--output_path", "o", "--quiet"],
        ("cogvideo-ar", "finetune"): [
            *ar,
            "--data",
            w("clips"),
            "--output_path",
            "o",
            "--dry_run",
            "--quiet",
        ],
        ("cogvideo-ar", "convert"): [*ar, "--output_path", "o", "--quiet"],
        ("cogvideo-ar", "clusters"): [*ar, "--output_path", "c.npy", "--num_clusters", "4", "--quiet"],
        (x, "generate"): [*diff, *making],
        (x, "plan"): [*diff],
        (x, "doctor"): [w("diff")],
        (x, "extend"): [*diff, *making],
        (x, "invert"): [*diff, "--input_path", w("film.mkv"), "--output_path", "n.safetensors", "--quiet"],
        (x, "encode"): [*diff, "--input_path", w("film.mkv"), "--output_path", "l.safetensors", "--quiet"],
        (x, "decode"): [*diff, "--input_path", w("latents.safetensors"), "--output_path", "d.mp4", "--quiet"],
        (x, "precompute"): [*diff, *clips, "--output_path", "o", "--sizes", "9x64x64", "--quiet"],
        (x, "train"): ["--stage", "export", "--output_path", "o", "--quiet"],
        (x, "finetune"): [*diff, "--data", w("clips"), "--output_path", "o", "--dry_run", "--quiet"],
        (x, "convert"): [*diff, "--output_path", "o", "--to", "diffusers", "--dry_run", "--quiet"],
        (x, "lora"): ["inspect", w("lora.safetensors"), "--model_path", w("diff")],
        (bench, "run"): [w("suite.json"), "--dry_run", "--quiet"],
        (bench, "report"): [w("empty_folder")],
        (bench, "compare"): [w("run"), w("run")],
        (bench, "peers"): ["--only", "nothing"],
        (bench, "import_videos"): [w("empty_folder"), "--quiet"],
        (bench, "vbench"): ["export", w("run"), "--model", "good", "--output_path", "v"],
        (bench, "study"): ["make", w("run"), "--output_path", "s"],
        (bench, "list"): [],
        (data, "caption"): [
            *clips,
            "--output_path",
            "o",
            "--adapter",
            "shapes",
            "--first_wait",
            "0.01",
            "--quiet",
        ],
        (data, "check"): [*clips, "--scores", w("clips/scores.jsonl"), "--report", "r.json", "--quiet"],
        (data, "filter"): [*clips, "--output_path", "m.jsonl", "--quiet"],
        (data, "shapes"): ["--output_path", "o", "--num_videos", "1", "--num_frames", "2", "--quiet"],
        (data, "upsample"): ["--prompt", PROMPT, "--adapter", "shapes", "--first_wait", "0.01"],
    }


def flags_of(program: Program, verb: str, words: list[str]) -> list[argparse.Action]:
    """What the verb takes, positional arguments too; of a verb with ways the one in `words`."""
    parser = _choices(program.parser(verb))[verb]
    if ways := _choices(parser):
        parser = ways[words[0]]
    return [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]


def _choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(found[0].choices) if found else {}


def spoilt(words: list[str], flags: list[argparse.Action], rng: random.Random, paths: list[str]) -> list[str]:
    """`words` after one to three changes."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.72 and flags:
            words += _given(rng.choice(flags), rng, paths)
        elif kind < 0.82 and words:
            words[rng.randrange(len(words))] = _value(None, rng, paths)
        elif kind < 0.88 and words:
            del words[rng.randrange(len(words))]
        elif kind < 0.94:
            words.insert(rng.randrange(len(words) + 1), rng.choice(FLAGS))
        else:
            words.append(_value(None, rng, paths))
    return [word.replace("\0", "") for word in words]  # no system passes that on


def _given(flag: argparse.Action, rng: random.Random, paths: list[str]) -> list[str]:
    values = 1 if flag.nargs is None else 0 if flag.nargs == 0 else rng.choice((0, 1, 1, 2, 3))
    if rng.random() < 0.04:
        values = 1 - min(values, 1)
    words = [_value(flag, rng, paths) for _ in range(values)]
    if not flag.option_strings:
        return words
    name = rng.choice(flag.option_strings)
    if rng.random() < 0.2:
        name = name[:2] + name[2:].replace("_", "-")
    return [f"{name}={words[0]}", *words[1:]] if words and rng.random() < 0.3 else [name, *words]


def _value(flag: argparse.Action | None, rng: random.Random, paths: list[str]) -> str:
    kinds = {int: INTEGERS, float: FLOATS, Path: paths}
    pool = TEXTS if flag is None else kinds.get(flag.type, TEXTS)  # type: ignore[arg-type]
    if flag is not None and flag.choices and rng.random() < 0.6:
        return str(rng.choice(list(flag.choices)))
    if rng.random() < 0.15:
        pool = rng.choice((INTEGERS, FLOATS, TEXTS, paths))
    if rng.random() < 0.08:
        return "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randrange(12)))
    return rng.choice(pool)
