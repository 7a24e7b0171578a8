"""wandb and TensorBoard mirror the metrics, and never stop a run."""

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

import offline_trainer
from components import REGISTRIES, UserError
from components.records import check_folder
from components.run.arguments import parse
from components.run.curves import read_lines
from components.run.tracking import TensorBoard, Tracker
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


def shown(run: Path) -> Any:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    return found.Reload()


def test_tensorboard_shows_what_the_logs_hold_also_of_a_run_that_was_killed_and_resumed(
    script: Callable[..., Path],
) -> None:
    pytest.importorskip("tensorboard")
    options = ("--trainer", "bc", "--save-every", 20, "--log-every", 5, "--eval-episodes", 2, "--eval-every", 10)
    run = script(*options, "--steps", 25, "--track", "tensorboard")
    killed = TensorBoard(run)  # what a process wrote after the last checkpoint, and that is not in the logs
    killed.start({}, "", "", "", step=25)
    killed.log({"train/loss": 99.0, "eval/return_mean": 99.0}, 30)
    killed.finish()
    script("--resume", run, "--steps", 40)
    found = shown(run)
    for name, file, key in (
        ("train/loss", "metrics.jsonl", "train/loss"),
        ("eval/return_mean", "eval.jsonl", "return_mean"),
    ):
        lines = [(line["step"], line[key]) for line in read_lines(run / file) if key in line]
        assert len(lines) >= 4
        assert [(event.step, pytest.approx(event.value)) for event in found.Scalars(name)] == lines
    assert b'| trainer | "bc" |' in found.Tensors("options/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_is_asked_for_late_and_shows_a_film(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    import av
    from PIL import Image

    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "train/loss": 2.0}\n{"step": 10, "train/loss": 1.0}\n')
    result = {"step": 10, "env": {}, "episodes": 1, "success_rate": None, "success_ci": None, "return_mean": 3.0}
    (tmp_path / "eval.jsonl").write_text(json.dumps(result) + "\n")
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 960, 480, "yuv420p"
        for i in range(20):
            frame = av.VideoFrame.from_image(Image.new("RGB", (960, 480), (10 * i, 0, 0)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    tracker = TensorBoard(tmp_path)
    tracker.start({"trainer_options": {"lr": 1}}, "", "", "", step=10)
    tracker.show("eval/film", tmp_path / "film.mp4", 10)
    tracker.show("eval/film", tmp_path / "none.mp4", 10)
    Image.new("RGB", (30, 20)).save(tmp_path / "curves.png")
    tracker.show("curves", tmp_path / "curves.png", 10)
    tracker.finish()
    found = shown(tmp_path)
    assert [event.step for event in found.Scalars("train/loss")] == [5, 10]
    assert found.Scalars("eval/return_mean")[0].value == 3.0
    assert found.Images("curves")[0].encoded_image_string == (tmp_path / "curves.png").read_bytes()
    (film,) = found.Images("eval/film")
    assert film.encoded_image_string[:4] == b"GIF8" and (film.width, film.height) == (480, 240)


def test_tensorboard_that_fails_is_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("a file in the place of its folder")
    tracker = TensorBoard(tmp_path)
    tracker.start({}, "", "", "")
    tracker.log({"train/loss": 1.0}, 1)
    tracker.finish()
    assert any("TensorBoard stopped" in record.message for record in caplog.records)


def test_a_tracker_is_chosen_by_name_and_its_package_is_missed_before_anything_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen(*options: str) -> str:
        return parse(offline_trainer.Args, ["--dataset", "toy", *options], REGISTRIES).track

    assert chosen("--track", "wandb") == chosen("--track", "--track-project", "p") == chosen("--track") == "wandb"
    assert chosen() == chosen("--no-track") == "none"
    with pytest.raises(UserError, match="tensorboard"):
        chosen("--track", "tensorbord")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"^--track tensorboard: .*pip install tensorboard$"):
        chosen("--track", "tensorboard")


def test_a_run_from_when_track_was_a_switch_resumes(script: Callable[..., Path]) -> None:
    run = script("--trainer", "bc", "--steps", 5)
    record = json.loads((run / "args.json").read_text())
    for switch, name in ((True, "wandb"), (False, "none")):
        argv = [*record["argv"], "--track" if switch else "--no-track"]
        (run / "args.json").write_text(json.dumps(record | {"argv": argv, "args": record["args"] | {"track": switch}}))
        assert parse(offline_trainer.Args, ["--resume", str(run)], REGISTRIES).track == name


def test_the_links_of_wandb_are_not_the_runs(tmp_path: Path) -> None:
    logs = tmp_path / "run" / "wandb" / "offline-run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to("/var/log/elsewhere.log")
    check_folder(tmp_path / "run")
    (tmp_path / "run" / "policy" / "wandb").mkdir(parents=True)
    (tmp_path / "run" / "policy" / "wandb" / "model").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="policy/wandb/model is a link out of"):
        check_folder(tmp_path / "run")


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
