"""Actions as they are learnt: relative to the state, as steps, rotations as 6D; and the way back to the robot's."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from components import UserError, load_policy
from components.acting.inference import Inference
from components.acting.planner import Timeline
from components.acting.policy import Policy
from components.acting.policy_folder import describe
from components.acting.recordings import Recordings
from components.contracts import Goals, GoalSampling, Window
from components.data import rotations
from components.data.actions import STATE, ActionForm, Dimensions, Rotation, form_of, step_statistics
from components.data.features import describe_data
from components.data.normalisation import Normaliser
from components.datasets.episodes import build, from_columns
from components.datasets.goals import goal_transitions
from components.datasets.learnt import LearntOptions
from components.datasets.mixture import MixtureDataset
from components.datasets.recorded import recordings
from components.datasets.transitions import transitions
from components.export import Whole, difference, eager_call, example, export
from components.run import inheritance
from components.run.inheritance import Inheritance
from conftest import FIXTURES
from conftest import build as built_from

Script = Callable[..., Path]
LENGTHS = (25, 15, 20)
ACTION, OBSERVED = ["x", "y", "z", "rx", "ry", "rz", "grip"], ["x", "y", "z", "qx", "qy", "qz", "qw", "grip"]
TURNED = ("rx,ry,rz=axis_angle@qx,qy,qz,qw=quaternion_xyzw",)
ARM = LearntOptions(action="relative", action_keys=("!grip",), rotations=TURNED)
STEPS = replace(ARM, action="delta")


def turned(count: int, seed: int = 0) -> Tensor:
    """Random rotations as quaternions, float64, some of them of nearly no angle, some of nearly pi."""
    axis = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    axis /= axis.norm(dim=1, keepdim=True)
    angle = torch.rand(count, 1, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64) * math.pi
    some = torch.tensor([0.0, 1e-9, 1e-4, math.pi - 1e-4, math.pi - 1e-9, math.pi])[:, None].double()
    angle[: len(some)] = some[:count]
    return torch.cat([axis * (angle / 2).sin(), (angle / 2).cos()], 1)


def data(options: LearntOptions, chunk: int, obs_steps: int = 1, held_out: bool = True) -> dict[str, Any]:
    """Episodes of an arm: position, rotation and gripper, both as observed and as commanded; nothing in common."""
    rows = sum(LENGTHS)
    draw = torch.Generator().manual_seed(3)
    state, action = (torch.randn(rows, 3, generator=draw) for _ in range(2))
    matrix = rotations.to_matrix("quaternion_xyzw", turned(rows, 5))
    sign = torch.where(torch.rand(rows, 1, generator=draw) < 0.5, -1.0, 1.0)
    state = torch.cat([state, sign * turned(rows).float(), torch.rand(rows, 1, generator=draw)], 1)
    action = torch.cat([action, rotations.from_matrix("axis_angle", matrix).float(), torch.full((rows, 1), 0.3)], 1)
    episodes = from_columns(columns={STATE: state, "action": action}, ends=torch.tensor(LENGTHS).cumsum(0), name="arm")
    episodes.names = {"action": ACTION, STATE: OBSERVED}
    split = torch.tensor([False, False, held_out])
    return options.formed(build(episodes, obs_steps, chunk, 0.0, 0, split if held_out else None))


def absolute(dataset: Any, obs_steps: int = 1) -> dict[str, Any]:
    """The same items with actions as they are recorded."""
    return type(dataset)(dataset.episodes, dataset.rows, obs_steps, dataset.action_steps).get_batch(every(dataset))


def every(dataset: Any) -> Tensor:
    return torch.arange(len(dataset))


# ---- rotations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", rotations.WIDTHS)
def test_every_form_of_a_rotation_and_back(kind: str) -> None:
    """Also through 6 numbers in float32, whose noise Gram-Schmidt removes."""
    matrix = rotations.to_matrix("quaternion_xyzw", turned(2000))
    numbers = rotations.from_matrix(kind, matrix)
    assert numbers.shape == (2000, rotations.WIDTHS[kind]) and not rotations.misfit(kind, numbers)
    again = rotations.to_matrix(kind, numbers)
    assert (again - matrix).abs().max() < 1e-7  # of Euler angles where the middle one is nearly a right angle
    six = rotations.from_matrix("6d_columns", matrix).float()
    stretched = six * torch.tensor([3.0, 3.0, 3.0, 0.1, 0.1, 0.1])
    for given in (six, stretched):
        found = rotations.from_matrix(kind, rotations.to_matrix("6d_columns", given.double()))
        assert (rotations.nearest(kind, found, numbers) - numbers).abs().max() < 1e-6


def test_rotations_by_hand() -> None:
    """A quarter about z, then, seen from outside, a quarter about x: x -> y -> z."""
    quarter, half = math.pi / 2, math.sqrt(0.5)
    about_z = [[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]
    for kind, numbers in {
        "axis_angle": [0, 0, quarter],
        "quaternion_xyzw": [0, 0, half, half],
        "quaternion_wxyz": [half, 0, 0, half],
        "euler_xyz": [0, 0, quarter],
        "euler_ZYX": [quarter, 0, 0],
        "6d_columns": [0, 1, 0, -1, 0, 0],
        "6d_rows": [0, -1, 0, 1, 0, 0],
        "matrix": [0, -1, 0, 1, 0, 0, 0, 0, 1],
    }.items():
        found = rotations.to_matrix(kind, torch.tensor([numbers], dtype=torch.float64))
        assert torch.allclose(found, torch.tensor([about_z], dtype=torch.float64), atol=1e-12), kind
    both = [[0.0, -1, 0], [0, 0, -1], [1, 0, 0]]
    for kind, numbers in {"euler_zxy": [quarter, quarter, 0], "euler_XZY": [quarter, quarter, 0]}.items():
        found = rotations.to_matrix(kind, torch.tensor([numbers], dtype=torch.float64))
        assert torch.allclose(found, torch.tensor([both], dtype=torch.float64), atol=1e-12), kind


def test_any_six_numbers_are_a_rotation() -> None:
    odd = torch.tensor(
        [[0.0] * 6, [1, 2, 3, 2, 4, 6], [0, 0, 0, 1, 0, 0], [1e-20, 0, 0, 0, 1e-20, 0], [1, 0, 0, 1, 1e-9, 0]]
    )
    for numbers in (odd, odd.double()):
        matrix = rotations.to_matrix("6d_columns", numbers)
        assert torch.allclose(
            matrix @ matrix.transpose(1, 2), torch.eye(3, dtype=matrix.dtype).expand(5, 3, 3), atol=1e-5
        )
        assert torch.allclose(torch.linalg.det(matrix), torch.ones(5, dtype=matrix.dtype), atol=1e-5)


# ---- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [ARM, STEPS, LearntOptions(rotations=("3:6=axis_angle",))])
@pytest.mark.parametrize(("chunk", "obs_steps"), [(1, 1), (8, 2), (40, 1)])
def test_there_and_back(options: LearntOptions, chunk: int, obs_steps: int) -> None:
    """Items are those of whole episodes, with padding, and 40 steps are more than any episode has."""
    built = data(options, chunk, obs_steps)
    dataset, form = built["dataset"], built["dataset"].form
    learnt, recorded = dataset.get_batch(every(dataset)), absolute(dataset, obs_steps)
    assert learnt["action"].shape[-1] == form.learnt_width == 10 and learnt["action"].dtype == torch.float32
    found = form.nearest(form.to_robot(learnt["action"], learnt), recorded["action"])
    assert (found - recorded["action"]).abs().max() < 1e-6
    assert torch.equal(form.from_robot(recorded["action"], recorded), learnt["action"])
    assert all(torch.equal(learnt[key], recorded[key]) for key in learnt if key != "action")
    normaliser = Normaliser(describe_data(built, "arm"))
    undone = normaliser.undo("action", normaliser(learnt)["action"])
    again = form.nearest(form.to_robot(undone, learnt), recorded["action"])
    assert (again - recorded["action"]).abs().max() < 1e-5  # through float32 units, too
    assert torch.equal(again[..., 6], torch.full_like(again[..., 6], 0.3))  # a constant of the robot's actions


def test_by_hand() -> None:
    rows = torch.arange(5.0)[:, None]
    episodes = from_columns({STATE: 100 * rows, "action": rows**2}, torch.tensor([3, 5]), "rows")
    for mode, first, padded in (("relative", [0, 1, 4], [-296, -296 - 3]), ("delta", [0, 1, 3], [])):
        built = LearntOptions(action=mode).formed(build(episodes, 1, 3, 0.0))  # type: ignore[arg-type]
        batch = built["dataset"].get_batch(torch.arange(5))
        assert batch["action"][0].flatten().tolist() == first
        assert batch["action"][1].flatten().tolist() == ([-99, -96, -96] if mode == "relative" else [-99, 3, 0])
        assert batch["action"][4].flatten().tolist() == ([-384] * 3 if mode == "relative" else [-384, 0, 0])
        assert not padded or batch["action"][3].flatten().tolist() == [-291, -284, -284]


def test_rotations_are_relative_in_the_frame_of_the_state() -> None:
    form = ActionForm(3, "relative", (), (Rotation((0, 1, 2), "axis_angle", (0, 1, 2), "axis_angle"),), 3)
    state, action = torch.tensor([[0, 0, 1.0]]), torch.tensor([[0, 0, 1.5]])
    found = rotations.from_matrix("axis_angle", rotations.to_matrix("6d_columns", form.encode(action, state)))
    assert torch.allclose(found, torch.tensor([[0, 0, 0.5]]), atol=1e-6)
    turn = rotations.to_matrix("axis_angle", torch.tensor([[0.3, -0.4, 2.0]]))
    seen = [rotations.from_matrix("axis_angle", turn @ rotations.to_matrix("axis_angle", x)) for x in (action, state)]
    assert torch.allclose(form.encode(*seen), form.encode(action, state), atol=1e-6)  # wherever the world's axes are


@pytest.mark.parametrize("mode", ["absolute", "relative", "delta"])
@pytest.mark.parametrize("kind", ["quaternion_xyzw", "quaternion_wxyz", "axis_angle", "euler_xyz"])
def test_a_rotation_has_the_numbers_that_the_data_has(kind: str, mode: str) -> None:
    """Of a gripper that points down: quaternions with x > 0 and any w, vectors beyond pi, unwrapped angles."""
    down = torch.tensor([math.pi, 0, 0], dtype=torch.float64)
    down = rotations.to_matrix("axis_angle", down) @ rotations.to_matrix("axis_angle", 0.1 * turned(60, 2)[:, :3])
    usual = rotations.from_matrix(kind, down)
    recorded = rotations.nearest(kind, usual, usual[0].abs() + 0.01).float()
    assert (recorded.double() - usual).abs().max() > 1  # the usual ones jump
    columns = {STATE: recorded.roll(1, 0), "action": recorded}
    built = LearntOptions(action=mode, rotations=(f"0:{rotations.WIDTHS[kind]}={kind}",)).formed(  # type: ignore[arg-type]
        build(from_columns(columns, torch.tensor([60]), "down"), 1, 4, 0.0)
    )
    batch, form = built["dataset"].get_batch(torch.arange(60)), built["dataset"].form
    wanted = torch.stack([recorded.roll(-k, 0) for k in range(4)], 1)[:57]
    assert (form.to_robot(batch["action"], batch)[:57] - wanted).abs().max() < 1e-6


# ---- statistics ----------------------------------------------------------------------------------------------------


def moments(built: dict[str, Any], batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the normalised actions of a batch at each step, without padding, `[T, D]`."""
    action = Normaliser(describe_data(built, "it"), {"action": "mean_std"})(batch)["action"].double()
    keep = [~batch["action_is_pad"][:, k] for k in range(action.shape[1])]
    each = [action[keep[k], k] for k in range(action.shape[1]) if keep[k].sum() > 3]
    return torch.stack([x.mean(0) for x in each]), torch.stack([x.std(0, correction=0) for x in each])


@pytest.mark.parametrize("options", [ARM, STEPS])
def test_statistics_are_those_of_what_is_learnt(options: LearntOptions) -> None:
    """After the transform, at each step of the chunk, of the training episodes alone, without padding."""
    built = data(options, 8)
    dataset = built["dataset"]
    batch = dataset.get_batch(every(dataset))
    mean, std = moments(built, batch)
    assert mean.shape == (8, 10) and mean.abs().max() < 1e-5
    assert (std - 1).abs().max() < 1e-4 or bool((std[:, 3] == 0).all())  # the gripper is constant
    assert (std[:, [0, 1, 2, *range(4, 10)]] - 1).abs().max() < 1e-4
    assert not torch.allclose(
        torch.tensor(built["norm_stats"]["action"]["mean"])[0, :3], torch.tensor(dataset.form.stats["mean"])[:3]
    )


def test_a_mixtures_statistics_are_those_of_what_is_learnt(tmp_path: Path) -> None:
    pusht = str(FIXTURES / "pusht_planner.npz")
    sources = (f"pusht={pusht},episodes=0:4:0.75", f"pusht={pusht},episodes=4:6:0.25")
    mixed = MixtureDataset(sources, action="relative", action_steps=6, validation=0).build()
    alone = [built_from(pusht, action="relative", action_steps=6, validation=0, episodes=(e,)) for e in ("0:4", "4:6")]
    mean = [np.array(one["norm_stats"]["action"]["mean"]) for one in alone]
    assert np.allclose(mixed["norm_stats"]["action"]["mean"], 0.75 * mean[0] + 0.25 * mean[1])
    std = [np.array(one["norm_stats"]["action"]["std"]) for one in alone]
    centre = 0.75 * mean[0] + 0.25 * mean[1]
    both = sum(share * (s**2 + (m - centre) ** 2) for share, m, s in zip((0.75, 0.25), mean, std, strict=True))
    assert np.allclose(np.array(mixed["norm_stats"]["action"]["std"]) ** 2, both)
    batch = mixed["dataset"].get_batch(torch.tensor([0, len(mixed["dataset"]) - 1]))
    assert torch.equal(batch["action"][0], alone[0]["dataset"][0]["action"])
    assert torch.equal(batch["action"][1], alone[1]["dataset"][len(alone[1]["dataset"]) - 1]["action"])
    spec = describe_data(mixed, "mixture")
    assert ActionForm.of(spec).pairs == ((0, 0), (1, 1))
    with pytest.raises(UserError, match=r"action is common to all sources: set --dataset\.action"):
        MixtureDataset((f"pusht={pusht},action=relative:1",)).build()


def test_steps_that_few_items_reach_share_their_statistics() -> None:
    asked: list[list[int]] = []

    def of(steps: Any) -> dict[str, list[float]]:
        asked.append(list(steps))
        return {"mean": [float(len(asked))]}

    assert step_statistics([100, 50, 5, 4, 0], of)["mean"] == [[1.0], [2.0], [3.0], [4.0], [4.0]]
    assert asked == [[0], [1], [2], [2, 3, 4]]


@pytest.mark.parametrize("options", [ARM, STEPS, LearntOptions()])
def test_a_chunk_longer_than_every_episode(options: LearntOptions) -> None:
    built = data(options, 200, held_out=False)
    stats = {name: np.array(value) for name, value in built["norm_stats"]["action"].items()}
    spec, batch = describe_data(built, "arm"), built["dataset"].get_batch(torch.arange(60))
    normaliser = Normaliser(spec)
    assert all(np.isfinite(value).all() for value in stats.values())
    assert bool((normaliser.scale["action"] > 1e-3).all()) and normaliser(batch)["action"].isfinite().all()
    assert batch["action_is_pad"].sum(1).tolist() == [200 - n + i for n in LENGTHS for i in range(n)]
    if options.action != "absolute":
        assert stats["std"].shape == (200, 10) and (stats["std"][100] == stats["std"][199]).all()
        assert stats["std"][199, 0] > 0.1


# ---- the policy ----------------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    """Returns the chunk that was learnt at the nearest state, normalised, and keeps what it was told."""

    real_time = True

    def __init__(self, built: dict[str, Any]) -> None:
        super().__init__()
        parts = [built[part] for part in ("dataset", "validation") if part in built]
        batches = [part.get_batch(every(part)) for part in parts]
        normaliser = Normaliser(describe_data(built, "arm"))
        known = [normaliser(batch) for batch in batches]
        self.states, self.chunks = (torch.cat([batch[key] for batch in known]) for key in (STATE, "action"))
        self.told: dict[str, Tensor] = {}

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        self.told = dict(batch)
        return self.chunks[torch.cdist(batch[STATE], self.states).argmin(1)]


def remembering(options: LearntOptions, chunk: int, **settings: Any) -> tuple[dict[str, Any], Policy]:
    built = data(options, chunk)
    spec = describe_data(built, "arm")
    return built, Policy(Remembers(built), Normaliser(spec), spec, Inference(**settings))


@pytest.mark.parametrize("options", [ARM, STEPS])
@pytest.mark.parametrize(("chunk", "settings"), [(1, {}), (6, {}), (6, {"ensemble": 0.01, "action_steps": 1})])
def test_held_out_recordings_are_compared_in_the_robots_units(
    options: LearntOptions, chunk: int, settings: dict[str, Any]
) -> None:
    """A policy that knows what was done has no error, whatever numbers a rotation has, averaged or not."""
    built, policy = remembering(options, chunk, **settings)
    found = Recordings(policy, recordings(built["validation"]), 0, 1).evaluate(0)[0]
    assert list(found["action_error_by_name"]) == ACTION and max(found["action_error_by_name"].values()) < 1e-5
    assert found["action_error_by_name"]["grip"] < 1e-7


@pytest.mark.parametrize("options", [ARM, STEPS])
def test_the_rest_of_the_last_chunk_is_told_relative_to_what_is_observed_now(options: LearntOptions) -> None:
    built, policy = remembering(options, 6, real_time=True)
    dataset = built["dataset"]
    batch, recorded = dataset.get_batch(every(dataset)), absolute(dataset)["action"]
    first, now = (batch[STATE][row] for row in (0, 2))
    chunk = policy.plan({STATE: first.numpy()})
    assert (policy.form.nearest(torch.from_numpy(chunk), recorded[0]) - recorded[0]).abs().max() < 1e-5
    again = torch.from_numpy(policy.plan({STATE: now.numpy()}, previous=chunk[2:], delay=2))
    told = policy.module.told["previous"]  # normalised
    encoded = policy.normaliser.undo("action", told)
    absolute_again = policy.form.to_robot(encoded, {STATE: now[None]})[0, :4]
    assert (
        policy.form.nearest(absolute_again, torch.from_numpy(chunk[2:])) - torch.from_numpy(chunk[2:])
    ).abs().max() < 1e-5
    assert torch.equal(again[:2], torch.from_numpy(chunk[2:4])) and not told[0, 4:].any()


class Layer(nn.Module):
    """A chunk of six actions as they are learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 60)

    def forward(self, state: Tensor) -> Tensor:
        return self.layer(state).view(-1, 6, 10)


@pytest.mark.slow
def test_an_exported_policy_gives_the_robots_actions(tmp_path: Path) -> None:
    built = data(STEPS, 6)
    spec = describe_data(built, "arm")
    policy = Policy(Layer(), Normaliser(spec), spec)
    assert export(policy, tmp_path / "policy.pt2") < 1e-5
    states = built["dataset"].get_batch(torch.arange(4))[STATE]
    chunk = torch.export.load(tmp_path / "policy.pt2").module()({STATE: states})
    assert np.abs(chunk.numpy() - policy.plan({STATE: states.numpy()})).max() < 1e-5


@pytest.mark.parametrize("options", [ARM, STEPS])
def test_the_robots_actions_in_float32_as_onnx_has_them_and_nearly_in_bfloat16(options: LearntOptions) -> None:
    spec = describe_data(data(options, 6), "arm")
    torch.manual_seed(0)
    policy = Policy(Layer(), Normaliser(spec), spec)
    states = example(policy, 5)
    planned = torch.from_numpy(policy.plan({STATE: states[STATE].numpy()}))
    for bf16, most in ((False, 1e-5), (True, 0.05)):
        whole = Whole(policy, bf16, torch.float32)
        assert difference(policy, whole) <= most
        assert (policy.form.nearest(whole(states), planned) - planned).abs().max() <= 4 * most  # an angle has up to pi


def test_averaged_rotations_are_rotations() -> None:
    """Axis-angles on both sides of pi, and quaternions of both signs: their plain mean would be another rotation."""
    near, weights = torch.tensor([[[math.pi - 0.1, 0, 0]], [[0.1 - math.pi, 0, 0]]]), torch.tensor([[0.5], [0.5]])
    form = ActionForm(3, "relative", (), (Rotation((0, 1, 2), "axis_angle", (0, 1, 2), "axis_angle"),), 3)
    assert torch.allclose(form.mean(weights, near).abs(), torch.tensor([[math.pi, 0, 0]]), atol=1e-5)
    quaternion = turned(7, 1).float()[6:]
    form = ActionForm(
        4, "relative", (), (Rotation((0, 1, 2, 3), "quaternion_xyzw", (0, 1, 2, 3), "quaternion_xyzw"),), 4
    )
    found = form.mean(weights, torch.stack([quaternion, -quaternion]))
    assert torch.allclose(found, -quaternion, atol=1e-6)  # on the side of the newest
    alone = form.mean(torch.tensor([[1.0], [0.0]]), torch.stack([-quaternion, torch.zeros_like(quaternion)]))
    assert torch.allclose(alone, -quaternion, atol=1e-6)  # of those that count: other rows have planned since


def test_a_players_timeline_averages_rotations_as_the_policy_does() -> None:
    """Of every form, in an arm that turns on between its plans."""
    built, policy = remembering(ARM, 6, ensemble=0.5, action_steps=1)
    other, states = remembering(ARM, 6)[1], built["dataset"].get_batch(every(built["dataset"]))[STATE][:4].numpy()
    timeline = Timeline(policy)
    for step, state in enumerate(states):
        timeline.enter(step, other.plan({STATE: state}))
        found = timeline.action(step)
        assert found is not None
        assert found == pytest.approx(policy.act({STATE: state}), abs=1e-6)


def test_weights_of_another_order_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    there: dict[str, Any] = {"action": {}, STATE: {"names": ["x", "y"]}}
    monkeypatch.setattr(inheritance, "choose", lambda run: SimpleNamespace(folder=run))
    monkeypatch.setattr(inheritance, "describe", lambda folder: (None, {"spec": there}))
    inherited = Inheritance(Path("here"), 0, False)
    for names in ([], ["x", "y"], ["a", "b"]):  # names that are others may be of the same things
        inherited.spec = {"action": {}, STATE: {"names": names}}
        inherited.check_forms(["there"])
    inherited.spec[STATE]["names"] = ["y", "x"]
    with pytest.raises(UserError, match=f"'{STATE}' in the order x, y, here it is y, x; train anew"):
        inherited.check_forms(["there"])


def test_a_run_keeps_its_form(script: Script) -> None:
    """Trained, saved, loaded alone: acting on a recorded state undoes it; records that do not fit are one line."""
    pusht = FIXTURES / "pusht_planner.npz"
    options = ("--trainer", "bc", "--dataset", "pusht", "--dataset.path", pusht, "--dataset.action", "delta")
    run = script(
        *options, "--dataset.action-steps", 4, "--dataset.action-keys", "!1", "--dataset.state-steps", 2, "--steps", 2
    )
    policy, built = load_policy(run), built_from(pusht)
    assert policy.form.pairs == ((0, 0),) and policy.spec["action"]["form"]["width"] == 2
    assert policy.spec[STATE]["shape"] == [10] and policy.seen_steps == 2
    states = built["dataset"].get_batch(torch.arange(2))[STATE]
    policy.observe({STATE: states[0].numpy()})
    chunk = torch.from_numpy(policy.plan({STATE: states[1].numpy()}))
    normalised = policy.normaliser({STATE: states.reshape(1, 10)})
    with torch.no_grad():
        output = policy.module(normalised[STATE] if policy.takes_tensor else normalised)
    learnt = policy.normaliser.undo("action", output)[0]
    assert torch.allclose(chunk[:, 0], states[1, 0] + learnt[:, 0].cumsum(0), atol=1e-3)
    assert torch.allclose(chunk[:, 1], learnt[:, 1], atol=1e-4)
    eager_call(policy, example(policy, 1))()  # observes one state, not its history
    inherited = Inheritance(run, 0, False)
    with pytest.raises(UserError, match="actions that are learnt as delta ones, here as absolute ones; set --dataset"):
        inherited.check_forms([str(run)])
    form = policy.form.record() | {"stats": {}}  # other data, the same form
    inherited.spec = {"action": {"form": form}}
    inherited.check_forms([str(run), "runs/none"])
    inherited.spec = {"action": {"form": form | {"pairs": [[1, 1]]}}}
    with pytest.raises(UserError, match="that are learnt in another form; set --dataset.action"):
        inherited.check_forms([str(run)])
    path = run / "policy" / "policy.json"
    good = json.loads(path.read_text())
    for change in (
        {"pairs": [[0, 9]]},
        {"pairs": [[0, 0], [0, 1]]},
        {"pairs": [[2, 0]]},
        {"mode": "absolute"},
        {"mode": "other"},
        {"state_width": 0},
        {"state_width": 3},
        {"rotations": [{"places": [0, 1], "kind": "matrix", "state": [], "state_kind": ""}]},
        {"rotations": [{"places": [0, 1], "kind": "who", "state": [], "state_kind": ""}]},
        {"stats": {"min": [0.0], "max": [1.0]}},
        {"stats": 3},
        {"width": 3},
    ):
        damaged = json.loads(json.dumps(good))
        damaged["spec"]["action"]["form"] |= change
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError) as error:
            ActionForm.of(describe(run)[1]["spec"])
        assert "\n" not in str(error.value) and "form" in str(error.value), change
    with pytest.raises(UserError, match=r"policy.json: .*spec\.action\.form"):
        load_policy(run)
    damaged = json.loads(json.dumps(good))
    damaged["spec"][STATE]["steps"] = 3
    path.write_text(json.dumps(damaged))
    with pytest.raises(UserError, match="3 steps in the shape"):
        load_policy(run)


# ---- options -------------------------------------------------------------------------------------------------------

SIX, OTHER = Dimensions.of("action", 3, ["a", "b", "grip"]), Dimensions.of(STATE, 4, ["b", "a", "c", "d"])
BARE, STATES = Dimensions.of("action", 3, []), Dimensions.of(STATE, 2, ["s.0", "s.1"])


def test_dimensions_are_paired_by_name_or_else_by_place() -> None:
    assert form_of("relative", ["!grip"], (), SIX, OTHER).pairs == ((0, 1), (1, 0))
    assert form_of("relative", ["a", "grip=d"], (), SIX, OTHER).pairs == ((0, 1), (2, 3))
    assert form_of("relative", ["0:2"], (), BARE, STATES).pairs == ((0, 0), (1, 1))
    assert form_of("delta", ["2=1", "!0"], (), BARE, STATES).pairs == ((2, 1),)
    assert not form_of("absolute", (), (), SIX, None).changes
    odd = Dimensions.of("action", 2, ["arm in degrees", "a=b"])
    assert form_of("relative", ["arm in degrees", "a=b"], (), odd, STATES).pairs == ((0, 0), (1, 1))


@pytest.mark.parametrize(
    ("mode", "keys", "turned", "action", "state", "message"),
    [
        (
            "relative",
            [],
            (),
            SIX,
            OTHER,
            r"has no grip to subtract; action: a, b, grip; observation.state: b, a, c, d;",
        ),
        ("relative", [], (), BARE, STATES, r"has no 2 to subtract; action: 3 dimensions without names"),
        ("relative", ["wrist"], (), SIX, OTHER, r"action-keys wrist: action has no dimension 'wrist'; "),
        ("relative", ["a=q"], (), SIX, OTHER, r"observation.state has no dimension 'q'"),
        ("relative", ["0:2=1"], (), SIX, OTHER, r"as many of the state as of the action"),
        ("relative", ["a=b", "0=c"], (), SIX, OTHER, r"action-keys 0=c: a has two dimensions of the state"),
        ("relative", ["a="], (), SIX, OTHER, r"observation.state has no dimension ''"),
        ("relative", ["!0:3"], (), SIX, OTHER, r"no dimension is left that is relative"),
        ("relative", [], (), SIX, None, r"--dataset.action relative needs a state"),
        ("absolute", ["a"], (), SIX, OTHER, r"they choose what --dataset.action relative changes"),
        ("absolute", [], ["a,b=axis_angle"], SIX, OTHER, r"axis_angle has 3 numbers, a,b names 2 dimensions"),
        ("absolute", [], ["a,a,b=axis_angle"], SIX, OTHER, r"a,a,b names 2 dimensions"),
        ("absolute", [], ["0:3=rotvec"], SIX, OTHER, r"expected NAMES=KIND"),
        ("absolute", [], ["0:3"], SIX, OTHER, r"expected NAMES=KIND"),
        ("absolute", [], ["0:3=axis_angle@0:3=axis_angle"], SIX, OTHER, r"for a relative one only"),
        ("absolute", [], ["0:3=axis_angle", "a,b,grip=euler_xyz"], SIX, OTHER, r"'a' is in it twice"),
        ("relative", ["a=a"], ["0:3=axis_angle"], SIX, OTHER, r"a part of the rotation a,b,grip alone"),
        ("relative", [], ["0:3=axis_angle@0:3=quaternion_xyzw"], SIX, OTHER, r"quaternion_xyzw has 4 numbers"),
    ],
)
def test_what_cannot_be_paired_is_refused(
    mode: str, keys: list[str], turned: Any, action: Dimensions, state: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        form_of(mode, keys, turned, action, state)
    assert "\n" not in str(error.value)


def test_numbers_that_are_no_rotation_are_refused() -> None:
    with pytest.raises(UserError, match=r"dimensions 0, 1, 2, 3 of 'action' of arm are no quaternion_xyzw: .* norm"):
        data(LearntOptions(rotations=("0:4=quaternion_xyzw",)), 1)
    with pytest.raises(UserError, match=r"of 'observation.state' of arm are no 6d_rows"):
        data(replace(ARM, rotations=("3:6=axis_angle@0:6=6d_rows",)), 1)


def test_who_learns_from_relative_actions_and_who_does_not() -> None:
    columns = {STATE: torch.randn(20, 2), "action": torch.rand(20, 2) / 9, "reward": torch.zeros(20)}
    built = LearntOptions(action="relative").formed(build(from_columns(columns, torch.tensor([20]), "rows"), 1, 1, 0.0))
    with pytest.raises(UserError, match="iql learns the value of actions as they are executed"):
        transitions(built, "iql", Window())
    chosen = GoalSampling((0.0, 1.0, 0.0), False)
    with pytest.raises(UserError, match="gciql learns the value of actions as they are executed"):
        goal_transitions(built, "gciql", Goals(chosen, value=chosen))
    found = goal_transitions(built, "gcbc", Goals(GoalSampling((0.0, 1.0, 0.0), False)))
    item = found["dataset"][3]
    assert torch.allclose(item["action"] + item[STATE], columns["action"][3])
    assert "form" in describe_data(found, "rows")["action"]


# ---- the state's history -------------------------------------------------------------------------------------------


def test_a_history_of_the_state_alone() -> None:
    rows = torch.arange(5.0)[:, None]
    columns = {STATE: torch.cat([rows, -rows], 1), "observation.force": rows, "action": rows, "reward": rows.flatten()}
    built = LearntOptions(state_steps=3).formed(build(from_columns(columns, torch.tensor([3, 5]), "rows"), 1, 1, 0.0))
    built["dataset"].episodes.names[STATE] = ["x", "y"]
    batch = built["dataset"].get_batch(torch.arange(5))
    assert batch[STATE][:, ::2].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [3, 3, 3], [3, 3, 4]]
    assert batch[f"next.{STATE}"][[0, 1, 3]][:, ::2].tolist() == [[0, 0, 1], [0, 1, 2], [3, 3, 4]]
    assert batch["observation.force"].shape == (5, 1)
    spec = describe_data(built, "rows")
    assert spec[STATE]["stats"]["mean"] == [2.0, -2.0] * 3 and spec[STATE]["names"] == ["x", "y"]

    class Says(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return batch[STATE][:, :1] if STATE in batch else batch  # type: ignore[return-value]

    policy = Policy(Says(), Normaliser(spec, {"action": "none", STATE: "none"}), spec)
    frames = [{STATE: np.array([i, -i]), "observation.force": np.array([i])} for i in (1.0, 2.0, 3.0, 4.0)]
    assert [float(policy.act(frame)[0]) for frame in frames] == [1.0, 1.0, 1.0, 2.0]  # of two steps before
    policy.reset()
    assert float(policy.act(frames[3])[0]) == 4.0
    for bad, message in (({"state_steps": 0}, "0 must be 1"), ({"state_steps": 2}, "of --dataset.obs-steps 2; set")):
        with pytest.raises(UserError, match=f"--dataset.state-steps .*{message}"):
            LearntOptions(**bad).formed(build(from_columns(columns, torch.tensor([3, 5]), "rows"), 2, 1, 0.0))  # type: ignore[arg-type]
