"""Chunks that continue the previous one, for samplers that denoise: guidance while acting, or conditioning in training.

While a chunk is planned, the robot executes d more actions of the old one. Either the sampler is guided towards the old
chunk (real-time chunking: Black, Galliker & Levine, 2025, arXiv:2506.07339), or the network has learned to continue d
given actions (Black et al., 2025, arXiv:2512.05964). A batch then has

    previous          [B, Ta, Da]   Y, the rest of the old chunk, in the new one's time; normalised
    previous_weight   [B, Ta]       the diagonal of W, the soft mask of arXiv:2506.07339, eq. 5
    prefix            [B]           d; these actions are returned exactly as they are in `previous`

Deviation from arXiv:2512.05964, whose transformer gets a time for each step of the chunk, 1 for the given ones: here a
mark is a further entry of each step's action. With the common time it tells the same, and any denoiser can learn it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import UserError

Network = Callable[[Tensor, Tensor, Any], Tensor]


def vjp(function: Callable[..., Tensor], x: Tensor, *others: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """y = f(x, *others), and the product u -> u^T dy/dx; leaves no gradient, whatever the mode is outside."""
    with torch.inference_mode(False), torch.enable_grad():
        # A tensor of inference mode cannot be saved for the backward pass.
        usable = lambda value: value.clone() if isinstance(value, Tensor) and value.is_inference() else value  # noqa: E731
        x = usable(x).detach().requires_grad_()
        y = function(x, *map(usable, others))

    def product(vector: Tensor) -> Tensor:
        with torch.inference_mode(False):
            (gradient,) = torch.autograd.grad(y, x, usable(vector).to(y.dtype), materialize_grads=True)
        return gradient.detach()

    return y.detach(), product


def ended(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """A chunk `[B, Ta, Da]` whose first `prefix` actions are those of `previous`, if the batch has one."""
    return torch.where(first(batch["prefix"], x), batch["previous"].to(x.dtype), x) if "previous" in batch else x


def first(lengths: Tensor, chunk: Tensor) -> Tensor:
    """Which are the first `lengths` `[B]` steps of chunks `[B, Ta, Da]`: bool `[B, Ta, 1]`."""
    return (torch.arange(chunk.shape[1], device=chunk.device) < lengths[:, None])[..., None]


# ---- networks that continue given actions --------------------------------------------------------------------------


def spec_with_mark(spec: dict[str, Any], most: int) -> dict[str, Any]:
    """The spec of a denoiser whose chunks have a mark in each step, if up to `most` of them are given.

    Raises:
        UserError: `most` is negative, or leaves no step of the chunk to be learned.
    """
    shape = tuple(spec["action"]["shape"]) if "action" in spec else ()
    steps = shape[0] if "action_is_pad" in spec else 1
    if not 0 <= most < steps:
        raise UserError(
            f"--trainer.prefix {most} must be 0 to {steps - 1}, less than the chunk (--dataset.action-steps)"
        )
    return spec | {"action": {**spec["action"], "shape": (*shape[:-1], shape[-1] + 1)}} if most else spec


def marked(x: Tensor, known: Tensor, given: Tensor) -> Tensor:
    """Noisy chunks `[B, Ta, Da]`, the `known` actions where `given` `[B, Ta, 1]`, and that mark: `[B, Ta, Da + 1]`."""
    return torch.cat([torch.where(given, known.to(x.dtype), x), given.to(x.dtype)], dim=-1)


def trained_on(network: Network, action: Tensor, most: int, is_pad: Tensor | None) -> tuple[Network, Tensor | None]:
    """The network in training, where d ~ U{0 .. most} actions of each chunk `[B, Ta, Da]` are given.

    Returns:
        The network with the unmarked chunk's shapes, and the steps `[B, Ta]` that the loss leaves out.
    """
    if not most:
        return network, is_pad
    given = first((torch.rand_like(action[:, 0, 0]) * (most + 1)).long(), action)
    unmarked = lambda x, *others: network(marked(x, action, given), *others)[..., :-1]  # noqa: E731
    return unmarked, given[..., 0] if is_pad is None else given[..., 0] | is_pad


def acting_on(network: nn.Module, batch: dict[str, Tensor], most: int) -> Network:
    """The network when acting: one that was trained so is given the first `prefix` actions of `previous`, if any.

    One that is to be guided instead has no gradients by its weights, which take a third of the time.
    """
    if not most and "previous" in batch:
        constant = {name: weight.detach() for name, weight in network.named_parameters()}
        return lambda *inputs: functional_call(network, constant, inputs)
    if not most:
        return network

    def unmarked(x: Tensor, *others: Any) -> Tensor:
        given = first(batch["prefix"], x) if "previous" in batch else torch.zeros_like(x[..., :1], dtype=torch.bool)
        return network(marked(x, batch.get("previous", x), given), *others)[..., :-1]

    return unmarked
