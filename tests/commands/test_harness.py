"""The harness through a streamed model: against lm_eval's own backend on the same checkpoint."""

from __future__ import annotations

import importlib.machinery
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import ALPHABET, ROOT, add_bos, make_tiny, shared
from streamprune_cli import main

import streamprune
from streamprune import Callback, Stopped
from streamprune.commands.harness import tasks
from streamprune.commands.harness.scoring import Query, grouped, padded, score
from streamprune.errors import CalibrationError, ConfigError, ResourceError, StreamPruneError
from streamprune.model.skeleton import Skeleton, open_skeleton
from streamprune.model.tokenizer import BOS, Bos, load_tokenizer
from streamprune.stream import sweep
from streamprune.system.progress import Silent

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from streamprune.commands.harness.streamed import StreamedModel

Tiny = Callable[..., Path]
TASK_FILES = ROOT / "examples" / "harness"


@pytest.fixture(scope="module")
def pruned(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned tiny llama in the free layout, which needs code of its own."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    streamprune.prune(streamprune.Config(model=tiny("llama"), out=out, ratio=0.4, recipe="magnitude", round_to=4))
    return out


@pytest.fixture
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files as the tasks of examples/harness read them, of random letters."""
    draw = random.Random(0)

    def words(most: int) -> str:
        return "".join(draw.choices(ALPHABET[:26], k=draw.randint(1, most)))

    for folder, label, options in (("ARC-Easy", "answer", 4), ("piqa", "solution", 2), ("winogrande", "option", 2)):
        rows = []
        for _ in range(7):
            labels = [f"{label}{number}" for number in range(1, options + 1)]
            given = " ".join(f"{each.capitalize()}: {words(12)}" for each in labels)
            question = f"Please choose the correct answer to the question: {words(40)} _ {words(9)}"
            rows.append(
                {
                    "instruction": f"{question}\n\n{given}\n\nAnswer format: {'/'.join(labels)}",
                    "answer": draw.choice(labels),
                }
            )
        path = tmp_path / "mc" / folder / "test.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
    monkeypatch.setenv("STREAMPRUNE_MC", str(tmp_path / "mc"))


TASKS = ["mc_arc_easy", "mc_piqa", "mc_winogrande"]


def backend(path: Path, **options: Any) -> HFLM:
    """lm_eval's own model of a checkpoint."""
    return HFLM(pretrained=str(path), dtype="float32", device="cpu", batch_size=3, trust_remote_code=True, **options)


def streamed(path: Path, bos: Bos = "auto") -> StreamedModel:
    skeleton = open_skeleton(path, torch.device("cpu"), "float32")
    return StreamedModel(skeleton, load_tokenizer(path), bos=bos, memory=None, cache=None, progress=Silent())


def requests(kind: str, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]  # type: ignore[arg-type]


PAIRS: list[tuple[str, ...]] = [
    ("the cat", " sat"),
    ("the cat", "a"),
    ("the cat", "b"),  # reads what the one before reads
    ("the ca", "t"),
    ("", "no context"),
    ("trailing space  ", "moves"),
    ("<s>begins", " itself"),
    ("long " * 11, "context of fifty-five"),  # cut off on the left
    ("x" * 61, "abcd"),  # just fits: 64 tokens are read, the 65th predicted
    ("x", "y" * 60),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "opt"])
@pytest.mark.parametrize("first", [False, True], ids=["", "bos"])
def test_requests_score_as_the_harness_scores_them(name: str, first: bool, tiny: Tiny, tmp_path: Path) -> None:
    path = add_bos(make_tiny(tmp_path / "model", name)) if first else tiny(name)
    theirs, ours = backend(path), streamed(path)
    assert ours.max_length == theirs.max_length == 64
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", PAIRS))
    torch.testing.assert_close(
        torch.tensor([value for value, _ in found]), torch.tensor([value for value, _ in expected]), rtol=0, atol=1e-4
    )
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    # Windows of whole texts: shorter than the context, as long, longer. Where one text has the same window twice, to be
    # scored from different tokens on, lm_eval 0.4.13 takes the first logits for the last: random letters have none.
    draw = random.Random(2)
    texts: list[tuple[str, ...]] = [("".join(draw.choices(ALPHABET, k=length)),) for length in (3, 64, 180)]
    rolling = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) == pytest.approx(rolling, abs=1e-3)


@pytest.mark.parametrize("adds", [False, True])
def test_bos_is_the_harness_own_option(adds: bool, tiny: Tiny, tmp_path: Path) -> None:
    path = add_bos(make_tiny(tmp_path / "model", "llama")) if adds else tiny("llama")
    pairs = [pair for pair in PAIRS if pair[0]]  # an empty context is BOS in any case
    scores = {}
    for bos in BOS:
        options = {} if bos == "auto" else {"add_bos_token": bos == "on"}
        theirs, ours = backend(path, **options), streamed(path, bos)
        expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
        found = ours.loglikelihood(requests("loglikelihood", PAIRS))
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert ours.tok_encode("abc")[:1] == theirs.tok_encode("abc")[:1]
        assert ours.tok_encode("<s>abc") == theirs.tok_encode("<s>abc")
        scores[bos] = ours.loglikelihood(requests("loglikelihood", pairs))
    assert scores["on" if adds else "off"] == scores["auto"] != scores["off" if adds else "on"]


@pytest.mark.usefixtures("choices")
def test_tasks_and_text_agree_about_bos(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    adding = add_bos(make_tiny(tmp_path / "model", "llama"))
    tasks = streamprune.find_tasks(["mc_piqa"], include_path=TASK_FILES, limit=2)
    for path, bos, expected in ((adding, "auto", True), (tiny("llama"), "auto", False), (adding, "off", False)):
        measured = streamprune.evaluate(path, text, seq_len=24, bos=bos)  # type: ignore[arg-type]
        scored = streamprune.evaluate_tasks(path, tasks, bos=bos)  # type: ignore[arg-type]
        assert measured.bos == scored.bos == expected
        assert f"{'that begin with' if expected else 'without'} BOS" in scored.protocol


def test_greedy_choices_are_told_apart(tiny: Tiny) -> None:
    path = tiny("llama")
    model = streamprune.load(path)
    inputs = torch.tensor([[5, 6, 7, 8]])
    best = int(model(inputs).logits[0, -1].argmax())
    skeleton = open_skeleton(path, torch.device("cpu"), "float32")
    found = score(skeleton, [Query((5, 6, 7, 8), (target,)) for target in range(40)], progress=Silent())
    assert [greedy for _, greedy in found] == [target == best for target in range(40)]
    expected = torch.log_softmax(model(inputs).logits[0, -1], -1).tolist()
    assert [value for value, _ in found] == pytest.approx(expected, abs=1e-5)


@pytest.mark.usefixtures("choices")
def test_tasks_score_the_same_both_ways(pruned: Path) -> None:
    theirs = simple_evaluate(
        model="hf",
        model_args=f"pretrained={pruned},trust_remote_code=True,dtype=float32",
        device="cpu",
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(TASK_FILES), include_defaults=False),
    )
    ours = streamprune.evaluate_tasks(pruned, streamprune.find_tasks(TASKS, include_path=TASK_FILES))
    assert ours.results == theirs["results"]
    assert ours.documents == dict.fromkeys(TASKS, 7)
    assert "mc_winogrande" in ours.table
    assert "acc_norm" in ours.table


@pytest.mark.usefixtures("choices")
def test_all_requests_take_one_sweep(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    honest = Skeleton.read_block

    def counting(self: Skeleton, index: int) -> dict[str, torch.Tensor]:
        read.append(index)
        return honest(self, index)

    monkeypatch.setattr(Skeleton, "read_block", counting)
    streamprune.evaluate_tasks(tiny("llama"), streamprune.find_tasks(TASKS, include_path=TASK_FILES))
    assert read == [0, 1, 2]


@pytest.mark.usefixtures("choices")
def test_a_sweep_ends_when_it_is_asked_to(tiny: Tiny) -> None:
    done: list[str] = []
    watching = Callback(lambda event: done.append(event.message), stopping=lambda: "block 0" in done)
    tasks = streamprune.find_tasks(["mc_piqa"], include_path=TASK_FILES)
    with pytest.raises(Stopped):
        streamprune.evaluate_tasks(tiny("llama"), tasks, progress=watching)
    assert done[-1] == "block 0"


def test_memory_that_runs_out_is_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sweep, "advance", exhausted)
    skeleton = open_skeleton(tiny("llama"), torch.device("cpu"), "float32")
    with pytest.raises(ResourceError, match="cpu ran out of memory"):
        score(skeleton, [Query((1, 2), (3,))], progress=Silent())


@pytest.mark.usefixtures("choices")
def test_nothing_but_progress_is_said(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Outside a repository git would complain, which lm_eval asks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    tasks = streamprune.find_tasks(["mc_piqa"], include_path=TASK_FILES, limit=2)
    streamprune.evaluate_tasks(tiny("llama"), tasks)
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("choices")
def test_limit_and_examples(tiny: Tiny) -> None:
    tasks = streamprune.find_tasks(["mc_piqa"], include_path=TASK_FILES, limit=3, num_fewshot=1)
    scored = streamprune.evaluate_tasks(tiny("llama"), tasks)
    assert scored.documents == {"mc_piqa": 3}
    assert scored.fewshot == {"mc_piqa": 1}
    assert "|     1|acc" in scored.table
    assert "the first 3 documents" in scored.protocol
    # What was found once serves several models.
    assert streamprune.evaluate_tasks(tiny("llama"), tasks).results == scored.results


def test_padding_is_an_eighth_at_the_most_and_to_few_lengths() -> None:
    for length in range(1, 300):
        assert length <= padded(length, None) <= length * 9 / 8
        assert padded(length, 200) <= max(length, 200)
    assert len({padded(length, 2048) for length in range(1, 2049)}) <= 8 * 8 + 8


@pytest.mark.usefixtures("choices")
def test_what_cannot_be_asked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = streamprune.find_tasks
    with pytest.raises(ConfigError, match=r"no task 'mc_nothing' is among lm_eval's or below .*harness;"):
        find(["mc", "mc_nothing"], include_path=TASK_FILES)
    with pytest.raises(ConfigError, match="limit is 0; it must be at least 1"):
        find(["mc_piqa"], include_path=TASK_FILES, limit=0)
    with pytest.raises(ConfigError, match="num_fewshot is -1"):
        find(["mc_piqa"], include_path=TASK_FILES, num_fewshot=-1)
    with pytest.raises(ConfigError, match=r"include_path .*nowhere is not a directory"):
        find(["mc_piqa"], include_path=tmp_path / "nowhere")
    with pytest.raises(StreamPruneError, match=r"mc_boolq: lm_eval cannot load .*boolq/test.json"):
        find(["mc_boolq"], include_path=TASK_FILES)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'streamprune\[harness\]'"):
        find(["mc_piqa"], include_path=TASK_FILES)


@pytest.mark.parametrize("more", [[], ["--include-path", str(TASK_FILES)]])
def test_a_wrong_name_is_refused_before_torch_and_the_model(more: list[str]) -> None:
    code = (
        "import sys; from streamprune_cli import main; code = None\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as done: code = done.code\n"
        "print(code, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    words = ["eval", "no-such-model", "--tasks", "arc_easy,arc_eas", *more]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
    assert "no task 'arc_eas' is among lm_eval's" in done.stderr


def test_only_names_in_no_task_file_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "lm_eval" / "tasks" / "own"
    own.mkdir(parents=True)
    (own / "a.yaml").write_text("task: one\ntag:\n- 'two'\n- three # a note\ngroup: [four,five]\ninclude: _base\n")
    (own / "b.yaml").write_text('{"task": "six", group: seven}\r\ntag: eight\r\n')
    (own / "_base").write_text("tag: nine")
    spec = importlib.machinery.ModuleSpec("lm_eval", None)
    spec.submodule_search_locations = [str(tmp_path / "lm_eval")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    there = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert tasks._missing([*there, "on", "ne", "o.e", "our,five"]) == ["on", "ne", "o.e", "our,five"]


@pytest.mark.usefixtures("choices")
def test_the_command(tiny: Tiny, text: Path) -> None:
    def call(*words: object) -> Any:
        return CliRunner().invoke(main, ["eval", str(tiny("llama")), *map(str, words)])

    tasks = ("--tasks", "mc_piqa, mc_arc_easy", "--include-path", TASK_FILES, "--limit", 2)
    found = json.loads(call(*tasks, "--text", text, "--seq-len", 24, "--json").stdout)
    assert list(found) == ["perplexity", "tokens", "seq_len", "bos", "loss_on", "windows", "protocol", "tasks"]
    assert found["tasks"]["documents"] == {"mc_piqa": 2, "mc_arc_easy": 2}
    assert 0 <= found["tasks"]["results"]["mc_piqa"]["acc,none"] <= 1
    assert list(json.loads(call(*tasks, "--json").stdout)) == ["tasks"]
    shown = call(*tasks)
    assert shown.stdout.startswith("|")
    assert shown.stdout.rstrip().endswith("computed in float32)")
    for words, message in (
        ((), "nothing to measure: give --text TEXT, --tasks A,B or both"),
        (("--text", text, "--limit", 2), "--limit 2 needs --tasks"),
        (("--tasks", "mc_piqa", "--seq-len", 24), "--seq-len 24 needs --text"),
        (("--tasks", ","), "no tasks are named"),
    ):
        refused = call(*words)
        assert refused.exit_code == 2
        assert message in refused.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("choices")
def test_lm_eval_itself_runs_a_pruned_checkpoint(pruned: Path) -> None:
    """Its own command in a process that knows nothing of streamprune."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={pruned},trust_remote_code=True"]
    command += ["--tasks", ",".join(TASKS), "--include_path", str(TASK_FILES)]
    away = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env={**away, "HF_DATASETS_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert "|mc_piqa" in done.stdout


@pytest.mark.parametrize(
    ("file", "documents", "options"),
    [
        ("ARC-Easy", 2376, {3, 4, 5}),
        ("boolq", 3270, {2}),
        ("winogrande", 1267, {2}),
    ],
)
def test_the_shared_files_are_read_whole(
    file: str, documents: int, options: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMPRUNE_MC", str(shared("text", "mc")))
    monkeypatch.syspath_prepend(str(TASK_FILES))
    import mc  # type: ignore[import-not-found,unused-ignore]

    rows = list(mc.load(f"{file}/test.json")["test"])
    assert len(rows) == documents
    assert {len(row["choices"]) for row in rows} == options
    assert all(row["question"] and all(row["choices"]) and row["gold"] < len(row["choices"]) for row in rows)
    assert not any("nswer format" in row["question"] + row["choices"][-1] for row in rows)
    if file == "winogrande":
        assert all(row["question"].count("_") == 1 for row in rows)


def test_what_is_silenced_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what another lm_eval does not have."""
    from lm_eval import evaluator

    monkeypatch.delattr(evaluator, "add_env_info")
    before = evaluator.get_git_commit_hash
    with tasks._quietly():
        assert evaluator.get_git_commit_hash is not before
    assert evaluator.get_git_commit_hash is before
    assert not hasattr(evaluator, "add_env_info")


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    from streamprune_cli.show import result

    result({"tasks": {"a": {"perplexity": float("inf"), "acc": 0.5}}, "rounds": (1.0, float("nan"))}, True, [])
    assert json.loads(capsys.readouterr().out) == {
        "tasks": {"a": {"perplexity": None, "acc": 0.5}},
        "rounds": [1.0, None],
    }


def test_what_reads_the_same_is_computed_once() -> None:
    read = (4, 5, 6)
    queries = [Query(read, (7,)), Query((4, 5), (7,)), Query(read, (6, 8)), Query(read, (9,))]
    assert grouped(queries, 64) == {3: {read: [0, 2, 3]}, 2: {(4, 5): [1]}}


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [2] * 65), ([1], [40])])
def test_requests_that_the_model_cannot_score_are_refused(
    context: list[int], continuation: list[int], tiny: Tiny
) -> None:
    with pytest.raises(CalibrationError, match="a request"):
        streamed(tiny("llama"))._loglikelihood_tokens([(("", ""), context, continuation)])
