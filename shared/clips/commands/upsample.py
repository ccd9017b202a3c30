"""The verb `upsample`: prompts as long and detailed as the captions that generators were trained on."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.captioning.choosing import WORDS, Adapters, add_adapter_flags, retry_settings
from shared.verbs import add_output_flags, say

if TYPE_CHECKING:
    from shared.captioning.upsampling import Upsampled

CACHE_SUFFIX = ".cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", help="one prompt")
    given.add_argument("--prompt_file", type=Path, help="a prompt a line; without empty ones and # lines")
    parser.add_argument("--image_path", type=Path,
                        help="the first frame, for image-to-video; a folder: one a prompt, by name")
    parser.add_argument("--output_path", type=Path,
                        help="the file of prompts to write, line by line (default: standard output)")
    parser.add_argument("--adapter", required=True, help=WORDS)
    parser.add_argument("--cache_path", type=Path,
                        help=f"the folder of finished answers (default: OUTPUT_PATH{CACHE_SUFFIX})")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    # fmt: on
    add_adapter_flags(parser, attempts=3, max_tokens=250)
    parser.set_defaults(temperature=0.01, top_p=0.7)  # those of inference/convert_demo.py, THUDM/CogVideo
    add_output_flags(parser)


def run(options: argparse.Namespace) -> None:
    """A prompt that has no longer one is kept, with a warning: exit code 0."""
    from shared.captioning.upsampling import UpsamplingWarning
    from shared.errors import OutputPathError

    target: Path | None = options.output_path
    if target is not None and target.exists() and not options.overwrite:
        raise OutputPathError(f"{target} already exists; choose another name or pass --overwrite")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if options.json else "always", UpsamplingWarning)
        results = _results(options)
    if target is not None:
        from shared.files import atomic_path

        with atomic_path(target) as temporary:
            temporary.write_text("".join(f"{result.text}\n" for result in results), encoding="utf-8")
    _say(options, results)


def _results(options: argparse.Namespace) -> list[Upsampled]:
    from tqdm import tqdm

    from shared.captioning.cache import CaptionCache
    from shared.captioning.retrying import RetrySettings, Stop
    from shared.captioning.upsampling import upsample
    from shared.generation_cli import read_prompts

    prompts = read_prompts(options)
    images = _images(options.image_path, len(prompts))
    stop = Stop()
    # The tries are counted here, where an answer that is too short is one as well.
    writer = Adapters(options, stop, RetrySettings(attempts=1))(options.adapter)
    where = options.cache_path or (options.output_path and Path(f"{options.output_path}{CACHE_SUFFIX}"))
    cache = CaptionCache(where) if where else None
    silent = options.quiet or options.json or len(prompts) == 1
    return [
        upsample(prompt, writer, image=image, cache=cache, tries=retry_settings(options), sleep=stop.sleep)
        for prompt, image in tqdm(
            zip(prompts, images, strict=True), total=len(prompts), disable=silent, unit="prompt"
        )
    ]


def _images(path: Path | None, count: int) -> list[Any]:
    """One picture for every prompt; None for each where there are none."""
    from shared.clips.dataset import IMAGE_SUFFIXES
    from shared.errors import SettingError
    from shared.video_io import read_image

    if path is None or not path.is_dir():
        return [None if path is None else read_image(path)] * count
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if len(files) != count:
        raise SettingError(f"{path} holds {len(files)} images for {count} prompts")
    return [read_image(file) for file in files]


def _say(options: argparse.Namespace, results: list[Upsampled]) -> None:
    kept = [result for result in results if result.failure]
    content = {
        "ok": True,
        "exit_code": 0,
        "prompts": [vars(result) for result in results],
        "num_kept_as_given": len(kept),
        **({"output_path": str(options.output_path)} if options.output_path else {}),
    }
    lines = [result.text for result in results]
    if options.output_path:
        lines = [f"{len(results) - len(kept)} of {len(results)} prompts longer in {options.output_path}"]
    say(options, content, lines)
