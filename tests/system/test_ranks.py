"""Several processes at one job, against one that does it alone.

Ranks are forked from the tests' own process, which has torch already; one test goes through torchrun.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, contents
from safetensors.torch import load_file
from streamprune_cli import main

import streamprune
from streamprune import Config
from streamprune.errors import ConfigError, LostError, NumericalError
from streamprune.jobs.journal import Journal
from streamprune.jobs.names import job_folder
from streamprune.maths.sums import SiteStatistics
from streamprune.model.names import CURVES
from streamprune.pruning.block import BlockPruner
from streamprune.system import files, ranks
from streamprune.system.ranks import ALONE, Ranks, joined

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

Make = Callable[..., Config]
Tiny = Callable[..., Path]
Sabotage = Callable[[int, int], None]
LIMIT = 120.0


@dataclass
class Ended:
    """How a process ended: its exit code, or minus the signal, and what it wrote."""

    code: int
    out: str
    err: str


def together(size: int, work: Callable[[int], Any], folder: Path) -> list[Ended]:
    """Run `work(rank)` in so many processes that find each other; one that outlives the limit fails the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        process = os.fork()
        if process:
            processes.append(process)
            continue
        code = 70
        try:
            for descriptor, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_PORT": str(port)})
            work(rank)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes: dict[int, int] = {}
    until = time.monotonic() + LIMIT
    while len(codes) < size:
        for process in set(processes) - set(codes):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                codes[process] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > until:
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)
    return [
        Ended(codes[process], (folder / f"out-{rank}").read_text(), (folder / f"err-{rank}").read_text())
        for rank, process in enumerate(processes)
    ]


def command(arguments: Sequence[str], folder: Path, *, size: int = 2, sabotage: Sabotage | None = None) -> list[Ended]:
    """The command in several processes, with something done in each before a block is pruned."""
    real = BlockPruner.prune

    def work(rank: int) -> None:
        def prune(self: BlockPruner, block: Any, index: int, *given: Any) -> Any:
            if sabotage is not None:
                sabotage(rank, index)
            return real(self, block, index, *given)

        BlockPruner.prune = prune  # type: ignore[method-assign]
        main(list(arguments))

    return together(size, work, folder)


def pruned(config: Config, folder: Path, size: int = 2) -> None:
    """The job in so many processes."""

    def work(rank: int) -> None:
        with joined() as everyone:
            streamprune.prune(config, ranks=everyone)

    for ended in together(size, work, folder):
        assert (ended.code, ended.err) == (0, "")


def weights(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
    return found


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def costs(out: Path) -> list[float]:
    """What units cost, as the survey found it; nothing where the recipe has no curve."""
    sites = json.loads((out / CURVES).read_text())["sites"] if (out / CURVES).exists() else {}
    return [cost for site in sites.values() for _, cost in site]


@pytest.fixture
def arguments(tiny: Tiny, text: Path, tmp_path: Path) -> list[str]:
    """`streamprune run` on a tiny model, as typed."""
    small = ["--samples", "5", "--seq-len", "24", "--round-to", "4", "--dtype", "float64"]
    model = tiny("llama", torch.float64)
    return ["run", str(model), str(tmp_path / "out"), "--ratio", "0.3", "--calibration", str(text), *small]


# What they share.


def test_samples_are_dealt_out_whole() -> None:
    for size in (1, 2, 3, 7):
        parts = [Ranks(rank, size).samples(7) for rank in range(size)]
        assert [i for part in parts for i in range(7)[part]] == list(range(7))
        lengths = [part.stop - part.start for part in parts]
        assert max(lengths) == Ranks(0, size).max_samples(7) <= min(lengths) + 1


def test_a_process_by_itself_is_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    with joined() as alone:
        assert alone is ALONE
        x = torch.ones(2)
        alone.sum(x)
        alone.barrier()
        assert x.tolist() == [1, 1]
        assert alone.gather("a") == ["a"]
        assert alone.broadcast(lambda: 3) == 3
        for (together, mine), item in zip(alone.rounds([1, 2]), (1, 2), strict=True):
            assert list(together) == mine == [item]
            given = [(item * 2, [torch.tensor(item)])]
            assert list(alone.exchange(together, given, torch.device("cpu"))) == [
                (item, item * 2, [torch.tensor(item)])
            ]


def test_restarts_on_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "TORCHELASTIC_MAX_RESTARTS": "3",
        "GROUP_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--max-restarts restarts the processes of one machine only"), joined():
        pass


def test_what_ranks_send_each_other(tmp_path: Path) -> None:
    cpu = torch.device("cpu")

    def work(rank: int) -> None:
        with joined() as everyone:
            assert (everyone.rank, everyone.size, everyone.local_rank, everyone.local_size) == (rank, 3, rank, 3)
            assert everyone.gather({"rank": rank}) == [{"rank": each} for each in range(3)]
            assert everyone.broadcast(lambda: rank, source=1) == 1
            x = torch.full((2, 3), 10.0**rank, dtype=torch.float64)
            everyone.sum(x, owner=2)
            assert rank != 2 or bool((x == 111).all())
            counts = torch.tensor([rank, 1])
            everyone.sum(counts)
            assert counts.tolist() == [3, 3]
            given = [
                torch.ones(2, 2).T[:1],
                torch.zeros(3, 0),
                torch.tensor(7),
                torch.tensor([1.5], dtype=torch.bfloat16),
            ]
            got = everyone.broadcast_tensors(given if rank == 1 else None, 1, cpu)
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, given, strict=True))
            did = []

            def solve(item: int) -> tuple[str, list[torch.Tensor]]:
                did.append(item)
                return f"{item} by {rank}", [torch.full((item,), float(item))] * (item % 2)

            found = [
                (item, info, [tensor.tolist() for tensor in tensors])
                for together, mine in everyone.rounds([4, 5, 6, 7])
                for item, info, tensors in everyone.exchange(together, [solve(item) for item in mine], cpu)
            ]
            assert found == [
                (4, "4 by 0", []),
                (5, "5 by 1", [[5.0] * 5]),
                (6, "6 by 2", []),
                (7, "7 by 0", [[7.0] * 7]),
            ]
            assert did == [[4, 7], [5], [6]][rank]
            for _ in everyone.in_turn():
                with (tmp_path / "turns").open("a") as file:
                    file.write(str(rank))

    assert [(each.code, each.err) for each in together(3, work, tmp_path)] == [(0, "")] * 3
    assert (tmp_path / "turns").read_text() == "012"


def test_statistics_add_up() -> None:
    def fed(numbers: Sequence[int]) -> SiteStatistics:
        everything = frozenset({"mask-gradient", "gram", "gradient-gram", "factors", "divergence"})
        shape = {"units": 3, "width": 2, "heads": 3, "inputs": 4, "outputs": 5, "rows": [6, 7]}
        stats = SiteStatistics(everything, **shape, device=torch.device("cpu"), dtype=torch.float64)  # type: ignore[arg-type]
        for number in numbers:
            generator = torch.Generator().manual_seed(number)

            def draw(*columns: int, generator: torch.Generator = generator) -> torch.Tensor:
                return torch.rand(2, *columns, generator=generator, dtype=torch.float64)

            stats.add(draw(8, 4), draw(8, 6), draw(3, 8, 8).softmax(dim=-1))
            stats.add_gradients(draw(8, 6), draw(8, 6), draw(8, 5), [draw(8, 6), draw(8, 7)], 7.0)
        return stats

    def everything(stats: SiteStatistics) -> list[torch.Tensor]:
        """All tensors and counts, found by looking."""
        found = [torch.tensor(stats.seen)]
        for part in (stats.mask, stats.gram, stats.gradient, stats.inputs, stats.divergence, *stats.producers):
            found += [
                torch.as_tensor(value) for value in vars(part).values() if isinstance(value, torch.Tensor | int | float)
            ]
        return found

    whole, halves = fed([0, 1, 2]), [fed([0, 2]), fed([1])]
    # A stand-in for ranks: every part of one half is given the other half's.
    other: list[torch.Tensor] = []
    halves[1].across(lambda tensor: other.append(tensor.clone()))
    parts = iter(other)
    halves[0].across(lambda tensor: tensor.add_(next(parts)))  # type: ignore[arg-type, return-value]
    assert next(parts, None) is None
    for a, b in zip(everything(halves[0]), everything(whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# The same result as one process.


@pytest.mark.parametrize(
    ("name", "size", "changes"),
    [
        ("llama", 2, {"recipe": "sobp"}),
        ("llama", 3, {"recipe": "default", "settings": {"labels": "drawn"}, "refine": 3, "effort": "high"}),
        ("qwen3_moe", 2, {"recipe": "default", "samples": 24, "experts": "3", "ratio": 0.45, "round_to": 1}),
        ("llama", 2, {"recipe": "surgeon", "settings": {"shots": "2", "lora_steps": "2"}}),
        ("llama", 2, {"recipe": "greedy-output"}),
        ("mixtral", 3, {"recipe": "wanda-sp", "calibration": "self", "samples": 5, "seq_len": 6}),
    ],
)
def test_as_one_process(
    name: str, size: int, changes: dict[str, Any], tiny: Tiny, configured: Make, tmp_path: Path
) -> None:
    model = tiny(name, torch.float64)
    # Not a multiple of the ranks.
    alone, shared = (
        configured(model, out, **{"dtype": "float64", "samples": 13, **changes}) for out in ("alone", "shared")
    )
    streamprune.prune(alone)
    pruned(shared, tmp_path, size)
    assert not job_folder(shared.out).exists()
    one, many = report(alone.out), report(shared.out)
    assert (one["ranks"], many["ranks"]) == (1, size)
    assert one["plan"] == many["plan"]
    assert one["tokens"] == many["tokens"]
    kept = [
        [(site["kept"], site.get("tokens"), site.get("left_alone")) for site in each["sites"]] for each in (one, many)
    ]
    assert kept[0] == kept[1]
    for a, b in zip(one["sites"], many["sites"], strict=True):
        assert a["error"] == (None if b["error"] is None else pytest.approx(b["error"], rel=1e-6))
        assert a["damping"] == b["damping"]
    assert costs(alone.out) == pytest.approx(costs(shared.out), rel=1e-5)  # six digits are written
    expected, found = weights(alone.out), weights(shared.out)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        # Rows of producers show which units were kept.
        torch.testing.assert_close(found[key], tensor, rtol=1e-7, atol=1e-9)
    # Nothing is computed twice.
    assert many["operations"] == pytest.approx(one["operations"], rel=0.02)


# How it ends.


def lost(rank: int, index: int) -> None:
    if (rank, index) == (1, 1):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_lost_rank_ends_the_job_and_the_same_command_goes_on(arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = command([*arguments, "--quiet"], tmp_path, sabotage=lost)
    assert (first.code, second.code, second.err) == (1, -signal.SIGKILL, "")
    assert first.err.startswith("streamprune: another process of this job was lost (")
    assert first.err.endswith("); run the same command again to resume\n")
    assert first.err.count("\n") == 1
    assert not out.exists()
    assert streamprune.status(out).state == "failed"
    assert [entry["step"] for entry in Journal(job_folder(out) / "journal.jsonl").steps()][-1] == "shot-1/prune/0"
    # Another number of them would find other samples in its store.
    for size in (1, 3):
        refused = command(arguments, tmp_path, size=size)
        assert [each.code for each in refused] == [1] * size
        said = [line for each in refused for line in each.err.splitlines() if "processes" in line]
        assert said == [
            f"streamprune: {size} processes share the samples; this job was started with 2; --restart starts over"
        ]
    done = command([*arguments, "--json", "--quiet"], tmp_path)
    assert [(each.code, each.err) for each in done] == [(0, ""), (0, "")]
    assert (json.loads(done[0].out)["resumed"], done[1].out) == (True, "")
    whole = [argument.replace(str(out), str(tmp_path / "whole")) for argument in arguments]
    assert [each.code for each in command(whole, tmp_path)] == [0, 0]
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_stops_all_at_the_same_step(asked: int, arguments: list[str], tmp_path: Path) -> None:
    def sabotage(rank: int, index: int) -> None:
        if (rank, index) == (asked, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    arguments = [*arguments, "--cache", str(tmp_path / "disk"), "--quiet"]
    ended = command(arguments, tmp_path, sabotage=sabotage)
    assert [each.code for each in ended] == [75, 75]
    assert (
        "".join(each.err for each in ended) == "streamprune: stopped on request; run the same command again to resume\n"
    )
    assert [entry["step"] for entry in Journal(job_folder(tmp_path / "out") / "journal.jsonl").steps()][
        -1
    ] == "shot-1/prune/1"
    assert streamprune.status(tmp_path / "out").state == "interrupted"
    assert sorted(path.name for path in next((tmp_path / "disk").iterdir()).iterdir()) == ["rank-0", "rank-1"]
    assert [each.code for each in command(arguments, tmp_path)] == [0, 0]
    assert not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize("guilty", [0, 2])
def test_an_error_is_told_once_by_the_rank_that_has_it(guilty: int, arguments: list[str], tmp_path: Path) -> None:
    def sabotage(rank: int, index: int) -> None:
        if (rank, index) == (guilty, 1):
            raise NumericalError("made up")

    ended = command([*arguments, "--quiet"], tmp_path, size=3, sabotage=sabotage)
    assert [each.code for each in ended] == [1, 1, 1]
    assert [each.err for each in ended] == ["streamprune: made up\n" if rank == guilty else "" for rank in range(3)]
    error = streamprune.status(tmp_path / "out").error
    assert error == ("made up" if guilty == 0 else "rank 2: made up")


def test_what_is_refused(arguments: list[str], tiny: Tiny, text: Path, tmp_path: Path) -> None:
    few = [argument if argument != "5" else "1" for argument in arguments]
    cases = {
        "samples is 1; 2 processes need one each at least": few,
        "device is 'cuda:0'; with 2 processes it must be auto, cpu or cuda": [*arguments, "--device", "cuda:0"],
    }
    for message, given in cases.items():
        ended = command(given, tmp_path)
        assert [each.code for each in ended] == [2, 2]
        assert "".join(each.err for each in ended) == f"streamprune: {message}\n"
    ended = command(["eval", str(tiny("llama")), "--text", str(text)], tmp_path)
    message = "streamprune: 2 processes were started together (WORLD_SIZE); only run shares its work\n"
    assert [(each.code, each.err) for each in ended] == [(2, message)] * 2
    # A job that another process works on.
    folder = job_folder(tmp_path / "out")
    files.make_folder(folder)
    with files.locked(folder / "lock"):
        ended = command(arguments, tmp_path)
    assert [each.code for each in ended] == [1, 1]
    assert "".join(each.err for each in ended) == (
        f"streamprune: another process is working on this job ({folder / 'lock'} is locked)\n"
    )


def test_ranks_that_disagree_are_refused(arguments: list[str], tmp_path: Path) -> None:
    ended = together(2, lambda rank: main([*arguments, "--seed", str(rank), "--quiet"]), tmp_path)
    assert [each.code for each in ended] == [2, 2]
    said = "".join(each.err for each in ended)
    assert said == "streamprune: rank 1 does not agree with rank 0: settings.seed is 1 and was 0 there\n"
    assert not (tmp_path / "out.streamprune").exists()


def test_a_rank_waits_only_so_long_for_the_others(arguments: list[str], tmp_path: Path) -> None:
    def work(rank: int) -> None:
        ranks.JOINING = ranks.timedelta(seconds=1)
        os.environ["WORLD_SIZE"] = "2"
        main(arguments)

    (ended,) = together(1, work, tmp_path)
    assert ended.code == 1
    assert ended.err.startswith("streamprune: rank 0 of 2 cannot connect to the others (")
    assert ended.err.count("\n") == 1


def test_what_joining_prints_is_no_result(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo's lines come from the library itself, past Python's stdout."""

    def init_process_group(*arguments: Any, **options: Any) -> None:
        os.write(1, b"[Gloo] Rank 0 is connected\n")
        raise RuntimeError("as far as this test goes")

    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # a function has its name as well
    monkeypatch.setattr(rendezvous, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 0, 2)]))
    monkeypatch.setattr("torch.distributed.init_process_group", init_process_group)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(LostError, match="as far as this test goes"), joined():
        pass
    os.write(1, b"a result\n")
    assert capfd.readouterr().out == "a result\n"


# How it is started.

DRIVER = """
import os, signal, sys
from pathlib import Path
from streamprune.pruning.block import BlockPruner
from streamprune_cli import main

real = BlockPruner.prune

def prune(self, block, index, *given):
    if index == 1 and os.environ["RANK"] == "1" and not Path("stopped").exists():
        Path("stopped").touch()
        parent = os.getppid()
        script = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
        if sys.argv[1] == "script":
            os.killpg(script, getattr(signal, os.environ["SENT"]))
        else:
            os.kill(os.getpid(), signal.SIGTERM)
    return real(self, block, index, *given)

BlockPruner.prune = prune
main(sys.argv[2:])
"""
"""The command, of whose second process something is asked to stop in its first life: itself, or the script around it with its group."""
PROGRAMS = {
    # In both, the driver stands where the command would: behind `-m streamprune_cli`, and behind `streamprune`.
    "torchrun": f'#!/bin/bash\nshift 4\nexec {sys.executable} -m torch.distributed.run --nproc-per-node "$PROCESSES" '
    'driver.py script "$@"\n',
    "streamprune": f'#!/bin/bash\n[ $1 = status ] && exec {sys.executable} -m streamprune_cli "$@"\n'
    f'exec {sys.executable} driver.py self "$@"\n',
    "srun": '#!/bin/bash\nshift\nfor i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 "$@" & done\n'
    "wait -n; first=$?; wait -n && exit $first\n",
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && echo 127.0.0.1\n[ "$1 $2" = "requeue $SLURM_JOB_ID" ] && touch requeued\n',
}


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """For scripts: with `PROGRAMS` on its PATH."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "bin").mkdir()
    for name, program in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(program)
        (tmp_path / "bin" / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_torchrun(
    sent: str, arguments: list[str], environment: dict[str, str], configured: Make, tiny: Tiny, tmp_path: Path
) -> None:
    script = [str(ROOT / "examples" / "torchrun.sh"), *arguments[1:], "--json", "--quiet"]
    environment |= {"PROCESSES": "2", "SENT": sent}
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "env": environment}
    # A shell cannot trap what whoever runs the tests has ignored.
    heard = {"start_new_session": True, "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    stopped = subprocess.run(script, **options, **heard)
    assert (stopped.returncode, stopped.stdout) == (75, ""), stopped.stderr
    assert stopped.stderr.count("streamprune: ") == stopped.stderr.count("streamprune: stopped on request") == 1
    if sent != "SIGTERM":
        return  # the job goes on from the same journal line, whatever the signal
    done = subprocess.run(script, **options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] is True
    assert report(tmp_path / "out")["ranks"] == 2
    alone = configured(tiny("llama", torch.float64), "alone", recipe="default", samples=5, dtype="float64")
    streamprune.prune(alone)
    assert report(alone.out)["plan"] == report(tmp_path / "out")["plan"]


@pytest.mark.slow
def test_tasks_of_slurm(arguments: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    script = [str(ROOT / "examples" / "slurm-nodes.sh"), *arguments[1:]]
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}
    stopped, done = (
        subprocess.run(script, capture_output=True, text=True, check=False, env=environment) for _ in range(2)
    )
    assert stopped.returncode == 75, stopped.stderr
    assert stopped.stderr == "streamprune: stopped on request; run the same command again to resume\n"
    assert (tmp_path / "requeued").exists()
    assert (done.returncode, done.stderr) == (0, "")
    assert report(tmp_path / "out")["ranks"] == 2


def test_a_rank_is_asked_to_stop_once_its_launcher_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    reading, writing = os.pipe()
    launcher = os.fork()
    if not launcher:
        if not os.fork():
            asked: list[int] = []
            signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
            with ranks._stopping_with_launcher():
                time.sleep(0.1)  # the launcher is there
                os.write(writing, b"asked early" if asked else b"working, ")
                os.kill(os.getppid(), signal.SIGKILL)
                until = time.monotonic() + LIMIT
                while not asked and time.monotonic() < until:
                    time.sleep(0.01)
                time.sleep(0.2)  # a second signal would end a job at once
            os.write(writing, b"asked %d time" % len(asked))
            os._exit(0)
        signal.pause()
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1]) == -signal.SIGKILL
    with open(reading, "rb") as told:
        assert told.read() == b"working, asked 1 time"
