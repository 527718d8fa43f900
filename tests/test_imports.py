"""The floors of docs/architecture.md: each imports only from those below it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "streamprune"
FLOOR = {
    "errors": 1,
    "version": 1,
    "disk": 1,
    "files": 1,
    "progress": 1,
    "rendezvous": 1,
    "ranks": 1,
    "stopping": 1,
    "log": 1,
    "schedule": 1,
    "config": 1,
    "journal": 1,
    "manifest": 1,
    "meter": 1,
    "comparison": 1,
    "site": 1,
    "layout": 1,
    "machine": 1,
    "host": 1,
    "occupancy": 1,
    "json_text": 1,
    "names": 1,
    "documents": 1,
    "text": 1,
    "calibration": 1,
    "maths": 1,
    "model": 1,
    "methods": 2,
    "stream": 2,
    "needs": 2,
    "shapes": 2,
    "memory": 2,
    "effort": 2,
    "forecast": 2,
    "refine": 3,
    "correction": 3,
    "surgery": 3,
    "curves": 3,
    "shot": 3,
    "lost": 3,
    "output": 3,
    "hub": 3,
    "evaluate": 3,
    "export": 3,
    "harness": 3,
    "bench": 3,
    "caches": 3,
    "workplace": 3,
    "shortfall": 3,
    "job": 3,
    "run": 3,
    "lora": 3,
    "tune": 3,
    "compare": 3,
    "inspection": 3,
    "verification": 3,
    "verify": 3,
    "report": 3,
    "status": 3,
    "__init__": 4,
}
FORBIDDEN = {
    "methods": {"stream", "model", "journal", "files"},
    "stream": {"methods", "journal"},
    "maths": {"model", "site", "files"},
    "surgery": {"journal"},
    "output": {"journal"},
}


def imports(path: Path) -> set[str]:
    """Parts of the package that a file imports, as first names below `streamprune`."""
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
        found |= {name.split(".")[1] for name in names if name.startswith("streamprune.")}
    return found


def test_every_part_has_a_floor() -> None:
    parts = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert parts == set(FLOOR)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imports(path) - {part}:
        assert FLOOR[other] <= FLOOR[part], f"{path} imports {other}"
        assert other not in FORBIDDEN.get(part, set()), f"{path} imports {other}"


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
