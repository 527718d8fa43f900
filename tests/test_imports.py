"""The rooms of docs/architecture.md: each imports only from those before it."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import ROOT
from streamprune_cli import main

from streamprune.maths import greedy

PACKAGE = ROOT / "streamprune"
ROOMS = (
    "errors",
    "system",
    "maths",
    "model",
    "recipes",
    "stream",
    "text",
    "jobs",
    "pruning",
    "commands",
    "__init__",
)
ONLY = {
    "maths": {"errors"},
    "recipes": {"errors", "maths", "model.site", "system.strict_json"},
    "stream": {"errors", "system", "maths", "model"},
    "text": {"errors", "system", "model"},
}
"""All that these rooms know of the others: recipes know tensors, engines know no recipe."""


def imports(path: Path) -> set[str]:
    """What a file imports of the package, as dotted names."""
    here = ("streamprune", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name for name in names if name.startswith("streamprune.")}
    return found


def test_every_part_is_a_room() -> None:
    parts = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert parts == set(ROOMS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in sorted(imports(path)):
        parts = name.split(".")[1:]
        if parts[0] == room:
            continue
        assert ROOMS.index(parts[0]) < ROOMS.index(room), f"{path} imports {name}"
        if room in ONLY:
            assert {parts[0], ".".join(parts[:2])} & ONLY[room], f"{path} imports {name}"


def test_only_disk_changes_files() -> None:
    changing = re.compile(
        r"\bos\.(replace|rename|link|symlink|unlink|remove|mkdir|makedirs|rmdir|truncate|fsync)\("
        r"|(?<!files)(?<!disk\(\))\.(rename|unlink|mkdir|rmdir|touch|truncate|write_text|write_bytes)\("
        r"|\bshutil\.(?!disk_usage)|save_file|open\([^)]*\"[wax+r]*[wax+]b?\""
    )
    for path in PACKAGE.rglob("*.py"):
        # The modelling file travels without the rest of the package; what machine.py writes to is the kernel.
        if path.name not in ("disk.py", "modeling_streamprune.py", "machine.py"):
            found = changing.search(path.read_text().replace("disk().open(", ""))
            assert found is None, f"{path} has {found[0]}"
        assert "import disk" not in path.read_text() or path.name == "files.py"


@pytest.mark.parametrize(
    ("recipe", "way"),
    [
        ("sobp", ["cli/run.py", "pruning/run.py", "pruning/block.py", "recipes/obs.py", "maths/greedy.py"]),
        ("default", ["cli/run.py", "pruning/run.py", "pruning/survey.py", "recipes/default.py", "maths/greedy.py"]),
    ],
)
def test_five_files_from_the_command_to_the_equation(
    recipe: str, way: list[str], tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(greedy, "add_product", fail)
    arguments = ["run", str(tiny("llama")), str(tmp_path / "out"), "--ratio", "0.3", "--samples", "2", "--seq-len", "8"]
    result = CliRunner().invoke(main, [*arguments, "--recipe", recipe, "--device", "cpu", "--quiet"])
    assert isinstance(result.exception, ZeroDivisionError)
    frames = traceback.extract_tb(result.exc_info[2])  # type: ignore[index]
    files = [Path(frame.filename).resolve() for frame in frames]
    folders = [ROOT / name for name in ("streamprune", "cli", "tests")]
    ours = [
        file.relative_to(ROOT).as_posix().removeprefix("streamprune/")
        for file in files
        if any(file.is_relative_to(folder) for folder in folders)
    ]
    assert list(dict.fromkeys(ours[ours.index("cli/run.py") :])) == [*way, "tests/test_imports.py"]
