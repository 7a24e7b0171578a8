"""Slow environments in worker processes: each process steps its share of them, all at the same time."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from ..errors import UserError, require
from ..parallel import end_with_parent, starter
from .autoreset import autoreset_mode, keeps_last
from .observations import task_of
from .vector import Environments, FaultyEnvError

Make = Callable[[int, int], Any]  # (num_envs, seed) -> a vector environment


def spread(make: Make, num_envs: int, seed: int, workers: int) -> Any:
    """A vector environment in `workers` processes, at most one for each environment; `make` builds each one's share.

    Raises:
        UserError: a number of processes below 0, or any UserError of `make`.
    """
    if workers < 0:
        raise UserError(f"--env.workers {workers} must be 0 or more")
    shares = [len(part) for part in np.array_split(range(num_envs), min(workers, num_envs))]
    return vector_of(make, shares, seed)


def vector_of(make: Make, shares: list[int], seed: int) -> Any:
    """`Workers` as a vector environment of Gymnasium, which is not imported before an environment is built."""
    gym = require("gymnasium", "gymnasium")
    vector: Any = gym.vector.VectorEnv

    class VectorOfWorkers(Workers, vector):
        """Gymnasium's vector environment with the methods of `Workers`."""

    return VectorOfWorkers(make, shares, seed)


class Workers:
    """Environments in the order of their processes. A fault names the environment that caused it.

    Args:
        make: Builds the environments of one process.
        shares: The number of environments of each process.
        seed: Seed of the first environment; those of the others count up from it.
    """

    def __init__(self, make: Make, shares: list[int], seed: int) -> None:
        self.shares, self.num_envs = shares, sum(shares)
        self.firsts = np.cumsum([0, *shares]).tolist()
        self.parent_pipes: list[Connection] = []
        self.processes: list[Any] = []
        context = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
        for number, share in enumerate(shares):
            ours, theirs = context.Pipe()
            others = [*self.parent_pipes, ours]  # which a forked process inherits and would keep open
            start = (make, share, seed + self.firsts[number], theirs, others, starter())
            process: Any = context.Process(target=work, args=start, daemon=True)
            process.start()
            theirs.close()
            self.parent_pipes.append(ours)
            self.processes.append(process)
        try:
            described = [self._answer(number) for number in range(len(shares))]
        except BaseException:
            for process in self.processes:
                process.kill()
            raise
        tasks = [of_part.pop("tasks") for of_part in described]
        if None not in tasks:  # one of all environments, or one each
            texts = [text for part in tasks for text in part]
            self.task_description = texts[0] if len(set(texts)) == 1 else texts
        self._describe(**described[0])

    def _describe(
        self, metadata: Any, tracked: Any, spaces: tuple[Any, Any], keeps_last: bool, has_expert: bool
    ) -> None:
        """Adopt the description of the first process's environments, which holds for all."""
        from gymnasium.vector.utils import batch_space

        self.metadata, self.tracked, self.keeps_last = metadata, tracked, keeps_last
        if has_expert:
            self.expert = lambda: np.concatenate(self._ask("expert", [((), {})] * len(self.shares)))
        self.single_observation_space, self.single_action_space = spaces
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _answer(self, number: int) -> Any:
        """The answer of process `number`. Raises the error that it reports."""
        kind, answer = self.parent_pipes[number].recv()
        if kind == "fault":
            index, problem = answer
            raise FaultyEnvError(self.firsts[number] + index if index >= 0 else index, problem)
        if kind == "error":
            raise answer
        return answer

    def _ask(self, name: str, each: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
        """Call the method `name` in all processes at once; `each` has the arguments for each of them."""
        for pipe, (arguments, keywords) in zip(self.parent_pipes, each, strict=True):
            pipe.send((name, arguments, keywords))
        return [self._answer(number) for number in range(len(each))]

    def _parts(self, values: Any) -> list[Any]:
        """Values `[N, ...]` of all environments, split by process."""
        return [values[a:b] for a, b in zip(self.firsts[:-1], self.firsts[1:], strict=True)]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed
        masks = (options or {}).get("reset_mask")
        each: list[Any] = []
        for number in range(len(self.shares)):
            keywords: dict[str, Any] = {"seed": None if seeds is None else list(self._parts(seeds)[number])}
            own = {} if masks is None else {"reset_mask": self._parts(masks)[number]}
            keywords["options"] = None if options is None else options | own
            each.append(((), keywords))
        observations, infos = zip(*self._ask("reset", each), strict=True)
        return joined(observations), joined_infos(infos, self.shares)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        answers = self._ask("step", [((part,), {}) for part in self._parts(actions)])
        observations, rewards, terminated, truncated, infos = zip(*answers, strict=True)
        flags = (np.concatenate(parts) for parts in (rewards, terminated, truncated))
        return joined(observations), *flags, joined_infos(infos, self.shares)

    def render(self) -> Any:
        return tuple(frame for part in self._ask("render", [((), {})] * len(self.shares)) for frame in part or ())

    def close_extras(self, **keywords: Any) -> None:
        for pipe, process in zip(self.parent_pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(("close", (), {}))
            process.join(1.0)
            process.kill()


def work(
    make: Make, num_envs: int, seed: int, pipe: Connection, others: list[Connection], parent: tuple[int, bool]
) -> None:
    """Main function of a worker process: build the environments, then answer calls until the pipe closes."""
    end_with_parent(*parent)
    for other in others:
        other.close()
    try:
        envs = Environments(make, num_envs, seed, 0.0)
        spaces = (envs.single_observation_space, envs.single_action_space)
        metadata = dict(getattr(envs.envs, "metadata", None) or {})
        metadata |= {"autoreset_mode": mode} if (mode := autoreset_mode(envs)) else {}
        kept, tracked = keeps_last(envs), getattr(envs.envs, "tracked", ())
        tasks = [text] * num_envs if isinstance(text := task_of(envs), str) else text
        described = {"metadata": metadata, "tracked": tracked, "spaces": spaces, "keeps_last": kept, "tasks": tasks}
        described["has_expert"] = callable(getattr(envs.envs, "expert", None))
        pipe.send(("done", described))
        latest: Any = None  # observation
        while True:
            name, arguments, keywords = pipe.recv()
            if name == "close":
                break
            mask = (keywords.get("options") or {}).get("reset_mask")
            try:
                if mask is not None and not np.any(mask):  # Gymnasium refuses to reset none
                    answer: Any = latest, {}
                else:
                    answer = getattr(envs, name)(*arguments, **keywords)
                latest = answer[0] if name in ("reset", "step") else latest
                pipe.send(("done", answer))
            except FaultyEnvError as fault:
                pipe.send(("fault", (fault.index, fault.problem)))
        envs.close()
    except (EOFError, OSError, KeyboardInterrupt):  # the main process has ended
        pass
    except FaultyEnvError as fault:
        with contextlib.suppress(OSError):
            pipe.send(("fault", (fault.index, fault.problem)))
    except Exception as error:
        with contextlib.suppress(OSError):
            kind = type(error) if isinstance(error, UserError) else RuntimeError
            pipe.send(("error", kind(str(error) if kind is UserError else f"{type(error).__name__}: {error}")))
    os._exit(0)


def joined(parts: Any) -> Any:
    """Observations of all parts, concatenated to `[N, ...]`: arrays, or dicts and tuples of arrays."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(joined(values) for values in zip(*parts, strict=True))
    return np.concatenate(parts)


def joined_infos(infos: Any, shares: list[int]) -> dict[str, Any]:
    """`info` of all parts; where a part lacks a key, its values are empty and its mask `_key` is false."""
    whole: dict[str, Any] = {}
    for key in dict.fromkeys(key for info in infos for key in info):
        known = next(info[key] for info in infos if key in info)
        known = np.asarray(known) if hasattr(known, "__array__") else known  # a tensor
        if isinstance(known, list | tuple):  # one entry for each environment
            none = [[None] * n for n in shares]
            whole[key] = [x for info, empty in zip(infos, none, strict=True) for x in info.get(key, empty)]
            continue
        if isinstance(known, dict):
            whole[key] = joined_infos([info.get(key, {}) for info in infos], shares)
        elif isinstance(known, np.ndarray) and known.ndim:
            empty = (np.full((n, *known.shape[1:]), None if known.dtype == object else 0, known.dtype) for n in shares)
            parts = [np.asarray(info.get(key, none)) for info, none in zip(infos, empty, strict=True)]
            whole[key] = np.concatenate(parts)
        else:
            whole[key] = known
    return whole
