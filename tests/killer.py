"""Kill runs of a script with kill -9 and resume them, until they end; compare with a run that never stopped.

python tests/killer.py --script offline --processes 1 --kills 200
python tests/killer.py --script online --processes 2 --kills 200

Prints kills, kills inside a save, runs, lost, different. The online runs learn in an environment that saves its state.
"""

import argparse
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

import offline_trainer  # noqa: E402
import online_trainer  # noqa: E402
import toy  # noqa: E402, F401
from components.run import checkpoint  # noqa: E402
from components.run.curves import read_lines  # noqa: E402

BOTH = "--batch-size 16 --eval-episodes 0 --log-every 10"
OPTIONS = {
    "offline": "--trainer bc --dataset toy --model.dropout 0.2 --steps 120 --save-every 7 --eval-every 20"
    " --model.hidden-dims 64",
    "online": "--trainer sac --env savable --num-envs 2 --learning-starts 20 --steps 160 --save-every 10"
    " --trainer.n-step 2 --model.hidden-dims 32 --model.critic.hidden-dims 32",
}
SCRIPTS = {"offline": offline_trainer, "online": online_trainer}
saving = mmap.mmap(-1, 1)  # shared with the children: 1 while a checkpoint is being written


def train(script: str, run: Path, rank: int, processes: int, port: int) -> None:
    """In a child: start the run, or go on with it."""
    if processes > 1:
        group = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_PORT": port,
            "LOCAL_WORLD_SIZE": processes,
        }
        os.environ.update({key: str(value) for key, value in group.items()})
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    whole = checkpoint.save

    def save(*arguments: Any) -> None:
        saving[0] = 1
        whole(*arguments)
        saving[0] = 0

    checkpoint.save = save
    where = ["--resume", str(run)] if (run / "args.json").exists() else ["--run-dir", str(run)]
    if where[0] == "--run-dir":
        where += f"{OPTIONS[script]} {BOTH}".split()
    code = 3
    try:
        with open(os.devnull, "w") as silence:
            sys.stdout = sys.stderr = silence
            code = SCRIPTS[script].main(where)
    except BaseException as error:
        run.parent.joinpath("error.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def spawn(script: str, run: Path, processes: int, port: int) -> list[int]:
    """Fork the processes of one attempt."""
    saving[0] = 0
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            train(script, run, rank, processes, port)
        children.append(child)
    return children


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gone(child: int) -> bool:
    """Whether a child has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def result(run: Path) -> Any:
    """Everything that has to be equal: the newest checkpoint's files, the policy, the metrics without the times."""
    folder, _ = checkpoint.newest(run / "checkpoints", set_aside=False)
    files = [*sorted(folder.iterdir()), run / "policy" / "model.safetensors"]
    times = {"data_s", "step_s", "samples_per_s", "env_steps_per_s"}
    lines = [{k: v for k, v in line.items() if k not in times} for line in read_lines(run / "metrics.jsonl")]
    return [path.read_bytes() for path in files], lines, json.loads((run / "status.json").read_text())


def before_a_kill(children: list[int], chance: random.Random, duration: float) -> None:
    """Wait for the moment of a kill; half of them are aimed into a save: one of the next three."""
    if chance.random() < 0.5:
        time.sleep(chance.uniform(0.0, 0.7 * duration))
        return
    limit = time.monotonic() + 3 * duration
    for _ in range(chance.randint(1, 3)):
        for wanted in (0, 1):
            while saving[0] != wanted and not any(map(gone, children)) and time.monotonic() < limit:
                time.sleep(0.0002)
    time.sleep(chance.uniform(0, 0.003))


def kill(victim: int, children: list[int], chance: random.Random) -> None:
    """Kill one process; the others fail by themselves, or the launcher ends them."""
    os.kill(victim, signal.SIGKILL)
    limit = time.monotonic() + chance.choice([0, 3])
    while time.monotonic() < limit and not all(gone(child) for child in children):
        time.sleep(0.01)
    for child in children:
        os.kill(child, signal.SIGKILL)
    wait(children)


def kill_and_resume(run: Path, args: argparse.Namespace, chance: random.Random, duration: float) -> dict[str, int]:
    """Make one run to its end through kills; returns how many there were, how many inside a save, and what was lost."""
    count, last = {"kills": 0, "inside": 0, "lost": 0}, 0
    while True:
        children = spawn(args.script, run, args.processes, free_port())
        victim = chance.choice(children)
        before_a_kill(children, chance, duration)
        if gone(victim):
            codes = wait(children)
            if codes != [0] * args.processes:
                count["lost"] += 1
                print("a run could not go on:", codes, (run.parent / "error.txt").read_text(), flush=True)
            return count
        count["inside"] += saving[0]
        count["kills"] += 1
        kill(victim, children, chance)
        if checkpoint.steps(run / "checkpoints"):
            step = checkpoint.newest(run / "checkpoints", set_aside=False)[1]["step"]
            damaged = list((run / "checkpoints").glob(".damaged-*"))
            if step < last or damaged:
                count["lost"] += 1
                print(f"LOST: step {last} -> {step}, damaged {damaged}", flush=True)
            last = step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", choices=SCRIPTS, default="offline")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, processes = random.Random(args.seed), args.processes
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="killer-"))
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.Adam([parameter]).step()  # its first step imports for seconds: before the forks
    importlib.import_module("matplotlib.pyplot")
    began = time.monotonic()
    codes = wait(spawn(args.script, root / "whole", processes, free_port()))
    assert codes == [0] * processes, (codes, (root / "error.txt").read_text())
    duration, expected = time.monotonic() - began, result(root / "whole")
    total, runs, different = {"kills": 0, "inside": 0, "lost": 0}, 0, 0
    while total["kills"] < args.kills:
        run = root / f"run-{runs}"
        runs += 1
        count = kill_and_resume(run, args, chance, duration)
        total = {key: total[key] + count[key] for key in total}
        if result(run) != expected:
            different += 1
            print("DIFFERENT:", run, flush=True)
        else:
            shutil.rmtree(run)
    kills, inside, lost = total.values()
    print(
        f"{args.script}, {processes} process(es): {kills} kills, {inside} inside a save, {runs} runs,"
        f" {lost} lost, {different} different, {time.monotonic() - began:.0f} s"
    )
    return int(lost + different > 0)


if __name__ == "__main__":
    sys.exit(main())
