"""How fast the online script learns in HalfCheetah, against CleanRL's scripts and stable-baselines3.

python tests/benchmarks/online_speed.py --profile
python tests/benchmarks/online_speed.py --cleanrl ../cleanrl --cleanrl-python PYTHON --compile --json rows.json
python tests/benchmarks/online_speed.py --only ppo --sb3 --sb3-python PYTHON     # pip install stable-baselines3

Measured are whole loops as anybody would start them: `online_trainer.py` in HalfCheetah-v5, CleanRL's own script, run
from its checkout (vwxyzjn/cleanrl) in HalfCheetah-v4, and a few lines that call stable-baselines3 with the same sizes.
Each is a process of its own, on one thread of the CPU, without evaluations and checkpoints, that logs every 100 steps,
PPO once a rollout. A figure is environment steps a second from the first line of the log once learning goes on (500
updates, PPO one rollout) to the last one, so that neither start, compiling nor the random steps count. It is taken on
two clocks: the CPU time of the process, which the goals are for, since other programs hardly change it, and the wall
clock (`on_gpu.py` measures the same on a GPU). Figures of a trainer are measured in turns, in reverse order every
second round; of several rounds the first does not count. A ratio is the median of the rounds' own ratios. The goals are
over CleanRL; stable-baselines3 is held against the same ones.

SAC and TD3: one environment, 1000 random steps, one update of 256 samples per step, two layers of 256, CleanRL's
learning rates. CleanRL's SAC moves the policy twice in every second update, ours once in each. PPO: rollouts of 2048
steps, ten passes in minibatches of 64, two layers of 64; ours has eight environments of 256 steps, its default, or one
of 2048, as the peers have. stable-baselines3's PPO normalises no observations, the other two do.

"auto" is our `--matmul auto`, which takes torch.set_float32_matmul_precision("medium") where that is faster and still
float32; "medium" and "highest", torch's default, are what is set in the process of the peer before its code runs.

How our time divides is what our script logs, by the wall clock: updating is the updates, collecting all the rest, the
drawing of batches and PPO's estimate of advantages included. In a run "without updates" the policy acts and what it
meets is kept, and nothing learns. The peers' scripts do not tell their parts apart. `--profile` runs our script in this
process and tells of 320 updates, and of the steps between them, the shares of the time: matrix products, the
environment's own step, the optimizers' steps with the script's hooks; by torch.profiler, which makes everything that is
small look larger.
"""

import argparse
import io
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil
import torch
from torch.profiler import record_function

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from measuring import SWITCHES, compare, describe_machine  # noqa: E402
from offline_updates import PRODUCTS, merge, spread  # noqa: E402

import online_trainer  # noqa: E402
from components import TRAINER_REGISTRY  # noqa: E402
from components.envs.vector import Environments  # noqa: E402
from components.run.curves import read_lines  # noqa: E402

Row = dict[str, Any]
Speed = dict[str, float]  # environment steps a second: by each clock, and in our parts of a step
PAUSE = 0.01  # seconds between two looks at a log
PROFILED = 320  # updates that are profiled, after as many that are not; those of a PPO rollout
# Our --matmul, the precision that is set for the peer, and who has a switch.
PAIRS = (("default", "highest", "none"), ("auto", "medium", "both"), ("auto", "highest", "ours alone"))
RUN = "--env.id HalfCheetah-v5 --eval-episodes 0 --save-every 0 --save-minutes 0 --no-save-buffer --run-dir run"
REPLAY = ("--num-envs", "1", "--learning-starts", "1000")

CLEANRL = """
import runpy, sys, torch
precision, *sys.argv = sys.argv[1:]
torch.set_float32_matmul_precision(precision)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SB3 = """
import sys, gymnasium, stable_baselines3, torch
from stable_baselines3.common.callbacks import BaseCallback

class Marks(BaseCallback):
    def _on_step(self):
        if self.num_timesteps % int(every) == 0:
            print("MARK", flush=True)
        return True

precision, name, steps, every = sys.argv[1:]
torch.set_float32_matmul_precision(precision)
layers, options = [256, 256], {"learning_starts": 1000, "batch_size": 256, "train_freq": 1, "gradient_steps": 1}
if name == "PPO":
    layers, options = {"pi": [64, 64], "vf": [64, 64]}, {"n_steps": 2048, "batch_size": 64, "n_epochs": 10}
env = "HalfCheetah-v5" if "HalfCheetah-v5" in gymnasium.registry else "HalfCheetah-v4"
options |= {"learning_rate": 3e-4, "policy_kwargs": {"net_arch": layers}}
model = getattr(stable_baselines3, name)("MlpPolicy", env, **options)
model.learn(int(steps), callback=Marks())
"""


@dataclass(frozen=True)
class Task:
    """A trainer to measure, by environment steps."""

    variants: dict[str, tuple[str, ...]]  # our options
    same: float  # goal where both have the same switch
    alone: float  # goal where ours alone has it
    starts: int = 1000  # random ones
    begin: int = 1500  # first one that counts
    every: int = 100  # between two lines of the log
    per_update: float = 1.0
    steps: int = 6000  # of a run, unless the command line says

    def last(self, steps: int) -> int:
        """The last step of a run of about so many, at which there is a line."""
        return -(-max(steps, self.begin + self.every) // self.every) * self.every


ONE = ("--num-envs", "1", "--trainer.rollout", "2048")
TASKS = {
    "sac": Task({"": (*REPLAY, "--optimizer.lr-scale", "policy=0.3")}, 2, 2.5),
    "td3": Task({"": REPLAY}, 1.7, 2.2),
    "ppo": Task({" 8 x 256": (), " 1 x 2048": ONE}, 5, 5, 0, begin=2048, every=2048, per_update=6.4, steps=24_576),
}


# ---- one run -------------------------------------------------------------------------------------------------------


class Script(NamedTuple):
    """What is run, and what tells its steps: the file where it logs, and what is in there once for each logged step."""

    command: list[str]
    log: str
    mark: str
    before: int = 0  # steps that are not logged
    environment: dict[str, str] = {}


def our_script(name: str, task: Task, options: tuple[str, ...], last: int) -> Script:
    """Ours; `options` beside those that all runs have."""
    command = [sys.executable, str(ROOT / "online_trainer.py"), "--trainer", name, *RUN.split(), *options]
    command += ["--steps", str(last), "--log-every", str(task.every)]
    return Script(command, "run/metrics.jsonl", "\n")


def cleanrl_script(name: str, task: Task, args: argparse.Namespace, precision: str, last: int) -> Script:
    """CleanRL's, as it is, under a switch."""
    checkout = args.cleanrl.absolute()
    file = checkout / "cleanrl" / f"{name}_continuous_action.py"
    command = [str(args.cleanrl_python.absolute()), "-c", CLEANRL, precision, str(file), "--env-id", "HalfCheetah-v4"]
    command += ["--total-timesteps", str(last + 1)]  # its first step is 0
    command += ["--learning-starts", str(task.starts)] if task.starts else []
    return Script(command, "output.txt", "SPS:", task.starts, {"PYTHONPATH": str(checkout)})


def sb3_script(name: str, task: Task, args: argparse.Namespace, precision: str, last: int) -> Script:
    """The lines above in a Python that has stable-baselines3."""
    command = [str(args.sb3_python.absolute()), "-c", SB3, precision, name.upper(), str(last), str(task.every)]
    return Script(command, "output.txt", "MARK")


def speed(script: Script, task: Task, last: int) -> Speed:
    """Run a script until it has logged its last step. Raises RuntimeError when it ends before."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | script.environment
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder) / script.log, Path(folder) / "output.txt"
        with output.open("w") as file:
            process = subprocess.Popen(script.command, cwd=folder, env=environment, stdout=file, stderr=file)
        try:
            marks = watch(process, log, script, task, last)
        finally:
            process.kill()
            process.wait()
        said = output.read_text()
        if last not in marks:
            raise RuntimeError(f"{script.command} has ended at step {max(marks, default=0)}: {said[-2000:]}")
        lines = read_lines(log) if log.suffix == ".jsonl" else []
    first = min(marks)
    found = {clock: (last - first) / (marks[last][clock] - marks[first][clock]) for clock in ("cpu", "wall")}
    for part, key in (("collecting", "data_s"), ("updating", "step_s")):
        seconds = [line[key] for line in lines if line["step"] > first]
        found |= {part: len(seconds) / sum(seconds)} if any(seconds) else {}
    if "matrix products: " in said:
        found["took medium"] = float("matrix products: 'medium'" in said)
    return found


def watch(process: Any, log: Path, script: Script, task: Task, last: int) -> dict[int, Speed]:
    """Both clocks, in seconds, when a running script has logged a step, from the first one that counts."""
    marks: dict[int, Speed] = {}
    times, size = psutil.Process(process.pid).cpu_times, 0
    while last not in marks:
        time.sleep(PAUSE)
        before, size = size, log.stat().st_size if log.exists() else 0
        step = script.before + task.every * log.read_text().count(script.mark) if size != before else 0
        if step >= task.begin:
            used = times()
            marks.setdefault(step, {"cpu": used.user + used.system, "wall": time.monotonic()})
        elif process.poll() is not None:
            break
    return marks


# ---- a trainer -----------------------------------------------------------------------------------------------------


def peers_of(args: argparse.Namespace) -> dict[str, Callable[..., Script]]:
    """Those that are given, by name."""
    peers = {"CleanRL": cleanrl_script} if args.cleanrl else {}
    check = [args.sb3_python.absolute(), "-c", "import stable_baselines3"]
    if args.sb3 and subprocess.run(check, capture_output=True).returncode:
        print(f"stable-baselines3 is left out: {args.sb3_python} -m pip install stable-baselines3")
    elif args.sb3:
        peers["SB3"] = sb3_script
    return peers


def run(name: str, task: Task, args: argparse.Namespace, peers: dict[str, Callable[..., Script]]) -> list[Row]:
    """Measure and print a trainer; returns its figures and comparisons."""
    last = task.last(args.steps or task.steps)
    measured: Any = partial(speed, task=task, last=last)
    ours = {f"{name}{variant}": options for variant, options in task.variants.items()}
    if args.compile:
        ours |= {f"{label}, compiled": (*options, "--compile") for label, options in ours.items()}
    figures: dict[str, Callable[[], Speed]] = {}
    for mine, theirs, _ in PAIRS[:2]:
        for label, options in ours.items():
            figures[f"{label}, {mine}"] = partial(measured, our_script(name, task, (*options, "--matmul", mine), last))
        for peer, script in peers.items():
            figures[f"{peer} {name}, {theirs}"] = partial(measured, script(name, task, args, theirs, last))
    if task.starts:
        without = (*task.variants[""], "--updates-per-step", "0")
        figures[f"{name} without updates"] = partial(measured, our_script(name, task, without, last))

    print(f"\n{name}: steps {task.begin} to {last}, {args.rounds} rounds")
    speeds = in_turns(figures, args.rounds)
    rows = [tell(label, found, task) for label, found in speeds.items()]
    for clock in ("cpu", "wall") if peers else ():
        print(f"environment steps a second, ours / peer, {clock} clock:")
        rates = {label: [one[clock] for one in found] for label, found in speeds.items()}
        for peer, label, (mine, theirs, switch) in itertools.product(peers, ours, PAIRS):
            goal = task.alone if switch == "ours alone" else task.same
            row = compare(rates, f"{label}, {mine}", f"{peer} {name}, {theirs}", goal)
            row |= {"name": f"{row['name']}, {clock} clock", "switch": switch, "compile": "--compile" in ours[label]}
            rows.append(row | {"clock": clock, "rounds": len(rates[f"{label}, {mine}"])})
    return [row | {"trainer": name} for row in rows]


def in_turns(figures: dict[str, Callable[[], Speed]], rounds: int) -> dict[str, list[Speed]]:
    """The speeds of each figure in the rounds that count."""
    speeds: dict[str, list[Speed]] = {label: [] for label in figures}
    for round_ in range(rounds):
        for label in list(figures)[:: -1 if round_ % 2 else 1]:
            speeds[label].append(figures[label]())
            print(f"  round {round_ + 1}, {label:34} {speeds[label][-1]['cpu']:8.0f}/s of CPU time", flush=True)
    return {label: found[1:] if rounds > 1 else found for label, found in speeds.items()}


def tell(label: str, found: list[Speed], task: Task) -> Row:
    """Print the speeds of a figure; returns its row."""
    rates = {part: [one[part] for one in found] for part in found[0]}
    row: Row = {"name": label}
    if "took medium" in rates:
        row["took_medium"] = statistics.mean(rates.pop("took medium"))
        print(f"{label:34} took 'medium' in {row['took_medium']:.0%} of the rounds")
    for part, each in rates.items():
        row[f"{part}_per_s"] = statistics.median(each)
        of_update = f", {1000 * task.per_update / row['updating_per_s']:.2f} ms an update" if part == "updating" else ""
        print(f"{label:34} {part:10} {spread(each)} steps/s{of_update}")
    return row


# ---- where our time goes -------------------------------------------------------------------------------------------


def profile(name: str, task: Task, switch: str) -> Row:
    """Run our script in this process and print the shares of its time; returns the row."""
    cls: Any = TRAINER_REGISTRY[name]
    calls, learn, act = itertools.count(1), cls.train_step, Environments.step
    profiler, loop = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]), record_function("loop")

    def train_step(self: Any, data: dict[str, Any]) -> Any:
        call = next(calls)
        if call == PROFILED + 1:
            profiler.start()
            loop.__enter__()
        elif call == 2 * PROFILED + 1:
            loop.__exit__(None, None, None)
            profiler.stop()
        return learn(self, data)

    def step(self: Any, action: Any) -> Any:
        with record_function("environment"):
            return act(self, action)

    torch.set_float32_matmul_precision(switch)
    last = task.last(task.starts + task.every + int(2 * PROFILED * task.per_update))
    variant, options = next(iter(task.variants.items()))
    with (
        tempfile.TemporaryDirectory() as folder,
        chdir(folder),
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        mock.patch.object(cls, "train_step", train_step),
        mock.patch.object(Environments, "step", step),
    ):
        online_trainer.main(our_script(name, task, options, last).command[2:])
    events = profiler.key_averages()
    times = {event.key: event.cpu_time_total for event in events}
    shares = {"products": sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS)}
    shares["environment"] = times["environment"]
    shares["optimizer"] = sum(seconds for key, seconds in times.items() if key.startswith("Optimizer.step#"))
    shares = {part: seconds / times["loop"] for part, seconds in shares.items()}
    shares["rest"] = 1 - sum(shares.values())
    print(f"{name}{variant}, {switch}: " + ", ".join(f"{share:.0%} {part}" for part, share in shares.items()))
    return {"name": f"{name}{variant}, {switch}, profile", "trainer": name, "switch": switch} | shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cleanrl", type=Path, help="checkout of vwxyzjn/cleanrl to compare with")
    parser.add_argument("--cleanrl-python", type=Path, default=Path(sys.executable), help="path of its Python")
    parser.add_argument("--sb3", action="store_true", help="compare with stable-baselines3, too, where it is installed")
    parser.add_argument("--sb3-python", type=Path, default=Path(sys.executable), help="path of the Python that has it")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--json", type=Path, help="file for the rows; those not made now stay in it")
    parser.add_argument("--steps", type=int, help="of each run; by default 6000, PPO 24 576")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="also ours compiled; compiling takes a minute each time")
    parser.add_argument("--profile", action="store_true", help="also the shares of what takes our time")
    args = parser.parse_args()
    torch.set_num_threads(1)

    describe_machine("cpu")
    print(f"load average {os.getloadavg()[0]:.1f}")
    peers = peers_of(args)
    for name in args.only:
        rows = run(name, TASKS[name], args, peers)
        rows += [profile(name, TASKS[name], switch) for switch in (SWITCHES if args.profile else ())]
        if args.json:
            merge(args.json, rows)


if __name__ == "__main__":
    main()
