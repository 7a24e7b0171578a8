"""Make tests/results/online.json: every run of the tables of online RL beside it, and CleanRL's own.

python tests/online_results.py --runs runs/online --jobs 2 --only mujoco
python tests/online_results.py --runs runs/online --jobs 2 --only road
python tests/online_results.py --runs runs/online --jobs 2 --only cleanrl --cleanrl PATH --cleanrl-python PYTHON

Finished runs are left out, so a run of this script that was stopped is gone on with. CleanRL's scripts run as they are,
from a checkout, by the Python of an environment of their own (gymnasium 0.29.1, mujoco 3.2.7), and cannot be resumed.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from components.run.curves import read_lines  # noqa: E402
from making import ROOT, Runs, collect, keep, row, rows_of  # noqa: E402

SEEDS = (1, 2, 3)
ENVS = ("HalfCheetah", "Hopper")
STEPS = {"sac": 50_000, "td3": 50_000, "ppo": 300_000}
OFTEN = ["--eval-every", "25000", "--eval-episodes", "10", "--log-every", "1000", "--matmul", "auto"]
# CleanRL's numbers where they are not this trainer's defaults.
LIKE_CLEANRL = {"sac": ["--num-envs", "1", "--learning-starts", "5000", "--optimizer.lr-scale", "policy=0.3"]}
# Of 22 tasks the one where cloning 20 demonstrations succeeds least often (0.46 with single actions, seed 1; soccer-v3
# 0.58, peg-insert-side-v3 0.98), for what goes on from it; RLPD learns nothing there in so few steps.
HARD, PEG = "basketball-v3", "peg-insert-side-v3"
# Offline RL gets the noisy attempts of an expert, good and bad: from demonstrations alone its policy loses the noise by
# which it would explore, and goes no further.
DEMOS, ATTEMPTS = "--dataset.demos 20", "--dataset.demos 50 --dataset.noise 0.3"
OFFLINE = {
    "bc": f"{HARD} {DEMOS} --dataset.action-steps 8 --loss l1 --steps 3000",
    "iql": f"{PEG} {ATTEMPTS} --steps 5000 --optimizer.schedule cosine",
}
# What each begins from, and its options. IQL learns once it has 25 episodes or more of its own: from fewer, half of a
# batch all the same, a policy that succeeded in 90 of 100 fell to 74. RLPD is smaller than its authors': half the
# critics, half the batch and a fifth of the updates.
ONLINE = {
    "residual": ("bc", f"{HARD} {DEMOS} --num-envs 8 --eval-every 25000"),
    "iql-online": (
        "iql",
        f"{PEG} {ATTEMPTS} --steps 15000 --learning-starts 5000 --optimizer.lr 1e-4 --ema-decay 0.999",
    ),
    "rlpd": (
        "",
        f"{PEG} {DEMOS} --steps 30000 --updates-per-step 4 --trainer.policy-every 2 --model.critic.members 5"
        " --batch-size 128 --trainer.n-step 3 --trainer.no-backup-entropy --model.temperature.initial 0.02"
        " --learning-starts 2000",
    ),
}
BEGIN = {"bc": "--trainer.base", "iql": "--init-from"}
MORE_SEEDS = {4: ("bc", "residual"), 5: ("bc", "residual")}  # of what varies most
LAST = 0.1  # share of a run over whose episodes the return while it learns is taken


def mujoco() -> Runs:
    """Online RL alone."""
    runs: Runs = {}
    for seed in SEEDS:
        for env in ENVS:
            for trainer, steps in STEPS.items():
                line = ["online_trainer.py", "--trainer", trainer, "--env.id", f"{env}-v5", "--steps", str(steps)]
                line += [*LIKE_CLEANRL.get(trainer, []), *OFTEN, "--seed", str(seed)]
                runs[f"mujoco-{env}-{trainer}-{seed}"] = ("mujoco", line)
    return runs


def road(folder: Path) -> list[Runs]:
    """What is learnt from data alone, and then what goes on from there, in this order."""
    task = ["--dataset", "metaworld", "--dataset.task"]
    before: Runs = {}
    after: Runs = {}
    for seed in (*SEEDS, *MORE_SEEDS):
        own = ["--seed", str(seed), "--dataset.seed", str(seed), "--eval-episodes", "100"]
        for trainer, options in of_seed(OFFLINE, seed).items():
            line = ["offline_trainer.py", "--trainer", trainer, *task, *options.split(), *own]
            before[f"road-{trainer}-{seed}"] = ("road", [*line, "--eval-every", "0"])
        for name, (begins, options) in of_seed(ONLINE, seed).items():
            line = ["online_trainer.py", "--trainer", name.removesuffix("-online"), *task, *options.split(), *own]
            line += [] if "--num-envs" in line else ["--num-envs", "1", "--eval-every", "5000"]
            line += ["--log-every", "500", "--matmul", "auto", "--compile"]
            line += [BEGIN[begins], str(folder / f"road-{begins}-{seed}")] if begins else []
            after[f"road-{name}-{seed}"] = ("road", line)
    return [before, after]


def of_seed(ways: dict[str, Any], seed: int) -> dict[str, Any]:
    """Those of `OFFLINE` or `ONLINE` that are run with a seed."""
    return {name: way for name, way in ways.items() if name in MORE_SEEDS.get(seed, ways)}


def with_before(folder: Path, suite: str, line: list[str]) -> dict[str, Any]:
    """A row of the results with the success that was handed over, where there was any."""
    found = row(folder, suite, line)
    first = read_lines(folder / "eval.jsonl")[0]
    return found | ({"before": first["success_rate"]} if first["step"] == 0 else {})


def with_training_return(folder: Path, suite: str, line: list[str]) -> dict[str, Any]:
    """A row of the results with the mean return of the last tenth's episodes, while it learns."""
    found = row(folder, suite, line)
    episodes = [(e["step"], e["episode_return"]) for e in read_lines(folder / "episodes.jsonl")]
    return found | {"train_return": last_mean(episodes, found["steps"])}


def last_mean(episodes: list[tuple[int, float]], steps: int) -> float:
    """Mean return of the episodes that ended in the last tenth."""
    returns = [value for step, value in episodes if step > (1 - LAST) * steps]
    return sum(returns) / len(returns)


def cleanrl(folder: Path, checkout: Path, python: str, jobs: int, out: Path) -> None:
    """CleanRL's own scripts with their defaults but for the steps; their rows hold the return while they learn."""
    folder.mkdir(parents=True, exist_ok=True)
    known = rows_of(out)
    wanted = {
        f"cleanrl-{t}_continuous_action-{env}-v4-{seed}": (t, f"{env}-v4", seed)
        for seed in SEEDS
        for env in ENVS
        for t in STEPS
    }

    def make(name: str) -> dict[str, Any]:
        trainer, env, seed = wanted[name]
        steps, log = STEPS[trainer], folder / f"{name}.log"
        words = [f"cleanrl/{trainer}_continuous_action.py", "--env-id", env, "--seed", str(seed)]
        words += ["--total-timesteps", str(steps), "--no-cuda"]
        if not log.with_suffix(".done").exists():
            environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout.resolve())}
            command = [python, str(checkout.resolve() / words[0]), *words[1:]]
            with open(log, "w") as file:
                subprocess.run(command, cwd=folder, env=environ, stdout=file, stderr=file, check=True)
            log.with_suffix(".done").touch()
        value = last_mean(list(episodes_of(log)), steps)
        own = {"run": name, "suite": "cleanrl", "task": env, "trainer": trainer, "seed": seed}
        own |= {"steps": steps, "metric": "return_mean", "value": value, "train_return": value, "train_seconds": 0.0}
        own |= {"episodes": 0, "command": "python " + " ".join(words), "commit": commit(checkout)}
        return own

    with ThreadPoolExecutor(jobs) as pool:
        for one in pool.map(make, [name for name in wanted if name not in known]):
            keep(out, one)


def episodes_of(log: Path) -> Iterator[tuple[int, float]]:
    """(step, return) of every episode that a script of CleanRL's has printed."""
    for step, value in re.findall(r"global_step=(\d+), episodic_return=\[?(-?[\d.e+]+)", log.read_text()):
        yield int(step), float(value)


def commit(checkout: Path) -> str:
    """Of a checkout."""
    words = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--only", choices=("mujoco", "road", "cleanrl"), help="a part alone")
    parser.add_argument("--cleanrl", type=Path, help="checkout of CleanRL")
    parser.add_argument("--cleanrl-python", default="python", help="Python that its scripts run with")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "results" / "online.json")
    args = parser.parse_args()
    if args.only in (None, "mujoco"):
        collect(mujoco(), args.runs, args.out, args.jobs, with_training_return)
    for stage in road(args.runs) if args.only in (None, "road") else ():
        collect(stage, args.runs, args.out, args.jobs, with_before)
    if args.cleanrl:
        cleanrl(args.runs / "cleanrl", args.cleanrl, args.cleanrl_python, args.jobs, args.out)


if __name__ == "__main__":
    main()
