"""A job: what it was asked, where it lies, and whether it may begin, go on or end.

`Job` owns the folder beside OUT with its lock and journal; what the steps do is `run`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import calibration, files, machine, output
from .config import Config, format_bytes
from .errors import CheckpointError, ConfigError, ResourceError, ResumeError
from .journal import Entry, Journal
from .memory import Needs, Resources, device_peak, forecast
from .methods import RECIPES
from .methods.allocation import Budget, allocate, even_densities
from .methods.plan import Plan
from .methods.recipe import Recipe
from .model.checkpoint import Checkpoint, read_json
from .model.skeleton import Skeleton, open_skeleton
from .progress import Progress, Silent
from .stream.prefetch import prefetch
from .stream.store import ActivationStore


def job_folder(out: Path) -> Path:
    """Where a job keeps its journal, its finished shards and, unless told otherwise, its activations."""
    return out.absolute().parent / f"{out.absolute().name}.streamprune"


class Job:
    """One job: everything that both a first and a resumed process need to know.

    Raises:
        StreamPruneError: whatever can be known to be wrong before any work.
    """

    def __init__(self, config: Config, progress: Progress | None) -> None:
        self.progress = progress or Silent()
        if config.recipe not in RECIPES:
            raise ConfigError(f"recipe is {config.recipe!r}; it must be one of {', '.join(RECIPES)}")
        self.recipe: Recipe[Any] = RECIPES[config.recipe]
        self.settings = self.recipe.parse(config.settings)
        self.device = machine.resolve_device(config.device)
        self.out_given = str(config.out)
        config = replace(config, out=config.out.absolute())
        self.config = config
        if config.out.resolve() == config.model.resolve():
            raise ConfigError(f"OUT is {config.out}, the model itself")
        self.skeleton: Skeleton = open_skeleton(
            config.model, self.device, config.dtype, uniform=config.layout == "uniform"
        )
        self.sites = self.skeleton.all_sites()
        self.given_plan = self._given_plan()
        self.ratio = self._agreed_ratio()
        self.length = calibration.window_length(config.seq_len, self.skeleton.context) if self.needs_text else 0
        if self.given_plan is None:
            allocate(self.sites, even_densities(self.sites), self.budget)  # refuses a ratio that cannot be
        self.folder = job_folder(config.out)
        self.staging = self.folder / "out"
        self.plan_path = self.folder / "plan.json"
        self.journal_path = self.folder / "journal.jsonl"
        self.resumed = False
        self.journal: Journal
        """Set once the job is opened."""

    # What the job is.

    @property
    def budget(self) -> Budget:
        """What is to go."""
        return Budget(
            self.ratio, self.skeleton.block_parameters(), self.config.round_to, uniform=self.config.layout == "uniform"
        )

    @property
    def surveys(self) -> bool:
        """Whether gradients are wanted."""
        return self.given_plan is None and self.recipe.wants_mask_gradients(self.settings)

    @property
    def streams(self) -> bool:
        """Whether the prune sweep needs activations."""
        return self.recipe.wants_gram(self.settings) or self.recipe.compensation(self.settings) is not None

    @property
    def needs_text(self) -> bool:
        """Whether any text is read."""
        return self.surveys or self.streams

    @property
    def text(self) -> Path:
        """The calibration text."""
        return self.config.calibration or calibration.builtin_text()

    @cached_property
    def needs(self) -> Needs:
        """What the forecast has to count."""
        return Needs(
            samples=self.config.samples,
            length=self.length,
            text=self.needs_text,
            gradients=self.surveys,
            gram=self.recipe.wants_gram(self.settings),
            dense_stream=self.recipe.compensation(self.settings) is not None,
        )

    @property
    def forward_operations(self) -> int:
        """Of one dense forward pass over as much text as is asked for, whether or not the recipe reads it."""
        most = self.skeleton.context or calibration.DEFAULT_LENGTH
        length = self.length or min(self.config.seq_len or calibration.DEFAULT_LENGTH, most)
        return self.skeleton.forward_operations(self.config.samples, length)

    @cached_property
    def header(self) -> dict[str, Any]:
        """What must be the same for a job to go on: settings, inputs, and versions that change numbers."""
        import transformers

        inputs: dict[str, Any] = {"model": self.skeleton.checkpoint.identity()}
        # Whether or not a plan spares the survey: a job may go on with a plan that began without one.
        if self.recipe.wants_mask_gradients(self.settings) or self.streams:
            if not self.text.is_file():
                calibration.read_text(self.text)
            inputs["calibration"] = files.sha256(self.text)
            names = (name for name in output.COMPANIONS if "token" in name or name in ("vocab.json", "merges.txt"))
            found = {name: self.config.model / name for name in names}
            inputs["tokenizer"] = {name: files.sha256(path) for name, path in found.items() if path.is_file()}
        return {
            "settings": {
                **self.config.fixed(),
                "settings": asdict(self.settings),
                "ratio": self.ratio,
                "dtype": str(self.skeleton.dtype).removeprefix("torch."),
            },
            "inputs": inputs,
            "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        }

    def forecast(self) -> Resources:
        """What it takes, given what this machine has free."""
        limit = self.config.memory or machine.available_memory(self.device)
        disk = files.free_bytes(self.cache)
        return forecast(
            self.skeleton,
            self.needs,
            device_limit=limit,
            disk_limit=min(disk, self.config.disk) if self.config.disk else disk,
        )

    @property
    def cache(self) -> Path:
        """Where activations go: a folder of this job's own."""
        parent = self.config.cache
        if parent is None:
            return self.folder / "cache"
        own = hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]
        return parent.absolute() / f"{self.folder.name}-{own}"

    # Opening, resuming, ending.

    def result_there(self, restart: bool) -> Entry | None:
        """The report of a finished OUT that this very job made, or None when there is work to do.

        Raises:
            ConfigError: OUT holds something else.
        """
        out = self.config.out
        report = self._report_in_out()
        if report is None or restart or self._replacing():
            return None
        if difference := first_difference(report["job"], self.header):
            raise ConfigError(f"OUT is {out}, a finished result of another job: {difference}; --restart replaces it")
        given = self.given_plan.digest() if self.given_plan else None
        if given != report["plan_given"]:
            was = report["plan_given"]
            raise ConfigError(f"OUT is {out}, a finished result by plan {was}, not {given}; --restart replaces it")
        try:
            Skeleton(Checkpoint(out), device=torch.device("cpu"), dtype=torch.float32)
        except CheckpointError as error:
            raise ConfigError(
                f"OUT is {out}, a finished result that was damaged: {error}; --restart replaces it"
            ) from None
        if self.folder.is_dir():
            with files.locked(self.folder / "lock"):
                self.clear()
        self.resumed = True
        return report

    def _report_in_out(self) -> Entry | None:
        """The report of a result of ours in OUT; None when OUT is empty or not there.

        Raises:
            ConfigError: OUT holds something else.
        """
        out = self.config.out
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ConfigError(f"OUT is {out}, which is not a directory")
        if not out.is_dir() or not any(out.iterdir()):
            return None
        report = read_json(out / output.REPORT) if (out / output.REPORT).is_file() else {}
        if not output.is_report(report):
            raise ConfigError(f"OUT is {out}, which exists and holds something else")
        return report

    def _replacing(self) -> bool:
        """Whether a job with these very settings is under way that was told to replace what OUT holds."""
        if not self.journal_path.is_file():
            return False
        start = Journal(self.journal_path, repair=False).header
        return start is not None and start["replaces"] and first_difference(start["job"], self.header) is None

    @contextmanager
    def opened(self, restart: bool) -> Iterator[None]:
        """A context in which this process, and no other, works on the job."""
        for name, path in (("OUT", self.folder.absolute()), ("cache", self.cache)):
            parent = next(parent for parent in path.parents if parent.exists())
            if not parent.is_dir():
                raise ConfigError(f"{name} cannot be below {parent}, which is not a directory")
        new = not self.folder.exists()
        files.make_folder(self.folder)
        with files.locked(self.folder / "lock"):
            try:
                self._start(restart)
                yield
            finally:
                if new and not self.journal_path.exists() and self.folder.is_dir():
                    files.remove_tree(self.folder)  # refused before it began: leave nothing behind

    def _start(self, restart: bool) -> None:
        """Begin, or find out where an earlier process stopped.

        Raises:
            ResumeError: started with other settings, inputs or versions.
        """
        self.journal = Journal(self.journal_path)
        start = self.journal.header
        if start is None or restart:
            start = self._begin()
        else:
            if difference := first_difference(start["job"], self.header):
                raise ResumeError(f"{self.folder} holds a job started otherwise: {difference}; --restart starts over")
            for field, now in (("cache", self._cache_given), ("plan", "given" if self.given_plan else None)):
                # A plan may come later, by --plan-only and --plan; it cannot go again.
                if start[field] != now and not (field == "plan" and now):
                    raise ResumeError(
                        f"{field} is {now or 'not given'}; this job was started with {start[field] or 'none'}; --restart starts over"
                    )
            self._check_memory(start["resources"])
            self.resumed = len(list(self.journal.steps())) > 0
        self.batch: int = start["resources"]["batch"]
        self.backward_batch: int = start["resources"]["backward_batch"]
        self.boundary_every: int = start["resources"]["boundary_every"]

    def _begin(self) -> Entry:
        """Check whatever can be known beforehand; then, and only then, let go of what was there."""
        known = {"lock", "journal.jsonl", "plan.json", "out", "cache", "replaced"}
        for path in self.folder.iterdir():
            if path.name not in known and not path.name.startswith("survey-"):
                raise ConfigError(f"{self.folder}, where the work would lie, holds something else: {path.name}")
        resources = self.forecast().require()
        self._check_disk(resources)
        if self.needs_text:
            _ = self.tokens
        header = self.header
        self._check_weights()
        files.remove(self.journal_path)
        files.sync(self.folder)
        for leftover in (self.staging, self.cache, self.folder / "replaced"):
            files.remove_tree(leftover)
        files.make_folder(self.staging)
        if self.needs_text:
            files.make_folder(self.cache)
        self.journal = Journal(self.journal_path)
        return self.journal.append(
            "start",
            job=header,
            cache=self._cache_given,
            plan="given" if self.given_plan else None,
            replaces=self._report_in_out() is not None,
            resources={name: getattr(resources, name) for name in ("batch", "backward_batch", "boundary_every")},
        )

    @property
    def _cache_given(self) -> str | None:
        return str(self.config.cache.absolute()) if self.config.cache else None

    def _check_disk(self, resources: Resources) -> None:
        """The result's room, with the activations' where both lie on one file system."""
        free = files.free_bytes(self.folder)
        shared = files.same_file_system(self.folder, self.cache)
        needed = resources.output_bytes + (resources.disk_bytes if shared else 0)
        if needed > free:
            what = "the result and the activations" if shared and resources.disk_bytes else "the result"
            raise ResourceError(
                f"{what} may need {format_bytes(needed)}; {self.folder.parent} has {format_bytes(free)} free"
            )

    def _check_memory(self, resources: Mapping[str, int]) -> None:
        """Hold the micro-batches of a job under way, which decide the order of sums, against the limit given now."""
        needed = device_peak(self.skeleton, self.needs, resources["batch"], resources["backward_batch"])
        if self.config.memory is not None and self.config.memory < needed:
            raise ResourceError(
                f"the memory limit is {format_bytes(self.config.memory)}; this job was started with micro-batches of "
                f"{resources['batch']} and {resources['backward_batch']}, which need {format_bytes(needed)}; --restart starts over"
            )

    def make_way(self) -> None:
        """Move an older result of ours aside, if this job was told to replace it.

        Raises:
            ConfigError: OUT holds something that was not there, or not ours, when the job began.
        """
        if self._report_in_out() is None:
            return
        start = self.journal.header
        assert start is not None
        if not start["replaces"]:
            raise ConfigError(f"OUT is {self.config.out}, where another result has appeared meanwhile")
        files.remove_tree(self.folder / "replaced")
        files.move_aside(self.config.out, self.folder / "replaced")

    def clear(self) -> None:
        """Remove the job's folder and its activations."""
        files.remove_tree(self.cache)
        files.remove_tree(self.folder)

    @cached_property
    def tokens(self) -> Tensor:
        """Calibration windows (samples, length)."""
        tokenizer = calibration.load_tokenizer(self.config.model)
        tokens = calibration.tokenize(tokenizer, self.text, self.skeleton.vocabulary)
        return calibration.sample_windows(tokens, self.config.samples, self.length, self.config.seed, self.text)

    @cached_property
    def store(self) -> ActivationStore:
        """Block inputs, for whichever sweep is under way."""
        shape = self.config.samples, self.length, self.skeleton.width
        return ActivationStore(self.cache, shape, self.skeleton.dtype, self.device, durable=True)

    def _check_weights(self) -> None:
        """Read everything once and refuse NaN and Inf, before hours are spent on them."""
        skeleton = self.skeleton
        groups = [list(skeleton.block_names(index).values()) for index in range(len(skeleton))]
        groups += [[name] for name in {*skeleton.embed_names(), *skeleton.head_names()}]
        self.progress.phase("check weights", len(groups))
        names = [name for group in groups for name in group]
        left = {group[-1] for group in groups}
        for name, tensor in prefetch(names, skeleton.checkpoint.read):
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{self.config.model}: tensor {name!r} holds NaN or Inf")
            if name in left:
                self.progress.step(name)

    # Plans that people give.

    def _given_plan(self) -> Plan | None:
        path = self.config.plan
        if path is None:
            return None
        plan = Plan.read(path)
        plan.check(self.sites, str(path))
        if self.config.layout == "uniform" and not plan.is_uniform(self.sites):
            raise ConfigError(f"{path}: blocks keep different widths, which the uniform layout cannot hold")
        if self.recipe.uses_plan_units(self.settings):
            for site in self.sites:
                if plan[site.name].units is None and plan[site.name].keep < site.units:
                    raise ConfigError(
                        f'{path}: with these settings {site.name} needs "units", not only how many to keep'
                    )
        return plan

    def _agreed_ratio(self) -> float:
        asked, planned = self.config.ratio, self.given_plan.ratio if self.given_plan else None
        if asked is not None and planned is not None and asked != planned:
            raise ConfigError(f"ratio is {asked:g}; the plan {self.config.plan} was made for {planned:g}")
        ratio = asked if asked is not None else planned
        assert ratio is not None
        return ratio


def first_difference(then: Any, now: Any, place: str = "") -> str | None:
    """The first field in which two JSON values differ, with both values; None if they are equal."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            inner = f"{place}.{key}" if place else key
            if found := first_difference(then.get(key), now.get(key), inner):
                return found
        return None
    # Through JSON, so that what was read back compares equal to what was written.
    if json.dumps(then) == json.dumps(now):
        return None
    return f"{place} is {_short(now)} and was {_short(then)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
