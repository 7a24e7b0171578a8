"""The READMEs and the examples that they name are what they claim to be: commands run, links lead somewhere."""

import ast
import importlib
import json
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
import online_results
import online_trainer
from components import DATASET_BUILDER_REGISTRY, REGISTRIES, TRAINER_REGISTRY
from components.report import results_table
from conftest import ROOT, in_this_process
from online_results import Way, handed_over, methods_table
from which_method import which_method

README = (ROOT / "README.md").read_text()
DATASETS = (ROOT / "components" / "datasets" / "README.md").read_text()
EXAMPLES = ROOT / "tests" / "examples"
LISTED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
READMES = [line for line in LISTED if line.endswith("README.md") and "fixtures" not in line]
# The kit's own; the tests register more.
OWN = {name for name, cls in DATASET_BUILDER_REGISTRY.items() if cls.__module__.startswith("components.")}
OWN_TRAINERS = {name for name, cls in TRAINER_REGISTRY.items() if cls.__module__.startswith("components.")}
PREFIX = "PYTHONPATH=tests/examples python "
COMMANDS = [
    line.removeprefix(PREFIX)
    for path in sorted(EXAMPLES.glob("my_*.py"))
    for line in (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    if line.startswith(PREFIX)
]


def test_the_first_page_is_short() -> None:
    assert len(README.splitlines()) <= 220
    assert len(README.split()) <= 2500


def test_the_quick_start_is_what_ci_runs() -> None:
    lines = re.search(r"```bash\n(.*?)```", README, re.DOTALL).group(1).splitlines()
    start = "python3 -m venv .venv && . .venv/bin/activate && "
    runs = "pip install -r requirements.txt"
    tests = f"{runs} pytest ruff mypy pyte tensorboard onnxscript onnxruntime"
    assert lines == [f"{start}{runs} && accelerate launch offline_trainer.py --trainer bc", f"{start}{tests} && pytest"]
    assert f": {tests}\n" in (ROOT / "requirements.txt").read_text()
    assert lines[1] in (ROOT / ".ci" / "run").read_text()


# ---- links and tables ----------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", READMES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https:)([^)\s]+)\)", without_code((ROOT / page).read_text()))
    assert links
    for link in links:
        name, _, anchor = link.partition("#")
        target = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        inside = str(target.relative_to(ROOT))
        assert any(line == inside or line.startswith(f"{inside}/") for line in LISTED), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_is_linked_from_the_first() -> None:
    assert all(f"]({page})" in README for page in READMES if page != "README.md")


def test_every_trainer_and_dataset_has_a_line() -> None:
    def named(heading: str) -> list[str]:
        section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        cells = re.findall(r"^\| (`[^|]*`) \|", section, re.MULTILINE)
        return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]

    assert sorted(named("Trainers")) == sorted(OWN_TRAINERS)
    assert sorted(named("Datasets")) == sorted(OWN)


@pytest.mark.parametrize("name", ["imitation", "few_step", "latency", "four_tasks", "offline_rl", "dagger"])
def test_tables_are_made_of_the_rows(name: str) -> None:
    results = ROOT / "tests" / "results"
    assert results_table(results / f"{name}.json").strip() in (results / "README.md").read_text()


def test_the_table_of_methods_is_made_of_the_rows() -> None:
    results = ROOT / "tests" / "results"
    assert methods_table(results / "online.json") in (results / "README.md").read_text()
    assert which_method() in README


def test_a_method_has_a_line_with_what_it_began_from_and_its_drop(tmp_path: Path) -> None:
    common = {"suite": "road", "metric": "success_rate", "episodes": 100, "task": "peg-insert-side-v3", "steps": 15000}
    first = common | {"run": "road-iql-online-1", "value": 0.8, "before": 0.4, "lowest": 0.3, "drop": -0.1}
    second = common | {"run": "road-iql-online-2", "value": 0.9, "before": 0.7, "lowest": 0.7, "drop": 0.0}
    (tmp_path / "rows.json").write_text(json.dumps([first, second, common | {"run": "road-elsewhere-1"}]))
    (line,) = methods_table(tmp_path / "rows.json").splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["50 noisy attempts, and an environment", "`iql`, continued online", "15 000"]
    assert cells[4:] == ["0.85 [0.21, 1.00]", "0.3 [-1.0, 1.6]", "-0.10", "0.40 -> 0.80, 0.70 -> 0.90"]


def test_a_drop_is_the_lowest_later_evaluation_less_the_start() -> None:
    assert handed_over([(0, 0.7), (2500, 0.62), (5000, 0.9)]) == {"before": 0.7, "lowest": 0.62, "drop": -0.08}
    assert handed_over([(0, 0.7), (2500, 0.2), (2500, 0.8)]) == {"before": 0.7, "lowest": 0.8, "drop": 0.1}
    assert handed_over([(2500, 0.2), (5000, 0.9)]) == handed_over([(0, 0.7)]) == {}


def test_a_road_is_made_in_the_order_of_what_begins_from_what(monkeypatch: pytest.MonkeyPatch) -> None:
    further = {"second": Way("--trainer bc --init-from {first}", ""), "third": Way("--load policy={second}", "")}
    monkeypatch.setattr(online_results, "OFFLINE", {"first": Way("--trainer bc", "", (1, 2)), **further})
    monkeypatch.setattr(
        online_results, "ONLINE", {"on": Way("--trainer x --init-from {third} --frozen {first}", "", (2,))}
    )
    stages = online_results.road(Path("runs"), ways=["on", "second"], seeds=[2])
    assert [list(stage) for stage in stages] == [["road-first-2"], ["road-second-2"], ["road-third-2"], ["road-on-2"]]
    assert "policy=runs/road-second-2" in stages[2]["road-third-2"][1]
    assert stages[3]["road-on-2"][1][:6] == shlex.split(
        "online_trainer.py --trainer x --init-from runs/road-third-2 --frozen"
    )
    # Whatever has a row is made again only where another needs its folder.
    assert online_results.missing(stages, {"road-first-2", "road-second-2", "road-on-2"}) == {
        "road-second-2",
        "road-first-2",
    }
    assert online_results.missing(stages, {name for stage in stages for name in stage}) == set()
    with pytest.raises(SystemExit, match="--ways nothing: choose among first, second, third, on"):
        online_results.road(Path("runs"), ways=["nothing"])


# ---- examples ------------------------------------------------------------------------------------------------------


def test_all_examples_have_a_command_and_a_link() -> None:
    names = {path.name for path in EXAMPLES.glob("my_*.py")}
    assert names == {"my_env.py", "my_data.py", "my_trainer.py", "my_loss.py", "my_optimizer.py", "my_model.py"}
    assert len(COMMANDS) == len(names)
    assert all(f"](tests/examples/{name})" in README for name in names | {"plain.py"})


def test_the_trainer_on_the_first_page_is_the_example() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert block == (EXAMPLES / "my_trainer.py").read_text()


@pytest.fixture
def own_registries() -> Iterator[None]:
    """What an example registers is gone afterwards, and its modules too."""
    before = {name: dict(registry) for name, registry in REGISTRIES.items()}
    yield
    for name, registry in REGISTRIES.items():
        registry.clear()
        registry.update(before[name])
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split("--plugins ")[1].split(" --")[0])
def test_examples_run(
    tmp_path: Path, line: str, own_registries: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which leaves out the imports."""
    script, *words = shlex.split(line)
    few = ["--eval-every", "0", "--run-dir", str(tmp_path / "run")]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(ROOT)
    if script == "online_trainer.py":
        few += ["--steps", "100", "--learning-starts", "50", "--eval-episodes", "2"]
        in_this_process(online_trainer.main, [*words, *few])
        assert "over 2 episodes" in capsys.readouterr().out
        return
    few += ["--steps", "600" if "my_model" in line else "300", "--eval-episodes", "10"]
    in_this_process(offline_trainer.main, [*words, *few])
    out = capsys.readouterr().out
    rate = float(re.findall(r"success (\d\.\d\d)", out)[-1])
    assert rate >= 0.8, out


TRIED = re.findall(r"`accelerate launch (offline_trainer\.py --trainer bc --dataset .*?)` \|", DATASETS)


def test_every_dataset_has_a_command() -> None:
    assert {line.split()[4] for line in TRIED} == OWN


@pytest.mark.parametrize("line", TRIED, ids=lambda line: " ".join(line.split()[4:7])[:60])
def test_the_command_of_a_dataset_runs(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh clone: paths are those from its root."""
    monkeypatch.chdir(ROOT)
    fewer = ["--dataset.demos", "2", "--dataset.cache-dir", str(tmp_path / "c")] if "metaworld" in line else []
    few = ["--steps", "5", "--eval-episodes", "0", "--run-dir", str(tmp_path / "run"), "--batch-size", "16"]
    in_this_process(offline_trainer.main, [*shlex.split(line)[1:], *few, *fewer])
    assert (tmp_path / "run" / "policy" / "policy.json").exists()


def test_the_commands_about_datasets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = [line.split("#")[0] for line in DATASETS.splitlines() if line.startswith("python -m components.datasets.")]
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("dataset.png", str(tmp_path / "d.png")))
        words = [str(tmp_path / "p") if word == "push-lerobot" else word for word in words]
        words = [str(tmp_path / "q") if word == "push-labelled" else word for word in words]
        words += ["--steps", "20"] if "label" in words[2] else []
        assert importlib.import_module(words[2]).main(words[3:]) == 0
    assert (tmp_path / "d.png").exists() and all((tmp_path / to / "meta" / "info.json").exists() for to in "pq")


def test_components_alone_train_in_plain_pytorch(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "components", tmp_path / "components", ignore=shutil.ignore_patterns("__pycache__"))
    plain = shutil.copy(EXAMPLES / "plain.py", tmp_path)
    assert len([line for line in Path(plain).read_text().splitlines() if line.strip()]) <= 30
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
    top = {line.split("/")[0] for line in LISTED}
    visible = {name for name in top if not name.startswith(".")}
    allowed = {"offline_trainer.py", "online_trainer.py", "components", "protocols.py", "tests"}
    assert visible <= allowed | {"requirements.txt", "README.md", "LICENSE"}
