"""`components.datasets.label`: rewards by a classifier of success, trained from frames."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components import TRAINER_REGISTRY, UserError
from components.data.fingerprint import fingerprint
from components.data.random_state import seed_all
from components.datasets import convert, label
from components.datasets.episodes import Episodes, from_columns
from components.datasets.transitions import prepared
from components.intervals import Z95, of_auc
from conftest import build, everything

LENGTH, EPISODES = 12, 12
QUICK: dict[str, Any] = {"steps": 60, "hidden_dims": (32,), "lr": 0.01, "batch_size": 32, "shift": 0}
WORDS = ["--steps", "60", "--hidden-dims", "32", "--lr", "0.01", "--batch-size", "32"]
CAMERA = "observation.images.front"


def walks(last: bool = True, pictured: bool = False) -> Episodes:
    """Of three episodes, two walk and arrive in their last three observations, at 1; one stays away."""
    generator = torch.Generator().manual_seed(0)
    columns: dict[str, list[Any]] = {"observation.state": [], "next.observation.state": [], "action": [], "success": []}
    for episode in range(EPISODES):
        x = torch.arange(LENGTH + 1) / 20
        x[-3:] = 1 if episode % 3 < 2 else 0
        state = torch.stack([x, torch.rand(LENGTH + 1, generator=generator)], 1)
        columns["observation.state"].append(state[:-1])
        columns["next.observation.state"].append(state[1:])
        columns["action"].append(torch.randn(LENGTH, 2, generator=generator))
        columns["success"].append(x[1:] == 1)
    whole = {key: torch.cat(parts) for key, parts in columns.items()}
    if pictured:  # of one colour, which becomes white
        for prefix in ("", "next."):
            bright = (whole[f"{prefix}observation.state"][:, 0] * 255).byte()
            whole[f"{prefix}{CAMERA}"] = bright[:, None, None, None].expand(-1, 3, 8, 8).clone()
    if not last:
        whole = {key: value for key, value in whole.items() if not key.startswith("next.")}
    return from_columns(whole, torch.arange(1, EPISODES + 1) * LENGTH, "walks")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "walks"
    convert.write(walks(), path, convert.Options(format="minari"))
    return path


def labelled(episodes: Episodes, **options: Any) -> tuple[list[str], Episodes]:
    seed_all(0)
    return label.label(episodes, label.Options(**QUICK | options))


def test_a_labelled_dataset_has_rewards_that_offline_rl_learns_from(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step is judged by the observation after it; the data itself is unchanged."""
    before, path = fingerprint(build(data)), tmp_path / "labelled"
    assert label.main([str(data), *WORDS, "--success", "last", "3", "--format", "minari", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "success: the last 3 frames of 8 of 12 episodes (success); 24 frames of success, 132 others" in out
    assert "held out: 3 episodes, 6 frames of success, 33 others" in out
    assert "precision 1.00 [0.61, 1.00] of 6 frames, recall 1.00 [0.61, 1.00] of 6, AUC 1.00 [" in out
    assert "success found in 2 of 2 that succeeded, 1.00 [0.34, 1.00]; in 0 of 1 that did not" in out
    assert "learnt from: 18 of 18 frames of success found, and 0 of 99 others" in out
    assert "success in 8 of 12 episodes, at 24 steps" in out
    built = build(path, validation=0.0)
    found, true = everything(built), built["dataset"].episodes.columns["success"]
    assert torch.equal(found["reward"], true.float()) and torch.equal(found["terminated"], true)
    assert found["truncated"].nonzero().flatten().tolist() == [35, 71, 107, 143]
    assert fingerprint(build(data)) == before
    learnt = prepared(built, TRAINER_REGISTRY["iql"], "iql", TRAINER_REGISTRY["iql"].Config())["dataset"]
    batch = learnt.get_batch(torch.arange(len(learnt)))
    assert len(learnt) == LENGTH * EPISODES and torch.equal(batch["terminated"], batch["reward"] == 1)


def test_labels_are_the_same_each_time_and_may_cut(data: Path) -> None:
    lines, whole = labelled(walks(), success=("last", "3"))
    again, cut = labelled(walks(), success=("last", "3"), cut=True, reward="minus-one")
    assert lines == again
    columns = cut.columns
    assert cut.lengths.tolist() == [LENGTH if n % 3 == 2 else LENGTH - 2 for n in range(EPISODES)]
    assert columns["reward"].unique().tolist() == [-1, 0] and torch.equal(columns["reward"] == 0, columns["terminated"])
    assert columns["terminated"].sum() == 8 and not (columns["terminated"] & columns["truncated"]).any()
    first = cut.observations["observation.state"][cut.after[cut.ends - 1]][:, 0]
    assert first.tolist() == [0 if n % 3 == 2 else 1 for n in range(EPISODES)]
    assert len(whole.at) == LENGTH * EPISODES and "reward" not in walks().columns


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ({"success": ("column", "success")}, True),
        ({"success": ("last", "3"), "success_episodes": ("0:2", "3 4 6 7 9 10")}, True),
        ({"success": ("last", "3"), "negatives": 0.5}, True),
        ({"success": ("last", "2")}, False),  # the last step has no successor, and is judged by its own observation
    ],
)
def test_other_words_for_the_same_frames(options: dict[str, Any], last: bool) -> None:
    found = labelled(walks(last), **options)[1].columns
    assert torch.equal(found["terminated"], walks().columns["success"])


def test_successes_of_another_recording(data: Path, tmp_path: Path) -> None:
    other = walks()
    rows = other.columns["success"].nonzero().flatten()
    state = other.observations["observation.state"][other.after[rows]]
    columns = {"observation.state": state, "action": other.columns["action"][rows]}
    goals = from_columns(columns, torch.arange(3, len(rows) + 1, 3), "goals")
    convert.write(goals, tmp_path / "goals", convert.Options())
    lines, found = labelled(other, success_data=str(tmp_path / "goals"))
    assert "all 24 frames of" in lines[0] and torch.equal(found.columns["terminated"], other.columns["success"])


def test_pictures_are_judged_by_an_encoder(tmp_path: Path) -> None:
    """Of the recording, and of a folder of success frames, which are brought to its size."""
    from PIL import Image

    episodes = walks(pictured=True)
    (tmp_path / "frames").mkdir()
    for number in range(10):
        Image.new("RGB", (16, 16), (255, 255, 255)).save(tmp_path / f"frames/{number}.png")
    for options in ({"success": ("column", "success")}, {"success_data": str(tmp_path / "frames"), "negatives": 0.75}):
        lines, found = labelled(episodes, **options)
        assert lines[1].startswith("classifier: cnn on observation.images.front")
        assert torch.equal(found.columns["terminated"], episodes.columns["success"])
    with pytest.raises(UserError, match="pictures are of one camera; choose it with --keys"):
        labelled(episodes, success_data=str(tmp_path / "frames"), keys=("state",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": ""}, "--out is needed: a folder for the labelled dataset"),
        ({"out": "{data}"}, "exists already; give another folder"),
        ({"out": "{data}/labelled"}, "within the data itself, which is not changed"),
        ({"success": ("first", "3")}, "--success first 3: expected last N, or column NAME"),
        ({"success": ("column", "sucess")}, "no such column of numbers; nearest: success"),
        ({"success_episodes": ("40",)}, "--success-episodes 40: there is no such episode; .* 12 episodes"),
        ({"success": ("last", "0")}, "there are no frames of success; see --success"),
        ({"success": ("last", "99"), "success_episodes": (":",)}, "all frames are of success"),
        ({"success_episodes": ("3",)}, "1 episodes with frames of success and 11 without are too few"),
        ({"keys": ("staet",)}, "--keys staet: no such observation; known: observation.state"),
        ({"threshold": 2.0}, "--threshold 2.0 must be between 0 and 1"),
        ({"batch_size": 1}, "--batch-size 1 must be 2 or more"),
        ({"success": ("last", "²")}, "--success last ²: expected last N, or column NAME"),
        ({"success": ("last",)}, "--success last: expected last N"),
        ({"steps": 1, "threshold": 1e-9}, "every step is a success by the classifier: it tells nothing apart"),
        ({"weights": "w"}, "--weights are of --encoder resnet18"),
        ({"success_data": "nowhere"}, "nowhere: no such file or folder"),
        ({"steps": 1, "threshold": 0.999999}, "no step is a success by the classifier; lower"),
    ],
)
def test_bad_input_of_label(options: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        asked = label.Options(**{"out": "x"} | QUICK | options)
        asked.out = asked.out.format(data=data)
        label.check(asked, Path(asked.out), data)
        label.label(walks(), asked)
    assert "\n" not in str(error.value)


def test_only_what_was_recorded_is_labelled(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are of what is learnt; this writes"):
        label.main([str(data), "--out", str(tmp_path / "x"), "--dataset.state-steps", "2"])
    assert not list(tmp_path.iterdir())


def test_a_success_stays_or_lasts_until_the_end() -> None:
    flags = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 0, 1], dtype=torch.bool)
    ends = torch.tensor([8, 11, 13])  # the run 4:8 ends with its episode, as do 9:11 and 12:13
    assert label.staying(flags, ends, 3).nonzero().flatten().tolist() == [4, 5, 6, 7, 9, 10, 12]
    assert torch.equal(label.staying(flags, ends, 1), flags)
    across = torch.tensor([0, 1, 1, 0], dtype=torch.bool)
    assert label.staying(across, torch.tensor([2, 4]), 2).tolist() == [False, True, False, False]


def test_threshold_and_area_are_those_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(60, generator=generator) < 0.3
    scores = ((truth + torch.randn(60, generator=generator)) * 4).round().double() / 4  # with ties
    scored = {}
    for t in [*scores.unique().tolist(), 99.0]:
        called = scores >= t
        scored[t] = float(2 * (called & truth).sum() / (called.sum() + truth.sum()))
    threshold = label.best_threshold(scores, truth)
    called = scores >= threshold
    assert float(2 * (called & truth).sum() / (called.sum() + truth.sum())) == pytest.approx(max(scored.values()))
    for least, nearest in ((-1.0, 0.0), (1.0, 1.25), (-10.0, -1.0)):  # of the gap from there to 2
        apart = torch.tensor([-30.0, least, 2.0, 2.5]).double()
        assert label.best_threshold(apart, torch.tensor([0, 0, 1, 1]).bool()) == nearest
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[truth].tolist() for b in scores[~truth].tolist()]
    area = float(re.search(r"AUC ([\d.]+)", label.measures(scores, truth, threshold, 5)[1])[1])  # type: ignore[index]
    assert area == pytest.approx(np.mean(pairs), abs=0.006)


@pytest.mark.parametrize(("area", "n", "m"), [(0.9, 20, 40), (0.5, 9, 9), (1.0, 7, 30)])
def test_bounds_of_an_area_are_1_96_of_their_own_deviations_away(area: float, n: int, m: int) -> None:
    low, high = of_auc(area, n, m)
    assert 0 < low <= area <= high <= 1 and (high == 1) == (area == 1)
    for bound in {low, high} - {1.0}:
        q1, q2 = bound / (2 - bound), 2 * bound**2 / (1 + bound)  # Hanley and McNeil (1982), with both counts averaged
        more = ((n + m) / 2 - 1) * (q1 - bound**2 + q2 - bound**2)
        assert abs(bound - area) == pytest.approx(Z95 * ((bound * (1 - bound) + more) / (n * m)) ** 0.5, rel=1e-6)
