"""The locked versions in requirements/ are what pyproject.toml asks for, and hold no address."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = ROOT / "requirements"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PYTHONS = sorted(path.stem.removeprefix("core-") for path in FOLDER.glob("core-*.txt"))


def pinned(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def required(texts: list[str], python: str) -> list[Requirement]:
    """The requirements that count for a Python, those of the project's own extras spelt out."""
    found = []
    for requirement in map(Requirement, texts):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        if requirement.name == PROJECT["name"]:
            for extra in requirement.extras:
                found += required(PROJECT["optional-dependencies"][extra], python)
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(python: str) -> None:
    core = [*PROJECT["dependencies"], *PYPROJECT["build-system"]["requires"]]
    torch = pinned(FOLDER / "torch.txt")
    for name, texts in (("core", core), ("test", core + PROJECT["optional-dependencies"]["test"])):
        pins = torch | pinned(FOLDER / f"{name}-{python}.txt")
        for requirement in required(texts, python):
            version = pins.get(canonicalize_name(requirement.name))
            assert version, f"{name}-{python}.txt lacks {requirement}: run scripts/lock"
            assert requirement.specifier.contains(version), (
                f"{name}-{python}.txt has {version}, pyproject.toml {requirement}"
            )


@pytest.mark.parametrize("python", PYTHONS)
def test_core_is_a_part_of_test(python: str) -> None:
    core, test = (pinned(FOLDER / f"{name}-{python}.txt") for name in ("core", "test"))
    assert core.items() <= test.items()
    assert len(core) > 30


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*-*.txt")), ids=lambda path: path.stem)
def test_names_versions_and_hashes_only(path: Path) -> None:
    pin = r"[a-z0-9-]+==[a-z0-9.]+ \\\n(    --hash=sha256:[0-9a-f]{64} \\\n)*    --hash=sha256:[0-9a-f]{64}\n"
    assert re.fullmatch(f"({pin})+", path.read_text(encoding="utf-8"))
    # torch comes by itself, since its file differs from machine to machine; so does what its CUDA builds bring along.
    assert not [name for name in pinned(path) if re.match("torch$|triton$|cuda-|nvidia-", name)]


def test_torch_is_one_version() -> None:
    lines = [
        line for line in (FOLDER / "torch.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    assert len(lines) == 1
    assert re.fullmatch(r"torch==[0-9.]+", lines[0])


def test_each_python_has_both_files() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"torch.txt"} | {
        f"{name}-{python}.txt" for name in ("core", "test") for python in PYTHONS
    }
    minors = [int(python.removeprefix("3.")) for python in PYTHONS]
    assert minors == list(range(minors[0], minors[-1] + 1))
    supported = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" in supported for minor in (minors[0] - 1, *minors)] == [False] + [True] * len(minors)


def test_a_python_without_locked_versions_is_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 3.99\n")
    python.chmod(0o755)
    script = ROOT / "scripts" / "demo"
    ran = subprocess.run([script], env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
    assert ran.returncode == 2
    assert f"for Python 3.99, but for {' '.join(PYTHONS)}:" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
