"""DAgger and HG-DAgger: who acts, what is labelled and learnt, the budget of labels, experts of three kinds."""

import os
import pty
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import toy
from components import ENV_BUILDER_REGISTRY, TRAINER_REGISTRY, UserError
from components.contracts import Window
from components.data.features import INTERVENTION
from components.datasets.episodes import EpisodeDataset
from components.envs.vector import Environments
from components.envs.workers import spread
from components.experience import recording
from components.experience.collection import Collector, describe_env
from components.experience.guide import Guide, OfRun, Scripted
from components.experience.keyboard import Keyboard
from components.experience.labelled import LABEL, LABELLED, Labelled
from components.experience.memory import Taught
from components.run.curves import read_lines
from conftest import difference, learned, states, weights
from test_offline import interrupt_after

Script = Callable[..., Path]
DAGGER = (*toy.ONLINE_ALONE["dagger"], "--log-every", 5)
HG = (*DAGGER, "--trainer.method", "hg_dagger")
CLS = TRAINER_REGISTRY["dagger"]


def asked(**options: Any) -> Any:
    """What the trainer asks for, by its options."""
    return CLS.data(CLS.Config(**options))  # type: ignore[attr-defined]


def a_run(step: int = 0) -> Any:
    """As much of a run as a guide needs."""
    said: list[str] = []
    return SimpleNamespace(step=step, rank=0, counts={}, say=lambda *lines: said.extend(lines), said=said)


def guided(n: int = 2, starts: int = 0, mode: str = "NextStep", **options: Any) -> tuple[Collector, Guide, Labelled]:
    """Toys with their expert, and a buffer that takes the steps."""
    environments = Environments(toy.Savable(mode).build, n, 0, 0.0)
    run, spec = a_run(), describe_env(environments)
    guide = Guide(asked(**options), Scripted(environments), run, environments, n, starts)
    collector = Collector(environments, 0, 0, 3, run.say, guide=guide)
    collector.start(0)
    return collector, guide, Labelled(spec, 400, n, n, Window())


def play(collector: Collector, guide: Guide, buffer: Labelled, steps: int, action: Any = None) -> list[Any]:
    """Steps of a policy that does one action, and where it was wrong."""
    seen = []
    for _ in range(steps):
        n = collector.environments.num_envs
        done = np.zeros((n, toy.ACTION), np.float32) if action is None else action(collector.observation)
        transitions, _ = collector.step(done)
        seen.append(transitions)
        buffer.miss() if transitions is None else buffer.add(transitions)
        guide.run.step += n
    return seen


def expert_of(state: torch.Tensor) -> torch.Tensor:
    """The toys' expert, within their bounds."""
    return (state @ toy.EXPERT).clamp(-5, 5)


# ---- who acts, and what is labelled --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_dagger_labels_what_the_policy_visits_and_learns_from_nothing_else(mode: str) -> None:
    """The expert acts first; then the policy does, and the budget is exact although some steps only reset."""
    collector, guide, buffer = guided(starts=8, mode=mode, labels=41, beta=0.0)
    seen = play(collector, guide, buffer, 40)
    for number, step in enumerate(seen):
        label, valid = step[LABELLED], step["valid"]
        assert not (label & ~valid).any() and not (step[INTERVENTION] & ~label).any()
        assert torch.equal(step[INTERVENTION], label & (number < 4))
        assert torch.allclose(step[LABEL][label], expert_of(step["observation.state"])[label], atol=1e-6)
        assert (step[LABEL][~label] == 0).all()
        by = torch.where(step[INTERVENTION][:, None], step[LABEL], 0.0)
        assert torch.allclose(step["action"], by)  # the policy does nothing
    given = sum(int(step[LABELLED].sum()) for step in seen)
    assert given == guide.used == guide.run.counts["expert_labels"] == len(buffer.labels()) == 41
    assert sum("all 41 labels of the expert are given" in line for line in guide.run.said) == 1
    batch = buffer.sample(300)
    assert set(batch) == {"observation.state", "action"}
    assert torch.allclose(batch["action"], expert_of(batch["observation.state"]), atol=1e-6)
    assert len({tuple(row) for row in batch["observation.state"].tolist()}) > 35  # of all of them


def test_only_what_the_expert_does_is_labelled_by_hg_dagger() -> None:
    """The gate has a hysteresis: the distances are of the toys' half range 5, in root mean square."""
    guide = Guide(
        asked(method="hg_dagger", takes_over=0.5, gives_back=0.2), SimpleNamespace(), a_run(), toys(3), 3, starts=0
    )
    advice = np.zeros((3, 2), np.float32)
    acts = []
    for far in (0.4, 0.6, 0.3, 0.19, 0.3, 0.51, 0.0):
        action = np.array([[5 * far, 5 * far], [-5 * far * 2**0.5, 0], [0, 0]], np.float32)
        now, labels = guide._wishes(action, advice)
        assert (now == labels).all()
        acts.append(now.tolist())
    assert [row[:2] for row in acts] == [[one, one] for one in (False, True, True, False, False, True, False)]
    assert not any(row[2] for row in acts)
    guide.steers[:] = True
    guide.expert.follow = lambda transitions: None
    flags = torch.zeros(3, dtype=torch.bool)
    begins = torch.tensor([True, False, False])
    guide.follow({"begins": begins, LABELLED: flags, "valid": ~flags})
    assert guide.steers.tolist() == [False, True, True]  # a new episode begins with the policy


def toys(n: int) -> Environments:
    return Environments(toy.Savable().build, n, 0, 0.0)


def test_the_mixture_falls_by_its_iterations() -> None:
    """beta^i: 1 before learning starts, then 0.5, 0.25, ...; a share of the rest is labelled."""
    guide = Guide(asked(beta=0.5, iteration=100, share=0.25), SimpleNamespace(), a_run(), toys(4000), 4000, starts=50)
    torch.manual_seed(0)
    for step, beta in ((0, 1.0), (49, 1.0), (50, 0.5), (149, 0.5), (150, 0.25), (250, 0.125)):
        guide.run.step = step
        acts, labels = guide._wishes(np.zeros((4000, 2)), np.zeros((4000, 2)))
        assert abs(acts.mean() - beta) < 0.03 and not (acts & ~labels).any()
        assert abs(labels.mean() - (beta + (1 - beta) * 0.25)) < 0.03


def test_labels_of_an_expert_that_fails_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash or NaN in it is a fault of its environment, and then no step has a label."""
    collector, guide, buffer = guided(labels=20, starts=4)
    whole, calls = toy.SavableEnvs.expert, iter(range(100))

    def expert(self: Any) -> Any:
        match next(calls):
            case 0:
                raise ArithmeticError("no plan")
            case 2:
                return whole(self) * float("nan")
        return whole(self)

    monkeypatch.setattr(toy.SavableEnvs, "expert", expert)
    seen = play(collector, guide, buffer, 4)
    assert [step is None for step in seen] == [True, False, True, False] and guide.used == 4 == len(buffer.labels())
    text = " ".join(guide.run.said)
    assert "raised ArithmeticError in expert: no plan" in text and "an expert that returned a NaN or Inf" in text
    monkeypatch.setattr(toy.SavableEnvs, "expert", lambda self: np.zeros((2, 3)))
    with pytest.raises(UserError, match=re.escape("expert() returned actions of shape (2, 3), expected (2, 2)")):
        collector.step(np.zeros((2, 2), np.float32))


def test_a_step_that_is_lost_has_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither has the one that the collector insists on: the advice was of another observation."""
    whole, calls = toy.ToyEnv.step, iter(range(100))

    def step(self: Any, action: Any) -> Any:
        if next(calls) == 1:
            raise ArithmeticError("simulator exploded")
        return whole(self, action)

    monkeypatch.setattr(toy.ToyEnv, "step", step)
    collector, guide, buffer = guided(labels=20, starts=40)
    transitions, _ = collector.step(np.zeros((2, 2), np.float32), insist=True)
    assert transitions is not None and not transitions[LABELLED].any() and guide.used == 0
    play(collector, guide, buffer, 2)
    assert guide.used == 4


def test_workers_have_the_expert_of_their_environments() -> None:
    """A fault in one names its environment; environments without an expert offer none."""
    envs = spread(toy.Savable().build, 3, 0, 2)
    try:
        observation, _ = envs.reset(seed=[1, 2, 3])
        assert np.allclose(envs.expert(), observation @ toy.EXPERT.numpy())
    finally:
        envs.close()
    plain = spread(toy.Faulty(kind="none").build, 2, 0, 2)
    try:
        assert not hasattr(plain, "expert")
    finally:
        plain.close()


class DriftEnv(gym.Env):
    """A line to be followed, from which errors grow; an expert that is on it never leaves it."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def observe(self) -> np.ndarray:
        return np.array([self.off, self.speed, np.sin(self.phase), np.cos(self.phase)], np.float32)

    def expert(self) -> np.ndarray:
        right = 0.5 * np.sin(3 * self.phase) - 2 * self.off - 2 * self.speed
        return np.clip([right], -1, 1).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.phase, self.off, self.speed, self.count = self.np_random.uniform(0, 2 * np.pi), 0.0, 0.0, 0
        return self.observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.speed += 0.1 * (float(action[0]) - 0.5 * np.sin(3 * self.phase) + 0.6 * self.off)
        self.off += 0.1 * self.speed
        self.phase, self.count = self.phase + 0.1, self.count + 1
        lost, over = abs(self.off) > 1, self.count == 100
        return self.observe(), 0.0, lost, over, {"success": over and abs(self.off) < 0.3}


class DriftEnvs(gym.vector.SyncVectorEnv):
    """With their expert."""

    def expert(self) -> np.ndarray:
        return np.stack([env.unwrapped.expert() for env in self.envs])  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Drift:
    """Some of them."""

    def build(self, num_envs: int, seed: int) -> Any:
        return DriftEnvs([DriftEnv] * num_envs)


@pytest.mark.slow
def test_labels_where_the_policy_goes_teach_more_than_as_many_of_the_experts_way(
    online: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cloning, which is an expert that acts until its labels are given, ends beside the line."""
    monkeypatch.setitem(ENV_BUILDER_REGISTRY, "drift", Drift)
    options = ("--trainer", "dagger", "--env", "drift", "--model.hidden-dims", 32, 32, "--batch-size", 64)
    options = (*options, "--trainer.labels", 400, "--steps", 1000, "--eval-every", 0, "--eval-episodes", 10)
    rates = []
    for starts in (400, 100):
        run = online(*options, "--learning-starts", starts, folder=f"from-{starts}")
        rates.append(read_lines(run / "eval.jsonl")[-1]["success_rate"])
    assert rates[0] < 0.3 and rates[1] > 0.8


# ---- what is learnt beside a dataset -------------------------------------------------------------------------------


def beside(aggregated: bool, labels: int) -> tuple[Taught, int]:
    """A dataset of 200 steps whose actions are 9, and so many labels."""
    collector, guide, buffer = guided(starts=1000, labels=max(labels, 1), mode="SameStep")
    if labels:
        play(collector, guide, buffer, labels)  # of two environments: the rest is the policy's
    dataset = toy.ToyData(validation=0.0).build()["dataset"]
    assert isinstance(dataset, EpisodeDataset)
    dataset.episodes.columns["action"][:] = 9
    taught = Taught(buffer, dataset, 0.25, 64, aggregated)
    assert taught.due(True) == 1 and taught.due(False) == 0
    return taught, len(buffer.labels())


def test_batches_are_of_labels_and_demonstrations() -> None:
    """A fixed share of each, or both as one set; of demonstrations alone as long as nothing is labelled."""
    old: Any = lambda batch: int((batch["action"] == 9).all(1).sum())  # noqa: E731
    taught, labels = beside(aggregated=False, labels=50)
    assert labels == 50 and {old(taught.sample(64)) for _ in range(20)} == {16}
    batch = taught.sample(64)
    new = {key: value[16:] for key, value in batch.items()}
    assert torch.allclose(new["action"], expert_of(new["observation.state"]), atol=1e-6)
    taught, labels = beside(aggregated=True, labels=50)
    torch.manual_seed(0)
    assert abs(np.mean([old(taught.sample(64)) / 64 for _ in range(50)]) - 200 / 250) < 0.02
    for aggregated in (False, True):
        taught, labels = beside(aggregated, labels=0)
        assert labels == 0 and old(taught.sample(64)) == 64


def test_labels_without_a_dataset_are_waited_for() -> None:
    collector, guide, buffer = guided(labels=5, method="hg_dagger", takes_over=0.02, gives_back=0.01)
    play(collector, guide, buffer, 3, action=lambda observation: observation["observation.state"] @ toy.EXPERT.numpy())
    assert guide.used == 0 == buffer.due(True)
    play(collector, guide, buffer, 3)
    assert 0 < guide.used <= 5 and buffer.due(True) == 1


def test_labels_outlive_a_ring_that_is_overwritten_as_long_as_their_steps() -> None:
    collector, guide, _ = guided(labels=12, starts=4)
    small = Labelled(describe_env(toys(1)), 16, 2, 2, Window())
    play(collector, guide, small, 5)
    assert len(small.labels()) == 10
    play(collector, guide, small, 5)
    assert len(small.labels()) == 12 - 4  # the first two steps of each are gone
    assert (small.sample(30)["action"] != 0).any(1).all()


# ---- through the script --------------------------------------------------------------------------------------------


def test_the_toy_is_learnt_from_the_labels(online: Script) -> None:
    """Every log has their number."""
    options = (*DAGGER, "--steps", 150, "--trainer.labels", 100, "--optimizer.lr", 2e-2, "--eval-every", 50)
    run = online(*options, "--eval-episodes", 4, "--env.mode", "SameStep")
    lines = read_lines(run / "metrics.jsonl")
    assert [line["train/expert_labels"] for line in lines if line["step"] in (50, 100, 150)] == [50, 100, 100]
    assert lines[-1]["train/loss"] < 0.1
    evaluated = read_lines(run / "eval.jsonl")
    assert [line["expert_labels"] for line in evaluated] == [50, 100, 100]
    assert evaluated[-1]["return_mean"] > evaluated[0]["return_mean"] + 1
    episodes = read_lines(run / "episodes.jsonl")
    assert episodes[0]["expert_labels"] == 20 and episodes[-1]["expert_labels"] == 100


def test_a_resumed_run_needs_neither_the_experts_run_nor_counts_anew(script: Script, online: Script) -> None:
    """HG-DAgger beside a dataset: gates, the expert's history, and the count go on bit for bit."""
    chunks = ("--dataset.obs-steps", 2, "--dataset.action-steps", 8, "--policy.action-steps", 3)
    expert = script("--trainer", "bc", "--model.hidden-dims", 16, *chunks, "--steps", 5, folder="expert")
    gate = ("--trainer.takes-over", 0.24, "--trainer.gives-back", 0.2, "--trainer.labels", 100)
    options = (*HG, "--trainer.expert", expert, *gate, "--dataset", "toy")
    options = (*options, "--steps", 50, "--save-every", 14, "--eval-every", 30, "--eval-episodes", 1)
    whole = online(*options, folder="whole")
    interrupt_after(online, 12, *options)
    shutil.rmtree(expert)
    run = online("--resume", whole.parent / "run")
    assert states(run) == states(whole) and learned(run) == learned(whole)
    for log in ("eval.jsonl", "episodes.jsonl"):
        assert (run / log).read_text() == (whole / log).read_text()
    found = read_lines(run / "metrics.jsonl")[-1]["train/expert_labels"]
    assert 20 < found < 45  # the gate is open for a part of the steps


def test_a_clone_is_handed_over_as_it_was_and_corrected(script: Script, online: Script) -> None:
    before = script("--trainer", "bc", "--model.hidden-dims", 16, "--steps", 30, "--eval-episodes", 4, folder="bc")
    options = (*DAGGER, "--init-from", before, "--dataset", "toy", "--eval-episodes", 4, "--eval-every", 60)
    run = online(*options, "--steps", 60)
    first = read_lines(run / "eval.jsonl")[0]
    assert first["step"] == 0 == first["expert_labels"]
    assert first["return_mean"] == pytest.approx(read_lines(before / "eval.jsonl")[-1]["return_mean"], rel=1e-5)
    assert difference(weights(run), weights(before)) > 0


def test_what_was_collected_says_who_acted(online: Script, tmp_path: Path) -> None:
    """As Minari and LeRobot, with the environment's rewards; the reading is tested with the formats."""
    options = (*DAGGER, "--trainer.beta", 0, "--reward-scale", 0.5)
    options = (*options, "--save-dataset", tmp_path / "saved", "--save-what", "collected")
    with pytest.MonkeyPatch.context() as patch:
        kept: list[Any] = []
        patch.setattr(recording, "write", lambda episodes, *rest: kept.append(episodes) or "")
        online(*options)
    columns = kept[0].columns
    assert columns[INTERVENTION].dtype == torch.bool and 0 < int(columns[INTERVENTION].sum()) <= 20
    acted = columns[INTERVENTION]
    state, action = kept[0].observations["observation.state"], columns["action"]
    assert torch.allclose(action[acted], expert_of(state[kept[0].at])[acted], atol=1e-6)
    error = (action - state[kept[0].at] @ toy.EXPERT).abs().amax(1)
    assert torch.allclose(columns["reward"], -error, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*DAGGER, "--env", "gymnasium"), "--trainer.expert scripted: the environment 'gymnasium' has none; name the"),
        ((*DAGGER, "--trainer.expert", "nowhere"), "nowhere: no policy here"),
        ((*DAGGER, "--trainer.labels", 10), "--learning-starts 20: the expert acts until then, and gives --trainer.la"),
        ((*DAGGER, "--trainer.labels", 0), "--trainer.labels 0 must be 1 to 1e"),
        ((*DAGGER, "--trainer.beta", 1.5), "--trainer.beta 1.5 must be 0 to 1"),
        ((*HG, "--trainer.share", 0.5), "--trainer.share has no effect with --trainer.method hg_dagger and"),
        ((*DAGGER, "--trainer.takes-over", 0.9), "--trainer.takes-over has no effect with --trainer.method dagger and"),
        ((*DAGGER, "--trainer.mix", "share"), "--trainer.mix says how demonstrations join the labels; choose them wi"),
        ((*HG, "--trainer.gives-back", 0.7), "--trainer.gives-back 0.7 must be 0 to 0.5"),
        ((*DAGGER, "--dataset", "toy", "--dataset.ratio", 0.5), "--dataset.ratio: demonstrations and labels are drawn"),
        (
            (*DAGGER, "--dataset", "toy", "--dataset.action-steps", 4),
            "dagger learns the action of each step; leave out",
        ),
        ((*DAGGER, "--buffer-size", 50), "--buffer-size 50 would forget labels of the expert, with the oldest of --"),
        ((*DAGGER, "--no-save-buffer"), "--no-save-buffer: the expert's labels are in the replay buffer"),
        ((*DAGGER, "--trainer.expert", "keyboard"), "keyboard: a person takes over, so use --trainer.method hg_dagger"),
        ((*HG, "--trainer.expert", "keyboard"), "keyboard: a person steers --num-envs 1, found 2"),
        (
            (*HG, "--trainer.expert", "keyboard", "--num-envs", 1),
            "keyboard needs a terminal, and standard input is none",
        ),
        (("--trainer", "dagger", "--env.id", "CartPole-v1", "--env", "gymnasium"), "actions are discrete"),
        (("--trainer", "dagger", "--env", "savable", "--model", "unet1d"), "choose --model mlp, resmlp, gru or tra"),
    ],
)
def test_bad_input_gets_one_line_before_step_1(online: Script, tmp_path: Path, options: Any, message: str) -> None:
    with pytest.raises((UserError, SystemExit), match=message):
        online(*options)
    assert not (tmp_path / "run").exists()


def test_offline_it_is_refused_in_one_line(script: Script) -> None:
    with pytest.raises(UserError, match="dagger learns from an expert while its policy acts; run it by online_trainer"):
        script("--trainer", "dagger")


# ---- experts -------------------------------------------------------------------------------------------------------


def test_the_policy_of_a_run_plans_anew_at_every_step(script: Script) -> None:
    """Whatever moved the robot since its last plan; one that does not fit is refused."""
    chunks = ("--trainer", "bc", "--dataset.action-steps", 4, "--policy.ensemble", 0.01)
    run = script(*chunks, "--steps", 30, folder="expert")
    environments = toys(3)
    expert = OfRun(run, environments, "--trainer.expert x", torch.device("cpu"))
    again = OfRun(run, environments, "--trainer.expert x", torch.device("cpu"))
    one, two = ({"observation.state": np.random.default_rng(i).normal(size=(3, 5)).astype("f")} for i in range(2))
    expert.act(one)
    assert np.allclose(expert.act(two), again.act(two))
    with pytest.raises(
        UserError, match="--trainer.expert x: the environment does not fit that policy: it has the action"
    ):
        OfRun(run, Environments(toy.Savable(discrete=True).build, 1, 0, 0.0), "--trainer.expert x", torch.device("cpu"))


def test_a_person_takes_over_and_gives_back_by_a_key() -> None:
    """In a real terminal: keys are not shown, several of a step count together, and the terminal is given back."""
    ours, theirs = pty.openpty()
    try:
        environments = toys(1)
        person = Keyboard(environments, rate=200.0, speed=0.5, fd=theirs)
        before = person.termios.tcgetattr(theirs)
        assert any("a/d number 1, s/w number 2" in line for line in person.open(False))
        assert person.termios.tcgetattr(theirs)[3] & person.termios.ECHO == 0
        guide = Guide(asked(method="hg_dagger", expert="keyboard", labels=3), person, a_run(), environments, 1, 0)
        collector = Collector(environments, 0, 0, 0, print, guide=guide)
        collector.start(0)
        acted = []
        for keys in (b"", b"d", b" dw", b"a", b"\x1b[D\x1bOA", b" ", b" s", b"d"):
            os.write(ours, keys)
            transitions, _ = collector.step(np.full((1, 2), 0.125, np.float32))
            assert transitions is not None
            acted.append((bool(transitions[INTERVENTION][0]), transitions["action"][0].tolist()))
        own = (False, [0.125, 0.125])
        assert acted == [own, own, (True, [2.5, 2.5]), (True, [-2.5, 0.0]), (True, [0.0, 0.0]), own, own, own]
        assert guide.used == 3 and person.termios.tcgetattr(theirs) == before  # all labels are given
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_gripper_stays_as_it_was_while_a_person_steers() -> None:
    """By the environment's `hold`, of the last action that was executed, also the policy's."""
    ours, theirs = pty.openpty()
    try:
        environments: Any = SimpleNamespace(single_action_space=toy.ToyEnv.action_space)
        environments.envs = SimpleNamespace(hold=lambda seen, last: np.where([False, True], np.nan_to_num(last), 0))
        person = Keyboard(environments, rate=1000.0, speed=1.0, fd=theirs)
        assert person.act({}).tolist() == [[0, 0]]
        person.follow({"begins": torch.tensor([False]), "action": torch.tensor([[3.0, 4.0]])})
        assert person.act({}).tolist() == [[0, 4]]
        person.follow({"begins": torch.tensor([True]), "action": torch.tensor([[3.0, 4.0]])})
        assert person.act({}).tolist() == [[0, 0]]
    finally:
        os.close(ours)
        os.close(theirs)
