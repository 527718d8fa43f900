"""Help, status and usage errors import neither torch nor transformers."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import streamprune

HEAVY = ("torch", "transformers", "numpy", "datasets", "lm_eval", "matplotlib", "peft", "gguf", "safetensors")
PROGRAM = f"""
import json, sys
sys.argv = ["streamprune", *json.loads(sys.argv[1])]
from streamprune_cli import main
try:
    main()
except SystemExit as end:
    print(json.dumps([end.code, sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY}))]), file=sys.stderr)
"""


def ended(*arguments: object, **environment: str) -> tuple[int, list[str], str]:
    """Exit code of the command in a separate process, the heavy libraries that it imported, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([str(each) for each in arguments])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200", **environment},
    )
    *told, last = done.stderr.strip().splitlines()
    code, imported = json.loads(last)
    return code, imported, "\n".join(told)


@pytest.fixture(scope="session")
def finished(tiny: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a finished job."""
    out = tmp_path_factory.mktemp("finished") / "out"
    streamprune.prune(streamprune.Config(model=tiny("llama"), out=out, ratio=0.3, recipe="magnitude"))
    return out


def test_status_imports_neither_torch_nor_transformers(finished: Path) -> None:
    assert ended("status", finished) == (0, [], "")
    assert ended("status", finished.with_name("none")) == (3, [], "")


@pytest.mark.parametrize(
    ("call", "code", "said"),
    [
        ("--help", 0, ""),
        ("--version", 0, ""),
        *((f"{command} --help", 0, "") for command in ("run", "plan", "compare", "tune", "eval", "export", "bench")),
        *((f"{command} --help", 0, "") for command in ("status", "verify", "report", "inspect")),
        ("run", 2, "Missing argument 'MODEL'"),
        ("run MODEL OUT --ratio 1.3", 2, "ratio is 1.3; it must be in (0, 1)"),
        ("run MODEL OUT --ratio 0.3 --fit 8GiB", 2, "ratio and fit are given"),
        ("run MODEL OUT --perplexity-at-most 5", 2, "--perplexity-at-most is '5'; write it with a percent sign"),
        ("run MODEL OUT --speedup 0.9", 2, "speedup is 0.9; it must be above 1"),
        ("run MODEL OUT --ratio 0.3 --recipe sobb", 2, "recipe is 'sobb'"),
        ("run MODEL OUT --ratio 0.3 --set dampin=1", 2, "no setting 'dampin'"),
        ("run MODEL OUT --ratio 0.3 --memory 12", 2, "12GiB"),
        ("run MODEL OUT --ratio 0.3 --device tpu", 2, "device is 'tpu'"),
        ("run MODEL OUT --ratio 0.3 --dtype int3", 2, "dtype is 'int3'"),
        ("run MODEL OUT --ratio 0.3 --calibration nowhere.txt", 1, "cannot read the text nowhere.txt"),
        ("run MODEL MODEL --ratio 0.3", 2, "the model itself"),
        ("run nowhere OUT --ratio 0.3", 1, "nowhere is not a directory"),
        ("plan MODEL", 2, "give a ratio, experts by number or share, a plan file or one of fit"),
        ("tune nowhere OUT --text MODEL/config.json", 1, "nowhere is not a directory"),
        ("tune MODEL OUT --text nowhere.txt", 1, "cannot read the text nowhere.txt"),
        ("compare MODEL --ratios x --recipes sobp --text MODEL/config.json", 2, "--ratios 'x'"),
        ("compare MODEL --ratios 0.3 --recipes sobb --text MODEL/config.json", 2, "recipe is 'sobb'"),
        ("compare MODEL --ratios 0.3 --recipes sobp --text MODEL/config.json --set sobp.x=1", 2, "no setting 'x'"),
        ("eval MODEL", 2, "nothing to measure"),
        ("eval MODEL --text nowhere.txt", 1, "cannot read the text nowhere.txt"),
        ("export nowhere out.gguf", 1, "nowhere is not a directory"),
        ("export MODEL out.gguf --dtype q4", 2, "dtype is 'q4'; it must be one of f32, f16"),
        ("export MODEL out.gguf --imatrix-text MODEL/config.json", 2, "dtype is f16, not a quantised one"),
        ("bench MODEL --against nowhere", 1, "nowhere is not a directory"),
        ("verify nowhere", 1, "nowhere is not a directory"),
        ("inspect nowhere", 1, "nowhere does not exist, and no job is writing it"),
        ("report nowhere", 2, "nowhere has no report.json"),
        ("report nowhere --bos on", 2, "--bos on needs --text or --prompt"),
        ("report nowhere --seq-len 9 --prompt a", 2, "--seq-len 9 needs --text"),
        ("report nowhere --tokens 9 --text MODEL/config.json", 2, "--tokens 9 needs --prompt"),
    ],
)
def test_invalid_arguments_are_reported_before_anything_heavy_is_imported(
    tiny: Any, tmp_path: Path, call: str, code: int, said: str
) -> None:
    names = {"MODEL": str(tiny("llama")), "OUT": str(tmp_path / "out")}
    arguments = [names.get(word, word.replace("MODEL/", f"{names['MODEL']}/")) for word in call.split()]
    found, imported, told = ended(*arguments)
    assert (found, imported) == (code, [])
    assert said in told
    assert not (tmp_path / "out").exists()


def test_importing_the_package_is_lazy() -> None:
    code = f"""
import sys, streamprune
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
streamprune.Config, streamprune.StreamPruneError, streamprune.status, streamprune.Source, streamprune.Callback
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
assert set(streamprune.__all__) <= set(dir(streamprune))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


FIRST = [
    "import streamprune; from transformers import AutoModelForCausalLM",
    "import streamprune; from transformers import LlamaConfig; from transformers import AutoModelForCausalLM",
    "import streamprune; from transformers import Gemma3TextConfig, LlamaConfig",
    "from transformers import AutoModelForCausalLM; import streamprune",
    "import streamprune; from transformers import AutoConfig",
    "from transformers import AutoConfig; import streamprune",
    "import streamprune.model.modeling_streamprune",
]
FORKS = """
import os, sys, torch
for first in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(first, {})
        from transformers import AutoConfig, CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
        from streamprune import FAMILIES
        # All families once: each imports its model.
        for name in FAMILIES if first == sys.argv[1] else ("llama", "gemma3_text"):
            config = CONFIG_MAPPING["streamprune_" + name]
            assert MODEL_FOR_CAUSAL_LM_MAPPING[config].__name__ == "PrunedForCausalLM", first
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, first
"""


@pytest.mark.slow
def test_auto_classes_know_pruned_models_whatever_is_imported_first() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS, *FIRST], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_type_checkers_see_the_names_that_are_there() -> None:
    """The imports under TYPE_CHECKING, `__all__` and what the package gives are the same names from the same modules."""
    tree = ast.parse((ROOT / "streamprune" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {"__version__", *seen} == set(streamprune.__all__)
    for name, module in seen.items():
        given = getattr(streamprune, name)
        assert given is getattr(sys.modules[f"streamprune.{module}"], name), name


THIRD_PARTY = """
import warnings, logging, sys
import streamprune
def told(out):
    warnings.warn("from a library", FutureWarning, stacklevel=1)
    logging.getLogger("somelibrary").warning("logged by a library")
    raise SystemExit(0)
streamprune.status = told
sys.argv = ["streamprune", "status", "out"]
from streamprune_cli import main
main()
"""


@pytest.mark.parametrize(
    ("environment", "options", "shown"),
    [({}, [], False), ({"STREAMPRUNE_WARNINGS": "1"}, [], True), ({}, ["-W", "default"], True)],
)
def test_warnings_of_others_are_shown_on_request(
    environment: dict[str, str], options: list[str], shown: bool, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, *options, "-c", THIRD_PARTY],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**{k: v for k, v in os.environ.items() if k != "STREAMPRUNE_WARNINGS"}, **environment},
    )
    assert ("from a library" in done.stderr) is shown
    assert ("logged by a library" in done.stderr) is (environment != {})


def test_a_job_does_not_look_for_compilers() -> None:
    """torch.utils.cpp_extension warns on stderr where it finds CUDA's compiler but no GPU."""
    code = "import sys, streamprune.pruning.run; sys.exit('torch.utils.cpp_extension' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
