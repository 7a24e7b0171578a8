"""Checkpoints: whole or absent, verified, without pickle."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from components.run.files import beside
from components.run.logs import LATER, Logs, append_line
from components.run.pieces import Parts
from conftest import difference, learned, replayed, states, weights


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


def flip(path: Path) -> None:
    """Flip a bit in place, so that whatever else links to the file has it, too."""
    with open(path, "r+b") as file:
        data = bytearray(file.read())
        data[len(data) // 2] ^= 1
        file.seek(0)
        file.write(data)


def make_pieces(root: Path, *steps: int, keep_last: int = 2) -> None:
    """Checkpoints of which each has a new piece, and all former ones."""
    for step in steps:
        name = f"piece-{step}"
        kept = sorted(f"piece-{before}" for before in range(10, step, 10))
        parts = Parts(kept, {name: {"rows": torch.full((4,), float(step))}})
        mine = {"random": torch.arange(4), "memory": {"parts": parts}}
        save(root, step, {"trainer": {"step": step}}, mine, {"trainer": "toy", "config": {}}, keep_last, 0, -1)


def test_the_two_newest_share_no_piece_and_each_is_written_twice(tmp_path: Path) -> None:
    files: set[int] = set()
    before: set[int] = set()
    for step in range(10, 70, 10):
        make_pieces(tmp_path, step)
        now = {path.stat().st_ino for path in (tmp_path / f"step-{step:09d}").iterdir()}
        assert not now & before
        files, before = files | {(tmp_path / f"step-{step:09d}/piece-10.safetensors").stat().st_ino}, now
    assert len(files) == 2
    make_pieces(tmp_path, 60)  # again, as after an evaluation that was owed
    now = {path.stat().st_ino for path in (tmp_path / "step-000000060").iterdir()}
    assert not now & {path.stat().st_ino for path in (tmp_path / "step-000000050").iterdir()}
    make_pieces(tmp_path, 70, 80, keep_last=1)  # with one checkpoint there is nobody to share with
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-000000080"]
    assert set(verify(newest(tmp_path)[0])["pieces"]) == {f"piece-{step}.safetensors" for step in range(10, 90, 10)}


@pytest.mark.parametrize("keep_last", [2, 3])
def test_a_flipped_bit_in_a_shared_piece_is_mended(tmp_path: Path, keep_last: int) -> None:
    make_pieces(tmp_path, 10, 20, 30, 40, keep_last=keep_last)
    flip(tmp_path / "step-000000040" / "piece-20.safetensors")
    folder, manifest = newest(tmp_path)
    assert manifest["step"] == 40 and verify(folder) == manifest
    assert torch.equal(read_tree(folder / "piece-20.safetensors")["rows"], torch.full((4,), 20.0))
    for path in checkpoint.steps(tmp_path):
        verify(path)  # whichever had the same file
    make_pieces(tmp_path, 50)
    verify(newest(tmp_path)[0])


def test_a_piece_without_another_copy(tmp_path: Path) -> None:
    make_pieces(tmp_path, 10, 20, 30)
    flip(tmp_path / "step-000000030" / "piece-30.safetensors")
    assert newest(tmp_path)[1]["step"] == 20  # where it is needed by the newest checkpoint alone, that one is not used
    make_pieces(tmp_path, 30)
    flip(tmp_path / "step-000000030" / "piece-30.safetensors")
    with pytest.raises(DamagedError, match=r"piece-30.safetensors: damaged in every checkpoint"):
        make_pieces(tmp_path, 40)  # which would have copied it
    make_pieces(tmp_path, 30)
    for path in checkpoint.steps(tmp_path):
        flip(path / "piece-10.safetensors")
    shutil.rmtree(tmp_path / ".damaged-step-000000030")
    for _ in range(2):  # else nothing but this piece is lost
        folder, manifest = newest(tmp_path)
        assert manifest["step"] == 30 and not (folder / "piece-10.safetensors").exists()
        own = checkpoint._rank_state(folder, 0)["memory"]["parts"]
        assert [None if part is None else int(part["rows"][0]) for part in own] == [None, 20, 30]
    with pytest.raises(DamagedError, match="piece-10"):
        verify(folder)
    assert newest(tmp_path, set_aside=False)[1]["step"] == 30  # weights are to be had without it


def pieces_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("replay-*"))


SAVABLE = ("--env", "savable", "--env.mode", "SameStep", "--trainer.n-step", 2, "--save-every", 20, "--steps", 60)


def test_a_run_survives_flipped_bits_in_its_buffer(
    online: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = online(*SAVABLE, "--steps", 80, folder="whole")
    run = online(*SAVABLE)
    folder, former = (path for path in reversed(checkpoint.steps(run / "checkpoints")))
    flip(pieces_of(folder)[0])
    online("--resume", run, "--steps", 80)
    assert difference(weights(run), weights(whole)) == 0
    for folder in checkpoint.steps(run / "checkpoints"):
        flip(pieces_of(folder)[1])
    capsys.readouterr()
    online("--resume", run, "--steps", 100)
    assert "goes on without 20 transitions, whose files are damaged" in capsys.readouterr().out
    folder, _ = newest(run / "checkpoints")
    assert [len(env["ended"]) for env in replayed(folder)] == [40, 40] and len(pieces_of(folder)) == 1


def test_a_save_that_finds_a_damaged_piece_writes_it_again(
    online: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, saves = checkpoint.save, iter(range(10))

    def damaging(root: Path, *arguments: Any) -> None:
        if next(saves) == 1:
            flip(pieces_of(newest(root)[0])[0])
        whole(root, *arguments)

    monkeypatch.setattr(checkpoint, "save", damaging)
    run = online(*SAVABLE)
    assert "an earlier checkpoint has lost a piece, which is written again" in capsys.readouterr().out
    folder, manifest = newest(run / "checkpoints")
    assert manifest["step"] == 60 and [len(env["ended"]) for env in replayed(folder)] == [30, 30]


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


class Killed(BaseException):
    """Ends a run as kill -9 would: nothing is recorded."""


@pytest.mark.parametrize(("which", "at"), [("first", "write_json"), ("last", "link_best"), ("last", "_prune")])
def test_a_run_that_is_killed_inside_a_save_leaves_no_trace(
    script: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, at: str, which: str
) -> None:
    """The logs, `best` and the folders are those of a run that never stopped, also after the first or the last save."""
    options = ("--trainer", "bc", "--steps", 40, "--save-every", 10, "--eval-every", 10, "--log-every", 10)
    whole = script(*options, folder="whole")
    action, calls = getattr(checkpoint, at), iter(range(1, 10))  # the manifest is written before the rename

    def killed(*arguments: Any) -> None:
        if next(calls) == {"first": 1, "last": 4}[which]:
            raise Killed
        action(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, at, killed)
        patch.setattr(checkpoint.shutil, "rmtree", lambda *arguments, **keywords: None)
        script(*options)
    run = script("--resume", whole.parent / "run")
    assert learned(run) == learned(whole)
    folders = [sorted(path.name for path in (of / "checkpoints").iterdir()) for of in (run, whole)]
    assert folders[0] == folders[1] and os.readlink(run / "checkpoints" / "best") == os.readlink(
        whole / "checkpoints" / "best"
    )
    assert states(run) == states(whole)


def test_logs_go_back_to_the_lines_of_the_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    logs = Logs(tmp_path, said.append)
    for step in (0, 10, 10):
        logs.append("eval.jsonl", {"step": step})
    logs.append("episodes.jsonl", {"step": 9})
    state = logs.state_dict()
    logs.append("eval.jsonl", {"step": 10})  # owed, and made up for after the checkpoint
    logs.append("episodes.jsonl", {"step": 8})
    append_line(tmp_path / "eval.jsonl", {"step": 10, LATER: "a command"})
    with open(tmp_path / "episodes.jsonl", "ab") as file:
        file.write(b'{"step": 9, "torn')
    again = Logs(tmp_path, said.append)
    again.load_state_dict(state)
    again.rewind(10, counted=True)
    kept = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [line.get(LATER, line["step"]) for line in kept] == [0, 10, 10, "a command"]
    assert (tmp_path / "episodes.jsonl").read_text() == '{"step": 9}\n' and again.state_dict() == state and not said
    again.rewind(5, counted=False)  # an old checkpoint has steps only
    assert (tmp_path / "eval.jsonl").read_text() == '{"step": 0}\n'
    (tmp_path / "eval.jsonl").write_text('{"step": 0}\n\xff\n')
    logs.rewind(10, counted=True)
    assert said == [f"{tmp_path / 'eval.jsonl'}: 1 damaged line(s) dropped"]
    Logs(tmp_path, said.append).rewind(0, counted=True)  # no checkpoint: everything is written again
    assert not (tmp_path / "eval.jsonl").read_bytes()


def test_what_a_killed_process_left_beside_a_file_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    ours = beside(tmp_path / "data")
    stale, other = (ours.with_name(re.sub(r"\d+$", str(pid), ours.name)) for pid in (process.pid, os.getppid()))
    for path in (ours, stale, other):
        path.mkdir()
        (path / "part").touch()
    assert beside(tmp_path / "data") == ours
    assert ours.exists() and other.exists() and not stale.exists()


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
