"""Registries, protocols and the checks that `isinstance` cannot make."""

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
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
from components import REGISTRIES, UserError, contracts, register
from components.contracts import GOAL, STATE
from components.data.features import build_models
from conftest import ROOT

SCRIPTS = ("offline_trainer", "online_trainer")
SPEC = {
    "observation.state": {"shape": (5,), "dtype": "float32"},
    "action": {"shape": (2,), "dtype": "float32"},
}
BUILT_IN = [(o, n) for o, registry in REGISTRIES.items() for n in registry if "components" in registry[n].__module__]


def tiny_spec(trainer: str) -> dict[str, dict[str, Any]]:
    """Of everything that any trainer needs of its data, small."""
    vector = lambda *shape: {"shape": shape, "dtype": "float32"}  # noqa: E731
    chunk, discrete = trainer in ("act", "diffusion", "flow", "qc"), trainer == "dqn"
    spec = {STATE: vector(5), f"next.{STATE}": vector(5), "action": vector(*(4,) * chunk, 2)}
    if trainer in ("gcbc", "gciql", "hiql"):
        spec |= {GOAL: vector(5), f"next.{GOAL}": vector(5)}
    spec["action"] |= {"noise": [2]} if trainer == "dsrl" else {}
    if discrete:
        spec["action"] = {"shape": (), "dtype": "int64", "classes": 3}
    scalars = {"reward": "float32", "terminated": "bool", "complete": "float32", "return_to_go": "float32"}
    return spec | {"next.action": vector(2)} | {key: {"shape": (), "dtype": kind} for key, kind in scalars.items()}


def tiny_trainer(name: str) -> Any:
    """A trainer as the scripts build it: its own models and loss, their options as it wants them."""
    cls, spec = REGISTRIES["trainer"][name], tiny_spec(name)
    defaults, needs, config = contracts.defaults_of(cls), contracts.needs_of(cls), contracts.options_of(cls)

    def build(model: str, own: dict[str, Any]) -> nn.Module:
        group = "model" if model == next(iter(needs)) else f"model.{model}"
        parts = ((key.rpartition("."), value) for key, value in defaults.items())
        wanted = {option.replace("-", "_"): value for (of, _, option), value in parts if of == group}
        return contracts.options_of(REGISTRIES["model"][needs[model]], wanted).build(own)

    models = build_models(list(needs), build, spec, contracts.model_spec_of(cls, config))
    trainable = {model: list(module.parameters()) for model, module in models.items()}
    optimizers = {model: torch.optim.SGD(p, lr=0.1) for model, p in trainable.items() if p}
    loss = REGISTRIES["loss"][defaults["loss"]]().build()
    return contracts.construct(cls, models, optimizers, loss, spec, config, torch.device("cpu"), nn.Identity())


@pytest.mark.parametrize(("option", "name"), BUILT_IN)
def test_every_entry_satisfies_its_protocol(option: str, name: str) -> None:
    cls = REGISTRIES[option][name]
    protocol = protocols.FACTORIES.get(option, protocols.Trainer)
    component = tiny_trainer(name) if option == "trainer" else contracts.instantiate(cls, contracts.options_of(cls))
    assert isinstance(component, protocol)
    assert contracts.violation(component, protocol) == ""


# ---- the optional members of a trainer -----------------------------------------------------------------------------

TRAINERS = [name for option, name in BUILT_IN if option == "trainer"]
GROUPS = [p for p in vars(protocols).values() if getattr(p, "_is_protocol", False) and p.__module__ == "protocols"]
OTHERS = {*protocols.FACTORIES.values(), protocols.Trainer, protocols.VectorEnv, protocols.Robot}
GROUPS = [p for p in GROUPS if p not in OTHERS]
# What the table in `protocols.py` lists; its first column begins each row.
TABLE = (protocols.__doc__ or "").partition("member of a trainer")[2].splitlines()
ROWS = [line[4:40] for line in TABLE if line[4:5].strip()]
MEMBERS = {word for row in ROWS for word in re.findall(r"^\w+|\w+(?=\()", row)}
ATTRIBUTES = {"needs", "defaults", "debug_options", "Config", "adds_auxiliary", "accumulates", "promises", "spans"}
ATTRIBUTES |= {"updates"}


def members(protocol: type) -> set[str]:
    """The methods that a protocol names."""
    return {name for name in vars(protocol) if name[0] != "_"}


def test_the_table_lists_what_the_protocols_name_and_contracts_reads() -> None:
    assert ATTRIBUTES | {name for group in GROUPS for name in members(group)} == MEMBERS
    source = (ROOT / "components" / "contracts.py").read_text()
    for name in MEMBERS:
        assert re.search(rf"[\"'.]{name}\b", source), f"{name} is never read"


@pytest.mark.parametrize("name", TRAINERS)
def test_what_a_trainer_offers_has_the_signatures_of_its_groups(name: str) -> None:
    trainer = tiny_trainer(name)
    for group in GROUPS:
        if isinstance(trainer, group):
            for member in members(group):
                parameters = [p for p in inspect.signature(getattr(group, member)).parameters if p != "self"]
                assert contracts.unbindable(getattr(trainer, member), member, parameters) == ""
    for member in contracts.promises_of(trainer).compiles:
        assert contracts.losses_of(trainer, member) is not None
    assert isinstance(trainer, protocols.HasLosses)
    rollouts = isinstance(contracts.request_of(type(trainer), trainer_config(trainer)), contracts.Rollouts)
    assert rollouts == isinstance(trainer, protocols.OnPolicy)
    assert isinstance(contracts.acting_module(trainer, trainer.models), nn.Module)
    assert isinstance(contracts.exploring_module(trainer, nn.Identity()), nn.Module)


def trainer_config(trainer: Any) -> Any:
    """The options that it was built with."""
    return getattr(trainer, "config", contracts.options_of(type(trainer)))


def test_a_trainer_without_any_optional_member_has_defaults() -> None:
    minimal = toy.Minimal({}, {}, nn.MSELoss(), None)
    assert contracts.needs_of(toy.Minimal) == {"policy": "mlp"} and contracts.defaults_of(toy.Minimal) == {}
    assert contracts.request_of(toy.Minimal, None) is None and contracts.frozen_policy_of(toy.Minimal, None) is None
    assert contracts.window_of(toy.Minimal, contracts.NoOptions()) == contracts.Window()
    assert contracts.window_of(toy.ActorCritic, toy.ActorCritic.Config()) == contracts.Window(discount=0.9)
    assert contracts.model_spec_of(toy.Minimal, None)("policy", SPEC) is SPEC
    assert contracts.promises_of(minimal) == contracts.Promises(None, ("losses",))
    assert contracts.losses_of(minimal) is None and contracts.updates_of(minimal) is None
    assert not contracts.accumulates(minimal) and contracts.state_of(minimal) == {}
    minimal.policy = nn.Linear(1, 1)  # type: ignore[attr-defined]  # an attribute of an instance is no method
    assert contracts.acting_module(minimal, {}) is None and contracts.acting_module(minimal, {"policy": 3}) == 3
    default = nn.Identity()
    assert contracts.exploring_module(minimal, default) is default
    contracts.load_state(minimal, {"updates": 3})
    assert contracts.passed_to(minimal) == []
    assert contracts.passed_to(toy.WithKeywords({}, {}, None, None)) == list(contracts.LOOP_PASSES)
    with pytest.raises(UserError, match=r"Minimal asks for Rollouts, but has no estimate\(rollout\)"):
        contracts.estimate_of(minimal)


def test_a_request_of_another_kind_is_refused() -> None:
    class Odd(toy.Minimal):
        data = staticmethod(lambda config: {"discount": 0.9})

    with pytest.raises(
        UserError, match="Odd.data.config. must return Window, Goals, Rollouts, Demonstrations or Corrections, found"
    ):
        contracts.request_of(Odd, None)


def test_optional_members_are_looked_for_in_one_place() -> None:
    """No `hasattr` or `getattr` of a trainer, or of one of its optional members, anywhere but in `contracts.py`."""
    trainer = re.compile(
        r"\b(trainer|learns|cls|trainer_cls)\b$|type\(.*trainer\)$|REGISTRIES\['trainer'\]|TRAINER_REGISTRY"
    )
    paths = [*(ROOT / f"{name}.py" for name in SCRIPTS), *(ROOT / "components").rglob("*.py")]
    for path in paths:
        if path.name == "contracts.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("hasattr", "getattr")
            ):
                of, name = ast.unparse(node.args[0]), node.args[1]
                assert not trainer.search(of), f"{path}:{node.lineno}: {ast.unparse(node)}"
                word = name.value if isinstance(name, ast.Constant) else ""
                # A vector environment and the parts of a checkpoint may save their state, too.
                others = of == "part" or of.endswith(".envs")
                assert word not in MEMBERS | {"env_step"} or others, f"{path}:{node.lineno}: {word}"


@pytest.mark.parametrize(("option", "name"), BUILT_IN)
def test_every_option_has_a_docstring_and_is_read(option: str, name: str) -> None:
    cls = REGISTRIES[option][name]
    options = cls if is_dataclass(cls) else getattr(cls, "Config", None)
    if options is None:
        return
    # Options may come from a base class, and methods from another one.
    places = {member.__module__ for member in vars(cls).values() if inspect.isfunction(member)}
    files = {inspect.getsourcefile(base) for base in cls.__mro__[:-1]}
    files |= {inspect.getsourcefile(importlib.import_module(place)) for place in places}
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
    for path in (ROOT / "components").rglob("*.py"):  # parts of a run take the arguments as a whole
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)]
        read |= {n.attr for n in nodes if isinstance(n.value, ast.Name) and n.value.id == "args"}
        read |= {n.attr for n in nodes if ast.unparse(n.value) == "self.args"}
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
    assert {"start_accelerator", "StepHook.__call__", "build", "build_dataset", "build_learner", "main"} <= shared
    assert offline.keys() == online.keys()
    for name in shared - {"learn"}:  # each has its own run
        assert offline[name] == online[name], f"{name} differs between the scripts"
    offline_text, online_text = ((ROOT / f"{name}.py").read_text() for name in SCRIPTS)
    start, end = "# ---- accelerate -", "# ---- the run -"
    shared_text = offline_text[offline_text.index(start) : offline_text.index(end)]
    assert shared_text in online_text and len(shared_text.splitlines()) > 100


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


# What a fork of the algorithms alone copies.
KIT = ("trainers", "models", "data")
KIT += ("errors.py", "records.py", "losses.py", "optimizers.py", "value_learning.py", "parallel.py", "contracts.py")


def test_a_part_of_components_trains_in_plain_pytorch(tmp_path: Path) -> None:
    """Algorithms, networks and data with the modules beside them, under another name and without the rest."""
    kit, script = tmp_path / "learning_kit", ROOT / "tests" / "examples" / "fork.py"
    kit.mkdir()
    for name in KIT:
        source = ROOT / "components" / name
        if source.is_dir():
            shutil.copytree(source, kit / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, kit)
    shutil.copy(script, tmp_path)
    assert len([line for line in script.read_text().splitlines() if line.strip()]) <= 40
    every = [".".join(path.relative_to(tmp_path).with_suffix("").parts) for path in kit.rglob("*.py")]
    blocked = "sys.modules.update(dict.fromkeys(['accelerate', 'tyro', 'wandb', 'protocols', 'components']))"
    code = f"import importlib, runpy, sys; {blocked}; sys.path.insert(0, '')"
    code += f"; [importlib.import_module(name) for name in {every}]; runpy.run_path('fork.py')"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name in ("IQL", "Diffusion"):
        losses = [float(loss) for loss in re.findall(rf"^{name} \d+ (\S+)$", done.stdout, re.MULTILINE)]
        assert len(losses) == 4 and losses[-1] < 0.5 * losses[0], done.stdout
        assert (tmp_path / f"{name}.safetensors").stat().st_size > 10_000


def test_registered_components_import_little_at_module_level() -> None:
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
    problem = contracts.violation(component, protocol)
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
