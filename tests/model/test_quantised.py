"""Quantised sources: the bits that transformers gives when it dequantises them, and results that equal those of the 16-bit twin."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UP, contents, edit_tensors, make_tiny, set_tensor
from safetensors.torch import save_file
from stopping import Stop, stopping_after
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import streamprune
from streamprune import Config
from streamprune.errors import CheckpointError, ResumeError
from streamprune.model import entries
from streamprune.model.checkpoint import Checkpoint
from streamprune.model.whole import load_whole

Make = Callable[..., Config]
Tiny = Callable[..., Path]
NAME = "model.layers.0.mlp.up_proj.weight"


def fp8(*shape: int) -> Tensor:
    """Random float8_e4m3fn with every value but NaN among them."""
    bits = torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    return torch.where(bits & 127 == 127, 0, bits).to(torch.uint8).view(torch.float8_e4m3fn)


def scales(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.rand(shape, generator=torch.Generator().manual_seed(1)) / 100
    return random.log2().round().exp2().to(dtype) if dtype == torch.float8_e8m0fnu else random.to(dtype)


def opened(folder: Path, tensors: dict[str, Tensor], method: str = "fp8", **settings: Any) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method, **settings}}))
    return Checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((64, 96), (4, 3)),  # blocks
        ((64, 96), (64, 1)),  # rows
        ((64, 96), (1, 1)),
        ((5, 64, 96), (5, 4, 3)),  # experts
        ((5, 64, 96), (5, 1, 1)),
    ],
)
def test_fp8_equals_transformers(
    shape: tuple[int, ...], grid: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(entries, "CHUNK", 1000)
    s = (scales(*grid) * 2000).to(torch.uint8) + 110 if dtype == torch.uint8 else scales(*grid, dtype=dtype)
    tensors = {NAME: fp8(*shape), f"{NAME}_scale_inv": s, "model.layers.0.mlp.up_proj.activation_scale": scales(1)}
    checkpoint = opened(tmp_path, tensors, weight_block_size=[16, 32])
    expected = Fp8Dequantize(None)._dequantize_one(tensors[NAME], s, output_dtype=torch.bfloat16)
    assert list(checkpoint) == [NAME]
    assert checkpoint.dtype == torch.bfloat16
    assert torch.equal(checkpoint.read(NAME), expected)
    assert checkpoint.bytes_read == tensors[NAME].nbytes + s.nbytes
    if len(shape) == 3:
        part = checkpoint[NAME].part(3, slice(8, 40))
        assert torch.equal(part.read(), expected[3, 8:40])
        assert part.stored_bytes <= 32 * 96 + s[3].nbytes
        assert torch.equal(checkpoint[NAME].part(4, slice(1, None, 2), transposed=True).read(), expected[4].T[1::2])


@pytest.mark.parametrize("block", [(16, 32), (128, 128), (7, 50)])
def test_last_blocks_of_fp8_may_be_narrower(block: tuple[int, int], tmp_path: Path) -> None:
    grid = ceil(75 / block[0]), ceil(100 / block[1])
    tensors = {NAME: fp8(75, 100), f"{NAME}_scale_inv": scales(*grid)}
    expected = _dequantize_fp8_weight(*tensors.values(), list(block), torch.float32).bfloat16()
    checkpoint = opened(tmp_path, tensors, weight_block_size=list(block))
    assert torch.equal(checkpoint.read(NAME), expected)
    part = checkpoint[NAME].part(None, slice(20, 30))
    assert torch.equal(part.read(), expected[20:30])
    assert part.stored_bytes < checkpoint[NAME].stored_bytes


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (64,), (64, 1)])
def test_scales_per_tensor_and_row(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, s = fp8(64, 96), scales(*shape, dtype=torch.bfloat16)
    expected = (weight.float() * s.float().view(-1, 1)).bfloat16()
    own = {NAME: weight, f"{NAME}_scale": s, "model.layers.0.mlp.up_proj.input_scale": scales(1)}
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    how = {"format": "float-quantized", "config_groups": {"group_0": group}}
    for checkpoint in (
        opened(tmp_path / "compressed", own, "compressed-tensors", **how),
        opened(tmp_path / "fp8", {NAME: weight, f"{NAME}_scale_inv": s}, weight_block_size=None),
    ):
        assert list(checkpoint) == [NAME]
        assert torch.equal(checkpoint.read(NAME), expected)


@pytest.mark.parametrize("experts", [1, 3])
def test_mxfp4_equals_transformers(experts: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(entries, "CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (experts, 12, 2, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(255, (experts, 12, 2), generator=generator, dtype=torch.uint8)
    exponents[:, :, 0] = exponents[:, :, 0] % 16 + 118
    name, bias = "model.layers.0.mlp.experts.gate_up_proj", torch.ones(experts, 12, dtype=torch.bfloat16)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": exponents, f"{name}_bias": bias}
    checkpoint, expected = opened(tmp_path, tensors, "mxfp4"), convert_moe_packed_tensors(blocks, exponents)
    assert set(checkpoint) == {name, f"{name}_bias"}
    assert checkpoint[name].shape == expected.shape == (experts, 64, 12)
    assert torch.equal(checkpoint.read(name), expected)
    last = experts - 1
    for rows in (slice(0, None, 2), slice(1, None, 2), slice(3, 9)):
        part = checkpoint[name].part(last, rows, transposed=True)
        assert torch.equal(part.read(), expected[last].T[rows])
        assert part.stored_bytes <= 12 * 34  # of one expert
    assert torch.equal(checkpoint[name].part(last).read(), expected[last])


def quantise(folder: Path, block: int = 16) -> dict[str, Tensor]:
    """Quantise the linears of a checkpoint's blocks to FP8 in place; return what they become, in bfloat16."""
    twin: dict[str, Tensor] = {}

    def change(tensors: dict[str, Tensor]) -> None:
        for name, weight in list(tensors.items()):
            if name.endswith("proj.weight"):
                rows, columns = weight.shape
                high, wide = ceil(rows / block), ceil(columns / block)
                tiles = torch.zeros(high * block, wide * block)
                tiles[:rows, :columns] = weight
                s = tiles.view(high, block, wide, block).abs().amax((1, 3)) / 448
                full = s.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns]
                tensors[name], tensors[f"{name}_scale_inv"] = (weight / full).to(torch.float8_e4m3fn), s
                twin[name] = (tensors[name].float() * full).bfloat16()

    edit_tensors(folder, change)
    for path in folder.glob("*.index.json"):
        index = json.loads(path.read_text())
        index["weight_map"] |= {f"{name}_scale_inv": index["weight_map"][name] for name in twin}
        path.write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    return twin


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny llama in FP8, and the same in bfloat16; under the same name, which reports contain."""
    plain = make_tiny(tmp_path / "plain" / "model", "llama", torch.bfloat16)
    small = tmp_path / "fp8" / "model"
    shutil.copytree(plain, small)
    twin = quantise(small)
    edit_tensors(plain, lambda tensors: tensors.update({name: twin[name] for name in tensors if name in twin}))
    return small, plain


def weights(folder: Path) -> dict[str, bytes]:
    return {
        name: data for name, data in contents(folder).items() if name.endswith(".safetensors") or name == "config.json"
    }


def test_an_fp8_model_gives_the_bytes_of_its_16_bit_twin(
    twins: tuple[Path, Path], configured: Make, text: Path
) -> None:
    small, plain = twins
    results, forecasts = [], []
    for model in twins:
        config = configured(model, out=f"out-{model.parent.name}", recipe="default")
        forecasts.append(streamprune.forecast_job(config))
        streamprune.prune(config)
        assert streamprune.verify(config.out).sound
        results.append(weights(config.out))
        assert b"quantization_config" not in results[-1]["config.json"]
    assert results[0] == results[1]
    same = [(each.steps, each.operations_by_kind, each.output_bytes, each.disk_bytes) for each in forecasts]
    assert same[0] == same[1]
    assert forecasts[0].bytes_to_read < forecasts[1].bytes_to_read
    measured = [streamprune.evaluate(model, text, seq_len=24) for model in twins]
    assert measured[0].perplexity == measured[1].perplexity
    loaded = [load_whole(model).state_dict() for model in twins]
    assert all(torch.equal(tensor, loaded[1][name]) for name, tensor in loaded[0].items())
    assert streamprune.inspect(small)["model"]["dtypes"] == ["bfloat16"]
    assert streamprune.verify(small).sound
    assert Checkpoint(small).identity() != Checkpoint(plain).identity()


@pytest.mark.parametrize("sampled", [False, True])
def test_a_job_notices_that_its_quantised_source_changed(
    sampled: bool, twins: tuple[Path, Path], configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(twins[0], recipe="default", round_to=1)
    with stopping_after(3, monkeypatch), pytest.raises(Stop):
        streamprune.prune(config)

    def negate_first(tensor: Tensor) -> Tensor:
        tensor.view(torch.uint8)[0] ^= 128
        return tensor

    # The samples of `identity` contain small tensors whole, but not the first rows of a large one.
    set_tensor(twins[0], f"{UP}_scale_inv" if sampled else UP, negate_first)
    message = "inputs.model.shards" if sampled else rf"{UP!r} has changed since the job was started"
    with pytest.raises(ResumeError, match=message):
        streamprune.prune(config)


def test_verify_finds_nan_in_quantised_weights(twins: tuple[Path, Path]) -> None:
    set_tensor(twins[0], UP, lambda tensor: torch.full_like(tensor.float(), float("nan")).to(tensor.dtype))
    (fault,) = streamprune.verify(twins[0]).faults
    assert (fault.kind, fault.tensor) == ("values", UP)
    set_tensor(twins[0], UP, lambda tensor: torch.zeros_like(tensor.float()).to(tensor.dtype))
    set_tensor(twins[0], f"{UP}_scale_inv", lambda tensor: tensor / 0)
    (fault,) = streamprune.verify(twins[0]).faults
    assert (fault.kind, fault.tensor) == ("values", f"{UP}_scale_inv")


@pytest.mark.parametrize(
    ("tensors", "method", "message"),
    [
        ({NAME: fp8(4, 4)}, "fp8", "is FP8, but there is no scale for it"),
        (
            {NAME: fp8(4, 4), f"{NAME}_scale_inv": scales(3, 3)},
            "fp8",
            r"shape \[4, 4\], which its scales \[3, 3\] do not fit",
        ),
        ({NAME: fp8(4, 4), f"{NAME}_scale_inv": scales(0)}, "fp8", "do not fit"),
        ({NAME: fp8(2, 4, 4), f"{NAME}_scale_inv": scales(3, 1, 1)}, "fp8", "do not fit"),
        ({NAME: fp8(0, 4), f"{NAME}_scale_inv": scales(1)}, "fp8", "do not fit"),
        (
            {"x_blocks": torch.zeros(2, 3, 1, 16, dtype=torch.uint8)},
            "mxfp4",
            "no MXFP4 scales that fit tensor 'x_blocks'",
        ),
        ({"x_scales": torch.zeros(2, 3, 1, dtype=torch.uint8)}, "mxfp4", "no MXFP4 blocks for the scales 'x_scales'"),
        (
            {
                "x": torch.zeros(2, 32, 3),
                "x_blocks": torch.zeros(2, 3, 1, 16, dtype=torch.uint8),
                "x_scales": torch.zeros(2, 3, 1, dtype=torch.uint8),
            },
            "mxfp4",
            r"tensor 'x' is stored in MXFP4 \(x_blocks\) and plainly too",
        ),
        ({"a.scale": torch.zeros(2, dtype=torch.uint8)}, "fp8", "tensor 'a.scale' is U8, and no FP8 tensor's scale"),
        ({"a.scale": scales(2, dtype=torch.float8_e8m0fnu)}, "fp8", "is F8_E8M0, and no FP8 tensor's scale"),
        ({NAME: fp8(), f"{NAME}_scale_inv": scales(1)}, "fp8", r"shape \[\], which its scales \[1\] do not fit"),
        ({NAME: torch.zeros(2, dtype=torch.int8)}, "fp8", "quantised weights .fp8. cannot be pruned"),
        ({NAME: fp8(4, 4)}, "mxfp4", "quantised weights .mxfp4. cannot be pruned"),
    ],
)
def test_tensors_that_do_not_fit(tensors: dict[str, Tensor], method: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, tensors, method)


def test_only_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    names = [
        "a.input_scale",
        "k_scale",
        "mlp.experts.gate_up_proj_activation_scale",
        "a.block_scale",
        "a.my_input_scale",
    ]
    checkpoint = opened(tmp_path, {name: scales(2) for name in names})
    assert set(checkpoint) == {"a.block_scale", "a.my_input_scale"}


@pytest.mark.parametrize("inside", [False, True])
def test_quantisation_of_the_text_model_of_a_wrapper(inside: bool, tmp_path: Path) -> None:
    weight, s = fp8(64, 96), scales(64, 1)
    save_file({NAME: weight, f"{NAME}_scale_inv": s}, tmp_path / "model.safetensors")
    how = {"quantization_config": {"quant_method": "fp8"}}
    config = {"text_config": {"hidden_size": 8, **how}} if inside else {"text_config": {"hidden_size": 8}, **how}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read(NAME), (weight.float() * s).bfloat16())
    assert checkpoint.config == {"text_config": {"hidden_size": 8}}


PACKED: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "gptq": ({"a.qweight": torch.zeros(2, dtype=torch.int32), "a.scales": scales(2)}, {"bits": 4}),
    "awq": ({"a.qweight": torch.zeros(2, dtype=torch.int32)}, {"bits": 4}),
    "bitsandbytes": ({"a.weight": torch.zeros(2, dtype=torch.uint8), "a.weight.absmax": scales(2)}, {}),
    "compressed-tensors": ({"a.weight_packed": torch.zeros(2, dtype=torch.int32)}, {"format": "pack-quantized"}),
}


@pytest.mark.parametrize("method", PACKED)
def test_other_methods_are_refused_with_the_original(method: str, tmp_path: Path) -> None:
    tensors, settings = PACKED[method]
    refused = rf"quantised weights \({method}\) cannot be pruned, only F64, .*; take the 16-bit original"
    with pytest.raises(CheckpointError, match=f"{refused} that was quantised"):
        opened(tmp_path, tensors, method, **settings)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/model"}))
    with pytest.raises(CheckpointError, match=f"{refused}: org/model"):
        Checkpoint(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model:\n- Qwen/Qwen3-8B\n---\n")
    with pytest.raises(CheckpointError, match=f"{refused}: Qwen/Qwen3-8B"):
        Checkpoint(tmp_path)
