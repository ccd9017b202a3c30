"""Adapters by the words of a command line: shapes, openai:MODEL, transformers:FOLDER."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared.captioning.retrying import RateLimit, RetrySettings, Stop
from shared.config_cli import nearest
from shared.errors import SettingError

KINDS = ("shapes", "openai", "transformers")
WORDS = "shapes (the demo world's oracle), openai:MODEL or transformers:FOLDER"


def add_adapter_flags(parser: argparse.ArgumentParser, *, attempts: int, max_tokens: int) -> None:
    """What every adapter of a run shares."""
    # fmt: off
    service = parser.add_argument_group("openai:MODEL")
    service.add_argument("--base_url", help="as in http://localhost:8000/v1; /chat/completions is appended")
    service.add_argument("--api_key_env", metavar="NAME",
                         help="the environment variable that holds the key (default: OPENAI_API_KEY if set)")
    service.add_argument("--api_key_file", type=Path, help="a file that holds the key instead")
    service.add_argument("--timeout", type=float, default=120.0, metavar="S", help="default: %(default)g")
    service.add_argument("--max_attempts", type=int, default=attempts, help="default: %(default)s")
    service.add_argument("--first_wait", type=float, default=1.0, metavar="S",
                         help="before the second attempt; then doubled (default: %(default)g)")
    service.add_argument("--requests_per_minute", type=float, metavar="N", help="at most, over all threads")
    service.add_argument("--temperature", type=float, default=0.0, help="default: %(default)g")
    service.add_argument("--top_p", type=float, help="default: the service's")
    service.add_argument("--token_field", choices=("max_tokens", "max_completion_tokens"),
                         default="max_tokens", help="how the service calls the limit (default: max_tokens)")
    service.add_argument("--image_edge", type=int, default=768, metavar="PX",
                         help="larger pictures are sent smaller (default: %(default)s)")
    local = parser.add_argument_group("transformers:FOLDER")
    local.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    local.add_argument("--dtype", default="float32", help="default: float32")
    parser.add_argument("--max_tokens", type=int, default=max_tokens, metavar="N",
                        help="of an answer; an unfinished last sentence is dropped (default: %(default)s)")
    # fmt: on


class Adapters:
    """One adapter for each different word: all share the pace, and a folder is loaded once."""

    def __init__(self, options: argparse.Namespace, stop: Stop, retry: RetrySettings | None = None) -> None:
        self._options, self._stop = options, stop
        self._retry = retry or retry_settings(options)
        self._rate = RateLimit(options.requests_per_minute, stop.sleep)
        self._made: dict[str, Any] = {}

    def __call__(self, words: str) -> Any:
        """SettingError for words that name no adapter."""
        if words not in self._made:
            kind, _, rest = words.partition(":")
            makers: dict[str, Callable[[str], Any]] = {
                "shapes": _shapes, "openai": self._openai, "transformers": self._transformers
            }  # fmt: skip
            if kind not in makers or bool(rest) == (kind == "shapes"):
                raise SettingError(f"unknown adapter {words!r}{nearest(kind, KINDS)}; legal: {WORDS}")
            self._made[words] = makers[kind](rest)
        return self._made[words]

    def _openai(self, model: str) -> Any:
        import os

        from shared.captioning.chat import ChatCaptioner
        from shared.captioning.openai_adapter import ChatEndpoint, EndpointSettings, read_key

        options = self._options
        if not options.base_url:
            raise SettingError(f"openai:{model} needs --base_url, as in http://localhost:8000/v1")
        usual = "OPENAI_API_KEY" if "OPENAI_API_KEY" in os.environ else None
        settings = EndpointSettings(
            base_url=options.base_url,
            model=model,
            timeout=options.timeout,
            temperature=options.temperature,
            top_p=options.top_p,
            max_tokens=options.max_tokens,
            token_field=options.token_field,
            image_edge=options.image_edge,
        )
        key = read_key(options.api_key_env or usual, options.api_key_file)
        return ChatCaptioner(
            ChatEndpoint(settings, key=key, rate=self._rate, sleep=self._stop.sleep, retry=self._retry)
        )

    def _transformers(self, folder: str) -> Any:
        from shared.captioning.chat import ChatCaptioner
        from shared.captioning.transformers_adapter import LocalChatModel
        from shared.runtime import parse_device, parse_dtype

        options = self._options
        model = LocalChatModel(
            folder,
            device=parse_device(options.device),
            dtype=parse_dtype(options.dtype),
            max_new_tokens=options.max_tokens,
        )
        return ChatCaptioner(model)


def _shapes(_: str) -> Any:
    from shared.captioning.shapes_adapter import ShapesCaptioner

    return ShapesCaptioner()


def retry_settings(options: argparse.Namespace) -> RetrySettings:
    return RetrySettings(attempts=options.max_attempts, first_wait=options.first_wait)
