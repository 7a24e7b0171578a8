"""Parts of transformers: attention (Vaswani et al., 2017), dropout, sinusoidal positions."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Multi-head attention, batch first, which does not return its weights."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        for layer in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries `[B, N, D]`, keys and values `[B, M, D]` -> `[B, N, D]`; `mask` `[B, 1, 1, M]` is true to attend."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, D / heads]
            for layer, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        dropout = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out(attended.transpose(1, 2).flatten(2))


class Dropout(nn.Dropout):
    """`nn.Dropout` whose mask uses 16 random bits per entry on a CPU: 5 times as fast, with p exact to 2^-17."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p) or x.device.type != "cpu":
            return super().forward(x)
        words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),))  # of 64 random bits each
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        dropped = round(self.p * 2**16)
        return x * (bits >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))


def sinusoid(position: Tensor, dim: int, longest: float = 10_000.0) -> Tensor:
    """Sines and cosines of wavelengths from 2 pi to 2 pi * longest, `[N] -> [N, dim]`."""
    half = dim // 2
    frequency = torch.exp(-math.log(longest) / max(half - 1, 1) * torch.arange(half, device=position.device))
    angle = position[:, None] * frequency  # [N, dim / 2]
    return functional.pad(torch.cat([angle.sin(), angle.cos()], 1), (0, dim % 2))
