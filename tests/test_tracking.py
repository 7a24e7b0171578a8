"""wandb mirrors the metrics, and never stops a run."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.curves import read_lines
from components.tracking import Tracker


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
    monkeypatch.setattr("components.tracking.PATIENCE", 0.2)
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
