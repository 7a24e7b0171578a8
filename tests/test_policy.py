"""A saved policy acts alone, in the environment's units, and refuses what does not fit, by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from components import UserError, load_policy
from components.normalisation import Normaliser
from components.policy import Policy
from conftest import ROOT, command


def spec(obs_steps: int = 1, action_steps: int = 1) -> dict[str, Any]:
    """One state and one action value; statistics that move and stretch both."""
    history, chunk = (obs_steps,) * (obs_steps > 1), (action_steps,) * (action_steps > 1)
    made = {
        "observation.state": {"shape": (*history, 1), "dtype": "float32", "stats": {"mean": [10.0], "std": [2.0]}},
        "action": {"shape": (*chunk, 1), "dtype": "float32", "stats": {"mean": [100.0], "std": [5.0]}},
    }
    return made | ({"action_is_pad": {"shape": chunk, "dtype": "bool"}} if chunk else {})


class Sum(nn.Module):
    """The sum of the observation history; in chunks, the k-th step adds k."""

    def __init__(self, action_steps: int = 1) -> None:
        super().__init__()
        self.action_steps = action_steps

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        total = batch["observation.state"].flatten(1).sum(1, keepdim=True)
        if self.action_steps == 1:
            return total
        return (total + torch.arange(self.action_steps)).unsqueeze(-1)


def observe(*values: float) -> dict[str, np.ndarray]:
    return {"observation.state": np.array(values, dtype=np.float64)[:, None]}


def test_units_and_batches() -> None:
    policy = Policy(Sum(), Normaliser(spec()), spec())
    assert policy.act(observe(12.0, 8.0)).tolist() == [[105.0], [95.0]]  # (12 - 10) / 2 * 5 + 100
    policy.reset()
    action = policy.act({"observation.state": np.array([12.0])})
    assert action.tolist() == [105.0] and action.dtype == np.float32


def test_history_starts_with_the_first_observation() -> None:
    policy = Policy(Sum(), Normaliser(spec(obs_steps=3)), spec(obs_steps=3))
    states = [12.0, 14.0, 16.0, 18.0]  # normalised 1, 2, 3, 4
    sums = [1 + 1 + 1, 1 + 1 + 2, 1 + 2 + 3, 2 + 3 + 4]
    assert [float(policy.act(observe(s))[0, 0]) for s in states] == [100 + 5 * s for s in sums]
    policy.reset()
    assert float(policy.act(observe(14.0))[0, 0]) == 100 + 5 * 6


def test_a_chunk_is_played_before_the_next_one_is_planned() -> None:
    policy = Policy(Sum(3), Normaliser(spec(action_steps=3)), spec(action_steps=3))
    states = [12.0, 99.0, 99.0, 14.0, 99.0]
    assert [float(policy.act(observe(s))[0, 0]) for s in states] == [105.0, 110.0, 115.0, 110.0, 115.0]
    policy.reset()
    assert float(policy.act(observe(12.0))[0, 0]) == 105.0


def test_another_number_of_rows_needs_a_reset() -> None:
    policy = Policy(Sum(), Normaliser(spec()), spec())
    policy.act(observe(1.0, 2.0))
    with pytest.raises(UserError, match=r"has 3 rows after 2; call reset\(\)"):
        policy.act(observe(1.0, 2.0, 3.0))


def test_noise_belongs_to_the_episode_not_to_the_slot() -> None:
    class Noisy(Sum):
        noise_shape = (1,)

        def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return super().forward(batch) + batch["noise"]

    policy = Policy(Noisy(), Normaliser(spec()), spec())
    state = torch.get_rng_state()
    policy.reset(seeds=[1, 2, 3])
    together = [policy.act(observe(10.0, 10.0, 10.0)) for _ in range(2)]
    for slot, seed in enumerate([1, 2, 3]):
        policy.reset(seeds=[seed])
        assert [policy.act(observe(10.0))[0] for _ in range(2)] == [step[slot] for step in together]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plain_module_takes_the_bare_state() -> None:
    policy = Policy(nn.Linear(1, 1), Normaliser(spec()), spec())
    assert policy.takes_tensor and policy.act(observe(1.0)).shape == (1, 1)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(1, 2), r"actions of shape \(2,\), the data has \(1,\)"),
        (nn.Linear(3, 1), "fails on an observation: .*; on the bare state: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy(module, Normaliser(spec()), spec())


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ({}, "needs the observation 'observation.state'; found: nothing"),
        ({"state": np.zeros(1)}, "needs the observation 'observation.state'; found: state"),
        ({"observation.state": np.zeros(3)}, r"expects 'observation.state' of shape \(1,\), found \(3,\)"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused(observation: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Policy(Sum(), Normaliser(spec()), spec()).act(observation)


# ---- saved policies ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(script: Callable[..., Path]) -> Path:
    return script("--trainer", "bc", "--steps", 20, "--dataset.obs-steps", 2, "--dataset.action-steps", 3)


def test_the_folder_alone_is_enough(run: Path, tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=(4, 3, 5))
    whole = load_policy(run)
    expected = [whole.act({"observation.state": state}) for state in states]
    shutil.copytree(run / "policy", tmp_path / "alone")
    shutil.rmtree(run)
    alone = load_policy(str(tmp_path / "alone"))
    assert all(np.array_equal(alone.act({"observation.state": s}), e) for s, e in zip(states, expected, strict=True))
    assert alone.act({"observation.state": states[0]}).shape == (3, 2)


def edit(run: Path, change: Callable[[dict], None]) -> None:
    path = run / "policy" / "policy.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["spec"]["action"]["stats"].pop("std"), "mean_std of 'action' needs the statistic 'std'"),
        (lambda d: d["spec"]["action"].pop("stats"), "mean_std of 'action' needs the statistic 'mean'; found: none"),
        (
            lambda d: d["spec"]["action"]["stats"].update(mean=[0.0] * 7),
            "'action' 'mean' has width 7, but the data has 2",
        ),
        (lambda d: d["models"]["policy"].update(name="other"), "'other' is not registered; import a plugin before"),
        (lambda d: d["models"]["policy"]["options"].update(hidden_dims=[8]), "weights 'net.* have shape"),
        (lambda d: d.pop("spec"), "damaged or incomplete policy"),
    ],
)
def test_a_policy_that_was_changed_is_refused_by_name(run: Path, change: Callable[[dict], None], message: str) -> None:
    edit(run, change)
    with pytest.raises(UserError, match=message):
        load_policy(run)


def test_no_policy_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no policy here"):
        load_policy(tmp_path)


def test_a_policy_of_a_plugin_says_what_to_import(script: Callable[..., Path], tmp_path: Path) -> None:
    run = script("--plugins", "toy", "--trainer", "minimal", "--model", "plain", "--steps", 2)
    code = f"from components import load_policy; load_policy({str(run)!r})"
    done = command("python", "-c", code, cwd=ROOT)
    assert "'plain' is not registered; import toy before load_policy" in done.stderr
    code = f"import toy; from components import load_policy; print(load_policy({str(run)!r}).inference)"
    assert command("python", "-c", code, cwd=ROOT).returncode == 0


def test_a_trainers_own_policy_is_saved_and_loaded(
    script: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import toy
    from components import TRAINER_REGISTRY

    class Doubled(toy.Minimal):
        """Acts with twice what its model says."""

        def policy(self) -> nn.Module:
            net = self.models["policy"]

            class Twice(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.net = net

                def forward(self, batch: Any) -> torch.Tensor:
                    return 2 * self.net(batch)

            return Twice()

    monkeypatch.setitem(TRAINER_REGISTRY, "doubled", Doubled)
    run = script("--trainer", "doubled", "--steps", 2, "--normalise", "action=none")
    state = {"observation.state": np.ones((1, 5))}
    twice = load_policy(run).act(state)
    plain = script("--trainer", "minimal", "--steps", 2, "--normalise", "action=none", folder="plain")
    assert np.allclose(twice, 2 * load_policy(plain).act(state))
