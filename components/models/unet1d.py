"""Denoiser of action chunks: a 1-D U-Net over time with FiLM (Chi et al., 2023, section III; Perez et al., 2018).

Activations are time-major, `[T, B, C]`, so that each tap of a convolution is one matrix product over a contiguous
slice. On a CPU and short chunks this is up to twice as fast as `conv1d`, since padding is not multiplied.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UserError
from .attention import sinusoid
from .mlp import concatenated, flat_sizes

# Channels and observation features: a network that 50 demonstrations train in minutes, and the published one.
SIZES = {"small": ((64, 128), 128), "paper": ((256, 512, 1024), 0)}
TIME_SCALE = 100.0  # scales times in [0, 1] to the paper's 100 steps of diffusion


@dataclass(frozen=True, kw_only=True)
class UNet1d:
    """1-D U-Net with FiLM."""

    size: Literal["small", "paper"] = "small"
    """Channels (64, 128), or the published (256, 512, 1024)."""
    channels: tuple[int, ...] = ()
    """Channels of each level; every level but the last halves the chunk. Empty takes those of --model.size."""
    kernel: int = 5
    """Width of the convolutions in steps."""
    groups: int = 8
    """Groups of GroupNorm."""
    time_features: int = 256
    """Width of the embedding of the diffusion time."""
    observation_features: int | None = None
    """Outputs of two layers over the observation before FiLM; 0 for no layers, as published; None takes the number of
    --model.size."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for `spec`. Raises UserError: no vector observation or action, bad options."""
        channels, features = SIZES[self.size]
        channels = self.channels or channels
        features = features if self.observation_features is None else self.observation_features
        if any(c < 1 or c % self.groups for c in channels) or self.groups < 1:
            raise UserError(f"--model.channels {channels} must be positive multiples of --model.groups {self.groups}")
        if self.kernel < 1 or self.kernel % 2 == 0 or self.time_features < 4:
            options = f"--model.kernel {self.kernel} must be odd, --model.time-features {self.time_features} 4 or more"
            raise UserError(options)
        if features < 0:
            raise UserError(f"--model.observation-features {features} must be 0 or more")
        keys, observed, shape = flat_sizes(spec, "unet1d")
        return ConditionalUNet(keys, observed, shape, channels, self.kernel, self.groups, self.time_features, features)


class ConditionalUNet(nn.Module):
    """`(noisy chunk, time, condition(observation))` -> the trainer's prediction target, of the chunk's shape."""

    denoises = True

    def __init__(
        self,
        keys: list[str],
        observed: int,
        shape: tuple[int, ...],
        channels: tuple[int, ...],
        kernel: int,
        groups: int,
        time_features: int,
        observation_features: int,
    ) -> None:
        super().__init__()
        self.keys, self.time_features, self.multiple = keys, time_features, 2 ** (len(channels) - 1)
        self.time_net = nn.Sequential(
            nn.Linear(time_features, 4 * time_features), nn.Mish(), nn.Linear(4 * time_features, time_features)
        )
        block = lambda inputs, outputs: ResidualBlock(inputs, outputs, kernel, groups)  # noqa: E731
        pairs = list(zip((shape[-1], *channels[:-1]), channels, strict=True))
        self.down = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(pairs):
            last = i == len(pairs) - 1
            self.down.append(
                nn.ModuleList(
                    [block(inputs, outputs), block(outputs, outputs), nn.Identity() if last else Halve(outputs)]
                )
            )
        self.middle = nn.ModuleList([block(channels[-1], channels[-1]), block(channels[-1], channels[-1])])
        self.up = nn.ModuleList()
        for inputs, outputs in reversed(pairs[1:]):
            self.up.append(nn.ModuleList([block(2 * outputs, inputs), block(inputs, inputs), Double(inputs)]))
        self.final = ConvBlock(channels[0], channels[0], kernel, groups)
        self.out = nn.Linear(channels[0], shape[-1])
        # FiLM alone is linear in mish(state): without the two layers, pick-place from 50 demonstrations succeeds
        # less often than with plain regression.
        self.observation_net: nn.Module = nn.Identity()
        if observation_features:
            layers = [nn.Linear(observed, 2 * observation_features), nn.Mish()]
            self.observation_net = nn.Sequential(*layers, nn.Linear(2 * observation_features, observation_features))
            observed = observation_features
        # FiLM of all blocks is one product for each input: W [time, observation] + b is W_t time + b plus
        # W_o observation, and the latter is constant over the steps of sampling.
        self.sizes = [2 * m.channels for m in self.modules() if isinstance(m, ResidualBlock)]
        self.film_time = nn.Linear(time_features, sum(self.sizes))
        self.film_observation = nn.Linear(observed, sum(self.sizes), bias=False)

    def condition(self, observation: dict[str, Tensor]) -> Tensor:
        """The observation's part of FiLM `[B, F]`, computed once for each chunk."""
        observed = self.observation_net(concatenated(observation, self.keys))
        return self.film_observation(functional.mish(observed))

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Noisy chunk `[B, Ta, Da]` or action `[B, Da]` at times `[B]`, or `[1]` for all, in [0, 1]."""
        embedded = self.time_net(sinusoid(TIME_SCALE * time, self.time_features))
        film = iter((self.film_time(functional.mish(embedded)) + condition).split(self.sizes, dim=1))
        x = noisy if noisy.ndim == 3 else noisy[:, None]
        steps = x.shape[1]
        x = functional.pad(x, (0, 0, 0, -steps % self.multiple)).transpose(0, 1)  # [T, B, Da]
        skips = []
        level: Any
        for level in self.down:
            first, second, halve = level
            x = second(first(x, next(film)), next(film))
            skips.append(x)
            x = halve(x)
        for middle in self.middle:
            x = middle(x, next(film))
        for level in self.up:
            first, second, double = level
            x = torch.cat([x, skips.pop()], dim=2)
            x = double(second(first(x, next(film)), next(film)))
        x = self.out(self.final(x)).transpose(0, 1)[:, :steps]
        return x.reshape(noisy.shape)


class ResidualBlock(nn.Module):
    """Two convolutions with FiLM (scale and shift of each channel) between them, and a residual connection."""

    def __init__(self, inputs: int, channels: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.channels = channels
        self.first = ConvBlock(inputs, channels, kernel, groups)
        self.second = ConvBlock(channels, channels, kernel, groups)
        self.around = nn.Linear(inputs, channels) if inputs != channels else nn.Identity()

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        scale, shift = film.chunk(2, dim=1)  # [B or 1, C] each
        return self.second(torch.addcmul(shift, scale, self.first(x))) + self.around(x)


class ConvBlock(nn.Module):
    """Convolution, GroupNorm, Mish; all `[T, B, C]`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv, self.groups = Conv(inputs, outputs, kernel), groups
        self.weight, self.bias = nn.Parameter(torch.ones(outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.by_library(x)
        y = self.conv(x)
        y = y - self.mean(y)
        scale = (self.mean(y * y) + 1e-5).rsqrt() * self.weight  # [B, C]
        return functional.mish(torch.addcmul(self.bias, y, scale))

    def by_library(self, x: Tensor) -> Tensor:
        """The same by torch's kernels, which are fewer and therefore faster on a GPU."""
        weight = self.conv.weight.permute(2, 1, 0)  # [Co, Ci, K]
        y = functional.conv1d(x.permute(1, 2, 0), weight, self.conv.bias, padding=weight.shape[2] // 2)  # [B, Co, T]
        return functional.mish(functional.group_norm(y, self.groups, self.weight, self.bias)).permute(2, 0, 1)

    def mean(self, y: Tensor) -> Tensor:
        """Mean over all steps and over the channels of each group, for every channel: `[T, B, C] -> [B, C]`."""
        # [B, G, C / G]; over time first, where memory is contiguous.
        grouped = y.mean(0).unflatten(1, (self.groups, -1))
        return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


class Conv(nn.Module):
    """Convolution over time `[T, B, Ci] -> [T, B, Co]` with zero padding and an odd kernel."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs * kernel)
        self.weight = nn.Parameter(torch.empty(kernel, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        kernel, steps = len(self.weight), len(x)
        if torch.compiler.is_exporting():  # with few operations, since every sampling step is traced
            padded = functional.pad(x, (0, 0, 0, 0, kernel // 2, kernel // 2))
            windows = torch.cat([padded[j : j + steps] for j in range(kernel)], 2)  # [T, B, K Ci]
            return functional.linear(windows, self.weight.flatten(0, 1).T, self.bias)
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, weight, bias))
        return Taps.apply(x, weight, bias)


class Taps(torch.autograd.Function):
    """y[t] = b + sum_j x[t + j - k/2] w[j]: one matrix product for each tap, over the rows inside the sequence."""

    @staticmethod
    def slices(steps: int, kernel: int) -> list[tuple[int, slice, slice]]:
        """(tap, its rows of the output, its rows of the input)."""
        offsets = ((j, j - kernel // 2) for j in range(kernel))
        rows = ((j, o, max(0, -o), min(steps, steps - o)) for j, o in offsets)
        return [(j, slice(low, high), slice(low + o, high + o)) for j, o, low, high in rows if low < high]

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        y = bias.repeat(*x.shape[:2], 1)  # a copy even for one row
        for j, out, into in Taps.slices(len(x), len(weight)):
            y[out].flatten(0, 1).addmm_(x[into].flatten(0, 1), weight[j])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad, grad_x, grad_weight = grad.contiguous(), torch.zeros_like(x), torch.zeros_like(weight)
        learns = ctx.needs_input_grad[1]  # guidance only differentiates by x
        for j, out, into in Taps.slices(len(x), len(weight)):
            rows = grad[out].flatten(0, 1)
            grad_x[into].flatten(0, 1).addmm_(rows, weight[j].T)
            if learns:
                torch.mm(x[into].flatten(0, 1).T, rows, out=grad_weight[j])
        return grad_x, grad_weight, grad.sum((0, 1))


class Halve(nn.Module):
    """Convolution of width 3 and stride 2, `[T, B, C] -> [T / 2, B, C]`; T even."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Linear(3 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        before = functional.pad(x, (0, 0, 0, 0, 1, 0))  # before[t] is x[t - 1]
        return self.net(torch.cat([before[:-1:2], x[::2], x[1::2]], dim=2))


class Double(nn.Module):
    """Transposed convolution of width 4 and stride 2, `[T, B, C] -> [2 T, B, C]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.even, self.odd = nn.Linear(2 * channels, channels), nn.Linear(2 * channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        padded = functional.pad(x, (0, 0, 0, 0, 1, 1))
        even = self.even(torch.cat([padded[:-2], x], dim=2))
        odd = functional.linear(torch.cat([x, padded[2:]], dim=2), self.odd.weight, self.even.bias)
        return torch.stack([even, odd], 1).flatten(0, 1)
