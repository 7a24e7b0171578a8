"""wandb mirrors the metrics, and never stops a run."""

import gzip
import http.server
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.run.curves import read_lines
from components.run.tracking import Tracker
from conftest import ROOT, environ


class FakeRun:
    """Keeps what is logged; fails from the third record on."""

    def __init__(self) -> None:
        self.records: list[tuple[dict[str, Any], int]] = []

    def log(self, record: dict[str, Any], step: int) -> None:
        if len(self.records) == 3:
            raise ConnectionError("gone")
        self.records.append((record, step))

    def finish(self) -> None:
        time.sleep(60)


@pytest.fixture
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "nothing"))


def test_same_names_and_config_and_a_failure_is_survived(
    script: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, no_account: None
) -> None:
    import wandb

    fake, asked = FakeRun(), {}

    def init(**options: Any) -> FakeRun:
        asked.update(options)
        return fake

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr("components.run.tracking.PATIENCE", 0.2)
    began = time.monotonic()
    options = ("--track", "--track-project", "p", "--track-name", "n", "--track-group", "g", "--log-every", 10)
    run = script("--trainer", "bc", "--steps", 60, *options)
    assert time.monotonic() - began < 10  # `finish` has a deadline
    assert (asked["project"], asked["name"], asked["group"], asked["mode"]) == ("p", "n", "g", "offline")
    assert asked["config"]["optimizer_options"]["lr"] == 1e-3
    lines = read_lines(run / "metrics.jsonl")
    assert [step for _, step in fake.records] == [10, 20, 30] and len(lines) == 6
    assert fake.records[0][0] == {key: value for key, value in lines[0].items() if key != "step"}


@pytest.mark.parametrize("key", ["", "a" * 40])
def test_without_key_or_network_it_goes_on_offline_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_account: None, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers
    tracker = Tracker(tmp_path)
    began = time.monotonic()
    tracker.start({"lr": 1}, "tendon", "", "")
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish()
    assert time.monotonic() - began < 10
    assert tracker.run is not None and list(tmp_path.glob("wandb/offline-run-*"))
    assert any("wandb is offline" in record.message for record in caplog.records)


def test_a_server_address_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_account: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://[bad")
    tracker = Tracker(tmp_path)
    tracker.start({"lr": 1}, "tendon", "", "")
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish()
    assert any("--track: wandb " in record.message for record in caplog.records)


class Server(http.server.ThreadingHTTPServer):
    """As much of wandb's server as a run needs to begin; it can stop answering."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.silent = threading.Event()
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:  # noqa: N802
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.silent.is_set():
            time.sleep(1000)
        data = gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data
        self.server.asked.append(data.decode())
        entity = {"id": "e", "name": "e"}
        bucket = {"id": "r", "name": "n", "displayName": "n", "config": "{}", "sweepName": None, "historyLineCount": 0}
        bucket |= {"project": {"id": "p", "name": "p", "entity": entity}}
        answers = {"upsertBucket": {"bucket": bucket, "inserted": True}, "model": {"bucket": None}}
        body = json.dumps({"data": answers | {"viewer": {"id": "v", "entity": "e", "flags": "{}"}}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the screen."""


@pytest.mark.slow
@pytest.mark.launched
@pytest.mark.parametrize("when", ["at the start", "mid-run"])
def test_a_network_that_is_lost_holds_nothing_up(tmp_path: Path, when: str) -> None:
    server = Server()
    if when == "at the start":
        server.silent.set()
    run = tmp_path / "run"
    options = ("--plugins", "toy", "--dataset", "toy", "--trainer", "trouble", "--steps", 200, "--log-every", 10)
    words = (sys.executable, ROOT / "offline_trainer.py", *options, "--eval-episodes", 0, "--track", "--run-dir", run)
    env = environ(WANDB_API_KEY="a" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}", HOME=str(tmp_path))
    with subprocess.Popen([str(w) for w in words], env=env, stdout=subprocess.PIPE, text=True) as process:
        while len(read_lines(run / "metrics.jsonl")) < 5:
            assert process.poll() is None
            time.sleep(0.05)
        assert any("upsertBucket" in text for text in server.asked) == (when == "mid-run")
        server.silent.set()
        first = time.monotonic()
        while not (run / "status.json").exists() or "finished" not in (run / "status.json").read_text():
            assert process.poll() is None
            time.sleep(0.05)
        finished = time.monotonic()
        assert process.wait(30) == 0
    assert finished - first < 8  # 150 steps of 0.02 s, the policy and the curves
    assert time.monotonic() - finished < 10
    assert len(read_lines(run / "metrics.jsonl")) == 20
    server.shutdown()
