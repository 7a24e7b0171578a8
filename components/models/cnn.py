"""Convolutional encoder of each camera, and a multi-layer perceptron over its features and the vector observations."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..features import width
from .mlp import concatenated


@dataclass(frozen=True)
class CNN:
    """Convolutions over each camera, then layers over all features and vector observations."""

    channels: tuple[int, ...] = (16, 32, 32)
    """Channels of the convolutions, each of which halves height and width."""
    features: int = 64
    """Numbers that describe one picture."""
    hidden_dims: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers after them."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """Size the network for the keys and shapes of `spec`.

        Raises:
            UserError: no pictures or actions in the data, or options that make no sense.
        """
        if any(size < 1 for size in (*self.channels, self.features, *self.hidden_dims)) or not self.channels:
            raise UserError(f"--model.channels {self.channels}, features and hidden-dims must be positive")
        cameras = [key for key in sorted(spec) if key.startswith("observation.images.")]
        if not cameras:
            raise UserError("the model 'cnn' needs pictures; choose cameras with --dataset.cameras, or --model mlp")
        vectors = [key for key in sorted(spec) if key.startswith("observation.") and key not in cameras]
        width(spec, "action")
        encoders, inputs = nn.ModuleList(), sum(math.prod(spec[key]["shape"]) for key in vectors)
        for key in cameras:
            *steps, channels, height, wide = spec[key]["shape"]
            encoders.append(self._encoder(channels, height, wide))
            inputs += math.prod(steps) * self.features
        layers: list[nn.Module] = []
        for hidden in self.hidden_dims:
            layers += [nn.Linear(inputs, hidden), nn.ReLU()]
            inputs = hidden
        shape = tuple(spec["action"]["shape"])
        head = nn.Sequential(*layers, nn.Linear(inputs, math.prod(shape)))
        return CNNPolicy(encoders, head, cameras, vectors, shape)

    def _encoder(self, channels: int, height: int, wide: int) -> nn.Module:
        """`[n, C, H, W]` in [0, 1] -> `[n, features]`."""
        layers: list[nn.Module] = []
        for out in self.channels:
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.ReLU()]
            channels, height, wide = out, (height + 1) // 2, (wide + 1) // 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * wide, self.features), nn.ReLU())


class CNNPolicy(nn.Module):
    """Returns actions `[B, Da]` or chunks `[B, Ta, Da]` for a batch of observations; pictures are uint8."""

    def __init__(
        self, encoders: nn.ModuleList, head: nn.Module, cameras: list[str], vectors: list[str], shape: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.encoders, self.head = encoders, head
        self.cameras, self.vectors, self.action_shape = cameras, vectors, shape

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        features = [concatenated(observation, self.vectors)] if self.vectors else []
        for key, encoder in zip(self.cameras, self.encoders, strict=True):
            x = observation[key]  # [B, (To,) C, H, W]
            encoded = encoder(x.flatten(0, -4).float() / 255)
            features.append(encoded.view(len(x), -1))
        return self.head(torch.cat(features, 1)).unflatten(1, self.action_shape)
