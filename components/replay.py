"""Replay buffer: resident, one packed row a transition, so that a batch is one indexed read."""

import math
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .returns import n_step_return


class ReplayBuffer:
    """The newest transitions of each of this process's environments, in rings of their own.

    Keys of `spec` in float32 lie side by side in one row; uint8 pictures and flags in tensors of their own. A window of
    n steps never crosses the end of an episode, nor the newest transition of its environment.

    Args:
        spec: {key: {"shape", "dtype"}} of a transition: observation, action, reward, terminated, `next.` observation.
        size: Transitions to keep over all processes, divided among the environments.
        num_envs: Environments over all processes.
        mine: How many of them are this process's.
        options: The trainer's options; its `n_step` (otherwise 1) and `discount` (otherwise 0.99) shape the batches.

    Raises:
        UserError: no room for one transition per environment, or not enough memory.
    """

    def __init__(self, spec: dict[str, Any], size: int, num_envs: int, mine: int, options: Any) -> None:
        self.n_step, self.discount = int(getattr(options, "n_step", 1)), float(getattr(options, "discount", 0.99))
        self.length, self.num_envs = size // num_envs, mine
        if self.length < self.n_step:
            raise UserError(f"--buffer-size {size} has no room for {self.n_step} steps of {num_envs} environments")
        self.packed = {key: tuple(f["shape"]) for key, f in spec.items() if f["dtype"] == "float32"}
        self.widths = [math.prod(shape) for shape in self.packed.values()]
        self.reward_column = sum(self.widths[: list(self.packed).index("reward")])
        shapes = {"rows": ((sum(self.widths),), torch.float32), "ended": ((), torch.bool)}
        for key, feature in spec.items():
            if key not in self.packed:
                shapes[key] = (tuple(feature["shape"]), getattr(torch, feature["dtype"]))
        try:
            self.data = {k: torch.empty((mine, self.length, *shape), dtype=d) for k, (shape, d) in shapes.items()}
        except RuntimeError as error:
            raise UserError(f"--buffer-size {size} needs more memory than there is; choose a smaller one") from error
        self.head = torch.zeros(mine, dtype=torch.int64)  # where each environment's next transition goes
        self.count = torch.zeros(mine, dtype=torch.int64)

    def __len__(self) -> int:
        """Transitions of this process."""
        return int(self.count.sum())

    def megabytes(self, steps: int) -> float:
        """What it takes after so many steps of each environment, on this process, in memory and in a checkpoint."""
        full = sum(tensor.numel() * tensor.element_size() for tensor in self.data.values()) / 1e6
        return full * min(steps, self.length) / self.length

    def add(self, transitions: dict[str, Tensor]) -> None:
        """Add a transition `[N, ...]` of each environment where `valid` `[N]` holds; `ended` `[N]` ends episodes."""
        envs = transitions["valid"].nonzero().squeeze(1)
        slots = self.head[envs]
        rows = [transitions[key].reshape(self.num_envs, -1) for key in self.packed]
        for key, column in self.data.items():
            column[envs, slots] = (torch.cat(rows, 1) if key == "rows" else transitions[key])[envs]
        self.head[envs] = (slots + 1) % self.length
        self.count[envs] = (self.count[envs] + 1).clamp(max=self.length)

    def cut(self) -> None:
        """Mark each environment's newest transition as the last one of its episode: truncated."""
        envs = self.count.nonzero().squeeze(1)
        self.data["ended"][envs, (self.head[envs] - 1) % self.length] = True

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """Draw transitions uniformly, with replacement, from torch's global generator.

        Returns:
            The keys of `spec` `[B, ...]`; `reward` `[B]` is the sum over n steps, `terminated` and `next.*` those of
            the window's last step, `discount` `[B]` the factor of the value that follows.
        """
        bounds = self.count.cumsum(0)
        if not len(bounds) or not bounds[-1]:
            raise RuntimeError("the replay buffer is empty; --learning-starts must leave time to fill it")
        drawn = torch.randint(int(bounds[-1]), (batch_size,))
        env = torch.searchsorted(bounds, drawn, right=True)  # [B]
        age = drawn - (bounds - self.count)[env]  # [B], 0 is the oldest
        first = self._places(env, age)
        if self.n_step == 1:
            last, reward, factor = first, None, torch.full((batch_size,), self.discount)
        else:
            ages = age[:, None] + torch.arange(self.n_step)  # [B, n]
            newest = (self.count[env] - 1)[:, None]
            window = self._places(env[:, None], ages.minimum(newest))
            ended = self.data["ended"].flatten()[window] | (ages >= newest)
            rewards = self.data["rows"].flatten(0, 1)[window, self.reward_column]
            reward, step, factor = n_step_return(rewards, ended, self.discount)
            last = window.gather(1, step[:, None]).squeeze(1)
        batch = self._read(first)
        if reward is not None:
            batch |= {k: v for k, v in self._read(last).items() if k.startswith("next.") or k == "terminated"}
            batch["reward"] = reward
        return batch | {"discount": factor}

    def _places(self, env: Tensor, age: Tensor) -> Tensor:
        """Where the transitions of `env` lie that have so many older ones, in the flattened rings."""
        return env * self.length + (self.head - self.count)[env].add(age).remainder(self.length)

    def _read(self, places: Tensor) -> dict[str, Tensor]:
        """The transitions at flat `places` `[B]`."""
        rows = self.data["rows"].flatten(0, 1).index_select(0, places).split(self.widths, 1)
        batch = {key: row.unflatten(1, shape) if shape else row.squeeze(1) for (key, shape), row in self._zip(rows)}
        others = (key for key in self.data if key not in ("rows", "ended"))
        return batch | {key: self.data[key].flatten(0, 1).index_select(0, places) for key in others}

    def _zip(self, rows: Any) -> Any:
        return zip(self.packed.items(), rows, strict=True)

    def state_dict(self) -> dict[str, Any]:
        """The filled part only: for each environment its transitions, oldest first."""
        ages = [torch.arange(int(count)) for count in self.count]
        places = [self._places(torch.tensor(env), age) for env, age in enumerate(ages)]
        return {"envs": [{key: c.flatten(0, 1)[p] for key, c in self.data.items()} for p in places]}

    def restore(self, own: dict[str, Any], first: int) -> bool:
        """Restore from what this process saved, or, when their number has changed, from what all processes saved.

        Where the rings are shorter now, the newest transitions are kept.

        Args:
            own: {"buffer": its `state_dict`}, or {"ranks": [the same of every former process]}.
            first: Index, over all processes, of this process's first environment.

        Returns:
            Whether there was a buffer; it is empty otherwise.
        """
        ranks = own.get("ranks", [own])
        if not all("buffer" in rank for rank in ranks):
            return False
        envs = [columns for rank in ranks for columns in rank["buffer"]["envs"]]
        for env, columns in enumerate(envs[first:][: self.num_envs] if "ranks" in own else envs):
            count = min(len(columns["ended"]), self.length)
            for key, column in columns.items():
                self.data[key][env, :count] = column[len(column) - count :]
            self.head[env], self.count[env] = count % self.length, count
        return True
