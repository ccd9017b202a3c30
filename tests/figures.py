"""The errors that comparisons observe, kept where the environment variable PARITY_FIGURES names a file.

A line of JSON per figure: the test, what was compared, the error, the bound, and whether the error is
relative to the largest wanted value. `python -m tests.figures FILE` prints the tables of docs/parity.md.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Figure = dict[str, Any]
WANTED = "PARITY_FIGURES" in os.environ


def record_figure(what: str, error: float, bound: float, *, relative: bool = True) -> None:
    """Append one figure of the running test; nothing where none are wanted."""
    path = os.environ.get("PARITY_FIGURES")
    if not path:
        return
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
    figure = {"test": test, "what": what, "error": error, "bound": bound, "relative": relative}
    with Path(path).open("a", encoding="utf-8") as file:  # one write, so that test processes do not mix
        file.write(json.dumps(figure) + "\n")


def recording(assert_close: Callable[..., None]) -> Callable[..., None]:
    """`torch.testing.assert_close` that also records the largest absolute error of two tensors."""

    def compare(actual: Any, expected: Any, *args: Any, **options: Any) -> None:
        assert_close(actual, expected, *args, **options)
        if isinstance(expected, Tensor) and expected.is_floating_point() and expected.numel():
            finite = torch.isfinite(expected)
            gap = (actual.double() - expected.double())[finite].abs()
            error = gap.max().item() if gap.numel() else 0.0
            record_figure("", error, float(options.get("atol") or 0.0), relative=False)

    return compare


# ---- the tables

GROUPS = {
    "diffusers 0.42.1 live": ("relative", lambda f: "peers" in f["test"] or "diffusers" in f["test"]),
    "Recorded CogVideoX cases": ("relative", lambda f: "/cogvideox" in f["test"]),
    "Recorded CogVideo, icetk and CogView2 cases": ("absolute", lambda f: True),
}


def tables(figures: Iterable[Figure]) -> list[str]:
    """Markdown lines: per group a table with the worst error of every comparison."""
    left, lines = list(figures), []
    for title, (kind, belongs) in GROUPS.items():
        own = [f for f in left if belongs(f)]
        left = [f for f in left if not belongs(f)]
        if own:
            lines += [f"## {title}", "", f"| compared | worst {kind} error | bound | cases | test |"]
            lines += ["|---|---|---|---|---|", *_rows(own), ""]
    return lines


def _rows(figures: list[Figure]) -> list[str]:
    worst: dict[tuple[str, str], list[Figure]] = {}
    for figure in figures:
        path, _, name = figure["test"].partition("::")
        function = name.partition("[")[0]
        label = figure["what"] or function.removeprefix("test_").replace("_", " ")
        worst.setdefault((label, f"{path.removeprefix('tests/')}::{function}"), []).append(figure)
    return [
        f"| {label} | {max(f['error'] for f in some):.1e} | {max(f['bound'] for f in some):.0e} "
        f"| {len(some)} | `{test}` |"
        for (label, test), some in sorted(worst.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def read_figures(path: Path) -> list[Figure]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    sys.stdout.write("\n".join(tables(read_figures(Path(sys.argv[1])))) + "\n")
