"""A table of runs, and a figure of their curves.

python -m components.report runs/*                                   # runs that differ in the seed alone are one row
python -m components.report runs/new-* --against runs/old-*          # and the difference, with its interval
python -m components.report --results tests/results/bc.json          # the table of a results file, as Markdown
"""

import contextlib
import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from . import intervals
from .acting.evaluation import score_of
from .errors import UserError, plain
from .intervals import Interval, measured, number
from .records import ResultRow, read_record
from .run import process
from .run.best import best_of
from .run.command_line import parse
from .run.curves import diverging, draw_curves, evaluations_in, is_number, read_lines
from .run.groups import Group, grouped, task_of
from .run.reading import read_args, read_status

DEPTH = 3  # folders inside each other that are searched for runs

# Optional columns of a results file, and their titles in the table.
FURTHER = {"plan_ms": "plan ms", "coverage_final": "final coverage", "coverage_max": "largest coverage"}
FURTHER |= {"jerk_mean": "jerk", "border_mean": "jump at borders"}
FURTHER |= {"plan_ratio": "of 10 calls", "train_return": "return while it learns", "before": "before"}
FURTHER |= {"lowest": "lowest later", "drop": "lowest later - before"}

HEAD = ["run", "trainer", "task", "differs in", "seeds", "metric", "mean [95 %]", "best", "steps", "train s", "state"]


class Score(NamedTuple):
    """An evaluation, by the metric that counts (`score_of`)."""

    metric: str
    value: float
    sign: int
    episodes: int
    deviation: float | None
    """Of the return over the episodes."""


@dataclass(kw_only=True)
class Args:
    """Print a table of runs and draw their curves."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Run folders, or folders of them."""
    against: tuple[Path, ...] = ()
    """Runs of one configuration, to tell the difference from. Two configurations are compared without it, too."""
    each: bool = False
    """A row and a line for each run, also for those that differ in the seed alone."""
    results: tuple[Path, ...] = ()
    """Files of results, with one row for each run, to print as tables instead."""
    format: Literal["markdown", "csv", "json"] = "markdown"
    """How to print the table; the other two have all digits."""
    metrics: tuple[str, ...] = ()
    """Metrics to draw, such as success_rate or train/loss; all that change by default."""
    out: Path = Path("report.png")
    """File of the curves."""
    save: Path | None = None
    """Results file to write, with one row for each run."""


def main(argv: list[str]) -> int:
    """Print the table; returns the exit code."""
    args = parse(Args, argv)
    if args.results:
        print("\n\n".join(results_table(path, args.format) for path in args.results))
        return 0
    if not args.runs:
        raise UserError("which runs? python -m components.report runs/*")
    if args.each and args.against:
        raise UserError("--each has a row for each run, --against compares configurations; leave one of them out")
    against = found(args.against) if args.against else []
    runs = [run for run in found(args.runs) if run.resolve() not in {one.resolve() for one in against}]
    if not runs:
        raise UserError("all runs are among those of --against; name others before it")
    print(runs_table(runs, against, args.format, args.each))
    tell = sys.stdout if args.format == "markdown" else sys.stderr
    if args.save is not None:
        with writing("--save", args.save):
            rows = [result_row(run) for run in (*runs, *against) if last_score(run)]
            args.save.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"results: {args.save}", file=tell)
    with writing("--out", args.out):
        draw_curves(runs, args.out, args.metrics, against, args.each)
    print(f"curves: {args.out}", file=tell)
    return 0


@contextlib.contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Turn a failure to write a file into one line. Raises UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}); choose another place") from error


# ---- runs ----------------------------------------------------------------------------------------------------------


def found(folders: Sequence[Path]) -> list[Path]:
    """The runs among some folders and inside them, each once; what is no run is told and left out.

    Raises:
        UserError: there is none.
    """
    runs: dict[Path, Path] = {}
    problems = []
    for folder in folders:
        inner = [folder] if (folder / "args.json").exists() else inside(folder)
        if not inner and not (runs and folder.is_file()):  # which `runs/*` may name
            problems.append(f"{folder}: no run here")
        for run in inner:
            try:
                read_args(run)
                runs.setdefault(run.resolve(), run)
            except UserError as error:
                problems.append(str(error))
    if not runs:
        raise UserError(
            problems[0] if len(problems) == 1 else f"none of these folders holds a run ({problems[0]}, ...)"
        )
    for problem in problems:
        print(f"{plain(problem)}, left out", file=sys.stderr)
    return list(runs.values())


def inside(folder: Path, depth: int = DEPTH) -> list[Path]:
    """The runs in a folder of runs, such as `seed-0`, `seed-1`, ... in the order of their numbers."""
    try:
        folders = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return []
    folders = sorted((f for f in folders if not f.name.startswith(".")), key=lambda path: in_order(path.name))
    holds = [[path] if (path / "args.json").exists() else inside(path, depth - 1) for path in folders if depth]
    return [run for runs in holds for run in runs]


def in_order(name: str) -> list[tuple[int, str]]:
    """Sort key by which 10 follows 9."""
    return [(int(part), "") if part.isdecimal() and part.isascii() else (-1, part) for part in re.split(r"(\d+)", name)]


def own_evaluations(run: Path) -> list[dict[str, Any]]:
    """The evaluations that a run is compared by, as of `evaluations_in`."""
    return evaluations_in(run, read_args(run)["env"])


def last_score(run: Path) -> Score | None:
    """The newest evaluation of the run's last step that was evaluated."""
    lines = [line for line in own_evaluations(run) if score_of(line)]
    if not lines:
        return None
    line = lines[-1]
    metric, value, sign = score_of(line)  # type: ignore[misc]
    deviation = line.get("return_std", -1.0) if metric == "return_mean" else -1.0
    return Score(metric, value, sign, line["episodes"], deviation if is_number(deviation) and deviation >= 0 else None)


def run_seconds(run: Path) -> float:
    """Seconds spent on loading data and in `train_step`, from the log."""
    seconds, before = 0.0, 0
    for line in read_lines(run / "metrics.jsonl"):
        if is_number(line.get("data_s")) and is_number(line.get("step_s")):
            seconds += (line["data_s"] + line["step_s"]) * (line["step"] - before)
        before = line["step"]
    return seconds


def subject(record: dict[str, Any]) -> tuple[str, str]:
    """The dataset that a run was trained on, or else the environment, and its path, task or id."""
    config = record["args"]
    name, options = config["dataset"], config["dataset_options"]
    if "num_envs" in config:  # of the online script; a dataset may have named the environment
        options = record["env"] or {"name": "none"}
        name = options["name"]
    named = next(filter(None, (options.get(key) for key in ("task", "id", "path"))), "")
    return name, Path(str(named)).name if named == options.get("path") else str(named)


def result_row(run: Path) -> dict[str, Any]:
    """One run as a row of a results file."""
    record = read_args(run)
    config = record["args"]
    suite, task = subject(record)
    score = last_score(run)
    assert score is not None
    return {
        "suite": suite,
        "task": task,
        "trainer": config["trainer"],
        "seed": record["seed"],
        "steps": read_status(run)["step"],
        "metric": score.metric,
        "value": score.value,
        "episodes": score.episodes,
        "train_seconds": round(run_seconds(run), 1),
        "command": " ".join([record["script"], *record["argv"]]),
        "commit": record["git_commit"],
    }


# ---- the table of runs -----------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One configuration: its runs, and the last evaluation of each that has the metric of the first."""

    group: Group
    scores: list[Score]

    @property
    def metric(self) -> str:
        return self.scores[0].metric

    @property
    def mean(self) -> float:
        return sum(score.value for score in self.scores) / len(self.scores)

    @property
    def interval(self) -> Interval | None:
        return interval_of([s.value for s in self.scores], self.metric, *episodes_of(self.scores))


def runs_table(runs: Sequence[Path], against: Sequence[Path] = (), kind: str = "markdown", each: bool = False) -> str:
    """One row for each configuration: mean and 95 % interval of the last evaluation of its seeds.

    Below are the difference of two configurations, or that of each from the one of `against`, and notes.

    Args:
        runs: The runs; those that differ in the seed alone are one row.
        against: Runs of one configuration.
        kind: "markdown", "csv" (the table alone) or "json".
        each: Whether each run has a row, also of the same configuration.

    Raises:
        UserError: `against` has several configurations.
    """
    groups = grouped(runs, against, each)
    others = grouped(against, each=each) or groups[1:] * (len(groups) == 2)
    if len(others) > 1:
        names = ", ".join(group.label for group in others[:2])
        raise UserError(f"--against has {len(others)} configurations ({names}, ...); name one")
    rows = [row_of(group) for group in groups]
    compared = [difference(row, rows[-1]) for row in rows[:-1]] if others else []
    facts = [facts_of(row) for row in rows]
    if kind == "json":
        return json.dumps({"configurations": facts, "differences": compared}, indent=1)
    if kind == "csv":
        return as_csv(facts)
    head, table = HEAD, [cells_of(row, fact) for row, fact in zip(rows, facts, strict=True)]
    if not any(group.differs for group in groups):
        place = HEAD.index("differs in")
        head, *table = ([*cells[:place], *cells[place + 1 :]] for cells in (head, *table))
    below = [one["text"] for one in compared] + [f"{group.name}: {note}" for group in groups for note in group.notes]
    if any(len(row.scores) == 1 and row.interval for row in rows):
        below.append("One seed alone has the interval over its episodes, which says nothing of other seeds.")
    return "\n".join([markdown(head, table), *([""] if below else []), *map(plain, below)])


def row_of(group: Group) -> Row:
    """A row, with a note on runs that were evaluated by another metric, or not at all."""
    scores = [last_score(run) for run in group.runs]
    known = [score for score in scores if score]
    same = [score for score in known if score.metric == known[0].metric]
    if 0 < len(same) < len(group.runs):
        group.notes.append(f"{len(same)} of {len(group.runs)} seeds have been evaluated by {same[0].metric}")
    return Row(group, same)


def facts_of(row: Row) -> dict[str, Any]:
    """All that is known of a configuration, with all digits."""
    group, scores = row.group, row.scores
    record = group.records[0]
    status = [read_status(run) for run in group.runs]
    seconds = [run_seconds(run) for run in group.runs]
    best = [best_of(run) for run in group.runs]
    low, high = (row.interval if scores else None) or (None, None)
    return {
        "name": group.name,
        "runs": [str(run) for run in group.runs],
        "script": record["script"],
        "trainer": record["args"]["trainer"],
        "dataset": record["args"]["dataset"],
        "task": task_of(record),
        "differs": group.differs,
        "debug": record["args"].get("debug") is True,
        "seeds": group.seeds,
        "metric": row.metric if scores else None,
        "mean": finite(row.mean) if scores else None,
        "low": finite(low),
        "high": finite(high),
        "values": [score.value for score in scores],
        "episodes": [score.episodes for score in scores],
        "best": [one if one and is_number(one["value"]) else None for one in best],
        "steps": [one["step"] for one in status],
        "train_seconds": finite(sum(seconds) / len(seconds)),
        "states": [one["state"] for one in status],
        "diverging": [text for run in group.runs if (text := diverging(run))],
        "notes": group.notes,
    }


def cells_of(row: Row, fact: dict[str, Any]) -> list[str]:
    """A row of the Markdown table."""
    state = ", ".join(sorted(set(fact["states"]))) + (", --debug" if fact["debug"] else "")
    return [
        fact["name"],
        fact["trainer"],
        fact["task"],
        fact["differs"],
        several(fact["seeds"]),
        fact["metric"] or "-",
        with_interval([s.value for s in row.scores], row.metric, *episodes_of(row.scores)) if row.scores else "-",
        best_in_words(fact["best"], fact["metric"]),
        ", ".join(map(str, sorted(set(fact["steps"])))),
        number(fact["train_seconds"] or 0, 0),
        state + "".join(f"; DIVERGING: {text}" for text in fact["diverging"][:1]),
    ]


def several(seeds: Sequence[int]) -> str:
    """How many seeds, and which: `3 (0 1 2)`."""
    shown = " ".join(map(str, seeds)) if len(seeds) <= 5 else f"{seeds[0]} ... {seeds[-1]}"
    return f"{len(seeds)} ({shown})"


def best_in_words(best: Sequence[dict[str, Any] | None], metric: str | None) -> str:
    """The mean of the best checkpoints' values, and their steps: `0.96 @ 4500, 6000`."""
    known = [one for one in best if one]
    same = [one for one in known if one["metric"] == known[0]["metric"]]
    if not same:
        return "-"
    mean = sum(one["value"] for one in same) / len(same)
    name = "" if same[0]["metric"] == metric else f"{same[0]['metric']} "
    steps = list(dict.fromkeys(str(one["step"]) for one in same))
    return f"{name}{number(mean)} @ {', '.join(steps[:5])}{', ...' * (len(steps) > 5)}"


# ---- numbers -------------------------------------------------------------------------------------------------------


def episodes_of(scores: Sequence[Score]) -> tuple[list[int], float | None]:
    """The episodes of each seed, and the deviation of a return over those of the first."""
    return [score.episodes for score in scores], scores[0].deviation


def interval_of(
    values: Sequence[float], metric: str, episodes: Sequence[int], deviation: float | None = None
) -> Interval | None:
    """The 95 % interval of the mean over seeds, by Student's t for two or more seeds.

    For a success rate, the interval also covers Wilson's interval over the episodes of all seeds, which is valid for a
    single seed, and where all seeds reach 0 or 1. The return of a single seed has the interval over its episodes.

    Args:
        episodes: Of each seed; empty where they are not known.
        deviation: Of the return over the episodes of a single seed.
    """
    bounds = []
    if len(values) > 1:
        bounds.append(intervals.of_mean(*intervals.moments(values), len(values)))
    elif deviation is not None and episodes and episodes[0] > 1:
        bounds.append(intervals.of_mean(values[0], intervals.unbiased(deviation, episodes[0]), episodes[0]))
    if metric == "success_rate" and any(episodes):
        bounds.append(intervals.wilson(*successes(values, episodes)))
        return max(0.0, min(low for low, _ in bounds)), min(1.0, max(high for _, high in bounds))
    return bounds[0] if bounds else None


def successes(rates: Sequence[float], episodes: Sequence[int]) -> tuple[int, int]:
    """The successes of all seeds together, and the episodes."""
    return sum(round(rate * n) for rate, n in zip(rates, episodes, strict=True)), sum(episodes)


def difference(one: Row, other: Row) -> dict[str, Any]:
    """The difference of two configurations and its 95 % interval, with how that was found."""
    a, b = one.scores, other.scores
    found: dict[str, Any] = {"one": one.group.label, "other": other.group.label}
    found |= {"metric": None, "difference": None, "low": None, "high": None, "by": ""}
    title = f"{one.group.label} minus {other.group.label}"
    of_task = [task_of(row.group.records[0]) for row in (one, other)]
    by_metric = [row.metric if row.scores else "no evaluation" for row in (one, other)]
    for what in (of_task, by_metric):
        if what[0] != what[1]:
            return found | {"text": f"{title}: cannot be compared, {what[0]} against {what[1]}"}
    if not a or not b:
        return found | {"text": f"{title}: no evaluations"}
    bounds, how = [], []
    if len(a) > 1 and len(b) > 1:
        bounds.append(intervals.welch(*((*intervals.moments([s.value for s in x]), len(x)) for x in (a, b))))
        how.append(f"Welch's t over {len(a)} and {len(b)} seeds")
    elif len(a) == len(b) == 1 and (of_one := episode_moments(a[0])) and (of_other := episode_moments(b[0])):
        bounds.append(intervals.welch(of_one, of_other))
        how.append(f"Welch's t over {a[0].episodes} and {b[0].episodes} episodes of one seed each")
    if one.metric == "success_rate" and all(s.episodes for s in (*a, *b)):
        pooled = [successes([s.value for s in x], [s.episodes for s in x]) for x in (a, b)]
        bounds.append(intervals.newcombe(*pooled))
        how.append(f"Newcombe's interval over {pooled[0][1]} and {pooled[1][1]} episodes")
    value = one.mean - other.mean
    interval = (min(low for low, _ in bounds), max(high for _, high in bounds)) if bounds else None
    by = ("95 % by " + (f"the wider of {' and '.join(how)}" if len(how) > 1 else how[0])) if how else ""
    by = by or f"no interval: {len(a)} and {len(b)} seeds"
    less = ", less is better" if a[0].sign < 0 else ""
    text = f"{title}: {one.metric} {'+' * (value > 0)}{measured(value, interval)} ({by}{less})"
    low, high = interval or (None, None)
    found |= {"metric": one.metric, "difference": finite(value), "low": finite(low), "high": finite(high)}
    return found | {"by": by, "text": text}


def episode_moments(score: Score) -> tuple[float, float, int] | None:
    """Mean, deviation (of n - 1) and number of one seed's episodes, if its deviation is known."""
    if score.deviation is None or score.episodes < 2:
        return None
    return score.value, intervals.unbiased(score.deviation, score.episodes), score.episodes


def with_interval(
    values: Sequence[float], metric: str, episodes: Sequence[int] = (), deviation: float | None = None
) -> str:
    """Mean over seeds and its interval (`interval_of`), as in `0.81 [0.73, 0.88]`."""
    if not values:
        return "-"
    return measured(sum(values) / len(values), interval_of(values, metric, episodes, deviation))


def finite(value: float | None) -> float | None:
    """None for what JSON has no number for."""
    return value if value is not None and math.isfinite(value) else None


# ---- tables --------------------------------------------------------------------------------------------------------


def results_table(path: Path, kind: str = "markdown") -> str:
    """The rows of a results file, one line for each suite, task and trainer. Raises UserError: a damaged file."""
    rows = read_record(path, list[ResultRow], "python -m components.report RUNS --save FILE writes one")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key: tuple[str, ...] = (row["suite"], row["task"], row["trainer"], str(row["steps"]), row["metric"])
        groups.setdefault(key, []).append(row)
    more = {name: title for name, title in FURTHER.items() if any(name in row for row in rows)}
    if wrong := next((name for name in more for row in rows if name in row and not is_number(row[name])), None):
        raise UserError(f"{path}: no results file: {wrong} must be a number")
    names = ("suite", "task", "trainer", "steps", "metric")
    facts, table = [], []
    for key, members in groups.items():
        values, episodes = [row["value"] for row in members], [row["episodes"] for row in members]
        seconds = sum(row["train_seconds"] for row in members) / len(members)
        low, high = interval_of(values, key[-1], episodes) or (None, None)
        further = {name: [row[name] for row in members if name in row] for name in more}
        fact = dict(zip(names, key, strict=True)) | {"seeds": len(members), "mean": sum(values) / len(values)}
        fact |= {"low": low, "high": high, "episodes": episodes[0], "train_seconds": seconds}
        facts.append(fact | {name: sum(found) / len(found) if found else None for name, found in further.items()})
        cells = [*key, str(len(members)), with_interval(values, key[-1], episodes), str(episodes[0]), f"{seconds:.0f}"]
        table.append([*cells, *(with_interval(found, name) for name, found in further.items())])
    if kind != "markdown":
        return json.dumps(facts, indent=1) if kind == "json" else as_csv(facts)
    return markdown([*names, "seeds", "mean [95 %]", "episodes", "train s", *more.values()], table)


def as_csv(facts: list[dict[str, Any]]) -> str:
    """A table with a line for each row; lists are `a;b`, the best checkpoint is `step:metric:value`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(list(facts[0]) if facts else [])
    for fact in facts:
        writer.writerow([plain(in_cell(value)) for value in fact.values()])
    return out.getvalue().rstrip("\n")


def in_cell(value: Any) -> str:
    """A value as the text of a cell."""
    if isinstance(value, dict):
        return ":".join(map(in_cell, value.values()))
    if isinstance(value, list):
        return ";".join(map(in_cell, value))
    return "" if value is None else str(value)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with aligned columns; control characters are written as escapes."""
    rows = [[plain(cell).replace("|", r"\|") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    process.run_script(main)
