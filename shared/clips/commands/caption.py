"""The verb `caption`: long captions for clips, and examples to train a captioner on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.captioning.choosing import WORDS, Adapters, add_adapter_flags
from shared.captioning.instructions import END_TO_END
from shared.verbs import add_output_flags, say

if TYPE_CHECKING:
    from shared.captioning.cache import CaptionCache
    from shared.captioning.pipeline import Describer, Outcome
    from shared.captioning.retrying import Stop

GIVEN = "given"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # fmt: off
    parser.add_argument("--input_path", type=Path, required=True,
                        help="a folder of clips, its metadata.jsonl or videos.txt, or a video file")
    parser.add_argument("--output_path", type=Path, required=True,
                        help="the folder for metadata.jsonl and the examples; a run that was stopped goes on")
    parser.add_argument("--adapter", required=True, help=f"for every stage: {WORDS}")
    parser.add_argument("--short", help=f"another for short captions; {GIVEN}: those of the list")
    parser.add_argument("--dense", help="another for captions of frames")
    parser.add_argument("--summarise", help="another for summaries; text alone, so a language model will do")
    parser.add_argument("--end_to_end", action="store_true",
                        help="the adapter sees the whole clip at once, instead of in stages")
    parser.add_argument("--prompt", default=END_TO_END, help="what an end-to-end captioner is asked")
    parser.add_argument("--every", type=float, default=2.0, metavar="S",
                        help="seconds between the frames described (default: %(default)g)")
    parser.add_argument("--max_seconds", type=float, default=60.0, metavar="S",
                        help="of a clip, from its start, that are looked at (default: %(default)g)")
    parser.add_argument("--num_workers", type=int, default=1, help="clips at a time (default: 1)")
    parser.add_argument("--max_failures", type=int, default=10,
                        help="clips in a row without an answer that end the run (default: %(default)s)")
    parser.add_argument("--cache_path", type=Path,
                        help="the folder of finished answers (default: cache in the output folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace a metadata.jsonl that is not ours")
    # fmt: on
    add_adapter_flags(parser, attempts=5, max_tokens=1024)
    add_output_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Exit code 7 where some clips have no caption; the others are written."""
    from shared.captioning.cache import CaptionCache
    from shared.captioning.outputs import CACHE, REPORT, check_folder, find_clips, write_outputs
    from shared.captioning.retrying import Stop
    from shared.errors import BatchError

    clips = find_clips(options.input_path)
    folder: Path = options.output_path
    check_folder(folder, options.input_path, overwrite=options.overwrite)
    stop = Stop()
    cache = CaptionCache(options.cache_path or folder / CACHE)
    outcomes = _outcomes(clips, _describer(options, cache, stop), stop, options)
    failed = [outcome for outcome in outcomes if outcome.error]
    code = BatchError.exit_code if failed else 0
    content = {
        "ok": not failed,
        "exit_code": code,
        "num_clips": len(clips),
        "num_captioned": len(clips) - len(failed),
        "num_asked": cache.num_asked,
        "num_kept": cache.num_kept,
        "settings": _settings(options),
    }
    write_outputs(outcomes, folder, content, end_to_end_prompt=options.prompt)
    say(options, content | {"report": str(folder / REPORT)}, _lines(content, failed, folder))
    return code


def _outcomes(clips: Sequence[Any], describer: Describer, stop: Stop, options: argparse.Namespace
) -> list[Outcome]:  # fmt: skip
    from tqdm import tqdm

    from shared.captioning.pipeline import caption_all

    made = caption_all(
        clips, describer, stop=stop, num_workers=options.num_workers, max_failures=options.max_failures
    )
    silent = options.quiet or options.json
    return list(tqdm(made, total=len(clips), disable=silent, unit="clip"))


def _describer(options: argparse.Namespace, cache: CaptionCache, stop: Stop) -> Describer:
    from shared.captioning.pipeline import ClipSettings, DensePipeline, EndToEnd
    from shared.errors import SettingError

    adapters = Adapters(options, stop)
    settings = ClipSettings(every=options.every, max_seconds=options.max_seconds)
    if options.end_to_end:
        if stages := [name for name in ("short", "dense", "summarise") if getattr(options, name)]:
            raise SettingError(f"--end_to_end has no stages, got --{stages[0]}")
        captioner = adapters(options.adapter)
        return EndToEnd(captioner=captioner, cache=cache, prompt=options.prompt, settings=settings)
    return DensePipeline(
        short=None if options.short == GIVEN else adapters(options.short or options.adapter),
        dense=adapters(options.dense or options.adapter),
        summariser=adapters(options.summarise or options.adapter),
        cache=cache,
        settings=settings,
    )


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was asked for; of the key only where it was to be found."""
    left_out = ("command", "verb", "json", "quiet", "overwrite")
    given = {name: value for name, value in vars(options).items() if name not in left_out}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def _lines(content: dict[str, Any], failed: Sequence[Outcome], folder: Path) -> list[str]:
    from shared.captioning.outputs import FAILURES, METADATA

    asked = f"{content['num_asked']} answers new, {content['num_kept']} kept from before"
    lines = [f"{content['num_captioned']} of {content['num_clips']} clips in {folder / METADATA}; {asked}"]
    lines += [f"{outcome.clip.name}: {outcome.error}" for outcome in failed[:3]]
    return [*lines, *([f"all {len(failed)} failures: {folder / FAILURES}"] if failed else [])]
