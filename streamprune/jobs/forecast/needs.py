"""What a job will do, as far as resources go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...maths.sums import GRADIENTS, Statistic
from ...model.site import Site

REFINE_SEQUENCES = 8
"""A refinement step's batch."""


@dataclass(frozen=True)
class Needs:
    """What a job will do, as far as resources go."""

    samples: int
    length: int
    text: bool
    """Activations move at all."""
    survey: frozenset[Statistic] = frozenset()
    shared: bool = False
    """Several recipes make something of the survey's sums."""
    findings: int = 0
    """Numbers that wait on the disk between survey and prune sweep."""
    gram: bool = False
    compensates: bool = False
    """Sums the producers' inputs."""
    aims: bool = False
    """Fits consumers to a target."""
    refines: int = 0
    """Steps of block refinement."""
    corrects: int = 0
    """Low-rank steps after each shot."""
    correction_rank: int = 0
    """Of their updates."""
    shots: int = 1
    rank: int | None = None
    """Of the updates that refinement trains; None for whole weights."""
    prunes: bool = True
    """False for evaluation and tuning."""
    scores: bool = False
    """The head gives losses."""
    generates: bool = False
    """The model writes its calibration tokens."""
    removes: float = 0.0
    """Share of the blocks' parameters that is gone in the end."""
    work: Callable[[Site, float], float] = lambda site, keep: 0.0
    """Operations of choosing what stays of a site and re-fitting it."""
    digest_work: Callable[[Site], float] = lambda site: 0.0
    """Operations of a site's findings."""
    workspace: Callable[[Site], int] = lambda site: 0
    """Numbers that solving a site takes beside its W and H."""
    digest_workspace: Callable[[Site], int] = lambda site: 0
    """Numbers that a site's findings take beside its W and statistics."""

    def surveying_with(self, other: Needs) -> Needs:
        """Those of a survey that serves another job as well."""
        return replace(
            self,
            survey=self.survey | other.survey,
            shared=True,
            digest_workspace=lambda site: max(self.digest_workspace(site), other.digest_workspace(site)),
        )

    activations: torch.dtype | None = None
    """What they are stored in; None for what is computed."""

    @property
    def gradients(self) -> bool:
        """Whether a backward sweep is made."""
        return bool(self.survey & GRADIENTS)

    @property
    def dense_stream(self) -> bool:
        """Whether the dense stream moves along in the prune sweep."""
        return self.compensates or self.aims or self.refines > 0
