"""Run a module or script on the pretended device: ``python -m pretended -m streamprune_cli run ... --device cuda``."""

from __future__ import annotations

import runpy
import sys

from . import device

if len(sys.argv) < 2:
    sys.exit(__doc__)
with device() as state:
    try:
        if sys.argv[1] == "-m":
            sys.argv = sys.argv[2:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = sys.argv[1:]
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        peak, kept = state.memory.most_allocated, state.memory.most_reserved
        print(f"pretended: {state.operations} operations, {peak} bytes allocated, {kept} reserved", file=sys.stderr)
