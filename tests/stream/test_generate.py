"""Calibration without data: what the model writes, against transformers' own forward, and tokens drawn evenly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import TINY, contents, make_tiny
from safetensors.torch import load_file
from stopping import Stop, interrupted
from streamprune_cli import main

import streamprune
from streamprune import Config
from streamprune.errors import CalibrationError, ConfigError, NumericalError, ResumeError
from streamprune.jobs.forecast.memory import Memory
from streamprune.jobs.forecast.resources import forecast, generation_batch
from streamprune.jobs.forecast.workload import Workload
from streamprune.jobs.journal import Journal
from streamprune.jobs.names import JOURNAL, job_folder
from streamprune.maths.sampling import sample
from streamprune.model.skeleton import open_skeleton
from streamprune.model.tokenizer import end_tokens, load_tokenizer
from streamprune.pruning import job as pruning_job
from streamprune.pruning import run
from streamprune.pruning.job import Job
from streamprune.stream import generate as generating
from streamprune.stream import sweep
from streamprune.stream.generate import Writing, generate
from streamprune.system.progress import Silent
from streamprune.text import windows
from streamprune.text.prompts import Prompts
from streamprune.text.source import Source

CPU = torch.device("cpu")
Make = Callable[..., Config]
Tiny = Callable[..., Path]


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The logits of every step that tokens are drawn from, as they come."""
    seen: list[torch.Tensor] = []

    def watched(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return sample(logits, uniform)

    monkeypatch.setattr(generating, "sample", watched)
    return seen


def written(
    path: Path,
    folder: Path,
    *,
    samples: int = 5,
    length: int = 20,
    batch: int = 2,
    seed: int = 3,
    bos: int | None = None,
) -> torch.Tensor:
    skeleton = open_skeleton(path, CPU, "float64")
    return generate(skeleton, Writing(samples, length, seed, bos), folder, batch, Silent()).tokens


def redrawn(
    expected: torch.Tensor, samples: int, length: int, vocabulary: int, seed: int, bos: int | None
) -> np.ndarray[Any, Any]:
    """The tokens that the seed gives with these logits (samples, length, vocabulary), drawn by numpy."""
    generator = torch.Generator().manual_seed(seed)
    first = np.full(samples, bos)
    columns = [torch.randint(vocabulary, (samples,), generator=generator).numpy() if bos is None else first]
    for step in range(length - 1):
        weights = np.exp(expected[:, step].numpy())
        steps = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
        drawn = torch.rand(samples, generator=generator, dtype=torch.float64).numpy()
        columns.append(np.array([int((row <= u).sum()) for row, u in zip(steps, drawn, strict=True)]))
    return np.stack(columns, axis=1)


def is_the_models_own(
    path: Path, tokens: torch.Tensor, logits: list[torch.Tensor], seed: int = 3, bos: int | None = None
) -> None:
    """Teacher-forced, without a cache: the same logits at every step, and the same tokens drawn from them."""
    samples, length = tokens.shape
    with torch.no_grad():
        model = streamprune.load(path, dtype=torch.float64, experts_implementation="eager")
        expected = model(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.stack(logits, 1), expected[:, :-1], rtol=1e-5, atol=1e-5)
    assert np.array_equal(tokens.numpy(), redrawn(expected, samples, length, expected.shape[2], seed, bos))


@pytest.mark.check("writes its own calibration text")
@pytest.mark.parametrize("name", TINY)
def test_what_a_model_writes_is_drawn_from_its_own_logits(
    name: str, tiny: Tiny, tmp_path: Path, logits: list[torch.Tensor]
) -> None:
    path = tiny(name, torch.float64)
    if module := open_skeleton(path, CPU, "float64").stateful:
        pytest.skip(f"{module} may keep more than its own keys and values, so that the next test applies")
    tokens = written(path, tmp_path / "generate")
    assert tokens.dtype == torch.int64
    is_the_models_own(path, tokens, logits)


@pytest.mark.parametrize(("name", "block"), [("qwen3_5", 0), ("nemotron_h", 0), ("lfm2", 0)])
def test_a_model_with_recurrent_states_writes_no_text(name: str, block: int, tiny: Tiny, configured: Make) -> None:
    config = configured(tiny(name), calibration="self")
    with pytest.raises(ConfigError, match=rf"calibration is self; model\.layers\.{block}\.\w+ may keep more than"):
        streamprune.prune(config)
    assert not config.out.exists()
    assert not job_folder(config.out).exists()


def test_bos_comes_before_what_a_model_writes(tiny: Tiny, tmp_path: Path, logits: list[torch.Tensor]) -> None:
    path = tiny("llama", torch.float64)
    tokens = written(path, tmp_path / "generate", bos=7)
    assert tokens[:, 0].tolist() == [7] * 5
    assert len(set(tokens[:, 1].tolist())) > 1
    is_the_models_own(path, tokens, logits, bos=7)


def test_a_pruned_model_writes_too(tiny: Tiny, configured: Make, tmp_path: Path, logits: list[torch.Tensor]) -> None:
    path, plan = tiny("llama", torch.float64), tmp_path / "plan.json"
    keeps = {"blocks.1.attention": [1], "blocks.2.ffn": [3, 5, 8]}  # keys of one block are narrower than others'
    sites = {
        site.name: {"keep": len(units), "units": units}
        for site in open_skeleton(path, CPU, "float64").all_sites()
        for units in [keeps.get(site.name, list(range(site.units)))]
    }
    plan.write_text(json.dumps({"format": "streamprune-plan-1", "ratio": 0.3, "sites": sites}))
    config = configured(path, recipe="magnitude", plan=plan)
    streamprune.prune(config)
    is_the_models_own(config.out, written(config.out, tmp_path / "generate"), logits)


def test_tokens_follow_the_seed_and_not_the_batches(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tiny("qwen2", torch.float64), tmp_path / "generate"
    tokens = written(path, folder)
    assert torch.equal(written(path, folder, batch=5), tokens)
    assert torch.equal(written(path, folder, batch=1), tokens)
    assert not torch.equal(written(path, folder, seed=4), tokens)
    monkeypatch.setattr(sweep, "LOGIT_BYTES", 4 * 40 * 2)
    assert torch.equal(written(path, folder), tokens)


def test_draws_have_the_softmax_as_their_frequencies() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7) * 2
    logits[3] = -torch.inf
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = sample(logits.expand(10_000, 7), uniform).bincount(minlength=7)
    assert counts[3] == 0
    torch.testing.assert_close(counts / 10_000, logits.softmax(0), rtol=0, atol=1.1e-4)
    largest = torch.full((100,), 1 - 2**-53, dtype=torch.float64)
    assert int(sample(torch.randn(100, 90), largest).max()) < 90  # whatever the probabilities' sum is rounded to
    certain = torch.full((2, 4), -torch.inf)
    certain[:, 2] = 0
    assert sample(certain, torch.tensor([0, 1 - 2**-53], dtype=torch.float64)).tolist() == [2, 2]


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    from conftest import UP, set_tensor

    path = make_tiny(tmp_path / "model", "llama", torch.float16)
    set_tensor(path, UP, lambda tensor: tensor * 0 + 6e4)
    skeleton = open_skeleton(path, CPU, "float16")
    with pytest.raises(NumericalError, match="block 1 gives NaN or Inf"):
        generate(skeleton, Writing(4, 12, 0), tmp_path / "generate", 3, Silent())


@pytest.mark.parametrize("name", ["falcon", "gpt_neox"])
def test_the_disk_that_keys_and_values_take(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = open_skeleton(tiny(name), CPU, "float32")
    most, real = 0, generating.KeysAndValues.update

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal most
        found = real(self, *arguments, **options)
        most = max(most, sum(path.stat().st_size for path in self.folder.iterdir()))
        return found

    monkeypatch.setattr(generating.KeysAndValues, "update", watched)
    generate(skeleton, Writing(3, 9, 0), tmp_path / "generate", 2, Silent())
    needs = Workload(samples=3, length=9, text=True, prunes=False, generates=True)
    told = forecast(skeleton, needs, device_limit=2**40, disk_limit=2**40).disk_bytes
    assert most == told * 8 // 9  # nothing is asked of the last token


def test_memory_and_disk_while_writing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = open_skeleton(tiny("llama", num_hidden_layers=4), CPU, "float32")
    most, real = 0, generating.KeysAndValues.update

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal most
        found = real(self, *arguments, **options)
        most = max(most, sum(path.stat().st_size for path in self.folder.iterdir()))
        return found

    monkeypatch.setattr(generating.KeysAndValues, "update", watched)
    generate(skeleton, Writing(6, 24, 0), tmp_path / "generate", 4, Silent())
    cached = 6 * 24 * 4 * 2 * 16 * 4  # samples, tokens, blocks, keys and values, their width, float32
    assert most == cached * 23 // 24  # nothing is asked of the last token
    plain = Workload(samples=600, length=24, text=True, gram=True)
    needs = Workload(samples=600, length=24, text=True, gram=True, generates=True)
    before, after = (forecast(skeleton, n, device_limit=2**40, disk_limit=2**40) for n in (plain, needs))
    assert after.disk_bytes == cached * 100
    embed, blocks = 40 * 32 * 4, sum(skeleton.checkpoint[n].nbytes for n in skeleton.checkpoint if ".layers." in n)
    assert after.bytes_to_read == before.bytes_to_read + 23 * (blocks + 2 * embed + 32 * 4)
    assert after.operations > before.operations
    tight = forecast(skeleton, needs, device_limit=2**40, disk_limit=cached * 100 - 1)
    assert "activations need" in tight.problems[0]
    sizes = [generation_batch(Memory(skeleton, needs), batch, 1) for batch in (1, 16, 64, 10_000)]
    assert 1 <= sizes[0] < sizes[1] < sizes[2] < sizes[3] == 600


# The whole job.


def test_a_model_calibrates_on_what_it_writes(
    configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = make_tiny(tmp_path / "model", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()  # nothing is tokenised
    config = configured(path, calibration="self")
    job = Job(config, None)
    with job.opened(restart=False):
        run.Run(job).prepare()
        batch = generation_batch(Memory(job.skeleton, job.request.workload), job.batch, job.backward_batch)
        expected = generate(job.skeleton, Writing(12, 24, 0), tmp_path / "generate", batch, Silent()).tokens
        assert torch.equal(job.tokens, expected)
        assert torch.equal(load_file(job.written_path)["tokens"], expected)
        assert [step["step"] for step in job.journal.steps()][:2] == ["calibrate", "shot-1/embed"]
        assert not list(job.cache.glob("generate*"))
    streamprune.prune(config)
    report = json.loads((config.out / "report.json").read_text())
    assert report["job"]["inputs"]["calibration"] == "self"
    assert "tokenizer" not in report["job"]["inputs"]
    assert not job_folder(config.out).exists()
    # The tokens are what decides: a text that says the same gives the same weights.
    whole = configured(path, "told", calibration="random-tokens")
    monkeypatch.setattr(pruning_job, "random_windows", lambda *_: expected)
    streamprune.prune(whole)
    shards = [{n: b for n, b in contents(c.out).items() if n.endswith("safetensors")} for c in (config, whole)]
    assert shards[0] == shards[1]


def stopped_writing(config: Config, instant: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a job and stop it as it writes text: at this update of a block's keys and values."""
    count, real = 0, generating.KeysAndValues.update

    def update_or_stop(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == instant:
            raise Stop
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(generating.KeysAndValues, "update", update_or_stop)
        with pytest.raises(Stop):
            streamprune.prune(config)


@pytest.mark.slow
@pytest.mark.parametrize("instant", [1, 20])
def test_stopped_while_writing_the_bytes_are_the_same(
    instant: int, tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama")
    whole, config = (configured(path, out, calibration="self", samples=3, seq_len=12) for out in ("whole", "stopped"))
    streamprune.prune(whole)
    stopped_writing(config, instant, monkeypatch)
    assert (job_folder(config.out) / "cache" / "generate").is_dir()
    streamprune.prune(config)
    assert contents(config.out) == contents(whole.out)


@pytest.mark.slow
def test_stopped_around_the_tokens_being_kept(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    whole, config = (configured(path, out, calibration="self", samples=3, seq_len=12) for out in ("whole", "stopped"))
    streamprune.prune(whole)
    real = os.replace

    for before in (True, False):

        def replace_or_stop(source: Any, target: Any, *, before: bool = before) -> None:
            if Path(target).name != "calibration.safetensors":
                return real(source, target)
            if not before:
                real(source, target)
            raise Stop

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_or_stop)
            with pytest.raises(Stop):
                streamprune.prune(config)
    interrupted(config, monkeypatch, appends=1)  # the line about them
    asked: list[int] = []
    monkeypatch.setattr(run, "generate", lambda *_, **__: asked.append(1))
    assert streamprune.prune(config).resumed
    assert not asked
    assert contents(config.out) == contents(whole.out)


def test_random_tokens_are_in_range_and_follow_the_seed(tiny: Tiny, configured: Make) -> None:
    tokens = windows.random_windows(40, 300, 50, 0)
    assert tokens.shape == (300, 50)
    assert tokens.dtype == torch.int64
    shares = tokens.flatten().bincount(minlength=40) / tokens.numel()
    assert len(shares) == 40
    torch.testing.assert_close(shares, torch.full((40,), 1 / 40), rtol=0.2, atol=0)
    assert torch.equal(windows.random_windows(40, 300, 50, 0), tokens)
    assert not torch.equal(windows.random_windows(40, 300, 50, 1), tokens)
    config = configured(tiny("llama"), calibration="random-tokens")
    assert torch.equal(Job(config, None).tokens, windows.random_windows(40, 12, 24, 0))
    streamprune.prune(config)
    assert json.loads((config.out / "report.json").read_text())["job"]["inputs"]["calibration"] == "random-tokens"


def test_a_job_under_way_keeps_its_calibration(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("llama")
    interrupted(configured(path, calibration="self"), monkeypatch, appends=3)
    for other in ("random-tokens", configured(path).calibration):
        with pytest.raises(ResumeError, match=r"inputs\.calibration is .* and was \"self\""):
            streamprune.prune(configured(path, calibration=other))
    with pytest.raises(ResumeError, match=r"settings\.seed is 1 and was 0"):
        streamprune.prune(configured(path, calibration="self", seed=1))
    streamprune.prune(configured(path, calibration="self"))


def test_words_and_files_of_their_names(
    tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tiny("llama")
    monkeypatch.chdir(tmp_path)
    for word in ("./self", Path("self"), "Self", "random_tokens"):
        with pytest.raises(CalibrationError, match="cannot read the text"):
            streamprune.prune(configured(path, calibration=word))
    Path("self").write_text("abc " * 100)
    assert torch.equal(
        Job(configured(path, calibration="./self"), None).tokens,
        Job(configured(path, calibration=tmp_path / "self"), None).tokens,
    )


@pytest.mark.parametrize("word", ["self", "random-tokens"])
def test_the_command(word: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("llama")
    options = ["--ratio", "0.3", "--calibration", word, "--samples", "4", "--round-to", "4", "--json"]

    def called(command: str, *places: str, length: int = 24) -> Any:
        return CliRunner().invoke(main, [command, *places, *options, "--seq-len", str(length)])

    for length, code, message in ((65, 1, "seq-len is 65; the model's context is 64"), (1, 2, "seq_len is 1")):
        refused = called("run", str(path), str(tmp_path / "out"), length=length)
        assert refused.exit_code == code
        assert message in refused.stderr
        assert not list(tmp_path.iterdir())
    planned = json.loads(called("plan", str(path)).stdout)
    done = called("run", str(path), str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert ("generate: 24 of 24" in done.stderr) == (word == "self")
    assert json.loads(done.stdout)["bytes_read"] == pytest.approx(planned["bytes_to_read"], rel=0.05)


def test_a_recipe_without_text_writes_none(tiny: Tiny, configured: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "generate", None)
    streamprune.prune(configured(tiny("llama"), recipe="magnitude", calibration="self"))


def test_a_folder_of_the_users_stays(tiny: Tiny, configured: Make) -> None:
    config = configured(tiny("llama"), calibration="self")
    (job_folder(config.out)).mkdir()
    (job_folder(config.out) / "mine.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=r"contains mine\.safetensors"):
        streamprune.prune(config)


# Prompts.

TEMPLATE = "{% for m in messages %}{{ m.role + '. ' + m.content + ',' }}{% endfor %}{% if add_generation_prompt %}assistant. {% endif %}"
ENDS = [9, 20]
"""Tokens that end an answer: letters, so that a random model says them."""


@pytest.fixture
def chatting(tmp_path: Path) -> Path:
    """A model with a chat template, whose answers end."""
    path = make_tiny(tmp_path / "chatting", "llama", torch.float64, max_position_embeddings=128)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDS}))
    return path


def asked(path: Path, place: Path) -> Any:
    tokenizer = load_tokenizer(path)
    return tokenizer, lambda samples, length, bos=None: Prompts(
        tokenizer, Source(str(place)), 40, 3, samples, length, bos
    )


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Prompts of different lengths, one with an earlier turn and one with an answer to leave out."""
    user, assistant = ({"role": role, "content": text} for role, text in (("user", "why"), ("assistant", "so")))
    rows = [[user], [{"role": "user", "content": "what is it"}, assistant], [user, assistant, user]]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("temperature", "chunk"), [(0, 7), (0, 1000), (1, 1), (0.6, 7)])
def test_answers_are_those_of_transformers(
    temperature: float, chunk: int, chatting: Path, questions: Path, tmp_path: Path
) -> None:
    """Greedy: as `generate` after everything before. Drawn: what the seed gives with the logits of the whole."""
    tokenizer, prompts = asked(chatting, questions)
    samples, length, seed = 4, 90, 5
    how = Writing(samples, length, seed, None, prompts(samples, length), end_tokens(chatting, tokenizer), temperature)
    assert how.ends == {*ENDS}
    skeleton = open_skeleton(chatting, CPU, "float64")
    draft = generate(skeleton, how, tmp_path / "generate", 3, Silent(), chunk=chunk)
    model = streamprune.load(chatting, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.stack([torch.rand(samples, generator=generator, dtype=torch.float64) for _ in range(length - 1)])
    with torch.no_grad():
        logits = model(draft.tokens).logits
    rendered = {tokenizer.decode(how.prompts(number)) for number in range(3)}  # type: ignore[misc]
    assert rendered == {
        "user. why,assistant. ",
        "user. what is it,assistant. ",
        "user. why,assistant. so,user. why,assistant. ",
    }
    answers = 0
    for row in range(samples):
        at = turn = 0
        while at < length:
            prompt = how.prompts(row + turn * samples)[: length - at]  # type: ignore[misc]
            assert draft.tokens[row, at : at + len(prompt)].tolist() == prompt.tolist()
            assert not draft.written[row, at : at + len(prompt)].any()
            at, turn = at + len(prompt), turn + 1
            begin = at
            while at < length:
                assert draft.written[row, at]
                weights = (logits[row, at - 1] / (temperature or 1)).softmax(-1)
                drawn = int(sample(weights.log()[None], uniform[at - 1, row][None]))
                assert int(draft.tokens[row, at]) == (drawn if temperature else int(weights.argmax()))
                at += 1
                if int(draft.tokens[row, at - 1]) in ENDS:
                    break
            answers += at > begin
            if temperature == 0 and begin < length:
                given = draft.tokens[row : row + 1, :begin]
                greedy: dict[str, Any] = {"do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0}
                expected = model.generate(
                    given, attention_mask=torch.ones_like(given), max_new_tokens=at - begin, **greedy
                )
                assert draft.tokens[row, :at].tolist() == expected[0].tolist()
    assert answers >= samples


def test_prompts_of_a_text_file_and_without_a_template(chatting: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("why\n\n  \nhow so\n")
    tokenizer, prompts = asked(chatting, path)
    found = prompts(2, 90)
    assert {tokenizer.decode(found(number)) for number in range(5)} == {
        "user. why,assistant. ",
        "user. how so,assistant. ",
    }
    assert torch.equal(found(0), found(2))
    assert prompts(2, 90, 0)(0).tolist() == [0, *found(0).tolist()]
    (chatting / "chat_template.jinja").unlink()
    tokenizer, prompts = asked(chatting, path)
    assert {tokenizer.decode(prompts(2, 90)(number)) for number in range(2)} == {"why", "how so"}
    with pytest.raises(CalibrationError, match="a prompt has 6 tokens, and a window of 6 leaves no room for an answer"):
        prompts(2, 6)
    path.write_text(" \n")
    with pytest.raises(CalibrationError, match=r"lines\.txt is empty"):
        prompts(2, 90)


def test_prompts_that_are_refused(chatting: Path, questions: Path, configured: Make) -> None:
    with pytest.raises(ConfigError, match=r"prompts is .*; only calibration 'self' answers them"):
        configured(chatting, prompts=questions)
    with pytest.raises(ConfigError, match=r"temperature is 0; only calibration 'self' uses it"):
        configured(chatting, temperature=0)
    with pytest.raises(ConfigError, match=r"temperature is -1; it must be at least 0"):
        configured(chatting, calibration="self", temperature=-1)
    with pytest.raises(ConfigError, match=r"loss_on is 'assistant'; .* no turns of the assistant without prompts"):
        configured(chatting, calibration="self", loss_on="assistant")
    config = configured(chatting, calibration="self", prompts=questions, seq_len=20)
    with pytest.raises(
        CalibrationError, match=r"tokens, and a window of 20 leaves no room for an answer; raise seq-len"
    ):
        streamprune.prune(config)
    assert not config.out.exists()
    assert not job_folder(config.out).exists()
    (chatting / "chat_template.jinja").unlink()
    with pytest.raises(CalibrationError, match=r"questions\.jsonl has conversations, and .* no chat template"):
        streamprune.prune(configured(chatting, calibration="self", prompts=questions, seq_len=60))
    questions.write_text(json.dumps({"messages": [{"role": "assistant", "content": "so"}]}) + "\n")
    (chatting / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(CalibrationError, match=r"questions\.jsonl, line 1: no turn that the assistant answers"):
        streamprune.prune(configured(chatting, calibration="self", prompts=questions, seq_len=60))


@pytest.fixture
def answering(chatting: Path, questions: Path, configured: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A job that calibrates on answers, and saves its state after every sweep."""
    monkeypatch.setattr(generating, "SAVE_SECONDS", 0)
    given: dict[str, Any] = {"calibration": "self", "prompts": questions, "loss_on": "assistant", "recipe": "default"}
    return lambda out, **changes: configured(chatting, out, **{**given, "samples": 3, "seq_len": 60, **changes})


def test_a_job_on_the_models_own_answers(answering: Make) -> None:
    results = {on: streamprune.prune(answering(on, loss_on=on)) for on in ("assistant", "all")}
    assert results["assistant"].tokens != results["all"].tokens
    report = json.loads((answering("assistant").out / "report.json").read_text())["job"]
    assert report["inputs"]["calibration"] == "self"
    assert set(report["inputs"]["prompts"]) == {"sha256", "field", "share"}
    assert "chat_template.jinja" in report["inputs"]["tokenizer"]
    assert report["settings"]["temperature"] == 1
    with pytest.raises(ConfigError, match=r"another job: settings\.temperature is 0\.0 and was 1\.0"):
        streamprune.prune(answering("assistant", temperature=0.0))
    assert not job_folder(answering("assistant").out).exists()


@pytest.mark.slow
@pytest.mark.parametrize("instant", [2, 30])
def test_text_under_way_is_gone_on_with(instant: int, answering: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of a sweep after `instant` saved states, and once more; what was saved is not made again."""
    whole, config = answering("whole"), answering("stopped")
    real = generating.KeysAndValues.update

    def updates(job: Config) -> int:
        asked: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(generating.KeysAndValues, "update", lambda *a, **k: asked.append(1) or real(*a, **k))
            assert streamprune.prune(job).resumed == (job is config)
        return len(asked)

    every = updates(whole)
    interrupted(config, monkeypatch, appends=instant)
    folder = job_folder(config.out)
    assert len([*folder.glob("generated-*")]) >= 1
    stopped_writing(config, 5, monkeypatch)  # in the middle of the second sweep of three blocks
    lines = len(list(Journal(folder / JOURNAL, repair=False).steps("generated-")))
    assert lines == instant  # one more than before: the header is a line too
    assert updates(config) < every
    assert contents(config.out) == contents(whole.out)


@pytest.mark.slow
def test_damaged_keys_and_values_are_made_again(answering: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answering("whole")
    streamprune.prune(whole)
    for harm in ("cut", "changed", "gone", "state"):
        config = answering(harm)
        interrupted(config, monkeypatch, appends=6)
        folder = job_folder(config.out)
        path = next((folder / "cache" / "generate").iterdir()) if harm != "state" else next(folder.glob("generated-*"))
        data = path.read_bytes()
        if harm == "gone":
            path.unlink()
        else:
            path.write_bytes(data[:-1] if harm == "cut" else bytes([data[0] ^ 1]) + data[1:])
        streamprune.prune(config)
        assert contents(config.out) == contents(whole.out), harm
