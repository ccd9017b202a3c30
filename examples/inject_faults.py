"""Faults injected for real into every verb that writes, and what was lost: a campaign with counts.

Tiny models work in processes of their own that are killed (SIGKILL, SIGTERM, SIGINT) at random moments or
just before a random file operation, that run on a disk which is full or cannot be written, whose helpers die,
whose earlier files are damaged, and whose memory is limited. After every fault nothing half-written may lie
under a final name and no traceback be shown; then the same command runs once more, without the fault, and
must end with the result of a run that was never disturbed, file by file.

The figures are OUT/faults.json, renewed after every trial; a call that was stopped goes on where it was.

Run: python examples/inject_faults.py [--trials 160] [--output_path out/faults]
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # also for the tiny models of the tests

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MUST_STOP = 900.0  # seconds after which a process counts as hanging; the machine may be busy
PROMPTS = ("a red circle moving left", "a blue square standing still", "a red circle", "a blue square")
VOLATILE = frozenset(
    "seconds stages environment elapsed measured memory_bytes seconds_per_step samples_per_second "
    "tokens_per_second status check settings_hash_of command".split()
)
NO_SPACE, READ_ONLY, REMOUNT = "No space left on device", 1, 32


# ---- what is run


@dataclass(frozen=True)
class Scenario:
    """A command of a package that fills the folder {out}; `start` is copied there before."""

    name: str
    package: str
    words: tuple[str, ...]
    start: str = ""

    def argv(self, world: Path, out: Path) -> list[str]:
        return [word.format(world=world, out=out) for word in self.words]


def _generate(model: str) -> tuple[str, ...]:
    return ("generate", "--prompt_file", "{world}/prompts.txt", "--model_path", "{world}/" + model,
            "--output_path", "{out}/videos", "--device", "cpu", "--quiet")  # fmt: skip


def _train(*settings: str) -> tuple[str, ...]:
    return ("train", "--output_path", "{out}/run", "--steps", "4", "--quiet", "--set", *settings)


def _precompute(model: str) -> tuple[str, ...]:
    return ("precompute", "--input_path", "{world}/clips", "--model_path", "{world}/" + model,
            "--output_path", "{out}/encoded", "--device", "cpu", "--quiet",
            "--clips_per_shard", "2")  # fmt: skip


def _finetune(model: str, *more: str) -> tuple[str, ...]:
    return ("finetune", "--model_path", "{world}/" + model, "--data", "{world}/clips", "--output_path",
            "{out}/tuned", "--device", "cpu", "--quiet", "--steps", "4",
            "--save_every", "1", *more)  # fmt: skip


def _convert(model: str, to: str) -> tuple[str, ...]:
    return ("convert", "--model_path", model, "--output_path", "{out}/model", "--to", to, "--overwrite")


AR_STAGES = ("vqvae", "base", "keyframes", "interpolation")
AR_RECIPE = ("num_clips=6", "num_stills=8", "vqvae_batch=2", "image_batch=2", "clip_batch=2",
             "images_beside_clips=2", "config.keyframes.num_layers=1", "config.interpolation.num_layers=1",
             *(f"{stage}.save_every=1" for stage in AR_STAGES))  # fmt: skip
X_RECIPE = ("num_clips=4", "num_stills=6", "clip_batch=2", "still_batch=2", "still_steps=1",
            "config.transformer.num_layers=1", "vae.save_every=1", "transformer.save_every=1")  # fmt: skip
SCENARIOS = (
    Scenario("generate, CogVideo", "cogvideo_ar", _generate("ar")),
    Scenario("generate, CogVideoX", "cogvideox_diff", _generate("x")),
    Scenario("train, CogVideo", "cogvideo_ar", _train(*AR_RECIPE), "trained_ar"),
    Scenario("train, CogVideoX", "cogvideox_diff", _train(*X_RECIPE), "trained_x"),
    Scenario("finetune, CogVideo", "cogvideo_ar", _finetune("ar", "--batch", "2")),
    Scenario("finetune, CogVideoX", "cogvideox_diff", _finetune(
        "x", "--rank", "2", "--num_frames", "9", "--height", "32", "--width", "48")),
    Scenario("precompute, CogVideo", "cogvideo_ar", _precompute("ar")),
    Scenario("precompute, CogVideoX", "cogvideox_diff", _precompute("x")),
    Scenario("convert, CogVideo", "cogvideo_ar", _convert("{world}/released", "own")),
    Scenario("convert back, CogVideo", "cogvideo_ar", _convert("{world}/converted", "sat")),
    Scenario("convert, CogVideoX", "cogvideox_diff", _convert("{world}/x", "diffusers"), "converted_x"),
    Scenario("bench run", "benchmarks", (
        "run", "demo", "--models", "cogvideo:{world}/ar", "--prompt_file", "{world}/prompts.txt",
        "--num_prompts", "2", "--num_clips", "2", "--no-warm_up", "--output_path", "{out}/bench", "--quiet")),
)  # fmt: skip


def make_world(world: Path, starts: Collection[str]) -> None:
    """Tiny random models, clips, prompts, and the slow first stages of the recipes named in `starts`."""
    from cogvideo_ar.__main__ import main as cogvideo
    from cogvideo_ar.formats import convert_folder
    from cogvideo_ar.parts import save_parts
    from cogvideox_diff.__main__ import main as cogvideox
    from tests.cogvideo_ar.released_parts import write_released
    from tests.cogvideo_ar.tiny_pipeline import tiny_parts
    from tests.cogvideox_diff.tiny_pipeline import make, write_tokenizer
    from tests.shared.clip_files import world as write_world

    world.mkdir(parents=True)
    save_parts(tiny_parts(world), world / "ar")
    make("5b", write_tokenizer(world / "words")).save_pretrained(world / "x")
    make("2b", world / "words" / "spiece.model").save_pretrained(world / "converted_x" / "model")
    write_world(world / "clips", 6)
    convert_folder(write_released(world / "released"), world / "converted")
    (world / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    for main, recipe, name, stages in (
        (cogvideo, AR_RECIPE, "trained_ar", ("tokenizer", "vqvae", "tokens")),
        (cogvideox, X_RECIPE, "trained_x", ("tokenizer", "vae", "latents")),
    ):
        for stage in stages if name in starts else ():
            words = [word.format(out=world / name) for word in _train(*recipe)]
            if main([*words, "--stage", stage]):
                raise RuntimeError(f"the stage {stage} of {name} could not be prepared")


# ---- a process and what is done to it


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a process: a signal after it has computed for `seconds` or before its
    `operation`-th file operation, limits of memory (beyond what it has, bytes) and of a file's size."""

    signal: int = 0
    seconds: float | None = None
    operation: int | None = None
    memory: int | None = None
    file_bytes: int | None = None
    helper: bool = False  # the signal hits one of the processes that this one started


@dataclass(frozen=True, kw_only=True)
class Ended:
    code: int  # negative: the signal that ended it
    said: str
    seconds: float
    operations: int

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.said or "Exception ignored" in self.said


def run(scenario: Scenario, world: Path, out: Path, fault: Fault, *more: str) -> Ended:
    """Run the command in a child of this process, which has imported everything already."""
    with tempfile.TemporaryDirectory(prefix="fault-") as folder:
        said, counted = Path(folder) / "said", Path(folder) / "operations"
        child = os.fork()
        if child == 0:
            _work(scenario, [*scenario.argv(world, out), *more], out, fault, said, counted)
        code, seconds = _waited(child, fault)
        text = said.read_text(errors="replace") if said.exists() else ""
        count = int(counted.read_text() or 0) if counted.exists() else 0
        return Ended(code=code, said=text, seconds=seconds, operations=count)


def _work(scenario: Scenario, argv: list[str], out: Path, fault: Fault, said: Path, counted: Path) -> None:
    """The child's life; never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background processes ignore it
        target = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(target, descriptor)
        sys.stdout, sys.stderr = (os.fdopen(one, "w", buffering=1, closefd=False) for one in (1, 2))
        count = _count_operations(out, fault)
        _limit(fault)
        code = importlib.import_module(f"{scenario.package}.__main__").main(argv)
        counted.write_text(str(count[0]))
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _count_operations(out: Path, fault: Fault) -> list[int]:
    """Count what changes files below `out`, and send the signal before the one that was chosen."""
    count, inside, me = [0], str(out), os.getpid()

    def hook(event: str, given: tuple[Any, ...]) -> None:
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
        opens = event == "open" and isinstance(given[2], int) and (given[2] & WRITES or _final(given[0]))
        if not (changes or opens) or not str(given[0]).startswith(inside) or os.getpid() != me:
            return
        count[0] += 1
        if fault.operation is not None and count[0] == fault.operation:
            os.kill(me, fault.signal)

    sys.addaudithook(hook)
    return count


def _final(path: object) -> bool:
    """Opened to be flushed to the disk: the moment between the writing and the renaming."""
    return ".tmp" in str(path)


def _limit(fault: Fault) -> None:
    if fault.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_bytes, resource.RLIM_INFINITY))
    if fault.memory is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread refused to it is a panic of Rust's
        _reserve(32 << 20)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + fault.memory, resource.RLIM_INFINITY))


def _reserve(amount: int) -> None:
    """Room for the small pieces of native code: oneDNN copies descriptors without looking whether there was
    any. Only what is asked for in one piece, as a tensor is, meets the limit."""
    libc, trim_threshold, mmap_threshold = ctypes.CDLL(None), -1, -3  # malloc.h
    libc.malloc.restype = ctypes.c_void_p
    libc.mallopt(trim_threshold, 2**31 - 1)  # what is freed stays with the process
    libc.mallopt(mmap_threshold, 128 << 10)
    pieces = [libc.malloc(64 << 10) for _ in range(amount // (64 << 10))]
    for piece in pieces:
        libc.free(ctypes.c_void_p(piece))


def _waited(child: int, fault: Fault) -> tuple[int, float]:
    """Send the signal when it is due; kill what hangs. Returns the exit code, negative for a signal, and the
    seconds of computing."""
    sent, began = fault.seconds is None, time.monotonic()
    while True:
        process, status, used = os.wait4(child, os.WNOHANG)
        if process:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # helpers of a process that was killed
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime
        if not sent and (fault.seconds or 0) <= _computed(child):
            target = _helper(child) if fault.helper else child
            if target is not None:
                sent = True
                with suppress(ProcessLookupError):
                    os.kill(target, fault.signal)
        if time.monotonic() - began > MUST_STOP:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -99, MUST_STOP
        time.sleep(0.004)


def _ends_of_libraries(ended: Ended) -> list[int]:
    """How native code ends a process by itself that has no memory left, which no program hears of."""
    if "thread-local data" in ended.said:  # the C library, for a thread's
        return [127]
    if "Error: in fn " in ended.said:  # FBGEMM, that has no page for a kernel it makes, and calls it
        return [-signal.SIGSEGV]
    return []


def _computed(process: int) -> float:
    """Seconds of a processor that it has had."""
    with suppress(OSError):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _helper(process: int) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return int(random.choice(found))
    return None


# ---- what may lie there, and what must


def half_written(folder: Path) -> list[str]:
    """Files under a final name that cannot be read whole."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or "claims" in path.parts:
            continue
        try:
            _read(path)
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}"[:300])
    return found


def _read(path: Path) -> Any:
    """The content of a file, without what a clock or a memory meter said."""
    import torch

    from shared.checkpoints import load_metadata, load_tensors
    from shared.video_io import read_video

    match path.suffix:
        case ".json":
            return _lasting(json.loads(path.read_text(encoding="utf-8")))
        case ".jsonl":
            return _log(path)
        case ".safetensors":
            return {"metadata": load_metadata(path), **_plain(load_tensors(path))}
        case ".pt":
            return _plain(torch.load(path, weights_only=True))
        case ".mkv" | ".mp4" | ".gif":
            return read_video(path).frames.numpy().tobytes()
        case ".model" | "":
            return path.read_bytes()
    return path.name


def _plain(content: Any) -> Any:
    """Tensors as their type, shape and bytes, wherever they are in it."""
    import torch

    if isinstance(content, torch.Tensor):
        x = content.detach().cpu().contiguous()
        return str(x.dtype), tuple(x.shape), x.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    return [_plain(value) for value in content] if isinstance(content, list | tuple) else content


def _lasting(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _lasting(v) for k, v in content.items() if k not in VOLATILE and "seconds" not in k}
    return [_lasting(v) for v in content] if isinstance(content, list) else content


def _log(path: Path) -> dict[int, Any]:
    """Figures of each step; a step that was made again after a kill said the same. The last line may be
    the beginning of one."""
    steps: dict[int, Any] = {}
    whole = path.read_bytes().rpartition(b"\n")[0]
    for line in whole.splitlines():
        said = _lasting(json.loads(line))
        steps.setdefault(said["step"], {}).update(said)
    return steps


def content_of(folder: Path) -> dict[str, Any]:
    """What a finished run leaves: file by file, without times, TensorBoard's events and pages with times."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if "tfevents" in path.name:
            continue
        if path.name == "results.json":
            from benchmarks.storage import lasting

            found[name] = _lasting(lasting(json.loads(path.read_text(encoding="utf-8"))))
        else:
            found[name] = _read(path)
    return found


def differences(wanted: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Files that are missing, left over, or differ, and in what."""
    names = sorted(name for name in wanted.keys() | got.keys() if wanted.get(name) != got.get(name))
    return [f"{n}: {_difference(wanted.get(n), got.get(n))}" for n in names]


def _difference(wanted: Any, got: Any) -> str:
    if got is None or wanted is None:
        return "missing" if got is None else "left over"
    if not (isinstance(wanted, dict) and isinstance(got, dict)):
        return "differs"
    keys = sorted((k for k in wanted.keys() | got.keys() if wanted.get(k) != got.get(k)), key=str)
    pairs = [f"{k}: {str(wanted.get(k))[:80]} is now {str(got.get(k))[:80]}" for k in keys[:2]]
    return f"differs in {len(keys)} entries, first {'; '.join(pairs)}"


# ---- a disk of one's own


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[..., bool]]:
    """A tmpfs of `size` bytes at `folder`; the yielded function mounts it anew, e.g. larger or read-only."""
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(flags: int, size: int) -> bool:
        options = f"size={size}".encode()
        return libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options) == 0

    if not mount(0, size):
        raise PermissionError("mounting needs root")
    try:
        yield lambda size, *, read_only=False: mount(REMOUNT | (READ_ONLY if read_only else 0), size)
    finally:
        libc.umount2(os.fsencode(folder), 2)


def may_mount(folder: Path) -> bool:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with small_disk(folder, 1 << 20):
            return True
    except (OSError, AttributeError):
        return False


# ---- trials


@dataclass(kw_only=True)
class Verdict:
    """Of one trial: how often which fault hit, and everything that was wrong afterwards."""

    hits: dict[str, int] = field(default_factory=dict)
    codes: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def hit(self, fault: str) -> None:
        self.hits[fault] = self.hits.get(fault, 0) + 1


@dataclass
class Campaign:
    """Scenarios with their undisturbed results. `out` is the same path in every trial, since commands and
    sidecars name it."""

    world: Path
    out: Path
    known: dict[str, tuple[dict[str, Any], Ended, int]] = field(default_factory=dict)

    def begin(self, scenario: Scenario) -> None:
        """An empty folder, or what the scenario starts from."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        self.fill(scenario)

    def fill(self, scenario: Scenario) -> None:
        if scenario.start:
            shutil.copytree(self.world / scenario.start, self.out, dirs_exist_ok=True)

    def reference(self, scenario: Scenario) -> tuple[dict[str, Any], Ended, int]:
        """(content, how it ended, bytes on disk) of an undisturbed run."""
        kept = self.world.parent / f"{re.sub(r'[^a-z]+', '-', scenario.name.lower())}.pickle"
        if scenario.name not in self.known and kept.exists():
            self.known[scenario.name] = pickle.loads(kept.read_bytes())
        if scenario.name not in self.known:
            self.begin(scenario)
            ended = run(scenario, self.world, self.out, Fault())
            if ended.code != 0:
                raise RuntimeError(f"{scenario.name} fails by itself ({ended.code}): {ended.said}")
            size = sum(path.stat().st_size for path in self.out.rglob("*") if path.is_file())
            self.known[scenario.name] = (content_of(self.out), ended, size)
            kept.write_bytes(pickle.dumps(self.known[scenario.name]))
        return self.known[scenario.name]

    def look(self, verdict: Verdict, ended: Ended, what: str, legal: Sequence[int]) -> None:
        """After a fault: a legal end, one line, nothing half-written."""
        verdict.codes.append(ended.code)
        if ended.code not in legal:
            verdict.wrong.append(f"{what}: ended with {ended.code}, not {list(legal)}: {ended.said[-1500:]}")
        if ended.traceback:
            verdict.wrong.append(f"{what}: traceback: {ended.said[-1500:]}")
        verdict.wrong += [f"{what}: half-written {name}" for name in half_written(self.out)]

    def finish(self, verdict: Verdict, scenario: Scenario) -> None:
        """The same command again: the result of a run that nothing disturbed."""
        content, _, _ = self.reference_known(scenario)
        ended = run(scenario, self.world, self.out, Fault())
        if ended.code != 0:
            verdict.wrong.append(f"the last run ended with {ended.code}: {ended.said[-1500:]}")
            return
        verdict.wrong += [f"lost: {one}" for one in differences(content, content_of(self.out))]

    def reference_known(self, scenario: Scenario) -> tuple[dict[str, Any], Ended, int]:
        return self.known[scenario.name]

    # ---- kinds

    def kills(self, scenario: Scenario, rng: random.Random) -> Verdict:
        """Three to eight signals in as many runs, at a random time or before a random file operation."""
        _, whole, _ = self.reference(scenario)
        self.begin(scenario)
        verdict = Verdict()
        for _ in range(rng.randint(3, 8)):
            name = rng.choice([*SIGNALS, "SIGKILL"])
            if rng.random() < 0.5:
                fault = Fault(signal=SIGNALS[name], seconds=rng.uniform(0, whole.seconds))
            else:
                fault = Fault(signal=SIGNALS[name], operation=rng.randint(1, max(1, whole.operations)))
            ended = run(scenario, self.world, self.out, fault)
            if ended.code == 0:
                break  # it had ended before
            verdict.hit(name)
            self.look(verdict, ended, name, [-signal.SIGKILL] if name == "SIGKILL" else [130])
        self.finish(verdict, scenario)
        return verdict

    def full_disk(self, scenario: Scenario, rng: random.Random) -> Verdict:
        """A disk that is full before the work is done, and larger the next time."""
        _, _, size = self.reference(scenario)
        self.out.mkdir(parents=True, exist_ok=True)
        verdict = Verdict()
        start = sum(p.stat().st_size for p in (self.world / scenario.start).rglob("*") if scenario.start)
        with small_disk(self.out, 1 << 30) as mount:
            shutil.rmtree(self.out, ignore_errors=True)
            self.fill(scenario)
            mount(int(start + rng.uniform(0.02, 0.98) * max(size - start, 1 << 16)) + (1 << 16))
            ended = run(scenario, self.world, self.out, Fault())
            if ended.code != 0:
                verdict.hit("disk full")
                self.look(verdict, ended, "disk full", [2])
            mount(1 << 30)
            self.finish(verdict, scenario)
        return verdict

    def file_limit(self, scenario: Scenario, rng: random.Random) -> Verdict:
        """The system refuses to write on in some file (a quota)."""
        self.reference(scenario)
        self.begin(scenario)
        largest = 150_000
        verdict = Verdict()
        ended = run(scenario, self.world, self.out, Fault(file_bytes=rng.randint(1, largest)))
        if ended.code != 0:
            verdict.hit("write refused")
            self.look(verdict, ended, "write refused", [2])
        self.finish(verdict, scenario)
        return verdict

    def read_only(self, scenario: Scenario, rng: random.Random) -> Verdict:
        """A disk that can only be read, empty or with half of the work on it."""
        _, whole, _ = self.reference(scenario)
        self.out.mkdir(parents=True, exist_ok=True)
        verdict = Verdict()
        with small_disk(self.out, 1 << 30) as mount:
            self.fill(scenario)
            if rng.random() < 0.5:
                operation = rng.randint(1, max(1, whole.operations - 1))
                run(scenario, self.world, self.out, Fault(signal=signal.SIGKILL, operation=operation))
            before = sorted((str(p), p.stat().st_mtime_ns) for p in self.out.rglob("*"))
            mount(1 << 30, read_only=True)
            ended = run(scenario, self.world, self.out, Fault())
            if ended.code != 0:
                verdict.hit("read-only")
                self.look(verdict, ended, "read-only", [2])
            if before != sorted((str(p), p.stat().st_mtime_ns) for p in self.out.rglob("*")):
                verdict.wrong.append("read-only: something changed")
            mount(1 << 30)
            self.finish(verdict, scenario)
        return verdict

    def memory(self, scenario: Scenario, rng: random.Random) -> Verdict:
        """An allocator that gives up some megabytes later."""
        self.reference(scenario)
        self.begin(scenario)
        verdict = Verdict()
        ended = run(scenario, self.world, self.out, Fault(memory=int(rng.uniform(0, 12) * 2**20)))
        if ended.code != 0:
            verdict.hit("out of memory")
            # 7: of several videos one was too large, the next found room again
            self.look(verdict, ended, "out of memory", _ends_of_libraries(ended) or [4, 7])
        self.finish(verdict, scenario)
        return verdict

    def dead_worker(self, scenario: Scenario, rng: random.Random) -> Verdict:
        """One of the processes that decode clips is killed, as the system does when memory is short."""
        _, whole, _ = self.reference(scenario)
        self.begin(scenario)
        verdict = Verdict()
        fault = Fault(signal=signal.SIGKILL, seconds=rng.uniform(0, whole.seconds / 2), helper=True)
        ended = run(scenario, self.world, self.out, fault, "--num_workers", "2")
        if ended.code != 0:
            verdict.hit("worker killed")
            self.look(verdict, ended, "worker killed", [2])
        self.finish(verdict, scenario)
        return verdict

    def damaged_shard(self, scenario: Scenario, rng: random.Random) -> Verdict:
        """A file of what was encoded before is cut off, emptied, or has another header."""
        self.reference(scenario)
        self.begin(scenario)
        verdict = Verdict()
        run(scenario, self.world, self.out, Fault())
        path = rng.choice(sorted((self.out / "encoded").rglob("*.safetensors")))
        content = bytearray(path.read_bytes())
        match rng.choice(["cut", "empty", "header"]):
            case "cut":
                content = content[: rng.randrange(1, len(content))]
            case "empty":
                content = bytearray()
            case "header":
                place = rng.randrange(8)
                content[place] ^= 1 + rng.randrange(255)
        path.write_bytes(content)
        verdict.hit("shard damaged")
        self.finish(verdict, scenario)
        return verdict


KINDS: dict[str, tuple[str, int]] = {  # method: which scenarios, how many trials of 20
    "kills": ("", 11),
    "full_disk": ("", 2),
    "file_limit": ("", 2),
    "read_only": ("", 1),
    "memory": ("", 2),
    "dead_worker": ("precompute", 1),
    "damaged_shard": ("precompute", 1),
}


# ---- the campaign


def preload(scenarios: Sequence[Scenario]) -> None:
    """Import here what a run imports, so that children begin at once with the work."""
    modules = ["torch.utils.tensorboard", "shared.training", "cogvideo_ar.training.recipes",
               "cogvideox_diff.training.recipes", "tests.shared.clip_files"]  # fmt: skip
    packages = {scenario.package for scenario in scenarios}
    if packages - {"cogvideo_ar"}:
        modules.append("transformers.models.t5.modeling_t5")
    for package in packages - {"benchmarks"}:
        modules += [f"{package}.pipeline", f"{package}.training.tuning"]
    if "benchmarks" in packages:
        modules += ["benchmarks.engines", "benchmarks.report", "cogvideo_ar.pipeline"]
    modules += [f"{scenario.package}.commands.{scenario.words[0]}" for scenario in scenarios]
    for module in modules:
        importlib.import_module(module)
    import torch

    torch.set_num_threads(1)
    torch.empty(2, 2, device="meta").to(torch.float16).contiguous()  # brings what knows shapes


def schedule(trials: int, scenarios: Sequence[Scenario], kinds: Sequence[str]) -> list[tuple[str, Scenario]]:
    """Which trial is of what kind and scenario: the same for every call, all scenarios alike often."""
    turns = [kind for kind in kinds for _ in range(KINDS[kind][1])]
    plan, used = [], {kind: 0 for kind in kinds}
    random.Random(0).shuffle(turns)
    for number in range(trials):
        kind = turns[number % len(turns)]
        able = [s for s in scenarios if s.name.startswith(KINDS[kind][0])]
        if able:
            plan.append((kind, able[used[kind] % len(able)]))
            used[kind] += 1
    return plan


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    hits: dict[str, int] = {}
    by_verb: dict[str, int] = {}
    for row in rows:
        for fault, count in row["hits"].items():
            hits[fault] = hits.get(fault, 0) + count
            if fault in SIGNALS:
                by_verb[row["scenario"]] = by_verb.get(row["scenario"], 0) + count
    wrong = [one for row in rows for one in row["wrong"]]
    return {
        "trials": len(rows),
        "hits": dict(sorted(hits.items())),
        "kills": sum(by_verb.values()),
        "kills_by_verb": dict(sorted(by_verb.items())),
        "lost": sum(one.startswith("lost") for one in wrong),
        "half_written": sum("half-written" in one for one in wrong),
        "tracebacks": sum("traceback" in one for one in wrong),
        "wrong": len(wrong),
    }


def table(paths: Sequence[Path]) -> str:
    """Several campaigns as Markdown: every fault, how often it hit, and what was wrong afterwards."""
    rows = [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    words = {name: f"{name}, at a random moment or before a random file operation" for name in SIGNALS}
    lines = ["| fault | injected | results lost | half-written files | tracebacks |", "|---|---|---|---|---|"]
    for fault in dict.fromkeys([*SIGNALS, *sorted({fault for row in rows for fault in row["hits"]})]):
        hit = [row for row in rows if row["hits"].get(fault)]
        wrong = [one for row in hit for one in row["wrong"]]
        counts = [sum(word in one for one in wrong) for word in ("lost: ", "half-written", "traceback")]
        count = sum(row["hits"][fault] for row in hit)
        lines.append(f"| {words.get(fault, fault)} | {count} | " + " | ".join(map(str, counts)) + " |")
    by_verb = summary(rows)["kills_by_verb"]
    verbs = ", ".join(f"{name} {count}" for name, count in by_verb.items())
    return "\n".join([*lines, "", f"Signals by command, {sum(by_verb.values())} in all: {verbs}.", ""])


def inject(
    trials: int,
    folder: Path,
    names: Sequence[str] = (),
    kinds: Sequence[str] = (),
    seed: int = 0,
    again: bool = False,
) -> dict[str, Any]:
    """Run the trials that FOLDER/faults.json does not hold yet, with `again` those that went wrong too, whose
    rows keep what was wrong before; returns the file's content."""
    from shared.files import write_json

    chosen = [s for s in SCENARIOS if not names or any(s.name.startswith(name) for name in names)]
    folder, target = folder.resolve(), folder / "faults.json"
    rows = json.loads(target.read_text(encoding="utf-8"))["rows"] if target.exists() else []
    campaign = Campaign(folder / "world", folder / "out")
    wanted = list(kinds or KINDS)
    if not may_mount(folder / "disk"):
        wanted = [kind for kind in wanted if kind not in ("full_disk", "read_only")]
    preload(chosen)
    prepare(campaign.world, {scenario.start for scenario in chosen})
    for number, (kind, scenario) in enumerate(schedule(trials, chosen, wanted)):
        earlier = rows[number] if number < len(rows) else {}
        if earlier and not (again and earlier["wrong"]):
            continue
        verdict = getattr(campaign, kind)(scenario, random.Random(f"{seed}/{number}"))
        row = {"kind": kind, "scenario": scenario.name, **vars(verdict)}
        if earlier:
            row["before"] = earlier["wrong"]
        rows[number : number + 1] = [row]
        write_json(target, {"summary": summary(rows), "seed": seed, "rows": rows})
    return json.loads(target.read_text(encoding="utf-8"))


def prepare(world: Path, starts: Collection[str]) -> None:
    """Make the world in a process of its own, unless it is there."""
    if (world / "done").exists() and all((world / start).exists() for start in starts):
        return
    shutil.rmtree(world, ignore_errors=True)
    child = os.fork()
    if child == 0:
        try:
            make_world(world, starts)
            (world / "done").touch()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    if not (world / "done").exists():
        raise RuntimeError("the tiny models could not be made")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=160)
    parser.add_argument("--output_path", type=Path, default=Path("out/faults"))
    parser.add_argument("--scenarios", nargs="+", default=[], help="beginnings of names; default: all")
    parser.add_argument("--kinds", nargs="+", default=[], choices=tuple(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", action="store_true", help="run those that went wrong once more")
    parser.add_argument("--table", nargs="+", type=Path, help="say what these faults.json hold, and stop")
    options = parser.parse_args(argv)
    if options.table:
        print(table(options.table))
        return 0
    result = inject(
        options.trials, options.output_path, options.scenarios, options.kinds, options.seed, options.again
    )
    print(json.dumps(result["summary"], indent=1))
    return 1 if result["summary"]["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
