"""The architecture as a picture that is drawn from the code: who imports whom, and what data go through.

Every arrow is an import statement that `ast` finds, but for those of annotations alone; what follows from
other arrows is not drawn. A row imports only from rows below it (those in a circle share a row). The stages
at the top are those that the pipelines time. Families are drawn module by module, their subfolders as one
box; of `shared` and `benchmarks` there is a list.

Run: python examples/draw_architecture.py [--output_path docs/architecture.svg]
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {"cogvideo_ar": "CogVideo (2022)", "cogvideox_diff": "CogVideoX (2024)"}
LISTED = {"benchmarks": "the comparison", "shared": "what is the same in both; knows no family"}
STAGE_FILES = {"cogvideo_ar": ("pipeline.py", "stages.py"), "cogvideox_diff": ("generation.py",)}
FIRST, LAST = ("text", "encode"), ("decode",)  # whatever line they stand on
LEFT_OUT = {"__init__", "__main__"}
COLOURS = {
    "cogvideo_ar": "#2f6f9f",
    "cogvideox_diff": "#a1501f",
    "benchmarks": "#5b4b8a",
    "shared": "#3d6b4f",
}
WIDTH, MARGIN, GAP = 1500, 24, 26
BOX, ROW, CHAR = 22, 50, 6.5  # heights of a box and of a row, width of a letter

Graph = dict[str, set[str]]


# ---- what the code says


def modules(package: str) -> dict[str, list[Path]]:
    """Names in the picture and their files: a module, or a subfolder as a whole."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        inside = path.relative_to(ROOT / package)
        if len(inside.parts) > 1:
            found.setdefault(f"{inside.parts[0]}/", []).append(path)
        elif path.stem not in LEFT_OUT:
            found[path.stem] = [path]
    return found


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, at its top or in a function."""
    return set(_names(ast.parse(path.read_text(encoding="utf-8")).body))


def _names(body: Iterable[ast.AST]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from _names(ast.iter_child_nodes(node))


def graph(package: str) -> Graph:
    """Who imports whom within a package."""
    members = modules(package)
    links: Graph = {}
    for box, files in members.items():
        homes = {_home(name, package, members) for path in files for name in imported(path)}
        links[box] = homes - {box, ""}
    return links


def _home(full: str, package: str, members: Mapping[str, object]) -> str:
    """The box that an imported name lives in, or ""."""
    parts = full.split(".")
    if parts[0] != package or len(parts) < 2:
        return ""
    return next((name for name in (f"{parts[1]}/", parts[1]) if name in members), "")


def counted(package: str, other: str) -> int:
    """How many files of a package import from another one."""
    files = [path for files in modules(package).values() for path in files]
    return sum(any(name.split(".")[0] == other for name in imported(path)) for path in files)


def reduced(links: Graph) -> Graph:
    """Without the arrows that follow from others."""
    shorter: Graph = {}
    for name, below in links.items():
        further = {
            one: set().union(*(reach(links, other, {name}) for other in below - {one})) for one in below
        }
        shorter[name] = {one for one in below if one not in further[one]}
    return shorter


def reach(links: Graph, start: str, without: Iterable[str] = ()) -> set[str]:
    seen, waiting = set(without), [start]
    while waiting:
        for one in links[waiting.pop()] - seen:
            seen.add(one)
            waiting.append(one)
    return seen - set(without)


def levels(links: Graph) -> dict[str, int]:
    """Rows from the bottom: a module stands above all that it imports; of a circle, all in one row."""
    reached = {name: reach(links, name) for name in links}
    circles = {name: frozenset({name, *(o for o in reached[name] if name in reached[o])}) for name in links}
    height: dict[frozenset[str], int] = {}

    def of(circle: frozenset[str]) -> int:
        if circle not in height:
            below = {circles[one] for name in circle for one in links[name]} - {circle}
            height[circle] = max((of(one) + 1 for one in below), default=0)
        return height[circle]

    return {name: of(circles[name]) for name in links}


def stages(package: str) -> list[str]:
    """What a pipeline times: literal names in calls of `stage` and `_stage`, in the order of the code."""
    found: list[str] = []
    for file in STAGE_FILES[package]:
        tree = ast.parse((ROOT / package / file).read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
            words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if getattr(call.func, "attr", "") in ("stage", "_stage") and words:
                found.append(words[0].removeprefix("model/"))
    order = {word: number for number, word in enumerate(FIRST)} | dict.fromkeys(LAST, 3)
    return sorted(dict.fromkeys(found), key=lambda word: order.get(word, 2))


# ---- the picture


@dataclass(frozen=True, kw_only=True)
class Box:
    x: float
    y: float
    width: float
    text: str

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


def placed(links: Graph, left: float, top: float, width: float) -> tuple[dict[str, Box], float]:
    """Boxes in rows, each near the mean of those above that import it; and the height they take."""
    height = levels(links)
    boxes: dict[str, Box] = {}
    y = top
    for level in sorted(set(height.values()), reverse=True):
        row = sorted(name for name in links if height[name] == level)
        above = {name: [box.middle for one, box in boxes.items() if name in links[one]] for name in row}
        row.sort(key=lambda name: sum(above[name]) / len(above[name]) if above[name] else left + width / 2)
        for line in _lines(row, width):
            boxes |= _spread(line, left, y, width)
            y += ROW - (0 if line[-1] == row[-1] else 18)
    return boxes, y - top


def _spread(line: Sequence[str], left: float, y: float, width: float) -> dict[str, Box]:
    """Boxes with equal space around them."""
    space = (width - sum(map(_width, line))) / (len(line) + 1)
    found, x = {}, left + space
    for name in line:
        found[name] = Box(x=x, y=y, width=_width(name), text=name)
        x += _width(name) + space
    return found


def _lines(row: Sequence[str], width: float) -> Iterator[list[str]]:
    """A row that is too wide, in several."""
    line: list[str] = []
    for name in row:
        if line and sum(_width(n) + 14 for n in [*line, name]) > width:
            yield line
            line = []
        line.append(name)
    yield line


def _width(name: str) -> float:
    return len(name) * CHAR + 14


def arrows(links: Graph, boxes: Mapping[str, Box], colour: str) -> Iterator[str]:
    for name, below in sorted(reduced(links).items()):
        for one in sorted(below):
            (x, y), (x1, y1) = (
                (boxes[name].middle, boxes[name].y + BOX),
                (boxes[one].middle, boxes[one].y - 4),
            )
            bend = max(14.0, (y1 - y) / 2)
            path = f"M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {x1:.0f} {y1 - bend:.0f} {x1:.0f} {y1:.0f}"
            yield f'<path d="{path}" stroke="{colour}" marker-end="url(#tip)"/>'


def box_of(box: Box, colour: str) -> str:
    weight = ' font-weight="bold"' if box.text.endswith("/") else ""
    return (
        f'<rect x="{box.x:.0f}" y="{box.y:.0f}" width="{box.width:.0f}" height="{BOX}" rx="4" fill="#fff" '
        f'stroke="{colour}"/><text x="{box.middle:.0f}" y="{box.y + 15:.0f}" text-anchor="middle"{weight}>'
        f"{escape(box.text)}</text>"
    )


def flow(package: str, left: float, top: float, width: float) -> Iterator[str]:
    """Prompt to file through the stages that are timed, in as many lines as it takes."""
    timed, x, y = stages(package), left, top
    words = ["prompt", *timed, "shared.Video", "file"]
    for word in words:
        if x + _width(word) > left + width:
            x, y = left + 24, y + BOX + 6
        fill, ink = (COLOURS[package], "#fff") if word in timed else ("#e6e6e6", "#222")
        if word != words[0]:
            yield f'<path d="M{x - 18:.0f} {y + 11:.0f}H{x - 4:.0f}" stroke="#555" marker-end="url(#tip)"/>'
        size = f'width="{_width(word):.0f}" height="{BOX}"'
        yield f'<rect x="{x:.0f}" y="{y:.0f}" {size} rx="11" fill="{fill}"/>'
        middle = x + _width(word) / 2
        yield f'<text x="{middle:.0f}" y="{y + 15:.0f}" text-anchor="middle" fill="{ink}">{word}</text>'
        x += _width(word) + 20


def panel(title: str, left: float, top: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height:.0f}" rx="8" '
        f'fill="{colour}" fill-opacity="0.06" stroke="{colour}" stroke-opacity="0.5"/>'
        f'<text x="{left + 12:.0f}" y="{top + 20:.0f}" font-size="14" font-weight="bold" fill="{colour}">'
        f"{escape(title)}</text>"
    )


def listed(package: str, left: float, top: float, width: float) -> tuple[list[str], float]:
    """A package's modules in lines, without arrows."""
    out, y = [], top
    for line in _lines(sorted(modules(package)), width):
        x = left
        for name in line:
            out.append(box_of(Box(x=x, y=y, width=_width(name), text=name), COLOURS[package]))
            x += _width(name) + 8
        y += BOX + 8
    return out, y - top


def draw() -> str:
    """The whole picture as SVG."""
    inner = WIDTH - 2 * MARGIN
    parts, top = _list_panel("benchmarks", MARGIN, inner)
    half, top = (inner - GAP) / 2, top + 34
    drawn: list[str] = []
    depth = 0.0
    lefts = {package: MARGIN + number * (half + GAP) for number, package in enumerate(FAMILIES)}
    for package, left in lefts.items():
        links = graph(package)
        drawn += flow(package, left + 12, top + 32, half - 24)
        boxes, tall = placed(links, left, top + 106, half)
        drawn += [
            *arrows(links, boxes, COLOURS[package]),
            *(box_of(b, COLOURS[package]) for b in boxes.values()),
        ]
        depth = max(depth, 106 + tall - ROW + BOX + 14)
    for package, left in lefts.items():
        parts.append(panel(f"{package}: {FAMILIES[package]}", left, top, half, depth, COLOURS[package]))
        parts += between(left + half / 2, top - 30, "benchmarks/registry.py alone names it")
        parts += between(
            left + half / 2, top + depth + 2, f"{counted(package, 'shared')} files import from shared"
        )
    lists, height = _list_panel("shared", top + depth + 34, inner)
    return "\n".join([_head(height + MARGIN), *parts, *drawn, *lists, "</svg>", ""])


def _list_panel(package: str, top: float, width: float) -> tuple[list[str], float]:
    """A package as a list, and where it ends."""
    boxes, tall = listed(package, MARGIN + 12, top + 32, width - 24)
    title = panel(f"{package}: {LISTED[package]}", MARGIN, top, width, tall + 38, COLOURS[package])
    return [title, *boxes], top + tall + 38


def between(x: float, y: float, words: str) -> list[str]:
    """An arrow from one panel to the next."""
    return [
        f'<path d="M{x:.0f} {y:.0f}V{y + 26:.0f}" stroke="#555" marker-end="url(#tip)"/>',
        f'<text x="{x + 8:.0f}" y="{y + 17:.0f}" fill="#555">{escape(words)}</text>',
    ]


def _head(height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="11" fill="#222">\n'
        '<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" '
        'orient="auto"><path d="M0 0L6 3L0 6z" fill="#555"/></marker>'
        "<style>path{fill:none;stroke-opacity:.45}marker path{fill:#555}</style></defs>\n"
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>'
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_path", type=Path, default=ROOT / "docs" / "architecture.svg")
    options = parser.parse_args(argv)
    options.output_path.parent.mkdir(parents=True, exist_ok=True)
    options.output_path.write_text(draw(), encoding="utf-8")
    print(options.output_path)


if __name__ == "__main__":
    main()
