"""Denoiser of action chunks: a diffusion transformer with adaLN-Zero (Peebles & Xie, 2023, section 3.2).

Deviation from Chi et al. (2023), whose transformer attends to the observation by cross-attention with a causal mask:
here the observation scales and shifts every block, and each step of the chunk attends to all others.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..contracts import auxiliary_weights_of
from .attention import Attention, sinusoid
from .experts import ExpertsOptions, Heard, heard, means
from .mlp import concatenated, flat_sizes
from .sequence import check_attention
from .unet1d import TIME_SCALE

# Width, blocks and heads; those of the paper are the published policy's (Chi et al., 2023, table VIII: 256, 8, 4).
SIZES = {"small": (128, 3, 4), "paper": (256, 8, 4)}


@dataclass(frozen=True, kw_only=True)
class DiT(ExpertsOptions):
    """Diffusion transformer over the steps of a chunk; with experts, in the feed-forward network of every block."""

    size: Literal["small", "paper"] = "small"
    """Width 128 and 3 blocks, or the published 256 and 8."""
    width: int = 0
    """Width of a token; 0 takes that of --model.size."""
    layers: int = 0
    """Blocks; 0 takes those of --model.size."""
    heads: int = 4
    """Attention heads."""
    dropout: float = 0.0
    """Dropout probability of attention weights in training."""
    time_features: int = 256
    """Width of the embedding of the diffusion time."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for `spec`. Raises UserError: no vector observation or action, bad options."""
        width, layers, _ = SIZES[self.size]
        width, layers = self.width or width, self.layers or layers
        check_attention(width, self.heads, layers, self.dropout)
        self.check_experts()
        keys, observed, shape = flat_sizes(spec, "dit")
        network = DiffusionTransformer(
            keys, observed, shape, width, layers, self.heads, self.dropout, self.time_features
        )
        for block in network.blocks if self.experts > 1 else ():
            block.feed_forward = self.make_experts(width, 4 * width, width)
        return network


class DiffusionTransformer(nn.Module):
    """`(noisy chunk, time, condition(observation))` -> the trainer's prediction target, of the chunk's shape."""

    denoises = True

    def __init__(
        self,
        keys: list[str],
        observed: int,
        shape: tuple[int, ...],
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        time_features: int,
    ) -> None:
        super().__init__()
        self.keys, self.time_features = keys, time_features
        self.embed = nn.Linear(shape[-1], width)
        self.position = nn.Parameter(0.02 * torch.randn(shape[0] if len(shape) == 2 else 1, width))
        self.time_net = nn.Sequential(nn.Linear(time_features, width), nn.SiLU(), nn.Linear(width, width))
        self.observation_net = nn.Sequential(nn.Linear(observed, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(layers)])
        self.norm, self.modulate = nn.LayerNorm(width, elementwise_affine=False), zero_linear(width, 2 * width)
        self.out = zero_linear(width, shape[-1])

    def condition(self, observation: dict[str, Tensor]) -> Tensor:
        """The observation's part of the condition `[B, W]`, computed once for each chunk."""
        return self.observation_net(concatenated(observation, self.keys))

    @property
    def auxiliary_weights(self) -> dict[str, float]:
        """Weights of the experts' own losses."""
        return auxiliary_weights_of(self.blocks[0].feed_forward)

    def auxiliary(self, noisy: Tensor, time: Tensor, condition: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction, and the experts' own losses, means over the blocks."""
        losses: Heard = []
        return self(noisy, time, condition, losses), means(losses)

    def forward(self, noisy: Tensor, time: Tensor, condition: Tensor, losses: Heard | None = None) -> Tensor:
        """Noisy chunk `[B, Ta, Da]` or action `[B, Da]` at times `[B]`, or `[1]` for all, in [0, 1]."""
        c = functional.silu(self.time_net(sinusoid(TIME_SCALE * time, self.time_features)) + condition)
        x = self.embed(noisy if noisy.ndim == 3 else noisy[:, None]) + self.position  # [B, Ta, W]
        for block in self.blocks:
            x = block(x, c, losses)
        scale, shift = self.modulate(c)[:, None].chunk(2, dim=2)
        return self.out(self.norm(x) * (1 + scale) + shift).reshape(noisy.shape)


class Block(nn.Module):
    """Attention and feed-forward network, each scaled, shifted and gated by the condition; initially the identity."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attention = Attention(width, heads, dropout)
        layers = [nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)]
        self.feed_forward: nn.Module = nn.Sequential(*layers)
        self.modulate = zero_linear(width, 6 * width)

    def forward(self, x: Tensor, c: Tensor, losses: Heard | None = None) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulate(c)[:, None].chunk(6, dim=2)  # [B, 1, W] each
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(y, y, y)
        return x + gate2 * heard(self.feed_forward, self.norm2(x) * (1 + scale2) + shift2, losses)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that is initialised to zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
