"""A saved policy acts alone, in the environment's units, and refuses what does not fit, by name."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import toy
from components import MODEL_BUILDER_REGISTRY, TRAINER_REGISTRY, UserError, export, load_policy
from components.acting.inference import Inference
from components.acting.observed import vectors
from components.acting.policy import Policy
from components.data.normalisation import Normaliser, statistics
from components.run.curves import read_lines
from conftest import ROOT, check_alone, command


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


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "the observation 'observation.state' has NaN or Inf"),
        (float("inf"), "the observation 'observation.state' has NaN or Inf"),
        (1e300, "the observation 'observation.state' has values beyond the range of float32"),
        ("north", "the observation 'observation.state' is no array of numbers"),
    ],
)
def test_what_is_not_finite_is_not_acted_on(value: Any, message: str) -> None:
    policy = Policy(Sum(), Normaliser(spec()), spec())
    with pytest.raises(UserError, match=message) as error:
        policy.act({"observation.state": [[12.0], [value]] if value != "north" else value})
    assert "\n" not in str(error.value)
    assert np.isfinite(policy.act({"observation.state": np.array([[12.0], [1e30]])})).all()


def test_observations_of_several_axes_are_flattened() -> None:
    for x, batched in (
        (np.ones((2, 3)), False),
        (np.ones((4, 2, 3)), True),
        (np.ones(6), False),
        (np.ones((4, 6)), True),
    ):
        frame, was = vectors(torch.as_tensor(x), (6,), "x")
        assert was == batched and frame.shape == (4 if batched else 1, 6)
    for x in (np.ones((2, 2)), np.ones(5), np.ones((3, 1, 5))):
        with pytest.raises(UserError, match="expects 'x' of shape"):
            vectors(torch.as_tensor(x), (6,), "x")


def test_some_rows_begin_again_while_the_others_go_on() -> None:
    """A row's actions are those of a policy that plays its episodes alone, whatever the others do."""
    one = spec(obs_steps=3, action_steps=4)
    states = np.random.default_rng(0).normal(10, 2, (12, 3)).astype(np.float32)
    begins = {0: (5, 7), 1: (3,), 2: ()}  # the steps at which each row's episodes begin anew
    for settings in (Inference(action_steps=3), Inference(action_steps=2, ensemble=0.3)):
        together, alone = (Policy(Sum(4), Normaliser(one), one, settings) for _ in range(2))
        found = []
        for t, state in enumerate(states):
            together.restart(torch.tensor([row for row, steps in begins.items() if t in steps]))
            found.append(together.act({"observation.state": state[:, None]}))
        check_alone(alone, states, found, begins)


def test_some_rows_act_while_the_others_wait() -> None:
    one = spec(obs_steps=2, action_steps=3)
    policy, alone = (Policy(Sum(3), Normaliser(one), one) for _ in range(2))
    states = np.arange(10, 30, dtype=np.float32).reshape(10, 2)
    turns = [[0, 1], [1], [0, 1], [0], [1], [1, 0], [0, 1]]
    found: dict[int, list[float]] = {0: [], 1: []}
    for t, rows in enumerate(turns):
        seen = {"observation.state": states[t, rows][:, None]}
        actions = policy.act(seen, None if rows == [0, 1] else torch.tensor(rows))
        for row, action in zip(rows, actions, strict=True):
            found[row].append(float(action[0]))
    for row in (0, 1):
        alone.reset()
        seen_by = [states[t, row] for t, rows in enumerate(turns) if row in rows]
        assert found[row] == [float(alone.act({"observation.state": s[None]})[0]) for s in seen_by]


def test_another_number_of_rows_needs_a_reset() -> None:
    policy = Policy(Sum(), Normaliser(spec()), spec())
    policy.act(observe(1.0, 2.0))
    with pytest.raises(UserError, match=r"has 3 rows after 2; call reset\(\)"):
        policy.act(observe(1.0, 2.0, 3.0))
    policy.reset()
    with pytest.raises(UserError, match=r"begins with all rows; found rows \[1, 3\] of 2"):
        policy.act(observe(1.0, 2.0), torch.tensor([1, 3]))
    policy.reset(seeds=[5])
    with pytest.raises(UserError, match=r"has 2 rows, reset\(\) had 1 seeds; give it one seed per row"):
        policy.plan(observe(1.0, 2.0))
    assert policy.act(observe(3.0)).shape == (1, 1)  # nothing is changed by that


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
        (
            {"state": np.zeros(1)},
            r"'observation.state'; found: state; expected \(1,\), of height$",
        ),
        ({"observation.state": None}, "'observation.state' is no array of numbers .found NoneType.$"),
        ({"observation.state": np.zeros(3)}, r"expects 'observation.state' of shape \(1,\), found \(3,\)"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused(observation: dict, message: str) -> None:
    named = spec()
    named["observation.state"]["names"] = ["height"]
    with pytest.raises(UserError, match=message):
        Policy(Sum(), Normaliser(named), named).act(observation)


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
        (lambda d: d.pop("spec"), "damaged or incomplete: no spec; expected an object"),
    ],
)
def test_a_policy_that_was_changed_is_refused_by_name(run: Path, change: Callable[[dict], None], message: str) -> None:
    edit(run, change)
    with pytest.raises(UserError, match=message):
        load_policy(run)


def test_no_policy_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no policy here"):
        load_policy(tmp_path)


def test_a_policy_of_a_plugin_says_what_to_import(script: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = script("--plugins", "toy", "--trainer", "minimal", "--model", "plain", "--steps", 2)
    with monkeypatch.context() as without:
        without.delitem(MODEL_BUILDER_REGISTRY, "plain")
        without.delitem(sys.modules, "toy")
        with pytest.raises(UserError, match="'plain' is not registered; import toy before load_policy"):
            load_policy(run)
        assert "toy" not in sys.modules
    load_policy(run)


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


# ---- how a chunk is played -----------------------------------------------------------------------------------------


class Plans(nn.Module):
    """Chunks of four: the observation, then it plus 1, 2 and 3; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return batch["observation.state"][:, None] + torch.arange(4.0)[:, None]


def plain_spec() -> dict[str, Any]:
    shapes: dict[str, Any] = {"observation.state": {"shape": (1,), "dtype": "float32"}}
    shapes |= {"action": {"shape": (4, 1), "dtype": "float32"}, "action_is_pad": {"shape": (4,), "dtype": "bool"}}
    return shapes


@pytest.mark.parametrize("action_steps", [1, 2, 3, 4])
def test_after_so_many_steps_a_new_chunk_is_planned(action_steps: int) -> None:
    policy = Policy(Plans(), Normaliser(plain_spec()), plain_spec(), Inference(action_steps=action_steps))
    policy.module.calls = 0
    played = [float(policy.act(observe(10.0 * t))[0, 0]) for t in range(7)]
    assert played == [10.0 * (t - t % action_steps) + t % action_steps for t in range(7)]
    assert policy.module.calls == -(-7 // action_steps)
    assert policy.inference["action_steps"] == action_steps


def test_temporal_ensembling_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """At step t the chunks of t, t-1, t-2, t-3 say 10 t, 10 (t-1) + 1, ...; weights exp(-m i), i = 0 the oldest."""
    policy = Policy(Plans(), Normaliser(plain_spec()), plain_spec()).configure(action_steps=1, ensemble=0.5)
    for t in range(6):
        said = [10.0 * s + t - s for s in range(max(0, t - 3), t + 1)]  # oldest first
        weights = [np.exp(-0.5 * i) for i in range(len(said))]
        expected = np.dot(weights, said) / np.sum(weights)
        assert float(policy.act(observe(10.0 * t))[0, 0]) == pytest.approx(expected, rel=1e-5)
    policy.reset()
    assert float(policy.act(observe(7.0))[0, 0]) == 7.0  # nothing of the episode before
    policy.configure(action_steps=2, ensemble=0.0)  # planned at 0 and 2: at step 3 the two say 3 and 21
    assert [float(policy.act(observe(10.0 * t))[0, 0]) for t in range(4)] == [0.0, 1.0, (2 + 20) / 2, (3 + 21) / 2]
    assert not caplog.messages
    policy.configure(action_steps=4)
    assert caplog.messages == [
        "--policy.ensemble averages nothing, as no two chunks overlap: one of 4 steps is planned every 4; see"
        " --policy.action-steps"
    ]


class Samples(nn.Module):
    """Samples in steps, each of which doubles the noise."""

    samplers, most_steps, noise_shape = ("a", "b"), 20, (1,)

    def __init__(self) -> None:
        super().__init__()
        self.sampler, self.sampling_steps = "a", 3

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["noise"] * 2**self.sampling_steps * (1 if self.sampler == "a" else -1)


class Noisy(nn.Module):
    """Chunks of noise."""

    noise_shape = (4, 2)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["noise"] + 0 * batch["observation.state"][:, :, None]


def test_a_constant_action_is_exact_also_averaged_and_exported(tmp_path: Path) -> None:
    """Flow matching, for example, would return it with what is left of its noise."""
    known = plain_spec()
    known["action"] |= {"shape": (4, 2), "stats": statistics(torch.tensor([[0.0213, 1.0], [0.0213, 3.0]]))}
    policy = Policy(Noisy(), Normaliser(known), known)
    for settings in ({}, {"action_steps": 1, "ensemble": 0.1}):
        policy.configure(**settings)
        actions = np.stack([policy.act(observe(1.0, 2.0)) for _ in range(8)])
        assert (actions[..., 0] == np.float32(0.0213)).all() and len(np.unique(actions[..., 1])) == 16
    export.export(policy, tmp_path / "policy.pt2")
    batch = export.example(policy, 3)
    action = torch.export.load(tmp_path / "policy.pt2").module()(batch)
    assert (action[..., 0] == torch.tensor(0.0213)).all() and len(action[..., 1].unique()) == 12


def test_steps_and_kind_of_sampling_are_settings() -> None:
    policy = Policy(Samples(), Normaliser(spec()), spec(), Inference(sampling_steps=2))

    def act() -> float:
        policy.reset(seeds=[5])
        return float(policy.act(observe(0.0))[0, 0]) - 100

    first = act()
    assert policy.inference["sampling_steps"] == 2 and policy.inference["sampler"] == "a"
    policy.configure(sampling_steps=4, sampler="b")
    assert act() == pytest.approx(-4 * first)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action_steps": 5}, "--policy.action-steps 5 must be 1 to 4, the chunk's length"),
        ({"action_steps": 0}, "--policy.action-steps 0 must be 1 to 4"),
        ({"sampling_steps": 5}, "this policy does not sample in steps"),
        ({"ensemble": float("nan")}, "--policy.ensemble nan must be a finite number"),
        ({"task": "fly"}, "--policy.task 'fly': the policy does not know it; its data has one task only"),
        ({"actoin_steps": 1}, "unknown policy setting 'actoin_steps'; nearest: action_steps"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    policy = Policy(Plans(), Normaliser(plain_spec()), plain_spec())
    with pytest.raises(UserError, match=re.escape(message)):
        policy.configure(**settings)


def test_what_collects_plans_as_often() -> None:
    policy = Policy(Plans(), Normaliser(plain_spec()), plain_spec(), Inference(action_steps=2, ensemble=0.1))
    explorer = policy.exploring(Plans())
    assert explorer.action_steps == 2 and explorer.settings.ensemble is None and explorer.module is not policy.module
    assert policy.configure(action_steps=None).exploring(Plans()).action_steps == 4


def test_settings_of_a_sampler_and_of_single_actions() -> None:
    with pytest.raises(UserError, match=r"--policy.sampler c: this policy knows a, b"):
        Policy(Samples(), Normaliser(spec()), spec(), Inference(sampler="c"))
    with pytest.raises(UserError, match=r"--policy.sampling-steps 21 must be 1 to 20"):
        Policy(Samples(), Normaliser(spec()), spec(), Inference(sampling_steps=21))
    with pytest.raises(UserError, match="--policy.ensemble averages chunks; this policy returns single actions"):
        Policy(Samples(), Normaliser(spec()), spec(), Inference(ensemble=0.1))


@pytest.mark.slow
def test_the_settings_travel_with_the_weights(script: Callable[..., Path], tmp_path: Path) -> None:
    """Set in training, in components.evaluate and on the loaded policy; always in eval.jsonl."""
    small = ("--model.channels", 16, "--dataset.action-steps", 8, "--steps", 2, "--eval-episodes", 2)
    run = script("--trainer", "flow", *small, "--policy.action-steps", 3, "--policy.sampling-steps", 4)
    lines = read_lines(run / "eval.jsonl")
    assert lines[-1]["inference"] == {
        "obs_steps": 2, "chunk": 8, "action_steps": 3, "ensemble": None, "sampler": "euler", "sampling_steps": 4
    }  # fmt: skip
    assert load_policy(run).inference == lines[-1]["inference"]
    changed = load_policy(run, action_steps=5, sampler="midpoint", ensemble=0.01)
    assert changed.inference == lines[-1]["inference"] | {"action_steps": 5, "sampler": "midpoint", "ensemble": 0.01}
    evaluate = (sys.executable, "-m", "components.evaluate", run, "--plugins", "toy", "--eval-episodes", 2)
    done = command(*evaluate, "--policy.sampling-steps", 2, "--policy.action-steps", 8, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    expected = lines[-1]["inference"] | {"sampling_steps": 2, "action_steps": 8}
    assert read_lines(run / "eval.jsonl")[-1]["inference"] == expected
    done = command(*evaluate, "--policy.action-steps", 9, cwd=ROOT)
    assert done.returncode == 2 and "--policy.action-steps 9 must be 1 to 8" in done.stderr
    assert "Traceback" not in done.stderr


# ---- export --------------------------------------------------------------------------------------------------------

WITH_TORCH_ALONE = """
import json, sys, torch
for path in sys.argv[1:]:
    extra = {"policy.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    inputs = json.loads(extra["policy.json"])["inputs"]
    torch.manual_seed(0)
    batch = {k: torch.randn(5, *v["shape"]) for k, v in inputs.items()}
    whole = {k: v for k, v in inputs.items() if "int" in v["dtype"]}
    batch |= {k: torch.randint(2, (5, *v["shape"])).to(getattr(torch, v["dtype"])) for k, v in whole.items()}
    torch.save({"batch": batch, "action": program(batch)}, path + ".out")
assert not any(name.startswith(("components", "accelerate", "safetensors")) for name in sys.modules)
"""
MIXTURE = ("--trainer", "bc", "--model.head", "mixture", "--loss", "nll", "--dataset.action-steps", 4)
DENOISER = ("--model.channels", 16, "--policy.sampling-steps", 2)
EXPORTED: dict[str, tuple[object, ...]] = {
    "bc": (*toy.EXPERTS,),
    "codebook": (*toy.TRAINERS["bc"], "--policy.sampler", "sample"),
    "mixture": MIXTURE,
    "pictures": toy.PICTURES,  # cut to their centre, and with two tasks
    "act": toy.TRAINERS["act"],
    "diffusion": (*toy.TRAINERS["diffusion"], *DENOISER, "--policy.sampler", "ddpm", "--policy.sampling-steps", 3),
    "flow": (*toy.TRAINERS["flow"], *DENOISER, "--policy.sampler", "midpoint", "--policy.sampling-steps", 2),
    "shortcut": (*toy.TRAINERS["flow"], "--model.channels", 16, "--trainer.objective", "shortcut"),
    "sac": toy.TRAINERS["sac"],
    "td3_bc": toy.TRAINERS["td3_bc"],  # actions of another scale
    "fql": toy.TRAINERS["fql"],
    "recap": (*toy.TRAINERS["recap"], "--policy.sampling-steps", 2),  # guided
    "guided": (*toy.TRAINERS["flow"], *DENOISER, "--trainer.unconditional", 0.3, "--policy.guidance", 2),
    "qc": (*toy.TRAINERS["qc"], "--trainer.method", "best_of_n", "--trainer.flow-steps", 2),
    "hiql": toy.TRAINERS["hiql"],  # with goals
}
QUICK = ["bc", "fql"]


def test_every_kind_of_policy_is_exported() -> None:
    own = {name for name in toy.TRAINERS if hasattr(TRAINER_REGISTRY[name], "policy")}
    assert set(EXPORTED) >= own - {"ifql"}  # the best of N, as qc's


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param([name for name in EXPORTED if name not in QUICK], marks=pytest.mark.slow)]
)
def test_exported_policies_are_equal_and_need_torch_alone(
    script: Callable[..., Path], tmp_path: Path, names: list[str]
) -> None:
    """Every kind of acting module; batches of another size than the one that was traced."""
    runs = {name: script(*EXPORTED[name], "--steps", 2, folder=name) for name in names}
    files = {name: run / "policy" / "policy.pt2" for name, run in runs.items()}
    assert all(export.main([str(run)]) == 0 for run in runs.values())
    (tmp_path / "only_torch.py").write_text(WITH_TORCH_ALONE)
    done = command(sys.executable, "-P", tmp_path / "only_torch.py", *files.values(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, run in runs.items():
        found = torch.load(f"{files[name]}.out")
        batch, policy = dict(found["batch"]), load_policy(run)
        if "task_index" in batch:
            batch["task"] = [policy.spec["task"]["values"][i] for i in batch.pop("task_index").tolist()]
        with torch.no_grad():
            normalised = policy.normaliser(batch)
            action = policy.module(normalised["observation.state"] if policy.takes_tensor else normalised)
        eager = policy.normaliser.undo("action", action)
        assert found["action"].shape == (5, *policy.spec["action"]["shape"]), name
        assert (found["action"] - eager).abs().max() <= 1e-5 * max(1.0, float(eager.abs().max())), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "which run? It comes first: python -m components.export RUN"),
        (("--debug",), "which run?"),
        (("a", "b"), "expected one, found a b"),
        (("absent",), "absent: no policy here (policy/policy.json); no such folder"),
        (("ann/push",), "; no such folder; of the hub it would be hf://ann/push"),
        (("RUN", "--policy.action-steps", "9"), "--policy.action-steps 9 must be 1 to 1"),
        (("RUN", "--out", "absent/policy.pt2"), "--out absent/policy.pt2: no such folder absent"),
    ],
)
def test_bad_input_of_export(script: Callable[..., Path], words: tuple[str, ...], message: str) -> None:
    run = str(script("--trainer", "bc", "--steps", 1)) if "RUN" in words else ""
    with pytest.raises(UserError, match=re.escape(message)):
        export.main([run if word == "RUN" else word for word in words])
