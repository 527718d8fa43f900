"""What the stream carries besides hidden states, see `model.side_inputs`."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from pathlib import Path

import torch

from streamprune.model.side_inputs import Part, Shared, SideInputs, first, with_aside
from streamprune.model.skeleton import open_skeleton

Tiny = Callable[..., Path]
D, HEADS, SIZE = 4, 2, 3
KEYS = Shared("shared", "full", (Part(6, (HEADS, SIZE)), Part(12, (HEADS, SIZE))))


def stream(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_what_a_block_puts_is_what_the_next_one_reads() -> None:
    x, hidden = stream(2, 5, 18), stream(2, 5, D)
    k, v = stream(2, HEADS, 5, SIZE), 2 * stream(2, HEADS, 5, SIZE)
    gives, reads = SideInputs(D, 18, written=(KEYS,)), SideInputs(D, 18, (("each", Part(4, (2,))),), shared=(KEYS,))
    before, after = {"shared": UserDict()}, {"shared": UserDict({"full": (k, v)})}
    y = gives.put(x, hidden, gives.taken(before, after))
    assert torch.equal(gives.hidden(y), hidden)
    found = reads.arguments(y, before)
    assert torch.equal(found["each"], x[..., 4:6])
    assert all(map(torch.equal, found["shared"]["full"], (k, v)))
    assert before["shared"] == {}  # what one block is given is for no other


def test_what_was_there_before_is_not_put_again() -> None:
    k = stream(2, HEADS, 5, SIZE)
    both = {"shared": UserDict({"full": (k, k)})}
    assert SideInputs(D, 18, written=(KEYS,)).taken(both, {"shared": UserDict(both["shared"])}) == []


def test_without_side_inputs_nothing_is_copied() -> None:
    plain, x, arguments = SideInputs(D, D), stream(2, 5, D), {"mask": None}
    assert plain.hidden(x) is x
    assert plain.arguments(x, arguments) is arguments
    assert plain.put(stream(2, 5, D), x) is x
    assert first(x, [plain], [arguments]) is x


def test_the_first_blocks_stream_has_the_inputs_of_all_blocks() -> None:
    hidden, one, two = stream(2, 5, D), stream(2, 5, 2), 3 * stream(2, 5, 2)
    blocks = [SideInputs(D, 8, (("each", Part(start, (2,))),)) for start in (4, 6)]
    found = first(hidden, with_aside(blocks), [{"each": one}, {"each": two}])
    assert torch.equal(found, torch.cat((hidden, one, two, torch.zeros(2, 5, D)), -1))


def test_attention_whose_keys_are_shared_stays_and_its_readers_lose_query_heads(tiny: Tiny) -> None:
    skeleton = open_skeleton(tiny("gemma4-e"), torch.device("cpu"), "float32")
    plain, source, reader = (entries[0] for entries in skeleton.entries)
    assert plain.consumer
    assert not source.consumer
    assert (reader.consumer, reader.width) == ("self_attn.o_proj", 8)
    assert [producer.name for producer in reader.producers] == ["self_attn.q_proj"]
    assert skeleton.unpruned == {"self_attn": [1], "per_layer_input_gate": [0, 1, 2]}
    # Three blocks' inputs of 6 numbers, a key and a value of 8.
    assert skeleton.stream_width == 32 + 3 * 6 + 2 * 8


def test_keys_that_no_later_block_reads_are_not_shared(tiny: Tiny) -> None:
    skeleton = open_skeleton(tiny("gemma4"), torch.device("cpu"), "float32")
    assert skeleton.stream_width == skeleton.width
    assert all(entries[0].consumer for entries in skeleton.entries)


def test_heads_of_which_each_has_its_own_keys_elsewhere_stay(tiny: Tiny) -> None:
    path: Path = tiny("gemma4-e", num_key_value_heads=2)
    assert open_skeleton(path, torch.device("cpu"), "float32").unpruned["self_attn"] == [1, 2]
