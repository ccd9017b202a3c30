"""Every verb of every program with bad arguments: a reason of one line, a known code, nothing written."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, strategies

from tests.fuzz.arguments import ODD_PATHS, flags_of, plain_arguments, spoilt
from tests.fuzz.harness import UNTOUCHED, Tally, effort
from tests.fuzz.world import World, programs

VERBS = [(program.name, verb) for program in programs().values() for verb in program.verbs]
OWN_FOLDERS = ("precompute", "finetune", "train")  # where a run replaces what an earlier one left


def test_every_verb_has_a_plain_call(world: World) -> None:
    assert set(plain_arguments(world)) == set(VERBS)


@pytest.mark.parametrize(("name", "verb"), VERBS)
@effort(8)
@given(seed=strategies.integers(0, 2**64 - 1))
def test_bad_arguments(name: str, verb: str, seed: int, world: World, tally: Tally) -> None:
    rng, program = random.Random(f"{name} {verb} {seed}"), programs()[name]
    words = plain_arguments(world)[name, verb]
    paths = [*ODD_PATHS, *(str(path) for path in sorted(world.path.iterdir()))]
    words = spoilt(words, flags_of(program, verb, words), rng, paths)
    before = world.mark()
    code = tally.command(f"{name} {verb}", program, [verb, *words], world.scratch)
    changed, gone = world.settle(before)
    if gone and "--overwrite" not in words and verb not in OWN_FOLDERS:
        tally.fault(f"{name} {verb}", "removed a file that was there", f"{words} {gone}")
    if changed and code in UNTOUCHED:
        tally.fault(f"{name} {verb}", "refused, but changed a file that was there", f"{words} {changed}")
