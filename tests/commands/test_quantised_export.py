"""GGUF in llama.cpp's quantised formats: its choice of types, its quantiser's bytes, the importance of columns."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from conftest import EXAMPLE, EXAMPLE_TEXT, make_tiny
from gguf_reference import runtime, runtime_logits, stock_logits, write_byte_tokenizer
from streamprune_cli import main
from torch import Tensor, nn

import streamprune
from streamprune.errors import ConfigError
from streamprune.model.formats import QUANTISED
from streamprune.model.skeleton import open_skeleton
from streamprune.system.progress import Silent

gguf = pytest.importorskip("gguf", reason="the gguf package is not here")
Make = Callable[..., Path]
WIDE = {"vocab_size": 328, "hidden_size": 256, "head_dim": 32, "intermediate_size": 256, "num_attention_heads": 8}
NARROW = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 3, "num_key_value_heads": 3}
MODELS = {
    "llama-24": ("llama", {"num_hidden_layers": 24, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama-80": (
        "llama",
        {"num_hidden_layers": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
    "llama-narrow": ("llama", {**NARROW, "num_hidden_layers": 9, "tie_word_embeddings": True}),
    "mixtral-8": ("mixtral", {"num_hidden_layers": 5, "num_key_value_heads": 4, "num_local_experts": 8}),
}
TYPES = json.loads(Path(__file__).with_name("llama_quantize_types.json").read_text(encoding="utf-8"))
"""What llama.cpp's `llama_model_quantize` (of node-llama-cpp 3.22.1) made of these models, exported in f32: by model and format,
the types of each role's tensors in order of blocks, with how many follow each other."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[str, Path] = {}

    def get(case: str) -> Path:
        if case not in made:
            name, changes = MODELS[case]
            made[case] = make_tiny(tmp_path_factory.mktemp("model"), name, **{**WIDE, **changes})
            write_byte_tokenizer(made[case])
        return made[case]

    return get


@pytest.fixture
def xllamacpp() -> Any:
    return pytest.importorskip("xllamacpp", reason="the xllamacpp package is not here")


@pytest.mark.parametrize("case", MODELS)
def test_types_are_those_that_llama_cpp_chooses(case: str, wide: Make) -> None:
    from streamprune.commands.export.tensors import plan
    from streamprune.model.llama_cpp import choose

    skeleton = open_skeleton(wide(case), torch.device("cpu"), "float32")
    formats = [key.partition(" ")[2] for key in TYPES if key.startswith(f"{case} ")]
    assert {*formats} == {*QUANTISED, "q8_0"}
    for format in formats:
        roles: dict[str, list[str]] = {}
        for each in plan(skeleton, choose(skeleton), format, None):
            if each.kind.name != "F32":
                roles.setdefault(each.name.removesuffix(".weight").split(".")[-1], []).append(each.kind.name.lower())
        found = {
            role: " ".join(f"{len(list(same))}×{kind}" for kind, same in groupby(kinds))
            for role, kinds in roles.items()
        }
        assert found == TYPES[f"{case} {format}"], format


def test_an_importance_changes_some_types() -> None:
    # llama.cpp: "guard against craziness in the first few ffn_down layers".
    from streamprune.model.formats import Model, Weight, gguf_type

    for format, guarded in (("q4_0", "q4_1"), ("q5_0", "q5_1"), ("q4_1", "q4_1"), ("q6_k", "q6_k")):
        model = Model(16, tied=False, imatrix=True)
        kinds = [gguf_type(format, Weight((8, 256), "down", block), model) for block in range(16)]
        assert kinds == [guarded] * 2 + [format] * 14


@pytest.mark.usefixtures("xllamacpp")
@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q6_k"])
def test_rows_are_quantised_as_llama_cpp_and_gguf_do(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamprune.commands.export import quantiser, tensors

    monkeypatch.setattr(tensors, "_CHUNK", 3 * 512)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tensor, number = (
        torch.randn(17, 512, generator=torch.Generator().manual_seed(0)),
        gguf.GGMLQuantizationType[kind.upper()],
    )
    packed = tensors.pack(tensor.to(torch.float64), number, "x")
    assert packed.tobytes() == quantiser.quantise_rows()(tensor.numpy(), number, None).tobytes()
    if not kind.endswith("_k"):  # the gguf package has the others too
        assert packed.tobytes() == gguf.quantize(tensor.numpy(), number).tobytes()
    bits = int(kind[1])
    error = float(np.abs(gguf.dequantize(packed, number) - tensor.numpy()).max())
    assert error < 8 / 2**bits


@pytest.mark.usefixtures("xllamacpp")
def test_columns_count_by_their_importance_each_expert_by_its_own() -> None:
    from streamprune.commands.export import tensors

    kind, generator = gguf.GGMLQuantizationType.Q4_K, torch.Generator().manual_seed(0)
    experts = torch.randn(3, 8, 512, generator=generator)
    importance = torch.rand(3, 512, generator=generator) ** 8

    def weighted(packed: Any) -> Tensor:
        left = torch.from_numpy(gguf.dequantize(packed, kind)).view_as(experts) - experts
        return (left.square() * importance[:, None]).sum((1, 2))

    plain, better = tensors.pack(experts, kind, "x"), tensors.pack(experts, kind, "x", importance)
    assert (weighted(better) < 0.7 * weighted(plain)).all()
    for number in range(3):
        alone = tensors.pack(experts[number], kind, "x", importance[number : number + 1])
        assert alone.tobytes() == better.reshape(3, 8, -1)[number].tobytes()
    # Those of another expert are worse.
    assert (weighted(tensors.pack(experts, kind, "x", importance.roll(1, 0))) > 1.2 * weighted(better)).all()


def observed(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Mean squares of what the linears of a model in memory read, and the experts of a mixture, float64."""
    sums: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sums.setdefault(f"{name}.weight", []).append(inputs[0].double().flatten(0, -2))

        return add

    def experts(name: str) -> Any:
        def add(module: Any, inputs: tuple[Tensor, ...]) -> None:
            hidden, index, weights = (each.flatten(0, -2) for each in inputs)
            for number in range(len(module.gate_up_proj)):
                tokens, rank = torch.where(index == number)
                read = hidden[tokens]
                gate, up = (read @ module.gate_up_proj[number].T).chunk(2, -1)
                for leaf, x in (("w1", read), ("w3", read), ("w2", F.silu(gate) * up * weights[tokens, rank, None])):
                    stored = f"{name.replace('.mlp.', '.block_sparse_moe.')}.{number}.{leaf}.weight"
                    sums.setdefault(stored, []).append(x.double())

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in f".{name}":
            module.register_forward_pre_hook(hook(name))
        if name.endswith(".experts"):
            module.register_forward_pre_hook(experts(name))
    with torch.no_grad():
        for window in windows:
            model(window[None])
    return {name: torch.cat(each).square().mean(0) for name, each in sums.items()}


@pytest.mark.parametrize("case", ["llama", "free", "mixtral"])
def test_importance_is_the_mean_square_of_what_linears_read(
    case: str, configured: Callable[..., streamprune.Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of at most 256 rows at a time, which bounds the memory of squares."""
    from streamprune.commands.export.importance import importance

    sizes = {"vocab_size": 328, "max_position_embeddings": 32}
    model = make_tiny(tmp_path, "mixtral" if case == "mixtral" else "llama", **sizes)
    write_byte_tokenizer(model)
    if case == "free":
        model = Path(streamprune.prune(configured(model, recipe="magnitude", ratio=0.3, blocks=(1, 3))).out)
    text = tmp_path / "text.txt"
    text.write_text((EXAMPLE_TEXT / "validation.txt").read_text()[:400])
    rows: list[int] = []
    honest = Tensor.double
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "double", lambda x: rows.append(x.numel() // x.shape[-1]) or honest(x))  # type: ignore[func-returns-value]
        found = importance(model, text, progress=Silent())
    assert max(rows) == 256

    from streamprune.model.tokenizer import load_tokenizer

    ids = torch.tensor(load_tokenizer(model)(text.read_text(), add_special_tokens=False)["input_ids"])
    stock = streamprune.load(model, dtype=torch.float32).eval()
    expected = observed(stock, ids[: len(ids) // 32 * 32].view(-1, 32))
    assert found.keys() == expected.keys()
    for name, columns in expected.items():
        assert torch.isfinite(found[name]).all()
        torch.testing.assert_close(found[name].double(), columns, rtol=1e-3, atol=1e-6, msg=name)


def test_an_expert_that_no_token_reaches_has_ones(tmp_path: Path) -> None:
    from streamprune.commands.export.importance import importance

    model = make_tiny(tmp_path, "mixtral", vocab_size=328, num_local_experts=16, max_position_embeddings=6)
    write_byte_tokenizer(model)
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh")
    found = importance(model, text, progress=Silent())
    ones = [name for name, columns in found.items() if torch.equal(columns, torch.ones_like(columns))]
    assert len(ones) >= 3 * 2 * (16 - 6 * 2)
    assert all(".experts." in name for name in ones)


# Of the logits' standard deviation, at the worst logit, with trained weights.
PRECISION = {"q4_0": 1.2, "q4_k_m": 0.8, "q5_k_m": 0.5, "q6_k": 0.2}


@pytest.mark.usefixtures("xllamacpp")
@pytest.mark.parametrize("layout", ["dense", "free", "uniform"])
def test_llama_cpp_runs_quantised_files(
    layout: str, configured: Callable[..., streamprune.Config], tmp_path: Path
) -> None:
    folder = EXAMPLE
    if layout != "dense":
        blocks = (1, 3) if layout == "free" else None
        config = configured(EXAMPLE, layout, recipe="magnitude", ratio=0.1, layout=layout, blocks=blocks, round_to=32)
        folder = Path(streamprune.prune(config).out)
    window = list(range(40, 88))
    expected = stock_logits(folder, window)
    spreads = []
    for dtype, limit in PRECISION.items():
        done = streamprune.export_gguf(folder, tmp_path / "model.gguf", dtype=dtype)
        assert done.dtype == dtype
        assert done.size == done.path.stat().st_size
        spreads.append(float(np.abs(runtime_logits(done.path, window) - expected).max() / expected.std()))
        assert spreads[-1] < limit, dtype
    assert spreads[-1] < spreads[0]


@pytest.mark.usefixtures("xllamacpp")
def test_perplexity_is_that_of_the_dequantised_weights_and_an_imatrix_lowers_it(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((EXAMPLE_TEXT / "validation.txt").read_text()[:9000])
    from streamprune.model.tokenizer import load_tokenizer

    ids = torch.tensor(load_tokenizer(EXAMPLE)(text.read_text(), add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // 128 * 128].view(-1, 128)
    found = []
    for given in ({}, {"imatrix_text": EXAMPLE_TEXT / "calibration.txt"}):
        out = streamprune.export_gguf(EXAMPLE, tmp_path / f"{len(given)}.gguf", dtype="q2_k", **given).path
        here = streamprune.evaluate(out, text, seq_len=128, dtype="float32").perplexity
        found.append(here)
        # llama.cpp rounds activations to 8 bits.
        assert runtime().perplexity(out, windows) == pytest.approx(here, rel=0.02)
    assert found[1] < found[0]


@pytest.fixture
def small(wide: Make) -> Path:
    return wide("llama-narrow")


def refused(small: Path, out: Path, *options: str) -> str:
    result = CliRunner().invoke(main, ["export", str(small), str(out), *options])
    assert result.exit_code == 2, result.output
    assert not list(out.parent.iterdir())
    return " ".join(result.output.split())


def test_refusals(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model.gguf"
    said = refused(small, out, "--dtype", "q4_k_x")
    assert all(f"{name}" in said for name in ("dtype is 'q4_k_x'", "q4_k_m", "q6_k", "q8_0", "bf16"))
    assert "would not be used: dtype is q8_0" in refused(small, out, "--dtype", "q8_0", "--imatrix-text", "text.txt")
    assert "--memory needs --imatrix-text" in refused(small, out, "--dtype", "q4_0", "--memory", "2GiB")
    assert "--device needs --imatrix-text" in refused(small, out, "--dtype", "q4_0", "--device", "cpu")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "xllamacpp" else find(name, *rest)
    )
    with pytest.raises(
        ConfigError, match=r"dtype q4_k_m needs llama\.cpp's quantiser: pip install 'streamprune\[llama\]'"
    ):
        streamprune.export_gguf(small, out, dtype="q4_k_m")
    assert not list(tmp_path.iterdir())


def test_a_wheel_that_hides_its_quantiser_is_named(
    small: Path, tmp_path: Path, xllamacpp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprune.commands.export import quantiser

    quantiser.quantise_rows.cache_clear()
    monkeypatch.setattr(quantiser.ctypes, "CDLL", lambda path: object())
    with pytest.raises(
        ConfigError, match=f"xllamacpp {xllamacpp.__version__} does not export .*; export with --dtype f16"
    ):
        streamprune.export_gguf(small, tmp_path / "model.gguf", dtype="q4_k_m")
    assert not list(tmp_path.iterdir())


@pytest.fixture(autouse=True)
def _forget_the_library() -> Iterator[None]:
    yield
    from streamprune.commands.export import quantiser

    quantiser.quantise_rows.cache_clear()


@pytest.mark.usefixtures("xllamacpp")
def test_command(small: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "model.gguf"
    text.write_text((EXAMPLE_TEXT / "validation.txt").read_text()[:2000])
    result = CliRunner().invoke(
        main, ["export", str(small), str(out), "--dtype", "q5_k_m", "--imatrix-text", str(text), "--json"]
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["dtype"], found["size"]) == ("q5_k_m", out.stat().st_size)
    assert "are q5_1 instead of q5_k: their rows are no multiple of 256 long" in " ".join(found["notes"])
    assert gguf.GGUFReader(out).get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q5_K_M
    plain = streamprune.export_gguf(small, tmp_path / "plain.gguf", dtype="q5_k_m").path
    assert plain.read_bytes() != out.read_bytes()
