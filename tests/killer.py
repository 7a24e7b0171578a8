"""Kill runs with kill -9 and resume them, until they end; compare every file with those of a run that never stopped.

python tests/killer.py --configurations all --kills 20          # of each; a line for each, and one for all
python tests/killer.py --configurations bc sac-two --kills 200

Prints kills, kills inside a save, runs, lost, different. The online runs learn in an environment that saves its state.
Equal are all files of the run folder, byte for byte, but for the times in metrics.jsonl and args.json.
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
from components.run.policies import choose, load_policy  # noqa: E402

COMMON = "--batch-size 16 --log-every 10 --save-minutes 0"
OFFLINE = f"{COMMON} --dataset toy --steps 100 --save-every 7 --eval-every 20 --eval-episodes 2 --eval-envs 2"
ONLINE = f"{COMMON} --env savable --num-envs 2 --learning-starts 20 --steps 120 --save-every 14 --eval-every 30"
ONLINE += " --eval-episodes 2 --eval-envs 2"
ACTOR = "--model.hidden-dims 16"
CRITIC = f"{ACTOR} --model.critic.hidden-dims 16"
UNIT = "--dataset.action-scale 4"  # brings the toy's actions into [-1, 1]
HELD = f"{UNIT} --dataset.validation 0.2"
FIXTURES = Path(__file__).parent / "fixtures"
PUSH = f"{FIXTURES}/lerobot_v30_image"
FILES = "--batch-size 16 --log-every 10 --save-minutes 0 --steps 30 --save-every 7 --eval-episodes 0 --eval-every 10"
CROPPED = "--dataset.cameras corner2 --augment.crop 56 60 --augment.shift 2 --augment.hue 0.1"
RUNNING = "--normalise-observations --normalise-rewards"
SOURCES = f"{PUSH}:0.7 minari={FIXTURES}/minari/metaworld/push-state-arrow-v0:0.3"
# Name -> script, options; "-two" at the end for two processes. BASE is the folder of a finished run of bc.
OFFLINE_CONFIGURATIONS = f"""
bc: {OFFLINE} --trainer bc --model.dropout 0.2 --model.hidden-dims 64 --dataset.validation 0.2
bc-two: {OFFLINE} --trainer bc --model.dropout 0.2 --model.hidden-dims 64 --dataset.validation 0.2
act: {OFFLINE} --trainer act --model.width 16 --model.layers 1 --dataset.action-steps 4
diffusion-ema: {OFFLINE} --trainer diffusion --model.channels 16 --dataset.action-steps 8 --ema-decay 0.9
flow: {OFFLINE} --trainer flow --model.channels 16 --dataset.action-steps 8 --optimizer.schedule onecycle
history: {OFFLINE} --trainer bc --model gru --model.head gaussian --loss nll --dataset.obs-steps 3
accumulation-two: {OFFLINE} --trainer bc {ACTOR} --grad-accumulation 2 --grad-clip 0.5 --keep-last 1
td3_bc: {OFFLINE} --trainer td3_bc {CRITIC} {HELD}
iql: {OFFLINE} --trainer iql {CRITIC} --model.value.hidden-dims 16 {HELD}
fql-two: {OFFLINE} --trainer fql {CRITIC} --model.flow.hidden-dims 16 {HELD}
hiql: {OFFLINE} --trainer hiql {ACTOR} --model.value.hidden-dims 16 --model.high.hidden-dims 16
 --model.representation.hidden-dims 16 --trainer.subgoal-steps 3 --env gymnasium --env.id TendonGoal-v0
pictures: {FILES} --trainer bc --model cnn --dataset lerobot --dataset.path {PUSH} {CROPPED} --workers 1
mixture: {FILES} --trainer bc --dataset mixture --dataset.sources {SOURCES}
""".replace("\n ", " ")
ONLINE_CONFIGURATIONS = f"""
sac: {ONLINE} --trainer sac {CRITIC} --trainer.n-step 2
sac-two: {ONLINE} --trainer sac {CRITIC} --trainer.n-step 2
normalised: {ONLINE} --trainer sac {CRITIC} {RUNNING} --ema-decay 0.9 --buffer-size 60
td3: {ONLINE} --trainer td3 {CRITIC} --env.mode SameStep
dqn: {ONLINE} --trainer dqn {ACTOR} --env.discrete --updates-per-step 1 --trainer.exploration-steps 60
ppo-two: {ONLINE} --batch-size 10 --trainer ppo {ACTOR} --model.value.hidden-dims 16 --trainer.rollout 10
rlpd: {ONLINE} --trainer rlpd {CRITIC} --dataset toy {UNIT} --model.critic.members 3 --updates-per-step 2
residual: {ONLINE} --trainer residual {CRITIC} --trainer.base BASE --updates-per-step 1
qc: {ONLINE} --trainer qc {CRITIC} --model.flow.hidden-dims 16 --dataset toy {UNIT} --reward-scale 1
"""


def table() -> dict[str, tuple[str, list[str]]]:
    """Configuration -> its script and options; of an option that comes twice, the later one counts."""
    found = {}
    for script, text in (("offline", OFFLINE_CONFIGURATIONS), ("online", ONLINE_CONFIGURATIONS)):
        for line in text.strip().splitlines():
            name, _, options = line.partition(": ")
            if name.startswith("ppo"):  # it has no replay buffer
                options = options.replace("--learning-starts 20 ", "").replace("--batch-size 16 ", "")
            found[name] = script, options.split()
    return found


CONFIGURATIONS = table()
BASE = f"{COMMON} --dataset toy --trainer bc {ACTOR} --steps 20 --eval-episodes 0".split()
SCRIPTS = {"offline": offline_trainer, "online": online_trainer}
TIMES = {"data_s", "step_s", "samples_per_s", "env_steps_per_s"}
saving = mmap.mmap(-1, 1)  # shared with the children: 1 while a checkpoint is being written


def train(script: str, options: list[str], run: Path, rank: int, processes: int, port: int) -> None:
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
        where += options
    code = 3
    try:
        with open(os.devnull, "w") as silence:
            sys.stdout = sys.stderr = silence
            code = SCRIPTS[script].main(where)
    except BaseException as error:
        run.parent.joinpath("error.txt").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def spawn(name: str, run: Path) -> list[int]:
    """Fork the processes of one attempt of a configuration."""
    script, options = CONFIGURATIONS.get(name, ("offline", BASE))
    options = [word.replace("BASE", str(run.parents[2] / "base" / "run")) for word in options]
    processes, port = processes_of(name), free_port()
    saving[0] = 0
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            train(script, options, run, rank, processes, port)
        children.append(child)
    return children


def processes_of(name: str) -> int:
    return 2 if name.endswith("-two") else 1


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


def result(run: Path) -> dict[str, Any]:
    """Everything that has to be equal: what each file of the folder holds, and where links lead."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif name == "metrics.jsonl":
            found[name] = [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(path)]
        elif name == "args.json":
            found[name] = json.loads(path.read_text().replace(str(run), "RUN")) | {"started": ""}
        elif path.is_file() and name != ".lock":
            found[name] = path.read_bytes()
    return found


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The files that are not the same, or not there, or there in addition."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def before_a_kill(children: list[int], chance: random.Random, duration: float) -> None:
    """Wait for the moment of a kill; half of them are aimed into a save: one of the next three."""
    if chance.random() < 0.5:
        time.sleep(chance.uniform(0.0, duration))
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


def kill_and_resume(name: str, run: Path, chance: random.Random, duration: float) -> dict[str, int]:
    """Make one run to its end through kills; returns how many there were, how many inside a save, and what was lost."""
    count, last = {"kills": 0, "inside": 0, "lost": 0}, 0
    while True:
        children = spawn(name, run)
        victim = chance.choice(children)
        before_a_kill(children, chance, duration)
        if gone(victim):
            codes = wait(children)
            if any(codes):
                count["lost"] += 1
                print(f"{run} could not go on:", codes, (run.parent / "error.txt").read_text(), flush=True)
            return count
        count["inside"] += saving[0]
        count["kills"] += 1
        kill(victim, children, chance)
        if checkpoint.steps(run / "checkpoints"):
            step = verify_newest(run)
            if (policy := choose(run)).step != step or not load_policy(run):
                print(f"NO POLICY of step {step}: {policy}", flush=True)
                step = -1
            damaged = list((run / "checkpoints").glob(".damaged-*"))
            if step < last or damaged:
                count["lost"] += 1
                print(f"LOST: step {last} -> {step}, damaged {damaged}", flush=True)
            last = step


def verify_newest(run: Path) -> int:
    """The step of the newest checkpoint, every file of which is as its manifest says; -1 where one is not."""
    try:
        return int(checkpoint.verify(checkpoint.steps(run / "checkpoints")[-1])["step"])
    except checkpoint.DamagedError as error:
        print(error, flush=True)
        return -1


def try_out(name: str, kills: int, root: Path, chance: random.Random) -> dict[str, int]:
    """Kill and resume runs of one configuration; returns the counts, and prints them.

    All have the same name, which is written on their curves.
    """
    began = time.monotonic()
    whole = root / "whole" / "run"
    codes = wait(spawn(name, whole))
    assert not any(codes), (name, codes, (whole.parent / "error.txt").read_text())
    duration, expected = time.monotonic() - began, result(whole)
    total = {"kills": 0, "inside": 0, "runs": 0, "lost": 0, "different": 0}
    while total["kills"] < kills:
        run = root / f"killed-{total['runs']}" / "run"
        total["runs"] += 1
        for key, number in kill_and_resume(name, run, chance, duration).items():
            total[key] += number
        if odd := differing(result(run), expected):
            total["different"] += 1
            print("DIFFERENT:", run, ", ".join(odd), flush=True)
        else:
            shutil.rmtree(run.parent)
    print(line(name, total, began), flush=True)
    return total


def line(name: str, total: dict[str, int], began: float) -> str:
    """The counts in words."""
    return (
        f"{name}: {total['kills']} kills, {total['inside']} inside a save, {total['runs']} runs,"
        f" {total['lost']} lost, {total['different']} different, {time.monotonic() - began:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", nargs="+", choices=["all", *CONFIGURATIONS], default=["all"])
    parser.add_argument("--kills", type=int, default=20, help="of each configuration")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    names = list(CONFIGURATIONS) if "all" in args.configurations else args.configurations
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="killer-"))
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.Adam([parameter]).step()  # its first step imports for seconds: before the forks
    importlib.import_module("matplotlib.pyplot")
    began = time.monotonic()
    base = root / "base" / "run"
    assert not any(wait(spawn("base", base))), (base.parent / "error.txt").read_text()
    counts = [try_out(name, args.kills, root / name, random.Random(f"{args.seed} {name}")) for name in names]
    total = {key: sum(count[key] for count in counts) for key in counts[0]}
    print(line(f"{len(names)} configurations", total, began))
    if not total["lost"] + total["different"]:
        shutil.rmtree(root)
    return int(total["lost"] + total["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
