"""The verb `plan` of both families: every rung is a command that `generate` takes, a device is refused just
where none fits, and no weights are read."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from cogvideo_ar.__main__ import PROGRAM as COGVIDEO
from cogvideo_ar.commands.plan import NAMES as COGVIDEO_NAMES
from cogvideox_diff.__main__ import PROGRAM as COGVIDEOX
from cogvideox_diff.commands.plan import NAMES as COGVIDEOX_NAMES
from shared.verbs import Program

MODELS = [(COGVIDEO, name) for name in COGVIDEO_NAMES] + [(COGVIDEOX, name) for name in COGVIDEOX_NAMES]


def planned(program: Program, capsys: Any, *words: str) -> dict:
    code = program.main(["plan", *words, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == code
    return found


@pytest.mark.parametrize(("program", "name"), MODELS, ids=lambda x: getattr(x, "name", x))
def test_rungs_and_refusals(program: Program, name: str, capsys: Any):
    parser = program.parser("generate")
    lowest = None
    for device, memory in (("h200", 100), ("l4", 16), ("cpu", 2), ("l4", 0.001), ("cpu", 0.001)):
        found = planned(program, capsys, "--preset", name, "--device", device, "--memory", str(memory))
        for rung in found["ladder"]:
            words = shlex.split(rung["flags"])
            parser.parse_args(["generate", "--prompt", "a", *words])
            assert rung["fits"] == (rung["peak_bytes"] <= memory * 2**30)
        fits = [rung["fits"] for rung in found["ladder"]]
        assert found["ok"] == fits[-1] and not any(fits[:-1])
        assert found["exit_code"] == (0 if found["ok"] else 4)
        assert found["peak_bytes"] == max(stage["peak_bytes"] for stage in found["stages"])
        assert found["disk"]["weights_bytes"] > 0 and found["seconds"] > 0
        lowest = found if memory == 0.001 else lowest
    assert lowest is not None and not lowest["ok"] and "nothing fits" in lowest["reason"]


def test_a_refusal_is_a_line_and_code_4(capsys: Any):
    for program, name in ((COGVIDEO, "cogvideo"), (COGVIDEOX, "cogvideox-5b")):
        assert program.main(["plan", "--preset", name, "--device", "l4", "--memory", "0.5"]) == 4
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("program", [COGVIDEO, COGVIDEOX], ids=lambda program: program.name)
def test_no_weights_are_read(program: Program, tmp_path: Path, root: Path, capsys: Any):
    """The plan of a folder that has lost them is that of the whole one."""
    demo = root / program.package / "demo"
    folder = shutil.copytree(demo, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    plans = [
        planned(program, capsys, "--model_path", str(path), "--device", "l4") for path in (demo, Path(folder))
    ]
    for plan in plans:
        plan["settings"].pop("model")
    assert plans[0] == plans[1]
