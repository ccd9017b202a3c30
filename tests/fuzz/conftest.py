"""The files that are damaged, and the count of what became of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.harness import Tally
from tests.fuzz.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """FUZZ_WORLD names a folder where it is made once and used again."""
    kept = os.environ.get("FUZZ_WORLD")
    if kept is None:
        return make_world(tmp_path_factory.mktemp("fuzz"))
    base = Path(kept)
    if (base / "scratch").is_dir():
        made = World(base / "world", base / "pristine", base / "scratch")
        made.restore()
        return made
    base.mkdir(parents=True)
    return make_world(base)


@pytest.fixture(scope="session")
def tally() -> Iterator[Tally]:
    """Fails at the end where a campaign met a fault."""
    found = Tally()
    yield found
    if path := os.environ.get("FUZZ_FIGURES"):
        found.write(Path(path))
    assert not found.faults, "\n\n".join(
        f"{n} x {place}\n{first}" for place, (n, first) in found.faults.items()
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise ConnectionRefusedError(111, "no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
