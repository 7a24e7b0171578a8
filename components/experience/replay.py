"""Replay buffer in memory: one packed row per transition, so that a batch is one indexed read; saved incrementally."""

import math
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..contracts import Window
from ..data.features import INTERVENTION, RECORDED
from ..data.pictures import pictures_of
from ..data.returns import n_step_return, returns_to_go
from ..errors import UserError
from ..run.pieces import Parts
from .collection import EXECUTED

BESIDE = (*RECORDED, EXECUTED)  # what a collection may give beside the keys of `spec`, stored from the first time on


def windowed(spec: dict[str, Any], window: Window) -> dict[str, Any]:
    """`spec` of a buffer's batches, from the `spec` of its transitions."""
    spec, action = dict(spec), spec["action"]
    spec["discount"] = {"shape": (), "dtype": "float32"}
    if (chunk := window.chunk) > 1:
        spec["action"] = action | {"shape": (chunk, *action["shape"])}
        spec["action_is_pad"] = {"shape": (chunk,), "dtype": "bool"}
        spec["complete"] = {"shape": (), "dtype": "float32"}
    if window.next_action:
        spec["next.action"] = {key: action[key] for key in ("shape", "dtype")}
    if window.to_go:
        spec["return_to_go"] = {"shape": (), "dtype": "float32", "like": "reward"}
    return spec


class ReplayBuffer:
    """The newest transitions of this process's environments, in a ring buffer for each.

    The float32 keys of `spec` are packed into one row; flags and discrete actions have separate tensors. A picture that
    is the successor of one step and the observation of the next is stored once. A window of several steps never crosses
    the end of an episode, nor the newest transition of its environment. The batches equal those of
    `datasets.transitions.Transitions` with the same options. `intervention`, `success` and `executed` are stored where
    the collection gives them; the first is in the batches, too.

    Args:
        spec: {key: {"shape", "dtype"}} of a transition: observation, action, reward, terminated, `next.` observation.
        size: Transitions to keep over all processes, divided among the environments.
        num_envs: Environments over all processes.
        of_rank: Environments of this process.
        window: Of one sample.
        rate: Updates per step of all environments.

    Raises:
        UserError: no room for one window per environment, or not enough memory.
    """

    def __init__(
        self, spec: dict[str, Any], size: int, num_envs: int, of_rank: int, window: Window, rate: float = 1.0
    ) -> None:
        self.rate = rate
        self.discount, self.n_step, self.chunk = window.discount, window.n_step, window.chunk
        self.next_action, self.to_go = window.next_action, window.to_go
        self.steps = max(self.n_step, self.chunk, 1 + self.next_action)
        self.length, self.num_envs = size // num_envs, of_rank
        if self.length < self.steps:
            raise UserError(f"--buffer-size {size} has no room for {self.steps} steps of {num_envs} environments")
        if self.to_go:
            spec = spec | {"return_to_go": {"shape": (), "dtype": "float32"}}
        pictures = {key: spec[key] for key in pictures_of(spec)}
        self.packed = {key: tuple(f["shape"]) for key, f in spec.items() if f["dtype"] == "float32"}
        self.widths = [math.prod(shape) for shape in self.packed.values()]
        self.columns = {
            key: slice(sum(self.widths[:i]), sum(self.widths[: i + 1])) for i, key in enumerate(self.packed)
        }
        shapes: dict[str, Any] = {"rows": ((sum(self.widths),), torch.float32), "ended": ((), torch.bool)}
        for key, feature in spec.items():
            if key not in self.packed and key not in pictures:
                shapes[key] = (tuple(feature["shape"]), getattr(torch, feature["dtype"]))
        self.others = [key for key in shapes if key not in ("rows", "ended")]
        try:
            self.pictures = Pictures(
                {k: f for k, f in pictures.items() if not k.startswith("next.")}, of_rank, self.length
            )
            if pictures:
                shapes |= {"at": ((), torch.int64), "after": ((), torch.int64)}
            self.data = {k: torch.empty((of_rank, self.length, *shape), dtype=d) for k, (shape, d) in shapes.items()}
        except RuntimeError as error:
            raise UserError(f"--buffer-size {size} needs more memory than there is; choose a smaller one") from error
        self.head = torch.zeros(of_rank, dtype=torch.int64)  # slot of each environment's next transition
        self.count = torch.zeros(of_rank, dtype=torch.int64)
        self.running = torch.zeros(of_rank, dtype=torch.int64)  # transitions of the current episode
        self.total = torch.zeros(of_rank, dtype=torch.int64)  # transitions ever added
        self.saved_total, self.saved_cut = self.total.clone(), torch.zeros(of_rank, dtype=torch.bool)
        self.parts: list[tuple[str, list[int]]] = []  # files of the last checkpoint, and `total` at the end of each
        self.pending: tuple[str, list[int]] | None = None
        self.number = 0  # of the next file
        self.left_out = 0  # transitions of damaged files, after `restore`
        self.since_gap = torch.full((of_rank,), 2**60)  # transitions since those, while files are read

    between = True  # the collecting policy may change at any time

    def __len__(self) -> int:
        """Number of transitions of this process."""
        return int(self.count.sum())

    def describe(self, steps: int, world: int, saved: bool) -> str:
        """A line about its size for the screen, after so many steps of each environment on so many processes."""
        tensors = [*self.data.values(), *self.pictures.store.values()]
        full = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
        size = world * full * min(steps, self.length) / self.length
        kept = "in memory and in checkpoints" if saved else "in memory only: a resumed run fills a new one"
        return f"replay buffer: up to {size:.3g} MB {kept}"

    def add(self, transitions: dict[str, Tensor]) -> None:
        """Add a transition `[N, ...]` of each environment where `valid` `[N]` holds; `ended` `[N]` ends episodes."""
        valid = transitions["valid"]
        envs = valid.nonzero().squeeze(1)
        slots = self.head[envs]
        self._make_room(transitions)
        new = {key: transitions[key] for key in self.others}
        new |= {key: transitions[key] if key in transitions else _unknown(self.data[key]) for key in self.beside}
        if self.to_go:
            transitions = transitions | {"return_to_go": transitions["reward"]}  # until the episode has ended
        new["rows"] = torch.cat([transitions[key].reshape(self.num_envs, -1) for key in self.packed], 1)
        new["ended"] = transitions["ended"]
        if self.pictures.store:
            new["at"], new["after"] = self.pictures.add(transitions, valid, self.running > 0)
        for key, column in self.data.items():
            column[envs, slots] = new[key][envs] if new[key].ndim else new[key]
        self.head[envs] = (slots + 1) % self.length
        self.count[envs] = (self.count[envs] + 1).clamp(max=self.length)
        self.total[envs] += 1
        self.running[envs] += 1
        if self.pictures.store:
            self._forget_without_pictures()
        self._end(transitions["ended"] & valid)

    def _make_room(self, columns: dict[str, Any]) -> None:
        """Make columns for what is not in `spec`; of the transitions so far, they are `_unknown`."""
        for key in BESIDE:
            if key in columns and key not in self.data:
                shape = (self.num_envs, self.length, *columns[key].shape[1:])
                self.data[key] = _unknown(columns[key]).expand(shape).clone()

    @property
    def beside(self) -> list[str]:
        """The columns that `_make_room` has made."""
        return [key for key in BESIDE if key in self.data and key not in self.others]

    def due(self, ready: bool) -> float:
        """Updates that are due for one step of all environments; 0 while a process has nothing to draw.

        Returns to go are known at the end of an episode, so it takes one on each process.
        """
        ready = ready and (not self.to_go or min(parallel.gather(int(self._drawable().sum()))) > 0)
        return self.rate if ready else 0.0

    def cut(self) -> None:
        """Truncate the current episodes: mark each environment's newest transition as the last one."""
        envs = self.count.nonzero().squeeze(1)
        self.data["ended"][envs, (self.head[envs] - 1) % self.length] = True
        self.saved_cut |= (self.total == self.saved_total) & (self.count > 0)
        self._end(self.count > 0)

    miss = cut  # a step of the environments was lost

    def _end(self, ended: Tensor) -> None:
        """End the episodes of the environments `ended` `[N]`, and compute their returns to go."""
        for env in ended.nonzero().flatten().tolist() if self.to_go else ():
            steps = min(int(self.running[env]), int(self.count[env]))
            places = self._places(torch.tensor(env), torch.arange(steps) + self.count[env] - steps)
            if steps:
                rewards = self.data["rows"].flatten(0, 1)[places, self.columns["reward"]].squeeze(1)
                terminated = self.data["terminated"].flatten()[places]
                found = returns_to_go(rewards, terminated, torch.tensor([steps]), self.discount)
                self.data["rows"].flatten(0, 1)[places, self.columns["return_to_go"]] = found[:, None]
        self.running[ended] = 0

    def _know_returns(self) -> None:
        """Recompute the returns to go of all ended episodes: some were saved before their episode ended."""
        for env in range(self.num_envs):
            places = self._places(torch.tensor(env), torch.arange(int(self.count[env])))
            ends = self.data["ended"].flatten()[places].nonzero().flatten() + 1
            if len(ends):
                places = places[: int(ends[-1])]
                rewards = self.data["rows"].flatten(0, 1)[places, self.columns["reward"]].squeeze(1)
                found = returns_to_go(rewards, self.data["terminated"].flatten()[places], ends, self.discount)
                self.data["rows"].flatten(0, 1)[places, self.columns["return_to_go"]] = found[:, None]

    def _forget_without_pictures(self) -> None:
        """Drop the oldest transitions whose pictures were overwritten: at most two, at the end of an episode."""
        for _ in range(2):
            oldest = self._places(torch.arange(self.num_envs), torch.zeros_like(self.count))
            gone = (self.count > 0) & (self.data["at"].flatten()[oldest] < self.pictures.oldest)
            self.count -= gone.long()

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """Draw transitions uniformly, with replacement, from torch's global generator.

        Returns:
            The keys of `spec` `[B, ...]`; `reward` `[B]` is the discounted sum over the window, `terminated` and
            `next.*` are those of its last step, `discount` `[B]` is the factor of the value that follows.
        """
        env, age = self._draw(batch_size)
        first = last = self._places(env, age)
        batch = {}
        if self.steps == 1:
            factor = torch.full((batch_size,), self.discount)
        else:
            steps = torch.arange(max(self.n_step, self.chunk))
            ages = age[:, None] + steps  # [B, n]
            newest = (self.count[env] - 1)[:, None]
            window = self._places(env[:, None], ages.minimum(newest))
            ended = self.data["ended"].flatten()[window] | (ages >= newest)
            rewards = self.data["rows"].flatten(0, 1)[window, self.columns["reward"].start]
            batch["reward"], length, factor = n_step_return(rewards, ended, self.discount)
            last = window.gather(1, length[:, None]).squeeze(1)
            if self.chunk > 1:
                steps = steps[: self.chunk]
                batch["action_is_pad"] = steps > length[:, None]
                complete = ~batch["action_is_pad"][:, -1] | self.data["terminated"].flatten()[last]
                batch["complete"] = complete.float()
                batch["action"] = self._actions(window.gather(1, steps.minimum(length[:, None])))
            if self.next_action:
                following = (age + 1).minimum(newest.squeeze(1))
                batch["next.action"] = self._actions(self._places(env, following))
        whole = self._read(first, "")
        if last is not first:
            whole |= {k: v for k, v in self._read(last, "next.").items() if k.startswith("next.") or k == "terminated"}
        elif self.pictures.store:
            whole |= self._read(first, "next.")
        return whole | batch | {"discount": factor}

    def _drawable(self) -> Tensor:
        """Transitions of each environment `[N]`, the oldest ones, that may be drawn: those whose return is known."""
        return self.count - self.running.minimum(self.count) if self.to_go else self.count

    def _draw(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Draw transitions whose next action and return are known, where needed: environments and ages, `[B]` each."""
        known = self._drawable()
        bounds = known.cumsum(0)
        if not len(bounds) or not bounds[-1]:
            raise RuntimeError("the replay buffer is empty; --learning-starts must leave time to fill it")
        drawn = torch.randint(int(bounds[-1]), (batch_size,))
        for _ in range(1000):
            env = torch.searchsorted(bounds, drawn, right=True)  # [B]
            age = drawn - (bounds - known)[env]  # [B]
            if not self.next_action:
                return env, age
            place = self._places(env, age)
            last = self.data["ended"].flatten()[place] | (age == self.count[env] - 1)
            unknown = (last & ~self.data["terminated"].flatten()[place]).nonzero().squeeze(1)
            if not len(unknown):
                return env, age
            drawn[unknown] = torch.randint(int(bounds[-1]), (len(unknown),))
        raise RuntimeError("the replay buffer has no step whose next action is known; raise --learning-starts")

    def _places(self, env: Tensor, age: Tensor) -> Tensor:
        """Indices into the flattened rings of the transitions of `env` with these ages (0 is the oldest)."""
        return env * self.length + (self.head - self.count)[env].add(age).remainder(self.length)

    def _actions(self, places: Tensor) -> Tensor:
        """The actions at flat `places` `[...]`."""
        if "action" in self.packed:
            return self.data["rows"].flatten(0, 1)[places][..., self.columns["action"]]
        return self.data["action"].flatten(0, 1)[places]

    def _read(self, places: Tensor, prefix: str) -> dict[str, Tensor]:
        """The transitions at flat `places` `[B]`; their pictures before (`prefix` "") or after ("next.") the step."""
        rows = self.data["rows"].flatten(0, 1).index_select(0, places).split(self.widths, 1)
        named = zip(self.packed.items(), rows, strict=True)
        batch = {key: row.unflatten(1, shape) if shape else row.squeeze(1) for (key, shape), row in named}
        others = [*self.others, INTERVENTION] if INTERVENTION in self.data else self.others
        batch |= {key: self.data[key].flatten(0, 1).index_select(0, places) for key in dict.fromkeys(others)}
        if self.pictures.store:
            numbers = self.data["after" if prefix else "at"].flatten()[places]
            batch |= self.pictures.read(places // self.length, numbers, prefix)
        return batch

    def transitions(self) -> dict[str, Tensor]:
        """All transitions `[n, ...]`, by environment and oldest first; the newest of each environment is an end."""
        envs = torch.arange(self.num_envs).repeat_interleave(self.count)
        ages = torch.cat([torch.arange(int(count)) for count in self.count])
        places = self._places(envs, ages)
        found = self._read(places, "") | (self._read(places, "next.") if self.pictures.store else {})
        found |= {key: self.data[key].flatten(0, 1)[places] for key in ("ended", *self.beside)}
        found["ended"][self.count.cumsum(0)[self.count > 0] - 1] = True
        return found

    # ---- saving: each checkpoint writes the new transitions, and keeps the files of the one before ----

    def new_parts(self, rank: int) -> Parts:
        """The files that a checkpoint keeps from the one before, and the new one to write; see `saved`."""
        oldest = (self.total - self.count).tolist()
        kept = [part for part in self.parts if any(end > first for end, first in zip(part[1], oldest, strict=True))]
        new = {}
        self.pending = None
        if bool((self.total > self.saved_total).any() | self.saved_cut.any()):
            name = f"replay-rank-{rank}-{self.number:06d}"
            self.pending = (name, self.total.tolist())
            new[name] = {"envs": [self._new_of(env) for env in range(self.num_envs)], "cut": self.saved_cut.tolist()}
        self.parts = kept
        return Parts([name for name, _ in kept], new)

    def _new_of(self, env: int) -> dict[str, Any]:
        """New transitions of one environment since the last checkpoint, oldest first."""
        count = min(int(self.total[env] - self.saved_total[env]), int(self.count[env]))
        places = self._places(torch.tensor(env), torch.arange(count) + self.count[env] - count)
        columns = {key: column.flatten(0, 1)[places] for key, column in self.data.items()}
        return columns | {"pictures": self.pictures.new_of(env), "running": int(self.running[env])}

    def saved(self) -> None:
        """Record that the result of `new_parts` is in a valid checkpoint."""
        if self.pending is not None:
            self.parts.append(self.pending)
            self.number += 1
            self.saved_total, self.saved_cut = self.total.clone(), torch.zeros_like(self.saved_cut)
            self.pictures.saved = self.pictures.written.clone()

    def rewrite(self) -> None:
        """Write everything to the file of the next checkpoint, since one of the former files is damaged."""
        self.parts, self.saved_total = [], torch.zeros_like(self.total)
        self.saved_cut, self.pictures.saved = torch.zeros_like(self.saved_cut), torch.zeros_like(self.pictures.saved)

    def state_dict(self) -> dict[str, Any]:
        """The files of a checkpoint, and the number of environments and of transitions, ever added and stored."""
        parts = [list(part) for part in [*self.parts, *filter(None, [self.pending])]]
        return {"parts": parts, "envs": self.num_envs, "total": self.total.tolist(), "count": self.count.tolist()}

    def restore(self, state: dict[str, Any], first: int) -> bool:
        """Restore the state of this process or, when the number of processes has changed, of all former processes.

        Where the rings are shorter now, the newest transitions are kept. Those of a damaged file are left out, and
        counted in `left_out`; the episodes that they were part of are truncated before them.

        Args:
            state: {"buffer": its `state_dict`, "parts": trees of its files, oldest first, None for a damaged one}, or
                {"ranks": [the same of every former process]}.
            first: Index, over all processes, of this process's first environment.

        Returns:
            Whether a buffer was saved; else this one stays empty.
        """
        ranks = state.get("ranks", [state])
        if not all("parts" in rank.get("buffer", ()) for rank in ranks):
            return False
        start = -first if "ranks" in state else 0  # index, in this buffer, of the first environment of `rank`
        whole, wanted = True, torch.zeros_like(self.count)
        for rank in ranks:
            here = [number for number in range(start, start + rank["buffer"]["envs"]) if 0 <= number < self.num_envs]
            for part in rank.get("parts", ()):
                whole = whole and (part is not None or not here)
                for number in here:
                    if part is None:
                        self._skip(number)
                    else:
                        self._append(number, part["envs"][number - start], part["cut"][number - start])
            for number in here if "count" in rank["buffer"] else ():
                wanted[number] = rank["buffer"]["count"][number - start]
            start += rank["buffer"]["envs"]
        if self.to_go:
            self._know_returns()
        names = [name for name, _ in state["buffer"]["parts"]] if "ranks" not in state else []
        self.number = int(names[-1].rpartition("-")[2]) + 1 if names else 0
        if not whole:
            self.left_out = int((wanted.clamp(max=self.length) - self.count).clamp(min=0).sum())
        elif "ranks" not in state:
            self.parts = [(name, list(ends)) for name, ends in state["buffer"]["parts"]]
            self.total = torch.tensor(state["buffer"]["total"])
            self.saved_total = self.total.clone()
            self.pictures.saved = self.pictures.written.clone()
        return True

    def _skip(self, env: int) -> None:
        """Leave out a file's transitions of one environment: what comes before is truncated, what follows is apart."""
        if self.count[env]:
            self.data["ended"][env, (self.head[env] - 1) % self.length] = True
        self.running[env] = self.since_gap[env] = 0

    def _append(self, env: int, columns: dict[str, Any], cut: bool) -> None:
        """Add the transitions of one environment from one file; `cut` truncates the episode before them."""
        self._make_room(columns)
        if cut and self.count[env]:
            self.data["ended"][env, (self.head[env] - 1) % self.length] = True
        if self.since_gap[env] == 0 and self.pictures.store:  # a first picture is in the file that was left out
            found = columns["at"] >= columns["pictures"]["first"]
            columns = columns | {key: columns[key][found] for key in self.data if key in columns}
        count = len(columns["ended"])
        newest = torch.arange(max(count - self.length, 0), count)
        slots = (self.head[env] + newest) % self.length
        for key, column in self.data.items():
            column[env, slots] = columns[key][newest] if key in columns else _unknown(column)
        self.head[env] = (self.head[env] + count) % self.length
        self.count[env] = (self.count[env] + count).clamp(max=self.length)
        self.total[env] += count
        self.since_gap[env] += count
        self.running[env] = self.since_gap[env].clamp(max=columns["running"])
        if self.pictures.store:
            self.pictures.append(env, columns["pictures"])
            ages = torch.arange(int(self.count[env]))
            at = self.data["at"].flatten()[self._places(torch.tensor(env), ages)]
            self.count[env] -= int((at < self.pictures.oldest[env]).sum())


def _unknown(column: Tensor) -> Tensor:
    """What stands for a value that was not given, `()`: False for flags, or NaN."""
    return torch.tensor(math.nan if column.is_floating_point() else False, dtype=column.dtype)


class Pictures:
    """The newest pictures of each environment in ring buffers; a picture's number counts those before it.

    Args:
        spec: {key: {"shape", "dtype"}} of the pictures of an observation.
        num_envs, length: Number of rings, and transitions in each.
    """

    def __init__(self, spec: dict[str, Any], num_envs: int, length: int) -> None:
        self.length = length + 1  # a transition has two pictures
        shape = (num_envs, self.length)
        self.store = {k: torch.empty((*shape, *f["shape"]), dtype=getattr(torch, f["dtype"])) for k, f in spec.items()}
        self.written = torch.zeros(num_envs, dtype=torch.int64)
        self.saved = torch.zeros(num_envs, dtype=torch.int64)

    @property
    def oldest(self) -> Tensor:
        """The number of each environment's oldest picture, `[N]`."""
        return (self.written - self.length).clamp(min=0)

    def add(self, transitions: dict[str, Tensor], valid: Tensor, continues: Tensor) -> tuple[Tensor, Tensor]:
        """Add the pictures of transitions `[N, ...]` where `valid` holds; returns the numbers `[N]` of both.

        Args:
            continues: `[N]`, whether the step before was of the same episode, so that its successor is stored already.
        """
        self._write(transitions, "", (valid & ~continues).nonzero().squeeze(1))
        at = self.written - 1
        self._write(transitions, "next.", valid.nonzero().squeeze(1))
        return at, self.written - 1

    def _write(self, transitions: dict[str, Tensor], prefix: str, envs: Tensor) -> None:
        slots = self.written[envs] % self.length
        for key, store in self.store.items():
            store[envs, slots] = transitions[prefix + key][envs]
        self.written[envs] += 1

    def read(self, env: Tensor, number: Tensor, prefix: str) -> dict[str, Tensor]:
        """The pictures with these numbers `[B]`, under keys with `prefix`."""
        places = env * self.length + number % self.length
        return {prefix + key: store.flatten(0, 1).index_select(0, places) for key, store in self.store.items()}

    def new_of(self, env: int) -> dict[str, Any]:
        """New pictures of one environment since the last checkpoint, and the number of the first one."""
        first = max(int(self.saved[env]), int(self.oldest[env]))
        slots = torch.arange(first, int(self.written[env])) % self.length
        return {"first": first, "store": {key: store[env, slots] for key, store in self.store.items()}}

    def append(self, env: int, saved: dict[str, Any]) -> None:
        """Add the pictures that `new_of` returned."""
        count = len(next(iter(saved["store"].values())))
        numbers = torch.arange(max(count - self.length, 0), count)
        slots = (saved["first"] + numbers) % self.length
        for key, store in self.store.items():
            store[env, slots] = saved["store"][key][numbers]
        self.written[env] = saved["first"] + count
