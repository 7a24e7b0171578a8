"""An expert beside the policy that collects: who acts, which steps it labels, and how many labels are left."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import parallel
from ..acting.evaluation import check_env
from ..acting.policy_folder import load_folder
from ..contracts import Corrections
from ..data.features import INTERVENTION
from ..envs.observations import task_of
from ..envs.vector import FaultyEnvError, action_bounds, executed
from ..errors import UserError
from ..run.policies import copy_chosen
from .keyboard import Keyboard
from .labelled import LABEL, LABELLED
from .plan import starts_learning

Told = dict[str, Tensor]


def guide_of(request: Any, args: Any, run: Any, environments: Any, world: int, device: torch.device) -> "Guide | None":
    """The expert that a trainer asks for by `Corrections`, and what it labels; None for any other request.

    The policy of a run is copied into the run folder, so that a resumed run needs nothing else.

    Args:
        environments: Of this process.
        world: Number of processes.

    Raises:
        UserError: no such policy, one that does not fit the environment, an environment without an expert, no terminal.
    """
    if not isinstance(request, Corrections):
        return None
    option = f"--trainer.expert {request.expert}"
    if request.expert == "scripted":
        if not callable(getattr(environments.envs, "expert", None)):
            raise UserError(
                f"{option}: the environment {args.env!r} has none; name the run folder of a policy, or keyboard"
            )
        expert: Any = Scripted(environments)
    elif request.expert == "keyboard":
        if world > 1:
            raise UserError(f"{option}: a person steers one process, found {world}")
        expert = run.closing(Keyboard(environments, request.rate, request.speed))
    else:
        copy = partial(copy_chosen, request.expert)
        expert = parallel.in_turns(
            run.first, lambda: OfRun(run.inherited.copied("expert", copy), environments, option, device)
        )
    starts = 0 if args.init_from else starts_learning(args)[0]
    return Guide(request, expert, run, environments, args.num_envs, starts)


# ---- experts -------------------------------------------------------------------------------------------------------
# An expert has `act(observation) -> actions [N, ...]`, `follow(transitions)` as a policy has, and for a resumed run
# `rank_state()` and `load_rank_state(state)`. A person also decides when to act, `steers`, and has keys to be told of.


class Scripted:
    """The expert of the environments, which lives where they do."""

    def __init__(self, environments: Any) -> None:
        self.environments = environments

    def act(self, observation: dict[str, np.ndarray]) -> Any:
        """The expert's actions `[N, ...]` in the environments' current states. Raises FaultyEnvError."""
        return self.environments.expert()

    def follow(self, transitions: dict[str, Tensor] | None) -> None:
        """Nothing is remembered."""

    def rank_state(self) -> dict[str, Any]:
        """None."""
        return {}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""


class OfRun:
    """The policy of a run, which plans anew at every step: another one moves the robot, so that plans get old.

    Raises:
        UserError: no policy there, or one that does not fit the environments.
    """

    def __init__(self, folder: Path, environments: Any, option: str, device: torch.device) -> None:
        self.policy = load_folder(folder, delay=0, action_steps=1, ensemble=None, real_time=False, blocking=False)
        self.policy.to(device)
        try:
            check_env(environments, self.policy.spec)
        except UserError as error:
            raise UserError(f"{option}: the environment does not fit that policy: {error}") from error
        self.policy.tell(task_of(environments))

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """The policy's actions `[N, ...]`."""
        return self.policy.act(observation)

    def follow(self, transitions: dict[str, Tensor] | None) -> None:
        """As `Policy.follow`."""
        if transitions is None:
            self.policy.reset()
        else:
            self.policy.restart(transitions["begins"].nonzero().flatten())

    def rank_state(self) -> dict[str, Any]:
        """As of `Policy`."""
        return self.policy.rank_state()

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
        self.policy.load_rank_state(state)


# ---- who acts, and what is labelled --------------------------------------------------------------------------------


class Guide:
    """Lets the expert act and label, as `Corrections` says, until its labels are used up; then the policy acts alone.

    A label is an action of the expert that is stored. An action that it executes is one, too.

    Args:
        request: What the trainer asks for.
        expert: As above.
        run: Has the step, and prints lines; every line of its logs has the number of labels.
        environments: Of this process.
        num_envs: Environments over all processes.
        starts: Environment steps at the beginning in which the expert acts.
    """

    def __init__(
        self, request: Corrections, expert: Any, run: Any, environments: Any, num_envs: int, starts: int
    ) -> None:
        self.request, self.expert, self.run, self.num_envs, self.starts = request, expert, run, num_envs, starts
        self.space, self.steers = environments.single_action_space, np.zeros(environments.num_envs, dtype=bool)
        low, high = action_bounds(self.space)
        self.half = np.where(high > low, (high - low) / 2, 1)
        self.used = 0  # labels so far, over all processes
        run.counts["expert_labels"] = 0

    def begin(self) -> None:
        """Say who will act; a person gets the terminal."""
        first = f"acts until step {self.starts}, and " if self.run.step < self.starts else ""
        how = "takes over where it has to" if self.request.gated else "labels what the policy visits"
        left = f"{self.left} labels are left" if self.left else "no labels are left: the policy acts alone"
        self.run.say(f"the expert ({self.request.expert}) {first}{how}; {left}")
        if self.left and isinstance(self.expert, Keyboard):
            self.run.say(*self.expert.open(self.run.step < self.starts))

    @property
    def left(self) -> int:
        """Labels that the expert may still give, over all processes."""
        return max(self.request.labels - self.used, 0)

    def advise(
        self, action: np.ndarray, observation: dict[str, np.ndarray], idle: np.ndarray
    ) -> tuple[np.ndarray, Told, FaultyEnvError | None]:
        """What is done at a step, in all environments; called by every process.

        Args:
            action: `[N, ...]`, which the policy would do.
            observation: On which both decide.
            idle: `[N]`, where the step only resets.

        Returns:
            (actions `[N, ...]`; columns of the step: whether the expert acts, whether its action is a label, and that
            action `[N, Da]`; a fault of the environment that the expert is part of, or None).
        """
        if not self.left:
            return action, self.nothing(len(action)), None
        fault, advice = None, np.zeros_like(executed(action, self.space))
        acts, labels = np.zeros((2, len(action)), dtype=bool)
        try:
            advice = self._asked(observation, idle)
            acts, labels = self._wishes(executed(action, self.space), advice)
        except FaultyEnvError as error:
            fault = error
        labels = self._granted(labels & ~idle)
        acts &= labels
        self.steers &= acts
        done = np.where(_rows(acts, advice), advice, np.asarray(action).reshape(advice.shape)).reshape(action.shape)
        label = np.where(_rows(labels, advice), advice, 0).reshape(len(action), -1).astype(np.float32)
        told = {INTERVENTION: torch.from_numpy(acts), LABELLED: torch.from_numpy(labels)}
        return done, told | {LABEL: torch.from_numpy(label)}, fault

    def nothing(self, n: int) -> Told:
        """The columns of a step without the expert."""
        flags = {name: torch.zeros(n, dtype=torch.bool) for name in (INTERVENTION, LABELLED)}
        return flags | {LABEL: torch.zeros(n, len(self.half))}

    def _asked(self, observation: dict[str, np.ndarray], idle: np.ndarray) -> np.ndarray:
        """The expert's actions as they would be executed. Raises UserError: another shape; FaultyEnvError: a NaN."""
        found, n = np.asarray(self.expert.act(observation)), len(idle)
        if found.shape not in {(n, *self.space.shape), (n, len(self.half))}:
            raise UserError(f"expert() returned actions of shape {found.shape}, expected {(n, *self.space.shape)}")
        bad = ~np.isfinite(found.reshape(n, -1)).all(1) & ~idle
        if bad.any():
            raise FaultyEnvError(int(np.flatnonzero(bad)[0]), "has an expert that returned a NaN or Inf")
        return executed(np.where(_rows(idle, found), 0, found), self.space)

    def _wishes(self, action: np.ndarray, advice: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the expert wants to act, and which steps to label, `[N]` bool each."""
        n, request = len(action), self.request
        if self.run.step < self.starts:
            acts = np.ones(n, dtype=bool)
        elif isinstance(self.expert, Keyboard):
            acts = np.full(n, self.expert.steers)
            if self.expert.toggled:
                self.run.say(f"step {self.run.step}: {'you steer' if self.expert.steers else 'the policy acts'}")
        elif request.gated:
            apart = ((action.astype(np.float64) - advice).reshape(n, -1) / self.half) ** 2
            distance = np.sqrt(apart.mean(1))
            acts = np.where(self.steers, distance >= request.gives_back, distance > request.takes_over)
        else:
            iteration = 1 + (self.run.step - self.starts) // request.iteration
            acts = _coin(request.beta**iteration, n)
        self.steers = acts.copy()
        return acts, acts if request.gated else acts | _coin(request.share, n)

    def _granted(self, wanted: np.ndarray) -> np.ndarray:
        """Those of the wished labels `[N]` that are left for this process: the first, in the order of processes."""
        if self.left >= self.num_envs:
            return wanted
        before = sum(parallel.gather(int(wanted.sum()))[: self.run.rank])
        return wanted & (before + wanted.cumsum() <= self.left)

    def follow(self, transitions: dict[str, Tensor] | None) -> None:
        """Count the labels of a step, and begin new episodes; called by every process. None after a fault."""
        if transitions is None:
            self.steers[:] = False
        else:
            self.steers &= ~transitions["begins"].numpy()
        self.expert.follow(transitions)
        if not self.left:
            return
        given = 0 if transitions is None else int((transitions[LABELLED] & transitions["valid"]).sum())
        self.used += sum(parallel.gather(given))
        self.run.counts["expert_labels"] = self.used
        if not self.left:
            self.run.say(
                f"step {self.run.step + self.num_envs}: all {self.used} labels of the expert are given; from here on"
                " the policy acts alone, and goes on learning"
            )
            getattr(self.expert, "close", lambda: None)()

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """The labels so far, and the steps at the beginning, the same on all processes."""
        return {"used": self.used, "starts": self.starts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.used = self.run.counts["expert_labels"] = state["used"]
        self.starts = state["starts"]  # whose default depends on the steps of the run, which may have changed

    def rank_state(self) -> dict[str, Any]:
        """Where the expert steers, and its own state."""
        return {"steers": self.steers.tolist(), "expert": self.expert.rank_state()}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
        self.steers = np.array(state["steers"], dtype=bool)
        self.expert.load_rank_state(state["expert"])


def _rows(flags: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Flags `[N]`, to be broadcast to `like` `[N, ...]`."""
    return flags.reshape(-1, *[1] * (like.ndim - 1))


def _coin(probability: float, n: int) -> np.ndarray:
    """`[n]` bool, each true with this probability, from torch's generator if that is needed."""
    if probability in (0, 1):
        return np.full(n, probability == 1)
    return (torch.rand(n) < probability).numpy()
