"""A user's few words made as long as training captions are."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass

from torch import Tensor

from shared.captioning.cache import CaptionCache
from shared.captioning.errors import CaptionError, RefusedError, StoppedError, TransientError
from shared.captioning.instructions import one_line
from shared.captioning.protocols import PromptWriter
from shared.captioning.retrying import RetrySettings, Sleep, with_retries

TRIES = RetrySettings(attempts=3)
QUOTES = {'"': '"', "'": "'", "“": "”", "«": "»", "「": "」"}


class UpsamplingWarning(UserWarning):
    """A prompt is used as it was given, since no longer one could be had."""


@dataclass(frozen=True, kw_only=True)
class Upsampled:
    """`text` is `prompt` itself where `failure` says why there is no longer one."""

    prompt: str
    text: str
    failure: str | None = None


def upsample(
    prompt: str,
    writer: PromptWriter,
    *,
    image: Tensor | None = None,
    cache: CaptionCache | None = None,
    tries: RetrySettings = TRIES,
    sleep: Sleep,
) -> Upsampled:
    """One line that says more than `prompt`, for an `image` (uint8 [H, W, 3]) how it goes on. After three
    tries, or an error that trying again does not mend, the prompt itself, with an UpsamplingWarning. Only
    what is wrong with every prompt (a refused key, a run that is stopped) is raised. The tries are those of
    inference/convert_demo.py of THUDM/CogVideo; a writer that retries by itself multiplies them."""

    def ask() -> str:
        return with_retries(lambda: _longer(prompt, writer.upsample(prompt, image)), tries, sleep)

    try:
        if cache is None:
            text = ask()
        else:
            content = _content(prompt, image)
            with cache.alone(content):
                text = cache.answer(content, "upsample", writer.recipe("upsample"), {"prompt": prompt}, ask)
    except (RefusedError, StoppedError):
        raise
    except CaptionError as error:
        warnings.warn(f"{prompt!r} is kept as it is: {error}", UpsamplingWarning, stacklevel=2)
        return Upsampled(prompt=prompt, text=prompt, failure=str(error))
    return Upsampled(prompt=prompt, text=text)


def _longer(prompt: str, answer: str) -> str:
    """The answer without quotation marks around it and line breaks; TransientError where it says less than
    the prompt."""
    text = one_line(answer)
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    if len(text) < len(one_line(prompt)):
        raise TransientError(f"the answer is shorter than the prompt: {text!r}")
    return text


def _content(prompt: str, image: Tensor | None) -> str:
    digest = hashlib.sha256(prompt.encode())
    if image is not None:
        digest.update(f"\0{list(image.shape)}\0".encode())
        digest.update(image.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
