"""Models by name: from a hub that a local server plays, from the cache it leaves, and from neither."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from conftest import make_tiny
from huggingface_hub import constants
from streamprune_cli import main

import streamprune
from streamprune import resolve_model
from streamprune.commands.inspect import inspect
from streamprune.errors import CheckpointError
from streamprune.model import hub
from streamprune.model.checkpoint import Checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEEDED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, offline, and a working directory without directories."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


class Server:
    """As much of the hub as `snapshot_download` asks for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.asked = files, list[str]()
        self.status, self.code = 200, ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.wfile.write(self.answer())

            def answer(self) -> bytes:
                outer.asked.append(f"{self.command} {self.path}")
                status, headers, body = outer.response(self.path.partition("?")[0])
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                return body

            def log_message(self, *_: Any) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"

    def response(self, path: str) -> tuple[int, dict[str, str], bytes]:
        if self.status != 200:
            return self.status, {"X-Error-Code": self.code, "X-Error-Message": "no"}, b"{}"
        if path.startswith("/api/models/org/model/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        if path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": name} for name in self.files]
            return 200, {}, json.dumps({"id": "org/model", "sha": COMMIT, "siblings": siblings}).encode()
        data = self.files.get(path.removeprefix(f"/org/model/resolve/{COMMIT}/"))
        if data is None:  # the library asks for other things too
            return 404, {}, b"{}"
        return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data


@pytest.fixture
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("llama")


@pytest.fixture
def server(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The tiny llama as org/model, beside things that are not wanted; the network is on."""
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    files |= dict.fromkeys(("pytorch_model.bin", "modeling_evil.py", "model.fp16.safetensors", "onnx/m.json"), b"bad")
    serving = Server(files)
    monkeypatch.setattr(constants, "ENDPOINT", serving.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", serving.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=serving.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield serving
    serving.http.shutdown()
    thread.join()
    serving.http.server_close()


@pytest.fixture
def cached(model: Path, home: Path) -> Path:
    """org/model in the cache, as huggingface_hub lays it out: links to blobs."""
    repo = home / "models--org--model"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for path in model.iterdir():
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


class Listening:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def phase(self, name: str, total: int, done: int = 0) -> None: ...
    def step(self, note: str = "") -> None: ...
    def say(self, message: str) -> None:
        self.said.append(message)


def test_only_what_is_needed_is_fetched_and_then_works_offline(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    heard = Listening()
    folder = resolve_model("org/model", heard)
    assert {path.name for path in folder.iterdir()} == {path.name for path in model.iterdir()}
    assert {path.name for path in folder.iterdir()} >= NEEDED
    for path in model.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert not [path for path in server.asked if path.endswith((".bin", ".py", "m.json", "fp16.safetensors"))]
    assert heard.said[-1] == f"org/model is commit {COMMIT}, in {folder}"
    assert capfd.readouterr().err == ""
    asked = len(server.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("org/model") == resolve_model(Path("org/model")) == folder
    assert resolve_model(f"org/model@{COMMIT}") == folder
    assert len(server.asked) == asked


def test_the_single_file_is_fetched_where_transformers_reads_it(server: Server, tmp_path: Path) -> None:
    """Beside an index, whose shards then are not."""
    tensors: dict[str, torch.Tensor] = {}
    for name in [name for name in server.files if name.startswith("model-")]:
        tensors |= safetensors.torch.load(server.files[name])
    tensors["model.norm.weight"] += 1
    server.files["model.safetensors"] = safetensors.torch.save(tensors, metadata={"format": "pt"})
    folder = resolve_model("org/model")
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(Checkpoint(folder).read("model.norm.weight"), tensors["model.norm.weight"])
    assert torch.equal(streamprune.load(folder).state_dict()["model.norm.weight"], tensors["model.norm.weight"])


def test_the_cached_copy_is_taken_when_the_hub_cannot_be_reached(
    cached: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.status = 500
    assert resolve_model("org/model") == cached
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert resolve_model("org/model") == cached


def test_a_directory_wins(server: Server, model: Path, tmp_path: Path) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").symlink_to(model)
    assert resolve_model("org/model") == Path("org/model")
    assert not server.asked


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "org/model is neither a directory nor a model on the hub; if it is private, log in"),
        (401, "", "org/model cannot be fetched from the hub (Client error '401"),
        (403, "GatedRepo", "org/model is gated: accept its terms on the hub and log in"),
        (404, "RevisionNotFound", "org/model@v9 is a revision that the model on the hub does not have"),
        (500, "", "the hub cannot be reached; run once with the network, or give a directory"),
    ],
)
def test_what_the_hub_refuses(status: int, code: str, message: str, server: Server) -> None:
    server.status, server.code = status, code
    with pytest.raises(CheckpointError, match=re.escape(message)):
        resolve_model("org/model@v9" if code == "RevisionNotFound" else "org/model")


def test_pickles_are_not_fetched(server: Server) -> None:
    for name in [name for name in server.files if name.endswith((".safetensors", ".index.json"))]:
        del server.files[name]
    with pytest.raises(CheckpointError, match="has only pickled weights, which are never fetched"):
        resolve_model("org/model")
    assert not [path for path in server.asked if path.endswith(".bin")]
    del server.files["pytorch_model.bin"]
    with pytest.raises(CheckpointError, match=r"org/model has no model.safetensors on the hub"):
        streamprune.load("org/model")


def test_neither_a_directory_nor_in_the_cache(tmp_path: Path, model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither a directory nor complete .*HF_HUB_OFFLINE is set"):
        resolve_model("org/model")
    for odd in ("nowhere", "a/b/c", "../up/there", "/abs/path", "org/model@", "-x/y", str(model / "config.json")):
        with pytest.raises(CheckpointError, match=r"is not a directory with a model in it, nor a name on the hub"):
            resolve_model(odd)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "file").touch()
    with pytest.raises(CheckpointError, match="is not a directory with a model in it"):
        resolve_model("org/file")


def test_an_incomplete_copy(cached: Path) -> None:
    shard = next(cached.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"not complete in the hub's cache .*lacks {shard.name}.*HF_HUB_OFFLINE"):
        resolve_model("org/model")


def test_all_commands_take_a_name(cached: Path, text: Path, tmp_path: Path) -> None:
    def done(*arguments: str) -> str:
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == 0, result.output
        assert f"org/model is commit {COMMIT}" in result.stderr
        return result.stdout

    small = ["--samples", "4", "--seq-len", "24"]
    given = [
        "org/model",
        "--ratio",
        "0.3",
        *small,
        "--recipe",
        "wanda-sp",
        "--round-to",
        "4",
        "--calibration",
        str(text),
    ]
    done("plan", *given)
    done("run", given[0], "out", *given[1:])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["model"] == {"name": "org/model", "commit": COMMIT}
    assert "# org/model, pruned by" in (tmp_path / "out" / "README.md").read_text()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    done("eval", "org/model", "--text", str(text), "--seq-len", "24")
    assert f"snapshots/{COMMIT}" in done("inspect", "org/model")
    done("report", "out", "--against", "org/model", "--text", str(text), "--seq-len", "24")
    assert "Compared with <strong>org/model</strong>" in (tmp_path / "out" / "report.html").read_text()
    distil = ["--method", "distil", "--steps", "2"]
    done("tune", "out", "tuned", "--text", str(text), "--teacher", "org/model", *small, *distil)
    table = ["--ratios", "0.3", "--recipes", "magnitude", "--eval-seq-len", "24", "--round-to", "4"]
    printed = done("compare", "org/model", "--text", str(text), *table)
    assert "written to model-compare" in printed
    found = json.loads((tmp_path / "model-compare" / "compare.json").read_text())
    assert found["model"] == f"org/model@{COMMIT}"
    assert streamprune.load("org/model").config.model_type == "llama"
    with pytest.raises(CheckpointError, match="neither a directory nor complete"):
        inspect("org/other")


def test_a_job_goes_on_from_another_copy(configured: Callable[..., Any], cached: Path, model: Path, text: Path) -> None:
    """What is compared is the content, not where it lies."""
    streamprune.plan_only(configured(Path("org/model"), recipe="wanda-sp"))
    assert streamprune.prune(configured(model, recipe="wanda-sp")).resumed


def test_a_job_under_way_is_no_name(configured: Callable[..., Any], model: Path, tmp_path: Path) -> None:
    streamprune.plan_only(configured(model, out="jobs/one", recipe="wanda-sp"))
    found = inspect(Path("jobs/one"))
    assert found["job"]["state"] == "interrupted"


def test_nothing_is_asked_of_the_network_for_a_directory(
    server: Server, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def refuse(*where: Any, **_: Any) -> Any:
        asked.append(where)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    small = ["--samples", "4", "--seq-len", "24"]
    for arguments in (
        ["run", str(model), "out", "--ratio", "0.3", "--round-to", "4", "--calibration", str(text), *small],
        ["eval", "out", "--text", str(text), "--seq-len", "24"],
        ["tune", "out", "lora", "--text", str(text), "--method", "lora", "--steps", "2", *small],
        [
            "tune",
            "out",
            "distil",
            "--text",
            str(text),
            "--teacher",
            str(model),
            "--method",
            "distil",
            "--steps",
            "2",
            *small,
        ],
        ["inspect", "distil"],
    ):
        if "lora" not in arguments or importlib.util.find_spec("peft"):
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, result.output
    assert streamprune.load("out") is not None
    assert not asked
    assert not server.asked


def test_titles(cached: Path, tmp_path: Path) -> None:
    assert (hub.title(cached), hub.commit(cached)) == ("org/model", COMMIT)
    assert hub.shown(cached) == f"org/model@{COMMIT}"
    plain = make_tiny(tmp_path / "plain", "llama")
    assert (hub.title(plain), hub.commit(plain), hub.shown(plain)) == ("plain", None, str(plain))
