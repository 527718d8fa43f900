"""The quick part of fuzzing, the same inputs every time; `scripts/fuzz` is the long one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from random import Random

import pytest
from guard import Fault, Guard, make_home
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from targets import TARGETS, Target
from transformers.utils import logging


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Callable[[str], tuple[Target, Guard]]]:
    """`fuzzed("header")`: a target that has read its seeds once, and who watches it."""
    home = make_home()
    guard = Guard(home)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)

    def get(name: str) -> tuple[Target, Guard]:
        (home / name).mkdir()
        target = TARGETS[name](home / name)
        for seed in target.seeds:
            target.read(seed)
        return target, guard

    yield get
    logging.set_verbosity(verbosity)
    shutil.rmtree(home)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input(name: str, fuzzed: Callable[[str], tuple[Target, Guard]]) -> None:
    target, guard = fuzzed(name)

    @settings(
        max_examples=target.examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # shrinking takes minutes, and mutated seeds are small
        suppress_health_check=list(HealthCheck),
    )
    @given(random=st.randoms(use_true_random=False), seed=st.sampled_from(target.seeds))
    def holds(random: Random, seed: bytes) -> None:
        guard.read(target.read, target.form(seed, random))

    holds()


def test_what_a_fault_is(tmp_path: pytest.TempPathFactory) -> None:
    """The guard notices each kind, or the rest says nothing."""
    home = make_home()
    guard = Guard(home, seconds=0.2)

    def fails(data: bytes) -> None:
        raise KeyError(data)

    def writes(data: bytes) -> None:
        with open(f"{tmp_path}/elsewhere", "wb") as file:
            file.write(data)

    def unpickles(data: bytes) -> None:
        import pickle

        pickle.loads(b"cbuiltins\nlen\n.")

    def grows(data: bytes) -> None:
        bytearray(128 << 20)[::4096] = bytes(128 << 8)

    def loops(data: bytes) -> None:
        while True:
            pass

    def writes_at_home(data: bytes) -> None:
        (home / "file").write_bytes(data)

    for read, message in (
        (fails, "KeyError"),
        (writes, "open of .*elsewhere"),
        (unpickles, "pickle.find_class"),
        (grows, "MiB of memory for 1 bytes"),
        (loops, "s of computing"),
    ):
        with pytest.raises(Fault, match=message):
            guard.read(read, b"x")
    assert guard.read(writes_at_home, b"x")
    shutil.rmtree(home)
