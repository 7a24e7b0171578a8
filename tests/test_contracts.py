"""Registries, protocols and the checks that `isinstance` cannot make."""

import ast
import importlib
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import components
import protocols
import toy
from components import REGISTRIES, UserError, register
from components.run.command_line import instantiate, options_of
from conftest import ROOT

SCRIPTS = ("offline_trainer", "online_trainer")
SPEC = {
    "observation.state": {"shape": (5,), "dtype": "float32"},
    "action": {"shape": (2,), "dtype": "float32"},
}
BUILT_IN = [(o, n) for o, registry in REGISTRIES.items() for n in registry if "components" in registry[n].__module__]
PROTOCOL = {
    "trainer": protocols.Trainer,
    "dataset": protocols.DatasetFactory,
    "model": protocols.ModelFactory,
    "loss": protocols.LossFactory,
    "optimizer": protocols.OptimizerFactory,
    "env": protocols.EnvFactory,
}


@pytest.mark.parametrize(("option", "name"), BUILT_IN)
def test_every_entry_satisfies_its_protocol(option: str, name: str) -> None:
    cls = REGISTRIES[option][name]
    if option == "trainer":
        assert not protocols.unbindable(cls, "__init__", (), ("models", "optimizers", "loss"))
        component = cls(models=nn.ModuleDict(), optimizers={}, loss=nn.MSELoss())
    else:
        component = instantiate(cls, options_of(cls))
    assert isinstance(component, PROTOCOL[option])
    assert protocols.violation(component, PROTOCOL[option]) == ""


@pytest.mark.parametrize(("option", "name"), BUILT_IN)
def test_every_option_has_a_docstring_and_is_read(option: str, name: str) -> None:
    cls = REGISTRIES[option][name]
    options = cls if is_dataclass(cls) else getattr(cls, "Config", None)
    if options is None:
        return
    files = {inspect.getsourcefile(base) for base in cls.__mro__[:-1]}  # options may come from a base class
    trees = [ast.parse(Path(file).read_text()) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    documented = set().union(*map(documented_fields, trees))
    for field in fields(options):
        assert field.name in read, f"{name}: option {field.name} is never read"
        assert field.name in documented, f"{name}: option {field.name} has no docstring"


def documented_fields(tree: ast.AST) -> set[str]:
    """Names of annotated fields that a string follows."""
    found = set()
    for node in ast.walk(tree):
        for first, second in (
            zip(getattr(node, "body", [])[:-1], getattr(node, "body", [])[1:], strict=False)
            if isinstance(node, ast.ClassDef)
            else ()
        ):
            text = isinstance(second, ast.Expr) and isinstance(second.value, ast.Constant)
            if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name) and text:
                found.add(first.target.id)
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_of_the_scripts_is_read_and_documented(name: str) -> None:
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    read |= {
        n.attr
        for n in ast.walk(ast.parse((ROOT / "components/run/record.py").read_text()))
        if isinstance(n, ast.Attribute)
    }
    for field in fields(importlib.import_module(name).Args):
        assert field.name in read | set(REGISTRIES), f"--{field.name} is never read"
        if not field.name.endswith("_options"):
            assert field.name in documented_fields(tree), f"--{field.name} has no docstring"


def definitions(name: str) -> dict[str, str]:
    """Every function of a script and every method, by its qualified name, as text."""
    text = (ROOT / f"{name}.py").read_text()
    found: dict[str, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                if isinstance(child, ast.FunctionDef):
                    found[prefix + child.name] = ast.get_source_segment(text, child) or ""
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(text), "")
    return found


def test_what_both_scripts_have_is_textually_equal() -> None:
    offline, online = (definitions(name) for name in SCRIPTS)
    shared = offline.keys() & online.keys()
    assert {"parse_args", "start_accelerator", "StepHook.average", "build_learner", "save", "finish", "main"} <= shared
    for name in shared:
        assert offline[name] == online[name], f"{name} differs between the scripts"
    assert len(offline.keys() ^ online.keys()) == 2  # each has its own loop, and nothing else


def test_registry_literals_have_no_duplicate_keys() -> None:
    tree = ast.parse((ROOT / "components" / "__init__.py").read_text())
    literals = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)]
    assert len(literals) >= 7
    for literal in literals:
        keys = [key.value for key in literal.keys if isinstance(key, ast.Constant)]
        assert len(keys) == len(set(keys))


def test_register_refuses_a_name_that_is_taken() -> None:
    registry: dict[str, type] = {}

    @register(registry, "mine")
    class Mine:
        pass

    assert registry == {"mine": Mine}
    with pytest.raises(UserError, match=r"'mine' is taken by .*Mine"):
        register(registry, "mine")(Mine)


def test_components_stand_alone() -> None:
    """They import each other relatively, and neither the contracts nor accelerate."""
    for path in (ROOT / "components").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"protocols", "components", "accelerate"}, path


def test_registered_components_import_little_at_module_level() -> None:
    import sys

    for option, name in BUILT_IN:
        module = ast.parse(Path(inspect.getsourcefile(REGISTRIES[option][name])).read_text())
        for node in module.body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for top in {name.split(".")[0] for name in names}:
                assert top in {"torch", "numpy"} or top in sys.stdlib_module_names, f"{option} {name} imports {top}"


def test_no_pickle_anywhere() -> None:
    words = ("weights_only=False", "pickle.load", "allow_pickle=True", "yaml.load(", "torch.save(", "trust_remote_code")
    for path in [
        *(ROOT / f"{name}.py" for name in SCRIPTS),
        ROOT / "protocols.py",
        *(ROOT / "components").rglob("*.py"),
    ]:
        for word in words:
            assert word not in path.read_text(), f"{path}: {word}"


class NoBuild:
    """A factory without its method."""


class NotCallable:
    build = 3


class WrongArity:
    def build(self, a: Any, b: Any, c: Any) -> None: ...


@pytest.mark.parametrize(
    ("component", "protocol", "expected"),
    [
        (NoBuild(), protocols.LossFactory, r"NoBuild.build is missing"),
        (NotCallable(), protocols.LossFactory, r"NotCallable.build is a int"),
        (WrongArity(), protocols.LossFactory, r"expected build\(\), found build\(a: Any, b: Any, c: Any\)"),
        (WrongArity(), protocols.EnvFactory, r"expected build\(num_envs, seed\).*missing a required argument: 'c'"),
        (WrongArity(), protocols.DatasetFactory, r"expected build\(opt_params=..., params=...\)"),
        (components.losses.MSE(), protocols.OptimizerFactory, r"too many positional arguments"),
    ],
)
def test_violations_are_told_in_one_line(component: object, protocol: type, expected: str) -> None:
    import re

    problem = protocols.violation(component, protocol)
    assert re.search(expected, problem) and "\n" not in problem


class TakesNothing(toy.Minimal):
    def train_step(self) -> dict[str, float]:  # type: ignore[override]
        return {}


class OtherNames(toy.Minimal):
    def __init__(self, nets: Any, optimizers: Any, loss: Any) -> None: ...


class NoDict(toy.MinimalData):
    def build(self, **kwargs: Any) -> Any:
        return [1, 2]


class OptimizerNot:
    def build(self, params: Any) -> Any:
        return "adam"


@pytest.mark.parametrize(
    ("option", "cls", "expected"),
    [
        ("trainer", TakesNothing, r"trainer 'odd': expected train_step\(data\), found train_step\(\)"),
        ("trainer", OtherNames, r"trainer 'odd': expected __init__\(models=..., optimizers=..., loss=...\).*nets"),
        ("dataset", NoDict, r"dataset 'odd': build must return a dict with \['dataset', 'norm_stats'\]"),
        ("optimizer", OptimizerNot, r"optimizer 'odd': build must return a Optimizer, found str"),
        ("loss", NoBuild, r"loss 'odd': LossFactory needs build\(\), but NoBuild.build is missing"),
    ],
)
def test_the_script_refuses_them_before_step_1(
    script: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, cls: type, expected: str
) -> None:
    monkeypatch.setitem(REGISTRIES[option], "odd", cls)
    with pytest.raises(UserError, match=expected):
        script(f"--{option}", "odd")
    assert not (tmp_path / "run").exists()


def test_a_model_is_built_from_the_spec_alone() -> None:
    model = components.MODEL_BUILDER_REGISTRY["mlp"]().build(SPEC)
    assert model({"observation.state": torch.zeros(3, 5)}).shape == (3, 2)
    assert model(torch.zeros(3, 5)).shape == (3, 2)


def test_every_trainer_is_in_the_tests_that_run_them_all() -> None:
    assert {*toy.TRAINERS, *toy.ONLINE_ALONE} == {name for option, name in BUILT_IN if option == "trainer"}
