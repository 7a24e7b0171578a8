"""Offline RL: what is learned, what data is refused, what is said; the equations are in test_offline_rl_maths.py."""

import functools
import json
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

import toy
from components import MODEL_BUILDER_REGISTRY, TRAINER_REGISTRY, UserError, load_policy, parallel, report
from components.acting.inference import Inference
from components.acting.learned import acting_policy
from components.contracts import Promises, Window, construct, model_spec_of, needs_of, options_of
from components.data.batches import Batches
from components.data.features import build_models, describe
from components.data.normalisation import Normaliser
from components.datasets.episodes import build_episodes
from components.datasets.gymnasium import GymnasiumRollouts
from components.datasets.metaworld import MetaWorldDemonstrations
from components.datasets.transitions import Transitions, prepared, transitions
from components.envs.metaworld import MetaWorldEnv
from components.envs.ogbench import OGBenchEnv
from components.learning import held_out
from components.optimizers import Adam, learning_rate_factor
from components.run.curves import diverging, read_lines
from components.speed import compile as compiled
from components.speed import cuda_graphs, matmul
from conftest import FIXTURES

Script = Callable[..., Path]
MAZE = FIXTURES / "ogbench" / "pointmaze-medium-navigate-mini.npz"

# ---- a chain whose values are known --------------------------------------------------------------------------------

STATES, LENGTH, DISCOUNT = 5, 3, 0.9


def chain(mistaken: bool = False) -> dict[str, Any]:
    """Walks on a chain: an action above 0 leads right, where the goal ends the walk; each step costs 1.

    One action in three leads right, so that their mean leads left. Walks are cut after LENGTH steps; `mistaken` marks
    that as terminated, too.
    """
    random = np.random.default_rng(0)
    rows: dict[str, list[Any]] = {key: [] for key in ("state", "action", "terminated", "next")}
    ends = []
    for _ in range(1000):
        state = int(random.integers(STATES - 1))
        for _ in range(LENGTH):
            action = random.uniform(0, 1) * (1 if random.random() < 1 / 3 else -1)
            following = min(max(state + (1 if action > 0 else -1), 0), STATES)
            for key, value in zip(rows, (state, action, following == STATES, following), strict=True):
                rows[key].append(value)
            state = following
            if state == STATES:
                break
        ends.append(len(rows["state"]))
    one_hot = torch.eye(STATES + 1)
    last = torch.tensor(ends) - 1
    terminated = torch.tensor(rows["terminated"])
    terminated[last] |= mistaken
    columns = {
        "observation.state": one_hot[rows["state"]],
        "action": torch.tensor(rows["action"], dtype=torch.float32)[:, None],
        "reward": -torch.ones(len(rows["state"])),
        "terminated": terminated,
        "next.observation.state": one_hot[rows["next"]],
    }
    return build_episodes(columns, last + 1, "chain", validation=0.0)


def trained(name: str, options: dict[str, Any], updates: int, data: dict[str, Any]) -> tuple[Any, Any]:
    """A trainer with small networks after some updates, and its policy."""
    torch.manual_seed(0)
    cls = TRAINER_REGISTRY[name]
    config = options_of(cls, options)
    data = prepared(data, cls, "test", config)
    spec = describe(data["dataset"][0], data["norm_stats"])
    modes = {"observation": "none", "action": "none"}
    normaliser = Normaliser(spec, modes)
    spec = normaliser.with_ranges(spec)
    needs = needs_of(cls)
    needs.pop("encoder", None)

    def build(model: str, seen: dict[str, Any]) -> nn.Module:
        factory = MODEL_BUILDER_REGISTRY[needs[model]]
        own = {"hidden_dims": (32,)} if hasattr(factory, "hidden_dims") else {}
        own |= {"time": False} if needs[model] == "vector_field" and model == "policy" and "flow" in needs else {}
        own |= {"std": "learned"} if name in ("iql", "awac") and model == "policy" else {}
        return options_of(factory, own).build(seen)

    models = build_models(list(needs), build, spec, model_spec_of(cls, config))
    optimizers = {model: Adam(lr=1e-2).build(module.parameters()) for model, module in models.items()}
    trainer = construct(cls, models, optimizers, nn.MSELoss(), spec, config, torch.device("cpu"))
    for _, batch in zip(range(updates), Batches(data["dataset"], 64, seed=0).stream(0), strict=False):
        trainer.train_step(normaliser(batch))
    learner = SimpleNamespace(trainer=trainer, models=models, device=torch.device("cpu"))
    args = SimpleNamespace(policy=Inference(), given=lambda option: False)
    return trainer, acting_policy(learner, normaliser, spec, args)


def actions(policy: Any) -> np.ndarray:
    """What the policy does in each state, `[STATES]`; of a chunk its first action."""
    policy.reset(seeds=range(STATES))
    return policy.act({"observation.state": np.eye(STATES + 1, dtype=np.float32)[:STATES]})[:, 0]


FAST = {"discount": DISCOUNT, "target_rate": 0.05}
METHODS: dict[str, dict[str, Any]] = {
    "td3_bc": FAST | {"alpha": 10.0, "policy_noise": 0.05},
    "iql": FAST | {"expectile": 0.9, "temperature": 10.0},
    "awac": FAST | {"temperature": 0.1},
    "cql": FAST | {"alpha": 0.1, "actions": 4},
    "rebrac": FAST | {"actor_penalty": 0.05, "critic_penalty": 0.0},
    "fql": FAST | {"alpha": 1.0},
    "ifql": FAST | {"expectile": 0.9, "candidates": 8},
    "qc": FAST | {"alpha": 1.0, "chunk": 2},
    "recap": {"discount": DISCOUNT, "chunk": 2, "n_step": 2, "positive": 0.15},
}


def test_behaviour_cloning_goes_the_wrong_way() -> None:
    assert (actions(trained("bc", {}, 300, chain())[1]) < 0).all()


UPDATES = dict.fromkeys(METHODS, 400) | {"fql": 800}


@functools.cache
def learnt(name: str, mistaken: bool = False) -> tuple[Any, Any]:
    """A method's trainer and policy, for every test that looks at them."""
    return trained(name, METHODS[name], UPDATES[name], chain(mistaken))


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_finds_the_best_way_in_bad_data(name: str) -> None:
    assert (actions(learnt(name)[1]) > 0).all()


BEST = -torch.tensor([(1 - DISCOUNT**steps) / (1 - DISCOUNT) for steps in range(STATES, 0, -1)])


@pytest.mark.parametrize(
    ("name", "mistaken"), [("td3_bc", True), ("td3_bc", False), ("awac", False), ("rebrac", False), ("fql", False)]
)
def test_values_approach_the_analytic_ones_unless_truncation_is_mistaken(name: str, mistaken: bool) -> None:
    """Of the methods whose Q-function is that of the policy they learn, which is the best one here."""
    trainer, _ = learnt(name, mistaken)
    right = torch.full((STATES, 1), 0.5)
    values = trainer.models["critic"](torch.eye(STATES + 1)[:STATES], right).mean(0).detach()
    error = float((values - BEST).abs().max())
    assert error > 1.2 if mistaken else error < 0.6


# ---- what is refused, and what is said -----------------------------------------------------------------------------

RL = ("td3_bc", "iql", "awac", "cql", "rebrac", "fql", "ifql", "qc", "recap")
TINY = ("--steps", 4, "--eval-episodes", 0)


@pytest.mark.parametrize("name", RL)
def test_bad_input_data_without_rewards(script: Script, name: str) -> None:
    options = [word for word in toy.TRAINERS[name] if word not in toy.UNIT]
    with pytest.raises(UserError, match=f"{name}.*(no rewards in this data|needs episodes|has no 'reward')"):
        script(*options, "--dataset", "minimal_data", *TINY)
    with pytest.raises(UserError, match=f"trainer '{name}': .*no rewards in this data; found: action"):
        script(*options, "--dataset", "ogbench", "--dataset.path", MAZE, *TINY)


@pytest.mark.parametrize("name", RL)
def test_bad_input_actions_beyond_what_the_policy_gives(script: Script, name: str) -> None:
    options = [word for word in toy.TRAINERS[name] if word not in toy.UNIT]
    with pytest.raises(UserError) as error:
        script(*options, *TINY)
    message = str(error.value)
    found = re.search(r"; the data's lie in \[(.*), (.*)\]: set --dataset.action-scale (\S+),", message)
    assert found, message
    low, high, scale = (float(text) for text in found.groups())
    assert scale == max(-low, high) > 1
    script(*options, *TINY, "--dataset.action-scale", scale)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer", "qc", "--trainer.chunk", 11, "--dataset.no-terminates"), "cuts every chunk of toy"),
        (("--trainer", "qc", "--dataset.action-steps", 2), "qc makes its own windows of the data"),
        (("--trainer", "iql", "--trainer.expectile", 1.5), "--trainer.expectile 1.5 must be 0 to 1"),
        (("--trainer", "iql", "--trainer.discount", 0), "--trainer.discount 0.0 must be in (0, 1]"),
        (("--trainer", "cql", "--trainer.actions", 0), "--trainer.actions 0 must be 1 to 10000"),
        (("--trainer", "fql", "--trainer.flow-steps", 0), "--trainer.flow-steps 0 must be 1 to 10000"),
        (("--trainer", "awac", "--trainer.temperature", 0), "--trainer.temperature 0.0 must be"),
        (("--trainer", "fql", "--model", "mlp"), "this trainer does not go with a FlatPolicy"),
        (("--trainer", "iql", "--mixed-precision", "fp16"), "--mixed-precision fp16 is not supported"),
        (("--trainer", "iql", "--dataset.nan"), "1 NaN or Inf values in 'observation.state'"),
        (("--trainer", "iql", "--dataset.reward-scale", 0), "--dataset.reward-scale 0.0 must be above 0"),
        (("--trainer", "td3_bc", "--normalise", "reward=quantile"), "needs the statistic 'q01'"),
        (("--trainer", "gciql", "--trainer.value-goals", 0.5, 0.5, 0.5), "the shares of current, later and random"),
        (("--trainer", "hiql", "--dataset.obs-steps", 2), "hiql takes single steps"),
    ],
)  # fmt: skip
def test_bad_input_options(script: Script, options: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        script(*options, *toy.UNIT, *TINY)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_input_rewards_that_are_not_finite(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    build = toy.ToyData.scaled

    def with_nan(self: Any, episodes: Any) -> Any:
        episodes.columns["reward"][33] = float("nan")
        return build(self, episodes)

    monkeypatch.setattr(toy.ToyData, "scaled", with_nan)
    with pytest.raises(UserError, match="1 NaN or Inf values in 'reward', first in episode 3 at step 3"):
        script(*toy.TRAINERS["iql"], *TINY)


def test_bad_input_goals_where_there_are_none(script: Script) -> None:
    """Neither data of single items nor an environment without goals will do."""
    with pytest.raises(UserError, match="gcbc needs episodes; the data is a list of single items"):
        script("--trainer", "gcbc", "--dataset", "minimal_data", *TINY)
    with pytest.raises(UserError, match="it returns observation.state, the policy needs 'observation.goal'"):
        script("--trainer", "gcbc", "--steps", 4, "--eval-episodes", 2)


def test_an_episodic_task_without_ends_is_warned_of(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    script(*toy.TRAINERS["iql"], *TINY)
    assert "no step of this data is 'terminated'" not in caplog.text
    script(*toy.TRAINERS["iql"], *TINY, "--dataset.no-terminates", folder="endless")
    assert "no step of this data is 'terminated': every episode counts as cut short" in caplog.text


# ---- scales --------------------------------------------------------------------------------------------------------


def test_a_policy_of_scaled_actions_acts_in_the_environments_units(script: Script) -> None:
    """The action-scale divides what is learnt from and multiplies what is done."""
    run = script(
        *toy.TRAINERS["td3_bc"], "--steps", 1500, "--trainer.alpha", 0, "--optimizer.lr", 1e-2, "--eval-episodes", 0
    )
    policy = load_policy(run)
    states = torch.randn(200, toy.STATE).numpy()
    expected = states @ toy.EXPERT.numpy()
    error = np.abs(policy.act({"observation.state": states}) - expected)
    assert error.mean() < 0.2 < np.abs(expected).mean() / 2


def test_rewards_are_shifted_scaled_and_brought_to_a_span() -> None:
    plain, scaled = toy.ToyData(validation=0.0), toy.ToyData(validation=0.0, reward_shift=2.0, reward_scale=3.0)
    before, after = (d.build()["dataset"].episodes.columns["reward"] for d in (plain, scaled))
    assert torch.allclose(after, 3 * (before + 2))
    data = transitions(plain.build(), "iql", Window())
    totals = before.view(-1, toy.LENGTH).sum(1)
    stats = data["norm_stats"]["reward"]
    assert stats == pytest.approx({"return_min": float(totals.min()), "return_max": float(totals.max())})
    spec = describe(data["dataset"][0], data["norm_stats"])
    batch = data["dataset"].get_batch(torch.arange(200))
    reward = Normaliser(spec, {"reward": "return_range"})(batch)["reward"]
    totals = reward.view(-1, toy.LENGTH).sum(1)
    assert float(totals.max() - totals.min()) == pytest.approx(1000, rel=1e-4)
    assert torch.equal(Normaliser(spec)(batch)["reward"], batch["reward"])  # unless it is asked for
    data = transitions(plain.build(), "cql", Window(to_go=True))  # the returns that were reached go with them
    normaliser = Normaliser(describe(data["dataset"][0], data["norm_stats"]), {"reward": "return_range"})
    plain_batch = data["dataset"].get_batch(torch.arange(200))
    assert torch.allclose(
        normaliser(plain_batch)["return_to_go"] / plain_batch["return_to_go"],
        normaliser(plain_batch)["reward"] / plain_batch["reward"],
    )


def test_modes_of_groups_and_of_keys_that_share_statistics() -> None:
    stats = {"mean": [1.0], "std": [2.0], "min": [-3.0], "max": [5.0]}
    spec = {
        "observation.a": {"shape": (1,), "dtype": "float32", "stats": stats},
        "observation.goal": {"shape": (1,), "dtype": "float32", "like": "observation.a"},
        "action": {"shape": (1,), "dtype": "float32", "stats": stats | {"scale": 4.0}},
    }
    batch = {key: torch.tensor([[5.0]]) for key in (*spec, "next.observation.goal")}
    found = Normaliser(spec)(batch)
    assert [float(found[key]) for key in batch] == [2.0, 2.0, 2.0, 2.0]
    found = Normaliser(spec, {"observation": "none", "action": "scale"})(batch)
    assert [float(found[key]) for key in batch] == [5.0, 5.0, 1.25, 5.0]
    found = Normaliser(spec, {"observation": "none", "observation.a": "min_max"})(batch)
    assert [float(found[key]) for key in batch] == [1.0, 1.0, 2.0, 1.0]
    normaliser = Normaliser(spec, {"action": "scale"})
    assert float(normaliser.undo("action", torch.tensor(1.25))) == 5.0
    assert normaliser.with_ranges(spec)["action"]["range"] == [[-0.75], [1.25]]
    spec["action"]["stats"]["max"] = spec["action"]["stats"]["max"][0]  # of all dimensions
    assert normaliser.with_ranges(spec)["action"]["range"] == [[-0.75], [1.25]]


def test_what_is_asked_of_one_key_leaves_the_others_as_they_suit_the_trainer(script: Script) -> None:
    run = script(*toy.TRAINERS["iql"], *TINY, "--normalise", "observation=mean_std")
    modes = json.loads((run / "policy" / "policy.json").read_text())["normalisation"]
    assert modes == {"action": "scale", "observation.state": "mean_std"}


@pytest.mark.parametrize("name", ["td3_bc", "rebrac"])
def test_the_schedule_of_a_delayed_policy_ends_with_the_run(script: Script, name: str) -> None:
    cosine = ("--steps", 12, "--log-every", 1, "--optimizer.schedule", "cosine", "--eval-episodes", 0)
    lines = read_lines(script(*toy.TRAINERS[name], *cosine) / "metrics.jsonl")
    policy = [line["train/lr.policy"] for line in lines if "train/lr.policy" in line]
    critic = [line["train/lr.critic"] for line in lines if "train/lr.critic" in line]
    assert policy[-1] / policy[0] == pytest.approx(learning_rate_factor("cosine", 5, 6, 0))  # the last of six updates
    assert critic[-1] / critic[0] == pytest.approx(learning_rate_factor("cosine", 11, 12, 0))


# ---- data to learn from --------------------------------------------------------------------------------------------


def test_noisy_and_random_data_of_meta_world(tmp_path: Path) -> None:
    """Half of the episodes are random, the others are the expert's with noise; the reward is at most 0."""
    make = partial(MetaWorldDemonstrations, demos=4, max_episode_steps=60, validation=0.0, cache_dir=str(tmp_path))
    expert = make(task="reach-v3", demos=2).build()["dataset"].episodes
    data = make(task="reach-v3", noise=0.3, random=0.5).build()["dataset"].episodes
    again = make(task="reach-v3", noise=0.3, random=0.5).build()["dataset"].episodes  # from the cache
    assert torch.equal(data.columns["action"], again.columns["action"]) and len(list(tmp_path.iterdir())) == 2
    parts = data.columns["action"].split(data.lengths.tolist())
    assert len(parts) == 4
    mean = [float(part.abs().mean()) for part in parts]
    assert all(abs(mean[k] - 0.5) < 0.05 for k in (1, 3)) and data.lengths[1] == data.lengths[3] == 60  # uniform
    assert float(data.columns["reward"].max()) <= 0 and float(data.columns["reward"].min()) >= -1
    assert (expert.columns["reward"][expert.ends - 1] == 0).all()  # success is worth most
    sparse = make(task="reach-v3", noise=0.3, random=0.5, reward="sparse").build()  # of the same attempts
    columns = sparse["dataset"].episodes.columns
    assert columns["terminated"].any() and torch.equal(columns["reward"], columns["terminated"].float() - 1)
    envs = MetaWorldEnv(**{key: value for key, value in sparse["env"].items() if key != "name"}).build(1, seed=0)
    rewards = [0.0]
    while not rewards[-1]:
        assert len(rewards) < 60
        rewards.append(float(envs.step(envs.expert())[1][0]))
    envs.close()
    assert rewards[-1] == 10 and len(rewards) > 5
    noise = parts[0][:5] - expert.columns["action"][:5]
    assert 0.05 < float(noise.std()) < 0.6  # the first actions of the same goal


def test_rollouts_in_gymnasium_are_transitions_with_the_right_ends() -> None:
    build = partial(GymnasiumRollouts, id="Pendulum-v1", max_episode_steps=7, validation=0.0)
    built = build(episodes=3, action_scale=2.0).build()
    batch = built["dataset"].get_batch(torch.arange(21))
    assert len(built["dataset"]) == 21 and built["env"]["id"] == "Pendulum-v1"
    assert batch["truncated"].tolist() == ([False] * 6 + [True]) * 3 and not batch["terminated"].any()
    inner = ~batch["truncated"]
    following = batch["next.observation.state"]
    assert torch.equal(following[:-1][inner[:-1]], batch["observation.state"][1:][inner[:-1]])
    assert not torch.allclose(following[6], batch["observation.state"][7])  # not the next episode's first
    assert float(batch["action"].abs().max()) > 1 and built["norm_stats"]["action"]["scale"] == 2.0
    same = build(episodes=3).build()["dataset"].get_batch(torch.arange(21))
    assert torch.equal(same["action"], batch["action"])
    with pytest.raises(UserError, match=r"has the action space Discrete\(2\); this reader plays those with a Box"):
        build(id="CartPole-v1").build()


def test_a_saved_policy_plays_the_rollouts(script: Script) -> None:
    options = ("--dataset", "gymnasium", "--dataset.id", "TendonToy-v0", "--dataset.episodes", 3, "--eval-episodes", 0)
    run = script("--trainer", "bc", "--steps", 2, "--dataset", "toy", "--eval-episodes", 0, folder="player")
    built = GymnasiumRollouts(id="TendonToy-v0", episodes=3, policy=str(run), validation=0.0).build()
    batch = built["dataset"].get_batch(torch.arange(30))
    policy = load_policy(run)
    expected = policy.act({"observation.state": batch["observation.state"].numpy()})
    assert np.allclose(batch["action"].numpy(), np.clip(expected, -5, 5), atol=1e-5)
    script("--trainer", "td3_bc", *toy.SMALL, "--dataset.action-scale", 5, *options, "--steps", 2, folder="learner")


def test_a_mixture_is_learnt_from_source_by_source(script: Script) -> None:
    sources = ("--dataset", "mixture", "--dataset.sources", "toy:0.5", "toy,episodes=7:0.5")
    options = [word for word in toy.TRAINERS["iql"] if word not in toy.UNIT]
    with pytest.raises(UserError, match="set --dataset.action-scale"):
        script(*options, *sources, *TINY)
    sources = (
        "--dataset",
        "mixture",
        "--dataset.sources",
        "toy,action_scale=4:0.5",
        "toy,action_scale=4,episodes=7:0.5",
    )
    run = script(*options, *sources, "--steps", 20, "--eval-episodes", 0, folder="scaled")
    assert {"train/q", "train/v", "train/weight"} <= set(read_lines(run / "metrics.jsonl")[-1])


@pytest.mark.parametrize("name", ["td3_bc", "rebrac", "fql"])
def test_losses_of_what_one_process_has_wait_for_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another process has no step of a source, or was stopped, a mean over both would wait for ever."""
    trainer, _ = trained(name, METHODS[name] | ({"normalise_q": True} if name == "fql" else {}), 1, chain())
    data = transitions(chain(), name, Window(next_action=name == "rebrac"))
    batch = data["dataset"].get_batch(torch.arange(64))

    def no_process(*_: object) -> None:
        raise AssertionError("met another process")

    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "from_first", lambda value: value)
    monkeypatch.setattr(torch.distributed, "all_reduce", no_process)
    with pytest.raises(AssertionError, match="met another"):
        trainer.losses(batch)
    found = held_out.loss_by_source(trainer, batch | {"source": ["a", "b"] * 32}, "train/")
    assert set(found) == {"train/loss.a", "train/loss.b"} and all(map(np.isfinite, found.values()))
    device, normaliser = torch.device("cpu"), Normaliser({})
    assert np.isfinite(held_out.held_out_loss(trainer, data["dataset"], normaliser, 500, device)["val/loss"])


# ---- what is seen of a run -----------------------------------------------------------------------------------------


def test_the_report_marks_values_that_rewards_do_not_allow(script: Script, capsys: pytest.CaptureFixture[str]) -> None:
    run = script(*toy.TRAINERS["td3_bc"], "--steps", 20, "--log-every", 5, "--eval-episodes", 0)
    report.main([str(run), "--out", str(run / "report.png")])
    assert "DIVERGING" not in capsys.readouterr().out and diverging(run) == ""
    with open(run / "metrics.jsonl", "a") as file:
        lines = read_lines(run / "metrics.jsonl")
        bound = max(line["train/reward_abs_max"] for line in lines) / 0.01
        file.write(json.dumps(lines[-1] | {"step": 25, "train/q": -2.1 * bound}) + "\n")
    report.main([str(run), "--out", str(run / "report.png")])
    assert "DIVERGING: q reaches -" in capsys.readouterr().out


# ---- faster --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("medium", "error", "chosen"),
    [(200.0, 5e-5, "medium"), (105.0, 5e-5, "highest"), (400.0, 0.2, "highest")],
    ids=["faster", "not worth it", "no float32"],
)
def test_matmul_auto_takes_what_is_faster_and_still_float32(
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    medium: float,
    error: float,
    chosen: str,
) -> None:
    """What it chooses is said and recorded, and a resumed run keeps it, whatever a probe would say then."""
    found = {"highest": (100.0, 2e-5), "medium": (medium, error)}
    monkeypatch.setattr(matmul, "probe", lambda: found[torch.get_float32_matmul_precision()])
    try:
        run = script(*toy.TRAINERS["iql"], *TINY, "--matmul", "auto")
        assert torch.get_float32_matmul_precision() == chosen
        assert f"matrix products: '{chosen}' (highest 100 GFLOP/s with error 2e-05, medium " in capsys.readouterr().out
        torch.set_float32_matmul_precision("highest")
        monkeypatch.setattr(matmul, "probe", None)
        script("--resume", run, "--steps", 8)
        assert torch.get_float32_matmul_precision() == chosen
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_probe_measures_a_product_of_this_machine() -> None:
    rate, error = matmul.probe()
    assert 0.1 < rate < 1e5 and 1e-7 < error < matmul.WORST
    before = torch.get_float32_matmul_precision()
    assert matmul.choose("default", None, torch.device("cpu")) == "" and torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize(("seconds", "said"), [(0.001, "pays from step"), (0.01, "gains nothing here")])
def test_compiling_says_from_which_step_on_it_pays(monkeypatch: pytest.MonkeyPatch, seconds: float, said: str) -> None:
    """With a stand-in for the compiled method, which takes so long; nothing else changes."""
    trainer, _ = trained("td3_bc", METHODS["td3_bc"], 1, chain())
    data = prepared(chain(), TRAINER_REGISTRY["td3_bc"], "td3_bc", trainer.config)["dataset"].get_batch(torch.arange(8))
    before = {key: value.clone() for key, value in trainer.models.state_dict().items()}
    state = torch.get_rng_state()

    def taking(time_taken: float) -> Callable[..., Any]:
        def loss(*arguments: Any) -> Any:
            time.sleep(time_taken)
            torch.randn(3)
            return sum(p.sum() for p in trainer.models["critic"].parameters()), {}

        return loss

    trainer.promises = Promises(compiles=("critic_loss",))
    monkeypatch.setattr(type(trainer), "critic_loss", taking(0.005))
    trainer.critic_loss = taking(seconds)
    assert said in compiled.break_even(trainer, data, trainer.models)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in trainer.models.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.models.parameters())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro_steps": 2}, "several processes, micro-steps or averaged weights"),
        ({"averaged": True}, "several processes, micro-steps or averaged weights"),
        ({"trainer": object()}, "object does not say when its steps repeat"),
        ({"optimizers": {"policy": torch.optim.SGD([torch.zeros(1)])}}, "they need --optimizer adam or adamw, fused"),
        ({"device": torch.device("cpu")}, ""),
    ],
)
def test_why_updates_are_not_replayed(changes: dict[str, Any], said: str) -> None:
    """The graphs themselves need a GPU: test_cuda.py."""
    optimizers = {"policy": Adam().build([nn.Parameter(torch.zeros(1))])}
    usual = {"trainer": TRAINER_REGISTRY["iql"], "optimizers": optimizers, "device": torch.device("cuda")}
    usual |= {"micro_steps": 1, "averaged": False, "update": print}
    update, note = cuda_graphs.choose(SimpleNamespace(**usual | changes))
    assert update is print and note.removeprefix("no CUDA graphs: ").startswith(said)
    assert bool(note) == bool(said)


def test_a_table_of_transitions_is_taken_to_the_device(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    monkeypatch.setattr(Transitions, "to", lambda self, device: moved.append(device))
    script(*toy.TRAINERS["iql"], "--steps", 1)
    assert moved == [Accelerator().device]


# ---- OGBench's environments ----------------------------------------------------------------------------------------


def test_ogbench_plays_its_tasks_in_turn_and_shows_the_goal() -> None:
    """Where it is installed: pip install ogbench "mujoco==3.3.0"."""
    pytest.importorskip("ogbench")
    envs = OGBenchEnv(id="pointmaze-medium-v0", max_episode_steps=20).build(5, 0)
    first, _ = envs.reset(seed=[0, 1, 2, 3, 4])
    torch.manual_seed(3)
    np.random.seed(3)
    again, _ = envs.reset(seed=[0, 1, 2, 3, 4])
    assert all(np.array_equal(first[key], again[key]) for key in ("observation", "goal"))
    goals = {tuple(goal.round().tolist()) for goal in first["goal"]}
    assert len(goals) == 5  # a task each
    for _ in range(20):
        observation, _, _, truncated, info = envs.step(np.zeros((5, 2), np.float32))
    assert truncated.all() and set(observation) == {"observation", "goal"} and "success" in info["final_info"]
    with pytest.raises(UserError, match="--env.id pointmaze-nowhere-v0: no environment of ogbench; nearest"):
        OGBenchEnv(id="pointmaze-nowhere-v0").build(1, 0)


def test_a_hierarchy_is_evaluated_in_ogbench(script: Script) -> None:
    pytest.importorskip("ogbench")
    small = [word for word in toy.TRAINERS["hiql"] if word not in toy.GOALS]
    data = ("--dataset", "ogbench", "--dataset.path", MAZE, "--batch-size", 16, "--env.max-episode-steps", 10)
    run = script(*small, *data, "--steps", 3, "--eval-episodes", 5)
    line = read_lines(run / "eval.jsonl")[-1]
    assert line["env"]["id"] == "pointmaze-medium-v0" and line["success_rate"] is not None
    policy = load_policy(run)
    zeros = np.zeros(2, np.float32)
    action = policy.act({"observation.state": zeros, "observation.goal": zeros})
    assert action.shape == (2,)
    with pytest.raises(UserError, match="the policy needs the observation 'observation.goal'"):
        policy.act({"observation.state": zeros})
