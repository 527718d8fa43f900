"""Forecast the FLOPs of a job and the bytes of weights that it reads."""

from __future__ import annotations

from ...maths.flops import KINDS, Kind
from .needs import REFINE_SEQUENCES
from .shapes import Shapes


def bytes_to_read(shapes: Shapes, every: int) -> int:
    """Return the bytes of stored weights read over the whole job, given boundaries at every `every`-th block."""
    skeleton, needs = shapes.skeleton, shapes.needs
    embed = sum(skeleton.checkpoint[name].nbytes for name in skeleton.embed_names())
    head = sum(skeleton.checkpoint[name].nbytes for name in skeleton.head_names())
    everything = shapes.stored_all + embed + head
    if not needs.prunes:
        return everything
    head += embed if skeleton.tied else 0
    # All weights are read to check and to prune. Gradients read them forward, backward and to recompute boundaries.
    survey = 2 + (every > 1) if needs.gradients else 1 if needs.survey else 0
    survey += 2 * needs.corrects + bool(needs.corrects)
    shot = everything + survey * shapes.stored_all + needs.text * embed + needs.gradients * head
    writing = needs.generates * (needs.length - 1) * (shapes.stored_all + embed + head)
    return everything + needs.shots * shot + writing


def flops_by_kind(shapes: Shapes) -> dict[Kind, int]:
    """Return the FLOPs of the whole job by kind: one forward pass times the passes of each sweep, and the sums.

    FLOPs of solving are not forecast: they depend on the recipe and are few if there is enough text. All sites are
    assumed to lose the same share of their units. Sums are counted at the sizes before the first shot.
    """
    skeleton, needs, d = shapes.skeleton, shapes.needs, shapes.d
    tokens = needs.samples * needs.length * needs.text
    head = 2 * d * skeleton.vocabulary * needs.samples * (needs.length - 1) * needs.text
    forward = consumers = mixing = sums = last = 0.0
    for number, sublayer in enumerate(shapes.all_sublayers()):
        last = 0.0
        pruned_input = number > 0  # the input of the first sublayer is the same in both streams
        for site in sublayer.sites:
            attention = site.kind == "attention"
            mixed = 4 * needs.length * site.columns * tokens * attention
            last += 2 * sum(site.linears) * site.share * tokens + mixed
            mixing += mixed
            consumers += 2 * site.linears[-1] * site.share * tokens
            summed = [*shapes.summed(site), *([site.columns] if needs.gram else [])]
            sums += 2 * tokens * site.share * sum(shapes.gram_products(n) for n in summed)
            sums += 2 * tokens * site.columns * d * (needs.aims and pruned_input and site.expert is None)
            if "divergence" in needs.survey and attention:
                sums += 2 * sum(site.linears[:-1]) * tokens + mixed
        sums += 2 * tokens * (shapes.gram_products(d) + d * d) * (needs.compensates and pruned_input)
        forward += last
    advanced = forward if needs.refines else forward - last  # no stream is needed after the last sublayer
    found = dict.fromkeys(KINDS, 0.0)
    # Refinement: forward, gradients of inputs and of weights. Correction: forward twice, and gradients of inputs.
    step = 3 * min(REFINE_SEQUENCES, needs.samples) / max(needs.samples, 1)
    for shot in range(needs.shots):
        before, after = (1 - needs.removes * done / needs.shots for done in (shot, shot + 1))
        if needs.survey or not needs.prunes:
            found["sweeps"] += before * forward
        if needs.gradients:
            # Forward again, then gradients of inputs. For attention, backward takes five products, forward two.
            found["sweeps"] += before * (2 * forward + 1.5 * mixing)
        found["sweeps"] += head * (2 if needs.gradients else needs.scores)
        if needs.gram:
            found["sweeps"] += before * (forward - consumers)
        if needs.prunes and needs.dense_stream:
            found["sweeps"] += before * (forward if needs.aims else advanced)
        if needs.prunes and (needs.gram or needs.dense_stream):
            found["sweeps"] += after * advanced
        found["training"] += needs.corrects * step * (after * forward + 2 / 3 * head)
    found["training"] += needs.refines * step * (1 - needs.removes) * forward
    found["sums"] = needs.shots * sums * needs.prunes
    found["writing"] = needs.generates * (forward + head)
    return {kind: round(count) for kind, count in found.items()}
