"""The action-chunking transformer (ACT), a conditional VAE over chunks (Zhao et al., 2023, section IV, appendix C).

Layers are DETR's (Carion et al., 2020): LayerNorm after each part, positions added to queries and keys in every layer.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..contracts import auxiliary_weights_of
from ..data.features import vector_observations
from ..errors import UserError
from .attention import Attention, Dropout, sinusoid
from .experts import ExpertsOptions, Heard, heard, means
from .mlp import flat_sizes
from .sequence import check_attention


class Sizes(NamedTuple):
    """Width, feed-forward width, heads, and the layers of VAE encoder, encoder and decoder."""

    width: int
    feed_forward: int
    heads: int
    vae_layers: int
    encoder_layers: int
    decoder_layers: int


# Table III of the paper, but 1 decoder layer for its 7: the released code uses the output of the first one alone.
SIZES = {"small": Sizes(128, 512, 4, 2, 2, 1), "paper": Sizes(512, 3200, 8, 4, 4, 1)}


@dataclass(frozen=True, kw_only=True)
class ACTransformer(ExpertsOptions):
    """Transformer encoder and decoder with a latent variable for the style of a demonstration.

    Experts are in the feed-forward network of the decoder.
    """

    size: Literal["small", "paper"] = "small"
    """Width 128, feed-forward 512, 2 layers; or the published 512, 3200, 4."""
    width: int = 0
    """Width of a token; 0 takes that of --model.size."""
    layers: int = 0
    """Layers of either encoder; 0 takes those of --model.size."""
    heads: int = 0
    """Attention heads; 0 takes those of --model.size."""
    latent: int = 32
    """Width of the latent z."""
    dropout: float = 0.1
    """Dropout probability in attention, feed-forward network and after both, in training."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for `spec`. Raises UserError: no vector observation or chunk of actions, bad options."""
        sizes = SIZES[self.size]
        layers = self.layers or sizes.encoder_layers
        width, heads = self.width or sizes.width, self.heads or sizes.heads
        sizes = sizes._replace(width=width, heads=heads, vae_layers=layers, encoder_layers=layers)
        check_attention(sizes.width, sizes.heads, layers, self.dropout)
        if self.latent < 1:
            raise UserError(f"--model.latent {self.latent} must be 1 or more")
        self.check_experts()
        _, _, shape = flat_sizes(spec, "act")
        observed = {key: tuple(spec[key]["shape"]) for key in vector_observations(spec)}
        network = ACTNetwork(observed, shape, sizes, self.latent, self.dropout)
        for layer in network.decoder if self.experts > 1 else ():
            layer.feed_forward = self.make_experts(sizes.width, sizes.feed_forward, sizes.width)
        return network


class ACTNetwork(nn.Module):
    """Observations and latent -> chunk; in training, observations and chunk -> the latent's distribution.

    Deviation: each camera is one token, its encoder's features, instead of the paper's 300 tokens of a feature map.
    """

    predicts_chunks = True

    def __init__(
        self, observed: dict[str, tuple[int, ...]], action: tuple[int, ...], sizes: Sizes, latent: int, dropout: float
    ) -> None:
        super().__init__()
        self.action_shape, self.latent, dim = action, latent, sizes.width
        steps, action_width = action if len(action) == 2 else (1, *action)
        widths = {key: torch.Size(shape).numel() for key, shape in observed.items()}
        self.keys = list(observed)
        # The VAE's encoder q(z | a, o) takes the state and, for speed as in the paper, no pictures.
        self.vae_keys = [key for key in self.keys if key == "observation.state"]
        self.vae_embed = nn.ModuleList([nn.Linear(widths[key], dim) for key in self.vae_keys])
        self.vae_action = nn.Linear(action_width, dim)
        self.vae_class = nn.Parameter(torch.randn(dim))
        self.vae = nn.ModuleList([EncoderLayer(sizes, dropout) for _ in range(sizes.vae_layers)])
        self.vae_out = nn.Linear(dim, 2 * latent)
        position = sinusoid(torch.arange(1 + len(self.vae_keys) + steps), dim)
        self.register_buffer("vae_position", position, persistent=False)
        # The policy p(a | z, o).
        self.embed_latent = nn.Linear(latent, dim)
        self.embed = nn.ModuleList([nn.Linear(widths[key], dim) for key in self.keys])
        self.position = nn.Parameter(torch.randn(1 + len(self.keys), dim))
        self.encoder = nn.ModuleList([EncoderLayer(sizes, dropout) for _ in range(sizes.encoder_layers)])
        self.queries = nn.Parameter(torch.randn(steps, dim))
        self.decoder = nn.ModuleList([DecoderLayer(sizes, dropout) for _ in range(sizes.decoder_layers)])
        self.decoder_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, action_width)

    def latent_of(self, observation: dict[str, Tensor], chunk: Tensor, is_pad: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance `[B, Z]` of q(z | chunk `[B, Ta, Da]`, observation); padded steps are masked."""
        chunk = chunk if chunk.ndim == 3 else chunk[:, None]  # an action is a chunk of one
        first = self.vae_class.expand(chunk.shape[0], 1, -1)
        state = [
            layer(observation[k].flatten(1))[:, None] for k, layer in zip(self.vae_keys, self.vae_embed, strict=True)
        ]
        x = torch.cat([first, *state, self.vae_action(chunk)], dim=1)  # [B, 1 + keys + Ta, W]
        mask = None
        if is_pad is not None:
            always = torch.ones(chunk.shape[0], x.shape[1] - chunk.shape[1], dtype=torch.bool, device=x.device)
            mask = torch.cat([always, ~is_pad], dim=1)[:, None, None]  # [B, 1, 1, tokens], true to attend
        for layer in self.vae[:-1]:
            x = layer(x, self.vae_position, mask)
        x = self.vae[-1](x, self.vae_position, mask, queries=1)  # the last layer computes the class token alone
        mean, log_variance = self.vae_out(x[:, 0]).chunk(2, dim=1)
        return mean, log_variance

    @property
    def auxiliary_weights(self) -> dict[str, float]:
        """Weights of the experts' own losses."""
        return auxiliary_weights_of(self.decoder[0].feed_forward)

    def auxiliary(self, observation: dict[str, Tensor], latent: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The chunk, and the experts' own losses, means over the decoder's layers."""
        losses: Heard = []
        return self(observation, latent, losses), means(losses)

    def forward(
        self, observation: dict[str, Tensor], latent: Tensor | None = None, losses: Heard | None = None
    ) -> Tensor:
        """Chunk `[B, Ta, Da]` for z `[B, Z]`, or for the prior's mean 0, which inference uses."""
        tokens = [layer(observation[k].flatten(1)) for k, layer in zip(self.keys, self.embed, strict=True)]
        latent = tokens[0].new_zeros(tokens[0].shape[0], self.latent) if latent is None else latent
        memory = torch.stack([self.embed_latent(latent), *tokens], dim=1)  # [B, 1 + keys, W]
        for layer in self.encoder:
            memory = layer(memory, self.position)
        x = torch.zeros_like(self.queries).expand(memory.shape[0], -1, -1)  # [B, Ta, W]
        for layer in self.decoder:
            x = layer(x, self.queries, memory, self.position, losses)
        return self.out(self.decoder_norm(x)).reshape(x.shape[0], *self.action_shape)


class FeedForward(nn.Sequential):
    """Linear, ReLU, dropout, linear."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        wide, dim = sizes.feed_forward, sizes.width
        super().__init__(nn.Linear(dim, wide), nn.ReLU(), Dropout(dropout), nn.Linear(wide, dim))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each with a residual connection and a LayerNorm after it."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(sizes.width, sizes.heads, dropout)
        self.feed_forward = FeedForward(sizes, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None = None, queries: int | None = None) -> Tensor:
        """Tokens `[B, N, W]` -> the first `queries` of them, or all; `position` is `[N, W]`."""
        placed = x + position
        y = x[:, :queries]
        y = self.norm1(y + self.dropout(self.attention(placed[:, :queries], placed, x, mask)))
        return self.norm2(y + self.dropout(self.feed_forward(y)))


class DecoderLayer(nn.Module):
    """Self-attention of the chunk's steps, cross-attention to the encoder's tokens, feed-forward network."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        self.attention, self.cross = (Attention(sizes.width, sizes.heads, dropout) for _ in range(2))
        self.feed_forward: nn.Module = FeedForward(sizes, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(sizes.width) for _ in range(3))
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, position: Tensor, memory: Tensor, memory_position: Tensor, losses: Heard | None = None
    ) -> Tensor:
        placed = x + position
        x = self.norm1(x + self.dropout(self.attention(placed, placed, x)))
        x = self.norm2(x + self.dropout(self.cross(x + position, memory + memory_position, memory)))
        return self.norm3(x + self.dropout(heard(self.feed_forward, x, losses)))
