"""The README's examples are what they claim to be: extracted, written to a folder, and run."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import offline_trainer
from components import DATASET_BUILDER_REGISTRY, REGISTRIES
from conftest import ROOT, command, in_this_process

README = (ROOT / "README.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", README, re.DOTALL))
# The kit's own; the tests register more.
OWN = {name for name, cls in DATASET_BUILDER_REGISTRY.items() if cls.__module__.startswith("components.")}
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if "my_data" in line
]


def test_the_quick_start_is_what_ci_runs() -> None:
    lines = re.search(r"```bash\n(.*?)```", README, re.DOTALL).group(1).splitlines()
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    assert lines == [start + "accelerate launch offline_trainer.py --trainer bc", start + "pytest"]
    assert lines[1] in (ROOT / ".ci" / "run").read_text()


def test_all_examples_are_here() -> None:
    assert set(FILES) == {
        "my_env.py",
        "my_data.py",
        "my_trainer.py",
        "my_loss.py",
        "my_optimizer.py",
        "my_model.py",
        "plain.py",
    }
    assert len(COMMANDS) == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with the plugins of the README in it."""
    folder = tmp_path_factory.mktemp("readme")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def own_registries() -> Iterator[None]:
    """What an example registers is gone afterwards, and its modules too."""
    before = {name: dict(registry) for name, registry in REGISTRIES.items()}
    yield
    for name, registry in REGISTRIES.items():
        registry.clear()
        registry.update(before[name])
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split("--plugins ")[1].split(" --")[0])
def test_examples_run(
    folder: Path, line: str, own_registries: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one as a user runs it; the others in this process, which leaves out the imports."""
    words = shlex.split(line)
    assert words[:2] == ["python", "offline_trainer.py"]
    words += ["--steps", "600", "--eval-episodes", "10", "--eval-every", "0"]
    if line == COMMANDS[0]:
        done = command(sys.executable, ROOT / "offline_trainer.py", *words[2:], cwd=folder)
        assert done.returncode == 0, done.stderr
        out = done.stdout
    else:
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.chdir(folder)
        in_this_process(offline_trainer.main, words[2:])
        out = capsys.readouterr().out
    rate = float(re.findall(r"success (\d\.\d\d)", out)[-1])
    assert rate >= 0.8, out


TRIED = re.findall(r"`accelerate launch (offline_trainer\.py --trainer bc --dataset .*?)` \|", README)


def test_every_dataset_has_a_command() -> None:
    assert {line.split()[4] for line in TRIED} == OWN


@pytest.mark.parametrize("line", TRIED, ids=lambda line: " ".join(line.split()[4:7])[:60])
def test_the_command_of_a_dataset_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh clone: paths are those from its root."""
    monkeypatch.chdir(ROOT)
    fewer = ["--dataset.demos", "2", "--dataset.cache", str(tmp_path / "c")] if "metaworld" in line else []
    few = ["--steps", "5", "--eval-episodes", "0", "--run-dir", str(tmp_path / "run"), "--batch-size", "16"]
    in_this_process(offline_trainer.main, [*shlex.split(line)[1:], *few, *fewer])
    assert (tmp_path / "run" / "policy" / "policy.json").exists()


def test_the_commands_about_datasets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [line.split("#")[0] for line in README.splitlines() if line.startswith("python -m components.datasets.")]
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line.replace("dataset.png", str(tmp_path / "d.png")))
        words = [str(tmp_path / "p") if word == "push-lerobot" else word for word in words]
        assert importlib.import_module(words[2]).main(words[3:]) == 0
    assert (tmp_path / "d.png").exists() and (tmp_path / "p" / "meta" / "info.json").exists()


def test_components_alone_train_in_plain_pytorch(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "components", tmp_path / "components", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "plain.py").write_text(FILES["plain.py"])
    assert len([line for line in FILES["plain.py"].splitlines() if line.strip()]) <= 30
    blocked = "import sys; sys.modules.update(accelerate=None, tyro=None, wandb=None, protocols=None); "
    code = blocked + "import runpy; runpy.run_path('plain.py')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines() if re.match(r"\d+ ", line)]
    assert len(losses) == 4 and losses[-1] < 0.3 * losses[0]


def test_nothing_but_the_fixed_files_at_the_top() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    allowed = {"offline_trainer.py", "online_trainer.py", "components", "protocols.py", "tests"}
    assert visible <= allowed | {"requirements.txt", "README.md", "LICENSE"}
