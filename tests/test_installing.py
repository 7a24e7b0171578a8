"""What is installed, and the kit used from another folder than its own."""

import ast
import importlib.util
import re
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components import UserError
from components.run import provenance
from components.run.reading import read_args
from conftest import ROOT, command

REQUIREMENTS = (ROOT / "requirements.txt").read_text()
OF_TESTS = {"pytest", "ruff", "mypy", "pyte"}
# Packages under another name than their module's; psutil comes with accelerate.
CALLED = {"PIL": "pillow", "ale_py": "ale-py", "gym_pusht": "gym-pusht", "psutil": "accelerate"}


def backend() -> Any:
    """What pip asks for an installation."""
    spec: Any = importlib.util.spec_from_file_location("backend", ROOT / ".packaging" / "backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, also inside functions and by `require`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
            yield from (one.value for one in node.args[:1] if isinstance(one, ast.Constant))


def test_what_the_kit_imports_is_what_requirements_name() -> None:
    """No module of the kit needs a test tool; whatever it imports is installed, or named as an extra."""
    needed = {re.split(r"[\[<>=;]", line)[0].strip() for line in backend().requirements()}
    extras = set(re.findall(r"[\w-]+", re.search(r"# Only when used.*?\n\n", REQUIREMENTS, re.DOTALL)[0]))  # type: ignore[index]
    assert not needed & {*OF_TESTS, "tensorboard"} and needed > {"torch", "accelerate", "safetensors", "tyro"}
    code = [*(ROOT / "components").rglob("*.py"), *ROOT.glob("*.py")]
    own = {"components", "protocols", *sys.stdlib_module_names}
    tops = {name.split(".")[0] for path in code for name in imported(path)} - own
    assert not tops & OF_TESTS
    assert {CALLED.get(name, name) for name in tops} <= needed | extras


def test_an_installation_is_the_clone_or_a_copy_of_its_code(tmp_path: Path) -> None:
    for build, there in ((backend().build_editable, "tendon.pth"), (backend().build_wheel, "components/report.py")):
        with zipfile.ZipFile(tmp_path / build(str(tmp_path))) as wheel:
            names, metadata = wheel.namelist(), wheel.read("tendon-0.dist-info/METADATA").decode()
            assert there in names and not [name for name in names if name.startswith("tests")]
            rows = wheel.read("tendon-0.dist-info/RECORD").decode().splitlines()
            assert [row.split(",")[0] for row in rows] == names
        assert "Requires-Dist: torch>=2.8,<2.14\n" in metadata and "pytest" not in metadata


def test_the_commit_is_of_the_repository_that_has_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of one around it, such as that of a project whose environment has an installed copy."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    (tmp_path / "provenance.py").write_text("")
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@x"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        assert command(*git, *words, cwd=tmp_path).returncode == 0
    assert provenance._git_commit.__wrapped__() is None
    command(*git, "add", "provenance.py", cwd=tmp_path)
    command(*git, "commit", "-q", "-m", "ours", cwd=tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", provenance._git_commit.__wrapped__() or "")


def test_a_script_is_named_where_it_is(script: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = script("--trainer", "bc", "--steps", 1)
    monkeypatch.setattr(sys, "argv", ["/kit/online_trainer.py"])
    with pytest.raises(UserError, match="continue with: python /kit/offline_trainer.py --resume"):
        read_args(run, made_by="online_trainer.py")


@pytest.mark.slow
def test_the_kit_works_from_another_folder(script: Callable[..., Path], tmp_path: Path) -> None:
    """Installed by pip, without network, in an environment that has the packages of this one by a .pth file, too."""
    run = script("--trainer", "bc", "--steps", 2, "--eval-episodes", 2)
    here = tmp_path / "here"
    here.mkdir()
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index", "--no-deps", "-e"]
    code = "import importlib.util as u; print(u.find_spec('components'))"
    assert command(python, "-c", code, cwd=here).stdout == "None\n"
    done = command(*pip, ROOT / ".packaging", cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (packages / "these.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    code = f"import runpy; from components import load_policy; print(load_policy({str(run)!r})); "
    done = command(python, "-c", code + "runpy.run_module('components.report', run_name='__main__')", run, cwd=here)
    assert done.returncode == 0 and "Policy object" in done.stdout and "| bc " in done.stdout, done.stdout + done.stderr
    assert (here / "report.png").exists() and not (ROOT / ".packaging" / "build").exists()
