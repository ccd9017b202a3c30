"""All rows of the comparison, the lowest ratio that each may fall to, and where results are kept."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.peers.harness import Case, clock_of
from benchmarks.suites import one_of
from shared.errors import SettingError
from shared.files import write_json

MODULES = ("diffusion", "processes", "ar", "gpu")
FLOORS = Path(__file__).resolve().parents[1] / "floors.json"
RESULTS = Path(__file__).resolve().parents[1] / "results"


def all_cases() -> dict[str, Case]:
    """Every row by name."""
    names = [name for name in MODULES if importlib.util.find_spec(f"benchmarks.peers.{name}")]
    found = [importlib.import_module(f"benchmarks.peers.{name}").cases() for name in names]
    return {case.name: case for cases in found for case in cases}


def chosen_cases(names: Sequence[str]) -> list[Case]:
    """The rows whose names are, or begin with, one of `names`, without those that need a GPU where there is
    none; all of them for no name. SettingError for a name that is nothing's beginning."""
    cases = all_cases()
    for name in names:
        if not any(known.startswith(name) for known in cases):
            one_of("row", name, list(cases))
    wanted = [case for known, case in cases.items() if not names or known.startswith(tuple(names))]
    return [case for case in wanted if case.device == "cpu" or torch.cuda.is_available()]


def floors() -> dict[str, float]:
    """The ratio that a row must reach, and under NAME:of_floor the part of the device's own rate; a row
    without one is only told."""
    return json.loads(FLOORS.read_text(encoding="utf-8"))


def too_slow(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line on every row below its floor."""
    lowest = floors()
    return [
        f"{row['name']}: {figure} {row[figure]:.2f} is below its floor {lowest[key]:.2f}"
        for row in rows
        for figure, key in (("ratio", row["name"]), ("of_floor", f"{row['name']}:of_floor"))
        if key in lowest and row[figure] < lowest[key]
    ]


def keep(row: dict[str, Any], threads: int, folder: Path = RESULTS) -> Path:
    """Put the row into the file of its device and this day; one of the same name there is replaced."""
    machine, now = environment(), datetime.now(UTC)
    device = machine["processor" if row["device"] == "cpu" else "accelerator"]
    path = folder / f"{_file_name(device)}-{threads}t-{now:%Y-%m-%d}.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    by_name = {row["name"]: row for row in [*known, row]}
    folder.mkdir(parents=True, exist_ok=True)
    ordered = [by_name[name] for name in sorted(by_name)]
    write_json(
        path,
        {"device": device, "threads": threads, "date": f"{now:%Y-%m-%d}", **_kept(machine), "rows": ordered},
    )
    return path


def _kept(machine: dict[str, Any]) -> dict[str, Any]:
    return {"environment": {key: machine[key] for key in ("python", "torch", "system", "processor", "cores")}}


def _file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


# ---- the page

START, END = "<!-- results: written by `cogvideo-bench peers --page` -->", "<!-- end of results -->"


def write_page(page: Path, folder: Path = RESULTS) -> None:
    """Replace what stands between the marks of `page` by tables of the newest results of every device."""
    try:
        before, mark, rest = page.read_text(encoding="utf-8").partition(START)
    except ValueError as error:
        raise SettingError(f"{page} is no page of text: {error}") from error
    if not mark:
        raise SettingError(f"{page} has no place for the results: the line {START}")
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: (path.stem[-10:], path.stem)):
        result = json.loads(path.read_text(encoding="utf-8"))
        newest[result["device"], result["threads"]] = result
    after = rest.partition(END)[2]
    tables = "\n".join(_table(result) for result in newest.values())
    page.write_text(f"{before}{START}\n\n{tables}\n{END}{after}", encoding="utf-8")


def _table(result: dict[str, Any]) -> str:
    """The rows of a device; where torch has several threads also by the wall, which tells what of the CPU's
    time went by at once."""
    lowest, several = floors(), result["threads"] > 1
    head = ["row", "ours", "peer", "peer / ours (least .. most of a round)", "floor", "difference"]
    head += ["peer / ours by the wall"] if several else []
    lines = [
        f"**{result['device']}**, {result['threads']} thread(s), {result['date']}, torch "
        f"{result['environment']['torch']}:",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for row in result["rows"]:
        floor = lowest.get(row["name"])
        spread = " ({:.2f} .. {:.2f})".format(*row["spread"]) if "spread" in row else ""
        cells = [
            row["name"],
            amount(row, "ours"),
            amount(row, "peer"),
            f"**{row['ratio']:.2f}**{spread}",
            "" if floor is None else f"{floor:.2f}",
            f"{row['difference']:.1e}" if "difference" in row else "",
            *(
                [f"{row['peer_wall'] / row['ours_wall']:.2f}" if "ours_wall" in row else ""]
                if several
                else []
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def amount(row: dict[str, Any], side: str) -> str:
    """What one side took, with its unit; of ours also the part that reading memory must take, if known."""
    if row["kind"] == "memory":
        return f"{row[f'{side}_bytes'] / 2**20:.0f} MiB"
    seconds = row[f"{side}_{clock_of(row)}"]
    words = f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"
    return f"{words} ({row['of_floor']:.0%})" if side == "ours" and "of_floor" in row else words
