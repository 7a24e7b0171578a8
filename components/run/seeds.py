"""`--seeds 0 1 2`: a run for each seed, one after the other, in RUN_DIR/seed-0 and so on, and a table of them.

Each run is a process of its own, on every rank, and has the environment of this one: a launch of several processes is
one for each run. The first rank decides what is done for a seed, and tells the others.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial, reduce
from inspect import getfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..acting.evaluation import score_of
from ..errors import UserError, crashes_pass
from ..intervals import number
from ..records import SeedsRecord, check_folder, read_record
from . import command_line as cli
from .config_file import slots, words_of
from .curves import draw_curves, read_lines
from .files import write_json
from .launch import again, last
from .process import SEVERAL, StopRequest, is_first
from .reading import read_args, read_status
from .record import claim, confirmations

RECORD = "seeds.json"
PATIENCE = 20.0  # seconds in which a run ends by itself when it has failed on another rank
NOT_COMPARED = ("seeds", "resume", "run_dir", "plugins")  # with what a seed was begun with


def spelled_out(argv: list[str]) -> list[str]:
    """A command line whose `--resume` names the folder of several seeds, as the `--seeds` that it stands for.

    Its options are those of a seed that has begun, by `--config`, whose rules hold: the folder may be a stranger's.
    Other command lines come back as they are.

    Raises:
        UserError: a damaged folder, one in which no seed has begun, options that contradict it, or no seeds at all.
    """
    if argv[-1:] == ["--seeds"] or any(a == "--seeds" and b[:2] == "--" for a, b in pairwise(argv)):
        raise UserError("--seeds: which? such as --seeds 0 1 2")
    at = [place for place, word in enumerate(argv) if word.partition("=")[0] == "--resume"]
    folder = Path((argv[at[-1]].partition("=")[2] or " ".join(argv[at[-1] + 1 : at[-1] + 2])) if at else "")
    if not at or (folder / "args.json").exists() or not (folder / RECORD).exists():
        return argv
    check_folder(folder)
    seeds = read_record(folder / RECORD, SeedsRecord, "resume the runs in it one by one")["seeds"]
    begun = [path for path in (folder / f"seed-{seed}" for seed in seeds) if (path / "args.json").exists()]
    if not begun:
        raise UserError(f"--resume {folder}: no seed has begun there; give the first command again")
    for option in ("run-dir", "config"):
        if cli.given(argv, option):
            raise UserError(f"--resume {folder} continues what is there; leave --{option} out")
    named = [] if cli.given(argv, "seeds") else ["--seeds", *map(str, seeds)]
    return ["--config", str(begun[0] / "args.json"), *cli.without(argv, "--resume"), *named, "--run-dir", str(folder)]


class Seeds:
    """The runs of several seeds.

    Args:
        args: The script's arguments, with `seeds`.
        argv: As they were typed.

    Raises:
        UserError: seeds that contradict themselves or another option.
    """

    def __init__(self, args: Any, argv: list[str]) -> None:
        self.args, self.seeds, self.script = args, list(args.seeds), Path(getfile(type(args)))
        self.argv = cli.without(cli.without(spelled_out(argv), "--seeds", several=True), "--run-dir")
        if cli.given(argv, "seed"):
            raise UserError("--seed and --seeds exclude each other; leave one of them out")
        for seed in self.seeds:
            if self.seeds.count(seed) > 1:
                raise UserError(f"--seeds: {seed} is there twice; each seed has one run")
            if seed < 0:
                raise UserError(f"--seeds: {seed} must be 0 or more")
        self.stop = StopRequest()
        self.stop.armed = True
        self.ranks = Ranks(self.stop)
        self.folder = Path()
        self.failed: list[int] = []
        self.over = False  # whether no other seed is begun

    def run(self) -> int:
        """Run what is left to do for each seed, and print the table; returns the exit code."""
        self.folder = Path(self.ranks.told("folder", self._open))
        code = 0
        for place, seed in enumerate(self.seeds):
            path = self.folder / f"seed-{seed}"
            task = self.ranks.told(f"seed {seed}", partial(self._task, seed, path))
            if task is None:
                break
            if not task:
                self._say(f"seed {seed} is finished already{result_of(path)}")
                continue
            self._say(f"seed {seed} ({place + 1} of {len(self.seeds)}): {path}")
            began = time.monotonic()
            code = self.ranks.run([sys.executable, str(self.script), *task], place)
            self._ended(seed, path, code, time.monotonic() - began)
        return self._conclude(code) if self.ranks.first else 0

    def _open(self) -> str:
        """The folder of all seeds, made and with its record."""
        name = f"{self.args.trainer}-{self.args.subject}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder = Path(claim(self.args.run_dir, name))
        known: Any = {"script": self.script.name, "seeds": []}
        if (folder / RECORD).exists():
            known = read_record(folder / RECORD, SeedsRecord, "choose another --run-dir")
        if known["script"] != self.script.name:
            raise UserError(f"--run-dir {folder} has seeds of {known['script']}; choose another folder")
        seeds = known["seeds"] + [seed for seed in self.seeds if seed not in known["seeds"]]
        write_json(folder / RECORD, known | {"seeds": seeds})
        return str(folder)

    def _task(self, seed: int, path: Path) -> list[str] | None:
        """The words of the run of a seed: to begin it or to resume it; none if it is finished, None to stop here.

        Raises:
            UserError: it was begun with an option that this command line cannot name.
        """
        if self.over or self.stop.asked:
            return None
        own = {"seed": str(seed), "run-dir": str(path)} | self._names(seed)
        if not (path / "args.json").exists():
            return [*self.argv, *(word for option, value in own.items() for word in (f"--{option}", value))]
        record: Any = read_args(path, made_by=self.script.name)
        # What neither this command line nor that of the run gives may have been chosen to fit the data.
        asked = [slot for slot in slots(self.args).values() if not slot.again and slot.option not in own]
        asked = [slot for slot in asked if self.args.given(slot.option) or cli.given(record["argv"], slot.option)]
        changes: list[str] = []
        for slot in asked:
            group = reduce(lambda options, name: options.get(name) or {}, slot.owners, record["args"])
            if slot.name in NOT_COMPARED or slot.name not in group:
                continue
            value = reduce(getattr, (*slot.owners, slot.name), self.args)
            if json.loads(json.dumps(value)) != group[slot.name]:
                words = words_of(slot.option, value, slot.hint)
                if not words:
                    was = f"{path} was begun with --{slot.option} {group[slot.name]}, and it is {value} now"
                    raise UserError(f"{was}; choose another --run-dir, or --resume {self.folder}")
                changes += words
        if read_status(path)["state"] == "finished" and not changes:
            return []
        return ["--resume", str(path), *changes, *confirmations(self.args)]  # which refuses changes that it cannot take

    def _names(self, seed: int) -> dict[str, str]:
        """Options by which the runs of the seeds keep apart, and together, elsewhere."""
        found = {}
        if self.args.track != "none":
            base = re.sub(r"-seed-\d+$", "", self.args.track_name) or self.folder.name
            found = {"track-name": f"{base}-seed-{seed}", "track-group": self.args.track_group or self.folder.name}
        if to := getattr(self.args, "save_dataset", ""):
            found["save-dataset"] = re.sub(r"/seed-\d+$", "", to) + f"/seed-{seed}"
        return found

    def _ended(self, seed: int, path: Path, code: int, seconds: float) -> None:
        """Report how the run of a seed ended, and whether others follow."""
        status = read_status(path)
        finished = code == 0 and status["state"] == "finished"
        self.over = self.stop.asked or code == 2 or (code == 0 and not finished)  # stopped, or refused
        if finished:
            self._say(f"seed {seed} finished in {seconds:.0f} s{result_of(path)}")
        elif not self.over:
            self.failed.append(seed)
            reason = status["reason"] if status["state"] == "failed" else f"its process ended with exit code {code}"
            self._say(f"seed {seed} failed: {reason}")

    def _conclude(self, code: int) -> int:
        """Print the table, or how to continue; returns the exit code."""
        begun = [path for path in (self.folder / f"seed-{s}" for s in self.seeds) if (path / "args.json").exists()]
        if not begun:  # as a run that does not begin
            (self.folder / RECORD).unlink(missing_ok=True)
            with suppress(OSError):  # a folder with other files stays
                self.folder.rmdir()
            if self.stop.asked:
                last("stopped before the first run began")
            return code
        states = [read_status(path)["state"] for path in begun]
        left = len(self.seeds) - states.count("finished")
        if not self.over:
            from ..report import runs_table

            print(runs_table(begun), flush=True)
            draw_curves(begun, self.folder / "curves.png")
        if left and code != 2:  # whoever was refused has said so, as its last line
            why = f"failed: {', '.join(map(str, self.failed))}" if self.failed else "stopped"
            how = again("--resume", self.folder, *confirmations(self.args))
            last(f"{left} of {len(self.seeds)} seeds are left ({why}); continue with: {how}")
        elif not left:
            self._say(f"finished: {self.folder}")
        return code if self.over else int(bool(self.failed))

    def _say(self, text: str) -> None:
        if self.ranks.first:
            print(text, flush=True)


def result_of(path: Path) -> str:
    """The last score of a run, for the end of a line; "" if it has none."""
    lines = read_lines(path / "eval.jsonl")
    score = score_of(lines[-1]) if lines else None
    return f": {score[0].replace('_', ' ')} {number(score[1])}" if score else ""


class Ranks:
    """What the processes of one launch tell each other between the runs, each of which has a group of its own.

    Args:
        stop: Of this process.
    """

    def __init__(self, stop: StopRequest) -> None:
        self.stop, self.first = stop, is_first()
        # The launcher's store outlives the runs, or else one of the first rank, at the port that it named. Each run has
        # a store of its own, at another port: in this one it would find what the run before it has left.
        theirs = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.store: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from torch.distributed import PrefixStore, TCPStore

            where = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            store = TCPStore(*where, is_master=self.first and not theirs, wait_for_workers=False)
            self.store = PrefixStore("tendon/seeds", store)

    def told(self, key: str, find: Callable[[], Any]) -> Any:
        """What the first rank finds, on every rank; if it fails to, the others end."""
        if self.store is None:
            return find()
        if self.first:
            try:
                found = find()
            except BaseException:
                self.store.set(key, json.dumps([]))
                raise
            self.store.set(key, json.dumps([found]))
            return found
        since = 0.0
        while not self.store.check([key]):  # in short steps, for the signals
            since = since or (time.monotonic() if self.stop.asked else 0.0)
            if since and time.monotonic() - since > PATIENCE:  # the first rank has gone
                raise SystemExit(1)
            time.sleep(0.1)
        if not (found := json.loads(self.store.get(key))):
            raise SystemExit(0)  # the first rank says why
        return found[0]

    def run(self, words: list[str], place: int) -> int:
        """Run a command, which stops when this process is asked to; returns its exit code.

        Args:
            place: Of the run among all; another number for each.
        """
        env = os.environ | {SEVERAL: str(os.getpid())}
        if self.store is not None:
            port = self.told(f"port {place}", lambda: free_port(int(env["MASTER_PORT"]) + place + 1))
            env |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(port)}
        # Until it has a handler of its own, Ctrl-C would end it with the traceback of an import.
        before = signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT) if crashes_pass() else signal.SIG_IGN)
        try:
            child = subprocess.Popen(words, env=env)
        finally:
            signal.signal(signal.SIGINT, before)
        # A terminal sends Ctrl-C to the run, too. SIGUSR1 asks it to stop, and never counts as a second signal.
        self.stop.last_words = lambda: child.send_signal(signal.SIGTERM)
        asked, failed, since = False, f"failed {place}", 0.0
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = child.wait(0.2)
                break
            if self.stop.asked and not asked:
                child.send_signal(signal.SIGUSR1)
                asked = True
            if self.store is not None and self.store.check([failed]):
                since = since or time.monotonic()
                if time.monotonic() - since > PATIENCE:  # it waits for a rank that has gone
                    child.kill()
        self.stop.last_words = lambda: None
        if code and self.store is not None:
            self.store.set(failed, str(code))
        return code if code >= 0 else 128 - code


def free_port(first: int) -> int:
    """The first port of this machine, from one on, that nobody listens at."""
    for port in range(first, 1 << 16):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    return first
