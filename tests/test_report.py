"""The report and the curves, on folders of runs that are written here: configurations, intervals, what is drawn."""

import copy
import csv
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components import UserError, report
from components.report import interval_of, runs_table, with_interval
from components.run import curves
from components.run.curves import Series, draw_curves, mean_of_seeds
from components.run.groups import braces, grouped

ENV = {"name": "metaworld", "task": "push-v3"}
OPTIONS: dict[str, Any] = {
    "trainer": "iql",
    "dataset": "metaworld",
    "plugins": [],
    "debug": False,
    "init_from": "",
    "steps": 400,
    "model": ["policy=actor", "critic=q_ensemble"],
    "hang_timeout": 1800.0,
    "track": False,
    "trainer_options": {"expectile": 0.7, "discount": 0.99},
    "dataset_options": {"task": "push-v3", "seed": 0, "cache": "~/.cache/tendon"},
    "optimizer_options": {"lr": 0.001},
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the folder of a run: options beside `OPTIONS`, success rates and returns of its evaluations."""

    def run(
        name: str,
        seed: int = 0,
        script: str = "offline_trainer.py",
        success: Sequence[float] = (),
        returns: Sequence[float] = (),
        every: int = 100,
        env: Any = ENV,
        world: int = 1,
        status: dict[str, Any] | None = None,
        evaluation: dict[str, Any] | None = None,
        **changed: Any,
    ) -> Path:
        args = copy.deepcopy(OPTIONS) | {"seed": seed, "run_dir": name}
        for key, value in changed.items():
            group, _, option = key.rpartition("__")
            (args[group] if group else args)[option] = value
        record = {"script": script, "args": args, "argv": [], "env": env, "seed": seed, "world_size": world}
        record |= {"mixed_precision": "no", "packages": {}, "machine": {}, "git_commit": None}
        path = tmp_path / name
        path.mkdir(parents=True)
        (path / "args.json").write_text(json.dumps(record))
        (path / "status.json").write_text(json.dumps({"state": "finished", "step": 400, "reason": ""} | (status or {})))
        lines = []
        for i in range(max(len(success), len(returns), bool(evaluation))):
            line: dict[str, Any] = {"step": every * (i + 1), "env": env or {"name": "recordings"}, "episodes": 50}
            rate = success[i] if success else None
            line |= {"success_rate": rate, "success_ci": None if rate is None else [0.0, 1.0]}
            line |= {"return_mean": returns[i] if returns else None, "return_std": 7.0 if returns else None}
            lines.append(line | (evaluation or {}))
        (path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        logged = [
            {"step": s, "train/loss": 1 / s + 0.01 * seed, "train/lr.policy": 1e-3} for s in range(every, 401, every)
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
        return path

    return run


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, instead of files."""
    from matplotlib import pyplot as plt

    figures: list[Any] = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, path, dpi: (figures.append(figure), plt.close(figure)))
    return figures


def panels(figure: Any) -> dict[str, Any]:
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def words(figure: Any) -> str:
    return " ".join(text.get_text() for text in figure.texts)


def legend(figure: Any) -> list[str]:
    return [text.get_text().strip() for one in figure.legends for text in one.get_texts()]


# ---- seeds and configurations --------------------------------------------------------------------------------------


def test_runs_that_differ_in_the_seed_alone_are_one_group(write: Write) -> None:
    """Whatever their folder, their bookkeeping, and the run of their seed that they begin from."""
    plain = [write(f"a-{seed}", seed) for seed in (0, 1)]
    plain.append(write("elsewhere", 2, hang_timeout=5.0, track="wandb", resume="runs/a", keep_last=9, eval_every=7))
    plain[2].joinpath("args.json").write_text(
        json.dumps(json.loads(plain[2].joinpath("args.json").read_text()) | {"argv": ["--seed", "2"]})
    )
    same_base = [write(f"b-{seed}", seed, init_from="/runs/base-0") for seed in (0, 1)]
    own_base = [write(f"c-{seed}", seed, init_from=f"/old/base-{seed}", dataset_options__seed=seed) for seed in (1, 2)]
    two = write("two", 0, world=2)
    groups = grouped([*plain, *same_base, *own_base, two])
    assert [group.seeds for group in groups] == [[0, 1, 2], [0, 1], [1, 2], [0]]
    assert [group.name for group in groups[1:]] == ["b-{0,1}", "c-{1,2}", "two"]
    assert groups[2].notes == ["each seed has its own init_from and dataset.seed"]
    assert "2 processes" in groups[3].label


def test_a_seed_counts_once(write: Write) -> None:
    """The finished run, and it is said which; a plugin's order makes no other configuration."""
    stopped = write("stopped", 1, status={"state": "preempted", "step": 300}, plugins=["a", "b"], success=[0.1])
    runs = [
        write("x-0", 0, plugins=["b", "a"], success=[0.5]),
        stopped,
        write("x-1", 1, plugins=["b", "a"], success=[0.5]),
    ]
    (group,) = grouped(runs)
    assert group.seeds == [0, 1] and [run.name for run in group.runs] == ["x-0", "x-1"]
    assert "x-{0,1}: seed 1 again: x-1 counts, stopped is left out" in runs_table(runs)
    assert [group.name for group in grouped(runs, each=True)] == ["x-0", "stopped", "x-1"]


def test_labels_say_what_differs(write: Write) -> None:
    runs = [write("1"), write("2", trainer_options__expectile=0.9), write("3", optimizer_options__lr=3e-5)]
    labels = ["iql expectile 0.7 lr 0.001", "iql expectile 0.9 lr 0.001", "iql expectile 0.7 lr 3e-5"]
    assert [group.label for group in grouped(runs)] == labels
    # Another trainer has other options; they are not what was chosen.
    fql = {"trainer": "fql", "trainer_options": {"alpha": 1.0}, "steps": 9, "model": ["policy=vector_field"]}
    assert [group.label for group in grouped([runs[0], write("4", **fql)])] == ["iql", "fql"]
    online = write("5", script="online_trainer.py", model=["policy=actor", "critic=gru"], debug=True)
    assert [group.label for group in grouped([runs[0], online])] == ["iql offline", "iql online"]
    gru = write("6", model=["policy=gru", "critic=q_ensemble"])
    assert [group.label for group in grouped([runs[0], gru])] == ["iql policy actor", "iql policy gru"]
    other = write("7", env=ENV | {"task": "reach-v3"})
    assert [group.label for group in grouped([runs[0], other])] == ["iql push-v3", "iql reach-v3"]
    (one, two) = grouped([runs[0]], [write("8", 1)])
    assert [one.label, two.label] == ["iql 1", "iql 8"]  # kept apart, though they are the same
    drawn = [write(f"d{i}", i % 2, dataset_options__seed=i // 2) for i in range(4)]  # a default, equal to a seed
    assert [group.label for group in grouped(drawn)] == ["iql dataset seed 0", "iql dataset seed 1"]
    assert [group.label for group in grouped(drawn[:2], each=True)] == ["iql d0", "iql d1"]
    long = [write(f"long-{i}", trainer_options__name=f"{'x' * 90}{i}\x1b[2J") for i in range(2)]
    assert all(len(g.label) <= 70 and g.label.isprintable() for g in grouped(long))
    assert len({group.label for group in grouped(long)}) == 2


def test_names_of_folders_are_short() -> None:
    assert braces(["a-0", "a-1", "a-2"]) == "a-{0..2}"
    assert braces(["v3-1-x", "v3-4-x"]) == "v3-{1,4}-x"
    assert braces(["a", "b", "c"]) == "a (+2)"
    assert braces(["s/seed-9", "s/seed-10", "s/seed-11"]) == "s/seed-{9..11}"


# ---- the table -----------------------------------------------------------------------------------------------------


def test_intervals_over_seeds() -> None:
    half = 4.302653 / math.sqrt(3)  # Student's t with two degrees of freedom, deviation 1
    assert interval_of([1.0, 2.0, 3.0], "return_mean", [10] * 3) == pytest.approx((2 - half, 2 + half))
    assert interval_of([5.0], "return_mean", [10]) is None
    assert interval_of([5.0], "return_mean", [10], 3.0) == pytest.approx((5 - 2.2622, 5 + 2.2622), abs=1e-4)
    assert with_interval([1.0, 1.0, 1.0], "success_rate", [50, 40, 60]) == "1.000 [0.975, 1.000]"  # Wilson, 150 of 150
    assert with_interval([], "return_mean") == "-"


def test_the_table_has_what_a_person_asks(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task that was evaluated, the seeds, the best checkpoint, runs of --debug; as Markdown, CSV and JSON."""
    best = {"step": 200, "metric": "success_rate", "value": 1.0}
    monkeypatch.setattr(report, "best_of", lambda run: best if run.name[:4] == "seed" else None)
    monkeypatch.setattr(report, "draw_curves", lambda *arguments: None)
    for seed, last in ((2, 0.9), (10, 0.7), (1, 0.8)):
        write(f"runs/A/seed-{seed}", seed, success=[0.2, 1.0, last], status={"state": "running", "step": 350})
    write("runs/b|", debug=True, returns=[-1290.4], success=[])
    write(
        "runs/c",
        env=None,
        dataset_options__task="",
        dataset_options__path="/d/arm.zarr",
        evaluation={"action_error": 0.25},
    )
    write("runs/d", env=None, trainer="\x1b[31mbc")
    (tmp_path / "runs" / "notes.txt").write_text("")
    out = ["--out", str(tmp_path / "r.png")]
    assert report.main([str(tmp_path / "runs"), *out]) == 0
    shown = capsys.readouterr().out
    lines = [line.removeprefix("| ").removesuffix(" |") for line in shown.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split(" | ")] for line in lines]
    first, debugged, recorded, bare = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert first["run"] == "A/seed-{1,2,10}" and first["task"] == "push-v3" and first["seeds"] == "3 (1 2 10)"
    assert first["mean [95 %]"] == "0.80 [0.55, 1.00]" and first["best"] == "1 @ 200"
    assert first["steps"] == "350" and first["state"] == "running"
    assert debugged["run"] == r"b\|" and debugged["state"] == "finished, --debug"
    assert debugged["mean [95 %]"] == "-1290.4 [-1292.4, -1288.4]" and "over its episodes" in shown
    assert [recorded[key] for key in ("metric", "mean [95 %]", "task")] == ["action_error", "0.25", "arm.zarr"]
    assert bare["trainer"] == r"\x1b[31mbc" and bare["metric"] == bare["best"] == "-"
    assert report.main([str(tmp_path / "runs"), *out, "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["configurations"]
    assert (
        found[0]["mean"] == pytest.approx(0.8) and found[0]["values"] == [0.8, 0.9, 0.7] and found[1]["debug"] is True
    )
    assert report.main([str(tmp_path / "runs"), *out, "--format", "csv"]) == 0
    (line, *_) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert float(line["low"]) == found[0]["low"] and line["seeds"] == "1;2;10" and line["best"][:3] == "200"


def test_two_configurations_are_compared(write: Write) -> None:
    """By Newcombe's interval for one seed of each, by Welch's over seeds; each of several against one that is named."""

    def last(runs: Sequence[Path], against: Sequence[Path] = ()) -> dict[str, Any]:
        (found,) = json.loads(runs_table(runs, against, "json"))["differences"]
        return found

    def pair(name: str, one: list[float], other: list[float], key: str) -> list[Path]:
        runs = [write(f"{name}/a-{i}", i, **{key: [value]}) for i, value in enumerate(one)]
        return runs + [write(f"{name}/b-{i}", i, steps=9, **{key: [value]}) for i, value in enumerate(other)]

    rates = pair("rates", [0.8], [0.6], "success")
    found = last(rates)
    assert found["difference"] == pytest.approx(0.2)
    assert (found["low"], found["high"]) == pytest.approx((0.02013, 0.36359), abs=1e-4)  # 40 and 30 of 50
    assert found["by"] == "95 % by Newcombe's interval over 50 and 50 episodes"
    assert "minus iql steps 9: success_rate +0.20 [0.02, 0.36] (95 % by Newcombe's" in runs_table(rates)
    found = last(pair("returns", [1, 2, 3], [4, 6, 11], "returns"))
    assert found["by"] == "95 % by Welch's t over 3 and 3 seeds"
    assert (found["low"], found["high"]) == pytest.approx((-13.2077, 3.2077), abs=1e-3)
    found = last(pair("alone", [1], [4], "returns"))
    half = intervals_t(98) * math.sqrt(2 * 49 / 49)  # deviation 7 of 50 episodes each, with n - 1
    assert (found["low"], found["high"]) == pytest.approx((-3 - half, -3 + half), abs=1e-3)
    assert "of one seed each" in found["by"]
    some = pair("some", [1, 2], [4], "returns")
    assert last(some)["by"] == "no interval: 2 and 1 seeds"
    assert "cannot be compared, success_rate against return_mean" in runs_table([rates[0], some[2]])
    assert last([rates[0]], [write("again", 0, success=[0.7])])["difference"] == pytest.approx(0.1)
    with pytest.raises(UserError, match="--against has 2 configurations"):
        runs_table(some, rates)
    three = runs_table([*rates, write("third", steps=3)], kind="json")
    assert json.loads(three)["differences"] == []


def intervals_t(degrees: float) -> float:
    """The 97.5 % quantile of Student's t, from scipy 1.16."""
    return {98: 1.984467}[int(degrees)]


def test_runs_are_found_and_damaged_ones_are_told(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write("good"), write("bad")
    (bad / "args.json").write_text("{")
    os.mkfifo(tmp_path / "pipe")
    assert report.main([str(tmp_path), str(good), str(tmp_path / "none"), "--out", str(tmp_path / "r.png")]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("| good") == 1 and "bad/args.json: damaged" in shown.err and "none: no run here" in shown.err
    for words_, message in (
        ([str(bad)], "damaged"),
        ([str(good), "--out", str(tmp_path / "no" / "r.png")], "--out .*r.png cannot be written"),
        ([str(good), "--out", str(tmp_path / "r.png"), "--save", str(tmp_path)], "--save .* cannot be written"),
        ([str(good), "--against", str(good)], "all runs are among those of --against"),
        ([str(good), "--metrics", "los", "--out", str(tmp_path / "r.png")], "no run has it; nearest: loss"),
        ([str(good), "--format", "xml"], "format"),
    ):
        with pytest.raises(UserError, match=message):
            report.main(words_)


# ---- the picture ---------------------------------------------------------------------------------------------------


def test_seeds_are_one_line_with_a_band(write: Write, pictures: list[Any], tmp_path: Path) -> None:
    """What never changes is named, not drawn; each configuration has one colour everywhere, and one entry."""
    values = {0: [0.2, 0.4, 0.6], 1: [0.3, 0.5, 0.7], 2: [0.4, 0.6, 0.8]}
    runs = [write(f"a-{seed}", seed, success=values[seed]) for seed in values]
    runs += [write(f"b-{seed}", seed, returns=[1, 2, 3], trainer_options__expectile=0.9) for seed in (0, 1)]
    draw_curves(runs, tmp_path / "x.png")
    (figure,) = pictures
    shown = panels(figure)
    assert list(shown) == ["eval/success rate", "eval/return mean", "train/loss"]
    assert "constant, not drawn: train/lr.policy" in words(figure) and "task push-v3" in words(figure)
    assert "Student's t" in words(figure) and "two seeds: their range" in words(figure)
    assert legend(figure) == ["iql expectile 0.7, 3 seeds", "iql expectile 0.9, 2 seeds"]
    (line,) = shown["eval/success rate"].lines
    assert np.allclose(line.get_xydata(), [[100, 0.3], [200, 0.5], [300, 0.7]])
    (band,) = shown["eval/success rate"].collections
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert np.isclose(band.get_paths()[0].vertices[:, 1].max(), 0.7 + half)
    assert len(shown["train/loss"].lines) == 2
    colors = {(line.get_label(), line.get_color()) for axis in shown.values() for line in axis.lines}
    assert len(colors) == 2
    assert shown["train/loss"].get_xlabel() == "updates"
    draw_curves(runs, tmp_path / "x.png", ["lr.policy"])
    assert list(panels(pictures[1])) == ["train/lr.policy"]
    draw_curves(runs[:3], tmp_path / "x.png", each=True)
    assert legend(pictures[2]) == [f"iql a-{seed}, seed {seed}" for seed in range(3)]


def test_many_configurations_of_both_scripts(write: Write, pictures: list[Any], tmp_path: Path) -> None:
    """Each has its own colour up to twenty, all are in the legend; steps are told, with k and M."""
    runs = [write(f"r{i}", optimizer_options__lr=i / 8, success=[i / 20], every=20_000) for i in range(1, 13)]
    runs.append(write("on", script="online_trainer.py", returns=[1.0, 2.0], every=1_000_000))
    draw_curves(runs, tmp_path / "x.png")
    shown = panels(pictures[0])
    assert len(legend(pictures[0])) == 13 and "no bands" in words(pictures[0])
    lines = {line.get_label(): line.get_color() for axis in shown.values() for line in axis.lines}
    assert len(lines) == len(set(lines.values())) == 13
    assert shown["eval/success rate"].get_xlabel() == "updates"
    returns = shown["eval/return mean"]
    assert returns.get_xlabel() == "environment steps"
    assert returns.xaxis.get_major_formatter()(1_500_000) == "1.5M"
    draw_curves([runs[0], write("s", script="online_trainer.py", success=[0.5])], tmp_path / "x.png")
    assert panels(pictures[1])["eval/success rate"].get_xlabel() == "updates (offline), environment steps (online)"


def test_one_run_has_the_bands_of_its_own_lines(write: Write, pictures: list[Any], tmp_path: Path) -> None:
    run = write("r", success=[0.5, 0.6], returns=[1.0, 2.0])
    lines = [{"step": s, "train/q": 1.0 * s, "train/q_min": -s, "train/q_max": 9 * s} for s in (2, 1, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves([run], tmp_path / "x.png")
    shown = panels(pictures[0])
    assert list(shown) == ["eval/success rate", "eval/return mean", "train/q"] and not legend(pictures[0])
    assert "r, iql, seed 0, task push-v3" in words(pictures[0]) and "over its episodes" in words(pictures[0])
    assert np.allclose(shown["train/q"].lines[0].get_xdata(), [1, 2, 3])
    assert shown["train/q"].collections[0].get_paths()[0].vertices[:, 1].max() == 27
    top = shown["eval/return mean"].collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(2 + 2.0096 * 7 / 7, abs=1e-3)  # deviation 7 of 50 episodes, with n - 1


def test_the_mean_of_seeds_that_log_at_other_steps() -> None:
    """It is that of their lines; where one has not come so far, the others' mean, which is told apart."""

    def series(steps: list[float], values: list[float]) -> Series:
        none = np.full(len(steps), math.nan)
        return Series(np.array(steps), np.array(values), none, none, False)

    line, whole = mean_of_seeds([series([0, 100, 200], [0, 1, 2]), series([10, 60, 110], [1, 2, 3])])
    assert line.steps.tolist() == [10, 60, 100, 110, 200] and whole.tolist() == [True] * 4 + [False]
    assert line.values == pytest.approx([0.55, 1.3, 1.9, 2.05, 2.0])
    assert (line.low[0], line.high[0]) == (0.1, 1.0) and math.isnan(line.low[-1])
    long = [series(list(range(0, 9000, step)), list(range(0, 9000, step))) for step in (1, 7, 11)]
    line, _ = mean_of_seeds(long)
    assert len(line.steps) <= curves.POINTS and line.values == pytest.approx(line.steps)


def test_a_strangers_run_is_drawn_and_reported(write: Write, curves: None, tmp_path: Path) -> None:
    """Huge numbers, NaN, damaged lines, formulas and control characters; the picture itself is made."""
    runs = [
        write("_$\\frac{\x1b[2J", trainer_options__expectile="$\x1b\n" + "x" * 999),
        write("漢", 2**53, returns=[1.0]),
    ]
    lines = [{"step": 2**53 - i, "train/loss": (-1) ** i * 1e308, f"train/$\\frac{{{'y' * 200}": i} for i in range(3)]
    bad = '{"step": 1, "train/loss": NaN}\n{"step": 1e999}\n[]\n{"step": 2, "train/loss": "x"}\n{"st'
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + bad)
    ends = [{"step": s, "env": ENV, "episodes": 2**53, "success_rate": None, "success_ci": None} for s in (1, 2**53)]
    huge = [json.dumps(line | {"return_mean": 1e308 * (-1) ** i, "return_std": -1e308}) for i, line in enumerate(ends)]
    for i in range(2):
        runs.append(write(f"huge-{i}", i))
        (runs[-1] / "eval.jsonl").write_text("\n".join(huge) + "\n")
    draw_curves(runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
    assert all(line.isprintable() for line in runs_table(runs).splitlines())
    json.loads(runs_table(runs, kind="json"), parse_constant=lambda name: pytest.fail(name))
