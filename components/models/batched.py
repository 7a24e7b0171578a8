"""Layers of several networks of one size, which are evaluated together."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class BatchedLinear(nn.Module):
    """Linear layers of the first E members, `[E, B, inputs] -> [E, B, outputs]`, initialised as `nn.Linear`."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(
            torch.empty(members * outputs).uniform_(-bound, bound)
        )  # flat, so without weight decay

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        bias = self.bias.view(len(weight), 1, -1)
        if len(x) < len(weight):
            weight, bias = weight[: len(x)], bias[: len(x)]
        if (
            weight.shape[2] == 1 and x.device.type == "cpu"
        ):  # where a matrix product with one column takes six times as long
            return (x * weight.transpose(1, 2)).sum(2, keepdim=True) + bias
        return torch.baddbmm(bias, x, weight)


class BatchedLayerNorm(nn.Module):
    """LayerNorms of the first E members, `[E, B, D] -> [E, B, D]`."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.ones(members * width))
        self.bias = nn.Parameter(torch.zeros(members * width))

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (p.view(-1, 1, self.width) for p in (self.weight, self.bias))
        if len(x) < len(scale):
            scale, shift = scale[: len(x)], shift[: len(x)]
        return torch.addcmul(shift, functional.layer_norm(x, (self.width,)), scale)
