"""Tasks with generated text: against lm_eval's own backend and transformers' `generate` on the same checkpoint."""

from __future__ import annotations

import json
import shutil
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import make_tiny
from streamprune_cli import main

import streamprune
from streamprune.errors import CalibrationError, ConfigError, ResourceError, ResumeError
from streamprune.jobs.forecast import resources
from streamprune.jobs.forecast.memory import SLACK, Memory
from streamprune.jobs.forecast.resources import Answering, answering, answering_bytes
from streamprune.jobs.forecast.workload import Workload
from streamprune.jobs.journal import Journal
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.model.tokenizer import load_tokenizer
from streamprune.stream import generate as generation
from streamprune.stream.generate import KeysAndValues
from streamprune.system.progress import Callback, Silent

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from streamprune.commands.harness import answers, tasks
from streamprune.commands.harness.answers import Question, answer
from streamprune.commands.harness.streamed import StreamedModel

CPU = torch.device("cpu")
Tiny = Callable[..., Path]
HOW = {
    "memory": Answering(True, 3, 3, 5),
    "streamed": Answering(False, 5, 3, 5),
    "one by one": Answering(False, 1, 1, 1),
}
"""Ways to generate: in micro-batches in memory, in two waves of two micro-batches, and each prompt alone, token by token."""


@pytest.fixture
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(answers, "answering", lambda *_, **__: HOW[request.param])
    return str(request.param)


def random_prompts(count: int, longest: int, vocabulary: int = 40) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [tuple(torch.randint(1, vocabulary, (length,), generator=generator).tolist()) for length in lengths]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "streamed") for name in ("llama", "gemma3", "gpt2", "falcon", "qwen3_moe", "deepseek_v3", "mistral")),
        *((name, "memory") for name in ("llama", "gemma3", "gpt_oss")),
        *((name, "one by one") for name in ("llama", "deepseek_v3")),
    ],
    indirect=["how"],
)
def test_answers_are_transformers_own(name: str, how: str, tiny: Tiny) -> None:
    """Prompts of all lengths, in one micro-batch too, with answers of different lengths."""
    path = tiny(name, torch.float64)
    skeleton = open_skeleton(path, CPU, "float64")
    prompts = random_prompts(8, 30)[: 3 if how == "one by one" else None]
    questions = [Question(p, 4 + n, lambda tokens: bool(tokens[-1] < 9)) for n, p in enumerate(prompts)]
    found = dict(answer(skeleton, questions, progress=Silent()))
    model = streamprune.load(path, dtype=torch.float64, experts_implementation="eager")
    greedy: dict[str, Any] = {"do_sample": False, "eos_token_id": [*range(9)], "pad_token_id": 0}
    for number, question in enumerate(questions):
        given = torch.tensor([question.prompt])
        expected = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=question.most, **greedy)
        assert found[number] == expected[0, given.shape[1] :].tolist()
    assert len({len(tokens) for tokens in found.values()}) > len(questions) // 3


PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("the cat", {"until": ["a"], "max_gen_toks": 20}),
    ("a dog sat", {"until": ["b", "e"], "max_gen_toks": 20}),
    ("long " * 30, {"until": [], "max_gen_toks": 20}),  # cut off on the left
    ("<s>begins", {"until": "c", "max_gen_toks": 9}),
    ("x", {"do_sample": False, "temperature": 0.0, "max_gen_toks": 30}),
    ("the ca", {"until": ["zz"], "max_new_tokens": 7}),
    ("the cat", {"until": ["a"], "max_gen_toks": 3}),
]


def backend(path: Path, **options: Any) -> HFLM:
    return HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=1, trust_remote_code=True, **options)


def generating(path: Path, **options: Any) -> StreamedModel:
    skeleton = open_skeleton(path, CPU, "float32")
    return StreamedModel(skeleton, load_tokenizer(path), progress=Silent(), **options)


def asked() -> list[Instance]:
    return [Instance("generate_until", {}, (p, dict(s)), n) for n, (p, s) in enumerate(PROMPTS)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "bos"), [("llama", "auto"), ("llama", "on"), ("gpt2", "auto")])
@pytest.mark.parametrize("how", ["memory", "streamed"], indirect=True)
def test_texts_are_the_harness_own(name: str, bos: Any, how: str, tiny: Tiny) -> None:
    path = tiny(name)
    expected = backend(path, **({} if bos == "auto" else {"add_bos_token": True})).generate_until(asked(), True)
    assert generating(path, bos=bos).generate_until(asked()) == expected
    assert len(set(map(len, expected))) > 2


def test_text_ends_where_the_model_ends_it(tiny: Tiny, tmp_path: Path) -> None:
    """At the tokens of generation_config.json, which are not the tokenizer's."""
    path = make_tiny(tmp_path / "model", "llama")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9, 11, 20]}))
    expected = backend(path).generate_until(asked(), True)
    assert generating(path).generate_until(asked()) == expected
    assert expected != generating(tiny("llama")).generate_until(asked())


# Tasks of lm_eval over local data.

LOAD = """
import datasets
def load(**_):
    rows = [{"question": q, "answer": a} for q, a in (("one and one", "b"), ("the cat", "c"), ("how so", "a"), ("why", "d"))]
    return {"test": datasets.Dataset.from_list(rows), "train": datasets.Dataset.from_list(rows)}
"""
TASK = """
task: {name}
custom_dataset: !function load.load
test_split: test
training_split: train
fewshot_split: train
output_type: generate_until
doc_to_text: '{{{{question}}}}:'
doc_to_target: '{{{{answer}}}}'
generation_kwargs:
  until: ['e', ',']
  max_gen_toks: 12
  do_sample: {sampled}
metric_list:
- metric: exact_match
  aggregation: mean
  higher_is_better: true
filter_list:
- name: first
  filter:
  - function: regex
    regex_pattern: '([a-d])'
  - function: take_first
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of task files: `written`, `sampling`, which samples, and `running`, which runs code."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "load.py").write_text(LOAD)
    (folder / "written.yaml").write_text(TASK.format(name="written", sampled="false"))
    (folder / "sampling.yaml").write_text(TASK.format(name="sampling", sampled="true"))
    (folder / "running.yaml").write_text(TASK.format(name="running", sampled="false") + "unsafe_code: true\n")
    return folder


@pytest.mark.parametrize(("chat", "fewshot"), [(False, None), (False, 2), (True, 2)])
def test_tasks_score_as_lm_eval_scores_them(chat: bool, fewshot: int | None, place: Path, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "llama", max_position_embeddings=256)
    template = "{% for m in messages %}{{ m.role + '. ' + m.content + ',' }}{% endfor %}{% if add_generation_prompt %}so {% endif %}"
    (path / "chat_template.jinja").write_text(template)
    options: dict[str, Any] = {"num_fewshot": fewshot, "apply_chat_template": chat}
    if chat:
        options["system_instruction"] = "be short"
    theirs = simple_evaluate(
        model=backend(path),
        tasks=["written"],
        task_manager=TaskManager(include_path=str(place), include_defaults=False),
        **options,
    )
    ours = streamprune.evaluate_tasks(path, streamprune.find_tasks(["written"], include_path=place, **options))
    assert ours.results == theirs["results"]
    expected = [sample["exact_match"] for sample in theirs["samples"]["written"]]
    assert ours.samples == {"written": {"exact_match,first": expected}}
    assert len(ours.fingerprints["written"]) == 64
    assert ours.fewshot == {"written": fewshot or 0}
    assert "; greedy decoding;" in ours.protocol
    assert ("in the chat template after 'be short'" in ours.protocol) == chat
    prompts = {sample["arguments"][0][0] for sample in theirs["samples"]["written"]}
    assert all(("user." in prompt) == chat for prompt in prompts)


def test_one_sweep_serves_a_token_of_all_prompts(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    """Streamed: as many sweeps as the longest answer, and those that read the prompts. In memory: blocks are read once."""
    read: list[int] = []
    honest = Skeleton.read_block
    monkeypatch.setattr(Skeleton, "read_block", lambda self, index: read.append(index) or honest(self, index))
    skeleton = open_skeleton(tiny("llama"), CPU, "float32")
    questions = [Question((1,) * length, 6, lambda tokens: False) for length in (3, 9, 30)]  # the last for itself
    for way, sweeps in (
        (Answering(False, 3, 3, 100), 6 + 6),  # 6 more: 3 tokens are known of both, up to 9
        (Answering(False, 3, 3, 10), 6 + 6),  # the 30 pass in three sweeps meanwhile
        (Answering(False, 1, 1, 100), 3 * 6),
        (Answering(True, 3, 3, 100), 1),
    ):
        read.clear()
        monkeypatch.setattr(answers, "answering", lambda *_, way=way, **__: way)
        assert len(dict(answer(skeleton, questions, progress=Silent()))) == 3
        assert read == [0, 1, 2] * sweeps


def test_finished_prompts_leave_the_sweeps(monkeypatch: pytest.MonkeyPatch, tiny: Tiny) -> None:
    monkeypatch.setattr(answers, "answering", lambda *_, **__: Answering(False, 9, 1, 100))
    seen: list[int] = []
    honest = KeysAndValues.update

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        seen.append(self.number)
        return honest(self, *arguments, **options)

    monkeypatch.setattr(KeysAndValues, "update", watched)
    skeleton = open_skeleton(tiny("llama"), CPU, "float32")
    questions = [Question((1, 2, 3), most, lambda tokens: False) for most in (2, 5, 9)]
    told: list[str] = []
    dict(answer(skeleton, questions, progress=Callback(lambda event: told.append(str(event)))))
    assert [seen.count(number) for number in range(3)] == [2 * 3, 5 * 3, 9 * 3]
    assert told == [f"answer: {done} of 3" for done in range(4)]


def test_limits_decide_how_answers_are_generated(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = open_skeleton(tiny("llama", num_hidden_layers=9), CPU, "float32")
    monkeypatch.setattr(resources, "BATCH_TOKENS", {"cpu": 64})
    model = Memory(skeleton, Workload(samples=100, length=64, text=True, prunes=False, generates=True))
    weights = 4 * skeleton.block_parameters()
    whole = answering(skeleton, 100, 64, device_limit=2**30, disk_limit=0)
    assert whole == Answering(True, 32, 32, 2)
    sizes = range(weights, 2**30, 1024)
    fits = sizes[bisect_left(sizes, True, key=lambda size: _way(skeleton, size, 2**30).in_memory)]
    assert weights + model.keys_and_values < fits < 2 * weights
    assert 1 <= _way(skeleton, fits, 2**30).batch < 32
    tight = _way(skeleton, fits - 2048, 10 * model.keys_and_values + 1)
    assert not tight.in_memory
    assert tight.samples == 10
    assert 1 <= tight.batch <= 10
    one = Memory(skeleton, Workload(samples=1, length=64, text=True, prunes=False, generates=True)).device_peak(1, 1)
    assert _way(skeleton, one, 2**30) == Answering(False, 100, 1, 1)
    assert _way(skeleton, 2 * one, 2**30).batch > 1
    with pytest.raises(ResourceError, match=r"activations need .* of disk"):
        _way(skeleton, fits - 2048, model.keys_and_values - 1)
    with pytest.raises(ResourceError, match="memory limit"):
        _way(skeleton, 1000, 2**30)


def _way(skeleton: Skeleton, memory: int, disk: int) -> Answering:
    """What the limits decide, which fits them when it is resumed, too."""
    way = answering(skeleton, 100, 64, device_limit=memory, disk_limit=disk)
    assert answering_bytes(skeleton, way, 64) <= memory
    return way


def test_a_kill_leaves_nothing_and_stopping_stops(monkeypatch: pytest.MonkeyPatch, tiny: Tiny, tmp_path: Path) -> None:
    monkeypatch.setattr(answers, "answering", lambda *_, **__: Answering(False, 3, 3, 9))
    skeleton = open_skeleton(tiny("llama"), CPU, "float32")
    asked: list[int] = []
    watching = Callback(lambda event: None, stopping=lambda: len(asked) > 5 or bool(asked.append(1)))
    questions = [Question((1, 2), 20, lambda tokens: False)]
    with pytest.raises(streamprune.Stopped):
        dict(answer(skeleton, questions, progress=watching, cache=tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())


# Resuming.


def all_answers(path: Path, most: int = 9, **options: Any) -> dict[int, list[int]]:
    skeleton = open_skeleton(path, CPU, "float32")
    questions = [
        Question(p, most + n, lambda tokens: bool(tokens[-1] < 5)) for n, p in enumerate(random_prompts(8, 20))
    ]
    return dict(answer(skeleton, questions, **{"progress": Silent(), **options}))


def stopped_at(monkeypatch: pytest.MonkeyPatch, updates: int) -> None:
    """Kill the process, as it were, within a sweep."""
    honest, seen = KeysAndValues.update, [0]

    def update(self: Any, *arguments: Any, **options: Any) -> Any:
        seen[0] += 1
        if seen[0] > updates:
            raise KeyboardInterrupt
        return honest(self, *arguments, **options)

    monkeypatch.setattr(KeysAndValues, "update", update)


@pytest.mark.parametrize("updates", [1, 41, 90])
def test_answers_resume_with_the_same_tokens(
    updates: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice in the same wave, or in the next; what was saved is not computed again."""
    path, folder = tiny("llama"), tmp_path / "kept"
    monkeypatch.setattr(answers, "answering", lambda *_, **__: Answering(False, 5, 3, 5))
    monkeypatch.setattr(generation, "SAVE_SECONDS", 0)
    calls: list[int] = []
    honest = KeysAndValues.update
    monkeypatch.setattr(KeysAndValues, "update", lambda *a, **k: calls.append(1) or honest(*a, **k))
    whole, without_kills = all_answers(path), len(calls)
    for each in (updates, 31):
        with monkeypatch.context() as patch:
            stopped_at(patch, each)
            with pytest.raises(KeyboardInterrupt):
                all_answers(path, resume=folder)
    # Another limit would give other micro-batches, and with them other rounding: those of the first call stay.
    monkeypatch.setattr(answers, "answering", lambda *_, **__: Answering(True, 8, 8, 99))
    calls.clear()
    assert all_answers(path, resume=folder) == whole
    assert sorted(file.name for file in folder.iterdir()) == ["answers.jsonl", "lock"]
    left = len(calls)
    calls.clear()
    assert all_answers(path, resume=folder) == whole
    assert not calls  # all are kept
    assert left < without_kills - 30 * (updates > 1)


def test_damaged_keys_and_values_are_computed_again(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, killed = tiny("llama"), tmp_path / "killed"
    monkeypatch.setattr(answers, "answering", lambda *_, **__: Answering(False, 8, 3, 5))
    monkeypatch.setattr(generation, "SAVE_SECONDS", 0)
    whole = all_answers(path)
    with monkeypatch.context() as patch:
        stopped_at(patch, 60)
        with pytest.raises(KeyboardInterrupt):
            all_answers(path, resume=killed)
    for harm in ("cut", "changed", "gone", "state"):
        folder = shutil.copytree(killed, tmp_path / harm)
        (state,) = folder.glob("state-0-*")
        file = state if harm == "state" else min((folder / "answers").iterdir())
        data = file.read_bytes()
        if harm == "gone":
            file.unlink()
        else:
            file.write_bytes(data[:10] if harm == "cut" else bytes([data[0] ^ 1]) + data[1:])
        assert all_answers(path, resume=folder) == whole, harm


@pytest.mark.parametrize("in_memory", [True, False])
def test_resuming_needs_the_memory_of_its_plan_and_not_what_planning_needs(
    in_memory: bool, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder, plan = tiny("llama"), tmp_path / "kept", Answering(in_memory, 4, 4, 5)
    monkeypatch.setattr(answers, "answering", lambda *_, **__: plan)
    whole = all_answers(path)
    watching = Callback(lambda event: None, stopping=lambda: b"wave-" in (folder / "answers.jsonl").read_bytes())
    with pytest.raises(streamprune.Stopped):
        all_answers(path, resume=folder, progress=watching)

    def planned_again(*_: Any, **__: Any) -> Any:
        raise ResourceError("the memory limit is too low for a new plan")

    def free(limit: int) -> None:
        monkeypatch.setattr(answers.machine, "memory_limits", lambda *_: {"device_limit": limit, "base": 9})

    monkeypatch.setattr(answers, "answering", planned_again)
    longest = max(len(prompt) + 9 + number for number, prompt in enumerate(random_prompts(8, 20)))
    needed = answering_bytes(open_skeleton(path, CPU, "float32"), plan, longest) + 9
    free(int(needed / SLACK) - 1)
    with pytest.raises(ResourceError, match=r"kept was begun with micro-batches that need .* resume elsewhere"):
        all_answers(path, resume=folder)
    free(needed)
    assert all_answers(path, resume=folder) == whole
    free(0)
    monkeypatch.setattr(Skeleton, "read_block", planned_again)
    assert all_answers(path, resume=folder) == whole  # all are kept, so nothing is computed


def test_what_a_kill_leaves_is_removed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last answers' line in the journal and the removal of their state; while a state was written."""
    path, folder = tiny("llama"), tmp_path / "kept"
    monkeypatch.setattr(answers, "answering", lambda *_, **__: Answering(False, 5, 3, 5))
    monkeypatch.setattr(generation, "SAVE_SECONDS", 0)
    append = Journal.append

    def kill(self: Journal, step: str, **data: Any) -> Any:
        append(self, step, **data)
        if step == "wave-1":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", kill)
        with pytest.raises(KeyboardInterrupt):
            all_answers(path, resume=folder)
    shutil.copy(*folder.glob("state-1-*"), folder / "state-0-5.safetensors")  # of no line
    (folder / "state-1-7.safetensors.tmp").touch()
    assert any((folder / "answers").iterdir())
    all_answers(path, resume=folder)
    assert sorted(file.name for file in folder.iterdir()) == ["answers.jsonl", "lock"]


DAMAGE: dict[str, Callable[[list[Any]], Any]] = {
    "'how'": lambda lines: lines[0].pop("how"),
    "'job'": lambda lines: lines[0].pop("job"),
    "'dtype'": lambda lines: lines[0]["job"].pop("dtype"),
    "argument: 'chunk'": lambda lines: lines[0]["how"].pop("chunk"),
    "how is .*'samples': '5'": lambda lines: lines[0]["how"].update(samples="5"),
    "how is .*'batch': 0": lambda lines: lines[0]["how"].update(batch=0),
    "how is .*'in_memory': 1": lambda lines: lines[0]["how"].update(in_memory=1),
    "'answers'": lambda lines: lines[-2].pop("answers"),
    "the answers of wave-0": lambda lines: lines[-2]["answers"].pop(),
    "the answers of wave-0 ": lambda lines: lines[-2]["answers"][0].append(40),
    "'sha256'": lambda lines: lines[-1].pop("sha256"),
    "invalid literal": lambda lines: lines[-1].update(step="state-x-1"),
}
"""What is said of a journal with valid checksums, after a change of its lines: the header, wave-0 and a state of wave-1."""


def test_a_damaged_journal_is_named(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = tiny("llama"), tmp_path / "kept"
    monkeypatch.setattr(answers, "answering", lambda *_, **__: Answering(False, 5, 3, 50))
    watching = Callback(lambda event: None, stopping=lambda: b"wave-0" in (folder / "answers.jsonl").read_bytes())
    with pytest.raises(streamprune.Stopped):
        all_answers(path, resume=folder, progress=watching)
    journal = folder / "answers.jsonl"
    whole = journal.read_bytes()
    advice = "give --resume another folder"
    for said, harm in DAMAGE.items():
        journal.write_bytes(whole)
        read = Journal(journal)
        lines = [read.header, *read.steps()]
        assert [line["step"].rpartition("-")[0] for line in lines if line] == ["", "wave", "state-1"]
        harm(lines)
        journal.unlink()
        again = Journal(journal)
        for line in lines:
            again.append(**line)  # type: ignore[arg-type]
        with pytest.raises(
            ResumeError, match=rf"kept/answers\.jsonl has unexpected content \(.*{said.strip()}.*\); {advice}"
        ):
            all_answers(path, resume=folder)
    journal.write_bytes(whole[:20] + b"?" + whole[21:])
    with pytest.raises(ResumeError, match=rf"kept/answers\.jsonl: line 1 is damaged; {advice}"):
        all_answers(path, resume=folder)


def test_in_memory_each_micro_batch_is_kept(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = tiny("llama"), tmp_path / "kept"
    monkeypatch.setattr(answers, "answering", lambda *_, **__: Answering(True, 3, 3, 5))
    whole = all_answers(path)
    watching = Callback(lambda event: None, stopping=lambda: b"wave-" in (folder / "answers.jsonl").read_bytes())
    with pytest.raises(streamprune.Stopped):
        all_answers(path, resume=folder, progress=watching)
    kept = [line["step"] for line in Journal(folder / "answers.jsonl").steps()]
    assert kept
    told: list[str] = []
    assert all_answers(path, resume=folder, progress=Callback(lambda event: told.append(event.message))) == whole
    assert told.count("answered earlier") >= len(kept)


def test_a_folder_of_another_evaluation_is_refused(place: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder, written = tmp_path / "kept", streamprune.find_tasks(["written"], include_path=place)
    scored = streamprune.evaluate_tasks(tiny("llama"), written, resume=folder)
    again = streamprune.evaluate_tasks(tiny("llama"), written, resume=folder)
    assert again.results == scored.results
    with pytest.raises(ConfigError, match=r"has answers of another evaluation \(model differs\); resume elsewhere"):
        streamprune.evaluate_tasks(tiny("qwen3"), written, resume=folder)
    fewer = streamprune.find_tasks(["written"], include_path=place, limit=2)
    with pytest.raises(ConfigError, match=r"another evaluation \(questions differs\)"):
        streamprune.evaluate_tasks(tiny("llama"), fewer, resume=folder)
    with pytest.raises(ConfigError, match=r"resume is .*, which contains .* and no answers; give a new folder"):
        streamprune.evaluate_tasks(tiny("llama"), written, resume=place)
    other = tmp_path / "locked"
    other.mkdir()
    for name in ("lock", "notes"):
        (other / name).touch()
    with pytest.raises(ConfigError, match=r"locked, which contains notes and no answers"):
        streamprune.evaluate_tasks(tiny("llama"), written, resume=other)
    text = TASK.format(name="given", sampled="false").replace("generate_until", "multiple_choice")
    text = text.replace("exact_match", "acc").partition("filter_list")[0]
    (place / "given.yaml").write_text(f"{text}doc_to_choice: [a, b, c, d]\n")
    given = streamprune.find_tasks(["given"], include_path=place)
    with pytest.raises(ConfigError, match="only generated answers are kept, and no task needs any"):
        streamprune.evaluate_tasks(tmp_path / "no-model", given, resume=tmp_path / "other")


def test_what_is_refused(place: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = streamprune.find_tasks
    with pytest.raises(ConfigError, match=r"task 'sampling' generates with do_sample: True; .* lm_eval --model hf"):
        find(["sampling"], include_path=place)
    with pytest.raises(ConfigError, match=r"task 'running' runs code .* --confirm-run-unsafe-code"):
        find(["running"], include_path=place)
    find(["running"], include_path=place, confirm_run_unsafe_code=True)
    nothing = TASK.format(name="nothing", sampled="false").replace("max_gen_toks: 12", "max_gen_toks: 0")
    (place / "nothing.yaml").write_text(nothing)
    with pytest.raises(ConfigError, match="max_gen_toks of task 'nothing' is 0; it must be at least 1"):
        find(["nothing"], include_path=place)
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.\w+ may keep more than its own keys and values"):
        streamprune.evaluate_tasks(tiny("qwen3_5"), find(["written"], include_path=place))
    with pytest.raises(ConfigError, match="has no chat template, which apply-chat-template needs"):
        streamprune.evaluate_tasks(tiny("llama"), find(["written"], include_path=place, apply_chat_template=True))
    short = make_tiny(tmp_path / "short", "llama", max_position_embeddings=12)
    with pytest.raises(ConfigError, match="answers have up to 12 tokens; the model's context of 12 leaves no room"):
        streamprune.evaluate_tasks(short, find(["written"], include_path=place))
    model = generating(tiny("llama"))
    monkeypatch.setattr(model, "tok_encode", lambda prompt: [3, 40])
    with pytest.raises(CalibrationError, match="a request contains token 40, but the model's vocabulary has 40"):
        model.generate_until(asked())


def test_the_command(place: Path, tiny: Tiny, tmp_path: Path) -> None:
    def call(*words: object) -> Any:
        return CliRunner().invoke(main, ["eval", str(tiny("llama")), *map(str, words)])

    found = json.loads(call("--tasks", "written", "--include-path", place, "--json").stdout)["tasks"]
    assert set(found) == {"results", "documents", "samples", "fingerprints", "fewshot", "model", "bos", "protocol"}
    assert len(found["samples"]["written"]["exact_match,first"]) == 4
    assert set(found["model"]) == {"config", "shards"}
    for words, message in (
        (("--apply-chat-template",), "--apply-chat-template needs --tasks"),
        (("--system-instruction", "be short"), "--system-instruction be short needs --tasks"),
        (("--confirm-run-unsafe-code",), "--confirm-run-unsafe-code needs --tasks"),
        (("--resume", "kept"), "--resume kept needs --tasks"),
    ):
        refused = call("--text", tmp_path, *words)
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_a_limit_of_zero_is_not_dropped(place: Path, tiny: Tiny) -> None:
    """Nor are zero examples, of a task that has two by default."""
    (place / "shown.yaml").write_text(TASK.format(name="shown", sampled="false") + "num_fewshot: 2\n")

    def call(*words: object) -> Any:
        return CliRunner().invoke(main, ["eval", str(tiny("llama")), *map(str, words)])

    task = ("--tasks", "shown", "--include-path", place)
    for words, message in (
        ((*task, "--limit", 0), "limit is 0; it must be at least 1"),
        (("--text", place, "--limit", 0), "--limit 0 needs --tasks"),
        (("--text", place, "--num-fewshot", 0), "--num-fewshot 0 needs --tasks"),
    ):
        refused = call(*words)
        assert refused.exit_code == 2
        assert message in refused.stderr
    for words, expected in (((), 2), (("--num-fewshot", 0), 0)):
        found = json.loads(call(*task, "--limit", 1, "--json", *words).stdout)
        assert found["tasks"]["fewshot"] == {"shown": expected}


def test_settings_that_would_change_the_text_are_named(place: Path, tmp_path: Path) -> None:
    path = make_tiny(tmp_path / "model", "llama")
    (path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.1, "top_p": 0.8}))
    scored = streamprune.evaluate_tasks(path, streamprune.find_tasks(["written"], include_path=place, limit=1))
    assert "; greedy decoding, without the repetition_penalty 1.1 of generation_config.json;" in scored.protocol


# lm_eval's own definitions, with rows of their form instead of their data.

ROWS: dict[str, list[dict[str, Any]]] = {
    "openai/gsm8k": [
        {
            "question": f"a boy has {n} nuts and eats 1 of them. how many are left?",
            "answer": f"{n} - 1 = {n - 1}\n#### {n - 1}",
        }
        for n in range(2, 9)
    ],
    "google/IFEval": [
        {
            "key": number,
            "prompt": f"say something about {thing} without a comma",
            "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
            "kwargs": [{}, {"num_words": 3, "relation": "at least"}],
        }
        for number, thing in enumerate(("rain", "sun"))
    ],
    "openai/openai_humaneval": [
        {
            "task_id": f"own/{name}",
            "prompt": f"def {name}(a, b):\n",
            "entry_point": name,
            "canonical_solution": f"    return a {sign} b\n",
            "test": f"def check(f):\n    assert f(4, 2) == 4 {sign} 2\n",
        }
        for name, sign in (("add", "+"), ("sub", "-"))
    ],
}


class Judge:
    """Stands for the metric `code_eval`, which would come from the hub: looks at the code instead of running it."""

    def compute(self, *, references: list[str], predictions: list[list[str]], k: list[int]) -> Any:
        good = [any(len(code) % 2 for code in codes) for codes in predictions]
        return {f"pass@{each}": sum(good) / len(good) for each in k}, {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsm8k", "ifeval", "humaneval"])
def test_the_definitions_of_lm_eval(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, evaluate = (pytest.importorskip(module) for module in ("datasets", "evaluate"))
    if name == "ifeval":
        for module in ("langdetect", "immutabledict", "nltk"):
            pytest.importorskip(module, reason=f"{module} is not installed: pip install 'lm_eval[ifeval]'")

    def load(path: str, *_: Any, **__: Any) -> Any:
        return datasets.DatasetDict(dict.fromkeys(("train", "test"), datasets.Dataset.from_list(ROWS[path])))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(evaluate, "load", lambda path: Judge())
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    path = make_tiny(tmp_path / "model", "llama", max_position_embeddings=2048, num_hidden_layers=1)
    unsafe = name == "humaneval"
    if unsafe:
        with pytest.raises(ConfigError, match=r"task 'humaneval' runs code .* --confirm-run-unsafe-code allows it"):
            streamprune.find_tasks([name])
    found = streamprune.find_tasks([name], limit=2, confirm_run_unsafe_code=unsafe)
    assert found.most == {name: {"gsm8k": 256, "ifeval": 1280, "humaneval": 1024}[name]}
    theirs = simple_evaluate(
        model=backend(path), tasks=[name], task_manager=found.manager, limit=2, confirm_run_unsafe_code=unsafe
    )
    ours = streamprune.evaluate_tasks(path, found)
    assert ours.results == theirs["results"]
    assert ours.samples[name]
    again = tasks._manager(None)
    assert again._index is found.manager._index  # takes ten seconds to make
    assert "load" not in vars(again)


def test_scores_of_both_models_are_in_the_report(place: Path, tiny: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    streamprune.prune(streamprune.Config(model=tiny("llama"), out=out, ratio=0.4, recipe="magnitude", round_to=4))
    for model, name in ((out, "after"), (tiny("llama"), "before")):
        words = ["eval", str(model), "--tasks", "written", "--include-path", str(place), "--json", "--quiet"]
        (tmp_path / f"{name}.json").write_text(CliRunner().invoke(main, words).stdout)
    words = [
        "report",
        str(out),
        "--scores",
        str(tmp_path / "after.json"),
        "--scores-against",
        str(tmp_path / "before.json"),
    ]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    page = (out / "report.html").read_text()
    assert '<th scope="row">written</th><td>exact_match,first</td><td>4</td>' in page
    assert "The scores before are those of the checkpoint that was pruned" in page
