"""What every test starts from: one torch thread, fixed seeds, and no way to another machine.

Neither tests nor processes that they start can open a socket to anywhere but this machine.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import figures
from tests.offline import sitecustomize

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    offline = str(Path(sitecustomize.__file__).parent)  # imported above, and by every Python that starts
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([offline, *path]))
    torch.set_num_threads(1)  # two test processes share two cores, and sums keep their order


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The same start for tests that draw from a global generator; models and pipelines take their own."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def kept_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that a parity test observes are kept, where that is asked for."""
    if figures.WANTED and request.node.get_closest_marker("parity"):
        monkeypatch.setattr(torch.testing, "assert_close", figures.recording(torch.testing.assert_close))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's top folder."""
    return ROOT


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a headless browser, for tests that look at a page as drawn; skips where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    return found
