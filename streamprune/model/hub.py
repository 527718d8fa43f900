"""A model by the name people have for it: a directory, or a repository of the Hugging Face hub.

What the hub has is fetched once, safetensors and text files only, into the cache that all of huggingface_hub's users
share, and read from there; ``HF_HUB_OFFLINE=1`` and ``HF_HOME`` mean what they always do.
"""

from __future__ import annotations

import os
import re
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
_FIRST = (CONFIG, SINGLE, INDEX, REPORT, CURVES, *COMPANIONS)
"""What is fetched at once; shards follow, if there is no single file: transformers would not read them either."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class _Bar(tqdm):  # type: ignore[type-arg]
    """A bar where stderr is a terminal, and nothing in a log."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": None})


def resolve_model(model: str | Path, progress: Progress | None = None) -> Path:
    """The directory of a model: itself, or the cached copy of ``org/name`` or ``org/name@revision``, fetched if need be.

    A directory of that name wins. Where the hub cannot be reached, a copy that is in the cache is taken.

    Raises:
        CheckpointError: neither a directory nor to be had from the hub or its cache.
    """
    progress = progress or Silent()
    match = check_model(model)
    if match is None:
        return Path(model)
    progress.say(f"{model}: no such directory here; taking it for a name on the hub")
    folder = _fetched(match["repo"], match["revision"])
    progress.say(f"{match['repo']} is commit {folder.name}, in {folder}")
    return folder


def load(path: str | Path, **options: Any) -> PreTrainedModel:
    """A checkpoint directory or a name on the hub, pruned or dense, as a transformers model; `options` go to `from_pretrained`.

    Neither code of the checkpoint's own nor pickles are loaded, unless `options` ask for it. Kernels that its config names,
    such as FlashAttention, which this machine may not have, are passed over; `attn_implementation` chooses others.

    Raises:
        CheckpointError: `path` is neither.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = resolve_model(path)
    careful = {"trust_remote_code": False, "use_safetensors": True, **options}
    settings = folder / CONFIG
    if "config" not in careful and settings.is_file() and read_json(settings).keys() & KERNELS:
        careful["config"] = AutoConfig.from_pretrained(folder, trust_remote_code=careful["trust_remote_code"])
        careful["config"]._attn_implementation = careful["config"]._experts_implementation = None
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **careful)
    return model


def check_model(model: str | Path) -> re.Match[str] | None:
    """The parts of a model's name on the hub; None for a directory. Nothing is read or fetched.

    Raises:
        CheckpointError: neither.
    """
    if os.path.isdir(model):
        return None
    match = _NAME.fullmatch(str(model))
    if match is None or os.path.exists(model):
        raise CheckpointError(
            f"{model} is not a directory with a model in it, nor a name on the hub (org/name or org/name@revision)"
        )
    return match


def is_name(model: str | Path) -> bool:
    """Whether this may be a model on the hub: it reads like a name, and nothing of that name is here."""
    return _NAME.fullmatch(str(model)) is not None and not os.path.exists(model)


def commit(model: Path) -> str | None:
    """The commit of a directory in the hub's cache; None for any other."""
    repo = model.parent.parent.name
    return model.name if model.parent.name == "snapshots" and repo.startswith("models--") else None


def title(model: Path) -> str:
    """What to call a resolved model: its name on the hub, or its directory's."""
    if commit(model) is None:
        return model.resolve().name
    return model.parent.parent.name.removeprefix("models--").replace("--", "/", 1)


def shown(model: Path) -> str:
    """Where a resolved model is from, for people: ``org/name@commit``, or the path."""
    found = commit(model)
    return str(model) if found is None else f"{title(model)}@{found}"


def origin(model: Path) -> dict[str, str | None]:
    """Where a resolved model is from, for reports: no path of this machine."""
    return {"name": title(model), "commit": commit(model)}


def _fetched(repo: str, revision: str | None) -> Path:
    """The copy in the cache, complete.

    Raises:
        CheckpointError: it cannot be had.
    """
    from huggingface_hub import errors, snapshot_download

    name = repo if revision is None else f"{repo}@{revision}"

    def fetch(names: list[str]) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=names, tqdm_class=_Bar))

    try:
        folder = fetch(list(_FIRST))
        if lacking := _lacking(folder):
            folder = fetch(lacking)
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{name} is gated: accept its terms on the hub and log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a directory here nor a model on the hub that is yours to read; "
            "if it is private, log in (`hf auth login`, or HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} is on the hub, but has no revision {revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name} is neither a directory here nor complete in the hub's cache, and the hub cannot be reached"
            f"{_why_not()}; run once with the network, or give a directory"
        ) from error
    except Exception as error:
        raise CheckpointError(f"{name} cannot be fetched from the hub ({one_line(error)})") from error
    if lacking := _lacking(folder):
        raise CheckpointError(f"{name} {_lack(repo, folder, lacking)}")
    return folder


def _lacking(folder: Path) -> list[str]:
    """Files of weights that a checkpoint directory should have and has not.

    Raises:
        CheckpointError: the index names what is no shard: a pattern, for one, would fetch whatever it matches.
    """
    from .checkpoint import read_index, weight_file

    if weight_file(folder) == SINGLE:
        return []
    if not (folder / INDEX).is_file():
        return [SINGLE]
    return sorted(shard for shard in read_index(folder / INDEX) if not (folder / shard).is_file())


def _lack(repo: str, folder: Path, lacking: list[str]) -> str:
    """Why weights are not there, once all was fetched that could be."""
    from huggingface_hub import HfApi

    try:
        held = HfApi().list_repo_files(repo, revision=folder.name)
    except Exception:
        return (
            f"is not complete in the hub's cache (commit {folder.name} lacks {lacking[0]}), and the hub cannot be reached"
            f"{_why_not()}; run once with the network"
        )
    if lacking == [SINGLE] and any(file.endswith(_PICKLES) for file in held):
        return "has only pickled weights, which are never fetched; take a revision or a copy with safetensors"
    return f"has no {lacking[0]} on the hub; its weights must be safetensors"


def _why_not() -> str:
    from huggingface_hub import constants

    return " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
