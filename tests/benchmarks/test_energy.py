"""Energy by the machine's own counters, where there are any."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import energy, runner
from benchmarks.energy import Counter, EnergyMeter, nvml_counters, rapl_counters
from benchmarks.metrics import cost
from benchmarks.report import write_reports
from benchmarks.runner import run_suite
from benchmarks.storage import RunFolder, lasting, read_json
from benchmarks.suites import Suite, items
from tests.benchmarks.conftest import make_models


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """A machine with a package, its cores and its memory, and the whole board."""
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:0:1": "dram",
        "intel-rapl:1": "psys",
    }
    for folder, name in zones.items():
        (tmp_path / folder).mkdir()
        for file, value in (("name", name), ("energy_uj", 5_000_000), ("max_energy_range_uj", 9_000_000)):
            (tmp_path / folder / file).write_text(f"{value}\n", encoding="ascii")
    return tmp_path


def test_parts_are_not_counted_twice(powercap: Path) -> None:
    assert [c.name for c in rapl_counters(powercap)] == ["RAPL 0 package-0", "RAPL 0:1 dram"]
    assert rapl_counters(powercap / "none") == []


def test_rises_are_in_joules_and_survive_the_counters_end(powercap: Path) -> None:
    meter = EnergyMeter(counters=rapl_counters(powercap))

    def work() -> str:
        (powercap / "intel-rapl:0" / "energy_uj").write_text("7500000", encoding="ascii")
        (powercap / "intel-rapl:0:1" / "energy_uj").write_text("1000000", encoding="ascii")  # began anew
        return "done"

    result, rises = meter.measured(work)
    assert result == "done" and rises == {"RAPL 0 package-0": 2.5, "RAPL 0:1 dram": pytest.approx(5.0)}


def test_a_counter_that_may_not_be_read_is_none(powercap: Path) -> None:
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    assert [c.name for c in rapl_counters(powercap)] == ["RAPL 0:1 dram"]
    meter = EnergyMeter(counters=rapl_counters(powercap))
    (powercap / "intel-rapl:0:1" / "energy_uj").write_text("nonsense", encoding="ascii")
    assert meter.measured(lambda: 1) == (1, {})


def test_without_a_gpu_there_is_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert nvml_counters() == []


def test_a_video_has_its_energy_where_the_machine_counts_it(
    suite: Suite, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = [0.0]

    def read() -> float:
        spent[0] += 3.0
        return spent[0]

    meter = EnergyMeter(counters=(Counter(name="RAPL 0 package-0", read=read),))
    monkeypatch.setattr(runner, "energy_meter", lambda: meter)
    run_suite(suite, folder, build=make_models().__getitem__, quiet=True)
    sidecar = read_json(folder.videos("good") / f"{items(suite)[0].id}.json")
    assert sidecar["joules"] == {"RAPL 0 package-0": 3.0}
    assert cost.measure(sidecar)["joules_per_video"] == 3.0
    results = write_reports(folder)
    value = results["models"]["good"]["metrics"]["joules_per_video"]
    assert (value["value"], value["n"]) == (3.0, 3)
    assert "joules_per_video" not in str(lasting(results)["models"])  # it is never twice the same
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert "<dt>Energy</dt><dd>3.00 J</dd>" in page


def test_without_counters_nothing_is_claimed(reported: RunFolder) -> None:
    results = read_json(reported.path / "results.json")
    if energy.energy_meter().counters:
        pytest.skip("this machine counts energy")
    assert "joules_per_video" not in results["models"]["good"]["metrics"]
    assert "not reported" in results["recipe"]["environment"]["energy"]
