"""Evaluation against recordings: predicted and recorded actions, where no environment is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from components import UserError, evaluate
from components.acting.evaluation import headline, score_of, scores
from components.acting.inference import Inference
from components.acting.policy import Policy
from components.acting.recordings import Recordings, evenly, walk
from components.contracts import GOAL, STATE
from components.data.features import describe_data
from components.data.normalisation import Normaliser
from components.data.random_state import get_random_state
from components.datasets.episodes import Episodes, build_episodes
from components.datasets.frames import Frames
from components.datasets.mixture import MixtureDataset
from components.datasets.recorded import Recording, recordings
from components.errors import StoppedError
from components.run.curves import read_lines
from conftest import FIXTURES, build

Script = Callable[..., Path]
LENGTHS = (3, 7, 12)
NAMES = ["arm in degrees", "gripper"]


class Says(nn.Module):
    """Says the normalised state of the first step of its history, the same for the whole chunk, plus noise if any."""

    def __init__(self, chunk: int = 1, noise: float = 0.0) -> None:
        super().__init__()
        self.chunk, self.noise = chunk, noise
        if noise:
            self.noise_shape = (chunk, 2)

    def forward(self, batch: Any) -> Any:
        state = batch[STATE] if isinstance(batch, dict) else batch
        first = state.reshape(len(state), -1)[:, :2]
        action = first[:, None].repeat(1, self.chunk, 1) + (self.noise * batch["noise"] if self.noise else 0.0)
        return action if self.chunk > 1 else action[:, 0]


def data(obs_steps: int = 1, chunk: int = 1, names: list[str] | None = NAMES) -> dict[str, Any]:
    """Episodes of `LENGTHS`: the state is (100 i, i / 10) at row i, the action twice that."""
    rows = torch.arange(float(sum(LENGTHS)))
    state = torch.stack([100 * rows, rows / 10], 1)
    columns = {STATE: state, "action": 2 * state}
    built = build_episodes(columns, torch.tensor(LENGTHS).cumsum(0), "/robot/demos", obs_steps, chunk, 0.0)
    built["dataset"].episodes.names["action"] = names or []
    return built


def policy_of(built: dict[str, Any], module: nn.Module, modes: Any = None, **settings: Any) -> Policy:
    spec = describe_data(built, "data")
    return Policy(module, Normaliser(spec, modes or {}), spec, Inference(**settings))


def test_errors_are_in_the_units_of_the_data_by_name_and_dimensionless_in_the_mean() -> None:
    built = data()
    policy = policy_of(built, Says(), {"action": "none", "observation": "none"})  # says half of what was done
    evaluator = Recordings(policy, recordings(built["dataset"]), 0, 10)
    before = get_random_state()
    result, problem = evaluator.evaluate(5)
    assert result and not problem and torch.equal(before["torch"], get_random_state()["torch"])
    rows = np.arange(sum(LENGTHS))
    each = [part.mean() for part in np.split(rows, np.cumsum(LENGTHS)[:-1])]  # mean error, for one of row i
    mean = np.mean(each)  # long and short episodes count alike
    assert result["action_error_by_name"] == pytest.approx({NAMES[0]: 100 * mean, NAMES[1]: mean / 10})
    deviation = 2 * rows.std()
    assert result["action_error"] == pytest.approx(mean / deviation)  # the same in both dimensions
    assert result["action_error_of"] == pytest.approx([one / deviation for one in each])
    squares = np.mean([np.square(part).mean() for part in np.split(rows, np.cumsum(LENGTHS)[:-1])])
    assert result["action_mse_by_name"] == pytest.approx({NAMES[0]: 1e4 * squares, NAMES[1]: squares / 100})
    assert result["action_mse"] == pytest.approx(squares / deviation**2)
    assert result["env"] == {"name": "recordings", "data": "demos"} and result["recordings"] == [0, 1, 2]
    assert result["episodes"] == 3 and result["success_rate"] is result["return_mean"] is None
    assert score_of(result) == ("action_error", result["action_error"], -1)
    assert scores(result)["eval/action_error"] == result["action_error"]
    assert headline(result).startswith("recordings: action error 0.591 of a deviation over 3 episodes (worst: ")


def test_the_error_grows_since_the_plan() -> None:
    built = data(chunk=4)
    policy = policy_of(built, Says(4), {"observation": "none", "action": "none"}, action_steps=3)
    episodes = recordings(built["dataset"])
    for episode in episodes:
        episode.actions[:] = np.asarray(episode.episodes.observations[STATE][episode.steps])  # a perfect first step
    result, _ = Recordings(policy, episodes, 0, 10).evaluate(0)
    assert result is not None
    deviation = 2 * np.arange(sum(LENGTHS)).std()
    assert result["action_error_by_step"] == pytest.approx([0, 1 / deviation, 2 / deviation])


@pytest.mark.parametrize(("chunk", "settings"), [(1, {}), (4, {"action_steps": 3}), (4, {"ensemble": 0.1})])
@pytest.mark.parametrize("obs_steps", [1, 3])
def test_a_policy_walks_as_it_acts(chunk: int, settings: Any, obs_steps: int) -> None:
    """The same actions as alone, step by step; whatever walks beside it, and on whichever process."""
    built = data(obs_steps, chunk)
    policy = policy_of(
        built, Says(chunk, noise=0.3), **({"action_steps": 1} if "ensemble" in settings else {}), **settings
    )
    episodes = recordings(built["dataset"])
    walked = walk(policy, episodes, [7, 8, 9])
    for episode, actions, seed in zip(episodes, walked, [7, 8, 9], strict=True):
        policy.reset(seeds=[seed])
        states = episode.episodes.observations[STATE][episode.steps]
        alone = np.concatenate([policy.act({STATE: state[None]}) for state in states])
        np.testing.assert_allclose(actions, alone, rtol=1e-5, atol=1e-5)
    whole = dict(Recordings(policy, episodes, 7, 10)._part())
    parts = [pair for rank in range(2) for pair in Recordings(policy, episodes, 7, 1, rank, 2)._part()]
    assert sorted(place for place, _ in parts) == [0, 1, 2]
    for place, errors in parts:
        np.testing.assert_allclose(errors["absolute"], whole[place]["absolute"], rtol=1e-4)


def test_pictures_are_read_only_where_the_policy_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Looks(nn.Module):
        def forward(self, batch: Any) -> Any:
            picture = batch["observation.images.corner2"].float().mean((1, 2, 3, 4))
            return picture[:, None, None].repeat(1, 20, 4)

    built = build("lerobot_v30_video", cameras=("corner2",), obs_steps=2, action_steps=20)
    policy = policy_of(built, Looks(), {"action": "none"}, action_steps=10)
    read: list[int] = []
    decode = Frames.read
    monkeypatch.setattr(Frames, "read", lambda self, rows: (read.extend(rows.tolist()), decode(self, rows))[1])
    (episode,) = recordings(built["validation"])
    (found,) = walk(policy, [episode], [0])
    first = int(episode.episodes.at[episode.steps[0]])
    assert [row - first for row in read] == [0, 9, 10, 19, 20, 29]
    policy.reset()
    keys = policy.observation_keys
    alone = [policy.act({key: value[0] for key, value in episode.read([t], keys).items()}) for t in range(len(episode))]
    np.testing.assert_allclose(found, alone, rtol=1e-5)


def test_a_stop_ends_the_walk_and_a_failure_is_one_line(tmp_path: Path) -> None:
    built, calls = data(), iter(range(4))

    def tick() -> None:
        if next(calls) == 3:
            raise StoppedError

    policy = policy_of(built, Says())
    with pytest.raises(StoppedError):
        Recordings(policy, recordings(built["dataset"]), 0, 1, tick=tick).evaluate(0)
    policy.module.forward = lambda batch: torch.full((len(batch[STATE]), 2), torch.nan)
    evaluator = Recordings(policy, recordings(built["dataset"]), 0, 10)
    problem = "process 0: RuntimeError: the policy predicts nan for arm in degrees at step 0 of episode 0"
    assert evaluator.evaluate(0) == (None, problem)
    assert evaluator.film(tmp_path / "x.mp4").startswith("the policy predicts nan") and not list(tmp_path.iterdir())


def test_what_does_not_match_is_named() -> None:
    built = data()
    policy = policy_of(built, Says())
    other = build_episodes(
        {STATE: torch.zeros(4, 2), "action": torch.zeros(4, 3)}, torch.tensor([4]), "other", 1, 1, 0.0
    )
    with pytest.raises(UserError, match="other has actions of width 3, the policy of 2"):
        Recordings(policy, recordings(other["dataset"]), 0, 1)
    other = build_episodes(
        {STATE: torch.zeros(4, 5), "action": torch.zeros(4, 2)}, torch.tensor([4]), "other", 1, 1, 0.0
    )
    with pytest.raises(UserError, match=r"other has 'observation.state' of shape \(5,\), the policy observes \(2,\)"):
        Recordings(policy, recordings(other["dataset"]), 0, 1)
    policy.observation_keys = [STATE, "observation.images.top"]
    policy.spec["observation.images.top"] = {"shape": (3, 8, 8), "dtype": "uint8"}
    with pytest.raises(
        UserError, match=r"no 'observation.images.top', which the policy observes; see --dataset.cameras top"
    ):
        Recordings(policy, recordings(built["dataset"]), 0, 1)
    policy.observation_keys = [STATE]
    policy.spec["action"]["names"] = ["dy", "dx"]
    built["dataset"].episodes.names["action"] = ["dx", "dy"]
    with pytest.raises(UserError, match="has the dimensions of 'action' in the order dx, dy, the policy dy, dx"):
        Recordings(policy, recordings(built["dataset"]), 0, 1)
    policy.spec["action"]["names"], policy.spec[STATE]["names"] = ["dx", "dy"], ["y", "x"]
    built["dataset"].episodes.names[STATE] = ["x", "y"]
    with pytest.raises(UserError, match="has the dimensions of 'observation.state' in the order x, y, the policy y, x"):
        Recordings(policy, recordings(built["dataset"]), 0, 1)
    policy.spec[STATE].pop("names")
    policy.spec["task"] = {"values": ["open", "close"]}
    told = recordings(build("lerobot_v30_video")["dataset"])
    told[0].actions = np.zeros((len(told[0]), 2))
    with pytest.raises(UserError, match="unknown task '.*'; known: close, open"):
        Recordings(policy, told, 0, 1)
    with pytest.raises(UserError, match="there are no episodes"):
        Recordings(policy, [], 0, 1)


def test_a_dimension_that_never_changes_counts_in_the_units_of_what_was_recorded() -> None:
    built = data()
    built["norm_stats"]["action"]["std"][1] = 0.0
    for bound in ("min", "max", "mean"):
        built["norm_stats"]["action"][bound][1] = 0.0
    policy = policy_of(built, Says(), {"observation": "none", "action": "none"})
    result, _ = Recordings(policy, recordings(built["dataset"]), 0, 10).evaluate(0)
    assert result is not None
    expected = [
        value / (2 * np.arange(22).std() * unit)
        for value, unit in zip(result["action_error_by_name"].values(), (100, 0.1), strict=True)
    ]
    assert result["action_error"] == pytest.approx(np.mean(expected))


def test_discrete_actions_count_as_equal_or_not() -> None:
    spec = {STATE: {"shape": (1,), "dtype": "float32"}, "action": {"shape": (), "dtype": "int64", "classes": 3}}
    chosen = nn.Module()
    chosen.forward = lambda state: state[:, 0].long() % 3  # type: ignore[method-assign]
    policy = Policy(chosen, Normaliser(spec, dict.fromkeys(spec, "none")), spec)
    columns = {"action": torch.tensor([0, 1, 2, 0, 1, 1]), STATE: torch.arange(6.0)[:, None]}
    episodes = Episodes(
        "d",
        torch.tensor([6]),
        {"action": columns["action"]},
        {STATE: columns[STATE]},
        torch.arange(6),
        torch.full((6,), -1),
    )
    evaluator = Recordings(policy, [Recording(episodes, torch.arange(6))], 0, 1)
    result, _ = evaluator.evaluate(0)
    assert result and result["action_error"] == pytest.approx(1 / 6)
    assert headline(result) == "recordings: 16.7 % other actions over 1 episode"


def test_the_goal_is_the_state_that_the_episode_ends_in() -> None:
    columns = {STATE: torch.arange(8.0)[:, None], "next.observation.state": torch.arange(1, 9.0)[:, None] + 0.5}
    columns["action"] = torch.zeros(8, 1)
    built = build_episodes(columns, torch.tensor([3, 8]), "d", 1, 1, 0.0)
    for episode, goal in zip(recordings(built["dataset"]), (3.5, 8.5), strict=True):
        assert episode.read([0, 1], [GOAL])[GOAL].tolist() == [[goal], [goal]] and episode.shape_of(GOAL) == (1,)
    del columns["next.observation.state"]
    built = build_episodes(columns, torch.tensor([3, 8]), "d", 1, 1, 0.0)
    assert [episode.read([0], [GOAL])[GOAL].item() for episode in recordings(built["dataset"])] == [2, 7]


def test_recordings_of_a_mixture_carry_their_source_and_their_task() -> None:
    paths = [f"{FIXTURES / name}:0.5" for name in ("lerobot_v30_video", "lerobot_v21_video")]
    built = MixtureDataset(sources=tuple(paths)).build()
    found = recordings(built["validation"])
    assert [Path(one.data).name for one in found] == ["lerobot_v30_video", "lerobot_v21_video"]
    assert found[0].names == ["dx", "dy", "dz", "gripper"]
    assert set(found[0].read([0, 1], [STATE])["task"]) == found[0].tasks <= set(built["dataset"].tasks)
    spec = describe_data(built, "mixture")
    assert "task" in spec
    assert not recordings([{"action": 1}]) and not recordings(None)


def test_the_picture_shows_hostile_names_and_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = data(names=["$x_", "a" * 500 + "\n\x1b[31m"])
    policy = policy_of(built, Says())
    evaluator = Recordings(policy, recordings(built["dataset"]), 0, 10)
    result, _ = evaluator.evaluate(0)
    assert result and headline(result).isprintable() and len(headline(result)) < 120
    assert not evaluator.film(tmp_path / "videos" / "step-000000001.mp4")
    assert (tmp_path / "videos" / "step-000000001.png").stat().st_size > 10_000
    assert [path.name for path in (tmp_path / "videos").iterdir()] == ["step-000000001.png"]
    monkeypatch.setattr("components.data.figures.os.replace", lambda *paths: 1 / 0)
    assert evaluator.film(tmp_path / "b" / "x.mp4") == "division by zero"
    assert not list((tmp_path / "b").iterdir())


def test_a_choice_of_episodes_is_even() -> None:
    assert evenly(range(10), 3) == [0, 4, 9] and evenly(range(2), 50) == [0, 1] and evenly(range(5), 1) == [0]


RUN = ("--trainer", "bc", "--env", "none", "--eval-every", 10, "--steps", 20, "--optimizer.schedule-steps", 20)


def test_a_run_without_an_environment_is_compared_with_what_it_held_out(
    script: Script, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recordings, "_draw", lambda self, places, predicted, path: path.touch())
    run = script(*RUN, "--eval-episodes", 1, folder="whole")
    assert "evaluation against 1 held-out episode of the recordings, since no environment" in capsys.readouterr().out
    lines = read_lines(run / "eval.jsonl")
    assert [line["step"] for line in lines] == [10, 20] and lines[1]["action_error"] < lines[0]["action_error"]
    assert (run / "videos" / "step-000000020.png").exists()
    val = [line["val/loss"] for line in read_lines(run / "metrics.jsonl") if "val/loss" in line]
    assert len(val) == 2
    script(*RUN, "--eval-episodes", 1, "--steps", 10, folder="part")
    script("--resume", tmp_path / "part", "--steps", 20, folder="part")
    assert (tmp_path / "part" / "eval.jsonl").read_bytes() == (run / "eval.jsonl").read_bytes()
    assert evaluate.main([str(run), "--eval-episodes", "1"]) == 0
    assert evaluate.main([str(run), "--recordings", "--eval-episodes", "2", "--video"]) == 0
    _, last, one, two = read_lines(run / "eval.jsonl")
    assert one["action_error"] == pytest.approx(last["action_error"], rel=1e-5) and two["episodes"] == 2
    assert (run / "videos" / "step-000000020-toy.png").exists()
    assert evaluate.main([str(run), "--dataset.reward-scale", "2"]) == 0  # the same actions: what it held out
    assert read_lines(run / "eval.jsonl")[-1]["action_error"] == pytest.approx(two["action_error"])
    assert evaluate.main([str(run), "--dataset.episodes", "5"]) == 0  # other data: all of it
    assert read_lines(run / "eval.jsonl")[-1]["episodes"] == 5


def test_evaluate_refuses(script: Script) -> None:
    run = script(*RUN)
    for options, message in (
        (["--recordings", "--env", "gymnasium"], "--env evaluates in an environment, --recordings and --dataset"),
        (["--dataset.validation", "0.2"], "another part of the run's own recordings would be held out"),
        (["--dataset", "none"], "has not learnt from recordings; name some with --dataset"),
        (["--dataset", "minimal_data"], "the data is a list of single items; expected episodes"),
        (["--dataset.epsiodes", "3"], "unknown option --dataset.epsiodes; nearest: --dataset.episodes"),
        (["--dataset", "toi"], "--dataset toi: unknown dataset; nearest: toy"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main([str(run), *options])
    assert not (run / "eval.jsonl").exists()


def test_what_is_not_held_out_is_said(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    run = script(*RUN, "--eval-episodes", 2, "--dataset.validation", 0)
    said = "no evaluation: no environment is known (see --env), and no episodes are held out; --dataset.validation 0.1"
    assert said in capsys.readouterr().out and not (run / "eval.jsonl").exists()
    with pytest.raises(UserError, match="the run held out no episode of its own"):
        evaluate.main([str(run)])
    script(
        "--trainer",
        "minimal",
        "--dataset",
        "minimal_data",
        "--env",
        "none",
        "--steps",
        2,
        "--eval-episodes",
        2,
        folder="b",
    )
    assert "and no episodes are held out\n" in capsys.readouterr().out
