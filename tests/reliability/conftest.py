"""Tiny models of both families, made once."""

from __future__ import annotations

import pytest

from tests.reliability import families
from tests.reliability.families import Family


@pytest.fixture(scope="session")
def cogvideo(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return families.cogvideo(tmp_path_factory.mktemp("cogvideo"))


@pytest.fixture(scope="session")
def cogvideox(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return families.cogvideox(tmp_path_factory.mktemp("cogvideox"))


@pytest.fixture(params=["cogvideo", "cogvideox"])
def family(request: pytest.FixtureRequest) -> Family:
    return request.getfixturevalue(request.param)
