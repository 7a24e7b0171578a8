"""Ten minutes of a GPU, well used: a queue of measurements of ours beside its peers, the most valuable ones first.

python tests/benchmarks/on_gpu.py --minutes 9 --out DIR --peers PEERS --wheels WHEELS
python tests/benchmarks/on_gpu.py --rehearse --out DIR --peers PEERS     # all of it at toy size, on a CPU
python tests/benchmarks/on_gpu.py --only offline online --out DIR        # some of the jobs
python tests/benchmarks/on_gpu.py --table                                # tests/results/gpu_*.json as Markdown

DIR gets `gpu_<card>.json` (the rows of tests/results/gpu_<card>.json, where there are some, and the new ones: copy it
over that file), `log.txt` (what every process said, tracebacks included) and `table.md`. Rows are written as soon as
they are made. One that is known is not made again without --again: its card, its version of torch, both commands and
the peer's commit are the same. A job starts when its estimate fits into what is left of the minutes, and one that fails
costs its own rows. The processes of a job start together; then they are measured in turns, in reverse order every
second round, after a round that does not count. Each stands still while another one is measured (`clock.py`). Ours are
the scripts as users start them and, for latencies, policies built from the registries. A ratio is the median of the
rounds' own ratios. What is compared, and the sizes, stand in `gpu_jobs.py`.

The machine needs no network, but torch, numpy, jax and pytest, and torchvision for LeRobot's pictures. What it lacks
besides is installed for the run alone from a folder of wheels, which a machine with network fills (47 MB; keep it below
60, and leave out what the machine has), here for Python 3.12 on x86-64:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d WHEELS \
        accelerate safetensors tqdm psutil h5py einops imageio pillow schedulefree tyro docstring-parser typeguard \
        gymnasium farama-notifications cloudpickle mujoco==3.3.0 glfw PyOpenGL absl-py etils tensordict==0.12.4 \
        torchrl==0.12.0 pyvers importlib_metadata zipp orjson distrax==0.1.9 tfp-nightly==0.26.0.dev20261027 dm-tree \
        attrs wrapt decorator gast six ml_collections PyYAML flax optax chex toolz msgpack rich markdown-it-py mdurl \
        treescope diffusers==0.42.1 huggingface_hub httpx2 httpcore2 anyio h11 truststore click lazy-importer regex \
        requests charset-normalizer urllib3 certifi idna

PEERS holds the parts of checkouts that are needed, 3 MB in all, each with its commit in a file COMMIT:

    part() { mkdir -p PEERS/$2 && git -C $1 archive HEAD ${@:3} | tar x -C PEERS/$2; \
             git -C $1 rev-parse HEAD > PEERS/$2/COMMIT; }
    part ../CORL CORL algorithms/offline                        # of tinkoff-ai/CORL
    part ../cleanrl cleanrl cleanrl cleanrl_utils               # of vwxyzjn/cleanrl
    part ../LeanRL LeanRL leanrl                                # of pytorch-labs/LeanRL
    part ../fql fql agents utils                                # of seohongpark/fql
    part ../qc qc agents utils rlpd_networks rlpd_distributions  # of ColinQiyangLi/qc
    part ../diffusion_policy diffusion_policy diffusion_policy/{policy,model,common}    # of real-stanford
    part ../lerobot lerobot src/lerobot/policies/act src/lerobot/utils                  # of huggingface/lerobot
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from gpu_jobs import JOBS, Job, Pair, Side, Unit, write_data  # noqa: E402
from gpu_table import markdown  # noqa: E402

Row = dict[str, Any]
RESULTS = ROOT / "tests" / "results"
ENDING = 15.0  # seconds that are kept for the end: processes are stopped, the table is written
COUNTS = ("host_ms", "kernels", "device_ms", "copies", "launches", "synchronisations", "operations")
KNOWN_BY = ("job", "name", "device", "torch", "command", "peer_command", "peer_commit")


class FailedError(Exception):
    """A process of a measurement ended, or did not answer in time."""


class Process:
    """A side that runs: it is told what to do next and answers, or has ended."""

    def __init__(self, name: str, side: Side, bench: "Bench") -> None:
        self.name, self.side, self.bench = name, side, bench
        self.pipe: Any = None
        self.folder = Path(tempfile.mkdtemp(dir=bench.folder))
        self.output = self.folder / "output.txt"
        environment = os.environ | {"CLOCK": bench.listener.address, "CLOCK_NAME": str(self.folder)}
        environment |= {"TICKS": side.ticks, "WARM_UP": str(side.warm_up)}
        environment |= {"OMP_NUM_THREADS": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        environment["TORCHINDUCTOR_COMPILE_THREADS"] = "2"  # many processes compile at once
        environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(ROOT), *bench.python_path])
        command = [sys.executable, *side.words(bench.places)]
        with self.output.open("w") as file:
            options: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file, "process_group": 0}
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, **options)
        self.about: dict[str, Any] = {}
        self.ticks = 0  # of a round

    def ready(self) -> dict[str, Any]:
        """Wait for the end of its warm-up. Raises FailedError."""
        while (pipe := self.bench.pipes.get(str(self.folder))) is None:
            self._check()
            time.sleep(0.05)
        self.pipe = pipe
        self.about = self._answer()
        return self.about

    def ask(self, what: str, ticks: int) -> dict[str, Any]:
        """Have so many turns timed or counted. Raises FailedError."""
        with suppress(OSError):  # it has ended, as the answer tells
            self.pipe.send((what, ticks))
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            while not self.pipe.poll(0.5):
                self._check()
            return self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.wait()
            raise FailedError(f"{self.name} has ended with {self.process.returncode}") from error

    def _check(self) -> None:
        if self.process.poll() is not None:
            raise FailedError(f"{self.name} has ended with {self.process.returncode}")
        if self.bench.left() < 0:
            raise FailedError(f"{self.name}: the time is over")

    def end(self) -> None:
        """Stop it, and keep what it said."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.bench.log(f"---- {self.name}\n$ {' '.join(self.side.command)}\n{self.output.read_text()[-20_000:]}")
        shutil.rmtree(self.folder, ignore_errors=True)


class Bench:
    """The queue, its clock, and what it has found."""

    def __init__(self, args: argparse.Namespace, device: dict[str, str]) -> None:
        self.args, self.device, self.ends = args, device, time.monotonic() + 60 * args.minutes - ENDING
        self.toy = args.rehearse
        card = re.sub(r"\W+", "_", device["device"].lower()).strip("_")
        self.file = args.out / f"gpu_{card}.json"
        args.out.mkdir(parents=True, exist_ok=True)
        known = [RESULTS / self.file.name] if not self.file.exists() else []
        self.rows = [row for path in [*known, self.file] if path.exists() for row in json.loads(path.read_text())]
        self.made: list[Row] = []
        self.said: list[str] = []  # what the end says besides the rows
        self.folder = Path(tempfile.mkdtemp())
        self.pipes: dict[str, Any] = {}
        self.listener = Listener(str(self.folder / "clock"), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()
        self.python_path: list[str] = []
        self.places = {"peers": str(args.peers.resolve()) if args.peers else "", "root": str(ROOT)}

    def _accept(self) -> None:
        with suppress(OSError):  # closed at the end
            while True:
                pipe = self.listener.accept()
                self.pipes[pipe.recv()] = pipe

    def left(self) -> float:
        """Seconds until measuring ends."""
        return self.ends - time.monotonic()

    def say(self, text: str) -> None:
        """On the screen and into the log."""
        print(text, flush=True)
        self.log(text)

    def log(self, text: str) -> None:
        with (self.args.out / "log.txt").open("a") as file:
            file.write(text + "\n")

    def prepare(self) -> None:
        """Install the wheels, and write the data that all sides learn from."""
        if self.args.wheels:
            target = str(self.folder / "site")
            wheels = sorted(self.args.wheels.glob("*.whl"))
            missing = [str(path) for path in wheels if not version_of(path.name.partition("-")[0])]
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            if missing:
                subprocess.run([*pip, "--target", target, *missing], check=True)
            self.say(f"installed {len(missing)} of {len(wheels)} wheels; the machine has the others")
            self.python_path.append(target)
            sys.path.append(target)
        self.places |= write_data(self.folder, self.toy)

    # ---- the queue ---------------------------------------------------------------------------------------------

    def run(self, jobs: list[Job]) -> None:
        """Job after job, as long as they fit."""
        for job in jobs:
            try:
                units = [unit for unit in map(self.wanted, job.units(self.toy)) if unit is not None]
                while units:
                    fitting = self.fitting(units, job.starting)
                    names = [unit.name for unit in units]
                    if not fitting:
                        self.say(f"{job.name}: {', '.join(names)}: left out, which does not fit any more")
                        break
                    self.say(f"{job.name}: {', '.join(names[:fitting])} ({self.left():.0f} s are left)")
                    self.measure(units[:fitting])
                    units = units[fitting:]
                if job.tests:
                    self.test(job)
            except Exception:
                self.fail(f"{job.name} FAILED", traceback.format_exc())

    def fitting(self, units: list[Unit], starting: float) -> int:
        """How many of the units to start together: as many as fit, on few cores one."""
        until = itertools.accumulate((unit.estimate for unit in units), initial=starting)
        number = sum(seconds <= self.left() for seconds in itertools.islice(until, 1, None))
        return min(number, 1) if self.toy else number

    def fail(self, what: str, details: str) -> None:
        self.log(details)
        self.say(f"{what}; see log.txt")
        self.said.append(what)

    def wanted(self, unit: Unit) -> Unit | None:
        """What of a unit is to be measured: pairs whose rows are not known; those whose peer is missing stand alone."""
        pairs = [self.given(pair, unit) for pair in unit.pairs]
        pairs = [pair for pair in dict.fromkeys(pairs) if self.args.again or not self.is_known(unit, pair)]
        return unit._replace(pairs=pairs) if pairs else None

    def given(self, pair: Pair, unit: Unit) -> Pair:
        """The pair, without its peer where there is no checkout."""
        side = unit.sides.get(pair.peer or "")
        if side is None or not side.repository:
            return pair
        if not self.args.peers or not (self.args.peers / side.repository).exists():
            return pair._replace(peer=None, why=f"no checkout of {side.repository} was given")
        return pair

    def is_known(self, unit: Unit, pair: Pair) -> bool:
        key = self.identity(unit, pair)
        names = [name for name in KNOWN_BY if name != "job" or unit.job != "launches"]  # for which every job counts
        return any(alike(row, key, names) for row in self.rows)

    def identity(self, unit: Unit, pair: Pair) -> Row:
        """What a row belongs to, and what it is known by."""
        ours, peer = unit.sides[pair.ours], unit.sides.get(pair.peer or "")
        row: Row = {"job": unit.job, "name": f"{pair.ours} / {pair.peer}" if pair.peer else pair.ours}
        row |= {"device": self.device["device"], "torch": self.device["torch"], "command": " ".join(ours.command)}
        row |= {"peer_command": " ".join(peer.command) if peer else None}
        row["peer_commit"] = self.commit_of(peer.repository) if peer and peer.repository else None
        return row

    def commit_of(self, repository: str) -> str | None:
        path = self.args.peers / repository / "COMMIT"
        return path.read_text().strip() if path.exists() else None

    # ---- measuring ---------------------------------------------------------------------------------------------

    def measure(self, units: list[Unit]) -> None:
        """Start the sides of some units together, then measure one unit after the other."""
        names = {(unit.name, name) for unit in units for pair in unit.pairs for name in (pair.ours, pair.peer) if name}
        sides = [(unit, name) for unit in units for name in unit.sides if (unit.name, name) in names]
        processes = {(unit.name, name): Process(name, unit.sides[name], self) for unit, name in sides}
        try:
            for unit in units:
                own = {name: process for (of, name), process in processes.items() if of == unit.name}
                self.measure_unit(unit, {name: process for name, process in own.items() if self.answers(process)})
        finally:
            for process in processes.values():
                process.end()

    def answers(self, process: Process, what: str = "", ticks: int = 0) -> dict[str, float] | None:
        """What a process answers, at first to nothing; None where it fails, which costs its rows alone."""
        try:
            return process.ask(what, ticks) if what else process.ready()
        except FailedError as error:
            self.fail(str(error), "")
            return None

    def measure_unit(self, unit: Unit, processes: dict[str, Process]) -> None:
        """The rounds of a unit, what its sides do in a turn, and its rows."""
        found: dict[str, list[dict[str, float]]] = {}
        for name, process in processes.items():  # the round that does not count tells how many turns to take
            if once := self.answers(process, "time", unit.first):
                wanted = 0.0 if self.toy else (unit.seconds or self.args.seconds) / once["seconds"]
                process.ticks, found[name] = unit.first * max(round(wanted), 1), []
        for round_ in range(self.args.rounds):
            began = self.left()
            for name in list(found)[:: -1 if round_ % 2 else 1]:
                answer = self.answers(processes[name], "time", processes[name].ticks)
                if answer is None:
                    del found[name]
                else:
                    found[name].append(answer | {"ticks": processes[name].ticks})
            if self.left() < 2 * (began - self.left()):  # for another one, and to count
                break
        counts = {name: self.answers(processes[name], "count", unit.counted) or {} for name in found}
        for pair in unit.pairs:
            if pair.peer and pair.peer not in found:
                pair = pair._replace(peer=None, why="the peer failed, see the log")
            if pair.ours in found:
                self.add(self.compared(unit, pair, found, counts, processes))
                if any(one["inside"] for one in found[pair.ours]):
                    outside = {name: [without(one) for one in rounds] for name, rounds in found.items()}
                    self.add(self.compared(unit, pair, outside, counts, processes, ", its environment left out"))

    def compared(self, unit: Unit, pair: Pair, found: Any, counts: Any, processes: Any, title: str = "") -> Row:
        """The row of a pair."""
        ours, theirs = found[pair.ours], found.get(pair.peer, [])
        row = self.identity(unit, pair) | {"unit": unit.what, "rounds": len(ours)}
        row["name"] = row["name"].replace(pair.ours, pair.ours + title, 1)
        row |= self.side_of("", unit, pair.ours, ours, counts, processes)
        row["peer"] = pair.peer
        if pair.peer:
            row |= self.side_of("peer_", unit, pair.peer, theirs, counts, processes)
            mine, other = unit.sides[pair.ours].samples, unit.sides[pair.peer].samples
            ratios = [rate(a, mine) / rate(b, other) for a, b in zip(ours, theirs, strict=True)]
            row |= {"ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
            row |= {"goal": pair.goal, "beyond": pair.beyond}
            row["reached"] = None if pair.goal is None else row["ratio"] >= pair.goal
        row["why"] = "; ".join(filter(None, [pair.why, reason(row) if row.get("reached") is False else ""]))
        if title:  # the counts are those of whole turns
            row = {key: value for key, value in row.items() if key.removeprefix("peer_") not in COUNTS}
        about = {key: value for key, value in self.device.items() if key not in row}
        return row | about | {"rehearsal": True} if self.toy else row | about

    def side_of(self, prefix: str, unit: Unit, name: str, rounds: Any, counts: Any, processes: Any) -> Row:
        """What is known of one side of a row."""
        samples = unit.sides[name].samples
        row: Row = {f"{prefix or 'ours_'}per_s": statistics.median(rate(one, samples) for one in rounds)}
        row[f"{prefix}memory_mb"] = max(one["memory"] for one in rounds)
        row[f"{prefix}learned"] = processes[name].about.get("learned")
        return row | {f"{prefix}{key}": value for key, value in counts.get(name, {}).items()}

    def test(self, job: Job) -> None:
        """Run the tests that need a GPU, as long as there is time."""
        row: Row = {"job": job.name, "name": job.tests, "command": f"pytest -q {job.tests}", "peer_command": None}
        row |= {"peer_commit": None, "peer": None, "why": "tests have no peer", **self.device}
        known = any(alike(old, row, (*KNOWN_BY, "commit")) for old in self.rows)
        if (known and not self.args.again) or (not self.toy and self.left() < job.starting):
            self.say(f"{job.name}: left out, " + ("its row is known" if known else "it does not fit any more"))
            return
        self.say(f"{job.name}: {job.tests} ({self.left():.0f} s are left)")
        path = os.pathsep.join([*self.python_path, os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", job.tests]
        command += ["-n", "4"] if importlib.util.find_spec("xdist") else []  # they wait for compilers and starts
        options: Any = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": path}, "timeout": min(self.left(), 1e6)}
        try:
            done = subprocess.run(command, **options, text=True, capture_output=True)
        except subprocess.TimeoutExpired as error:
            self.fail(f"{job.tests}: the time is over", str(error.stdout))
            return
        self.log(done.stdout + done.stderr)
        found = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
        numbers = {word: int(number) for number, word in found}
        self.add(row | {"tests": numbers, "reached": done.returncode == 0})

    def add(self, row: Row) -> None:
        """Keep a row, in the place of an older one of the same kind, or of one that had no peer yet."""
        alone = row | {"name": row["name"].partition(" / ")[0], "peer_command": None, "peer_commit": None}
        self.rows = [old for old in self.rows if not (alike(old, row, KNOWN_BY) or alike(old, alone, KNOWN_BY))] + [row]
        self.made.append(row)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.rows, indent=1) + "\n")
        temporary.replace(self.file)

    def finish(self) -> None:
        """The table of what was made now."""
        text = markdown(self.made) + "".join(f"\nNOT MADE: {line}" for line in self.said) + "\n"
        (self.args.out / "table.md").write_text(text)
        print(text, flush=True)
        self.listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def alike(row: Row, other: Row, names: Iterable[str]) -> bool:
    """Whether two rows have the same under these names."""
    return all(row.get(name) == other.get(name) for name in names)


def without(one: dict[str, float]) -> dict[str, float]:
    """A round without the environment's own time: action, memory and update."""
    return one | {"seconds": one["seconds"] - one["inside"], "inside": 0.0}


def rate(one: dict[str, float], samples: int) -> float:
    """What a side makes in a second."""
    return samples * one["ticks"] / one["seconds"]


def reason(row: Row) -> str:
    """Why a goal is missed, as far as the counts of both sides tell."""
    if "host_ms" not in row or "peer_host_ms" not in row:
        return "not counted"
    parts = [f"{row['host_ms']:.2f} ms a turn to issue it, the peer {row['peer_host_ms']:.2f}"]
    if row["kernels"]:
        parts.append(f"{row['device_ms']:.2f} ms in kernels, the peer {row['peer_device_ms']:.2f}")
        parts.append(f"{row['launches']:.0f} launches, the peer {row['peer_launches']:.0f}")
    busy = row["kernels"] and row["device_ms"] > 0.8 * row["host_ms"]
    return ("bound by the device: " if busy else "bound by the host: ") + "; ".join(parts)


def machine() -> dict[str, str]:
    """What the rows belong to."""
    found = {"device": "cpu", "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["driver"] = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["jax"] = version_of("jax")
    dirty = output_of("git", "status", "--porcelain", "-uno")
    found["commit"] = output_of("git", "rev-parse", "--short", "HEAD") + "-dirty" * bool(dirty)
    return found


def output_of(*command: str) -> str:
    """What a program says; nothing where it is missing or fails."""
    with suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return ""


def version_of(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return ""


def stored() -> Iterable[Row]:
    """The rows of all cards."""
    return itertools.chain.from_iterable(json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="from the start to the end, the table included")
    parser.add_argument("--out", type=Path, help="folder for rows, log and table")
    parser.add_argument("--peers", type=Path, help="folder of checkouts")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install for this run alone")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], help="jobs; by default all")
    parser.add_argument("--again", action="store_true", help="also rows that are known")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, on a CPU, without a limit")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.7, help="of a side in each round")
    parser.add_argument("--commit", default="", help="of this code, where there is no git")
    parser.add_argument("--table", action="store_true", help="print the rows of tests/results instead")
    args = parser.parse_args()
    if args.table:
        print(markdown(list(stored())))
        return 0
    if not args.out:
        parser.error("--out DIR is needed")
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("there is no GPU; use --rehearse")
    if args.rehearse:
        args.rounds, args.minutes = 1, 1e6
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is made is kept, what runs is stopped
    bench = Bench(args, machine() | ({"commit": args.commit} if args.commit else {}))
    try:
        bench.prepare()
        bench.run([job for job in JOBS if not args.only or job.name in args.only])
    finally:
        bench.finish()
    return 1 if args.rehearse and bench.said else 0


if __name__ == "__main__":
    sys.exit(main())
