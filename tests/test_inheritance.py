"""What a run began with stays in its folder: its data is compared, its weights, statistics and rewards are its own."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch

import toy
from components import DATASET_BUILDER_REGISTRY, MODEL_BUILDER_REGISTRY, UserError, load_policy
from components.contracts import Place, reads_weights
from components.data.fingerprint import changes, fingerprint
from components.datasets.episodes import build_episodes
from components.datasets.frames import Frames
from components.datasets.gymnasium import GymnasiumRollouts
from components.datasets.mixture import Mixture
from components.run import checkpoint, places
from components.run.curves import read_lines
from conftest import difference, learned, states, weights
from test_offline import interrupt_after

Script = Callable[..., Path]


# ---- the data ------------------------------------------------------------------------------------------------------


def made(count: int = 8, **changed: Any) -> dict[str, Any]:
    """Episodes of 10 steps as a factory returns them; `changed` is applied to their columns or to `build`."""
    generator = torch.Generator().manual_seed(0)
    action = torch.randn(count * 10, 2, generator=generator) * changed.pop("unit", 1)
    state, reward = torch.randn(count * 10, 3, generator=generator), torch.zeros(count * 10)
    if "touch" in changed:
        {"action": action, "reward": reward}[changed.pop("touch")][17] += 1e-3
    ends = torch.arange(10, count * 10 + 1, 10)
    if changed.pop("border", False):
        ends[2] += 1
    return build_episodes({"observation.state": state, "action": action, "reward": reward}, ends, "made", **changed)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"count": 14}, "8 episodes, 80 rows -> 14 episodes, 140 rows"),
        ({"unit": 100}, r"other values of 'action'; mean of 'action' \[.*\] -> \["),
        ({"touch": "reward"}, "other values of 'reward'"),
        ({"touch": "action"}, "other values of 'action'"),
        ({"border": True}, "other borders of episodes"),
        ({"seed": 5}, "other rows are held out"),
        ({"validation": 0}, "no validation set now"),
    ],
)
def test_every_change_of_the_data_is_named(now: dict[str, Any], said: str) -> None:
    before = fingerprint(made())
    assert changes(before, fingerprint(made())) == ""
    found = changes(before, fingerprint(made(**now)))
    assert re.search(said, found), found
    assert "\n" not in found


def test_data_that_is_made_again_may_differ_in_its_last_digits() -> None:
    one, other, unit, reward = made(), made(touch="action"), made(unit=1.1), made(touch="reward")
    for built in (one, other, unit, reward):
        built["dataset"].episodes.generated = True
    assert changes(fingerprint(one), fingerprint(other)) == ""
    assert "'action'" in changes(fingerprint(one), fingerprint(unit))
    assert changes(fingerprint(one), fingerprint(reward)) == "other values of 'reward'"


def test_a_mixture_is_its_sources_and_their_shares() -> None:
    def mixed(shares: list[float], **changed: Any) -> dict[str, Any]:
        sources = [made()["dataset"], made(5, **changed)["dataset"]]
        return {"dataset": Mixture(sources, ["a", "b"], shares, ["action"]), "norm_stats": {}}

    before = fingerprint(mixed([0.5, 0.5]))
    assert changes(before, fingerprint(mixed([0.5, 0.5]))) == ""
    assert changes(before, fingerprint(mixed([0.7, 0.3]))) == "shares [0.5, 0.5] -> [0.7, 0.3]"
    found = changes(before, fingerprint(mixed([0.5, 0.5], touch="reward")))
    assert found == "source 2: other values of 'reward'"


class Items:
    """A user's data; a random item is no other data."""

    def __init__(self, count: int = 20, scale: float = 1.0, noise: float = 0.0) -> None:
        self.count, self.scale, self.noise = count, scale, noise

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Any]:
        state = torch.full((3,), float(i)) + self.noise * torch.randn(3)
        return {"observation.state": state, "action": np.ones(2) * i * self.scale, "task": f"task {i % 2}"}


def test_a_users_data_is_known_by_its_length_its_statistics_and_some_items() -> None:
    def of(stats: Any = None, **options: Any) -> dict[str, Any]:
        return fingerprint({"dataset": Items(**options), "norm_stats": stats})

    state = torch.get_rng_state()
    assert changes(of(), of()) == "" == changes(of(noise=1.0), of(noise=1.0))
    assert torch.equal(state, torch.get_rng_state())
    assert changes(of(), of(count=21)) == "20 items -> 21 items"
    assert changes(of(), of(scale=2)) == "other values of 'action'"
    assert (
        changes(of(noise=1.0), of(noise=1.0, scale=2))
        == "other values of 'action'"
        == changes(of(), of(scale=2, noise=1))
    )
    one, two = ({"action": {"mean": np.zeros(2), "std": [std, 1.0]}} for std in (1.0, 3.0))
    assert changes(of(one), of(two)) == "std of 'action' [1, 1] -> [3, 1]"
    assert fingerprint({"dataset": iter(()), "norm_stats": None})["dataset"]["items"] == -1  # refused elsewhere


def test_a_dataset_may_describe_itself() -> None:
    class Own(Items):
        version: Any = ("v1",)

        def fingerprint(self) -> Any:
            return self.version

    before, now = Own(), Own()
    now.version = {"v": 2}
    one, other = (fingerprint({"dataset": dataset, "norm_stats": {}}) for dataset in (before, now))
    assert changes(one, one) == "" and changes(one, other) == "other values of 'fingerprint'"


def test_pictures_are_known_by_their_files_wherever_these_are(tmp_path: Path) -> None:
    def camera(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return Frames(3, (3, 8, 8), [tmp_path / name]).fingerprint()

    content = bytes(range(256)) * 4000
    assert camera("a", content) == camera("b", content)
    assert camera("a", content) != camera("b", content[:-1] + b"x")
    assert camera("a", content) != camera("b", content[:-1])


class Recording:
    """The toy's data, of which more is recorded, or with other units."""

    episodes, unit = 20, 1.0

    def build(self, **kwargs: Any) -> dict[str, Any]:
        built = toy.ToyData(episodes=self.episodes, action_scale=4.0).build()
        built["norm_stats"]["action"]["mean"] = [self.unit, self.unit]
        return built


@pytest.mark.parametrize("which", ["script", "online"])
def test_a_run_does_not_go_on_with_other_data(
    which: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(DATASET_BUILDER_REGISTRY, "recording", Recording)
    run = request.getfixturevalue(which)
    mixed = ("--trainer", "rlpd", "--env", "savable", "--model.hidden-dims", 16, "--model.critic.hidden-dims", 16)
    options = (*(("--trainer", "bc") if which == "script" else mixed), "--dataset", "recording", "--steps", 30)
    folder = run(*options)
    before = (folder / "metrics.jsonl").read_text()
    monkeypatch.setattr(Recording, "episodes", 35)
    monkeypatch.setattr(Recording, "unit", 3.0)
    said = r"since the run began: 20 episodes, 200 rows -> 35 episodes, 350 rows; mean of 'action' \[1, 1\] -> \[3, 3\]"
    with pytest.raises(UserError, match=f"{said}.*; restore it, or start a new run with --init-from {folder}$"):
        run("--resume", folder, "--steps", 40)
    assert (folder / "metrics.jsonl").read_text() == before
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    # A run of an older version has no record; from its next start on it has.
    shutil.rmtree(folder / "inherited")
    run("--resume", folder, "--steps", 40)
    assert sum("its data: not checked" in record.message for record in caplog.records) == 1
    run("--resume", folder, "--steps", 50)
    assert sum("its data: not checked" in record.message for record in caplog.records) == 1
    monkeypatch.setattr(Recording, "episodes", 20)
    with pytest.raises(UserError, match="350 rows -> 20 episodes"):
        run("--resume", folder, "--steps", 60)


def test_a_run_normalises_as_when_it_began(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the trainer's default modes, or the last digits of the statistics, are others in a newer version."""
    run = script("--trainer", "bc", "--steps", 5)
    spec = json.loads((run / "policy" / "policy.json").read_text())
    record = run / "inherited" / "record.json"
    stored = json.loads(record.read_text())
    assert stored["normalisation"]["modes"] == spec["normalisation"]
    stored["normalisation"] = {
        "modes": {"action": "min_max"},
        "statistics": {"action": {"min": [-9, -9], "max": [9, 9]}},
        "bounds": {},
    }
    record.write_text(json.dumps(stored))
    script("--resume", run, "--steps", 9)
    again = json.loads((run / "policy" / "policy.json").read_text())
    assert again["normalisation"] == {"action": "min_max"} and again["spec"]["action"]["stats"]["max"] == [9, 9]
    odd = [("statistics", "min", [-9, [-9]]), ("statistics", "max", "x"), ("bounds", "max", [10**400, 1, 2])]
    parts = [{**stored["normalisation"], part: {"action": {name: value}}} for part, name, value in odd]
    for damage in ("{", "[]", '{"data": 3}', '{"normalisation": {"modes": 1}}', '{"data": {"dataset": {}}}', *parts):
        text = damage if isinstance(damage, str) else json.dumps({"format": 1, "normalisation": damage})
        record.write_text(text)
        with pytest.raises(UserError, match=r"record.json: damaged .*without this file the run goes on unchecked"):
            script("--resume", run, "--steps", 12)


# ---- other runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("died_at", [0, pytest.param(25, marks=pytest.mark.slow)])
def test_a_run_needs_the_one_that_it_began_from_no_more(script: Script, online: Script, died_at: int) -> None:
    """Killed before its first checkpoint or after it, and moved, it ends as one that never stopped."""
    before = script(*toy.TRAINERS["td3_bc"], "--steps", 30, "--dataset.reward-scale", 0.01, folder="before")
    critics = ("--model.hidden-dims", 16, "--model.critic.hidden-dims", 16)
    options = ("--trainer", "td3_bc", *critics, "--env", "savable", "--steps", 60, "--save-every", 30)
    options = (*options, "--init-from", before)
    whole = online(*options, folder="whole")
    assert not (whole / "inherited" / "weights").exists()  # the checkpoints have them
    interrupt_after(online, died_at, *options)
    run = whole.parent / "elsewhere" / "moved"
    run.parent.mkdir()
    (whole.parent / "run").rename(run)
    assert (run / "inherited" / "weights").exists() == (died_at == 0)
    shutil.rmtree(before)
    online("--resume", run)
    assert states(run) == states(whole) and learned(run) == learned(whole)
    assert json.loads((run / "inherited" / "record.json").read_text())["rewards"] == [0.0, 0.01]
    policies = [json.loads((r / "policy" / "policy.json").read_text())["spec"] for r in (run, whole)]
    assert policies[0] == policies[1]
    # Of a chain of runs the third has the rewards of the first.
    third = online(*options[:-2], "--init-from", run, folder="third")
    assert json.loads((third / "inherited" / "record.json").read_text())["rewards"] == [0.0, 0.01]


def test_a_model_that_was_loaded_is_kept_until_there_is_a_checkpoint(script: Script) -> None:
    before = script("--trainer", "bc", "--steps", 5, folder="before")
    options = ("--trainer", "bc", "--load", f"policy={before}", "--steps", 20)
    whole = script(*options, folder="whole")
    interrupt_after(script, 3, *options)
    run = whole.parent / "run"
    script("--resume", before, "--steps", 50)  # the other run goes on, and this one takes no notice
    script("--resume", run)
    assert difference(weights(run), weights(whole)) == 0


def test_a_start_that_fails_leaves_nothing_to_the_next(online: Script, script: Script, tmp_path: Path) -> None:
    first, second = (script("--trainer", "bc", "--steps", s, folder=f"base{s}") for s in (3, 6))
    options = ("--trainer", "residual", "--env", "savable", "--model.hidden-dims", 16, "--model.critic.hidden-dims", 16)
    with pytest.raises(UserError, match="--trainer.scale"):
        online(*options, "--trainer.base", first, "--trainer.scale", 9)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "inherited").mkdir(parents=True)
    shutil.copytree(first / "policy", tmp_path / "run" / "inherited" / "base")  # as after kill -9
    run = online(*options, "--trainer.base", second, "--steps", 30)
    kept = (run / "policy" / "base" / "model.safetensors").read_bytes()
    assert kept == (second / "policy" / "model.safetensors").read_bytes()
    shutil.rmtree(second)
    online("--resume", run, "--steps", 40)
    (tmp_path / "mine" / "inherited").mkdir(parents=True)
    (tmp_path / "mine" / "inherited" / "letters").write_text("")
    with pytest.raises(UserError, match="inherited holds other files .letters.; choose another --run-dir"):
        script("--trainer", "bc", folder="mine")


def test_a_policy_that_plays_the_data_is_kept(script: Script, tmp_path: Path) -> None:
    before = script("--trainer", "bc", "--steps", 3, folder="before")
    (tmp_path / "run" / "inherited").mkdir(parents=True)
    factory = GymnasiumRollouts(id="TendonToy-v0", episodes=2, max_episode_steps=5, policy=str(before))
    one = factory.build(opt_params={"save_dir": str(tmp_path / "run")})
    shutil.rmtree(before)
    two = factory.build(opt_params={"save_dir": str(tmp_path / "run")})
    assert one["dataset"].episodes.generated and changes(fingerprint(one), fingerprint(two)) == ""


@dataclass(frozen=True)
class Pretrained:
    """A policy whose first weights are in a file."""

    weights: Annotated[str, Place()] = ""
    """File of them."""

    def build(self, spec: dict[str, Any]) -> torch.nn.Module:
        net = torch.nn.Linear(5, 2)
        if reads_weights():
            net.load_state_dict(checkpoint.read_tree(Path(self.weights)))
        return net


def test_a_file_of_weights_is_opened_once(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODEL_BUILDER_REGISTRY, "pretrained", Pretrained)
    file = tmp_path / "first.safetensors"
    checkpoint.write_tree(file, {"weight": torch.ones(2, 5), "bias": torch.zeros(2)})
    monkeypatch.chdir(tmp_path)
    options = ("--trainer", "minimal", "--model", "pretrained", "--model.weights", "first.safetensors", "--steps", 9)
    whole = script(*options, folder="whole")
    interrupt_after(script, 3, *options)
    run = tmp_path / "run"
    assert json.loads((run / "args.json").read_text())["args"]["model_options"]["policy"]["weights"] == str(file)
    file.unlink()
    monkeypatch.chdir("/")
    script("--resume", run)
    assert difference(weights(run), weights(whole)) == 0
    shutil.move(run / "policy", tmp_path / "policy")
    assert load_policy(tmp_path / "policy").act({"observation.state": np.zeros(5, np.float32)}).shape == (2,)
    script("--resume", run, "--steps", 12)
    assert load_policy(run).act({"observation.state": np.zeros(5, np.float32)}).shape == (2,)
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == 12


# ---- places --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Where:
    """Options with places of all kinds."""

    path: Annotated[str, Place(moves=True)] = ""
    base: Annotated[str, Place()] = ""
    sources: Annotated[tuple[str, ...], Place("(?:[^=,]*=)?([^,=]+)(?:,.*)?:[^:]*")] = ()
    name: str = "runs"


@dataclass(frozen=True)
class Whole:
    """As a script's arguments."""

    dataset_options: Where
    save_dataset: Annotated[str, Place(made=True)] = ""


def test_places_are_recorded_absolute_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "runs").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    here = str(tmp_path / "a")
    asked = Whole(Where("runs", "./runs", ("x=runs,split=train:0.5", "metaworld:1")), "new")
    found, same, _ = places.located(asked, {}, [])
    options = Where(f"{here}/runs", f"{here}/runs", (f"x={here}/runs,split=train:0.5", "metaworld:1"))
    assert (found, same) == (Whole(options, f"{here}/new"), set())
    assert places.located(Whole(Where("gone", "s3://x")), {}, [])[0] == Whole(Where("gone", "s3://x"))
    stored = {"dataset_options": vars(found.dataset_options), "save_dataset": found.save_dataset}
    everything = {"dataset_options.path", "dataset_options.base", "dataset_options.sources", "save_dataset"}
    for folder in ("a", "b"):  # the words of the command line mean what they meant, wherever it is resumed
        monkeypatch.chdir(tmp_path / folder)
        again, same, moves = places.located(asked, stored, [])
        assert (again, same, moves) == (found, everything, {"dataset_options.path"})
    other, same, _ = places.located(Whole(Where("runs", "other")), stored, [])
    assert same == {"dataset_options.path"}
    shutil.move(tmp_path / "a" / "runs", tmp_path / "b" / "runs")  # everything has moved
    assert places.located(asked, stored, [])[0].dataset_options.path == str(tmp_path / "b" / "runs")


def test_the_data_may_have_moved_if_it_is_the_same(script: Script, tmp_path: Path) -> None:
    def write(folder: str, seed: int) -> Path:
        draw = np.random.default_rng(seed)
        (tmp_path / folder).mkdir(exist_ok=True)
        state, action = draw.normal(size=(60, 5)), draw.normal(size=(60, 2))
        np.savez(tmp_path / folder / "push.npz", state=state, action=action, episode_ends=np.arange(10, 61, 10))
        return tmp_path / folder / "push.npz"

    run = script("--trainer", "bc", "--dataset", "pusht", "--dataset.path", write("one", 0), "--steps", 3)
    script("--resume", run, "--dataset.path", write("two", 0), "--steps", 5)
    with pytest.raises(UserError, match=r"the data changed since the run began: other values of 'action', 'observ"):
        script("--resume", run, "--dataset.path", write("three", 1), "--steps", 7)
    with pytest.raises(UserError, match="cannot change: dataset.action_steps 1 -> 2"):
        script("--resume", run, "--dataset.action-steps", 2)
    write("two", 1)  # files of the same size
    with pytest.raises(UserError, match="the data changed since the run began: other values of"):
        script("--resume", run, "--steps", 7)
    shutil.rmtree(run / "inherited")
    with pytest.raises(UserError, match="cannot change: dataset.path"):
        script("--resume", run, "--dataset.path", tmp_path / "one" / "push.npz")
