"""Slow environments in processes of their own: each steps its share of them, all at the same time."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..errors import UserError, require
from .vector import Environments, FaultyEnvError

Make = Callable[[int, int], Any]  # (num_envs, seed) -> a vector environment


def spread(make: Make, num_envs: int, seed: int, workers: int) -> Any:
    """A vector environment whose parts `make` builds in so many processes, or in as many as there are environments.

    Raises:
        UserError: a number of processes below 0, or what `make` raises.
    """
    if workers < 0:
        raise UserError(f"--env.workers {workers} must be 0 or more")
    shares = [len(part) for part in np.array_split(range(num_envs), min(workers, num_envs))]
    return vector_of(make, shares, seed)


def vector_of(make: Make, shares: list[int], seed: int) -> Any:
    """The class needs Gymnasium, which is imported with the first environment."""
    gym = require("gymnasium", "gymnasium")
    kind: Any = gym.vector.VectorEnv

    class Workers(kind):
        """Environments in the order of their processes. A fault names the one that it came from."""

        def __init__(self) -> None:
            self.firsts = np.cumsum([0, *shares]).tolist()
            self.parent_pipes: list[Connection] = []
            self.processes: list[Any] = []
            context = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
            for number, share in enumerate(shares):
                ours, theirs = context.Pipe()
                others = [*self.parent_pipes, ours]  # a fork has them, too, and would keep them open
                start = (make, share, seed + self.firsts[number], theirs, others)
                process: Any = context.Process(target=work, args=start, daemon=True)
                process.start()
                theirs.close()
                self.parent_pipes.append(ours)
                self.processes.append(process)
            self.num_envs = num_envs = sum(shares)
            try:
                about = [self._answer(number) for number in range(len(shares))][0]
            except BaseException:
                for process in self.processes:
                    process.kill()
                raise
            self.metadata, self.tracked = about["metadata"], about["tracked"]
            self.single_observation_space, self.single_action_space = about["spaces"]
            self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
            self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)

        def _answer(self, number: int) -> Any:
            kind, answer = self.parent_pipes[number].recv()
            if kind == "fault":
                index, problem = answer
                raise FaultyEnvError(self.firsts[number] + index if index >= 0 else index, problem)
            if kind == "error":
                raise answer
            return answer

        def _ask(self, name: str, each: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
            for pipe, (arguments, keywords) in zip(self.parent_pipes, each, strict=True):
                pipe.send((name, arguments, keywords))
            return [self._answer(number) for number in range(len(each))]

        def _parts(self, values: Any) -> list[Any]:
            return [values[a:b] for a, b in zip(self.firsts[:-1], self.firsts[1:], strict=True)]

        def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
            seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
            masks = (options or {}).get("reset_mask")
            each: list[Any] = []
            for number in range(len(shares)):
                keywords: dict[str, Any] = {"seed": None if seeds is None else list(self._parts(seeds)[number])}
                own = {} if masks is None else {"reset_mask": self._parts(masks)[number]}
                keywords["options"] = None if options is None else options | own
                each.append(((), keywords))
            observations, infos = zip(*self._ask("reset", each), strict=True)
            return joined(observations), joined_infos(infos, shares)

        def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
            answers = self._ask("step", [((part,), {}) for part in self._parts(actions)])
            observations, rewards, terminated, truncated, infos = zip(*answers, strict=True)
            flags = (np.concatenate(parts) for parts in (rewards, terminated, truncated))
            return joined(observations), *flags, joined_infos(infos, shares)

        def render(self) -> Any:
            return tuple(frame for part in self._ask("render", [((), {})] * len(shares)) for frame in part or ())

        def close_extras(self, **keywords: Any) -> None:
            for pipe, process in zip(self.parent_pipes, self.processes, strict=True):
                with contextlib.suppress(OSError):
                    pipe.send(("close", (), {}))
                process.join(1.0)
                process.kill()

    return Workers()


def work(make: Make, num_envs: int, seed: int, pipe: Connection, others: list[Connection]) -> None:
    """The life of one process: build, then do what is asked until the pipe closes."""
    for other in others:
        other.close()
    try:
        envs = Environments(make, num_envs, seed, 0.0)
        spaces = (envs.single_observation_space, envs.single_action_space)
        metadata = getattr(envs.envs, "metadata", None)
        pipe.send(("done", {"metadata": metadata, "tracked": getattr(envs.envs, "tracked", ()), "spaces": spaces}))
        while True:
            name, arguments, keywords = pipe.recv()
            if name == "close":
                break
            try:
                pipe.send(("done", getattr(envs, name)(*arguments, **keywords)))
            except FaultyEnvError as fault:
                pipe.send(("fault", (fault.index, fault.problem)))
        envs.close()
    except (EOFError, OSError, KeyboardInterrupt):  # whoever asks is gone
        pass
    except Exception as error:
        with contextlib.suppress(OSError):
            kind = type(error) if isinstance(error, UserError) else RuntimeError
            pipe.send(("error", kind(str(error) if kind is UserError else f"{type(error).__name__}: {error}")))
    os._exit(0)


def joined(parts: Any) -> Any:
    """Observations of all parts, `[N, ...]`: arrays, or dicts and tuples of such."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(joined(values) for values in zip(*parts, strict=True))
    return np.concatenate(parts)


def joined_infos(infos: Any, shares: list[int]) -> dict[str, Any]:
    """`info` of all parts; a key that a part lacks is empty there, as its mask `_key` tells."""
    whole: dict[str, Any] = {}
    for key in dict.fromkeys(key for info in infos for key in info):
        known = next(info[key] for info in infos if key in info)
        if isinstance(known, dict):
            whole[key] = joined_infos([info.get(key, {}) for info in infos], shares)
        elif isinstance(known, np.ndarray) and known.ndim:
            empty = (np.full((n, *known.shape[1:]), None if known.dtype == object else 0, known.dtype) for n in shares)
            whole[key] = np.concatenate([info.get(key, none) for info, none in zip(infos, empty, strict=True)])
        else:
            whole[key] = known
    return whole
