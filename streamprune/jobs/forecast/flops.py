"""Forecast the FLOPs of a job and the bytes of weights that it reads."""

from __future__ import annotations

from ...maths.flops import KINDS, Kind
from .shapes import Shapes
from .workload import REFINE_SEQUENCES


def bytes_to_read(shapes: Shapes, every: int) -> int:
    """Return the bytes of stored weights read over the whole job, given boundaries at every `every`-th block."""
    skeleton, workload = shapes.skeleton, shapes.workload
    embed = sum(skeleton.checkpoint[name].nbytes for name in skeleton.embed_names())
    head = sum(skeleton.checkpoint[name].nbytes for name in skeleton.head_names())
    everything = shapes.stored_all + embed + head
    if not workload.prunes:
        return everything
    head += embed if skeleton.tied else 0
    # All weights are read to check and to prune. Gradients read them forward, backward and to recompute boundaries.
    survey = 2 + (every > 1) if workload.gradients else 1 if workload.survey else 0
    survey += 2 * workload.corrects + bool(workload.corrects)
    shot = everything + survey * shapes.stored_all + workload.text * embed + workload.gradients * head
    writing = workload.generates * (workload.length - 1) * (shapes.stored_all + embed + head)
    return everything + workload.shots * shot + writing


def flops_by_kind(shapes: Shapes) -> dict[Kind, int]:
    """Return the FLOPs of the whole job by kind: one forward pass times the passes of each sweep, and the sums.

    FLOPs of solving are not forecast: they depend on the recipe and are few if there is enough text. All sites are
    assumed to lose the same share of their units. Sums are counted at the sizes before the first shot.
    """
    skeleton, workload, d = shapes.skeleton, shapes.workload, shapes.d
    tokens = workload.samples * workload.length * workload.text
    head = 2 * d * skeleton.vocabulary * workload.samples * (workload.length - 1) * workload.text
    forward = consumers = mixing = sums = last = 0.0
    for number, sublayer in enumerate(shapes.all_sublayers()):
        last = 0.0
        pruned_input = number > 0  # the input of the first sublayer is the same in both streams
        for site in sublayer.sites:
            attention = site.kind == "attention"
            mixed = 4 * workload.length * site.columns * tokens * attention
            last += 2 * sum(site.linears) * site.share * tokens + mixed
            mixing += mixed
            consumers += 2 * site.linears[-1] * site.share * tokens
            summed = [*shapes.summed(site), *([site.columns] if workload.gram else [])]
            sums += 2 * tokens * site.share * sum(shapes.gram_products(n) for n in summed)
            sums += 2 * tokens * site.columns * d * (workload.aims and pruned_input and site.expert is None)
            if "divergence" in workload.survey and attention:
                sums += 2 * sum(site.linears[:-1]) * tokens + mixed
        sums += 2 * tokens * (shapes.gram_products(d) + d * d) * (workload.compensates and pruned_input)
        forward += last
    advanced = forward if workload.refines else forward - last  # no stream is needed after the last sublayer
    found = dict.fromkeys(KINDS, 0.0)
    # Refinement: forward, gradients of inputs and of weights. Correction: forward twice, and gradients of inputs.
    step = 3 * min(REFINE_SEQUENCES, workload.samples) / max(workload.samples, 1)
    for shot in range(workload.shots):
        before, after = (1 - workload.removes * done / workload.shots for done in (shot, shot + 1))
        if workload.survey or not workload.prunes:
            found["sweeps"] += before * forward
        if workload.gradients:
            # Forward again, then gradients of inputs. For attention, backward takes five products, forward two.
            found["sweeps"] += before * (2 * forward + 1.5 * mixing)
        found["sweeps"] += head * (2 if workload.gradients else workload.scores)
        if workload.gram:
            found["sweeps"] += before * (forward - consumers)
        if workload.prunes and workload.dense_stream:
            found["sweeps"] += before * (forward if workload.aims else advanced)
        if workload.prunes and (workload.gram or workload.dense_stream):
            found["sweeps"] += after * advanced
        found["training"] += workload.corrects * step * (after * forward + 2 / 3 * head)
    found["training"] += workload.refines * step * (1 - workload.removes) * forward
    found["sums"] = workload.shots * sums * workload.prunes
    found["writing"] = workload.generates * (forward + head)
    return {kind: round(count) for kind, count in found.items()}
