"""Fixtures: the scripts in this process, and one job of two processes for everything that needs them."""

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import offline_trainer  # noqa: E402
import online_trainer  # noqa: E402
import toy  # noqa: E402, F401  (registers the components that the tests use)
from components import DATASET_BUILDER_REGISTRY  # noqa: E402
from components.datasets.recognise import recognise  # noqa: E402
from components.errors import let_through  # noqa: E402
from components.run import checkpoint  # noqa: E402
from components.run import record as run_record  # noqa: E402
from components.run.curves import read_lines  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start processes come last."""
    items.sort(key=lambda item: item.get_closest_marker("launched") is not None)
    gc.freeze()  # what is imported by now stays: a collection that looks at all of it takes 160 ms


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """The scripts install theirs; each test finds Python's own."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup pytest` ignores
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def crashes_in_one_line() -> Iterator[None]:
    """`--debug` lets them through, in the tests that follow, too."""
    yield
    let_through(False)


@pytest.fixture
def curves() -> None:
    """For the tests that look at a run's curves."""


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing them takes longer than the small trainings here, so the other tests go without."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(run_record, "draw_curves", lambda runs, path: None)


class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel: all but views and empty memory."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.number += bool(tensors) and not func.is_view and "empty" not in func.name()
        return result


def fill(argv: list[str], defaults: dict[str, object]) -> list[str]:
    """The command line with the options that it does not set."""
    missing = {} if "--resume" in argv else {key: value for key, value in defaults.items() if key not in argv}
    return [*argv, *(str(word) for pair in missing.items() for word in pair)]


def in_this_process(main: Callable[[list[str]], int], argv: list[str]) -> None:
    """Run a script's `main` as if it were the first one here."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    main(argv)


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Run the offline script in this process on the toy data; returns its run folder."""

    def run(*options: object, folder: str = "run") -> Path:
        small = {"--run-dir": tmp_path / folder, "--dataset": "toy", "--batch-size": 16, "--eval-episodes": 0}
        in_this_process(offline_trainer.main, fill([str(option) for option in options], small))
        return tmp_path / folder

    return run


ONLINE = {"--trainer": "sac", "--env": "gymnasium", "--num-envs": 2, "--batch-size": 16, "--learning-starts": 20}
ONLINE |= {"--steps": 60, "--eval-episodes": 0}


@pytest.fixture
def online(tmp_path: Path) -> Callable[..., Path]:
    """Run the online script in this process on the toy environment, with small networks; returns its run folder."""

    def run(*options: object, folder: str = "run") -> Path:
        argv = [str(option) for option in options]
        own = {k: v for k, v in ONLINE.items() if k != "--learning-starts" or "ppo" not in argv}
        argv = fill(argv, {"--run-dir": tmp_path / folder, **own})
        if "--resume" not in argv and argv[argv.index("--env") + 1] == "gymnasium" and "--env.id" not in argv:
            argv += ["--env.id", "TendonToy-v0", "--env.max-episode-steps", "10"]
        if "--resume" not in argv and argv[argv.index("--trainer") + 1] == "sac":
            argv = fill(argv, {"--model.hidden-dims": 16, "--model.critic.hidden-dims": 16})
        in_this_process(online_trainer.main, argv)
        return tmp_path / folder

    return run


def weights(run: Path, model: str = "policy") -> dict[str, torch.Tensor]:
    """A model's weights in the newest checkpoint of a run."""
    folder, _ = checkpoint.newest(run / "checkpoints")
    return checkpoint.read_tree(folder / f"model-{model}.safetensors")


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of two sets of weights."""
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def learned(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times."""
    times = ("data_s", "step_s", "samples_per_s", "env_steps_per_s")
    lines = read_lines(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in times} for line in lines]


def states(run: Path) -> dict[str, bytes]:
    """Every file of the newest checkpoint; a replay buffer's parts as one, since they depend on the saves before."""
    folder, manifest = checkpoint.newest(run / "checkpoints")
    whole = [path for path in sorted(folder.iterdir()) if not path.name.startswith(("replay-", "manifest", "rank-"))]
    found = {path.name: path.read_bytes() for path in whole}
    found["manifest"] = json.dumps(
        {k: v for k, v in manifest.items() if k not in ("files", "pieces", "sha256")}
    ).encode()
    for rank in range(manifest["world_size"]):
        own = checkpoint.read_tree(folder / f"rank-{rank}.safetensors")
        if own.get("memory", {}).pop("parts", None):
            for env, columns in enumerate(replayed(folder, rank)):
                found |= {f"replay-{rank}-{env}-{k}": column.numpy().tobytes() for k, column in columns.items()}
            own["memory"]["buffer"].pop("parts")
        tensors, tree = checkpoint.flatten(own)
        found[f"rank-{rank}"] = json.dumps(tree).encode() + b"".join(t.numpy().tobytes() for t in tensors.values())
    return found


def replayed(folder: Path, rank: int = 0) -> list[dict[str, torch.Tensor]]:
    """The replay buffer in a checkpoint, the columns of each environment's transitions, oldest first."""
    envs: list[dict[str, list[torch.Tensor]]] = []
    for name in checkpoint.read_tree(folder / f"rank-{rank}.safetensors")["memory"]["parts"]:
        part = checkpoint.read_tree(folder / f"{name}.safetensors")
        envs = envs or [{} for _ in part["envs"]]
        for env, columns, cut in zip(envs, part["envs"], part["cut"], strict=True):
            if cut:
                env["ended"][-1][-1] = True
            for key in ("rows", "ended"):
                env.setdefault(key, []).append(columns[key])
    return [{key: torch.cat(parts) for key, parts in env.items()} for env in envs]


def build(path: str | Path, **options: Any) -> dict[str, Any]:
    """What the reader that recognises a dataset builds; `path` from the fixtures' folder on, or absolute."""
    where = str(FIXTURES / path)
    return DATASET_BUILDER_REGISTRY[recognise(where)](path=where, **options).build()


def everything(built: dict[str, Any]) -> dict[str, Any]:
    """All items as one batch."""
    return built["dataset"].get_batch(torch.arange(len(built["dataset"])))


def environ(**env: str) -> dict[str, str]:
    """The variables of a user's shell."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "WANDB_"))}
    return clean | {"PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", **env}


def command(*words: object, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command line as a user would."""
    texts = [str(word) for word in words]
    return subprocess.run(texts, cwd=cwd, env=environ(**env), capture_output=True, text=True, timeout=timeout)


def two_processes(*words: object, cwd: Path, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a Python file on two processes of this machine's CPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_processes", "2"]
    return command(*launcher, *words, cwd=cwd, timeout=timeout, ACCELERATE_USE_CPU="true", **env)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs that `tests/on_two_processes.py` made, in one job of two processes."""
    folder = tmp_path_factory.mktemp("pair")
    done = two_processes(ROOT / "tests" / "on_two_processes.py", folder, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((folder / "world.json").read_text()) == 2
    return folder


def check_alone(policy: Any, states: Any, found: list[Any], begins: dict[int, Any]) -> None:
    """Each row of a batch has acted as it does alone: `states` [T, N], `begins` the steps of a row's new episodes."""
    for row, steps in begins.items():
        policy.reset()
        for t, state in enumerate(states):
            if t in steps:
                policy.reset()
            expected = policy.act({"observation.state": state[[row]]})
            assert found[t][row] == pytest.approx(expected, abs=1e-4), (policy.settings, row, t)
