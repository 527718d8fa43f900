"""The facts about a job that determine its resources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...maths.sums import GRADIENTS, Statistic
from ...model.site import Site

REFINE_SEQUENCES = 8
"""Sequences per refinement step."""


@dataclass(frozen=True)
class Workload:
    """What a job does, as far as its resources depend on it."""

    samples: int  # number of sequences
    length: int  # tokens per sequence
    text: bool  # whether the job runs text through the model at all
    activations: torch.dtype | None = None  # dtype in which activations are stored; None: as computed
    survey: frozenset[Statistic] = frozenset()  # statistics that the survey sums
    findings: int = 0  # elements of the sums' dtype stored on disk between survey and prune sweep
    gram: bool = False  # whether the prune sweep sums the Gram of each consumer's input
    compensates: bool = False  # whether producers are compensated, which sums the Grams of their inputs
    aims: bool = False  # whether consumers are fitted to a target
    refines: int = 0  # steps of block refinement per block
    corrects: int = 0  # steps of low-rank training after each shot
    correction_rank: int = 0
    shots: int = 1
    rank: int | None = None  # rank of the updates that refinement trains; None trains whole weights
    prunes: bool = True  # False for evaluation and tuning
    scores: bool = False  # whether the head computes losses
    generates: bool = False  # whether the model generates its calibration tokens
    removes: float = 0.0  # share of the blocks' parameters removed in the end
    workspace: Callable[[Site], int] = lambda site: 0
    """Peak elements that solving a site holds besides its W and H."""
    digest_workspace: Callable[[Site], int] = lambda site: 0
    """Peak elements that computing a site's findings holds besides its W and statistics."""

    @property
    def gradients(self) -> bool:
        """Whether the survey includes a backward sweep."""
        return bool(self.survey & GRADIENTS)

    @property
    def dense_stream(self) -> bool:
        """Whether the prune sweep also advances the dense stream."""
        return self.compensates or self.aims or self.refines > 0
