"""Steps of a vector environment that mean the same under each of Gymnasium's autoreset modes.

An episode's last step has an observation of its own, which is not the one that the next action is chosen on. Where each
is found depends on the mode:

    NEXT_STEP   the step's observation is the last one; the next step ignores its action, and only resets
    SAME_STEP   the step's observation is the next episode's first; the last one is `final_obs` of its `info`
    DISABLED    the step's observation is the last one; `reset(options={"reset_mask": [N] bool})` starts the next
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from .observations import array_of, observation_batch
from .vector import FaultyEnvError, check_finite

logger = logging.getLogger(__name__)
MODES = {"nextstep": "NEXT_STEP", "samestep": "SAME_STEP", "disabled": "DISABLED"}
FINAL = ("final_obs", "final_observation")  # the second until Gymnasium 1.0
ALIKE = 3  # episodes after which a last observation that always equals the next first one is no coincidence
HONEST = "expected its metadata['autoreset_mode'] to be what it does"
NO_MASK = 'expected one whose reset(options={"reset_mask": [N] bool}) resets the marked environments alone'


def autoreset_mode(envs: Any) -> str:
    """When a vector environment says that it starts new episodes: one of MODES, or "" where it says nothing.

    Its `metadata` says so since Gymnasium 1.1, which also keeps it as an attribute.
    """
    said = ((getattr(envs, "metadata", None) or {}).get("autoreset_mode"), _base(envs, "autoreset_mode"))
    for mode in said:
        word = str(getattr(mode, "value", mode)).replace("_", "").lower()
        if word in MODES:
            return word
    return ""


def _base(envs: Any, name: str) -> Any:
    """An attribute of the vector environment inside all wrappers, or None."""
    return getattr(getattr(envs, "unwrapped", None), name, None)


def keeps_last(envs: Any) -> bool:
    """Whether a step that also resets cannot overwrite `final_obs`: `Environments` copies what is in its process."""
    return bool(_base(envs, "envs") or _base(envs, "keeps_last"))


def copied(observation: Any, space: Any = None) -> dict[str, np.ndarray]:
    """A copy of observations under the names of the data: an environment may overwrite the arrays that it returned.

    Args:
        space: Of one environment's observations.

    Raises:
        FaultyEnvError: pictures whose values or shapes are not those of the space.
    """
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes Inf, and is found by `check_finite`
            named = observation_batch(observation, space)  # whose vectors are copies
    except UserError as error:
        count = len(next(iter(observation.values())) if isinstance(observation, dict) else observation)
        for i in range(count):
            try:
                observation_batch(_batch(_row(observation, i)), space)
            except UserError as own:
                raise FaultyEnvError(i, f"returned what its space excludes: {own}") from error
        raise
    return {key: value if value.dtype.kind == "f" else np.array(value) for key, value in named.items()}


@dataclass
class Step:
    """A step of N environments; its arrays are copies."""

    observation: dict[str, np.ndarray]
    """What the next action is chosen on, `[N, ...]`."""
    successor: dict[str, np.ndarray]
    """The observation after the action, also of an episode's last step; the same object where no episode differs."""
    reward: np.ndarray
    """`[N]` float64, 0 where the step only reset."""
    terminated: np.ndarray
    """`[N]` bool."""
    truncated: np.ndarray
    """`[N]` bool."""
    ended: np.ndarray
    """`[N]` bool, where this was the last step of an episode, terminated or truncated."""
    valid: np.ndarray
    """`[N]` bool, False where the step only reset."""
    begins: np.ndarray
    """`[N]` bool, where `observation` is the first of an episode."""
    info: dict[str, Any]
    """As the vector environment's own."""

    def check(self, rows: np.ndarray | None = None) -> None:
        """Raise FaultyEnvError for the first row, of `rows` `[N]` bool if given, that is not finite in float32."""
        check_finite(self.observation, self.reward, rows)
        if self.successor is not self.observation:
            check_finite(self.successor, self.reward, rows)


class Stepper:
    """Resets and steps a vector environment, and finds where its episodes end and begin.

    An environment that does not say its mode is taken for SAME_STEP if the first step that ends an episode comes with
    `final_obs`, else for NEXT_STEP. One that contradicts what it says is taken for what it does, or refused.

    Args:
        envs: A vector environment, or `Environments`.
        renews: Whether to reset the environments whose episode has ended, under DISABLED.

    Raises:
        UserError: a vector environment whose `reset` does not begin episodes.
    """

    def __init__(self, envs: Any, renews: bool = True) -> None:
        self.envs, self.renews = envs, renews
        self.space = getattr(envs, "single_observation_space", None)
        self.mode, self.settled, self.guessed, self.masked = autoreset_mode(envs), False, False, False
        if self.mode == "nextstep" and _base(envs, "shared_memory") is False:
            raise UserError(
                "AsyncVectorEnv(shared_memory=False) under NEXT_STEP may reset again in the step after a reset, by a "
                "fault of Gymnasium; expected shared memory, or another autoreset_mode"
            )
        self.resetting = np.zeros(envs.num_envs, dtype=bool)  # under NEXT_STEP: rows whose next step only resets
        self.latest: dict[str, np.ndarray] = {}
        self.trusted = keeps_last(envs)
        self.alike = 0  # last observations that equalled the next first one

    def reset(self, **keywords: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """As the vector environment's own; the observation is a copy under the names of the data."""
        mask = (keywords.get("options") or {}).get("reset_mask")  # Gymnasium removes it
        observation, info = self.envs.reset(**keywords)
        self.latest = self._named(observation)
        self.resetting[slice(None) if mask is None else np.asarray(mask)] = False
        return self.latest, info

    def step(self, action: np.ndarray) -> Step:
        """Step all environments.

        Raises:
            UserError: the vector environment's answer has another form than Gymnasium's.
        """
        observation, reward, terminated, truncated, info = self.envs.step(action)
        if not isinstance(info, dict):
            raise UserError(f"the vector environment's info is a {type(info).__name__}; expected a dict of [N] arrays")
        before, resetting, n = self.latest, self.resetting, self.envs.num_envs
        after, earned = self._named(observation), _rows(reward, "reward", n)
        terminated, truncated = _rows(terminated, "terminated", n), _rows(truncated, "truncated", n)
        ended = terminated | truncated
        step = Step(after, after, earned, terminated, truncated, ended, ~resetting, resetting, info)
        ends = ended.any()
        if (ends and (ended & resetting).any()) or (self.guessed and earned[resetting].any()):
            raise UserError(
                "the vector environment was taken for NEXT_STEP, but made a step where it should only have reset; "
                + HONEST
            )
        if self.mode == "nextstep":
            earned[resetting] = 0.0
            self.resetting = np.zeros(n, dtype=bool)
        if ends:
            self._end(step, before)
        self.latest = step.observation
        return step

    def state_dict(self) -> dict[str, Any]:
        """Where the current episodes stand, for an environment that saves these."""
        latest = {key: torch.tensor(value) for key, value in self.latest.items()}
        return {"latest": latest, "resetting": torch.tensor(self.resetting)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self.latest = {key: value.numpy() for key, value in state["latest"].items()}
        self.resetting = state["resetting"].numpy()

    def _named(self, observation: Any) -> dict[str, np.ndarray]:
        """A copy of an observation of all environments. Raises UserError: it has another number of rows."""
        named, n = copied(observation, self.space), self.envs.num_envs
        for key, value in named.items():
            if len(value) != n:
                raise UserError(f"the vector environment's {key!r} has {len(value)} rows; expected {n}")
        return named

    def _end(self, step: Step, before: dict[str, np.ndarray]) -> None:
        """Complete a step that ended episodes; `before` is what its action was chosen on."""
        last = self._last(step)
        differs = last is not None and not _alike(last, step.observation, step.ended)
        if not self.settled:
            if last is not None and (not self.mode or differs):
                self.mode = "samestep"
            elif not self.mode:
                self.mode, self.guessed = "nextstep", True
                _say_default()
            self.settled = True
        if self.mode == "samestep":
            if last is None:
                i = int(np.flatnonzero(step.ended)[0])
                raise UserError(
                    f"the vector environment resets in the step that ends an episode (SAME_STEP), but its info has no "
                    f"last observation of environment {i}; expected info['final_obs'][{i}]"
                )
            self._suspect(last, step, before, differs)
            step.successor, step.begins = last, step.begins | step.ended
        elif differs:
            raise UserError(
                f"the vector environment was taken for {MODES[self.mode]}, but its 'final_obs' is another observation "
                f"than that of the step, as under SAME_STEP; {HONEST}"
            )
        elif self.mode == "nextstep":
            self.resetting = step.ended.copy()
        elif self.renews:
            step.observation, step.begins = self._renewed(step), step.begins | step.ended

    def _last(self, step: Step) -> dict[str, np.ndarray] | None:
        """The step's observations with `final_obs` where episodes ended; None if that is missing anywhere.

        Raises:
            UserError: it has another form than the observation.
        """
        last = {key: np.array(value) for key, value in step.observation.items()}
        for i in map(int, np.flatnonzero(step.ended)):
            if (own := final_observation(step.info, i)) is None:
                return None
            named = copied(own, self.space)
            for key, store in last.items():
                if key not in named or named[key].shape != (1, *store.shape[1:]):
                    found = named[key].shape[1:] if key in named else "missing"
                    raise UserError(
                        f"the vector environment's info['final_obs'][{i}]: {key!r} is {found}; "
                        f"expected the shape of the observation, {store.shape[1:]}"
                    )
                store[i] = named[key][0]
        return last

    def _suspect(self, last: dict[str, np.ndarray], step: Step, before: dict[str, np.ndarray], differs: bool) -> None:
        """Refuse last observations that are always the first ones of the next episode: arrays that were reused."""
        self.trusted |= differs
        if self.trusted or _alike(last, before, step.ended):  # nothing that moves
            return
        self.alike += int(step.ended.sum())
        if self.alike >= ALIKE:
            raise UserError(
                "the vector environment's 'final_obs' always equals the first observation of the next episode: its "
                "environments seem to return the same array each time; return copies, or use SyncVectorEnv or "
                "NEXT_STEP, said in metadata['autoreset_mode']"
            )

    def _renewed(self, step: Step) -> dict[str, np.ndarray]:
        """Begin new episodes where they ended, under DISABLED; returns the observations of all environments."""
        try:
            observation, _ = self.envs.reset(options={"reset_mask": np.array(step.ended)})
        except (TypeError, ValueError, KeyError, AssertionError, NotImplementedError, FaultyEnvError) as error:
            problem = error.problem if isinstance(error, FaultyEnvError) else f"raised {type(error).__name__}: {error}"
            if self.masked or getattr(error, "index", -1) >= 0 or "raised" not in problem:  # an environment's own fault
                raise
            raise UserError(
                f"the vector environment has autoreset DISABLED, but cannot reset some of its environments: it "
                f"{problem}; {NO_MASK}"
            ) from error
        named, self.masked = self._named(observation), True
        if not _alike(named, step.observation, ~step.ended):
            raise UserError(
                f"the vector environment has autoreset DISABLED, but its reset changed environments outside of "
                f"'reset_mask'; {NO_MASK}"
            )
        return named


@cache
def _say_default() -> None:
    """Say, once in a process, what a vector environment is taken for that says nothing itself."""
    logger.warning("the vector environment has no metadata['autoreset_mode']; taken for NEXT_STEP, Gymnasium's default")


def final_observation(info: dict[str, Any], i: int) -> Any:
    """Environment i's last observation, as a batch of one, of a step that also reset it; None if there is none."""
    for key in FINAL:
        if info.get(key) is not None and np.all(info[f"_{key}"][i] if f"_{key}" in info else True):
            found = _row(info[key], i)
            return None if found is None else _batch(found)
    return None


def _row(values: Any, i: int) -> Any:
    """Environment i's entry of `final_obs`: a list or array of entries, or a dict of these, maybe with masks."""
    if isinstance(values, dict):
        parts = {key: value for key, value in values.items() if not (key[:1] == "_" and key[1:] in values)}
        return {key: _row(value, i) for key, value in parts.items()}
    return values[i]


def _batch(value: Any) -> Any:
    return {key: _batch(part) for key, part in value.items()} if isinstance(value, dict) else array_of(value)[None]


def _alike(one: dict[str, np.ndarray], other: dict[str, np.ndarray], rows: np.ndarray) -> bool:
    """Whether two observations `[N, ...]` are equal in the `rows` `[N]`."""
    pairs = ((value[rows], other[key][rows]) for key, value in one.items())
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


def _rows(values: Any, name: str, n: int) -> np.ndarray:
    """A copy of one array of a step, `[N]`: float64 rewards, or flags. Raises UserError: another shape or type."""
    array = array_of(values)
    kinds, expected = ("bui", "bool") if name != "reward" else ("buif", "float")
    if array.shape != (n,) or array.dtype.kind not in kinds:
        raise UserError(
            f"the vector environment's {name!r} has shape {array.shape} and type {array.dtype}; "
            f"expected ({n},), {expected}, one for each environment"
        )
    return array.astype(np.float64 if name == "reward" else bool)
