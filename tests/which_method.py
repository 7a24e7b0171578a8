"""The first page's table: which method for what you have, with what it reached. Made of the rows in tests/results.

python tests/which_method.py
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from components.report import with_interval  # noqa: E402
from making import ROOT, rows_of  # noqa: E402

HEAD = ["`--trainer`", "what you have", "success, or return, there"]


class Shown(NamedTuple):
    """Rows of a results file, and how they are told."""

    text: str
    """Before the values."""
    file: str
    """Under tests/results, without its suffix."""
    wanted: dict[str, dict[str, Any]]
    """Name in the table -> what these rows have, as `trainer`."""


def trainers(suite: str, task: str, *names: str) -> dict[str, dict[str, Any]]:
    """Rows of these trainers alone."""
    return {f"`{name}`": {"suite": suite, "task": task, "trainer": name} for name in names}


def ways(*names: str) -> dict[str, dict[str, Any]]:
    """Rows of these ways of `online_results.py`."""
    return {f"`{name.partition('-')[0]}`": {"way": name} for name in names}


def dagger(task: str, labels: int) -> dict[str, dict[str, Any]]:
    """Rows of `dagger_results.py` with so many labels, beside clones of as many actions more."""
    names = {"bc": "`bc`", "dagger": "`dagger`", "hg_dagger": "with `--trainer.method hg_dagger`"}
    return {text: {"task": task, "suite": f"{labels} {name}"} for name, text in names.items()}


def cell(shown: Shown, folder: Path) -> str:
    """The values of some rows: means over seeds with intervals, and what they began from."""
    known = rows_of(folder / f"{shown.file}.json")
    rows = [row | {"way": run.removeprefix("road-").rpartition("-")[0]} for run, row in known.items()]
    told = []
    for name, wanted in shown.wanted.items():
        found = [row for row in rows if wanted.items() <= row.items()]
        if not found:
            raise SystemExit(f"{shown.file}.json has no row with {wanted}")
        value = with_interval([r["value"] for r in found], found[0]["metric"], [r["episodes"] for r in found])
        before = [row["before"] for row in found if "before" in row]
        told.append(f"{name} {sum(before) / len(before):.2f} -> {value}" if before else f"{name} {value}")
    return f"{shown.text}: {', '.join(told)}"


PEG, NOISY, MAZE = "peg-insert-side-v3", "push-v3-noisy", "pointmaze-medium-navigate"
TABLE = [
    (
        "`bc`, `act`, `diffusion`, `flow`",
        "demonstrations",
        [
            Shown(
                "peg-insert-side-v3 from 50",
                "imitation",
                trainers("metaworld-state", PEG, "bc", "act", "diffusion", "flow"),
            )
        ],
    ),
    (
        "`td3_bc`, `iql`, `awac`, `cql`, `rebrac`, `fql`, `ifql`, `qc`, `recap`",
        "attempts, good and bad, with rewards",
        [
            Shown(
                "push-v3 from 400, half of them random",
                "offline_rl",
                trainers(NOISY, "push-v3", "bc", "iql", "td3_bc", "fql", "recap"),
            )
        ],
    ),
    (
        "`gcbc`, `gciql`, `hiql`",
        "any episodes with a state; goals",
        [Shown("pointmaze-medium", "offline_rl", trainers(MAZE, f"{MAZE}-v0.npz", "gcbc", "gciql", "hiql"))],
    ),
    (
        "those of offline RL, with `--init-from RUN`",
        "the same attempts, and an environment",
        [
            Shown("peg-insert-side-v3 from 50", "online", ways("iql-online", "fql-online", "ifql-online", "qc-online")),
            Shown("push-v3 from the 400", "online", ways("recap-online")),
        ],
    ),
    (
        "`rlpd`",
        "few demonstrations, and an environment with rewards",
        [
            Shown("peg-insert-side-v3 from 20", "online", ways("rlpd")),
            Shown("basketball-v3 from 20", "online", ways("rlpd-basketball")),
        ],
    ),
    (
        "`residual`, `dsrl`",
        "the policy of a run, and an environment with rewards",
        [
            Shown("basketball-v3, a policy from 20", "online", ways("residual", "dsrl")),
            Shown("peg-insert-side-v3, a policy from 20", "online", ways("residual-peg", "dsrl-peg")),
        ],
    ),
    (
        "`dagger`",
        "an environment, and an expert: scripted, a run's policy, or a person",
        [
            Shown(
                "coffee-pull-v3, 5 demonstrations and 500 actions of the expert",
                "dagger",
                dagger("coffee-pull-v3", 500),
            ),
            Shown("peg-insert-side-v3, 5 and 2000", "dagger", dagger(PEG, 2000)),
            Shown("Hopper, 1 and 2000", "dagger", dagger("Hopper-v5", 2000)),
        ],
    ),
    (
        "`ppo`, `sac`, `td3`, `dqn`",
        "an environment with rewards; `dqn`: with discrete actions",
        [Shown("HalfCheetah, 50 000 steps", "online", trainers("mujoco", "HalfCheetah-v5", "sac", "td3"))],
    ),
]


def which_method(folder: Path = ROOT / "tests" / "results") -> str:
    """The table, of the rows in the results files of a folder."""
    rows = [[names, have, "; ".join(cell(shown, folder) for shown in several) or "-"] for names, have, several in TABLE]
    return "\n".join(f"| {' | '.join(line)} |" for line in [HEAD, ["---"] * len(HEAD), *rows])


if __name__ == "__main__":
    print(which_method())
