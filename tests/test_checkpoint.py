"""Checkpoints: whole or absent, verified, without pickle."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from components import UserError
from components.learning.metrics import Metrics
from components.run import checkpoint
from components.run.checkpoint import (
    Checkpoints,
    DamagedError,
    flatten,
    newest,
    read_tree,
    save,
    unflatten,
    verify,
    write_tree,
)


def make(root: Path, *steps: int, keep_last: int = 10, best: int = -1) -> None:
    """Write small checkpoints of one process."""
    for step in steps:
        shared = {"model-policy": {"weight": torch.full((3, 2), float(step))}, "trainer": {"progress": {"step": step}}}
        mine = {"random": torch.arange(4), "metrics": {"loss": [0.1, step]}}
        save(root, step, shared, mine, {"trainer": "bc", "config": {"dims": (1, 2)}}, keep_last, 0, best)


def test_trees_survive_exactly(tmp_path: Path) -> None:
    shared = torch.randn(4)
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "avg": shared[:2]}, 1: {"same": shared}},
        "betas": (0.9, 0.999),
        "list": [1, None, True, "text", 1e-17, [], {}],
        "bf16": torch.randn(2).bfloat16(),
        "turned": torch.randn(3, 2).T,
        "empty": torch.zeros(0),
    }
    write_tree(tmp_path / "a.safetensors", tree)
    back = read_tree(tmp_path / "a.safetensors")
    assert back["betas"] == (0.9, 0.999) and back["list"] == tree["list"] and list(back["state"]) == [0, 1]
    assert torch.equal(back["state"][0]["avg"], shared[:2]) and torch.equal(back["state"][1]["same"], shared)
    assert torch.equal(back["turned"], tree["turned"]) and back["bf16"].dtype == torch.bfloat16
    tensors, description = flatten(tree)
    assert torch.equal(unflatten(tensors, json.loads(json.dumps(description)))["bf16"], tree["bf16"])


@pytest.mark.parametrize("odd", [{"a": {1.5: 2}}, {"a": object()}, {"a": {"b": nn.Linear(1, 1)}}])
def test_what_would_need_pickle_is_refused_by_its_place(odd: dict) -> None:
    with pytest.raises(TypeError, match="a"):
        flatten(odd)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda p: torch.optim.Adam(p, 1e-2, fused=True),
        lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
        lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, 1e-2),
        lambda p: torch.optim.Adam(p, torch.tensor(1e-2), fused=True),
    ],
)
def test_optimizers_go_on_bit_for_bit(tmp_path: Path, make_optimizer: object) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
        return net, make_optimizer(net.parameters())  # type: ignore[operator]

    def go(net: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> None:
        for i in range(first, first + 5):
            optimizer.zero_grad()
            net(torch.full((1, 3), float(i))).square().sum().backward()
            optimizer.step()

    net, optimizer = fresh()
    go(net, optimizer, 0)
    write_tree(tmp_path / "o.safetensors", {"net": net.state_dict(), "optimizer": optimizer.state_dict()})
    again, resumed = fresh()
    state = read_tree(tmp_path / "o.safetensors")
    again.load_state_dict(state["net"])
    resumed.load_state_dict(state["optimizer"])
    go(net, optimizer, 5)
    go(again, resumed, 5)
    assert torch.equal(net.weight, again.weight)


def test_the_newest_is_kept_and_verified(tmp_path: Path) -> None:
    make(tmp_path, 10, 20, 30, keep_last=2)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-000000020", "step-000000030"]
    folder, manifest = newest(tmp_path)
    assert folder.name == "step-000000030" and manifest["step"] == 30 and manifest["trainer"] == "bc"
    assert set(manifest["files"]) == {"model-policy.safetensors", "trainer.safetensors", "rank-0.safetensors"}
    assert manifest["shapes"]["model-policy"] == {"weight": [3, 2]}
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_the_best_is_kept_however_old(tmp_path: Path) -> None:
    make(tmp_path, 10, keep_last=1, best=10)
    make(tmp_path, 20, 30, keep_last=1, best=10)
    assert os.readlink(tmp_path / "best") == "step-000000010"
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-000000010", "step-000000030"]
    make(tmp_path, 40, keep_last=1, best=40)
    assert os.readlink(tmp_path / "best") == "step-000000040" and len(checkpoint.steps(tmp_path)) == 1


def damages() -> list[tuple[str, str]]:
    files = ["model-policy.safetensors", "trainer.safetensors", "rank-0.safetensors", "manifest.json"]
    return [
        (file, kind)
        for file in files
        for kind in ("truncate", "append", "delete", "flip first", "flip middle", "flip last")
    ]


@pytest.mark.parametrize(("file", "kind"), damages())
def test_every_damage_is_noticed_and_the_one_before_is_used(tmp_path: Path, file: str, kind: str) -> None:
    make(tmp_path, 10, 20)
    path = tmp_path / "step-000000020" / file
    data = bytearray(path.read_bytes())
    if kind == "delete":
        path.unlink()
    elif kind == "append":
        path.write_bytes(data + b"x")
    elif kind == "truncate":
        path.write_bytes(data[:-1])
    else:
        data[{"flip first": 0, "flip middle": len(data) // 2, "flip last": len(data) - 3}[kind]] ^= 1
        path.write_bytes(data)
    with pytest.raises(DamagedError, match=file):
        verify(path.parent)
    folder, _ = newest(tmp_path)
    assert folder.name == "step-000000010"
    assert (tmp_path / ".damaged-step-000000020").exists()


def test_the_same_step_is_damaged_twice(tmp_path: Path) -> None:
    for _ in range(2):  # the run comes by it again after it went back
        make(tmp_path, 10, 20)
        (tmp_path / "step-000000020" / "trainer.safetensors").unlink()
        assert newest(tmp_path)[0].name == "step-000000010"


@pytest.mark.parametrize("which", ["script", "online"])
def test_every_damage_to_a_real_checkpoint_is_noticed(which: str, request: pytest.FixtureRequest) -> None:
    """Truncated, flipped bits, appended to, missing: each file of a run's newest checkpoint, 100 %."""
    run = request.getfixturevalue(which)("--trainer", {"script": "bc", "online": "sac"}[which], "--steps", 30)
    folder, manifest = newest(run / "checkpoints")
    chance = random.Random(0)
    names = [*manifest["files"], "manifest.json"]
    assert {"rank-0.safetensors", "trainer.safetensors", "optimizer-policy.safetensors"} < set(names)
    cases = noticed = 0
    for name in names:
        path = folder / name
        whole = path.read_bytes()
        damaged: list[bytes | None] = [None, whole + b"\0", b""]
        damaged += [whole[: chance.randrange(len(whole))] for _ in range(3)]
        for place in [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(8))]:
            damaged.append(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        for data in damaged:
            path.unlink()
            if data is not None:
                path.write_bytes(data)
            cases += 1
            try:
                verify(folder)
            except DamagedError as error:
                noticed += name in str(error)
            path.write_bytes(whole)
    assert verify(folder) == manifest
    assert noticed == cases >= 80, f"{noticed} of {cases}"


@pytest.mark.parametrize("damage", ["args.json", "status.json"])
def test_damage_beside_the_checkpoints(script: Callable[..., Path], damage: str) -> None:
    run = script("--trainer", "bc", "--steps", 10)
    (run / damage).write_text('{"sta')
    if damage == "args.json":
        with pytest.raises(UserError, match=r"args.json: damaged \(JSONDecodeError"):
            script("--resume", run)
    else:  # where the run stands is told by its checkpoints
        script("--resume", run, "--steps", 20)
        assert json.loads((run / damage).read_text())["step"] == 20


def test_nothing_but_damage_is_refused_and_so_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        newest(tmp_path)
    assert checkpoint.latest(tmp_path / "nowhere") is None
    make(tmp_path, 10)
    (tmp_path / "step-000000010" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        newest(tmp_path)
    with pytest.raises(UserError, match="no checkpoint here"):  # still refused once it has been set aside
        checkpoint.latest(tmp_path)


def test_a_save_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 10, keep_last=1)

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path, 20, keep_last=1)
    assert newest(tmp_path)[1]["step"] == 10
    make(tmp_path, 30, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000030"]  # the half-written one is gone, too


def test_stale_temporary_folders_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-000000005").mkdir(parents=True)
    make(tmp_path, 10)
    assert not list(tmp_path.glob(".tmp-*"))


def test_another_trainer_or_shape_is_refused(tmp_path: Path) -> None:
    def restore(width: int, name: str) -> None:
        models = nn.ModuleDict({"policy": nn.Linear(2, width, bias=False)})
        learner = SimpleNamespace(models=models, metrics=Metrics())
        args = SimpleNamespace(trainer=name)
        Checkpoints(SimpleNamespace(path=tmp_path), args, learner).load(*newest(tmp_path))

    make(tmp_path, 10)
    with pytest.raises(UserError, match=r"trainer 'bc'; expected format 2, trainer 'iql'"):
        restore(3, "iql")
    with pytest.raises(UserError, match=r"does not fit: policy.weight: \[3, 2\] there, \[4, 2\] here"):
        restore(4, "bc")
