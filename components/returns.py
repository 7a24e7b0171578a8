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
