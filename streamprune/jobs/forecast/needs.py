"""Needs: the properties of a job that determine its resources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...maths.sums import GRADIENTS, Statistic
from ...model.site import Site

REFINE_SEQUENCES = 8
"""Sequences per refinement step."""


@dataclass(frozen=True)
class Needs:
    """What a job does, as far as its resources depend on it."""

    samples: int
    """Number of sequences."""
    length: int
    """Tokens per sequence."""
    text: bool
    """Whether the job runs text through the model at all."""
    survey: frozenset[Statistic] = frozenset()
    """Statistics that the survey sums."""
    findings: int = 0
    """Elements of the sums' dtype stored on disk between survey and prune sweep."""
    gram: bool = False
    """Whether the prune sweep sums the Gram of each consumer's input."""
    compensates: bool = False
    """Whether producers are compensated, which sums the Grams of their inputs."""
    aims: bool = False
    """Whether consumers are fitted to a target."""
    refines: int = 0
    """Steps of block refinement per block."""
    corrects: int = 0
    """Steps of low-rank training after each shot."""
    correction_rank: int = 0
    """Rank of the low-rank training after each shot."""
    shots: int = 1
    rank: int | None = None
    """Rank of the updates that refinement trains; None trains whole weights."""
    prunes: bool = True
    """Whether the job prunes; False for evaluation and tuning."""
    scores: bool = False
    """Whether the head computes losses."""
    generates: bool = False
    """Whether the model generates its calibration tokens."""
    removes: float = 0.0
    """Share of the blocks' parameters removed in the end."""
    workspace: Callable[[Site], int] = lambda site: 0
    """Peak elements that solving a site holds besides its W and H."""
    digest_workspace: Callable[[Site], int] = lambda site: 0
    """Peak elements that computing a site's findings holds besides its W and statistics."""

    activations: torch.dtype | None = None
    """Dtype in which activations are stored; None stores them as computed."""

    @property
    def gradients(self) -> bool:
        """Whether the survey includes a backward sweep."""
        return bool(self.survey & GRADIENTS)

    @property
    def dense_stream(self) -> bool:
        """Whether the prune sweep also advances the dense stream."""
        return self.compensates or self.aims or self.refines > 0
