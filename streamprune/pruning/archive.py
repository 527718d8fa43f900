"""Surveys kept in a folder of the user's, so that another job on the same model and text starts with the prune sweep.

`survey.json` is written last: it says what the survey depends on, and has the digest of each file. A job whose model, text or
settings differ is refused. Without that file, the folder holds no survey yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DamageError
from ..jobs.config import AIMS
from ..jobs.resume import first_difference
from ..model.checkpoint import Shard
from ..model.site import Site
from ..recipes.recipe import Findings
from ..system import files
from ..system.strict_json import read_json, write_json
from .request import Request

if TYPE_CHECKING:
    from .shot import Shot

INDEX, LOCK = "survey.json", "lock"
FORMAT = "streamprune-survey-1"
EXPERTS = {"costs of whole experts": "one after the other"}
"""What a survey also says of itself if they are in it."""
LATER = {
    *(
        "ratio",
        "experts",
        *AIMS,
        "quant",
        "context",
        "layout",
        "round_to",
        "tensor_parallel",
        "blocks",
        "ratio_of",
        "effort",
        "refine",
        "store",
        "text_only",
    )
}
"""Fields of `Config` that a survey does not depend on. `experts` only adds what whole experts cost (`EXPERTS`)."""


def identity(request: Request) -> dict[str, Any]:
    """Return what a survey depends on, JSON-ready: model, text, settings, versions of libraries that change numbers.

    Not the recipe's settings that only its later steps read. Micro-batches, which decide the order of sums, may differ.
    """
    header, recipe = request.header, request.recipe
    own = {name: value for name, value in asdict(recipe.settings).items() if name not in recipe.after_survey}
    job = {name: value for name, value in header["settings"].items() if name not in LATER}
    more = EXPERTS if "removal" in request.statistics else {}
    return {**header, "settings": {**job, **more, "seq_len": request.length, "settings": own}}


def find(request: Request) -> Mapping[str, str] | None:
    """Return the digests of the files of the job's kept survey, by name; None if its folder holds no survey yet, or is not given.

    Raises:
        ConfigError: the folder holds the survey of another model, text or other settings, or files of something else.
    """
    folder = request.config.survey
    if folder is None or not request.surveys:
        return None
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"survey is {folder}, which is not a directory")
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        name = path.name.removesuffix(files.TEMPORARY)
        if name not in (INDEX, LOCK) and not name.startswith("survey-"):
            raise ConfigError(f"survey is {folder}, which contains {path.name}, a file of something else")
    if not (folder / INDEX).is_file():
        return None
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ConfigError(f"{folder / INDEX} is not of a survey of this version")
    taken, own = index.get("survey"), identity(request)
    if isinstance(taken, dict) and isinstance(settings := taken.get("settings"), dict) and {*EXPERTS} <= {*settings}:
        own["settings"] |= EXPERTS  # a job without whole experts does not read what they cost
    if difference := first_difference(taken, own):
        raise ConfigError(f"survey is {folder}, which was taken otherwise: {difference}; choose another folder")
    digests = index.get("files")
    if not isinstance(digests, dict) or sorted(digests) != _names(request):
        raise ConfigError(f"{folder / INDEX} does not name one file for each block")
    return digests


def fetch(shot: Shot, digests: Mapping[str, str]) -> None:
    """Copy a kept survey to the job's folder. Raises DamageError if one of its files has changed."""
    folder = shot.job.config.survey
    assert folder is not None
    shot.progress.say(f"the survey in {folder} is used")
    for name, digest in digests.items():
        if not (folder / name).is_file() or files.copy(folder / name, shot.job.folder / name) != digest:
            raise DamageError(f"{folder / name} is missing or was changed; remove {folder} to take the survey again")


def keep(shot: Shot) -> None:
    """Copy the job's survey to the folder for it, if one is given."""
    folder = shot.job.config.survey
    if folder is None:
        return
    files.make_folder(folder)
    with files.locked(folder / LOCK):
        if find(shot.job.request) is not None:
            return  # another job has taken it meanwhile
        digests = {name: files.copy(shot.job.folder / name, folder / name) for name in _names(shot.job.request)}
        write_json(folder / INDEX, {"format": FORMAT, "survey": identity(shot.job.request), "files": digests})
    shot.progress.say(f"the survey is kept in {folder}")


def _names(request: Request) -> list[str]:
    return [survey_name(index) for index in range(len(request.skeleton))]


def survey_name(index: int) -> str:
    """Return the name of the file with the findings of a block."""
    return f"survey-{index:04}.safetensors"


class SurveyFiles(Mapping[str, Findings]):
    """A survey's findings by site name, one file per block of a folder. Tensors are read on access."""

    def __init__(self, folder: Path, sites: Sequence[Site]) -> None:
        self._places = {site.name: (folder / survey_name(site.block), f"{site.place}.") for site in sites}

    def __getitem__(self, name: str) -> Findings:
        return Shard(*self._places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
