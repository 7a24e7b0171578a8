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
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from components.report import markdown, with_interval  # noqa: E402
from components.run.curves import read_lines  # noqa: E402
from making import ROOT, Runs, collect, keep, row, rows_of  # noqa: E402

SEEDS = (1, 2, 3)
ENVS = ("HalfCheetah", "Hopper")
STEPS = {"sac": 50_000, "td3": 50_000, "ppo": 300_000}
OFTEN = ["--eval-every", "25000", "--eval-episodes", "10", "--log-every", "1000", "--matmul", "auto"]
# CleanRL's numbers where they are not this trainer's defaults.
LIKE_CLEANRL = {"sac": ["--num-envs", "1", "--learning-starts", "5000", "--optimizer.lr-scale", "policy=0.3"]}
LAST = 0.1  # share of a run over whose episodes the return while it learns is taken


class Way(NamedTuple):
    """A run, with a seed of its own and of its data for each of `seeds`."""

    options: str
    """`{NAME}` is the run folder of another way, which is made before, with the same seed."""
    have: str
    """What it needs, for the table of methods."""
    seeds: tuple[int, ...] = SEEDS
    suite: str = "road"


# Of 22 tasks the one where cloning 20 demonstrations succeeds least often (0.46 with single actions, seed 1; soccer-v3
# 0.58, peg-insert-side-v3 0.98), for what goes on from it; RLPD learns nothing there in so few steps.
HARD = "--dataset metaworld --dataset.task basketball-v3 --dataset.demos 20"
EASY = "--dataset metaworld --dataset.task peg-insert-side-v3 --dataset.demos 20"
# Offline RL gets the noisy attempts of an expert, good and bad: from demonstrations alone its policy loses the noise by
# which it would explore, and goes no further.
PEG = "--dataset metaworld --dataset.task peg-insert-side-v3 --dataset.demos 50 --dataset.noise 0.3"
# Half of it random, the other half as noisy.
MIXED = "--dataset metaworld --dataset.task push-v3 --dataset.demos 400 --dataset.noise 0.3 --dataset.random 0.5"
MIXED += " --dataset.max-episode-steps 80"
DEMONSTRATIONS, ATTEMPTS, AND_ENV = "20 demonstrations", "50 noisy attempts", "and an environment"
BAD = "400 attempts, half of them random"
FRESH = tuple(range(21, 26))  # of what varies most; none of them chose an option

# The networks of the flow policies are smaller than their authors', so that a run takes minutes of one CPU core. In so
# few updates they need normalised observations: without, none of 100 attempts of `ifql` succeeds, and 1 of `fql`. And
# critics that have settled when they are handed over: their distance from the fixed point falls as exp(-(1 - discount)
# target_rate updates), to 0.78 with the papers' 0.99 and 0.005, and here to 0.05. And five rewards before the critics
# bootstrap, as many as a chunk of `qc` has: with one, `ifql` reaches 0.65, and with five 0.84 (seed 1). Online its flow
# stays as it is: half of what it would clone is of its own attempts, whose failures last longest, and the success of
# the best of its actions fell from 0.84 to 0.66.
SETTLED = "--trainer.discount 0.97 --trainer.target-rate 0.02"
FLOW = f"{PEG} {SETTLED} --model.hidden-dims 256 256 --model.critic.hidden-dims 256 256"
CLONE = "--model.flow.hidden-dims 256 256"
# An alpha of 100 keeps the noise that the flow has cloned: 0.41 at the hand-over, then 0.40, 0.42, 0.39 (seed 1).
FQL = f"--trainer fql {FLOW} {CLONE} --trainer.n-step 5 --trainer.aggregate min --trainer.alpha 30"
IFQL = f"--trainer ifql {FLOW} --trainer.n-step 5 --model.value.hidden-dims 256 256"
IFQL += " --trainer.candidates 16 --trainer.flow-steps 5"
QC = f"--trainer qc {FLOW} {CLONE} --trainer.alpha 100"
RECAP = f"--trainer recap {MIXED} --model.hidden-dims 256 256 --model.value.hidden-dims 256 256"
SHORT = "--steps 5000 --optimizer.schedule cosine --normalise observation=mean_std --matmul auto --compile"
FAST = f"{SHORT} --optimizer.lr 1e-3"
# An MLP as a shortcut model of two steps, since each update of what steers it samples from it.
SHORTCUT = (
    "--trainer flow --model vector_field --trainer.objective shortcut --dataset.obs-steps 1 --dataset.action-steps 8"
    " --policy.action-steps 4"
)

OFFLINE = {
    "bc": Way(f"--trainer bc {HARD} --dataset.action-steps 8 --loss l1 --steps 3000", DEMONSTRATIONS, FRESH),
    "bc-peg": Way(f"--trainer bc {EASY} --dataset.action-steps 8 --loss l1 --steps 3000", DEMONSTRATIONS),
    "iql": Way(f"--trainer iql {PEG} --steps 5000 --optimizer.schedule cosine", ATTEMPTS),
    "fql": Way(f"{FQL} {FAST}", ATTEMPTS),
    "ifql": Way(f"{IFQL} {FAST}", ATTEMPTS),
    "qc": Way(f"{QC} {FAST}", ATTEMPTS),
    "recap": Way(f"{RECAP} {SHORT}", BAD),
    "flow": Way(f"{SHORTCUT} {HARD} --steps 3000", DEMONSTRATIONS),
    "flow-peg": Way(f"{SHORTCUT} {EASY} --steps 500 --ema-decay 0.99", DEMONSTRATIONS),
}
# IQL learns once it has 25 episodes or more of its own: from fewer, half of a batch all the same, a policy that
# succeeded in 90 of 100 fell to 74. RLPD is smaller than its authors': half the critics, half the batch and a fifth of
# the updates.
LATER = "--steps 15000 --learning-starts 5000 --optimizer.lr 1e-4 --ema-decay 0.999"
ITERATED = "--steps 40000 --learning-starts 5000 --updates-per-step 0.25 --ema-decay 0.999 --num-envs 4"
RLPD = (
    "--trainer rlpd --steps 30000 --updates-per-step 4 --trainer.policy-every 2 --model.critic.members 5"
    " --batch-size 128 --trainer.n-step 3 --trainer.no-backup-entropy --model.temperature.initial 0.02"
    " --learning-starts 2000"
)
# By the dense rewards its return rose while it succeeded less often: 0.65 -> 0.50 and 0.63 -> 0.51 (seeds 11 and 15).
RESIDUAL = "--trainer residual --dataset.reward sparse --batch-size 128 --num-envs 8 --eval-every 50000"
DSRL = "--trainer dsrl --batch-size 128 --updates-per-step 0.5 --ema-decay 0.999"
ONLINE = {
    "residual": Way(f"{RESIDUAL} {HARD} --steps 200000 --trainer.base {{bc}}", f"{DEMONSTRATIONS}, {AND_ENV}", FRESH),
    "residual-peg": Way(f"{RESIDUAL} {EASY} --steps 100000 --trainer.base {{bc-peg}}", f"{DEMONSTRATIONS}, {AND_ENV}"),
    "dsrl": Way(f"{DSRL} {HARD} --steps 40000 --trainer.base {{flow}}", f"{DEMONSTRATIONS}, {AND_ENV}"),
    "dsrl-peg": Way(f"{DSRL} {EASY} --steps 20000 --trainer.base {{flow-peg}}", f"{DEMONSTRATIONS}, {AND_ENV}"),
    "iql-online": Way(f"--trainer iql {PEG} {LATER} --init-from {{iql}}", f"{ATTEMPTS}, {AND_ENV}"),
    "fql-online": Way(f"{FQL} {LATER} --init-from {{fql}}", f"{ATTEMPTS}, {AND_ENV}"),
    "ifql-online": Way(f"{IFQL} {LATER} --freeze policy --init-from {{ifql}}", f"{ATTEMPTS}, {AND_ENV}"),
    "qc-online": Way(f"{QC} {LATER} --init-from {{qc}}", f"{ATTEMPTS}, {AND_ENV}"),
    "recap-online": Way(f"{RECAP} {ITERATED} --eval-every 10000 --init-from {{recap}}", f"{BAD}, {AND_ENV}"),
    "rlpd": Way(f"{RLPD} {EASY}", f"{DEMONSTRATIONS}, {AND_ENV}"),
    "rlpd-basketball": Way(f"{RLPD} {HARD}", f"{DEMONSTRATIONS}, {AND_ENV}"),
}


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


def road(folder: Path, seeds: Sequence[int] = (), ways: Sequence[str] = ()) -> list[Runs]:
    """What is learnt from data alone, and what goes on from there, in stages: each begins from those before it.

    Args:
        folder: Of the run folders.
        seeds: These alone; those of each way without.
        ways: These alone, and what they begin from; all without.

    Raises:
        SystemExit: a way that does not exist, or one that begins from itself.
    """
    known = OFFLINE | ONLINE
    if unknown := [name for name in ways if name not in known]:
        raise SystemExit(f"--ways {unknown[0]}: choose among {', '.join(known)}")
    order = {name: i for i, name in enumerate(known)}
    wanted = {(seed, name) for name in ways or known for seed in seeds or known[name].seeds}
    stages: list[Runs] = []
    while wanted:
        first = sorted(wanted, key=lambda one: (one[0], order[one[1]]))
        stages.insert(0, {f"road-{name}-{seed}": run_of(folder, name, seed) for seed, name in first})
        wanted = {(seed, before) for seed, name in wanted for before in begins_from(known[name])}
        if len(stages) > len(known):
            raise SystemExit("a way begins from itself")
    made: set[str] = set()  # what several begin from is made once, as early as any needs it
    for stage in stages:
        for name in made & set(stage):
            del stage[name]
        made |= set(stage)
    return stages


def begins_from(way: Way) -> list[str]:
    """The ways whose runs it begins from."""
    return re.findall(r"\{([\w-]+)\}", way.options)


def run_of(folder: Path, name: str, seed: int) -> tuple[str, list[str]]:
    """Suite and command line of a way with a seed."""
    way = (OFFLINE | ONLINE)[name]
    before = {one: str(folder / f"road-{one}-{seed}") for one in begins_from(way)}
    line = [word.format_map(before) for word in way.options.split()]
    line += ["--seed", str(seed), "--dataset.seed", str(seed), "--eval-episodes", "100"]
    if name in OFFLINE:
        return way.suite, ["offline_trainer.py", *line, "--eval-every", "0"]
    often = [] if "--eval-every" in line else ["--eval-every", "5000"]
    often += [] if "--num-envs" in line else ["--num-envs", "1"]
    often += ["--log-every", "500", "--matmul", "auto", "--compile"]
    return way.suite, ["online_trainer.py", *line, *often]


def missing(stages: list[Runs], rows: Collection[str]) -> set[str]:
    """The runs that others without a row begin from, whether these have a row themselves or not."""
    every = {name for stage in stages for name in stage}
    found: set[str] = set()
    for stage in reversed(stages):
        for _, line in (run for name, run in stage.items() if name in found or name not in rows):
            found |= {Path(word).name for word in line} & every
    return found


def methods_table(out: Path) -> str:
    """What is reached from what there is, a line for each way with rows in a results file, with each seed's success."""
    rows, ways = rows_of(out), OFFLINE | ONLINE
    table = []
    for name, way in ways.items():
        found = [rows[run] for seed in range(100) if (run := f"road-{name}-{seed}") in rows]
        if not found:
            continue
        values, episodes = [one["value"] for one in found], [one["episodes"] for one in found]
        line = [found[0]["task"], way.have, method_of(way), f"{found[0]['steps']:,}".replace(",", " ")]
        several = [f"{value:.2f}" for value in values]
        line.append(with_interval(values, found[0]["metric"], episodes))
        if all("before" in one for one in found):
            several = [f"{one['before']:.2f} -> {one['value']:.2f}" for one in found]
            line.append(with_interval([one["value"] - one["before"] for one in found], "gain"))
            line.append(f"{min(one['drop'] for one in found):.2f}")
        else:
            line += ["-", "-"]
        table.append([*line, ", ".join(several)])
    success, gain, drop = "success, mean [95 %]", "gain, mean [95 %]", "lowest later - before, worst seed"
    head = ["task", "what you have", "method", "steps", success, gain, drop, "each seed"]
    return markdown(head, sorted(table, key=lambda line: line[0]))


def method_of(way: Way) -> str:
    """The trainers of a way, in their order."""
    own = f"`{way.options.split('--trainer ')[1].split()[0]}`"
    if not (before := [method_of((OFFLINE | ONLINE)[name]) for name in begins_from(way)]):
        return own
    return f"{before[0]}, continued online" if before[0] == own else f"{before[0]}, then {own}"


def with_before(folder: Path, suite: str, line: list[str]) -> dict[str, Any]:
    """A row of the results with the success that was handed over, where there was any, and the lowest one after it."""
    named = [f"runs/online/{Path(word).name}" if Path(word).name.startswith("road-") else word for word in line]
    found = row(folder, suite, named)
    return found | handed_over([(one["step"], one["success_rate"]) for one in read_lines(folder / "eval.jsonl")])


def handed_over(evaluations: list[tuple[int, float]]) -> dict[str, float]:
    """Success `before` the first step, the `lowest` one later, and their difference, below 0 for a drop; {} for none.

    Args:
        evaluations: (step, success rate); a run that was resumed may have repeated one, of which the last one counts.
    """
    rates = dict(evaluations)
    if 0 not in rates or len(rates) == 1:
        return {}
    before = rates.pop(0)
    return {"before": before, "lowest": min(rates.values()), "drop": round(min(rates.values()) - before, 4)}


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
    parser.add_argument("--runs", type=Path, default=Path("runs/online"), help="folder of the run folders")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--only", choices=("mujoco", "road", "cleanrl"), help="a part alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=(), help="of the road; each way's own without")
    parser.add_argument("--ways", nargs="+", default=(), help="of the road, beside what they begin from; all without")
    parser.add_argument("--cleanrl", type=Path, help="checkout of CleanRL")
    parser.add_argument("--cleanrl-python", default="python", help="Python that its scripts run with")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "results" / "online.json")
    parser.add_argument(
        "--tables", action="store_true", help="print the table of the README beside it, and make nothing"
    )
    args = parser.parse_args()
    if args.tables:
        print(methods_table(args.out))
        return
    if args.only in (None, "mujoco"):
        collect(mujoco(), args.runs, args.out, args.jobs, with_training_return)
    stages = road(args.runs, args.seeds, args.ways) if args.only in (None, "road") else []
    needed = missing(stages, rows_of(args.out))
    for stage in stages:
        collect(stage, args.runs, args.out, args.jobs, with_before, needed)
    if args.cleanrl:
        cleanrl(args.runs / "cleanrl", args.cleanrl, args.cleanrl_python, args.jobs, args.out)


if __name__ == "__main__":
    main()
