"""A table of runs, and a figure of their curves.

python -m components.report runs/*                                   # runs that differ in the seed alone are one row
python -m components.report --results tests/results/bc.json          # the table of a results file, as Markdown
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .acting.evaluation import wilson_interval
from .errors import UserError, plain
from .records import ResultRow, read_record
from .run import process
from .run import record as run_record
from .run.command_line import parse
from .run.curves import diverging, draw_curves, is_number, read_lines

# Student's t for a two-sided 95 % interval, by degrees of freedom; 1.96 beyond.
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]


@dataclass(kw_only=True)
class Args:
    """Print a table of runs and draw their curves."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders."""
    results: tuple[Path, ...] = ()
    """Files of results, with one row for each run, to print as Markdown tables instead."""
    out: Path = Path("report.png")
    """File of the curves."""
    save: Path | None = None
    """Results file to write, with one row for each run."""


def main(argv: list[str]) -> int:
    """Print the table; returns the exit code."""
    args = parse(Args, argv)
    if args.results:
        for path in args.results:
            print(results_table(path))
        return 0
    if not args.runs:
        raise UserError("which runs? python -m components.report runs/*")
    runs = [run for run in args.runs if (run / "args.json").exists()]
    for run in set(args.runs) - set(runs):
        print(f"{run}: no run here, left out", file=sys.stderr)
    if not runs:
        raise UserError("none of these folders holds a run (args.json)")
    print(runs_table(runs))
    if args.save is not None:
        args.save.write_text(json.dumps([result_row(run) for run in runs if last_score(run)], indent=1) + "\n")
        print(f"results: {args.save}")
    draw_curves(runs, args.out)
    print(f"curves: {args.out}")
    return 0


# Optional columns of a results file, and their titles in the table.
FURTHER = {"plan_ms": "plan ms", "coverage_final": "final coverage", "coverage_max": "largest coverage"}
FURTHER |= {"train_return": "return while it learns", "before": "before"}


def runs_table(runs: list[Path]) -> str:
    """One row for each group of runs that differ in the seed alone: mean and 95 % interval of the last evaluation."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        config = run_record.read_args(run)["args"]
        same = {key: value for key, value in config.items() if key not in ("seed", "run_dir") and "track" not in key}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(run)
    rows = []
    for members in groups.values():
        record = run_record.read_args(members[0])
        scores = [score for run in members if (score := last_score(run)) is not None]
        metric = scores[0][0] if scores else "-"
        episodes = own_evaluations(members[0])[-1]["episodes"] if scores else 0
        status = [run_record.read_status(run) for run in members]
        seconds = [run_seconds(run) for run in members]
        wrong = [text for run in members if (text := diverging(run))]
        rows.append(
            [
                members[0].name if len(members) == 1 else f"{members[0].name} (+{len(members) - 1})",
                record["args"]["trainer"],
                subject(record)[0],
                str(len(members)),
                metric,
                with_interval([value for _, value in scores], metric, episodes),
                "/".join(sorted({str(s["step"]) for s in status})),
                f"{sum(seconds) / len(seconds):.0f}",
                "/".join(sorted({s["state"] for s in status})) + "".join(f"; DIVERGING: {text}" for text in wrong[:1]),
            ]
        )
    return markdown(["run", "trainer", "on", "seeds", "metric", "mean [95 %]", "steps", "train s", "state"], rows)


def subject(record: dict[str, Any]) -> tuple[str, str]:
    """The dataset that a run was trained on, or else the environment, and its path, task or id."""
    config = record["args"]
    name, options = config["dataset"], config["dataset_options"]
    if "num_envs" in config:  # of the online script; a dataset may have named the environment
        options = record["env"] or {"name": "none"}
        name = options["name"]
    named = next(filter(None, (options.get(key) for key in ("task", "id", "path"))), "")
    return name, Path(str(named)).name if named == options.get("path") else str(named)


def last_score(run: Path) -> tuple[str, float] | None:
    """Metric and value of the last evaluation in the run's environment: success rate where known, else mean return."""
    lines = own_evaluations(run)
    if not lines:
        return None
    metric = "success_rate" if lines[-1]["success_rate"] is not None else "return_mean"
    return None if lines[-1][metric] is None else (metric, lines[-1][metric])


def own_evaluations(run: Path) -> list[dict[str, Any]]:
    """The evaluations in the run's environment, or in the last one evaluated for a run without an environment."""
    lines = read_lines(run / "eval.jsonl")
    own = run_record.read_args(run)["env"] or (lines[-1]["env"] if lines else None)
    return [line for line in lines if line["env"] == own]


def result_row(run: Path) -> dict[str, Any]:
    """One run as a row of a results file."""
    record = run_record.read_args(run)
    config = record["args"]
    suite, task = subject(record)
    score = last_score(run)
    assert score is not None
    return {
        "suite": suite,
        "task": task,
        "trainer": config["trainer"],
        "seed": record["seed"],
        "steps": run_record.read_status(run)["step"],
        "metric": score[0],
        "value": score[1],
        "episodes": own_evaluations(run)[-1]["episodes"],
        "train_seconds": round(run_seconds(run), 1),
        "command": " ".join([record["script"], *record["argv"]]),
        "commit": record["git_commit"],
    }


def run_seconds(run: Path) -> float:
    """Seconds spent on loading data and in `train_step`, from the log."""
    seconds, before = 0.0, 0
    for line in read_lines(run / "metrics.jsonl"):
        if is_number(line.get("data_s")) and is_number(line.get("step_s")):
            seconds += (line["data_s"] + line["step_s"]) * (line["step"] - before)
        before = line["step"]
    return seconds


def with_interval(values: list[float], metric: str, episodes: int) -> str:
    """Mean over seeds and its 95 % interval, by Student's t for two or more seeds.

    For a success rate, the interval also covers Wilson's interval over the episodes of all seeds, which is valid for a
    single seed, and where all seeds reach 0 or 1.
    """
    if not values:
        return "-"
    n, mean = len(values), sum(values) / len(values)
    bounds: list[tuple[float, float]] = []
    if n > 1:
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
        half = (T95[n - 2] if n - 2 < len(T95) else 1.96) * deviation / math.sqrt(n)
        bounds.append((mean - half, mean + half))
    if metric == "success_rate" and episodes:
        low, high = wilson_interval(round(mean * n * episodes), n * episodes)
        bounds = [(max(0.0, min([low, *(b[0] for b in bounds)])), min(1.0, max([high, *(b[1] for b in bounds)])))]
    return f"{mean:.3g}" + "".join(f" [{low:.3g}, {high:.3g}]" for low, high in bounds)


def results_table(path: Path) -> str:
    """The rows of a results file, one line for each suite, task and trainer. Raises UserError: a damaged file."""
    rows = read_record(path, list[ResultRow], "python -m components.report RUNS --save FILE writes one")
    try:
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault((row["suite"], row["task"], row["trainer"], str(row["steps"]), row["metric"]), []).append(
                row
            )
        more = [name for name in FURTHER if any(name in row for row in rows)]
        table = [
            [
                *key,
                str(len(members)),
                with_interval([row["value"] for row in members], key[-1], members[0]["episodes"]),
                str(members[0]["episodes"]),
                f"{sum(row['train_seconds'] for row in members) / len(members):.0f}",
                *(with_interval([row[name] for row in members if name in row], name, 0) for name in more),
            ]
            for key, members in groups.items()
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no results file ({type(error).__name__}: {error})") from error
    head = ["suite", "task", "trainer", "steps", "metric", "seeds", "mean [95 %]", "episodes", "train s"]
    return markdown([*head, *(FURTHER[name] for name in more)], table)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; control characters are written as escapes."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    process.run_script(main)
