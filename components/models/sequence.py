"""Sequence networks over the observation history: a GRU and a transformer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.features import vector_observations, width
from ..errors import UserError
from .attention import Attention, Dropout
from .heads import Headed, HeadOptions, Mixture


@dataclass(frozen=True, kw_only=True)
class GRU(HeadOptions):
    """Gated recurrent units over the history (Cho et al., 2014); the action is computed from the last state."""

    hidden: int = 256
    """Width of the state."""
    layers: int = 1
    """Recurrent layers."""
    dropout: float = 0.0
    """Dropout probability of an output between layers in training."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for `spec`. Raises UserError: no vector observation or action, bad options."""
        if min(self.hidden, self.layers) < 1 or not 0 <= self.dropout < 1:
            sizes = f"--model.hidden {self.hidden} and --model.layers {self.layers}"
            raise UserError(f"{sizes} must be positive, --model.dropout {self.dropout} in [0, 1)")
        keys, inputs, shape = sequence_sizes(spec)
        net = nn.GRU(inputs, self.hidden, self.layers, batch_first=True, dropout=self.dropout)
        return GRUPolicy(net, self.make_head(self.hidden, shape), keys)


class GRUPolicy(Headed):
    """Observations `[B, To, D]` -> action of the last step."""

    def __init__(self, net: nn.GRU, head: nn.Module, keys: list[str]) -> None:
        super().__init__()
        self.net, self.head, self.keys = net, head, keys

    def features(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        """The head's input `[B, H]`."""
        states, _ = self.net(sequence(observation, self.keys))  # [B, To, H]
        return states[:, -1]

    def forward(self, observation: dict[str, Tensor] | Tensor) -> Tensor | Mixture:
        return self.head(self.features(observation))


@dataclass(frozen=True, kw_only=True)
class Transformer(HeadOptions):
    """Pre-LayerNorm transformer over the history (Xiong et al., 2020); the action is computed from the last token."""

    width: int = 128
    """Width of a token."""
    layers: int = 2
    """Blocks of attention and feed-forward network."""
    heads: int = 4
    """Attention heads."""
    dropout: float = 0.0
    """Dropout probability of attention weights and of a block's outputs in training."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for `spec`. Raises UserError: no vector observation or action, bad options."""
        check_attention(self.width, self.heads, self.layers, self.dropout)
        keys, inputs, shape = sequence_sizes(spec)
        history = spec[keys[0]]["shape"][0] if len(spec[keys[0]]["shape"]) > 1 else 1
        blocks = [Block(self.width, self.heads, self.dropout) for _ in range(self.layers)]
        return TransformerPolicy(inputs, history, self.width, blocks, self.make_head(self.width, shape), keys)


def check_attention(width: int, heads: int, layers: int, dropout: float) -> None:
    """Refuse invalid sizes of a transformer. Raises UserError naming the option."""
    if min(width, heads, layers) < 1 or not 0 <= dropout < 1:
        sizes = f"--model.width {width}, --model.heads {heads} and --model.layers {layers}"
        raise UserError(f"{sizes} must be positive, --model.dropout {dropout} in [0, 1)")
    if width % heads:
        raise UserError(f"--model.width {width} must be a multiple of --model.heads {heads}")


class Block(nn.Module):
    """Attention and feed-forward network, each with a LayerNorm before it and a residual connection."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        layers = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
        self.feed_forward, self.dropout = nn.Sequential(*layers), Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, y, y))
        return x + self.dropout(self.feed_forward(x))


class TransformerPolicy(Headed):
    """Observations `[B, To, D]` -> action of the last step."""

    def __init__(
        self, inputs: int, history: int, width: int, blocks: list[Block], head: nn.Module, keys: list[str]
    ) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm = nn.Linear(inputs, width), nn.Sequential(*blocks), nn.LayerNorm(width)
        self.position = nn.Parameter(0.02 * torch.randn(history, width))
        self.head, self.keys = head, keys

    def features(self, observation: dict[str, Tensor] | Tensor) -> Tensor:
        """The head's input `[B, W]`."""
        x = self.blocks(self.embed(sequence(observation, self.keys)) + self.position)  # [B, To, W]
        return self.norm(x[:, -1])

    def forward(self, observation: dict[str, Tensor] | Tensor) -> Tensor | Mixture:
        return self.head(self.features(observation))


def sequence_sizes(spec: dict[str, Any]) -> tuple[list[str], int, tuple[int, ...]]:
    """The keys of the vector observations, the sum of their widths in one step, and the shape of the action."""
    keys = vector_observations(spec)
    width(spec, "action")
    return keys, sum(width(spec, key) for key in keys), tuple(spec["action"]["shape"])


def sequence(observation: dict[str, Tensor] | Tensor, keys: list[str]) -> Tensor:
    """The vector observations of each step, concatenated to `[B, To, D]`; To is 1 without a history."""
    parts = [observation] if isinstance(observation, Tensor) else [observation[key] for key in keys]
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return joined if joined.ndim == 3 else joined[:, None]
