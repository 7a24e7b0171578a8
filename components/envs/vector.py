"""Vector environments that may fail: a call has a deadline, a fault names its environment, closing never hangs."""

import contextlib
import copy
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import SignalledExit, UserError, crashes_pass

LONGEST = 1e7  # seconds, the longest timer that every system accepts
LARGEST_BOUND = 1e30  # of an action; beyond it no range is meant, and squares of it overflow float32
FLOAT32_MAX = float(np.finfo(np.float32).max)
LARGEST_INTEGER = 2.0**53  # the same of whole numbers: larger ones are not exact in float64


class FaultyEnvError(RuntimeError):
    """An environment raised, hung, died, or returned values that are not finite.

    Args:
        index: Index of the environment, -1 where it is unknown.
        problem: Description of the fault in a few words.
    """

    def __init__(self, index: int, problem: str) -> None:
        super().__init__(f"{f'environment {index}' if index >= 0 else 'an environment'} {problem}")
        self.index, self.problem = index, problem

    def describe(self, first: int, seeds: Sequence[int], steps: np.ndarray, action: np.ndarray | None) -> str:
        """Describe the fault in one line.

        Args:
            first: Index, over all processes, of this process's first environment.
            seeds, steps: Last seed of each environment, and the steps of its episode so far.
            action: `[N, Da]`, the actions of all environments; None in a reset.
        """
        i = self.index
        if i < 0:
            return str(self)
        text = f"environment {first + i} (seed {seeds[i]}, step {steps[i]} of its episode) {self.problem}"
        if action is None:
            return text
        return f"{text}; action {np.array2string(np.ravel(action[i]), 1000, precision=6, threshold=20)}"


class LateError(BaseException):
    """The deadline has passed. No `Exception`, so that an environment that catches those does not catch it."""


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise LateError inside after so many seconds, and again each second after; 0 for no limit.

    It uses signals, so it does nothing outside the main thread. It cannot interrupt a call into C that never returns;
    `--hang-timeout` ends the run then.
    """
    if seconds <= 0 or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(number: int, frame: Any) -> None:
        raise LateError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, LONGEST), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def hurry(seconds: float) -> None:
    """Shorten the current deadline, if there is one, so that a stop does not wait for an environment."""
    if hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_REAL)[0] > seconds:
        signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)


class Environments:
    """A `gymnasium.vector.VectorEnv` whose `reset` and `step` always return, or raise FaultyEnvError.

    The last observation of an episode is a copy, so that a reset in the same step does not change it, where an
    environment returns the same array each time.

    Args:
        make: (num_envs, seed) -> the vector environment; called again by `rebuild`.
        num_envs, seed: Its arguments in the first call.
        timeout: Longest duration of a call in seconds; 0 for no limit.
    """

    def __init__(self, make: Callable[[int, int], Any], num_envs: int, seed: int, timeout: float) -> None:
        self.make, self.num_envs, self.timeout = make, num_envs, timeout
        self.envs: Any = None
        self.rebuild(seed)

    def rebuild(self, seed: int) -> None:
        """Replace all environments, since their common vector may be in any state.

        Raises:
            FaultyEnvError: they hang or exit while they are built.
            UserError: `make` returned another number of environments, or wrappers that training and evaluation would
                not share.
        """
        self.close()
        self.turn, self.answering = -1, True
        try:
            with deadline(self.timeout):
                self.envs = self.make(self.num_envs, seed)
                check_wrappers(self.envs)
        except SignalledExit:
            raise
        except LateError as error:
            raise FaultyEnvError(-1, f"took longer than {self.timeout:g} s to be made (--env-timeout)") from error
        except SystemExit as error:
            raise FaultyEnvError(-1, f"raised SystemExit while it was made: {error}") from error
        if self.envs.num_envs != self.num_envs:
            raise UserError(f"build({self.num_envs}, seed) returned {self.envs.num_envs} environments")
        # Environments of this process record whose turn it is, so that one that does not return is known.
        for index, env in enumerate(getattr(getattr(self.envs, "unwrapped", None), "envs", ())):
            if not (hasattr(env, "step") and hasattr(env, "reset")):
                break
            env.step, env.reset = self._marking(index, env.step), self._marking(index, env.reset)

    def __getattr__(self, name: str) -> Any:
        """Everything else is delegated to the vector environment: its spaces, its metadata, `render`."""
        return getattr(self.__dict__["envs"], name)

    def _marking(self, index: int, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call that first records that it is the turn of environment `index`; a last observation is copied."""

        def marked(*arguments: Any, **keywords: Any) -> Any:
            self.turn = index
            answer = call(*arguments, **keywords)
            if len(answer) == 5 and (answer[2] or answer[3]):
                return copy.deepcopy(answer[0]), *answer[1:]
            return answer

        return marked

    def reset(self, **keywords: Any) -> tuple[Any, dict[str, Any]]:
        """As the vector environment's own."""
        return self._call("reset", self.envs.reset, **keywords)

    def step(self, action: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """As the vector environment's own."""
        return self._call("step", self.envs.step, action)

    def render(self) -> Any:
        """As the vector environment's own."""
        return self._call("render", self.envs.render)

    def expert(self) -> Any:
        """As the vector environment's own, of one that offers it."""
        return self._call("expert", self.envs.expert)

    def _call(self, name: str, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Call within the deadline. Raises FaultyEnvError on any fault."""
        self.turn, self.answering, began = -1, False, time.monotonic()
        try:
            with deadline(self.timeout):
                answer = call(*arguments, **keywords)
            self.answering = True
            return answer
        except (FaultyEnvError, SignalledExit):  # raised by a worker, which knows the index; or by a signal
            raise
        except LateError as error:
            problem = f"did not come back from {name} within {time.monotonic() - began:.0f} s (--env-timeout)"
            raise FaultyEnvError(self._culprit(error), problem) from error
        except (EOFError, ConnectionError) as error:
            raise FaultyEnvError(self._culprit(error), f"died in {name}") from error
        except UserError:  # our own
            raise
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # a worker process forwards its Ctrl-C
            if crashes_pass():
                raise
            problem = f"raised {type(error).__name__} in {name}: {error}"
            raise FaultyEnvError(self._culprit(error), problem) from error

    def _culprit(self, error: BaseException) -> int:
        """Index of the faulty environment: by its turn or, with workers, by the pipe that failed; -1 if unknown."""
        pipes = getattr(getattr(self.envs, "unwrapped", None), "parent_pipes", None)
        if not pipes:
            return self.turn
        firsts = getattr(self.envs.unwrapped, "firsts", range(len(pipes)))  # of the environments of each
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for index, pipe in enumerate(pipes):
                if pipe is not None and frame.f_locals.get("self") is pipe:
                    return firsts[index]
        return firsts[pipes.index(None)] if None in pipes else -1

    def close(self) -> None:
        """Close them within seconds. Worker processes that have failed, or do not end by themselves, are killed."""
        if self.envs is None:
            return
        base: Any = getattr(self.envs, "unwrapped", None)
        processes = getattr(base, "processes", ())
        with contextlib.suppress(Exception, LateError, SystemExit), deadline(5.0):
            if self.answering or not processes:
                self.envs.close()
        for process in processes:
            process.kill()
            process.join()
            base.closed = True  # so that nothing waits for the answer of a dead process
        self.envs = None


def layers(env: Any) -> Iterator[Any]:
    """An environment or vector environment and, one after the other, those inside it, as far as they are one."""
    seen: list[Any] = []
    while env is not None and not any(env is one for one in seen):
        yield env
        seen.append(env)
        inside = vars(env) if hasattr(env, "__dict__") else {}
        env = inside.get("env", inside.get("envs"))  # of Gymnasium's wrappers, or of `OnTop`
        env = None if isinstance(env, (list, tuple)) else env


KEEPS_STATISTICS = {
    "NormalizeObservation": "--normalise-observations of online_trainer.py",
    "NormalizeReward": "--normalise-rewards of online_trainer.py",
}
REWARD_STATISTICS = ("return_rms", "ret_rms")  # attributes of copies of these wrappers; any other is of observations
CHANGES_REWARDS = ("TransformReward", "VectorizeTransformReward")  # also ClipReward


def check_wrappers(envs: Any) -> None:
    """Refuse wrappers with which returns are not those of the environment, or depend on statistics of its own.

    Evaluation makes its own environments: their statistics would be others than those of the training.

    Raises:
        UserError: names the wrapper, and the option in its place.
    """
    base = getattr(envs, "unwrapped", None)
    single = list(getattr(base, "envs", None) or ())
    made = [] if single else [make() for make in list(getattr(base, "env_fns", ()))[:1]]  # theirs are in processes
    for env in (envs, *single, *made):
        for layer in layers(env):
            names = [kind.__name__ for kind in type(layer).__mro__ if kind.__module__.startswith("gymnasium.wrappers")]
            names += [
                "NormalizeReward" if key in REWARD_STATISTICS else "NormalizeObservation"
                for key, value in getattr(layer, "__dict__", {}).items()
                if key in ("obs_rms", *REWARD_STATISTICS) or type(value).__name__ == "RunningMeanStd"
            ]
            for name in names:
                if name in KEEPS_STATISTICS:
                    raise UserError(
                        f"it has the wrapper {type(layer).__name__}, whose statistics are not saved, and are others in "
                        f"an evaluation; leave it out, and use {KEEPS_STATISTICS[name]}"
                    )
                if name in CHANGES_REWARDS:
                    raise UserError(
                        f"it has the wrapper {type(layer).__name__}, which changes the rewards, and returns are those "
                        f"of the environment; leave it out, and use --reward-scale or --reward-shift"
                    )
    for env in made:
        env.close()


def action_width(space: Any) -> int:
    """Numbers in one action of a Box of any shape, which a policy gives as a vector. Raises UserError: no Box."""
    if not hasattr(space, "low") or getattr(space, "shape", None) is None:
        raise UserError(f"it has the action space {space}; expected a Discrete one, or a Box")
    return int(np.prod(space.shape))


def action_bounds(space: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest actions of a Box, `[Da]` float64. Raises UserError: no Box, or one without bounds."""
    action_width(space)
    low, high = (np.asarray(bound, dtype=np.float64).reshape(-1) for bound in (space.low, space.high))
    largest = LARGEST_BOUND if np.issubdtype(space.dtype, np.floating) else LARGEST_INTEGER
    if not (np.abs([low, high]) <= largest).all():
        raise UserError(
            f"it has actions without bounds ({space}); expected bounds that are finite, up to {largest:.0e}, as of a "
            "Box(-1, 1)"
        )
    return low, high


def executed(action: np.ndarray, space: Any) -> np.ndarray:
    """Actions `[N, Da]` in the form that an environment takes: within the bounds of a Box, in its shape and type.

    They are rounded to whole numbers where the type has no others. Discrete ones `[N]` begin with the space's first.
    """
    if not hasattr(space, "low"):
        return np.asarray(action, dtype=space.dtype) + space.start  # policies count from 0
    exact = np.asarray(action).reshape(len(action), *space.shape)
    if space.dtype.kind != "f":
        exact = np.rint(exact.astype(np.float64))
    return np.minimum(np.maximum(exact, space.low), space.high).astype(space.dtype, copy=False)


def check_finite(observation: dict[str, np.ndarray], reward: np.ndarray, rows: np.ndarray | None = None) -> None:
    """Raise FaultyEnvError for the first row whose observation or reward is not finite in float32.

    Args:
        rows: `[N]` bool, the rows that count; None for all.
    """
    finite = {key: np.isfinite(array) for key, array in observation.items() if array.dtype.kind == "f"}
    finite["reward"] = np.abs(reward) <= FLOAT32_MAX  # False for NaN
    for key, good in finite.items():
        if not good.all():
            for row in range(len(reward)) if rows is None else np.flatnonzero(rows):
                if not good[row].all():
                    raise FaultyEnvError(int(row), f"returned a NaN or Inf in {key!r} (as float32)")
