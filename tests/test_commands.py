"""`components.evaluate` and `components.report` on runs of the toy."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import toy
from components import UserError, evaluate, report
from components.report import with_interval
from components.run.curves import read_lines

Script = Callable[..., Path]


@pytest.fixture
def run(script: Script) -> Path:
    return script("--trainer", "bc", "--steps", 200, "--eval-episodes", 4)


def test_evaluate_appends_and_takes_other_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(run), "--eval-episodes", "12", "--eval-seed", "7"]) == 0
    assert evaluate.main([str(run), "--eval-episodes", "3", "--env.max-episode-steps", "5"]) == 0
    first, second, third = read_lines(run / "eval.jsonl")
    assert first["episodes"] == 4 and second["seeds"] == list(range(7, 19)) and second["step"] == 200
    assert third["length_mean"] == 5 and third["env"]["max_episode_steps"] == 5
    assert "step 200: success" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval-episodes", "0"], "--eval-episodes 0 must be 1 or more"),
        (["--env.idd", "x"], "unknown option --env.idd; nearest: --env.id"),
        (["--env", "gymnasium", "--env.id", "Pendulum-v1"], "takes actions of width 1"),
    ],
)
def test_evaluate_refuses(run: Path, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.main([str(run), *options])


def test_evaluate_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which run"):
        evaluate.main([])
    with pytest.raises(UserError, match="which run"):
        evaluate.main(["--env.max-episode-steps", "3", str(tmp_path)])
    for options in ([], ["--eval-episodes", "3"]):  # before it, too
        with pytest.raises(UserError, match=f"{tmp_path}.*no run here"):
            evaluate.main([*options, str(tmp_path)])
    with pytest.raises(SystemExit) as stop:  # whatever else is there
        evaluate.main(["--help", "--debug"])
    assert stop.value.code == 0


def test_a_run_without_an_environment_is_evaluated_later(script: Script, tmp_path: Path) -> None:
    run = script("--trainer", "bc", "--steps", 20, "--env", "none")
    env = ["--env", "gymnasium", "--env.id", "TendonToy-v0"]
    evaluate.main([str(run), *env, "--eval-episodes", "3", "--env.max-episode-steps", "5"])
    evaluate.main([str(run), *env, "--eval-episodes", "4"])
    report.main([str(run), "--out", str(tmp_path / "curves.png"), "--save", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["episodes"] == 4


def test_report_groups_seeds_and_writes_results(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        script("--trainer", "bc", "--steps", 60, "--eval-episodes", 10, "--seed", seed, folder=f"seed{seed}")
        for seed in range(3)
    ]
    runs.append(script("--trainer", "bc", "--steps", 30, "--eval-episodes", 10, folder="short"))
    capsys.readouterr()
    save = tmp_path / "results.json"
    arguments = [*map(str, runs), str(tmp_path / "none"), "--out", str(tmp_path / "all.png"), "--save", str(save)]
    assert report.main(arguments) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith("| s")]
    assert len(lines) == 2 and "seed{0..2} " in lines[0] and " steps 30 " in lines[1]
    assert "no run here, left out" in shown.err and (tmp_path / "all.png").stat().st_size > 10_000
    rows = json.loads(save.read_text())
    assert [row["seed"] for row in rows] == [0, 1, 2, 0] and rows[0]["metric"] == "success_rate"
    wanted = {"suite", "task", "trainer", "seed", "steps", "metric", "value", "episodes", "train_seconds", "command"}
    assert wanted | {"commit"} == set(rows[0])
    assert report.main(["--results", str(save)]) == 0
    assert "| toy " in capsys.readouterr().out
    for row in rows[:3]:
        row["coverage_final"] = 0.5 + 0.1 * row["seed"]
    save.write_text(json.dumps(rows))
    assert report.main(["--results", str(save)]) == 0
    head, _, first, second = capsys.readouterr().out.strip().splitlines()
    assert head.rstrip(" |").endswith("final coverage") and second.rstrip(" |").endswith("-")
    assert first.rstrip(" |").endswith(with_interval([0.5, 0.6, 0.7], "coverage_final"))


def test_report_names_what_a_run_was_in(script: Script, online: Script, tmp_path: Path) -> None:
    """The dataset of the offline script; the environment of the online one, though it has a dataset beside.

    Their curves of Q are drawn over each other, of which one alone has a band.
    """
    runs = [script(*toy.TRAINERS["iql"], "--steps", 5, "--log-every", 1, "--eval-episodes", 2, folder="offline")]
    runs.append(online(*toy.ONLINE_ALONE["rlpd"], "--env", "savable", "--eval-episodes", 2, folder="online"))
    files = ["--out", str(tmp_path / "curves.png"), "--save", str(tmp_path / "rows.json")]
    assert report.main([*map(str, runs), *files]) == 0
    assert [row["suite"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["toy", "savable"]


def test_report_needs_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--each has a row for each run, --against compares"):
        report.main(["x", "--each", "--against", "y"])
    with pytest.raises(UserError, match="which runs"):
        report.main([])
    with pytest.raises(UserError, match="no run here"):
        report.main([str(tmp_path)])
    (tmp_path / "bad.json").write_text("[{}]")
    with pytest.raises(UserError, match="bad.json: damaged or incomplete: no 0.suite; expected a text"):
        report.main(["--results", str(tmp_path / "bad.json")])
