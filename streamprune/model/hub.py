"""Resolve models given as a directory, a GGUF file or a repository on the Hugging Face hub.

Hub models are downloaded once, safetensors and text files only, to the shared cache of huggingface_hub. ``HF_HUB_OFFLINE=1`` and
``HF_HOME`` work as usual.
"""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..errors import CheckpointError, one_line
from ..system.progress import Progress, Silent
from ..system.strict_json import read_json
from .names import COMPANIONS, CONFIG, CURVES, INDEX, KERNELS, REPORT, SINGLE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
_FIRST = [CONFIG, SINGLE, INDEX, REPORT, CURVES, *COMPANIONS]
"""Files fetched first. Shards follow only if there is no single file; otherwise transformers would ignore them too."""
GGUF = ".gguf"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class _Bar(tqdm):  # type: ignore[type-arg]
    """A progress bar that is shown only if stderr is a terminal."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": None})


def resolve_model(model: str | Path, progress: Progress | None = None) -> Path:
    """Return the directory or GGUF file of a model: the path itself, or the cached copy of ``org/name`` or ``org/name@revision``.

    Downloads the model if necessary. An existing directory takes precedence over a hub name. If the hub is unreachable, a
    complete copy in the cache is used.

    Raises:
        CheckpointError: neither a directory nor a model that the hub or its cache can provide.
    """
    progress = progress or Silent()
    if (match := check_model(model)) is None:
        return Path(model)
    progress.say(f"{model} is not a directory; using the model of that name on the hub")
    folder = _fetched(match["repo"], match["revision"])
    progress.say(f"{match['repo']} is commit {folder.name}, in {folder}")
    return folder


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint directory or hub model, pruned or dense, as a transformers model.

    Does not run the checkpoint's own code or load pickles, unless `options`, which `from_pretrained` gets, say so. Kernels
    that its config names, such as FlashAttention, are ignored, since this machine may not have them; choose kernels with
    `attn_implementation`.

    Raises:
        CheckpointError: `path` is neither a directory nor a model on the hub.
    """
    import transformers

    from . import modeling_streamprune as modeling
    from .upstream import forget_kernels, parsed_once

    folder = resolve_model(path)
    careful = {"trust_remote_code": False, "use_safetensors": True, **options}
    if (gguf := find_gguf(folder)) is not None:
        from .gguf_source import check_metadata

        check_metadata(gguf)
        folder, careful["gguf_file"] = gguf.parent, gguf.name
    fields = read_json(folder / CONFIG) if gguf is None and (folder / CONFIG).is_file() else {}
    declared = str(fields.get("model_type"))
    base = declared.removeprefix(modeling.PREFIX)
    known = base in transformers.CONFIG_MAPPING
    if known and base != declared:
        modeling.register(base)
    if "config" not in careful and fields.keys() & KERNELS:
        careful["config"] = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=careful["trust_remote_code"]
        )
        forget_kernels(careful["config"])
    wrapper = known and modeling.IMAGES in modeling.auto_classes(base)
    auto = transformers.AutoModelForImageTextToText if wrapper else transformers.AutoModelForCausalLM
    with parsed_once() if gguf else nullcontext():
        model: PreTrainedModel = auto.from_pretrained(folder, **careful)
    return model


def check_model(model: str | Path) -> re.Match[str] | None:
    """Return the match of a hub name (`repo`, `revision`); None for a directory or GGUF file; else raise CheckpointError. No network."""
    if os.path.isdir(model) or find_gguf(Path(model)) is not None:
        return None
    match = _NAME.fullmatch(str(model))
    if match is None or os.path.exists(model):
        raise CheckpointError(
            f"{model} is not a directory with a model in it, nor a name on the hub (org/name or org/name@revision), nor a "
            "GGUF file"
        )
    return match


def find_gguf(model: Path) -> Path | None:
    """Return the GGUF file of a model that is one, or a directory with one in place of safetensors; None for other models.

    Raises:
        CheckpointError: the directory has several GGUF files.
    """
    if model.is_file():
        return model if model.suffix == GGUF else None
    if not model.is_dir() or next(model.glob("*.safetensors*"), None):
        return None
    found = sorted(model.glob(f"*{GGUF}"))
    if len(found) > 1:
        raise CheckpointError(f"{model} has {len(found)} GGUF files; give one of them, such as {found[0]}")
    return next(iter(found), None)


def is_name(model: str | Path) -> bool:
    """Return whether this may be a hub model: it has the form of a hub name, and no such path exists."""
    return _NAME.fullmatch(str(model)) is not None and not os.path.exists(model)


def commit(model: Path) -> str | None:
    """Return the commit of a directory in the hub's cache; None for other directories."""
    cached = model.parent.name == "snapshots" and model.parent.parent.name.startswith("models--")
    return model.name if cached else None


def title(model: Path) -> str:
    """Return the name of a resolved model: its hub name, or the name of its directory."""
    if commit(model) is None:
        return model.resolve().name
    return model.parent.parent.name.removeprefix("models--").replace("--", "/", 1)


def shown(model: Path) -> str:
    """Return the origin of a resolved model, for the user: ``org/name@commit``, or the path."""
    return str(model) if commit(model) is None else f"{title(model)}@{commit(model)}"


def origin(model: Path) -> dict[str, str | None]:
    """Return the origin of a resolved model, for reports; contains no local path."""
    return {"name": title(model), "commit": commit(model)}


def _fetched(repo: str, revision: str | None) -> Path:
    """Return a complete copy in the cache, downloading what is missing. Raises CheckpointError if that fails."""
    from huggingface_hub import errors, snapshot_download

    name = repo if revision is None else f"{repo}@{revision}"

    def fetch(names: list[str]) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=names, tqdm_class=_Bar))

    try:
        folder = fetch(_FIRST)
        if missing := _missing(folder):
            folder = fetch(missing)
            missing = _missing(folder)
    except CheckpointError:
        raise
    except Exception as error:
        login = "log in (`hf auth login`, or HF_TOKEN)"
        reasons: dict[type[Exception], str] = {
            errors.GatedRepoError: f"is gated: accept its terms on the hub and {login}",
            errors.RepositoryNotFoundError: f"is neither a directory nor a model on the hub; if it is private, {login}",
            errors.RevisionNotFoundError: "is a revision that the model on the hub does not have",
            errors.LocalEntryNotFoundError: f"is neither a directory nor complete in the hub's cache, {_unreachable()}",
            Exception: f"cannot be fetched from the hub ({one_line(error)})",
        }
        reason = next(reason for kind, reason in reasons.items() if isinstance(error, kind))
        raise CheckpointError(f"{name} {reason}") from error
    if missing:
        raise CheckpointError(f"{name} {_why_missing(repo, folder, missing)}")
    return folder


def _missing(folder: Path) -> list[str]:
    """Return the weight files that a checkpoint directory lacks.

    Raises:
        CheckpointError: the index names something that is not a shard. A pattern, for example, would download all it matches.
    """
    from .checkpoint import read_index, weight_file

    if weight_file(folder) == SINGLE:
        return []
    if not (folder / INDEX).is_file():
        return [SINGLE]
    return sorted(shard for shard in read_index(folder / INDEX) if not (folder / shard).is_file())


def _why_missing(repo: str, folder: Path, missing: list[str]) -> str:
    """Return why weight files are missing after the download, as part of a message."""
    from huggingface_hub import HfApi

    try:
        listed = HfApi().list_repo_files(repo, revision=folder.name)
    except Exception:
        return f"is not complete in the hub's cache (commit {folder.name} lacks {missing[0]}), {_unreachable()}"
    if missing == [SINGLE] and any(file.endswith(_PICKLES) for file in listed):
        return "has only pickled weights, which are never fetched; choose a revision or a copy with safetensors"
    return f"has no {missing[0]} on the hub; its weights must be safetensors"


def _unreachable() -> str:
    from huggingface_hub import constants

    why = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
    return f"and the hub cannot be reached{why}; run once with the network, or give a directory"
