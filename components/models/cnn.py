"""A small convolutional encoder of pictures."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from .encoder import EncoderOptions, ObservationEncoder


@dataclass(frozen=True, kw_only=True)
class CNN(EncoderOptions):
    """Strided convolutions over each camera, then a linear layer over the flattened feature map."""

    channels: tuple[int, ...] = (16, 32, 32)
    """Channels of the convolutions, each of which halves height and width."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """One network for each camera of `spec`. Raises UserError: invalid options."""
        self.check(channels=self.channels)
        return ObservationEncoder(spec, self.network, self)

    def network(self, channels: int, height: int, width: int) -> nn.Module:
        """`[n, C, H, W]` in [0, 1] -> `[n, features]`."""
        layers: list[nn.Module] = []
        for out in self.channels:
            layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.ReLU()]
            channels, height, width = out, (height + 1) // 2, (width + 1) // 2
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, self.features), nn.ReLU())
