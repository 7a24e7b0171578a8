"""Returns over several steps that respect the ends of episodes and of the data."""

import torch
from torch import Tensor


def n_step_return(reward: Tensor, ended: Tensor, discount: float) -> tuple[Tensor, Tensor, Tensor]:
    """Discounted sum of the rewards of a window, cut after the first step at which an episode ends.

    Args:
        reward: `[B, n]`, from the current step on.
        ended: `[B, n]` bool, the last known steps of episodes: terminated, truncated, or the newest ones.
        discount: Factor per environment step.

    Returns:
        (sum_{i <= last} discount^i r_i `[B]`, last `[B]` int64, discount^(last + 1) `[B]`). The target of the first
        step bootstraps by the last factor from the observation after step `last`, unless that step terminated.
    """
    before = torch.zeros_like(ended)
    before[:, 1:] = ended[:, :-1].cumsum(1) > 0  # an earlier step ended
    counts = (~before).to(reward.dtype)  # [B, n]
    powers = discount ** torch.arange(reward.shape[1], dtype=reward.dtype, device=reward.device)
    last = counts.sum(1).long() - 1
    return (counts * powers * reward).sum(1), last, powers[last] * discount


def returns_to_go(reward: Tensor, terminated: Tensor, ends: Tensor, discount: float) -> Tensor:
    """Discounted sum of the rewards `[N]` from each step to the next terminated step, or to its episode's end.

    Args:
        reward, terminated: `[N]`, episodes one after the other.
        ends: `[E]` int64, the step after each episode's last one.
        discount: Factor per environment step.
    """
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
    returns, factor = reward.double(), discount * (~terminated).double()
    for back in range(1, int(lengths.max())):  # all episodes at once, from their ends backwards
        row = ends[lengths > back] - 1 - back
        returns[row] += factor[row] * returns[row + 1]
    return returns.to(reward.dtype)


def generalised_advantage(delta: Tensor, ended: Tensor, decay: float) -> Tensor:
    """A_t = delta_t + decay A_{t+1} `[T, N]`, 0 after the end of an episode or rollout (Schulman et al., 2016).

    Args:
        delta: `[T, N]`, one-step errors of the value function, which include the value after an episode's last step.
        ended: `[T, N]` bool, the last steps of episodes, terminated or truncated.
        decay: gamma lambda.
    """
    factors, advantage = decay * (~ended).to(delta.dtype), torch.zeros_like(delta)
    following = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        following = advantage[t] = delta[t] + factors[t] * following
    return advantage
