"""Register pruned checkpoints with transformers' auto classes, without importing transformers or torch prematurely."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

CONFIGS, MODELS = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"
"""The modules of `AutoConfig` and of `AutoModelForCausalLM`."""
OURS = f"{__package__}.modeling_streamprune"
"""Registers pruned checkpoints. It imports MODELS, which imports CONFIGS."""
_CONFIGURATION = re.compile(r"transformers\.models\.\w+\.configuration_\w+")


def teach() -> None:
    """Register the model types of `FAMILIES` with the auto classes: now if they are imported already, otherwise when they are."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if sys.modules.keys() & {CONFIGS, MODELS}:
        import_module(OURS)


class _Finder(MetaPathFinder):
    """Import hook that makes each of the three modules import the next one, and registers these model types after the last.

    While transformers defines a config class, it may import MODELS to write the class's docstring. OURS needs the config
    classes, so it waits until that class is defined.
    """

    def __init__(self) -> None:
        self._executed = set[str]()
        self._defining = set[str]()
        """Modules with config classes that are being executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in (CONFIGS, MODELS, OURS) and not _CONFIGURATION.fullmatch(name):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def followed(module: ModuleType) -> None:
            self._defining |= {name} - {CONFIGS, MODELS, OURS}
            try:
                execute(module)
            finally:
                self._defining.discard(name)
            self._executed.add(name)
            if name == OURS:
                from .architectures import FAMILIES

                for model_type in FAMILIES:
                    module.register(model_type)
            elif name == CONFIGS and MODELS not in sys.modules:
                import_module(MODELS)
            elif MODELS in self._executed and OURS not in sys.modules and not self._defining:
                import_module(OURS)

        spec.loader.exec_module = followed  # type: ignore[method-assign]
        return spec
