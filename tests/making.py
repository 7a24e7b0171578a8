"""What the scripts that make a results file from runs share: every run but those that are finished, in any session."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

from components.report import result_row  # noqa: E402
from components.run import record as run_record  # noqa: E402

Runs = dict[str, tuple[str, list[str]]]  # run name -> suite and command line, which may begin with its script


def words_of(line: list[str]) -> list[str]:
    """The script, the offline one unless it is named, and its options."""
    return line if line[0].endswith(".py") else ["offline_trainer.py", *line]


def make(folder: Path, line: list[str]) -> bool:
    """Run, or go on with, one training on one thread, to the steps of its line; says whether it is finished."""
    steps = line[line.index("--steps") :][:2] if "--steps" in line else []
    status = run_record.read_status(folder)
    if status["state"] == "finished" and status["step"] >= int(steps[1] if steps else 0):
        return True
    begun = (folder / "args.json").exists()
    script, *options = words_of(line)
    options = ["--resume", str(folder), *steps] if begun else [*options, "--run-dir", str(folder)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".log"), "a") as log:
        words = [sys.executable, script, *options]
        done = subprocess.run(words, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    print(f"{folder.name}: {'finished' if done.returncode == 0 else f'FAILED, see {log.name}'}", flush=True)
    return done.returncode == 0


def row(folder: Path, suite: str, line: list[str]) -> dict[str, Any]:
    """A row of the results; files are named without their folders."""
    words = [Path(word).name if word.endswith(".npz") else word for word in line]
    own = {"suite": suite, "command": " ".join(words_of(words))}
    return {"run": folder.name} | result_row(folder) | own


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of a results file, by run; none where there is no file yet."""
    return {one["run"]: one for one in (json.loads(out.read_text()) if out.exists() else [])}


def keep(out: Path, new: dict[str, Any]) -> None:
    """Write a row to the results file, in the place of the one of the same run."""
    out.write_text(json.dumps(list((rows_of(out) | {new["run"]: new}).values()), indent=1) + "\n")


def collect(
    runs: Runs,
    folder: Path,
    out: Path,
    jobs: int,
    tell: Callable[..., dict[str, Any]] = row,
    needed: Collection[str] = (),
) -> None:
    """Make the runs, so many at a time, and write the file after each; rows of runs that are elsewhere stay.

    Args:
        needed: Runs whose folder must be here, whether they have a row or not.
    """
    known = set(rows_of(out)) - set(needed)
    runs = {name: run for name, run in runs.items() if (folder / name).exists() or name not in known}
    folder = folder.resolve()
    with ThreadPoolExecutor(jobs) as pool:
        made = pool.map(lambda name: make(folder / name, runs[name][1]), runs)
        for (name, (suite, line)), finished in zip(runs.items(), made, strict=True):
            if finished:
                keep(out, tell(folder / name, suite, line))
