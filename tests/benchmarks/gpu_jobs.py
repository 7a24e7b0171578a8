"""What `on_gpu.py` measures: its jobs in the order of their value, and the random data that all sides learn from.

Sizes are the published ones. Offline RL: 1M transitions, batches of 256; CORL's observations of 17 and actions of 6
with two or three layers of 256, FQL's 28 and 5 with four of 512. Online RL: HalfCheetah without an end, one
environment, one update of 256 samples a step; PPO with 8 environments of 256 steps and ten passes in minibatches of 64
on all sides. Imitation: chunks of 16 x 2 from states of 2 x 20 by the U-Net 256/512/1024 and by transformers of width
256 with 8 layers, batches of 256; ACT with chunks of 100 x 14 from 14 joints and two pictures of 480 x 640, batches of
8.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

RUN = "--steps 10000000 --log-every 1000 --eval-episodes 0 --save-every 0 --save-minutes 0 --hang-timeout 0"
RUN += " --run-dir run"
FOUR = "512 512 512 512"
# ReBRAC of FQL's comparison, and IQL of the same.
REBRAC = f"--model.hidden-dims {FOUR} --model.critic.hidden-dims {FOUR}"
WIDE = f"hidden-dims {FOUR} --model.{{0}}.activation gelu --model.{{0}}.layer-norm"
IQL = f"--model.hidden-dims {FOUR} --model.activation gelu"
IQL += "".join(f" --model.{name}.{WIDE.format(name)}" for name in ("critic", "value"))
CORL = ("iql", "td3_bc", "awac", "cql")
# What the networks of both sides do not have in common.
UNLIKE = {"act": "ours takes a picture as one token, the peer as 300"}
UNLIKE["flow dit"] = "ours scales and shifts its blocks by the observation, the peer's attend to it"
JAX = {"fql": "", "qc": "", "iql": IQL, "rebrac": REBRAC}


class Side(NamedTuple):
    """A process to measure."""

    command: tuple[str, ...]  # words after `python`; {root}, {peers} and the files of `write_data` are put in
    ticks: str = ""  # what moves its clock, where that is the plugin: "updates" or "env"
    warm_up: int = 30  # turns that do not count: compiling, recording and the random steps are over then
    samples: int = 1  # what a turn counts for
    repository: str = ""  # the checkout that it needs

    def words(self, places: dict[str, str]) -> list[str]:
        return [word.format_map(places) for word in self.command]


class Pair(NamedTuple):
    """A row: two sides of a unit, or ours alone."""

    ours: str
    peer: str | None
    goal: float | None = None
    beyond: float | None = None
    why: str = ""  # why there is no peer, or no goal, or what is not alike


class Unit(NamedTuple):
    """What is measured in turns."""

    job: str
    name: str
    what: str  # of which so many are made in a second
    sides: dict[str, Side]
    pairs: list[Pair]
    estimate: float  # seconds, once its processes are warm
    first: int = 20  # turns are taken by multiples of this
    counted: int = 20
    seconds: float = 0.0  # of a round; 0 for what the command line says


class Job(NamedTuple):
    """A line of the queue."""

    name: str
    units: Callable[[bool], list[Unit]]  # toy -> units
    starting: float  # seconds until its processes are warm: they start together
    tests: str = ""


def ours(script: str, words: str, ticks: str, toy: str = "", **about: Any) -> Side:
    """A script of ours."""
    return Side((f"{{root}}/{script}_trainer.py", *f"--plugins clock {words} {RUN} {toy}".split()), ticks, **about)


def theirs(repository: str, words: str, toy: bool, **about: Any) -> Side:
    """A side of `sides.py`."""
    toys = " --toy" if toy and not words.startswith(("corl", "jax", "script")) else ""
    return Side(("{root}/tests/benchmarks/sides.py", *(words + toys).split()), repository=repository, **about)


def offline(toy: bool) -> list[Unit]:
    """Beside CORL's classes."""
    units = []
    batch = 8 if toy else 256
    for name in CORL:
        words = f"--trainer {name} --dataset d4rl --dataset.path {{corl}} --batch-size {batch}"
        peer = f"corl {name} --checkout {{peers}}/CORL --data {{corl}} --batch {batch}"
        sides = {
            f"{name} eager": ours("offline", words, "updates"),
            f"{name} compiled": ours("offline", words + " --compile", "updates"),
            f"CORL {name}": theirs("CORL", peer, toy),
            f"CORL {name} compiled": theirs("CORL", peer + " --compile", toy),
        }
        pairs = [
            Pair(f"{name} eager", f"CORL {name}", 1.0),
            Pair(f"{name} compiled", f"CORL {name} compiled", 1.0, 1.3),
        ]
        units.append(unit("offline", name, "updates", sides, pairs, 20, toy))
    return units


def offline_jax(toy: bool) -> list[Unit]:
    """Beside the authors' code in JAX, jitted."""
    units = []
    batch = 8 if toy else 256
    for name, networks in JAX.items():
        words = f"--trainer {name} --dataset d4rl --dataset.path {{jax}} --batch-size {batch} {networks}"
        repository = "qc" if name == "qc" else "fql"
        peer = f"jax {name} --checkout {{peers}}/{repository} --data {{jax}} --batch {batch}"
        sides = {
            f"{name} wide, eager": ours("offline", words, "updates"),
            f"{name} wide, compiled": ours("offline", words + " --compile", "updates"),
            f"JAX {name}": theirs(repository, peer, toy),
        }
        pairs = [
            Pair(f"{name} wide, compiled", f"JAX {name}", 1.0, 1.3),
            Pair(f"{name} wide, eager", f"JAX {name}", why="no goal: the peer is compiled"),
        ]
        units.append(unit("offline-jax", name, "updates", sides, pairs, 16, toy))
    return units


def online(toy: bool) -> list[Unit]:
    """Whole scripts beside CleanRL's and LeanRL's.

    What is left without the environment is action, memory and update together: the peers' scripts are one loop.
    """
    units = []
    env = "ClockedHalfCheetah-v0"
    starts = 20 if toy else 1000
    for name in ("sac", "td3", "ppo"):
        on_policy = name == "ppo"
        words = f"--trainer {name} --env.id {env} --no-save-buffer"
        peer = f"--env-id {env} --total-timesteps 100000000"
        if on_policy:
            steps, envs, epochs = (64, 2, 1) if toy else (256, 8, 10)
            words += f" --num-envs {envs} --trainer.rollout {steps} --trainer.epochs {epochs}"
            words += f" --batch-size {steps * envs // 32}"
            peer += f" --num-envs {envs} --num-steps {steps} --update-epochs {epochs}"
            turn, warm = steps * envs, 3 * steps * envs
        else:
            words += f" --num-envs 1 --learning-starts {starts}"
            words += " --optimizer.lr-scale policy=0.3" if name == "sac" else ""
            words += " --buffer-size 10000 --batch-size 8" if toy else ""
            peer += f" --learning-starts {starts}" + (" --buffer-size 10000 --batch-size 8" if toy else "")
            turn, warm = 1, starts + (10 if toy else 200)
        about = {"warm_up": warm}
        script = f"script {{{{peers}}}}/{{0}}/{{1}}/{name}_continuous_action{{2}}.py "
        clean = script.format("cleanrl", "cleanrl", "") + peer
        lean = script.format("LeanRL", "leanrl", "_torchcompile") + peer + " --compile"
        lean += "" if toy else " --cudagraphs"  # which need a GPU
        sides = {
            f"{name} eager": ours("online", words, "env", **about),
            f"{name} compiled": ours("online", words + " --compile", "env", **about),
            f"CleanRL {name}": theirs("cleanrl", clean, toy, ticks="env", **about),
            f"LeanRL {name}": theirs("LeanRL", lean, toy, ticks="env", **about),
        }
        pairs = [
            Pair(f"{name} eager", f"CleanRL {name}", 1.0),
            Pair(f"{name} compiled", f"LeanRL {name}", 1.0, 1.3),
        ]
        made = unit("online", name, "environment steps", sides, pairs, 80 if on_policy else 20, toy)
        units.append(made._replace(first=turn, counted=turn) if on_policy else made)
    return units


def imitation(toy: bool) -> list[Unit]:
    """Samples a second of the published networks, beside diffusion_policy's and LeRobot's modules."""
    size = "--model.size " + ("small" if toy else "paper")
    rows, few = (4, 2) if toy else (256, 8)
    states = f"--dataset d4rl --dataset.path {{states}} --batch-size {rows} --optimizer.lr 1e-4"
    steps = 20 if toy else 100
    seen = f"--dataset robomimic --dataset.path {{pictures}} --dataset.cameras front wrist --batch-size {few}"
    unet, transformer, act = "diffusion_policy U-Net", "diffusion_policy transformer", "LeRobot ACT"
    prediction = "--trainer.prediction epsilon"
    chunks = f"--trainer act --model resnet18 --dataset.action-steps {steps}"
    tasks = {
        "diffusion unet1d": (f"--trainer diffusion {prediction} {size} {states}", "unet", unet, rows),
        "flow dit": (f"--trainer flow --model dit {size} {states}", "transformer", transformer, rows),
        "act": (f"{chunks} {size} {seen} --grad-clip 10", "act", act, few),
    }
    units = []
    for name, (words, kind, whose, samples) in tasks.items():
        repository = "lerobot" if kind == "act" else "diffusion_policy"
        peer = f"{kind} {name.split()[0]} --checkout {{peers}}/{repository} --batch {samples}"
        sides, pairs = {}, []
        for precision, mine, other in (("float32", "", ""), ("bf16", " --mixed-precision bf16", " --bf16")):
            for how, flag in (("eager", ""), ("compiled", " --compile")):
                our, his = f"{name}, {precision}, {how}", f"{whose}, {precision}, {how}"
                sides[our] = ours("offline", words + mine + flag, "updates", samples=samples)
                sides[his] = theirs(repository, peer + other + flag, toy, samples=samples)
                pairs.append(Pair(our, his, 1.0, 1.3 if flag else None, UNLIKE.get(name, "")))
        made = unit("imitation", name, "samples", sides, pairs, 45, toy)
        units.append(made._replace(first=1 if toy else 5, counted=1 if toy else 10))
    return units


def latency(toy: bool) -> list[Unit]:
    """One chunk for one observation, until it is on the CPU."""
    rows = {
        "diffusion": ("DDIM in 10 steps", "unet diffusion", "diffusion_policy U-Net"),
        "flow": ("flow in 10 steps", "unet flow", "diffusion_policy U-Net in an Euler loop"),
        "act": ("ACT", "act act", "LeRobot ACT"),
    }
    units = []
    for name, (title, kind, whose) in rows.items():
        repository = "lerobot" if name == "act" else "diffusion_policy"
        sides = {
            f"{title}, one chunk": theirs("", f"our-plan {name}", toy),
            f"{whose}, one chunk": theirs(
                repository, f"{kind} --plan --batch 2 --checkout {{peers}}/{repository}", toy
            ),
        }
        pairs = [Pair(f"{title}, one chunk", f"{whose}, one chunk", 1.0, why=UNLIKE.get(name, ""))]
        units.append(unit("latency", name, "chunks", sides, pairs, 8, toy)._replace(first=1 if toy else 5))
    return units


def launches(toy: bool) -> list[Unit]:
    """What a turn of each side launches: every job counts that, this one for what none has measured so far."""
    units = [unit for job in (offline, offline_jax, online, imitation) for unit in job(toy)]
    return [unit._replace(job="launches", seconds=0.3, estimate=unit.estimate / 2) for unit in units]


def unit(job: str, name: str, what: str, sides: dict[str, Side], pairs: list[Pair], estimate: float, toy: bool) -> Unit:
    """A unit, whose rounds are short in a rehearsal."""
    if not toy:
        return Unit(job, name, what, sides, pairs, estimate)
    sides = {key: side if side.ticks == "env" else side._replace(warm_up=8) for key, side in sides.items()}
    return Unit(job, name, what, sides, pairs, estimate, first=4, counted=4)


JOBS = [
    Job("cuda", lambda toy: [], 80, tests="tests/test_cuda.py"),
    Job("offline", offline, 70),
    Job("offline-jax", offline_jax, 70),
    Job("online", online, 90),
    Job("imitation", imitation, 100),
    Job("latency", latency, 30),
    Job("launches", launches, 60),
]


# ---- data ----------------------------------------------------------------------------------------------------------


def write_data(folder: Path, toy: bool) -> dict[str, str]:
    """Write random data in formats that both sides read: name -> path."""
    import h5py

    rng = np.random.default_rng(0)
    rows = 3000 if toy else 1_000_000
    places = {}
    for name, size, observation, action in (("corl", rows, 17, 6), ("jax", rows, 28, 5), ("states", 20_000, 20, 2)):
        places[name] = str(folder / f"{name}.hdf5")
        with h5py.File(places[name], "w") as file:
            file["observations"] = rng.standard_normal((size, observation), dtype=np.float32)
            file["next_observations"] = rng.standard_normal((size, observation), dtype=np.float32)
            file["actions"] = rng.uniform(-1, 1, (size, action)).astype(np.float32)
            file["rewards"] = rng.standard_normal(size, dtype=np.float32)
            ends = np.arange(size) % 500 == 499
            file["timeouts"], file["terminals"] = ends, ends & (np.arange(size) % 5000 == 4999)
    places["pictures"] = str(folder / "pictures.hdf5")
    height, width = (48, 64) if toy else (480, 640)
    with h5py.File(places["pictures"], "w") as file:
        for demo in range(2):
            group = file.create_group(f"data/demo_{demo}")
            group["actions"] = rng.uniform(-1, 1, (30, 14)).astype(np.float32)
            group["obs/joints"] = rng.standard_normal((30, 14), dtype=np.float32)
            for camera in ("front", "wrist"):
                group[f"obs/{camera}_image"] = rng.integers(0, 256, (30, height, width, 3), dtype=np.uint8)
    return places
