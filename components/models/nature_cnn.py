"""The convolutional encoder of the deep Q-network (Mnih et al., 2015, methods)."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UserError
from .encoder import EncoderOptions, ObservationEncoder

LAYERS = ((32, 8, 4), (64, 4, 2), (64, 3, 1))  # channels, kernel, stride
LEAST = 36  # pixels, the smallest height and width for these layers


@dataclass(frozen=True, kw_only=True)
class NatureCNN(EncoderOptions):
    """Three strided convolutions over each camera, then a linear layer over the flattened feature map."""

    features: int = 512
    """Numbers that describe one picture."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """One network for each camera of `spec`. Raises UserError: invalid options, pictures below 36 pixels."""
        self.check()
        return ObservationEncoder(spec, self.network, self)

    def network(self, channels: int, height: int, width: int) -> nn.Module:
        """`[n, C, H, W]` in [0, 1] -> `[n, features]`."""
        if min(height, width) < LEAST:
            raise UserError(
                f"nature_cnn needs pictures of {LEAST} pixels or more, these have {height} x {width}; take --model cnn"
            )
        layers: list[nn.Module] = []
        for out, kernel, stride in LAYERS:
            layers += [nn.Conv2d(channels, out, kernel, stride), nn.ReLU()]
            channels, height, width = out, (height - kernel) // stride + 1, (width - kernel) // stride + 1
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, self.features), nn.ReLU())
