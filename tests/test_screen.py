"""What a person sees while something runs: the bar on a terminal, the lines without one, the time that is left."""

import logging
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import toy
from components import DATASET_BUILDER_REGISTRY
from components.datasets import frames, metaworld
from components.datasets.commands import built_by
from components.intervals import number
from components.run import clock as clock_module
from components.run import progress as progress_module
from components.run.clock import Clock
from components.run.curves import read_lines
from components.run.progress import EVALUATING, Progress, counted, phase, showing
from components.run.record import OnScreen
from conftest import ROOT, environ
from screen import Screen, on_terminal, record

Script = Callable[..., Path]
BAR = re.compile(r"(?P<what>[a-z ]+?) +(?P<bar>━*─*) (step )?(?P<done>\d+)/(?P<total>\d+)(?P<rest>.*)")
WAITS = re.compile(r"[a-z ]+ \.\.\.")


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar is drawn whenever something has changed, so that fast work is seen, too."""
    monkeypatch.setattr(progress_module, "OFTEN", 0.0)


def bars(screens: list[Screen], columns: int) -> list[re.Match[str]]:
    """The bar of each screen that has one, which is its last line, whole, and alone."""
    found = []
    for screen in screens:
        drawn = [i for i, line in enumerate(screen.lines) if "━" in line or "─" in line or WAITS.fullmatch(line)]
        assert drawn in ([], [len(screen.lines) - 1]), screen.lines
        if drawn and not WAITS.fullmatch(screen.lines[-1]):
            match = BAR.fullmatch(screen.lines[-1])
            assert match and len(match["bar"]) >= 10 and len(match[0]) <= columns - 3, screen.lines[-1]
            found.append(match)
    return found


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_a_run_has_one_bar_that_says_what_it_does_and_leaves(
    script: Script, often: None, columns: int, capsys: Any
) -> None:
    options = ("--trainer", "bc", "--steps", 40, "--log-every", 10, "--save-every", 20)
    with capsys.disabled(), on_terminal(columns) as terminal:
        run = script(*options, "--eval-every", 20, "--eval-episodes", 3, "--eval-envs", 1)
    found = bars(terminal.screens, columns)
    counts = {what: [int(bar["done"]) for bar in found if bar["what"] == what] for what in {b["what"] for b in found}}
    assert set(counts) == {"training", "evaluating", "saving", "filming", "drawing curves"}
    assert counts["training"] == sorted(counts["training"]) and counts["training"][-1] == 40
    assert {0, 1, 2, 3} <= set(counts["evaluating"])
    assert any(re.search(r" \d:\d\d \+ 2 evaluations left", bar["rest"]) for bar in found)
    assert any(re.search(r" \d:\d\d left  loss [\d.]+  \d+ samples/s", bar["rest"]) for bar in found)
    *said, end = terminal.screens[-1].lines
    text = "\n".join(said)
    assert end == f"finished: {run}"[-len(end) :] and len(re.findall(r"^step \d+: success", text, re.M)) == 2
    assert len(re.findall(r"step 40/40  loss [\d.]+ ", text.replace("\n", ""))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["offline_trainer.py", "online_trainer.py"])
def test_a_command_leaves_a_whole_screen(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own, whose streams are wrapped and whose messages are logged."""
    online = ["--env", "gymnasium", "--env.id", "Pendulum-v1", "--steps", "1100", "--eval-every", "500"]
    online += ["--model.hidden-dims", "8", "--model.critic.hidden-dims", "8", "--batch-size", "16"]
    offline = ["--dataset", "gymnasium", "--dataset.id", "Pendulum-v1", "--dataset.episodes", "20"]
    offline += ["--steps", "200", "--eval-every", "80"]
    more = online if name.startswith("online") else offline
    command = [sys.executable, str(ROOT / name), "--run-dir", "run", "--eval-episodes", "2", *more]
    terminal = record(command, 80, cwd=tmp_path, env=environ(TERM="xterm"))
    found, said = bars(terminal.screens, 80), terminal.screens[-1].lines
    assert terminal.code == 0 and said[-1] == "finished: run" and sum(" over 2 episodes" in line for line in said) == 3
    assert {"collecting" if name.startswith("online") else "playing episodes"} < {bar["what"] for bar in found}
    if name.startswith("online"):
        assert "step 1004: learning starts" in said and any("left  return -" in bar["rest"] for bar in found)
    else:
        assert said[0] == "playing 20 episodes of Pendulum-v1"


def test_without_a_terminal_there_is_one_line_per_log_line(script: Script, capsys: Any) -> None:
    run = script("--trainer", "bc", "--steps", 40, "--log-every", 10, "--eval-every", 20, "--eval-episodes", 2)
    said = capsys.readouterr().out
    assert said.isascii() and "\r" not in said and "\x1b" not in said
    lines = [line for line in said.splitlines() if re.match(r"step \d+/40  (val/)?loss [\d.]+  .*\d+ samples/s", line)]
    assert len(lines) == len(read_lines(run / "metrics.jsonl")) == 4
    assert re.search(r"samples/s  \d:\d\d \+ 2 evaluations left$", lines[0])
    assert re.search(r"samples/s  \d:\d\d left$", lines[1]) and "evaluating" not in said


def test_a_resumed_run_goes_on_where_its_bar_was(script: Script, often: None, capsys: Any) -> None:
    run = script("--trainer", "bc", "--steps", 20, "--log-every", 10)
    with capsys.disabled(), on_terminal(100) as terminal:
        script("--resume", run, "--steps", 30)
    assert [int(bar["done"]) for bar in bars(terminal.screens, 100) if bar["what"] == "training"][0] == 20


def test_nothing_is_printed_into_the_bar(often: None, capsys: Any) -> None:
    """Whoever prints: whole lines are above the bar, and while one has no end, there is none."""
    with capsys.disabled(), on_terminal(80) as terminal:
        record = logging.LogRecord("components", logging.INFO, "", 0, "a message", None, None)
        progress = Progress(shown=True)
        progress.open()
        progress.begin(100, 0)
        for step in range(1, 101):
            progress.at(step)
            match step:
                case 10:
                    print("printed")
                case 20:
                    OnScreen().emit(record)
                case 30:
                    print("a warning", file=sys.stderr)
                case 40:
                    print("first, ", end="")
                case 50:
                    print("and last")
                case 60:
                    progress.say("said")
                case 70:
                    Progress(shown=False).aside("process 1: told")
        progress.close()
        progress.say("over")
        assert not isinstance(sys.stdout, progress_module.Above)
    said = ["printed", "a message", "a warning", "first, and last", "said", "process 1: told"]
    assert [line.rstrip() for line in terminal.screens[-1].lines] == [*said, "over"]
    assert [int(bar["done"]) for bar in bars(terminal.screens, 80)][-1] == 100


def test_a_terminal_that_is_narrow_for_a_while_has_lines_then(often: None, capsys: Any) -> None:
    shown = {f"train/loss_{i}": 10.0**i for i in range(-3, 9)} | {"samples_per_s": 12345.6, "train/lr.policy": 1e-3}
    with capsys.disabled(), on_terminal(200) as terminal:
        progress = Progress(shown=True)
        progress.open()
        progress.begin(3000, 0)
        for step, columns in enumerate((200, 100, 80, 40, 39, 60), 1):
            time.sleep(0.05)  # what was written before is read
            terminal.resize(columns)
            progress.update(step, shown)
        time.sleep(0.05)
        progress.close()
    last = {bar["done"]: bar["rest"] for bar in bars(terminal.screens, 200)}
    assert last["1"].endswith("loss_4 10000  loss_5 100000  12346 samples/s")
    assert last["2"] == "  loss_-3 0.001  loss_-2 0.01  loss_-1 0.1  12346 samples/s"
    assert last["3"] == "  loss_-3 0.001  loss_-2 0.01  12346 samples/s"
    assert last["4"] == "" and "5" not in last and last["6"] == "  loss_-3 0.001"
    assert "".join(terminal.screens[-1].lines).startswith("step 5/3000  loss_-3 0.001")


def test_a_terminal_without_a_cursor_has_no_bar(capsys: Any) -> None:
    with capsys.disabled(), on_terminal(80, kind="dumb") as terminal, showing() as progress:
        progress.begin(100, 0)
        with phase("counting", 3) as done:
            done(3)
        progress.update(50, {"train/loss": 0.5, "samples_per_s": 1.26})
    assert terminal.screens[-1].lines == ["step 50/100  loss 0.5  1.3 samples/s"]


# ---- before the run ------------------------------------------------------------------------------------------------


def gymnasium_rollouts() -> None:
    built_by(DATASET_BUILDER_REGISTRY["gymnasium"](id="TendonToy-v0", episodes=5))


def demonstrations(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = iter([None, *[{"action": np.zeros((2, 4), np.float32)}] * 5])  # the first one fails
    monkeypatch.setattr(metaworld, "demonstrate", lambda *task: next(attempts))
    metaworld.MetaWorldDemonstrations(demos=5, cache_dir="")._make()


def pictures() -> None:
    everything = {"a": Some(5, (3, 2, 2), [])}
    frames.stored(everything, "memory", "", "it", {})


class Some(frames.Frames):
    """Black pictures."""

    def decode(self, rows: np.ndarray, out: np.ndarray) -> None:
        out[:] = 0


def test_the_making_of_data_is_shown(often: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(frames, "AT_ONCE", 1)
    with capsys.disabled(), on_terminal(80) as terminal:
        with showing():
            demonstrations(monkeypatch)
            pictures()
        gymnasium_rollouts()
    found = bars(terminal.screens, 80)
    for what in ("making demonstrations", "decoding pictures", "playing episodes"):
        assert [int(bar["done"]) for bar in found if bar["what"] == what] == [0, 1, 2, 3, 4, 5], what
    assert terminal.screens[-1].lines == []


def test_what_was_long_is_told_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert list(counted(range(3), "counting")) == [0, 1, 2]  # nobody shows it
    with showing():
        assert list(counted(range(3), "counting")) == [0, 1, 2]
        monkeypatch.setattr(progress_module, "LONG", -1.0)
        assert list(counted(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr().out == "counting took 0:00\n"


# ---- the time that is left ------------------------------------------------------------------------------------------


class Simulated:
    """A run in simulated time, by the calls that a script makes.

    Args:
        steps: Of the run.
        pace: (step, settled) -> seconds of a pass of so many steps, and whether it makes updates.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: int, **options: Any) -> None:
        self.now, self.texts = 0.0, dict[int, tuple[float, str]]()
        watch = SimpleNamespace(monotonic=lambda: self.now, perf_counter=lambda: self.now)
        monkeypatch.setattr(clock_module, "time", watch)
        monkeypatch.setattr(progress_module, "time", watch)
        usual = {"eval_every": 500, "log_every": 50, "save_every": 1000, "save_minutes": 5.0, "eval_episodes": 50}
        self.args = SimpleNamespace(steps=steps, grad_accumulation=1, debug=False, **usual | options)
        stop = SimpleNamespace(asked=False)
        self.run = SimpleNamespace(step=0, progress=Progress(shown=False), stop=stop, beat=lambda: None)
        self.clock = Clock(self.args, self.run, evaluates=True)

    def go(self, per_pass: int, act: float, update: Callable[[int], float], settled: Callable[[int], bool]) -> None:
        """Run to the end: an evaluation takes 20 s, a save 2 s, the film 4 s."""
        clock, run = self.clock, self.run
        while True:
            if clock.due("eval"):
                with clock.owing_evaluation():
                    self.now += 20
            if clock.due("log", settled=settled(run.step)):
                clock.rates(1)
            if clock.due("save"):
                with run.progress.phase("saving"):
                    self.now += 2
            if clock.over:
                break
            self.now += act
            run.step += per_pass
            if seconds := update(run.step):
                with clock.measure("step_s"):
                    self.now += seconds
            self.texts[run.step] = self.now, clock.left(0.0)
        self.end = self.now + 4

    def error(self, step: int) -> float:
        """Seconds by which what was said to be left is wrong."""
        now, text = self.texts[step]
        minutes, seconds = re.fullmatch(r"(\d+):(\d\d) left", text).groups()  # type: ignore[union-attr]
        return abs(now + 60 * int(minutes) + int(seconds) - self.end)


def test_what_the_first_evaluation_prepares_is_not_expected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(shown=False)
    for begins, expected in ((14.0, 3.0), (1.0, 4.0)):
        with progress.phase(EVALUATING) as done:
            now[0] += begins
            done(0)
            now[0] += 3.0
            done(10)
        assert progress.took[EVALUATING] == expected


def test_the_time_left_counts_evaluations_by_what_they_took(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Simulated(monkeypatch, 3100)
    run.go(1, 0.0, lambda step: 0.01, lambda step: True)
    assert run.texts[450][1] == "0:26 + 7 evaluations left"
    assert all(run.error(step) < 10 for step in range(501, 1000, 10))  # four saves are not known yet
    assert all(run.error(step) < 2 for step in range(1001, 3100, 10))


def test_random_actions_do_not_tell_how_long_learning_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Simulated(monkeypatch, 5000)
    run.go(4, 0.001, lambda step: 0.4 * (step > 1000), lambda step: True)
    assert {run.texts[step][1] for step in range(4, 1000, 4)} == {""}
    assert all(run.error(step) < 8 for step in range(1012, 5000, 4))


def test_the_time_left_is_that_of_whole_rollouts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Simulated(monkeypatch, 20_480, eval_every=5000, save_every=0)
    run.go(8, 0.02, lambda step: 10.0 * (step % 2048 == 0), lambda step: step % 2048 == 0)
    assert {run.texts[step][1] for step in range(8, 2048, 8)} == {""}
    assert run.texts[2400][1].endswith(" + 5 evaluations left")
    assert all(run.error(step) < 16 for step in range(5008, 20_480, 8))  # of a rollout of 15 s


@pytest.mark.parametrize(
    ("value", "text"),
    [(1290.4, "1290"), (12034.2, "12034"), (-151.23, "-151.2"), (0.05179, "0.0518"), (1.0, "1"), (2e-5, "2e-5")],
)
def test_numbers_are_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text


# ---- reinforcement learning ----------------------------------------------------------------------------------------


def test_there_is_one_line_per_rollout(online: Script, capsys: Any) -> None:
    options = (*toy.ONLINE_ALONE["ppo"], "--batch-size", 10, "--log-every", 3, "--save-every", 7)
    run = online(*options, "--steps", 70)
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [20, 40, 60, 70]  # the last step, too
    said = capsys.readouterr().out.splitlines()
    lines = [line for line in said if line.startswith("step ") and "/70 " in line]
    assert len(lines) == 4 and said.count("step 20: learning starts") == 1
    assert re.match(r"step 40/70  return -?[\d.]+  length 10  success [\d.]+  policy_loss .*env_steps/s", lines[1])


def test_the_start_of_learning_is_said_once(online: Script, capsys: Any) -> None:
    run = online("--steps", 60, "--log-every", 2, "--save-every", 30)
    said = capsys.readouterr().out
    assert "\nlearning starts after 20 steps of random actions\n" in said
    assert said.count("step 22: learning starts\n") == 1
    lines = re.findall(r"^step (\d+)/60  (.*)", said, re.M)
    assert len(read_lines(run / "metrics.jsonl")) == 30
    assert [int(step) for step, _ in lines] == [20, *range(22, 61, 2)]  # before, no episode had ended
    assert all(text.startswith("return ") for _, text in lines)  # the newest that are known
    online("--resume", run, "--steps", 64)
    said = capsys.readouterr().out
    assert "learning starts" not in said
