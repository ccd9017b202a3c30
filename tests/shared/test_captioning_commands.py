"""The verbs `caption` and `upsample`, against a real server where one is asked; and runs that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.captioning.errors import CaptionError, RefusedError, TransientError
from shared.captioning.retrying import RetrySettings
from shared.captioning.upsampling import UpsamplingWarning, upsample
from shared.clips import shapes
from shared.clips.__main__ import main
from shared.clips.dataset import read_clips
from shared.video_io import read_video
from tests.shared import chat_server
from tests.shared.chat_server import ChatServer, answer, completion, status
from tests.shared.clip_files import scenes, write_clips, write_metadata
from tests.shared.test_captioning import Stub

KEY = "sk-very-secret"
NO_WAIT = ("--first_wait", "0")


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three captioned clips."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    captions = write_clips(tmp_path / "films", 3)
    write_metadata(tmp_path / "films", {f"videos/{i}.mkv": text for i, text in enumerate(captions)})
    return tmp_path / "films"


def words(verb: str, *argv: object) -> list[str]:
    return [verb, *(str(word) for word in argv)]


def caption(films: Path, out: Path, *argv: object) -> int:
    given = ("--input_path", films, "--output_path", out, "--quiet", *argv)
    return main(words("caption", *given))


def by(server: ChatServer) -> tuple[str, ...]:
    return ("--adapter", "openai:m", "--base_url", server.base_url, *NO_WAIT)


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "captioning.json").read_text(encoding="utf-8"))


# ---- caption


def test_the_oracle_by_the_command_line(films: Path, tmp_path: Path, capsys) -> None:
    assert caption(films, tmp_path / "out", "--adapter", "shapes", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["ok"], said["num_captioned"], said["num_asked"], said["num_kept"]) == (True, 3, 12, 0)
    for clip, scene in zip(read_clips(tmp_path / "out"), scenes(3), strict=True):
        assert shapes.parse(clip.caption) == scene.caption.attributes()
        assert clip.fields["original_caption"] == clip.fields["short_caption"] == scene.caption.text
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.jsonl")}
    assert before.keys() == {"metadata.jsonl", "summariser.jsonl", "captioner.jsonl"}
    assert caption(films, tmp_path / "out", "--adapter", "shapes", "--num_workers", 3) == 0
    assert report(tmp_path / "out")["num_asked"] == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.jsonl")} == before


def test_a_service_with_faults_gives_what_one_without_gives(films: Path, tmp_path: Path) -> None:
    faults = {0: status(429, wait="0"), 2: chat_server.reset, 4: answer(b"{"), 6: status(500)}
    faults[9] = chat_server.cut_off
    with ChatServer({}).running() as good:
        assert caption(films, tmp_path / "a", *by(good)) == 0
    with ChatServer(faults).running() as bad:
        assert caption(films, tmp_path / "b", *by(bad), "--num_workers", 3) == 0
    assert len(good.bodies) == 12 and len(bad.bodies) == 17 and set(good.texts()) == set(bad.texts())
    assert good.most_at_once == 1 and 2 <= bad.most_at_once <= 3
    for name in ("metadata.jsonl", "summariser.jsonl", "captioner.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.json*"))
    assert KEY.encode() not in written and good.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_clips_that_fail_are_listed_and_asked_again(films: Path, tmp_path: Path, capsys) -> None:
    with ChatServer({5: status(400, "too large")}).running() as server:
        assert caption(films, tmp_path / "out", *by(server)) == 7
        assert "2 of 3 clips" in (said := capsys.readouterr().out) and "too large" in said
        (failure,) = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
        assert json.loads(failure)["video"] == "videos/1.mkv"
        num_before = len(server.bodies)
        assert caption(films, tmp_path / "out", *by(server)) == 0
        assert len(server.bodies) == num_before + 3 and report(tmp_path / "out")["num_captioned"] == 3


def test_end_to_end(films: Path, tmp_path: Path) -> None:
    with ChatServer({}).running() as server:
        out = tmp_path / "out"
        assert caption(films, out, *by(server), "--end_to_end", "--prompt", "What is it?") == 0
    assert len(server.bodies) == 3 and not (out / "summariser.jsonl").exists()
    content = server.bodies[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url"] * 3 + ["text"] and content[-1][
        "text"
    ] == "What is it?"
    first = json.loads((out / "captioner.jsonl").read_text().splitlines()[0])["messages"]
    assert first[0]["content"][1]["text"] == "What is it?"
    assert first[1]["content"] == chat_server.usual_text(server.bodies[0])


def test_stages_by_different_adapters(films: Path, tmp_path: Path) -> None:
    with ChatServer({}).running() as server:
        stages = ("--short", "given", "--dense", "shapes")
        assert caption(films, tmp_path / "out", *by(server), *stages) == 0
    assert len(server.bodies) == 3, "the summaries alone"
    asked = server.bodies[0]["messages"][1]["content"]
    assert asked.startswith(f"Short caption: {read_clips(films)[0].caption}\nFrame at 0 s: A ")


def test_errors_are_one_line(films: Path, tmp_path: Path, capsys) -> None:
    (films / "captioned").mkdir()
    write_metadata(films / "other", {"a.mp4": "somebody's own"})
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((films, tmp_path / "o", "--adapter", "shaps"), 2, "unknown adapter 'shaps' (nearest: 'shapes')"),
        ((films, tmp_path / "o", "--adapter", "openai"), 2, "legal: shapes (the demo"),
        ((films, tmp_path / "o", "--adapter", "openai:m"), 2, "needs --base_url"),
        ((films, tmp_path / "o", "--adapter", "transformers:/no"), 3, "no config.json"),
        ((films, films, "--adapter", "shapes", "--overwrite"), 2, "holds the clips' own list"),
        ((films, films / "other", "--adapter", "shapes"), 2, "is another list"),
        ((films, tmp_path / "o", "--adapter", "shapes", "--every", 0), 2, "every must be at least 0.001"),
        ((films, tmp_path / "o", "--adapter", "shapes", "--num_workers", 0), 2, "at least 1, got 0"),
        ((films, tmp_path / "o", "--adapter", "shapes", "--end_to_end", "--short", "given"), 2, "no stages"),
        ((films / "captioned", tmp_path / "o", "--adapter", "shapes"), 2, "neither a list of clips"),
    ]
    for arguments, code, reason in cases:
        assert caption(*arguments) == code  # type: ignore[arg-type]
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1 and reason in printed.err, printed.err
    with ChatServer(dict.fromkeys(range(9), status(401, f"key {KEY} is wrong"))).running() as server:
        assert caption(films, tmp_path / "o", *by(server), "--num_workers", 2) == 2
    printed = capsys.readouterr().err
    assert "answered 401: key *** is wrong" in printed and len(server.bodies) <= 2


# ---- runs that end before they are done


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def kill(argv: list[str], waiting: Callable[[], bool], server: ChatServer) -> None:
    process = subprocess.Popen([sys.executable, "-m", "shared.clips", *argv])
    until(waiting)
    process.kill()
    assert process.wait(30) == -signal.SIGKILL


def terminate(argv: list[str], waiting: Callable[[], bool], server: ChatServer) -> None:
    """In this process, so that only one has to be started."""

    def end() -> None:
        until(waiting)
        os.kill(os.getpid(), signal.SIGTERM)
        server.release.set()  # the thread that waits for an answer is let go

    thread = threading.Thread(target=end)
    thread.start()
    assert main(argv) == 130
    thread.join()


@pytest.mark.parametrize("end", [kill, terminate])
def test_a_run_that_is_ended_goes_on_and_asks_nothing_twice(
    films: Path, tmp_path: Path, end: Callable[[list[str], Callable[[], bool], ChatServer], None]
) -> None:
    """The server does not answer the ninth question; the run is ended meanwhile, and repeated. One worker:
    then nothing else is asked until the run has ended, however long that takes."""
    with ChatServer({8: chat_server.hang}).running() as server:
        argv = words("caption", "--input_path", films, "--output_path", tmp_path / "out", "--quiet",
                     "--num_workers", 1, "--max_attempts", 1, *by(server))  # fmt: skip
        num_kept = partial(len_of_lines, tmp_path / "out" / "cache")
        end(argv, lambda: len(server.bodies) == 9 and num_kept() == 8, server)
        unanswered = server.texts()[8]
        assert not (tmp_path / "out" / "metadata.jsonl").exists()
        assert main(argv) == 0
    asked = Counter(server.texts())
    assert len(asked) == 12 and {text for text, count in asked.items() if count > 1} == {unanswered}
    assert asked[unanswered] == 2
    with ChatServer({}).running() as other:
        assert caption(films, tmp_path / "whole", *by(other)) == 0
    for name in ("metadata.jsonl", "summariser.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def len_of_lines(folder: Path) -> int:
    """Answers that are on the disk; the choices of frames are beside them."""
    lines = [line for path in folder.rglob("*.jsonl") for line in path.read_bytes().splitlines(True)]
    return sum(line.endswith(b"\n") and b'"stage": "frames"' not in line for line in lines)


# ---- upsample


class Writer(Stub):
    """Gives its `answers` one after the other, errors among them."""

    def __init__(self, *answers: str | Exception) -> None:
        super().__init__(failing={i: a for i, a in enumerate(answers) if isinstance(a, Exception)})
        self.answers = answers

    def upsample(self, prompt: str, image: torch.Tensor | None = None) -> str:
        self._said(prompt)
        return str(self.answers[len(self.calls) - 1])


def tried(*answers: str | Exception) -> tuple[Any, int]:
    writer = Writer(*answers)
    tries = RetrySettings(attempts=3, first_wait=0)
    return upsample("a red ball", writer, tries=tries, sleep=lambda _: None), len(writer.calls)


def test_three_tries_then_the_prompt_itself() -> None:
    long = "A red ball lies in the grass."
    assert tried(f' "{long}"\n')[0].text == long
    result, calls = tried(TransientError("busy"), "", long)
    assert (result.text, result.failure, calls) == (long, None, 3)
    with pytest.warns(UpsamplingWarning, match="'a red ball' is kept as it is: busy"):
        result, calls = tried(*[TransientError("busy")] * 9)
    assert (result.text, calls) == ("a red ball", 3) and "3 attempts" in result.failure
    with pytest.warns(UpsamplingWarning, match="refused"):
        assert tried(CaptionError("refused to answer"))[1] == 1
    with pytest.raises(RefusedError):
        tried(RefusedError("wrong key"))


def test_upsampling_a_file_of_prompts(films: Path, tmp_path: Path, capsys) -> None:
    prompts, out = tmp_path / "short.txt", tmp_path / "long.txt"
    prompts.write_text("# three\na red ball\n\na lion drinks\nthe sea\n")
    given = ("--prompt_file", prompts, "--output_path", out, "--quiet")
    faults = {1: status(500), 2: answer(completion("no")), 3: status(503)}
    with ChatServer(faults).running() as server:
        with pytest.warns(UpsamplingWarning, match="'a lion drinks' is kept"):
            assert main(words("upsample", *given, *by(server))) == 0
        assert len(server.bodies) == 5 and capsys.readouterr().out.startswith("2 of 3 prompts longer")
        lines = out.read_text().splitlines()
        assert lines[0] == chat_server.usual_text(server.bodies[0]) and lines[1] == "a lion drinks"
        assert main(words("upsample", *given, *by(server))) == 2, "the file is there"
        assert main(words("upsample", *given, *by(server), "--overwrite")) == 0
        assert len(server.bodies) == 6, "only the prompt that was kept as it was"
    body = server.bodies[0]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.01, 0.7, 250)
    assert out.read_text().splitlines()[1] == chat_server.usual_text(server.bodies[5])


def test_upsampling_for_image_to_video(films: Path, tmp_path: Path, capsys) -> None:
    video = read_video(films / "videos/0.mkv")
    video.save(tmp_path / "frames")
    picture = sorted((tmp_path / "frames").glob("*.png"))[0]
    with ChatServer({}).running() as server:
        given = ("--prompt", "it moves up", "--image_path", picture, "--json")
        assert main(words("upsample", *given, *by(server))) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["prompts"][0]["text"] == chat_server.usual_text(server.bodies[0])
    kinds = [part["type"] for part in server.bodies[0]["messages"][1]["content"]]
    assert kinds == ["image_url", "text"]
    assert (
        main(words("upsample", "--prompt", "it moves up", "--image_path", picture, "--adapter", "shapes"))
        == 0
    )
    scene = scenes(1)[0].caption
    assert capsys.readouterr().out == (
        f"a {scene.colour} {scene.shape} moving up slowly on a {scene.background} background\n"
    )
    two = tmp_path / "two.txt"
    two.write_text("a\nb\n")
    folder = ("--prompt_file", two, "--image_path", tmp_path / "frames", "--adapter", "shapes")
    assert main(words("upsample", *folder)) == 2
    assert "holds 17 images for 2 prompts" in capsys.readouterr().err
