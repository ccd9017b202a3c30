"""The suite runs without a network, and imports look at nothing but code."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.families import ROOT

ELSEWHERE = "192.0.2.1"  # of a block of addresses that belong to nobody
PACKAGES = ("shared", "cogvideo_ar", "cogvideox_diff", "benchmarks")
SECONDS = 1.5  # of a processor, beyond what torch takes

WATCH = """
import importlib, json, os, pkgutil, sys
import torch
root, packages, outside = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")
for name in outside:
    importlib.import_module(name)
found = []
plumbing = ("<frozen", os.__file__, os.path.dirname(os.__file__) + os.sep)

def culprit():
    '''The innermost caller that is neither the import system nor the standard library.'''
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(plumbing) or "site-packages" in file:
            return file
        frame = frame.f_back
    return ""

def ours(file):
    return any(file.startswith(os.path.join(root, package) + os.sep) for package in packages)

def hook(event, given):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "socket.connect", "subprocess.Popen"):
        what, file = str(given[0]), culprit()
        if ours(file) and not (ours(what) and what.endswith((".py", ".pyc"))) and not ours(what + os.sep):
            if "__pycache__" not in what:
                found.append([file, event, what])

class Watched(type(os.environ)):
    def __getitem__(self, key):
        if ours(culprit()):
            found.append([culprit(), "environment", key])
        return super().__getitem__(key)
    def __contains__(self, key):
        if ours(culprit()):
            found.append([culprit(), "environment", key])
        return super().__contains__(key)

os.environ.__class__ = Watched
sys.addaudithook(hook)
count = 0
for package in packages:
    top = importlib.import_module(package)
    for module in pkgutil.walk_packages(top.__path__, package + "."):
        if not module.name.endswith("__main__") and module.name not in json.loads(sys.argv[4]):
            importlib.import_module(module.name)
            count += 1
print(json.dumps({"found": found, "count": count}))
"""


MEASURE = """
import importlib, json, os, sys, time
import torch
found = {}
for name in sys.argv[1:]:
    reader, writer = os.pipe()
    if os.fork() == 0:
        began = time.process_time()
        importlib.import_module(name)
        os.write(writer, str(time.process_time() - began).encode())
        os._exit(0)
    os.wait()
    os.close(writer)
    found[name] = float(os.read(reader, 99))
print(json.dumps(found))
"""


def python(code: str, *words: str, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- sockets


@pytest.mark.parametrize("host", [ELSEWHERE, "2001:db8::1", "example.invalid"])
def test_no_test_can_reach_another_machine(host: str) -> None:
    with pytest.raises(OSError, match="tests run without a network"):
        socket.create_connection((host, 9), timeout=1)


def test_nor_can_a_process_that_a_test_starts() -> None:
    code = (
        f"import socket\ntry: socket.create_connection(({ELSEWHERE!r}, 9), 1)\nexcept OSError as e: print(e)"
    )
    assert "tests run without a network" in python(code)


def test_this_machine_can_talk_to_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()[:2], timeout=5):
            assert server.accept()
        socket.getaddrinfo("localhost", 0)
        socket.getaddrinfo(socket.gethostname(), 0)


# ---- imports


def optional() -> list[str]:
    """Modules that need an extra."""
    return ["benchmarks.peers.diffusion", "benchmarks.peers.generator"]


def test_importing_reads_no_environment_and_no_file_but_code() -> None:
    outside = "numpy,safetensors.torch,sentencepiece,transformers,av,imageio.v3,PIL.Image,tqdm,jinja2"
    outside += ",matplotlib.pyplot,torch.utils.tensorboard,torch.distributed.fsdp,torch.utils.data"
    said = json.loads(python(WATCH, str(ROOT), ",".join(PACKAGES), outside, json.dumps(optional())))
    assert said["count"] > 100
    assert said["found"] == []


def test_an_import_that_looks_around_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "nosy").mkdir()
    code = "import os\nos.environ.get('HOME')\n'X' in os.environ\nopen('/etc/hostname')\nos.listdir('/')\n"
    (tmp_path / "nosy" / "__init__.py").write_text(code)
    found = json.loads(python(WATCH, str(tmp_path), "nosy", "json", "[]", cwd=tmp_path))["found"]
    assert [event for _, event, _ in found] == ["environment", "environment", "open", "os.listdir"]


def test_importing_is_quick() -> None:
    """Each in a process that has imported torch and nothing else; time of the processor, the best of three,
    since the machine may be busy with other tests."""
    modules = [*PACKAGES, *(f"{package}.__main__" for package in (*PACKAGES[1:], "shared.clips"))]
    modules += ["cogvideo_ar.pipeline", "cogvideox_diff.pipeline", "benchmarks.runner", "benchmarks.report"]
    modules += ["shared.training", "cogvideo_ar.training.recipes", "cogvideox_diff.training.recipes"]
    slow: dict[str, float] = dict.fromkeys(modules, 0.0)
    for _ in range(3):
        seconds = json.loads(python(MEASURE, *slow))
        assert seconds.keys() == slow.keys()
        if not (slow := {name: taken for name, taken in seconds.items() if taken > SECONDS}):
            break
    assert slow == {}


@pytest.mark.parametrize("package", [*PACKAGES[1:], "shared.clips"])
def test_help_does_not_wait_for_torch(package: str) -> None:
    code = f"import sys, {package}.__main__ as m\ntry: m.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    assert python(code).splitlines()[-1] == "False"


def test_what_a_test_inherits_says_so() -> None:
    assert str(Path(__file__).parents[1] / "offline") in os.environ["PYTHONPATH"].split(os.pathsep)
