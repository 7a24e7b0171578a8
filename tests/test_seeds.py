"""`--seeds 0 1 2`: one run for each, which continue together; in this process, and as real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import offline_trainer
from components import UserError
from components.run import seeds
from conftest import ROOT, environ, in_this_process, learned, two_processes

TOY = ("--plugins", "toy", "--dataset", "toy", "--trainer", "bc", "--batch-size", "16", "--eval-episodes", "0")
Runs = Callable[..., tuple[int, list[list[str]]]]


@pytest.fixture
def together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Run the offline script with its children in this process; returns its exit code and their command lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(seeds, "draw_curves", lambda runs, path: path.write_bytes(b""))
    children: list[list[str]] = []

    def child(self: Any, words: list[str], place: int) -> int:
        children.append(words[2:])
        try:
            in_this_process(offline_trainer.main, words[2:])
        except UserError:
            return 2
        except Exception:
            return 1
        return 0

    def run(*words: object) -> tuple[int, list[list[str]]]:
        children.clear()
        return offline_trainer.main([str(word) for word in words]), [*children]

    monkeypatch.setattr(seeds.Ranks, "run", child)
    return run


def test_each_seed_has_a_run_of_its_own_and_they_continue_together(
    together: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("options.toml").write_text("steps = 4\nseeds = [7, 8]\n[model]\nhidden_dims = [8]")
    group = Path("runs/all")
    code, children = together(*TOY, "--config", "options.toml", "--run-dir", group)
    assert code == 0 and [words[words.index("--seed") + 1] for words in children] == ["7", "8"]
    assert [json.loads((group / f"seed-{s}" / "args.json").read_text())["args"]["seed"] for s in (7, 8)] == [7, 8]
    assert learned(group / "seed-7") != learned(group / "seed-8") and (group / "curves.png").exists()
    shown = capsys.readouterr().out
    assert re.search(r"seed 7 \(1 of 2\): runs/all/seed-7\n", shown) and "seed 8 finished in " in shown
    (row,) = [line for line in shown.splitlines() if re.match(r"\| .*seed-", line)]
    assert re.search(r"\| 2 \(7 8\) +\|", row) and shown.endswith("finished: runs/all\n")

    chosen = json.loads((group / "seed-7" / "args.json").read_text())
    before = json.dumps(chosen)
    chosen["args"]["workers"] = 3  # as what a run chooses by its data, and nobody has asked for
    (group / "seed-7" / "args.json").write_text(json.dumps(chosen))
    code, children = together(*TOY, "--config", "options.toml", "--run-dir", group)  # the same again
    assert code == 0 and not children and "seed 7 is finished already" in capsys.readouterr().out
    (group / "seed-7" / "args.json").write_text(before)
    Path("options.toml").write_text("steps = 4\nseeds = [7, 8]")  # what a run began with is not left out silently
    code, children = together(*TOY, "--config", "options.toml", "--run-dir", group)
    assert code == 2 and children[0][:3] == ["--resume", "runs/all/seed-7", "--model.hidden-dims"]
    Path("options.toml").unlink()
    code, children = together("--resume", group, "--plugins", "toy", "--steps", 6, "--seeds", 7, 9)
    assert code == 0 and [words[0] for words in children] == ["--resume", "--config"]
    assert re.search(r"\| 2 \(7 9\) +\|", capsys.readouterr().out)  # one row, however they were begun
    assert [learned(group / f"seed-{s}")[-1]["step"] for s in (7, 8, 9)] == [6, 4, 6]
    record = json.loads((group / "seed-9" / "args.json").read_text())
    assert record["args"]["model_options"]["policy"]["hidden_dims"] == [8]
    assert json.loads((group / "seeds.json").read_text())["seeds"] == [7, 8, 9]

    code, children = together("--resume", group, "--plugins", "toy", "--steps", 6, "--optimizer.lr", 0.1)  # another run
    assert code == 2 and children == [["--resume", "runs/all/seed-7", "--optimizer.lr", "0.1", "--plugins", "toy"]]
    with pytest.raises(UserError, match="seed-7/args.json needs plugins, .* add --plugins toy"):  # a stranger's
        together("--resume", group)


def test_a_seed_that_fails_does_not_keep_the_others(together: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    trouble = ("--trainer", "trouble", "--trainer.kind", "raise", "--trainer.rank", 0, "--trainer.at", 3)
    code, children = together(*TOY, *trouble, "--trainer.seconds", 0, "--steps", 5, "--run-dir", "x", "--seeds", 0, 1)
    shown = capsys.readouterr().out
    assert code == 1 and len(children) == 2 and "seed 0 failed: ArithmeticError: trouble" in shown
    last = shown.splitlines()[-1]
    assert last.startswith("2 of 2 seeds are left (failed: 0, 1); continue with: ")
    assert last.endswith(" --resume x --plugins toy")
    there = (
        "--env",
        "gymnasium",
        "--env.id",
        "json:Thing-v0",
        "--eval-episodes",
        0,
    )  # a module that a resume must name
    together(*TOY, *trouble, *there, "--trainer.seconds", 0, "--steps", 5, "--run-dir", "y", "--seeds", 0)
    assert capsys.readouterr().out.splitlines()[-1].endswith(" --resume y --plugins toy json")


def test_a_refused_option_ends_all_and_leaves_nothing(together: Runs) -> None:
    assert together(*TOY, "--batch-size", 999, "--seeds", 0, 1, "--run-dir", "x")[0] == 2
    assert not Path("x").exists()


def test_a_stop_begins_no_other_seed(
    together: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: Any, words: list[str], place: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    monkeypatch.setattr(seeds.Ranks, "run", stopped)
    assert together(*TOY, "--seeds", 0, 1, "--run-dir", "x") == (0, [])
    assert "seed 1" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--seeds", 0, 0), "--seeds: 0 is there twice"),
        (("--seeds", 1, -1), "--seeds: -1 must be 0 or more"),
        (("--seeds", 0, 1, "--seed", 1), "--seed and --seeds exclude each other"),
        (("--seeds",), "--seeds: which. such as --seeds 0 1 2"),
        (("--seeds", "x"), "--seeds"),
        (("--resume", "group"), "no seed has begun there"),
        (("--resume", "damaged"), "seeds.json: damaged or incomplete: seeds.0 is -1"),
        (("--seeds", 0, "--run-dir", "online"), "has seeds of online_trainer.py; choose another folder"),
    ],
)
def test_seeds_that_contradict_something(together: Runs, words: tuple[object, ...], message: str) -> None:
    for name, record in (
        ("group", {"script": "offline_trainer.py", "seeds": [1]}),
        ("damaged", {"script": "offline_trainer.py", "seeds": [-1]}),
        ("online", {"script": "online_trainer.py", "seeds": [1]}),
    ):
        Path(name).mkdir()
        (Path(name) / "seeds.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        together(*TOY, *words)


def test_the_names_of_seeds_elsewhere() -> None:
    """In W&B they are one group, and each has a dataset of its own; what is resumed does not get a longer name."""
    names: Any = object.__new__(seeds.Seeds)
    names.folder, names.args = Path("runs/bc"), SimpleNamespace(track="wandb", track_name="", track_group="")
    assert names._names(3) == {"track-name": "bc-seed-3", "track-group": "bc"}
    names.args = SimpleNamespace(track="wandb", track_name="x-seed-3", track_group="y", save_dataset="/data/z/seed-3")
    assert names._names(4) == {"track-name": "x-seed-4", "track-group": "y", "save-dataset": "/data/z/seed-4"}
    names.args = SimpleNamespace(track="none", save_dataset="")
    assert names._names(4) == {}


@pytest.mark.slow
@pytest.mark.launched
def test_ctrl_c_and_two_processes(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal: this seed saves, and no other begins.

    On two processes each seed has a group of its own, and a rank that dies costs that seed alone.
    """
    script = ROOT / "offline_trainer.py"
    words = [sys.executable, str(script), *TOY, "--steps", "100000", "--run-dir", "x", "--seeds", "0", "1"]
    begin = dict(cwd=tmp_path, env=environ(), text=True, stdout=subprocess.PIPE, start_new_session=True)
    process: Any = subprocess.Popen(words, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **begin)
    for _ in range(600):
        if (tmp_path / "x" / "seed-0" / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    shown = process.communicate(timeout=60)[0].splitlines()
    assert process.returncode == 0 and "stopped at step" in shown[-2] and not (tmp_path / "x" / "seed-1").exists()
    name = Path(sys.executable).name  # python, python3 or python3.11: as it was called, where the path leads to it
    python = name if shutil.which(name) == sys.executable else sys.executable
    again = f"continue with: {python} {script} --resume x --plugins toy"
    assert shown[-1] == f"2 of 2 seeds are left (stopped); {again}"
    dies = ("--trainer", "trouble", "--trainer.kind", "die", "--trainer.at", "3", "--run-dir", "y", "--seeds", "0", "1")
    done = two_processes(script, *TOY, *dies, "--steps", "5", cwd=tmp_path)
    assert done.returncode != 0 and "seed 0 failed: " in done.stdout and "seed 1 failed: " in done.stdout
    worlds = [json.loads((tmp_path / "y" / f"seed-{s}" / "args.json").read_text())["world_size"] for s in (0, 1)]
    assert worlds == [2, 2]
