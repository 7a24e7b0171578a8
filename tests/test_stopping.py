"""Stopping on request, and runs that fail: what is saved, what is said, and who is left behind."""

import functools
import io
import json
import os
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from components import TRAINER_REGISTRY, UserError
from components.run import afterword, checkpoint, launch, process
from components.run.curves import read_lines
from components.run.process import StopRequest
from components.run.record import Run, confirmations, lock
from components.run.screen import Steadfast, steady
from components.run.watch import Watch
from conftest import ROOT, environ, learned, states, two_processes, weights
from screen import record

Script = Callable[..., Path]
OFFLINE = (ROOT / "offline_trainer.py", "--plugins", "toy", "--dataset", "toy", "--batch-size", 16)
ONLINE = (ROOT / "online_trainer.py", "--plugins", "toy", "--trainer", "sac", "--env", "savable", "--batch-size", 16)
TROUBLE = (*OFFLINE, "--trainer", "trouble", "--eval-episodes", 0, "--log-every", 10, "--steps", 100_000)
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--quiet")
TWO = ("--multi_gpu", "--num_processes", "2")


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


# ---- in this process -----------------------------------------------------------------------------------------------


@contextmanager
def signal_at(name: str, call: int, number: int) -> Iterator[None]:
    """Send this process a signal in the middle of a call of a trainer's `train_step`."""
    cls, count = TRAINER_REGISTRY[name], iter(range(10**9))
    whole = cls.train_step

    def train_step(self: Any, data: Any) -> Any:
        if next(count) == call:
            os.kill(os.getpid(), number)
        return whole(self, data)

    cls.train_step = train_step
    try:
        yield
    finally:
        cls.train_step = whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_saves_and_stops_at_the_next_step(script: Script, number: int) -> None:
    options = ("--trainer", "bc", "--steps", 40, "--model.dropout", 0.3, "--log-every", 7)
    whole = script(*options, folder="whole")
    with signal_at("bc", 12, number):
        run = script(*options)
    assert status(run) == {"state": "preempted", "step": 13, "reason": "stopped by a signal"}
    assert checkpoint.newest(run / "checkpoints")[1]["step"] == 13
    assert not (run / "policy").exists()
    script("--resume", run)
    assert states(run) == states(whole) and learned(run)[-1] == learned(whole)[-1]


def test_the_online_script_stops_likewise(online: Script) -> None:
    options = ("--env", "savable", "--steps", 80, "--trainer", "sac")
    whole = online(*options, folder="whole")
    with signal_at("sac", 12, signal.SIGTERM):
        run = online(*options)
    assert status(run)["state"] == "preempted" and status(run)["step"] == 34
    online("--resume", run)
    assert states(run) == states(whole)


@pytest.mark.parametrize("which", ["script", "online"])
def test_a_long_evaluation_does_not_hold_up_the_stop(
    which: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    threading.Timer(3.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    options = ("--eval-episodes", 10**6, "--eval-envs", 2, "--eval-every", 30, "--steps", 100, "--save-every", 0)
    run = request.getfixturevalue(which)(*options)
    assert time.monotonic() - began < 10
    assert status(run)["state"] == "preempted" and status(run)["step"] == 30
    assert re.search(rf"stopped at step 30; continue with: .* --resume {run}\n$", capsys.readouterr().out)
    assert checkpoint.newest(run / "checkpoints")[1]["step"] == 30
    assert not read_lines(run / "eval.jsonl") and not any(line["step"] == 30 for line in learned(run))


@pytest.mark.parametrize("at", ["held-out loss", "first", "last"])
@pytest.mark.parametrize("which", ["online", "script"])
def test_a_resumed_run_makes_up_for_the_evaluation_that_was_cut_short(
    which: str, at: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the run and at its end: the run is equal to one that never stopped."""
    train = request.getfixturevalue(which)
    if which == "online" and at == "held-out loss":
        pytest.skip("it has none")
    options = (*(("--trainer", "bc") if which == "script" else ("--env", "savable")), "--steps", 60)
    options = (*options, "--eval-every", 20, "--eval-episodes", 3, "--eval-envs", 2, "--save-every", 30)
    ticks, tick, stop_at = 0, Run.tick, -1

    def stopping(run: Run) -> None:
        nonlocal ticks
        ticks += 1
        if ticks == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        tick(run)

    monkeypatch.setattr(Run, "tick", stopping)
    whole = train(*options, folder="whole")
    each, ticks = ticks // 3, 0  # of one evaluation: batches of the held-out loss, then steps of the episodes
    stop_at = {"held-out loss": each + 1, "first": 10, "last": 2 * each + 10}[at]
    run = train(*options)
    assert status(run) == {"state": "preempted", "step": {"held-out loss": 40, "first": 20, "last": 60}[at]} | {
        "reason": "stopped by a signal"
    }
    train("--resume", run)
    assert status(run)["state"] == "finished"
    assert learned(run) == learned(whole) and states(run) == states(whole)
    assert read_lines(run / "eval.jsonl") == read_lines(whole / "eval.jsonl")


def test_an_environment_that_hangs_does_not_hold_up_the_stop(
    online: Script, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "PATIENCE", 1.0)
    threading.Timer(2.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    run = online("--env", "faulty", "--env.kind", "hang", "--env.at", 17, "--steps", 60)  # its timeout is 60 s
    assert time.monotonic() - began < 10
    assert status(run)["state"] == "preempted" and status(run)["step"] == 34
    assert re.search(
        r"environment 1 \(seed.* did not come back from step within [123](\.\d+)? s", capsys.readouterr().out
    )


def test_before_the_run_has_begun_a_signal_leaves_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, 0)
    with pytest.raises(SystemExit) as stop, run:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert stop.value.code == 143


def test_one_request_sent_twice_is_one_request() -> None:
    stop = StopRequest()
    stop.armed = True
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
        time.sleep(0.001)
    stop.asked_at -= 10
    os.kill(os.getpid(), signal.SIGUSR1)  # the launcher's end is no second request, however late
    os.kill(os.getpid(), signal.SIGHUP)  # nor is the terminal's, which launchers pass on
    time.sleep(0.001)
    assert stop.asked


def test_what_nohup_ignores_is_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopRequest()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_the_last_recording_does_not_hold_up_the_stop(
    online: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    data = ("--save-dataset", tmp_path / "data", "--save-format", "lerobot", "--save-episodes", 4)
    ticks, tick = iter(range(10**9)), Run.tick

    def stopping(run: Run) -> None:
        if next(ticks) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        tick(run)

    monkeypatch.setattr(Run, "tick", stopping)
    run = online(*data, "--env", "savable")
    assert status(run) == {"state": "preempted", "step": 60, "reason": "stopped by a signal"}
    assert not (tmp_path / "data").exists() and not (run / "policy").exists()
    online("--resume", run)
    assert status(run)["state"] == "finished" and (tmp_path / "data").exists() and (run / "policy").exists()


# ---- the screen ----------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_ends_nothing() -> None:
    reader, writer = os.pipe()
    stream = Steadfast(os.fdopen(writer, "w", buffering=1))
    print("read", file=stream, flush=True)
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)
    for _ in range(3):
        print("nobody reads this", file=stream, flush=True)
    os.write(writer, b"nor what a library writes by itself")
    stream.close()
    print("nor after the end", file=stream, flush=True)


def test_a_character_that_the_screen_lacks_is_replaced() -> None:
    shown = io.BytesIO()
    stream = Steadfast(io.TextIOWrapper(shown, "ascii"))
    print("runs/l\u00e4uft-\u65e5", "\udcc3", file=stream, flush=True)
    assert shown.getvalue() == b"runs/l\\xe4uft-\\u65e5 \\udcc3\n"


def test_a_screen_that_was_closed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    steady()
    print("nowhere", file=sys.stderr, flush=True)
    assert not sys.stderr.isatty()


# ---- how a run is continued, and when that is said -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "argv", "words"),
    [
        ("python train.py --trainer bc", "train.py --trainer bc", "python train.py"),
        ("python -m pdb train.py --debug", "train.py --debug", "python -m pdb train.py"),
        (
            "/opt/bin/python /opt/bin/tool launch --multi_gpu train.py a",
            "train.py a",
            "tool launch --multi_gpu train.py",
        ),
        ("/opt/bin/python -u train.py", "train.py", "python -u train.py"),
        (
            "/another/python -m tool.launch -m train a b",
            "/home/train.py a b",
            "/another/python -m tool.launch -m train",
        ),
        ("python tool.py", "train.py a", ""),
    ],
)
def test_the_words_that_started_a_script(command: str, argv: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/bin/{name}")
    assert " ".join(launch.script_of(command.split(), argv.split())) == words


def test_the_command_to_copy_is_that_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--steps", "3"])
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "3"])
    again = lambda: launch.again("--resume", "my runs/x")  # noqa: E731
    parent: Any = SimpleNamespace(cmdline=lambda: [], environ=lambda: {"ACCELERATE_USE_CPU": "1"})
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda number: parent))
    try:
        launch.started.cache_clear()
        assert again() == "python train.py --resume 'my runs/x'" and not launch.hint()
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
        monkeypatch.setenv("HF_HOME", "/nowhere")
        parent.cmdline = lambda: ["python", "/bin/accelerate", "launch", "--num_processes", "2", *sys.argv]
        launch.started.cache_clear()
        assert again().startswith("ACCELERATE_USE_CPU=1 ")
        assert again().endswith("accelerate launch --num_processes 2 train.py --resume 'my runs/x'")
        assert launch.started().launcher == os.getppid()
        parent.cmdline = lambda: ["zsh"]  # which a script of the user's started below a launch
        launch.started.cache_clear()
        assert again() == "accelerate launch train.py --resume 'my runs/x'" and not launch.started().launcher
        monkeypatch.setenv("WORLD_SIZE", "4")
        parent.cmdline = lambda: 1 / 0  # another system
        launch.started.cache_clear()
        assert again() == "accelerate launch --multi_gpu --num_processes 4 train.py --resume 'my runs/x'"
        assert "export ACCELERATE_LOG_LEVEL=error" in launch.hint()
        monkeypatch.setenv("ACCELERATE_LOG_LEVEL", "error")
        assert not launch.hint()
    finally:
        launch.started.cache_clear()


@pytest.mark.parametrize("ended", [False, True])
def test_on_a_terminal_the_last_line_is_for_after_the_launcher(
    ended: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(launch, "started", lambda: launch.Start(("x",), (), os.getppid() + ended))
    monkeypatch.setattr(launch.subprocess, "Popen", lambda words, stdout: started.append((words[-1], stdout)))
    launch.last("to a file")
    assert capsys.readouterr().out == "to a file\n" and not started
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
        monkeypatch.setattr(stream, "fileno", lambda: 7)
    launch.last("stopped\x1b[2J")
    launch.last("error: x", error=True)
    shown = capsys.readouterr()
    if ended:  # the shell's prompt may stand in the line
        assert not started and (shown.out, shown.err) == ("\nstopped\\x1b[2J\n", "\nerror: x\n")
    else:
        assert started == [("stopped\\x1b[2J", 7), ("error: x", 7)] and not shown.out + shown.err


def test_a_resume_repeats_what_its_run_may_not_decide_alone() -> None:
    reaching = SimpleNamespace(id="mine:Env-v0", kwargs=("file=a b", "n=1"))
    reaching.reaches = lambda: [("id", "mine", ""), ("kwargs", "", ""), ("kwargs", "", "")]
    args = SimpleNamespace(plugins=("toy",), env_options=reaching, dataset_options=SimpleNamespace())
    assert confirmations(args) == ["--plugins", "toy", "mine", "--env.kwargs", "file=a b", "n=1"]
    assert confirmations(SimpleNamespace(plugins=(), env_options=None, dataset_options=None)) == []


def test_the_last_line_waits_for_a_process_that_is_about_to_end(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    # Its own handler, since a process that is started below `nohup ... &` ignores SIGINT.
    code = "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "print('ready', flush=True); sys.stdin.read(); "
    code += "signal.signal(signal.SIGINT, signal.SIG_DFL); sys.stdin.close(); time.sleep(60)"
    launcher = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert launcher.stdout is not None and launcher.stdin is not None and launcher.stdout.readline() == b"ready\n"
    line = subprocess.Popen([sys.executable, "-I", "-S", afterword.__file__, str(launcher.pid), "the end"], stdout=-1)
    assert line.stdout is not None and afterword.state_of(launcher.pid) == "speaks"
    assert not select.select([line.stdout], [], [], 0.3)[0]
    for number in (signal.SIGINT, signal.SIGHUP):  # which a terminal sends to it, too
        line.send_signal(number)
    launcher.stdin.close()
    assert line.stdout.read() == b"the end\n" and launcher.poll() is None
    launcher.kill()
    launcher.wait()
    assert afterword.state_of(launcher.pid) == "ended"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTOU)]
    afterword.main(launcher.pid, "below a prompt")
    for number, handler in zip((signal.SIGINT, signal.SIGHUP, signal.SIGTTOU), handlers, strict=True):
        signal.signal(number, handler)
    assert capfdbinary.readouterr().out == b"\nbelow a prompt\n"


# ---- who hangs, and who waits --------------------------------------------------------------------------------------


def watched(folder: Path, rank: int, frame: Any, silent: float = 0.0) -> list[tuple[str, str, bool]]:
    """What a process of two says, that has made no progress for so long, and whose main thread is at `frame`."""
    said: list[tuple[str, str, bool]] = []
    watch = Watch(folder, rank, 10.0, lambda *words: said.append(words))
    watch.world, watch.beaten_at = 2, time.monotonic() - silent
    watch.look(frame)
    return said


def waiting() -> Any:
    """A frame below torch.distributed."""
    names: dict[str, Any] = {}
    source = os.path.join("torch", "distributed", "distributed_c10d.py")
    exec(compile("import sys\ndef all_reduce(): return sys._getframe()", source, "exec"), names)
    return names["all_reduce"]()


def test_who_waits_names_the_process_that_did_not_come(tmp_path: Path) -> None:
    here = sys._getframe()
    assert not watched(tmp_path, 0, here, 9.0)
    assert not watched(tmp_path, 0, waiting(), 12.0)  # whoever hangs speaks first
    (reason, stack, alone) = watched(tmp_path, 0, here, 12.0)[0]
    assert re.match(r"process 0 hangs at \S+test_stopping.py:\d+: no progress for 12 s", reason) and not alone
    assert "test_who_waits" in stack
    assert not watched(tmp_path, 0, waiting(), 14.0)  # nothing is known of the other, which may have just stopped
    (reason, _, _) = watched(tmp_path, 0, waiting(), 19.0)[0]
    assert reason.startswith("process 0 waits for the others at ") and "hangs" not in reason
    watched(tmp_path, 1, here)
    (reason, _, _) = watched(tmp_path, 0, waiting(), 14.0)[0]
    assert re.match(r"process 1 did not come: it is at \S+test_stopping.py:\d+ \(process 0 waits", reason)
    watched(tmp_path, 0, here)
    os.utime(tmp_path / ".alive-rank0", (1, 1))  # the first one is stopped: the second speaks for it
    (reason, _, alone) = watched(tmp_path, 1, waiting(), 14.0)[0]
    assert "process 0 did not come: no sign of life for" in reason and alone
    watched(tmp_path, 0, waiting())
    assert not watched(tmp_path, 1, waiting(), 14.0)
    assert watched(tmp_path, 1, waiting(), 19.0)[0][0].startswith("process 1 waits for the others")


# ---- the disk ------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_named_when_a_run_is_resumed(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = script("--trainer", "bc", "--steps", 20, "--log-every", 5)
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 25}\n')
    for file, remedy in ((".lock", "free space"), ("metrics.jsonl", "free space on its disk"), ("args.json", "free")):
        with monkeypatch.context() as patch:
            disk = Full(patch, re.escape(file))
            patch.setattr(Path, "write_bytes", lambda path, data, disk=disk: disk.open(path, "w"))
            with pytest.raises(UserError, match=f"{file} cannot be .*No space left on device.*{remedy}"):
                script("--resume", run, "--steps", 30)


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path: Path) -> None:
    """Killed runs leave environments that hang; they were forked while the folder was locked."""
    code = "import os, sys, time; from pathlib import Path; from components.run.record import lock; "
    code += "held = lock(Path(sys.argv[1])); child = os.fork(); child or time.sleep(60); print(child, flush=True); "
    code += "os.kill(os.getpid(), 9)"
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environ(), stdout=-1)
    assert killed.stdout is not None
    child = int(killed.stdout.readline())
    killed.wait(30)
    try:
        assert alive(child)
        lock(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)


HANGS_IN_C = """
import ctypes, os, sys, time
import gymnasium as gym
import toy
from components.envs.workers import spread

class Hung(toy.ToyEnv):
    def step(self, action):
        os.write(1, b"%d\\n" % os.getpid())
        ctypes.PyDLL(None).sleep(1000)  # it keeps the interpreter's lock, so that no thread runs

envs = spread(lambda n, seed: gym.vector.SyncVectorEnv([Hung] * n), 2, 0, 2)
envs.reset(seed=0)
envs.step(envs.action_space.sample())
"""


@pytest.mark.launched
def test_a_worker_that_hangs_ends_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    words, path = (sys.executable, "-c", HANGS_IN_C), os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    trainer = subprocess.Popen(words, cwd=tmp_path, env=environ(PYTHONPATH=path), stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    workers = [int(trainer.stdout.readline()) for _ in range(2)]
    assert all(map(alive, workers))
    trainer.kill()
    trainer.wait()
    limit = time.monotonic() + 5
    while any(map(alive, workers)) and time.monotonic() < limit:
        time.sleep(0.01)
    assert not any(map(alive, workers))


class Full:
    """A disk without room for a while."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: str) -> None:
        self.full, self.files, self.whole = True, re.compile(files), open
        monkeypatch.setattr("builtins.open", self.open)

    def open(self, file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if self.full and set(mode) & set("wa") and self.files.search(str(file)):
            raise OSError(28, "No space left on device")
        return self.whole(file, mode, *arguments, **keywords)


def test_a_full_disk_loses_no_line_of_the_log(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Full(monkeypatch, r"metrics.jsonl|eval.jsonl|status.json-new")
    saves = checkpoint.save

    def save(root: Path, step: int, *arguments: Any) -> None:
        disk.full = step < 30
        saves(root, step, *arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    run = script("--trainer", "bc", "--steps", 40, "--log-every", 5, "--save-every", 10)
    out = capsys.readouterr().out
    assert "metrics.jsonl CANNOT BE WRITTEN (No space left on device), its lines are kept" in out
    assert "CHECKPOINT AT STEP 10 FAILED, 1 in a row" in out and "CHECKPOINT AT STEP 20 FAILED, 2 in a row" in out
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == list(range(5, 41, 5))
    assert status(run)["state"] == "finished"


def test_no_float64_where_apple_has_none(online: Script, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's MPS lacks float64: none may come up in a batch, in an update, or in what acts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from components.acting.policy import Policy
    from components.data.normalisation import Normaliser

    calls: list[str] = []

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                assert not (isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64), function
            return out

    def watched(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        @functools.wraps(whole)
        def method(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            with NoFloat64():
                return whole(*arguments, **keywords)

        monkeypatch.setattr(owner, name, method)

    for trainer in ("bc", "sac"):
        watched(TRAINER_REGISTRY[trainer], "train_step")
    watched(Normaliser, "__call__")
    watched(Policy, "_forward")
    watched(torch.optim.Optimizer, "zero_grad")
    online("--eval-episodes", 2, "--trainer.n-step", 2, "--steps", 40)
    script("--trainer", "bc", "--steps", 4, "--eval-episodes", 2, folder="offline")
    assert {"train_step", "__call__", "_forward", "zero_grad"} <= set(calls)


# ---- real processes ------------------------------------------------------------------------------------------------


class Job:
    """A command line in a process group of its own."""

    def __init__(self, *words: object, cwd: Path, cpu: bool = False, **options: Any) -> None:
        env = environ(**({"ACCELERATE_USE_CPU": "true"} if cpu else {}))
        texts = [str(word) for word in words]
        self.out = open(cwd / "out.txt", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            texts, cwd=cwd, env=env, stdout=self.out, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        self.run = cwd / "run"

    def wait_for_line(self, count: int = 1) -> None:
        """Until the run is under way."""
        self._until(lambda: len(read_lines(self.run / "metrics.jsonl")) >= count, 90)

    def end(self, seconds: float) -> int:
        """The exit code; fails when it takes longer."""
        return self.process.wait(seconds)

    def worker(self) -> int:
        """Process number of rank 0."""
        return int((self.run / ".lock").read_text())

    def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit and self.process.poll() is None, self.text()
            time.sleep(0.05)

    def text(self) -> str:
        return Path(self.out.name).read_text()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def members(session: int) -> set[int]:
    """The living processes of a session, and of the sessions that its members have started."""
    found = {session}
    for _ in range(4):
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[1]) in found or int(fields[3]) in found:
                found.add(int(path.parent.name))
    return {pid for pid in found if alive(pid)}


real = [pytest.mark.slow, pytest.mark.launched]


@pytest.mark.launched
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_launch_of_one_leaves_no_orphan(tmp_path: Path, number: int) -> None:
    job = Job(*LAUNCH, *TROUBLE, "--run-dir", "run", cwd=tmp_path)
    job.wait_for_line()
    worker = job.worker()
    assert alive(worker) and worker != job.process.pid
    job.process.send_signal(number)
    job.end(25)
    limit = time.monotonic() + 25
    while alive(worker) and time.monotonic() < limit:
        time.sleep(0.05)
    assert not alive(worker)
    assert status(job.run)["state"] == "preempted"
    assert checkpoint.newest(job.run / "checkpoints")[1]["step"] == status(job.run)["step"]


@pytest.mark.slow
@pytest.mark.launched
def test_a_process_that_raises_ends_the_job(tmp_path: Path) -> None:
    options = ("--trainer.kind", "raise", "--run-dir", "run")
    job = Job(*LAUNCH, *TWO, *TROUBLE, *options, cwd=tmp_path, cpu=True)
    job.wait_for_line(4)
    assert job.end(15) != 0
    assert "ArithmeticError: trouble" in (job.run / "error-rank1.txt").read_text()
    assert job.text().count("error: process 1: ArithmeticError: trouble") == 1
    assert status(job.run)["state"] == "failed" and "see run/error-rank1.txt" in status(job.run)["reason"]


@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
@pytest.mark.slow
@pytest.mark.launched
def test_ctrl_c_ends_with_the_command_that_continues(tmp_path: Path, several: bool) -> None:
    """Whatever the launcher prints: here the last line is the run's, and can be copied."""
    launcher = (shutil.which("accelerate") or "accelerate", "launch", *(TWO if several else ()))
    env = {"ACCELERATE_USE_CPU": "true"} if several else {}
    under_way = lambda: len(read_lines(tmp_path / "my run" / "metrics.jsonl")) > 1  # noqa: E731
    words = (*launcher, *TROUBLE, "--run-dir", "my run")
    terminal = record(words, 100, [(under_way, "\x03")], cwd=tmp_path, env=environ(TERM="xterm", **env))
    assert not terminal.keys and terminal.text.count("stopping: the run is saved first") == 1
    assert "Traceback" in terminal.text  # the launcher's own
    joined = "".join(line.ljust(100) for line in terminal.screens[-1].lines[-4:]).rstrip()
    command = f"{OFFLINE[0]} --resume 'my run' --plugins toy"
    start = (
        "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" if several else "accelerate launch"
    )
    assert re.search(rf"stopped at step \d+; continue with: {start} {re.escape(command)}$", joined), terminal.text
    assert status(tmp_path / "my run")["state"] == "preempted"


@pytest.mark.slow
@pytest.mark.launched
def test_a_debugger_reaches_the_crash(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "from components import TRAINER_REGISTRY\n"
        "from components.trainers.bc import BC\n"
        "class Broken(BC):\n"
        "    def train_step(self, data, iterations):\n"
        "        if iterations == 2: breakpoint()\n"
        "        broken = 'right here'\n"
        "        return super().train_step(data) | ({'x': 1 / 0} if iterations == 4 else {})\n"
        "TRAINER_REGISTRY['broken'] = Broken\n"
    )
    words = (*OFFLINE[:2], "toy", "broken", *OFFLINE[3:], "--trainer", "broken", "--debug", "--eval-episodes", 0)
    pdb = r"\(Pdb\) "
    keys = [(pdb, "c\n"), (pdb, "\x03"), (pdb, "p iterations\n"), (pdb, "c\n"), (f"post mortem.*{pdb}", "p broken\n")]
    keys += [(pdb, "q\n"), (f"restarted.*{pdb}", "q\n")]
    there = {"cwd": tmp_path, "env": environ(TERM="xterm")}
    terminal = record((sys.executable, "-m", "pdb", *words), 100, keys, **there)
    assert not terminal.keys and terminal.code == 0
    assert "ZeroDivisionError: division by zero" in terminal.text and "'right here'" in terminal.text
    alone = record((sys.executable, *words), 100, [(pdb, "q\n")], **there)
    assert not alone.keys and alone.code == 1 and "Traceback" not in alone.text


class TestRealProcesses:
    """Minutes long."""

    pytestmark = real

    @pytest.mark.parametrize("words", [TROUBLE, ONLINE], ids=["offline", "online"])
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_to_the_script_itself(self, tmp_path: Path, words: tuple, number: int) -> None:
        job = Job(sys.executable, *words, "--steps", 10**6, "--run-dir", "run", cwd=tmp_path)
        job.wait_for_line(3)
        job.process.send_signal(number)
        assert job.end(25) == 0
        assert status(job.run)["state"] == "preempted"
        assert checkpoint.newest(job.run / "checkpoints")[1]["step"] == status(job.run)["step"]

    @pytest.mark.parametrize("words", [TROUBLE, ONLINE], ids=["offline", "online"])
    @pytest.mark.parametrize("how", ["SIGTERM to the launcher", "SIGKILL to the launcher", "SIGINT to the group"])
    def test_a_signal_to_a_launch_of_two(self, tmp_path: Path, words: tuple, how: str) -> None:
        options = ("--steps", 10**6, "--run-dir", "run")
        job = Job(*LAUNCH, *TWO, *words, *options, cwd=tmp_path, cpu=True)
        job.wait_for_line(3)
        processes = members(job.process.pid)
        number = getattr(signal, how.split()[0])
        if how.endswith("group"):
            os.killpg(job.process.pid, number)
        else:
            job.process.send_signal(number)
        limit = time.monotonic() + 25
        while any(alive(pid) for pid in processes) and time.monotonic() < limit:
            job.process.poll()
            time.sleep(0.05)
        assert status(job.run)["state"] == "preempted"
        folder, manifest = checkpoint.newest(job.run / "checkpoints")
        assert manifest["step"] == status(job.run)["step"] and manifest["world_size"] == 2
        assert {"rank-0.safetensors", "rank-1.safetensors"} <= set(manifest["files"])
        assert not [pid for pid in processes if alive(pid)]

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_leaves_at_once(self, tmp_path: Path, number: int) -> None:
        options = ("--trainer.kind", "hang", "--trainer.rank", 0, "--run-dir", "run")
        job = Job(sys.executable, *TROUBLE, *options, cwd=tmp_path)
        job.wait_for_line(4)
        time.sleep(1)
        job.process.send_signal(number)
        time.sleep(1)
        assert job.process.poll() is None
        job.process.send_signal(number)
        assert job.end(2) == 128 + number
        assert status(job.run)["state"] == "preempted" and "second signal" in status(job.run)["reason"]

    def test_a_launcher_that_is_killed_at_once_leaves_no_orphan(self, tmp_path: Path) -> None:
        job = Job(*LAUNCH, *TROUBLE, "--run-dir", "run", cwd=tmp_path)
        job._until(lambda: len(members(job.process.pid)) == 2, 60)
        (worker,) = members(job.process.pid) - {job.process.pid}
        job.process.kill()
        job.end(5)
        limit = time.monotonic() + 25
        while alive(worker) and time.monotonic() < limit:
            time.sleep(0.05)
        assert not alive(worker)

    def test_what_the_user_can_mend_on_one_process_alone_is_said_by_that_one(self, tmp_path: Path) -> None:
        words = (*ONLINE[:-4], "--env", "faulty", "--env.kind", "rank 1", "--run-dir", "run")
        job = Job(*LAUNCH, *TWO, *words, cwd=tmp_path, cpu=True)
        assert job.end(60) != 0
        assert job.text().count("error: process 1: env 'faulty': OSError: no licence on this machine") == 1
        assert "no licence on this machine" in (job.run / "error-rank1.txt").read_text()

    def test_a_process_that_is_killed_ends_the_job(self, tmp_path: Path) -> None:
        job = Job(*LAUNCH, *TWO, *TROUBLE, "--trainer.kind", "die", "--run-dir", "run", cwd=tmp_path, cpu=True)
        job.wait_for_line(4)
        processes = members(job.process.pid)
        assert job.end(15) != 0 and status(job.run)["state"] == "failed"
        assert not [pid for pid in processes if alive(pid)]

    @pytest.mark.parametrize("launcher", [(), (*LAUNCH[1:], *TWO)], ids=["alone", "two"])
    def test_a_hang_ends_at_the_stated_timeout(self, tmp_path: Path, launcher: tuple) -> None:
        rank = 1 if launcher else 0
        options = ("--trainer.kind", "hang", "--trainer.rank", rank, "--hang-timeout", 5, "--run-dir", "run")
        job = Job(sys.executable, *launcher, *TROUBLE, *options, cwd=tmp_path, cpu=bool(launcher))
        job.wait_for_line(4)
        assert job.end(20) == 1
        text = (job.run / f"error-rank{rank}.txt").read_text()
        assert f"process {rank} hangs at " in text and "toy.py" in text and "time.sleep(1000)" in text
        assert f"error: process {rank} hangs at " in job.text()
        assert status(job.run)["state"] == "failed" and "--hang-timeout" in status(job.run)["reason"]

    def test_a_process_that_is_stopped_is_named_by_the_other(self, tmp_path: Path) -> None:
        options = ("--trainer.kind", "stop", "--trainer.rank", 0, "--hang-timeout", 4, "--run-dir", "run")
        job = Job(*LAUNCH, *TWO, *TROUBLE, *options, cwd=tmp_path, cpu=True)
        job.wait_for_line(4)
        job._until(lambda: "error:" in job.text(), 25)
        assert "error: process 0 did not come: no sign of life for " in job.text()
        assert status(job.run)["state"] == "failed" and "process 0 did" in status(job.run)["reason"]
        for pid in members(job.process.pid):
            os.kill(pid, signal.SIGKILL)

    def test_a_screen_that_goes_away_or_lacks_characters_ends_no_run(self, tmp_path: Path) -> None:
        words = [str(word) for word in (sys.executable, *OFFLINE, "--trainer", "bc", "--steps", 60, "--log-every", 5)]
        run = tmp_path / "l\u00e4uft-\u65e5"
        job = subprocess.Popen(
            [*words, "--run-dir", str(run)], env=environ(PYTHONIOENCODING="ascii"), stdout=-1, stderr=-1
        )
        assert job.stdout is not None and b"l\\xe4uft-\\u65e5" in job.stdout.readline()
        job.stdout.close()
        assert job.wait(60) == 0 and status(run)["state"] == "finished"

    def test_two_runs_in_one_folder(self, tmp_path: Path) -> None:
        job = Job(sys.executable, *TROUBLE, "--run-dir", "run", cwd=tmp_path)
        job.wait_for_line()
        words = [str(word) for word in (sys.executable, *OFFLINE[:3], "--resume", "run")]
        second = subprocess.run(words, cwd=tmp_path, env=environ(), capture_output=True, text=True)
        in_use = f"error: run is in use by process {job.worker()}"
        assert second.returncode == 2 and second.stderr.count(in_use) == 1
        pair = two_processes(*OFFLINE[:3], "--resume", "run", cwd=tmp_path)
        assert pair.returncode != 0 and pair.stderr.count("error:") == pair.stderr.count(in_use) == 1
        assert not list(job.run.glob("error-rank*.txt"))  # those would be the first run's
        job.process.kill()
        job.end(5)
        again = Job(sys.executable, *OFFLINE[:3], "--resume", "run", "--steps", 60, cwd=tmp_path)
        assert again.end(60) == 0  # the lock went with its process

    def test_a_disk_without_room_stops_the_run_and_costs_no_checkpoint(self, tmp_path: Path) -> None:
        options = ("--trainer", "bc", "--eval-episodes", 0, "--save-every", 10, "--run-dir", "run")
        assert Job(sys.executable, *OFFLINE, *options, "--steps", 20, cwd=tmp_path).end(60) == 0
        before = weights(tmp_path / "run")
        small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
        job = Job(sys.executable, *OFFLINE[:3], "--resume", "run", "--steps", 100, cwd=tmp_path, preexec_fn=small)
        assert job.end(60) == 1
        for count, step in ((1, 30), (2, 40), (3, 50)):
            assert f"CHECKPOINT AT STEP {step} FAILED, {count} in a row, older ones are kept" in job.text()
        assert "60 FAILED" not in job.text() and status(job.run)["state"] == "failed"
        folder, manifest = checkpoint.newest(job.run / "checkpoints")
        assert manifest["step"] == 20 and all(
            torch.equal(value, before[key]) for key, value in weights(job.run).items()
        )
        assert not list((job.run / "checkpoints").glob(".tmp-*"))


def test_the_first_line_of_an_error_and_its_notes_are_all_that_is_shown() -> None:
    noted = ValueError("one\ntwo")
    noted.add_note("see three")
    assert process.in_one_line(noted) == "one; see three" and process.in_one_line(ValueError()) == "no message"
