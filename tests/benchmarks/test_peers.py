"""The comparison with peers: what is measured, kept, written into the page and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.environment import environment
from benchmarks.peers import rows
from benchmarks.peers.harness import Case, Pair, measure, relative_difference
from shared.errors import SettingError


def spend(size: int) -> torch.Tensor:
    x = torch.ones(size, size)
    for _ in range(20):
        x = x @ x / size
    return x


def fake(name: str, peer: int = 200, kind: str = "time") -> Case:
    return Case(
        name=name,
        words="",
        build=lambda: Pair(ours=lambda: spend(50), peer=lambda: spend(peer), difference=lambda: 0.5),
        kind=kind,  # type: ignore[arg-type]
    )


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(rows, "all_cases", lambda: {c.name: c for c in (fake("a/one"), fake("a/two", 10))})
    floors = tmp_path / "floors.json"
    floors.write_text('{"a/one": 1.5, "a/two": 1.0}')
    monkeypatch.setattr(rows, "FLOORS", floors)
    return tmp_path / "results"


def test_times_are_medians_of_rounds() -> None:
    row = measure(fake("x"), 3)
    assert row["rounds"] == 3 and row["difference"] == 0.5
    assert row["ratio"] == row["peer_cpu"] / row["ours_cpu"] > 1
    assert row["spread"][0] <= row["spread"][1]


def test_memory_is_what_tensors_hold_at_once() -> None:
    row = measure(fake("x", kind="memory"), 3)
    assert row["ratio"] == row["peer_bytes"] / row["ours_bytes"] == 16


def test_a_ratio_below_its_floor_ends_with_3(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["peers", "--repeats", "2", "--json", "--quiet", "--output_path", str(fakes)]
    assert main([*words, "--only", "a/one"]) == 0
    assert main(words) == 3
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(said["below_floor"]) == 1 and said["below_floor"][0].startswith("a/two: ratio 0.")
    kept = json.loads(Path(said["path"]).read_text())
    assert [row["name"] for row in kept["rows"]] == ["a/one", "a/two"]
    assert kept["threads"] == 1 and kept["environment"]["torch"] == torch.__version__


def test_a_part_of_the_devices_rate_below_its_floor_ends_with_3(
    fakes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, name = lambda: spend(50), "a/one"
    pair = Pair(ours=ours, peer=lambda: spend(200), facts={"floor_seconds": 1e-9})
    case = Case(name=name, words="", build=lambda: pair)
    monkeypatch.setattr(rows, "all_cases", lambda: {name: case})
    rows.FLOORS.write_text('{"a/one": 0.1, "a/one:of_floor": 0.8}')
    words = ["peers", "--repeats", "1", "--json", "--quiet", "--output_path", str(fakes)]
    assert main(words) == 3
    said = json.loads(capsys.readouterr().out.splitlines()[-1])["below_floor"]
    assert said == ["a/one: of_floor 0.00 is below its floor 0.80"]
    rows.FLOORS.write_text('{"a/one": 0.1, "a/one:of_floor": 1e-12}')
    assert main(words) == 0


def test_rows_are_kept_by_the_device_that_they_ran_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {**environment(), "processor": "Some CPU", "accelerator": "Some GPU"}
    monkeypatch.setattr(rows, "environment", lambda: machine)
    row = measure(fake("a/one"), 1)
    paths = [rows.keep({**row, "device": device}, 1, tmp_path) for device in ("cpu", "cuda")]
    assert [path.name[:10] for path in paths] == ["some-cpu-1", "some-gpu-1"]
    assert [json.loads(path.read_text())["device"] for path in paths] == ["Some CPU", "Some GPU"]


def test_page(fakes: Path, tmp_path: Path) -> None:
    rows.keep(measure(fake("a/one"), 1), 1, fakes)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{rows.START}\nold\n{rows.END}\nafter\n")
    assert main(["peers", "--page", str(page), "--output_path", str(fakes)]) == 0
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert "| a/one |" in text and "| 1.50 | 5.0e-01 |" in text and "wall" not in text
    rows.keep(measure(fake("a/one"), 1), 2, fakes)
    assert main(["peers", "--page", str(page), "--output_path", str(fakes)]) == 0
    assert "by the wall |" in page.read_text()


def test_an_installed_package_keeps_results_where_it_is_called(
    fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "benchmarks.commands.peers.__file__", str(tmp_path / "a/benchmarks/commands/peers.py")
    )
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "a" / "benchmarks" / "results")
    assert main(["peers", "--repeats", "1", "--quiet", "--only", "a/one"]) == 0
    assert not (tmp_path / "a").exists() and len(list((tmp_path / "out" / "peers").iterdir())) == 1


def test_names(fakes: Path) -> None:
    assert [case.name for case in rows.chosen_cases(["a/t"])] == ["a/two"]
    with pytest.raises(SettingError, match="row"):
        rows.chosen_cases(["b"])


@pytest.mark.parametrize("words", [["--repeats", "0"], ["--threads", "2"]])
def test_refusals(fakes: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert main(["peers", *words]) == 2


def test_every_floor_has_its_row() -> None:
    assert {name.removesuffix(":of_floor") for name in rows.floors()} <= set(rows.all_cases())


def test_relative_difference() -> None:
    assert relative_difference(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)
