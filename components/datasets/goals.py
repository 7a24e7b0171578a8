"""Transitions with goals that are sampled among the states of the data, as in OGBench (Park et al., 2025).

The reward is -1 in each step, and 0 where the state is the goal; the task ends there (arXiv:2410.20092).
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..contracts import GOAL, STATE, Goals, GoalSampling
from ..errors import UserError
from .episodes import Batched, EpisodeDataset
from .mixture import through

OTHER_GOALS = ("value_goal", "subgoal", "high_target")  # states, too, with the statistics of states


def goal_transitions(data: dict[str, Any], trainer: str, goals: Goals) -> dict[str, Any]:
    """`data`, what a dataset's factory returned, with goals.

    Raises:
        UserError: other observations than `observation.state`, a history or chunks, data without episodes.
    """
    data = through(data, lambda dataset: GoalTransitions(dataset, trainer, goals), trainer)
    item, stats = data["dataset"][0], data["norm_stats"]
    stats |= {key: {"like": STATE} for key in (GOAL, *OTHER_GOALS) if key in item}
    return data | {"norm_stats": {key: value for key, value in stats.items() if key in item}}


def check_executed(source: EpisodeDataset, trainer: str) -> None:
    """Refuse actions in another form than they are executed in. Raises UserError."""
    if source.form is not None:
        raise UserError(
            f"{trainer} learns the value of actions as they are executed; leave out --dataset.action"
            f" {source.form.mode} and --dataset.rotations, which are for imitation"
        )


class GoalTransitions(Batched):
    """Steps of episodes with goals that are sampled for each batch.

    Items: observation.state `[Ds]`, next.observation.state, action `[Da]`, and observation.goal `[Ds]`, the actor's
    goal. With `value`, also value_goal `[Ds]`, and reward and terminated with respect to it. With `subgoal_steps`, also
    subgoal, the state that many steps later, and high_target: the subgoal, or the actor's goal where it is ahead and
    nearer.

    Args:
        source: The episodes.
        trainer: Name of the algorithm, for messages.
        goals: How they are drawn.

    Raises:
        UserError: as `goal_transitions`.
    """

    deterministic = False
    checked = True  # as the episodes are

    def __init__(self, source: EpisodeDataset, trainer: str, goals: Goals) -> None:
        data = source.episodes
        if set(data.observations) != {STATE}:
            found = ", ".join(data.observations)
            raise UserError(f"{trainer} draws goals among the states, {STATE!r} alone; {data.name} has {found}")
        if source.obs_steps > 1 or source.action_steps > 1:
            raise UserError(f"{trainer} takes single steps; leave out --dataset.obs-steps and --dataset.action-steps")
        if goals.value:
            check_executed(source, trainer)
        # All states in their order, with the last one of each episode where it is known.
        ends, states, steps = data.ends, data.observations[STATE], torch.arange(len(data.at))
        more = (data.after[ends - 1] >= 0).long()  # [E], states beyond the steps
        episode = torch.searchsorted(ends, steps, right=True)
        self.place = steps + (more.cumsum(0) - more)[episode]  # [N], the index of the state of each step
        self.final = (self.place[ends - 1] + more)[episode]  # [N], the index of its episode's last state
        order = torch.empty(len(steps) + int(more.sum()), dtype=torch.int64)
        order[self.place] = data.at
        order[self.final[ends - 1]] = torch.where(more > 0, data.after[ends - 1], data.at[ends - 1])
        self.states, self.actions, self.successors = states[order], data.columns["action"], (states, data.after)
        self.rows = source.rows[data.after[source.rows] >= 0]
        self.form, self.facts = source.form, source.facts
        if goals.discount == 1 and any(sampling and sampling.geometric for sampling in (goals.actor, goals.value)):
            raise UserError("with --trainer.discount 1 no goal has a geometric distance: leave the geometric ones out")
        self.actor, self.value = goals.actor, goals.value
        self.discount, self.subgoal_steps = goals.discount, goals.subgoal_steps

    def __len__(self) -> int:
        return len(self.rows)

    def get_batch(self, indices: Tensor, seed: int = 0) -> dict[str, Any]:
        """Steps `indices` `[B]` with goals sampled by `seed`."""
        generator = torch.Generator().manual_seed(seed)
        step = self.rows[indices]
        here, final = self.place[step], self.final[step]
        states, after = self.successors
        action = self.actions[step] if self.form is None else self.form.encode(self.actions[step], self.states[here])
        batch = {STATE: self.states[here], "action": action, f"next.{STATE}": states[after[step]]}
        if self.value is not None:
            goal = self.draw(self.value, here, final, generator)
            reached = goal == here
            batch |= {"value_goal": self.states[goal], "terminated": reached, "reward": reached.float() - 1}
        goal = self.draw(self.actor, here, final, generator)
        batch[GOAL] = self.states[goal]
        if self.subgoal_steps:
            ahead = torch.minimum(here + self.subgoal_steps, final)
            on_the_way = (here < goal) & (goal <= final)  # the goal is ahead in the same episode
            target = torch.where(on_the_way, torch.minimum(ahead, goal), ahead)
            batch |= {"subgoal": self.states[ahead], "high_target": self.states[target]}
        return batch

    def draw(self, sampling: GoalSampling, here: Tensor, final: Tensor, generator: torch.Generator) -> Tensor:
        """Sample goals: their indices `[B]` for states `here` of episodes whose last states are `final`."""
        count = len(here)
        anywhere = self.place[self.rows[torch.randint(len(self.rows), (count,), generator=generator)]]
        u = torch.rand(count, generator=generator).double()
        if sampling.geometric:
            distance = (torch.log1p(-u) / math.log(self.discount)).floor().long() + 1  # 1, 2, ...
            later = torch.minimum(here + distance, final)
        else:
            nearest = torch.minimum(here + 1, final)
            later = (nearest * u + final * (1 - u)).round().long()
        current, future, _ = sampling.shares
        choice = torch.rand(count, generator=generator)
        return torch.where(choice < current, here, torch.where(choice < current + future, later, anywhere))
