"""A plugin for the tests: a linear expert, its environment, and trainers as users write them."""

import copy
import inspect
import os
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from components import (
    DATASET_BUILDER_REGISTRY,
    ENV_BUILDER_REGISTRY,
    LOSS_BUILDER_REGISTRY,
    MODEL_BUILDER_REGISTRY,
    TRAINER_REGISTRY,
)
from components.datasets.episodes import Episodes, Scales, build, from_columns
from components.envs.workers import spread

# tyro reads the options' docstrings from their source for each command line: a fifth of the time of a small training.
# The classes are made anew for each, under the same names.
read_source, sources = inspect.getsource, dict[Any, Any]()


def source_of(found: Any) -> str:
    """What `inspect.getsource` finds, or that it finds nothing, once for a class's name and options."""
    if not isinstance(found, type):
        return read_source(found)
    name = (found.__module__, found.__qualname__, *getattr(found, "__annotations__", ()))
    if name not in sources:
        try:
            sources[name] = read_source(found)
        except (OSError, TypeError) as error:
            sources[name] = error
    if isinstance(sources[name], Exception):
        raise sources[name]
    return sources[name]


inspect.getsource = source_of
STATE, ACTION, LENGTH = 5, 2, 10
UNIT = ("--dataset.action-scale", 4)  # brings the expert's actions into [-1, 1]
SMALL = ("--model.hidden-dims", 16, "--model.critic.hidden-dims", 16, *UNIT)
SMALL_VALUE = ("--model.value.hidden-dims", 16)
GOALS = ("--env", "gymnasium", "--env.id", "TendonGoal-v0")
PLAIN = ("action=scale", "observation=none")
# What a job of two processes and one of one both do.
SGD = ("--optimizer", "sgd", "--optimizer.lr", 0.1, "--steps", 30)
SAC = ("--trainer", "sac", "--model.hidden-dims", 16, "--model.critic.hidden-dims", 16)
PUSH = Path(__file__).parent / "fixtures" / "lerobot_v30_image"
PICTURES = ("--trainer", "bc", "--model", "cnn", "--dataset", "lerobot", "--dataset.path", PUSH, "--workers", 1)
PICTURES += ("--dataset.cameras", "corner2", "--augment.crop", 56, 60, "--augment.shift", 2, "--augment.hue", 0.1)
# A small run of every trainer of the registry; what draws noise may say so.
TRAINERS: dict[str, tuple[object, ...]] = {
    "bc": ("--trainer", "bc", "--dataset.action-steps", 4, "--model.head", "codebook", "--model.codes", 4),
    "act": ("--trainer", "act", "--model.width", 16, "--model.layers", 1, "--model.dropout", 0)
    + ("--dataset.action-steps", 4, "--trainer.kl-weight", 0.1),
    "diffusion": ("--trainer", "diffusion", "--model.channels", 16, "--dataset.action-steps", 8),
    "flow": ("--trainer", "flow", "--model.channels", 16, "--dataset.action-steps", 8),
    "td3_bc": ("--trainer", "td3_bc", *SMALL, "--normalise", *PLAIN),
    "iql": ("--trainer", "iql", *SMALL, *SMALL_VALUE),
    "awac": ("--trainer", "awac", *SMALL),
    "cql": ("--trainer", "cql", *SMALL, "--trainer.calibrated"),
    "rebrac": ("--trainer", "rebrac", *SMALL),
    "fql": ("--trainer", "fql", *SMALL, "--model.flow.hidden-dims", 16),
    "ifql": ("--trainer", "ifql", *SMALL, *SMALL_VALUE),
    "qc": ("--trainer", "qc", *SMALL, "--model.flow.hidden-dims", 16),
    "recap": ("--trainer", "recap", "--trainer.chunk", 3, "--model.hidden-dims", 16, *SMALL_VALUE, *UNIT),
    "gcbc": ("--trainer", "gcbc", "--model.hidden-dims", 16, *GOALS),
    "gciql": ("--trainer", "gciql", *SMALL, *SMALL_VALUE, *GOALS),
    "hiql": ("--trainer", "hiql", "--model.hidden-dims", 16, *SMALL_VALUE, *GOALS, "--trainer.subgoal-steps", 3)
    + ("--model.high.hidden-dims", 16, "--model.representation.hidden-dims", 16),
    "sac": (*SAC, *UNIT),
    "td3": ("--trainer", "td3", *SMALL),
}
# And of those that learn in an environment alone.
ONLINE_ALONE: dict[str, tuple[object, ...]] = {
    "ppo": ("--trainer", "ppo", "--model.hidden-dims", 16, "--model.value.hidden-dims", 16, "--trainer.rollout", 10)
    + ("--trainer.epochs", 2),
    "dqn": ("--trainer", "dqn", "--model.hidden-dims", 16, "--env", "savable", "--env.discrete")
    + ("--updates-per-step", 1),
}
ONLINE_ALONE["residual"] = ("--trainer", "residual")  # it needs a run to begin from
ONLINE_ALONE["rlpd"] = ("--trainer", "rlpd", *SMALL, "--dataset", "toy", "--model.critic.members", 3)
ONLINE_ALONE["rlpd"] += ("--updates-per-step", 2, "--trainer.policy-every", 2)
ONLINE_ALONE["dagger"] = ("--trainer", "dagger", "--model.hidden-dims", 16, "--env", "savable", "--trainer.labels", 45)
DSRL = ("--trainer", "dsrl", "--model.hidden-dims", 16, "--model.critic.hidden-dims", 16, "--env", "savable")
DSRL += ("--model.noise-critic.hidden-dims", 16, "--trainer.policy-starts", 10)
ONLINE_ALONE["dsrl"] = DSRL  # and so does this one
FLOW_OF_AN_MLP = ("--trainer", "flow", "--model", "vector_field", "--model.hidden-dims", 16, "--dataset.obs-steps", 1)
FLOW_OF_AN_MLP += ("--dataset.action-steps", 6, "--trainer.objective", "shortcut")
# A network with losses of its own that are no means over samples.
EXPERTS = ("--trainer", "bc", "--model.experts", 3, "--model.hidden-dims", 16)
DRAWS_NOISE = ("act", "diffusion", "flow", "sac", "td3", "td3_bc", "awac", "cql", "rebrac", "fql", "ifql", "qc")
DRAWS_NOISE += ("recap",)
EXPERT = torch.randn(STATE, ACTION, generator=torch.Generator().manual_seed(7)) / 3


@dataclass(frozen=True)
class PicturesAlone(DATASET_BUILDER_REGISTRY["lerobot"]):  # type: ignore[misc]
    """A recording whose state is left out."""

    def finish(self, episodes: Episodes, held_out: Any = None) -> dict[str, Any]:
        episodes.observations = dict(episodes.cameras)
        return super().finish(episodes, held_out)


DATASET_BUILDER_REGISTRY["pictures-alone"] = PicturesAlone


class ToyEnv(gym.Env):
    """The state drifts at random; success when every action was within 0.5 of the expert's."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (STATE,), np.float32)
    action_space = gym.spaces.Box(-5, 5, (ACTION,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.good, self.count = True, 0
        self.state = self.np_random.normal(size=STATE).astype(np.float32)
        return self.state, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        error = float(np.abs(action - self.state @ EXPERT.numpy()).max())
        self.good &= error < 0.5
        self.count += 1
        self.state = (0.5 * self.state + self.np_random.normal(size=STATE)).astype(np.float32)
        return self.state, -error, False, self.count == LENGTH, {"success": self.good}


class ChoiceEnv(ToyEnv):
    """The right one of three actions is the number of the largest of the first three entries of the state."""

    action_space = gym.spaces.Discrete(3)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        right = int(action) == int(self.state[:3].argmax())
        state, _, terminated, truncated, _ = super().step(np.zeros(ACTION, np.float32))
        return state, float(right), terminated, truncated, {"success": right}


class PairEnv(ToyEnv):
    """Its observation is a tuple, which no policy here takes."""

    observation_space = gym.spaces.Tuple((ToyEnv.observation_space, gym.spaces.Discrete(3)))

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        state, info = super().reset(seed=seed)
        return (state, 0), info


class GoalEnv(ToyEnv):
    """Observes a goal, too."""

    observation_space = gym.spaces.Dict({"observation": ToyEnv.observation_space, "goal": ToyEnv.observation_space})

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        state, info = super().reset(seed=seed)
        self.goal = self.np_random.normal(size=STATE).astype(np.float32)
        return {"observation": state.copy(), "goal": self.goal.copy()}, info

    def step(self, action: np.ndarray) -> Any:
        state, *rest = super().step(action)
        return {"observation": state.copy(), "goal": self.goal.copy()}, *rest


gym.register("TendonToy-v0", entry_point=ToyEnv)
gym.register("TendonGoal-v0", entry_point=GoalEnv)
gym.register("TendonPair-v0", entry_point=PairEnv)


class SavableEnvs(gym.vector.SyncVectorEnv):
    """Toys that save everything: their states, their generators, and what their vector keeps. They know an expert."""

    def expert(self) -> np.ndarray:
        return np.stack([env.unwrapped.state @ EXPERT.numpy() for env in self.envs])

    def state_dict(self) -> dict[str, Any]:
        toys = [env.unwrapped for env in self.envs]
        own = [
            {"state": torch.tensor(e.state), "good": e.good, "count": e.count, "rng": e.np_random.bit_generator.state}
            for e in toys
        ]
        return {"toys": own, "autoreset": torch.tensor(self._autoreset_envs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for env, own in zip(self.envs, state["toys"], strict=True):
            toy = env.unwrapped
            toy.state, toy.good, toy.count = own["state"].numpy(), own["good"], own["count"]
            toy.np_random.bit_generator.state = own["rng"]
        self._autoreset_envs = state["autoreset"].numpy()


@dataclass(frozen=True)
class Savable:
    """Toys whose state a checkpoint can hold."""

    mode: str = "NextStep"
    """Autoreset mode."""
    discrete: bool = False
    """Actions are chosen among three."""

    def build(self, num_envs: int, seed: int) -> Any:
        return SavableEnvs([ChoiceEnv if self.discrete else ToyEnv] * num_envs, autoreset_mode=self.mode)


ENV_BUILDER_REGISTRY["savable"] = Savable


class FaultyEnv(ToyEnv):
    """Misbehaves at one of its steps, if it is the one that should."""

    built = 0  # vectors of them
    faults = 0

    def __init__(self, index: int, options: "Faulty") -> None:
        self.index, self.options, self.own = index, options, 0

    def reset(self, **keywords: Any) -> Any:
        if self.index == self.options.index and self.options.kind == "reset":
            raise OSError("cannot reset")
        return super().reset(**keywords)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.own += 1
        observation, reward, terminated, truncated, info = super().step(action)
        faulty = self.index == self.options.index and self.own == self.options.at
        faulty = faulty and self.options.rank in (-1, int(os.environ.get("RANK", "0")))
        if faulty and not (self.options.once and FaultyEnv.faults):
            FaultyEnv.faults += 1
            match self.options.kind:
                case "raise" | "gone":
                    raise ArithmeticError("simulator exploded")
                case "hang":
                    time.sleep(1000)
                case "die":
                    os._exit(3)
                case "nan":
                    observation = observation * float("nan")
                case "inf reward":
                    reward = float("inf")
                case "end nan":
                    observation, truncated = observation * float("nan"), True
        return observation, reward, terminated, truncated, info


@dataclass(frozen=True)
class Faulty:
    """Toys of which one misbehaves, again and again: its replacement does, too."""

    kind: str = "raise"
    """What it does."""
    at: int = 7
    """At which of its steps."""
    index: int = 1
    """Which one."""
    workers: bool = False
    """In processes of their own."""
    once: bool = False
    """Misbehave no second time."""
    missing: int = 0
    """How many fewer than asked for."""
    rank: int = -1
    """On which process alone."""

    def build(self, num_envs: int, seed: int) -> Any:
        """Two of the kinds are faults of this method: on the second process, and from the third call on."""
        FaultyEnv.built += 1
        if self.kind == "rank 1" and os.environ.get("RANK") == "1" or self.kind == "gone" and FaultyEnv.built > 2:
            raise OSError("no licence on this machine")
        vector = gym.vector.AsyncVectorEnv if self.workers else gym.vector.SyncVectorEnv
        makes = [lambda i=i: FaultyEnv(i, self) for i in range(num_envs - self.missing)]
        return vector(makes, autoreset_mode="SameStep")


ENV_BUILDER_REGISTRY["faulty"] = Faulty


@dataclass(frozen=True)
class SpreadFaulty:
    """The same toys in two processes."""

    kind: str = "raise"
    """What the faulty one does."""
    at: int = 7
    """At which of its steps."""
    index: int = 1
    """Which one."""

    def build(self, num_envs: int, seed: int) -> Any:
        def part(count: int, own_seed: int) -> Any:
            one = Faulty(self.kind, self.at, self.index - (own_seed - seed))  # their seeds tell how many come before
            return one.build(count, own_seed)

        return spread(part, num_envs, seed, 2)


ENV_BUILDER_REGISTRY["spread_faulty"] = SpreadFaulty


class PictureEnv(gym.Env):
    """A picture of one brightness; the right action is the darker or the lighter one."""

    observation_space = gym.spaces.Box(0, 255, (12, 12, 3), np.uint8)

    def __init__(self, discrete: bool) -> None:
        self.action_space: Any = gym.spaces.Discrete(2) if discrete else ToyEnv.action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._draw(), {}

    def _draw(self) -> np.ndarray:
        self.light = float(self.np_random.integers(2))
        return np.full((12, 12, 3), 255 * self.light, np.uint8)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.count += 1
        reward = -abs(float(np.ravel(action)[0]) - self.light)
        return self._draw(), reward, False, self.count == LENGTH, {}


@dataclass(frozen=True)
class Pictures:
    """Environments that are seen."""

    discrete: bool = False
    """Actions are chosen among two."""

    def build(self, num_envs: int, seed: int) -> Any:
        return gym.vector.SyncVectorEnv([lambda: PictureEnv(self.discrete)] * num_envs, autoreset_mode="SameStep")


ENV_BUILDER_REGISTRY["pictures"] = Pictures


@dataclass(frozen=True, kw_only=True)
class ToyData(Scales):
    """Episodes of the linear expert."""

    episodes: int = 20
    """Number of episodes."""
    obs_steps: int = 1
    """Observation steps."""
    action_steps: int = 1
    """Action steps."""
    action_dim: int = ACTION
    """Width of the action."""
    nan: bool = False
    """Put a NaN into the fourth episode's third step."""
    validation: float = 0.1
    """Fraction of the episodes to hold out."""
    terminates: bool = True
    """Whether episodes end by themselves."""

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Resident episodes with rewards and successors."""
        generator = torch.Generator().manual_seed(0)
        state = torch.randn(self.episodes * LENGTH, STATE, generator=generator)
        action = (state @ EXPERT)[:, :1].repeat(1, self.action_dim) if self.action_dim != ACTION else state @ EXPERT
        if self.nan:
            state[3 * LENGTH + 2, 1] = float("nan")
        columns = {
            "observation.state": state,
            "action": action,
            "reward": -state[:, 0].abs(),
            "terminated": (torch.arange(len(state)) % LENGTH == LENGTH - 1) & self.terminates,
            "next.observation.state": torch.randn(len(state), STATE, generator=generator),
        }
        ends = torch.arange(1, self.episodes + 1) * LENGTH
        episodes = self.scaled(from_columns(columns, ends, "toy"))
        built = self.with_scale(build(episodes, self.obs_steps, self.action_steps, self.validation))
        return built | {"env": {"name": "gymnasium", "id": "TendonToy-v0"}}


DATASET_BUILDER_REGISTRY["toy"] = ToyData


class MinimalData:
    """As small as a user's dataset gets: statistics for the action only."""

    def build(self, **kwargs: Any) -> dict[str, Any]:
        states = torch.randn(64, STATE, generator=torch.Generator().manual_seed(0))
        items = [{"observation.state": state, "action": state @ EXPERT} for state in states]
        return {"dataset": items, "norm_stats": {"action": {"mean": [0.0] * ACTION, "std": np.ones(ACTION)}}}


DATASET_BUILDER_REGISTRY["minimal_data"] = MinimalData


class Minimal:
    """As small as a user's trainer gets; generic over `models`."""

    def __init__(self, models: Any, optimizers: Any, loss: Any, device: Any) -> None:
        self.models, self.optimizers, self.loss, self.device = models, optimizers, loss, device

    def train_step(self, data: dict[str, Any]) -> dict[str, Any]:
        metrics = {}
        for name, model in self.models.items():
            loss = self.loss(model(data["observation.state"]), data["action"])
            self.optimizers[name].zero_grad()
            loss.backward()
            self.optimizers[name].step()
            metrics[f"loss_{name}"] = loss
        return metrics


TRAINER_REGISTRY["minimal"] = Minimal


class WithKeywords(Minimal):
    """Takes whatever the loop passes; writes down what it got."""

    def train_step(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return super().train_step(data) | kwargs


TRAINER_REGISTRY["with_keywords"] = WithKeywords


@dataclass(frozen=True)
class Critic:
    """Q(s, a) as a plain network."""

    width: int = 16
    """Hidden units."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        inputs = spec["observation.state"]["shape"][-1] + spec["action"]["shape"][-1]
        return nn.Sequential(nn.Linear(inputs, self.width), nn.Tanh(), nn.Linear(self.width, 1))


MODEL_BUILDER_REGISTRY["toy_critic"] = Critic


@dataclass(frozen=True)
class Plain:
    """A policy that is a plain torch module, called with the state alone."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        return nn.Linear(spec["observation.state"]["shape"][-1], spec["action"]["shape"][-1])


MODEL_BUILDER_REGISTRY["plain"] = Plain


class ActorCritic:
    """Two optimizers, a target network, a critic that is called but not trained in the actor's loss."""

    needs = {"policy": "mlp", "critic": "toy_critic"}
    defaults = {"optimizer": "sgd", "optimizer.lr": 0.02, "batch-size": 16, "steps": 50, "model": "mlp"}

    @dataclass(frozen=True)
    class Config:
        """Actor and critic."""

        discount: float = 0.9
        """Discount factor."""
        skip_on_rank: int = -1
        """Process that leaves out one actor step, to be found out."""

    def __init__(self, models: Any, optimizers: Any, loss: Any, config: Any) -> None:
        self.models, self.optimizers, self.config, self.calls = models, optimizers, config, 0
        models["target_critic"] = copy.deepcopy(models["critic"]).requires_grad_(False)

    def train_step(self, data: dict[str, Any]) -> dict[str, Any]:
        m, state, following = self.models, data["observation.state"], data["next.observation.state"]
        with torch.no_grad():
            q = m["target_critic"](torch.cat([following, m["policy"](following)], 1)).squeeze(1)
            target = data["reward"] + self.config.discount * (~data["terminated"]).float() * q
        critic_loss = (m["critic"](torch.cat([state, data["action"]], 1)).squeeze(1) - target).square().mean()
        self.optimizers["critic"].zero_grad()
        critic_loss.backward()
        self.optimizers["critic"].step()
        actor_loss = -m["critic"](torch.cat([state, m["policy"](state)], 1)).mean()
        self.optimizers["policy"].zero_grad()
        actor_loss.backward()
        self.calls += 1
        if not (self.calls == 3 and self.config.skip_on_rank == int(os.environ.get("RANK", "0"))):
            self.optimizers["policy"].step()
        with torch.no_grad():
            torch._foreach_lerp_(list(m["target_critic"].parameters()), list(m["critic"].parameters()), 0.05)
        return {"critic_loss": critic_loss, "actor_loss": actor_loss, "q": q.mean()}


TRAINER_REGISTRY["actor_critic"] = ActorCritic


@dataclass(frozen=True)
class BadLoss:
    """Not finite from one step on, with a gradient that is."""

    kind: str = "inf"
    """What is added to the loss."""
    at: int = 20
    """Calls before."""
    rank: int = 0
    """Process on which it happens."""

    def build(self) -> nn.Module:
        options = self

        class Loss(nn.Module):
            calls = 0

            def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
                self.calls += torch.is_grad_enabled()
                loss = (prediction - target).square().mean()
                here = int(os.environ.get("RANK", "0")) == options.rank
                return loss + float(options.kind) if here and self.calls == options.at + 1 else loss

        return Loss()


LOSS_BUILDER_REGISTRY["bad"] = BadLoss


class Trouble(Minimal):
    """Takes its time, and on one process does what must not keep the others waiting."""

    @dataclass(frozen=True)
    class Config:
        """What happens, where and when."""

        seconds: float = 0.02
        """Seconds a call."""
        kind: str = "none"
        """raise, hang, die, stop, or none."""
        rank: int = 1
        """On which process."""
        at: int = 40
        """At which call."""

    def __init__(self, models: Any, optimizers: Any, loss: Any, device: Any, config: Any) -> None:
        super().__init__(models, optimizers, loss, device)
        self.config = config

    def train_step(self, data: dict[str, Any], iterations: int) -> dict[str, Any]:  # type: ignore[override]
        time.sleep(self.config.seconds)
        if iterations == self.config.at and int(os.environ.get("RANK", "0")) == self.config.rank:
            match self.config.kind:
                case "raise":
                    raise ArithmeticError("trouble")
                case "hang":
                    time.sleep(1000)
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
        return super().train_step(data)


TRAINER_REGISTRY["trouble"] = Trouble


def sliced_noise(rank: int, world: int) -> dict[str, Any]:
    """Stand in for `torch.randn_like` and `rand_like`: noise of the global batch, of which a process takes its part."""
    calls = iter(range(10**9))

    def drawn(draw: Any, x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(next(calls))
        return draw(len(x) * world, *x.shape[1:], generator=generator)[rank * len(x) : (rank + 1) * len(x)]

    return {"randn_like": partial(drawn, torch.randn), "rand_like": partial(drawn, torch.rand)}


def sliced_randn(rank: int, world: int) -> Any:
    """Stand in for `torch.randn` where no generator is named: as above."""
    calls, draw = iter(range(10**9)), torch.randn

    def randn(*shape: int, generator: Any = None) -> torch.Tensor:
        if generator is not None:
            return draw(*shape, generator=generator)
        generator = torch.Generator().manual_seed(next(calls))
        return draw(shape[0] * world, *shape[1:], generator=generator)[rank * shape[0] : (rank + 1) * shape[0]]

    return randn


# Rollouts in one minibatch, so that the shuffling within each process does not matter.
WHOLE_ROLLOUTS = (*ONLINE_ALONE["ppo"], "--env", "savable", "--env.mode", "SameStep", "--num-envs", 4)
WHOLE_ROLLOUTS += ("--batch-size", 40, "--steps", 160)
WHOLE_ROLLOUTS += ("--optimizer", "sgd", "--optimizer.lr", 0.05, "--log-every", 40)


class ManyUpdates(Minimal):
    """Twenty updates in one call; autocast must not serve weights from before a step."""

    def train_step(self, data: dict[str, Any]) -> dict[str, Any]:
        for _ in range(20):
            metrics = super().train_step(data)
        return metrics


TRAINER_REGISTRY["many_updates"] = ManyUpdates
