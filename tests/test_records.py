"""A run folder is a stranger's: what its records may say, what they import and open, and damage to each of them."""

import copy
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest
import torch

import online_trainer
from components import REGISTRIES, UserError, evaluate, export, load_policy, report
from components.acting.policy_folder import normalisation_of
from components.records import misfit, read_json
from components.run import checkpoint
from components.run.arguments import parse
from components.run.curves import diverging, draw_curves, read_lines
from components.run.files import as_json
from components.run.reading import read_args, read_status

Script = Callable[..., Path]
SMALL = ("--model.hidden-dims", 8, "--model.critic.hidden-dims", 8)
EVIL = "open('hacked', 'w')\n"


# ---- values against types ------------------------------------------------------------------------------------------


class Inner(TypedDict):
    number: int


class Shape(TypedDict):
    """One field of each kind."""

    name: str
    inner: Inner
    maybe: NotRequired[float | None]
    some: NotRequired[list[tuple[int, str]]]
    word: NotRequired[Literal["a", "b"]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"maybe": None, "more": object}, ""),
        ({"maybe": 1}, ""),
        ({"name": None}, "name is None; expected a text"),
        ({"inner": {}}, "no inner.number; expected a whole number"),
        ({"inner": {"number": True}}, "inner.number is True; expected a whole number"),
        ({"inner": {"number": 10**30}}, "inner.number is 10{30}; expected a whole number"),
        ({"inner": [1]}, "inner is a list; expected an object"),
        ({"maybe": math.nan}, "maybe is nan; expected a number"),
        ({"maybe": "x"}, "maybe is 'x'; expected a number"),
        ({"some": [[1, "x"], [2]]}, "some.1 is a list"),
        ({"some": [[1, 2]]}, "some.0.1 is 2; expected a text"),
        ({"word": "c"}, "word is 'c'; expected one of 'a', 'b'"),
    ],
)
def test_a_value_is_held_against_its_type(change: dict[str, Any], problem: str) -> None:
    found = misfit({"name": "x", "inner": {"number": 1}} | change, Shape)
    assert found.startswith(problem.replace("10{30}", str(10**30))) and bool(found) == bool(problem)


# ---- damage to every record ----------------------------------------------------------------------------------------

ODD = [None, True, "x", "", [], {}, 0, -1, 1.5, math.nan, math.inf, 10**30, 10**400, 2**40, "\x1b[31m", [[]], [1, 2]]


def places(tree: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of each value in a JSON tree; of a list, of its first three."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:3]) if isinstance(tree, list) else ()
    return [place, *(inner for key, value in items for inner in places(value, (*place, key)))]


def damaged(text: str, chance: random.Random) -> str:
    """A JSON text with one value changed, nested deeply or missing, or cut, or one that is no object."""
    kind, tree = chance.random(), json.loads(text)
    if kind < 0.1:
        return chance.choice([text[: chance.randrange(len(text))], "[" * 100_000, "[]", "null", '"x"', "\0"])
    *above, key = chance.choice(places(tree)[1:])
    at = tree
    for name in above:
        at = at[name]
    if kind < 0.4:
        del at[key]
    elif kind < 0.5:
        at[key] = json.loads("[" * 300 + "]" * 300)
    else:
        at[key] = chance.choice(ODD)
    return json.dumps(tree)


def hold(action: Callable[[], Any], case: str) -> bool:
    """Whether an action passes; any other error than one line for the user fails the test."""
    try:
        action()
    except UserError as error:
        assert str(error).isprintable(), (case, str(error))
        return False
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error}, after {case}") from error
    return True


def test_no_damage_to_a_record_is_more_than_one_line(
    online: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record of a run, read by everything that reads it; hundreds of changes, drawn once for all."""
    chance = random.Random(0)
    monkeypatch.setattr(report, "draw_curves", lambda *arguments: None)
    base = online("--trainer", "td3", *SMALL, folder="base")
    run = online("--trainer", "residual", "--trainer.base", base, *SMALL, "--eval-episodes", 1)
    manifest = checkpoint.newest(run / "checkpoints")[0] / "manifest.json"
    module, spec = load_policy(base).module, json.loads((run / "policy/policy.json").read_text())["spec"]

    def resume() -> None:
        parse(online_trainer.Args, ["--resume", str(run)], REGISTRIES)

    def table() -> None:
        report.main([str(run), "--out", str(tmp_path / "report.png")])

    def weights() -> None:
        checkpoint.load_weights(torch.nn.Identity(), "policy", run)

    readers: dict[str, tuple[Path, list[Callable[[], Any]], int]] = {
        "policy": (run / "policy/policy.json", [lambda: load_policy(run)], 70),
        "inherited": (run / "policy/policy.json", [lambda: normalisation_of(str(run), copy.deepcopy(spec))], 20),
        "residual": (run / "policy/residual.json", [lambda: load_policy(run)], 20),
        "args": (run / "args.json", [resume, lambda: diverging(run), lambda: read_args(run), table], 16),
        "status": (run / "status.json", [lambda: read_status(run), table], 20),
        "manifest": (manifest, [weights], 40),
        "lines": (run / "eval.jsonl", [lambda: read_lines(run / "eval.jsonl"), table], 12),
    }
    passed: dict[str, int] = {}
    for name, (path, actions, count) in readers.items():
        whole = path.read_text()
        for _ in range(count):
            text = damaged(whole.splitlines()[-1] if name == "lines" else whole, chance)
            if name == "manifest" and text.startswith("{") and text.endswith("}"):
                tree = json.loads(text)
                text = as_json(tree | {"sha256": checkpoint._own_hash(tree)})
            path.write_text(text + "\n" * (name == "lines"))
            passed[name] = passed.get(name, 0) + all([hold(action, f"{name}: {text[:2000]}") for action in actions])
        path.write_text(whole)
    assert load_policy(run) and hold(resume, "nothing") and module is not None
    assert all(0 < passed[name] < readers[name][2] for name in ("policy", "args")), passed


def test_a_wrong_field_is_named(script: Script) -> None:
    run = script("--trainer", "bc", "--steps", 1)
    record, policy = run / "args.json", run / "policy/policy.json"
    for path, change, message in (
        (record, lambda d: d["args"].pop("trainer"), "args.json: .* no args.trainer; expected a text"),
        (record, lambda d: d.update(argv=[1]), "args.json: .* argv.0 is 1; expected a text; copy"),
        (policy, lambda d: d["spec"]["action"].update(shape=["x"]), "spec.action.shape.0 is 'x'; expected a whole"),
        (policy, lambda d: d["models"]["policy"]["options"].update(dropout="much"), "dropout is 'much'; expected a n"),
        (policy, lambda d: d["models"]["policy"]["options"].update(hidden_dims=[10**6] * 9), "far larger network"),
        (policy, lambda d: d["models"]["policy"]["options"].update(hidden_dims=[8] * 5000), "far larger network"),
    ):
        whole = path.read_text()
        changed = json.loads(whole)
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=message):
            load_policy(run) if path == policy else read_args(run)
        path.write_text(whole)


# ---- links and pipes -----------------------------------------------------------------------------------------------


def test_no_link_leads_out_of_a_run_and_no_pipe_is_waited_for(script: Script, tmp_path: Path) -> None:
    run = script("--trainer", "bc", "--steps", 1)
    shutil.copytree(run, tmp_path / "elsewhere", symlinks=True)
    (tmp_path / "linked").symlink_to(run)
    assert load_policy(tmp_path / "linked")  # the folder itself may be one
    cases: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("policy/model.safetensors", lambda: load_policy(run)),
        ("policy/policy.json", lambda: export.main([str(run)])),
        ("args.json", lambda: evaluate.main([str(run)])),
        ("metrics.jsonl", lambda: script("--resume", run, "--steps", 2)),
        ("checkpoints/step-000000001/model-policy.safetensors", lambda: script("--init-from", run, folder="new")),
    )
    for name, action in cases:
        (run / name).rename(tmp_path / "kept")
        (run / name).symlink_to(tmp_path / "elsewhere" / name)
        with pytest.raises(UserError, match=f"{Path(name).name} is a link out of"):
            action()
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(UserError, match=f"{Path(name).name} is a pipe, socket or device"):
            action()
        (run / name).unlink()
        (tmp_path / "kept").rename(run / name)
    script("--resume", run, "--steps", 2)


def test_texts_from_a_file_do_not_steer_the_terminal(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"\\u001b[2J": 1')
    for error in (UserError("a\x1b[31mb\n\u202ec"), pytest.raises(UserError, read_json, tmp_path / "x.json").value):
        assert str(error).isprintable()


# ---- code and files that a run names -------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A plugin in the working directory, which leaves a file when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "evil_plugin.py").write_text(EVIL)
    monkeypatch.delitem(sys.modules, "evil_plugin", raising=False)
    return "evil_plugin"


def test_a_run_imports_no_plugin_that_the_command_line_does_not_name(script: Script, mine: str) -> None:
    run = script("--trainer", "bc", "--steps", 1)
    for path, key in ((run / "args.json", "args"), (run / "policy" / "policy.json", "")):
        record = json.loads(path.read_text())
        (record[key] if key else record)["plugins"] = [mine]
        if key:
            record["argv"] += ["--plugins", mine]
        path.write_text(json.dumps(record))
    commands = (
        lambda *more: evaluate.main([str(run), "--env", "gymnasium", "--env.id", "TendonToy-v0", *more]),
        lambda *more: export.main([str(run), *more]),
        lambda *more: script("--resume", run, "--steps", 2, *more),
    )
    for command in commands:
        with pytest.raises(UserError, match=f"needs plugins, .* add --plugins {mine}$"):
            command()
    load_policy(run)
    assert script("--init-from", run, "--steps", 1, folder="new") and not Path("hacked").exists()
    for command in commands:
        command("--plugins", mine)
    assert Path("hacked").exists() and read_args(run)["argv"].count("--plugins") == 1


def test_an_environment_that_a_run_names_imports_and_opens_nothing(online: Script, mine: str) -> None:
    run = online("--steps", 20, "--learning-starts", 10)
    whole = (run / "args.json").read_text()
    for name, value, message in (
        ("kwargs", '{"xml_file": "/etc/passwd"}', "may name a file; if you trust it, add --env.kwargs again"),
        ("wrappers", ['RecordVideo:{"video_folder": "videos"}'], "may name a file; .* add --env.wrappers again"),
        ("id", f"{mine}:Env-v0", f"imports the module {mine}; if you trust it, add --plugins {mine}"),
    ):
        record: dict[str, Any] = json.loads(whole)
        for options in (record["env"], record["args"]["env_options"]):
            options[name] = value
        words = value if isinstance(value, list) else [value]
        record["argv"] += [f"--env.{name}", *words]
        (run / "args.json").write_text(json.dumps(record))
        for command in (lambda: evaluate.main([str(run)]), lambda: online("--resume", run, "--steps", 24)):
            with pytest.raises(UserError, match=message):
                command()
        assert not Path("hacked").exists() and not Path("videos").exists()
        given = ["--plugins", mine] if name == "id" else [f"--env.{name}", *words]
        with pytest.raises(UserError, match="^(?!.*trust)"):  # it is tried then, and is no environment
            evaluate.main([str(run), *given])
    assert Path("hacked").exists()


def test_damaged_lines_are_left_out_of_the_curves(script: Script, tmp_path: Path, curves: None) -> None:
    run = script("--trainer", "bc", "--steps", 20, "--log-every", 10)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "train/loss": "much", "train/$\\\\frac{": 1}\n{"step": 1e400}\n{"step": -3}\n[1]\n')
    draw_curves([run], tmp_path / "curves.png")
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")][-2:] == [20, 21]
