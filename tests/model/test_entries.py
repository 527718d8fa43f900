"""Tensors as the model sees them: parts of stored tensors, and the bytes that are read for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamprune.model import entries
from streamprune.model.checkpoint import Checkpoint

EXPERTS = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
BIASES = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file({"experts": EXPERTS, "biases": BIASES}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    return Checkpoint(tmp_path)


@pytest.mark.parametrize("rows", [slice(None), slice(0, 3), slice(2, None), slice(None, None, 2), slice(1, None, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_are_what_indexing_gives(
    checkpoint: Checkpoint, rows: slice, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "CHUNK", 9)  # two rows
    entry, expected = checkpoint["experts"].part(1, rows, transposed=transposed), EXPERTS[1]
    expected = (expected.T if transposed else expected)[rows]
    assert (entry.shape, entry.nbytes) == (expected.shape, expected.nbytes)
    assert torch.equal(entry.read(), expected)
    assert torch.equal(checkpoint["experts"].part(1).part(None, rows, transposed=transposed).read(), expected)
    if not transposed:
        assert torch.equal(checkpoint["biases"].part(2, rows).read(), BIASES[2][rows])


def test_parts_of_parts(checkpoint: Checkpoint) -> None:
    turned = checkpoint["experts"].part(2, transposed=True)
    assert torch.equal(turned.part(rows=slice(1, 3)).read(), EXPERTS[2].T[1:3])
    assert torch.equal(turned.part(rows=slice(1, 3)).part(rows=slice(1, None)).read(), EXPERTS[2].T[2:3])
    assert torch.equal(turned.part(transposed=True).read(), EXPERTS[2])


def test_a_part_reads_only_its_bytes(checkpoint: Checkpoint) -> None:
    whole = checkpoint["experts"]
    checkpoint.divide("experts", {"up": whole.part(1, slice(3, 6)), "gate": whole.part(1, slice(None, None, 2))})
    assert "experts" not in checkpoint
    checkpoint.read("up")
    assert checkpoint.bytes_read == EXPERTS[1, 3:].nbytes
    checkpoint.read("gate")  # every second row: the rows between are read too, those of other experts are not
    assert checkpoint.bytes_read == EXPERTS[1, 3:].nbytes + EXPERTS[1].nbytes
    checkpoint.announce("gate")
    assert set(checkpoint.identity()["shards"]) == {"model.safetensors"}
    assert checkpoint.changed({}, {"up": 0}) == "up"
