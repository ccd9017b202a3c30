"""Calls with bad input, judged: a user may see a reason of one line and an exit code, and never a traceback.

The environment variable HYPOTHESIS_PROFILE=campaign makes the runs large and lets them go on behind a
traceback, which is kept by the place that raised it; FUZZ_FIGURES names the JSON file for the counts.
"""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from shared.errors import UserError
from shared.memory import ran_out
from shared.verbs import Program

CAMPAIGN = os.environ.get("HYPOTHESIS_PROFILE") == "campaign"
FACTOR = int(os.environ.get("FUZZ_FACTOR", "40"))  # of a campaign's runs to the usual ones
UNDAMAGED = "undamaged"
INDEX = "run.json"  # of a folder of videos: it lists what could not be made, and why
CODES = (0, 2, 3, 4, 5, 7, 130)
UNTOUCHED = (2, 3, 4)  # codes of refusals: nothing may be written or changed
SECONDS = 10.0  # of computing; a call that takes longer is cut off and counted
WAITING = 120.0  # by the clock, likewise
ROOM = 4 << 30  # bytes that a call may map beside what the process has
ROOT = Path(__file__).resolve().parents[2]


def runs(count: int) -> int:
    """How many inputs a loop tries where the usual test tries `count`."""
    return count * FACTOR if CAMPAIGN else count


def effort(count: int) -> settings:
    """Of a hypothesis test, likewise."""
    return settings(
        max_examples=runs(count),
        deadline=None,
        derandomize=not CAMPAIGN,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


class TooLong(BaseException):
    """Raised into a call that would not end."""


@dataclass(kw_only=True)
class Counts:
    """Of one target."""

    tried: int = 0
    ends: Counter[str] = field(default_factory=Counter)  # "accepted", "refused 2", ..., "too long"


@dataclass
class Tally:
    """What became of all inputs. `faults`: place -> [how often, the first input that showed it]."""

    counts: dict[str, Counts] = field(default_factory=dict)
    faults: dict[str, list[Any]] = field(default_factory=dict)
    long: list[str] = field(default_factory=list)

    def end(self, target: str, how: str, words: str) -> None:
        counts = self.counts.setdefault(target, Counts())
        counts.tried += 1
        counts.ends[how] += 1
        if how == "too long":
            self.long.append(f"{target}: {words[:300]}")

    def fault(self, target: str, place: str, words: str) -> None:
        self.end(target, "fault", words)
        self.faults.setdefault(f"{target}: {place}", [0, words[:2000]])[0] += 1
        if not CAMPAIGN:
            raise AssertionError(f"{target}: {place}\n{words[:4000]}")

    def plain(self) -> dict[str, Any]:
        """JSON: sums, then every target; calls with files that nobody damaged are left out."""
        self.counts.pop(UNDAMAGED, None)
        rows = {name: {"tried": c.tried, **dict(sorted(c.ends.items()))} for name, c in self.counts.items()}
        ends = sum((c.ends for c in self.counts.values()), Counter[str]())
        return {
            "tried": sum(c.tried for c in self.counts.values()),
            "refused": sum(count for how, count in ends.items() if how.startswith("refused")),
            "accepted": ends["accepted"],
            "too_long": ends["too long"],
            "faults": sum(count for count, _ in self.faults.values()),
            "places": {place: {"count": c, "first": words} for place, (c, words) in self.faults.items()},
            "long": self.long[:100],
            "targets": dict(sorted(rows.items())),
        }

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.plain(), indent=1, ensure_ascii=True) + "\n", encoding="utf-8")

    # ---- readers

    def read(self, target: str, words: str, action: Callable[[], object]) -> object | None:
        """A function of the package: it returns, or raises a UserError whose message is not empty."""
        try:
            with limited():
                result = action()
        except TooLong:
            return self.end(target, "too long", words)
        except OSError as error:  # the programs say what the system said
            return self.end(target, "refused 2" if str(error) else "fault", words)
        except UserError as error:
            if not str(error).strip():
                return self.fault(target, "an empty reason", words)
            return self.end(target, f"refused {error.exit_code}", words)
        except Exception as error:
            if ran_out(error):
                return self.end(target, "refused 4", words)
            return self.fault(target, place_of(error), f"{words}\n{trace(error)}")
        self.end(target, "accepted", words)
        return result

    # ---- commands

    def command(
        self, target: str, program: Program, argv: Sequence[str], folder: Path, *, given: Path | None = None
    ) -> int | None:
        """A call of a program with `folder`, empty, as the working directory; it is emptied again. A fault is
        kept with the beginning of the file `given`."""
        words = f"{program.name} {list(argv)!r}" + (f"\n{given.read_bytes()[:1500]!r}" if given else "")
        try:
            done = called(program, argv, folder)
        except TooLong:
            shutil.rmtree(folder)
            folder.mkdir()
            self.end(target, "too long", words)
            return None
        left = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if not path.is_dir()]
        shutil.rmtree(folder)
        folder.mkdir()
        if done.error is not None:
            self.fault(target, place_of(done.error), f"{words}\n{trace(done.error)}")
        elif problem := wrong(done, left, as_json="--json" in argv):
            self.fault(
                target, problem, f"{words}\nended with {done.code}\n{done.out[-800:]}\n{done.err[-800:]}"
            )
        else:
            self.end(target, f"refused {done.code}" if done.code else "accepted", words)
        return done.code


@dataclass(frozen=True, kw_only=True)
class Done:
    """A call that came back."""

    code: int | None
    out: str
    err: str
    error: BaseException | None = None


def called(program: Program, argv: Sequence[str], folder: Path) -> Done:
    """Run it here, with streams that are as strict as a terminal's."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")]
    old, here = (sys.stdout, sys.stderr), Path.cwd()
    code, error = None, None
    os.chdir(folder)
    sys.stdout, sys.stderr = streams
    try:
        with limited():
            code = program.main(list(argv))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception as raised:
        error = raised
    finally:
        sys.stdout, sys.stderr = old
        os.chdir(here)
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "replace"))
    return Done(code=code, out=texts[0], err=texts[1], error=error)


def wrong(done: Done, left: Sequence[str], *, as_json: bool) -> str:
    """What a user should not have met; "" if nothing."""
    if done.code not in CODES:
        return f"exit code {done.code}"
    if "Traceback (most recent call last)" in done.out + done.err:
        return "a traceback in the text"
    if any(".tmp" in name or name.endswith(".part") for name in left):
        return f"left behind: {left}"
    if done.code in UNTOUCHED and any(Path(name).name != INDEX for name in left):
        return f"refused, but wrote {left[:5]}"
    if done.code and as_json:
        return _wrong_json(done)
    last = done.err.strip().splitlines()[-1:]
    if done.code and not (done.out.strip() or (last and last[0].startswith("error: ") and len(last[0]) > 12)):
        return "no reason given"
    return ""


def _wrong_json(done: Done) -> str:
    try:
        said = json.loads(done.out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        return "--json, and the last line is not JSON"
    told = isinstance(said, dict) and (said.get("ok") is False or said.get("exit_code") == done.code)
    return "" if told else "--json does not say that it failed"


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """TooLong after `seconds` of computing; MemoryError for who wants more than ROOM."""

    def stop(number: int, frame: object) -> None:
        raise TooLong

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = [signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGPROF)]
    resource.setrlimit(resource.RLIMIT_AS, (_mapped() + ROOM, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)  # again, where something swallowed it
    signal.setitimer(signal.ITIMER_REAL, WAITING, 1.0)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for number, handler in zip((signal.SIGALRM, signal.SIGPROF), previous, strict=True):
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _mapped() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1 << 40


def place_of(error: BaseException) -> str:
    """The exception's type and the innermost line of this repository that it came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(str(ROOT)) and "/.venv/" not in f.filename]
    ours = [f for f in ours if "/tests/" not in f.filename] or ours
    where = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {where}"


def trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)[-12:])[-3000:]
