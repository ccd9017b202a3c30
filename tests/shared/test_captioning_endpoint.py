"""Asking a real HTTP server, and what becomes of its faults."""

from __future__ import annotations

import base64
import io
import time
from email.utils import formatdate
from pathlib import Path

import pytest
import torch
from PIL import Image

from shared.captioning.errors import CaptionError, RefusedError, StoppedError, TransientError
from shared.captioning.instructions import Message, whole_sentences
from shared.captioning.openai_adapter import ChatEndpoint, EndpointSettings, read_key, retry_after
from shared.captioning.retrying import RateLimit, RetrySettings, Stop, with_retries
from shared.errors import SettingError
from tests.shared import chat_server
from tests.shared.chat_server import ChatServer, Fault, answer, completion, status

KEY = "sk-very-secret"
HELLO = [Message(role="user", text="hello")]


class Asked:
    """An endpoint whose waits are written down instead of slept, by a clock that nothing else moves."""

    def __init__(self, server: ChatServer, *, attempts: int = 3, timeout: float = 30.0, **settings: object):
        self.waits: list[float] = []
        self.now = 100.0
        self.endpoint = ChatEndpoint(
            EndpointSettings(base_url=server.base_url, model="m", timeout=timeout, **settings),  # type: ignore[arg-type]
            key=KEY,
            rate=RateLimit(None, self._sleep, lambda: self.now),
            sleep=self._sleep,
            retry=RetrySettings(attempts=attempts, first_wait=0.5, longest_wait=20),
        )

    def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.waits.append(seconds)
            self.now += seconds


def test_the_question_and_the_answer() -> None:
    picture = torch.zeros(40, 100, 3, dtype=torch.uint8)
    picture[..., 0] = 200
    with ChatServer({}).running() as server:
        asked = Asked(server, image_edge=50, max_tokens=77)
        told = [
            Message(role="system", text="be short"),
            Message(role="user", text="what?", images=(picture,)),
        ]
        text = asked.endpoint.answer(told)
        assert text == chat_server.usual_text(server.bodies[0])
    (body,), (headers,) = server.bodies, server.headers
    assert server.paths == ["/v1/chat/completions"] and headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 77) and "top_p" not in body
    assert body["messages"][0] == {"role": "system", "content": "be short"}
    image, words = body["messages"][1]["content"]
    kind, _, data = image["image_url"]["url"].partition(",")
    sent = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    assert kind == "data:image/jpeg;base64" and sent.format == "JPEG" and sent.size == (50, 20)
    assert sent.getpixel((25, 10))[0] > 190 and words == {"type": "text", "text": "what?"}  # type: ignore[index]


MENDED: dict[str, Fault] = {
    "500": status(500),
    "503": status(503),
    "408": status(408),
    "429": status(429),
    "not JSON": answer(b"<html>busy</html>"),
    "half JSON": answer(b'{"choices": [{"mess'),
    "no bytes": answer(b""),
    "no completion": answer({"id": 3}),
    "a list": answer([1]),
    "no choices": answer({"choices": []}),
    "no text": answer(completion("  ")),
    "null": answer(completion(None)),
    "cut off": chat_server.cut_off,
    "reset": chat_server.reset,
    "silent": chat_server.hang,
    "endless": chat_server.drip,
}


@pytest.mark.parametrize("name", MENDED)
def test_faults_are_asked_again(name: str) -> None:
    with ChatServer({0: MENDED[name]}).running() as server:
        asked = Asked(server, timeout=2.0 if name in ("silent", "endless") else 30.0)  # of good answers too
        assert asked.endpoint.answer(HELLO).startswith("A caption with")
        assert len(server.bodies) == 2 and server.texts()[0] == server.texts()[1]
    assert len(asked.waits) == 1 and 0.25 <= asked.waits[0] <= 0.5


@pytest.mark.parametrize("name", MENDED)
def test_a_lasting_fault_is_one_line_after_the_attempts(name: str) -> None:
    with ChatServer(dict.fromkeys(range(9), MENDED[name])).running() as server:
        asked = Asked(server, attempts=2, timeout=0.5 if name in ("silent", "endless") else 30.0)
        with pytest.raises(CaptionError, match=r"\(2 attempts\)") as caught:
            asked.endpoint.answer(HELLO)
        deadline = time.monotonic() + 30
        while len(server.bodies) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # the server may read the question after its asker has gone
        assert len(server.bodies) == 2
    assert "\n" not in str(caught.value) and not isinstance(caught.value, (TransientError, RefusedError))


def test_a_server_that_is_not_there() -> None:
    with ChatServer({}).running() as server:
        pass
    with pytest.raises(CaptionError, match=r"connection to http://127.0.0.1:.*refused \(3 attempts\)"):
        Asked(server).endpoint.answer(HELLO)


def test_retry_after_is_kept() -> None:
    with ChatServer({0: status(429, wait="7"), 1: status(429, wait="0")}).running() as server:
        asked = Asked(server, attempts=4)
        asked.endpoint.answer(HELLO)
    first, second = asked.waits
    assert first == 7.0 and 0.5 <= second <= 1
    with ChatServer({0: status(429, wait="900")}).running() as server:
        asked = Asked(server)
        with pytest.raises(CaptionError, match="asks to wait 900 s, over 20 s"):
            asked.endpoint.answer(HELLO)
        assert len(server.bodies) == 1 and not asked.waits


def test_retry_after_holds_the_next_question_too() -> None:
    with ChatServer({0: status(429, wait="7")}).running() as server:
        asked = Asked(server, attempts=1)
        with pytest.raises(TransientError):
            asked.endpoint.answer(HELLO)
        asked.endpoint.answer(HELLO)
    assert asked.waits == [7.0]


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after({"Retry-After": " 2.5 "}, 0) == 2.5
    assert retry_after({"Retry-After": formatdate(1060, usegmt=True)}, 1000) == 60
    assert retry_after({"Retry-After": formatdate(900, usegmt=True)}, 1000) == 0
    assert retry_after({"Retry-After": "soon"}, 0) is None and retry_after({}, 0) is None


@pytest.mark.parametrize("code", [401, 403, 404, 429])
def test_a_refusal_is_not_asked_again_and_hides_the_key(code: int) -> None:
    fault = status(code, f"bad key {KEY}\nsorry", code="insufficient_quota" if code == 429 else "x")
    with ChatServer({0: fault}).running() as server:
        with pytest.raises(RefusedError, match=f"answered {code}: bad key \\*\\*\\* sorry") as caught:
            Asked(server).endpoint.answer(HELLO)
        assert len(server.bodies) == 1
    assert KEY not in str(caught.value) and caught.value.__cause__ is None


NOT_MENDED: list[tuple[Fault, str]] = [
    (status(400, "the image is too large"), "answered 400: the image is too large"),
    (lambda h: h.send(422, b"plain words"), "answered 422: "),
    (lambda h: h.send(302, b"", {"Location": "http://127.0.0.1:9/v1"}), "answered 302"),
    (answer(completion("I", "content_filter")), "refused to answer"),
    (answer({"choices": [{"message": {"content": "x", "refusal": "I will not"}}]}), "refused to answer"),
]


@pytest.mark.parametrize(("fault", "words"), NOT_MENDED)
def test_other_errors_are_of_one_question(fault: Fault, words: str) -> None:
    with ChatServer({0: fault}).running() as server:
        asked = Asked(server)
        with pytest.raises(CaptionError, match=words) as caught:
            asked.endpoint.answer(HELLO)
        assert type(caught.value) is CaptionError and len(server.bodies) == 1
        assert asked.endpoint.answer(HELLO).startswith("A caption")


def test_forms_of_answers() -> None:
    parts = [{"type": "text", "text": "Two "}, {"type": "text", "text": "parts."}]
    faults = {0: answer(completion(parts)), 1: answer(completion("A red ball. It rolls to the le", "length"))}
    with ChatServer(faults).running() as server:
        asked = Asked(server)
        assert [asked.endpoint.answer(HELLO) for _ in "ab"] == ["Two parts.", "A red ball."]
    assert [whole_sentences(text) for text in ("One. Two! Thr", "v1.5 is", "一。二", "All.")] == [
        "One. Two!", "v1.5 is", "一。", "All."
    ]  # fmt: skip


# ---- settings


def test_the_recipe_tells_what_changes_answers_and_no_secret() -> None:
    with ChatServer({}).running() as server:
        one, other = Asked(server), Asked(server, temperature=0.5)
    assert one.endpoint.recipe != other.endpoint.recipe
    assert one.endpoint.recipe == Asked(server, timeout=1.0).endpoint.recipe
    assert KEY not in repr(one.endpoint.recipe) + repr(one.endpoint) + repr(one.endpoint.settings)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a/v1", "http://", "http://a/v1?x=1"])
def test_illegal_addresses(url: str) -> None:
    with pytest.raises(SettingError, match="base_url must read like"):
        EndpointSettings(base_url=url, model="m")


def test_illegal_settings() -> None:
    with pytest.raises(SettingError, match="must not hold a user") as caught:
        EndpointSettings(base_url=f"http://me:{KEY}@a/v1", model="m")
    assert KEY not in str(caught.value)
    with pytest.raises(SettingError, match="timeout must be more than 0, got 0"):
        EndpointSettings(base_url="http://a/v1", model="m", timeout=0)
    with pytest.raises(SettingError, match="model's name"):
        EndpointSettings(base_url="http://a/v1", model=" ")


def test_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    monkeypatch.setenv("SOME_KEY", "from the env")
    assert read_key(None, None) is None and read_key(None, file) == KEY and read_key("SOME_KEY", file) == KEY
    with pytest.raises(SettingError, match="what SOME_KEY holds is no API key") as caught:
        read_key("SOME_KEY", None)
    assert "from the env" not in str(caught.value)
    monkeypatch.setenv("SOME_KEY", KEY)
    assert read_key("SOME_KEY", None) == KEY
    for variable, path in (("NO_SUCH_KEY", None), (None, tmp_path / "nowhere")):
        with pytest.raises(SettingError, match="no API key in"):
            read_key(variable, path)


# ---- time


def test_waits_double_and_are_bounded() -> None:
    settings = RetrySettings(first_wait=1, longest_wait=5)
    for attempt, most in enumerate((1, 2, 4, 5, 5)):
        assert most / 2 <= settings.wait(attempt, None) <= most
    assert settings.wait(0, 4.0) == 4.0
    for wrong in ({"attempts": 0}, {"first_wait": -1}, {"first_wait": 9, "longest_wait": 5}):
        with pytest.raises(SettingError):
            RetrySettings(**wrong)  # type: ignore[arg-type]


def test_the_rate_is_kept_over_callers() -> None:
    now, slept = 100.0, []
    limit = RateLimit(120, slept.append, lambda: now)
    for _ in range(3):
        limit.wait()
    assert slept == [0.0, 0.5, 1.0]
    now += 10
    limit.wait()
    assert slept[-1] == 0.0
    limit.hold(4)
    limit.wait()
    assert slept[-1] == 4.0
    with pytest.raises(SettingError, match="requests_per_minute"):
        RateLimit(0, slept.append)


def test_a_stop_ends_waits() -> None:
    stop = Stop()
    stop.sleep(0)
    stop.set()
    start = time.monotonic()
    with pytest.raises(StoppedError):
        stop.sleep(60)

    def fails() -> str:
        raise TransientError("busy")

    with pytest.raises(StoppedError):
        with_retries(fails, RetrySettings(), stop.sleep)
    assert time.monotonic() - start < 30
