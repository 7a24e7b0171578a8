"""Kill runs of the offline script with kill -9 and resume them, until they end; compare with a run that never stopped.

python tests/killer.py --processes 1 --kills 200      # prints kills, kills inside a save, runs, lost, different
"""

import argparse
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402

import offline_trainer  # noqa: E402
import toy  # noqa: E402, F401
from components import checkpoint  # noqa: E402
from components.curves import read_lines  # noqa: E402

OPTIONS = [
    "--trainer",
    "bc",
    "--dataset",
    "toy",
    "--batch-size",
    "16",
    "--eval-episodes",
    "0",
    "--model.dropout",
    "0.2",
]
OPTIONS += [
    "--steps",
    "120",
    "--save-every",
    "7",
    "--log-every",
    "10",
    "--eval-every",
    "20",
    "--model.hidden-dims",
    "64",
]
saving = mmap.mmap(-1, 1)  # shared with the children: 1 while a checkpoint is being written


def train(run: Path, rank: int, processes: int, port: int) -> None:
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
    where = ["--resume", str(run)] if (run / "args.json").exists() else ["--run-dir", str(run), *OPTIONS]
    code = 3
    try:
        with open(os.devnull, "w") as silence:
            sys.stdout = sys.stderr = silence
            code = offline_trainer.main(where)
    except BaseException as error:
        run.parent.joinpath("error.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def spawn(run: Path, processes: int, port: int) -> list[int]:
    """Fork the processes of one attempt."""
    saving[0] = 0
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            train(run, rank, processes, port)
        children.append(child)
    return children


def gone(child: int) -> bool:
    """Whether a child has ended; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def result(run: Path) -> Any:
    """Everything that has to be equal: the newest checkpoint's files, the policy, the metrics without the times."""
    folder, _ = checkpoint.newest(run / "checkpoints", set_aside=False)
    files = [*sorted(folder.iterdir()), run / "policy" / "model.safetensors"]
    times = {"data_s", "step_s", "samples_per_s"}
    lines = [{k: v for k, v in line.items() if k not in times} for line in read_lines(run / "metrics.jsonl")]
    return [path.read_bytes() for path in files], lines, json.loads((run / "status.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    port = 20_000 + os.getpid() % 20_000
    codes = wait(spawn(root / "whole", processes, port))
    assert codes == [0] * processes, (codes, (root / "error.txt").read_text())
    duration, expected = time.monotonic() - began, result(root / "whole")
    kills = inside = runs = lost = different = attempts = 0
    while kills < args.kills:
        run, last, done = root / f"run-{runs}", 0, False
        runs += 1
        while not done:
            attempts += 1
            children = spawn(run, processes, port + attempts)
            time.sleep(chance.uniform(0.0, 0.7 * duration))
            if chance.random() < 0.5:  # half of the kills are aimed into a save
                limit = time.monotonic() + duration / 3
                while not saving[0] and time.monotonic() < limit:
                    pass
                time.sleep(chance.uniform(0, 0.002))
            victim = chance.choice(children)
            if gone(victim):
                codes = wait(children)
                if codes != [0] * processes:
                    lost += 1
                    print("a run could not go on:", codes, (root / "error.txt").read_text(), flush=True)
                done = True
                continue
            inside += saving[0]
            kills += 1
            os.kill(victim, signal.SIGKILL)
            limit = time.monotonic() + chance.choice([0, 3])  # the others fail by themselves, or the launcher ends them
            while time.monotonic() < limit and not all(gone(child) for child in children):
                time.sleep(0.01)
            for child in children:
                os.kill(child, signal.SIGKILL)
            wait(children)
            if checkpoint.steps(run / "checkpoints"):
                step = checkpoint.newest(run / "checkpoints", set_aside=False)[1]["step"]
                damaged = list((run / "checkpoints").glob(".damaged-*"))
                if step < last or damaged:
                    lost += 1
                    print(f"LOST: step {last} -> {step}, damaged {damaged}", flush=True)
                last = step
        if result(run) != expected:
            different += 1
            print("DIFFERENT:", run, flush=True)
        else:
            shutil.rmtree(run)
    seconds = time.monotonic() - began
    print(
        f"{processes} process(es): {kills} kills, {inside} inside a save, {runs} runs,"
        f" {lost} lost, {different} different, {seconds:.0f} s"
    )
    return int(lost + different > 0)


if __name__ == "__main__":
    sys.exit(main())
