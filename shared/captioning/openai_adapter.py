"""A model behind any HTTP service that speaks the OpenAI chat API: hosted, vLLM, llama.cpp, Ollama, ..."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from PIL import Image
from torch import Tensor

from shared.captioning.errors import CaptionError, RefusedError, TransientError
from shared.captioning.instructions import Message, whole_sentences
from shared.captioning.protocols import Recipe
from shared.captioning.retrying import RateLimit, RetrySettings, Sleep, with_retries
from shared.errors import SettingError

REFUSALS = {401, 403, 404, 405}  # of the key, the address or the model: the same for every question
TRANSIENT = {408, 409, 425, 429}  # and all from 500 on
NO_CREDIT = "insufficient_quota"  # comes as 429, but waiting does not help
MAX_ANSWER = 16 << 20  # bytes
MAX_SAID = 300  # characters of a service's message that are passed on
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """`timeout` seconds bound the connection, each silence, and the whole answer. None for a sampling setting
    leaves it to the service. Pictures are sent as JPEG, made smaller to `image_edge` pixels."""

    base_url: str
    model: str
    timeout: float = 120.0
    temperature: float | None = 0.0
    top_p: float | None = None
    max_tokens: int = 1024
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    image_edge: int = 768
    jpeg_quality: int = 90

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise SettingError(
                f"base_url must read like http://localhost:8000/v1, got {_without_user(self.base_url)!r}"
            )
        if parts.username or parts.password:
            raise SettingError("base_url must not hold a user or password; name the key's variable or file")
        if not self.model.strip():
            raise SettingError("the endpoint needs the model's name")
        for name in ("timeout", "max_tokens", "image_edge"):
            if not getattr(self, name) > 0:
                raise SettingError(f"{name} must be more than 0, got {getattr(self, name)}")

    @property
    def address(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"


def read_key(variable: str | None, file: Path | None) -> str | None:
    """The key from a file, else from an environment variable; None where neither is named. SettingError where
    it is not there or cannot be a key; no message holds it."""
    if file is None and variable is None:
        return None
    try:
        key = (file.read_text(encoding="utf-8") if file else os.environ[variable or ""]).strip()
    except (OSError, UnicodeDecodeError, KeyError) as error:
        where = file or f"the variable {variable}"
        raise SettingError(f"no API key in {where}: {type(error).__name__}") from None
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise SettingError(f"what {file or variable} holds is no API key: one line of ASCII without spaces")
    return key


class ChatEndpoint:
    """A `ChatModel`. Threads may share it.

    Asked again after: a timeout, a lost connection, status 408, 409, 425, 429 or 5xx (not before the time in
    Retry-After; at 429 and 503 that holds for all threads), an answer that is cut off or is not such an
    object, and one without text. RefusedError for a wrong key, address or model; CaptionError for the rest.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        *,
        key: str | None,
        rate: RateLimit,
        sleep: Sleep,
        retry: RetrySettings | None = None,
    ) -> None:
        self.settings = settings
        self._key = key
        self._rate, self._sleep, self._retry = rate, sleep, retry or RetrySettings()
        local = urlsplit(settings.base_url).hostname in LOOPBACK
        proxies = [urllib.request.ProxyHandler({})] if local else []
        self._opener = urllib.request.build_opener(_NoRedirect, *proxies)

    @property
    def recipe(self) -> Recipe:
        """All but how long is waited, and the key."""
        known = asdict(self.settings)
        del known["timeout"], known["token_field"]
        return {"adapter": "openai", **known}

    def answer(self, messages: Sequence[Message]) -> str:
        body = json.dumps(self._body(messages)).encode()
        return with_retries(lambda: self._ask(body), self._retry, self._sleep)

    def _body(self, messages: Sequence[Message]) -> dict[str, Any]:
        own = self.settings
        sampling = {"temperature": own.temperature, "top_p": own.top_p, own.token_field: own.max_tokens}
        chosen = {name: value for name, value in sampling.items() if value is not None}
        return {"model": own.model, "messages": [self._turn(message) for message in messages], **chosen}

    def _turn(self, message: Message) -> dict[str, Any]:
        if not message.images:
            return {"role": message.role, "content": message.text}
        pictures = [
            {"type": "image_url", "image_url": {"url": data_url(image, self.settings)}}
            for image in message.images
        ]
        return {"role": message.role, "content": [*pictures, {"type": "text", "text": message.text}]}

    def _ask(self, body: bytes) -> str:
        self._rate.wait()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.settings.address, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.settings.timeout) as response:
                return _text_of(self._read(response))
        except urllib.error.HTTPError as error:
            raise self._of_status(error) from None
        except (OSError, http.client.HTTPException) as error:
            raise self._of_connection(error) from None

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        """The body, within the time and as long as it says it is."""
        parts, size, start = [], 0, time.monotonic()
        while block := response.read1(1 << 16):
            parts.append(block)
            size += len(block)
            if time.monotonic() - start > self.settings.timeout:
                raise TransientError(f"the answer took longer than {self.settings.timeout:g} s")
            if size > MAX_ANSWER:
                raise CaptionError(f"the answer is longer than {MAX_ANSWER >> 20} MiB")
        declared = response.headers.get("Content-Length", "")
        if declared.isdecimal() and size < int(declared):
            raise TransientError(f"the answer was cut off after {size} of {declared} bytes")
        return b"".join(parts)

    def _of_status(self, error: urllib.error.HTTPError) -> CaptionError:
        try:
            content = json.loads(error.read(1 << 16) or b"null")
        except (ValueError, OSError, http.client.HTTPException):
            content = None
        about = content.get("error", content) if isinstance(content, dict) else None
        about = about if isinstance(about, dict) else {"message": about}
        said = self._masked(str(about.get("message") or error.reason or ""))
        text = f"{self.settings.address} answered {error.code}: {said}"
        if error.code in REFUSALS or about.get("code") == NO_CREDIT or about.get("type") == NO_CREDIT:
            return RefusedError(text)
        if error.code not in TRANSIENT and error.code < 500:
            return CaptionError(text)
        wait = retry_after(dict(error.headers), time.time())
        if wait and error.code in (429, 503) and wait <= self._retry.longest_wait:
            self._rate.hold(wait)
        return TransientError(text, wait)

    def _of_connection(self, error: OSError | http.client.HTTPException) -> CaptionError:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, ssl.SSLCertVerificationError):
            return RefusedError(f"{self.settings.address}: {reason.verify_message}")
        if isinstance(reason, TimeoutError):
            return TransientError(f"no answer from {self.settings.address} in {self.settings.timeout:g} s")
        said = self._masked(str(reason) or type(reason).__name__)
        return TransientError(f"connection to {self.settings.address}: {said}")

    def _masked(self, text: str) -> str:
        """One line, not too long, and without the key should the service repeat it."""
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:MAX_SAID]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host; it ends as an error with the status."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _text_of(body: bytes) -> str:
    """The text of a chat completion; without an unfinished sentence where the number of tokens ran out."""
    try:
        content = json.loads(body)
    except ValueError as error:
        raise TransientError(f"the answer is not JSON: {error}") from None
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text, reason = _joined(message.get("content")), choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise TransientError("the answer is no chat completion: it has no choices[0].message") from None
    if reason == "content_filter" or message.get("refusal"):
        raise CaptionError("the model refused to answer")
    if not text:
        raise TransientError(f"the answer has no text (finish_reason: {reason})")
    return whole_sentences(text) if reason == "length" else text


def _joined(content: Any) -> str:
    """Text that comes whole or in parts."""
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content.strip() if isinstance(content, str) else ""


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait by the header Retry-After, a number or a date; None without a legible one. `now` in
    seconds since 1970."""
    given = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    if given.replace(".", "", 1).isdecimal():
        return float(given)
    try:
        return max(parsedate_to_datetime(given).timestamp() - now, 0.0)
    except (ValueError, TypeError):
        return None


def data_url(image_HWC: Tensor, settings: EndpointSettings) -> str:
    """A uint8 [H, W, 3] picture as "data:image/jpeg;base64,..."."""
    picture = Image.fromarray(image_HWC.cpu().numpy())
    picture.thumbnail((settings.image_edge, settings.image_edge))  # never enlarges
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=settings.jpeg_quality)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _without_user(address: str) -> str:
    return address.rpartition("@")[2] if "@" in address else address
