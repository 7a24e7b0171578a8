"""Returns over several steps, with the borders where episodes end and where the data ends."""

import torch
from torch import Tensor


def n_step_return(reward: Tensor, ended: Tensor, discount: float) -> tuple[Tensor, Tensor, Tensor]:
    """Discounted sum of the rewards of a window, cut after its first step that ends.

    Args:
        reward: `[B, n]`, from now on.
        ended: `[B, n]` bool, the last step that is known of an episode: terminated, truncated, or the newest one.
        discount: Factor per environment step.

    Returns:
        (sum_{i <= last} discount^i r_i `[B]`, last `[B]` int64, discount^(last + 1) `[B]`). The target of the first
        step bootstraps, by that factor, from the observation after step `last`, unless that step terminated.
    """
    before = torch.zeros_like(ended)
    before[:, 1:] = ended[:, :-1].cumsum(1) > 0  # an earlier step ended
    counts = (~before).to(reward.dtype)  # [B, n]
    powers = discount ** torch.arange(reward.shape[1], dtype=reward.dtype, device=reward.device)
    last = counts.sum(1).long() - 1
    return (counts * powers * reward).sum(1), last, powers[last] * discount


def returns_to_go(reward: Tensor, terminated: Tensor, ends: Tensor, discount: float) -> Tensor:
    """Discounted sum of the rewards `[N]` from each step to the first that terminates, or the last of its episode.

    Args:
        reward, terminated: `[N]`, episodes one after the other.
        ends: `[E]` int64, the step after each episode's last one.
        discount: Factor per environment step.
    """
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))
    returns, factor = reward.double(), discount * (~terminated).double()
    for back in range(1, int(lengths.max())):  # all episodes together, from their ends
        row = ends[lengths > back] - 1 - back
        returns[row] += factor[row] * returns[row + 1]
    return returns.to(reward.dtype)


def generalised_advantage(delta: Tensor, ended: Tensor, decay: float) -> Tensor:
    """A_t = delta_t + decay A_{t+1} `[T, N]`, 0 beyond an episode's end and the rollout's (Schulman et al., 2016).

    Args:
        delta: `[T, N]`, one-step errors of the value function, which know what follows the last step of an episode.
        ended: `[T, N]` bool, the last steps of episodes, terminated or truncated.
        decay: gamma lambda.
    """
    factors, advantage = decay * (~ended).to(delta.dtype), torch.zeros_like(delta)
    following = torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        following = advantage[t] = delta[t] + factors[t] * following
    return advantage
