"""ResNet-18 over each camera (He et al., 2016) with a spatial softmax (Levine et al., 2016; Finn et al., 2016).

GroupNorm replaces BatchNorm, whose running statistics do not fit averaged weights (Chi et al., 2023, section III-B).
Weights from ImageNet keep the BatchNorm that they were trained with, frozen, as in ACT.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..contracts import Place, reads_weights
from ..errors import UserError
from .encoder import EncoderOptions, ObservationEncoder

# Moments of ImageNet's pictures in [0, 1], by which its weights expect normalised pictures.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ResNet18(EncoderOptions):
    """ResNet-18 with spatial softmax."""

    keypoints: int = 32
    """Number of keypoints; a picture is described by their coordinates."""
    weights: Annotated[str, Place()] = ""
    """safetensors file of ImageNet weights with torchvision's names (conv1.weight, bn1.weight, layer1.0. ...)."""

    def build(self, spec: dict[str, Any]) -> nn.Module:
        """One network for each camera of `spec`.

        Raises:
            UserError: invalid options; a file that is missing or does not hold these weights.
        """
        self.check(keypoints=(self.keypoints,))
        return ObservationEncoder(spec, self.network, self)

    def network(self, channels: int, height: int, width: int) -> nn.Module:
        """`[n, C, H, W]` in [0, 1] -> `[n, features]`."""
        network = SpatialResNet(channels, self.keypoints, self.features, pretrained=bool(self.weights))
        if self.weights and reads_weights():
            load_imagenet(network.backbone, Path(self.weights).expanduser(), channels)
        return network


class FrozenBatchNorm(nn.Module):
    """BatchNorm with constant statistics and scales: one scale and shift for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.running_mean: Tensor
        self.running_var: Tensor
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def norm(channels: int, frozen: bool) -> nn.Module:
    """GroupNorm with 16 channels in each group, or the frozen BatchNorm of pretrained weights."""
    return FrozenBatchNorm(channels) if frozen else nn.GroupNorm(channels // 16, channels)


class Block(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, inputs: int, channels: int, stride: int, frozen: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = norm(channels, frozen)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = norm(channels, frozen)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), norm(channels, frozen))
            if stride > 1 or inputs != channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class Backbone(nn.Module):
    """`[n, C, H, W]` -> `[n, 512, H/32, W/32]`; modules have torchvision's names."""

    def __init__(self, channels: int, frozen: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64, frozen)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        widths = [64, 64, 128, 256, 512]
        for i in range(1, 5):
            first = Block(widths[i - 1], widths[i], 1 if i == 1 else 2, frozen)
            setattr(self, f"layer{i}", nn.Sequential(first, Block(widths[i], widths[i], 1, frozen)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))  # type: ignore[operator]


class SpatialResNet(nn.Module):
    """Backbone, spatial softmax, and a linear layer over the coordinates of the keypoints."""

    def __init__(self, channels: int, keypoints: int, features: int, pretrained: bool) -> None:
        super().__init__()
        self.backbone = Backbone(channels, pretrained)
        self.to_keypoints = nn.Conv2d(512, keypoints, 1)
        self.out = nn.Linear(2 * keypoints, features)
        self.pretrained = pretrained
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.pretrained:
            x = (x - self.mean) / self.std  # type: ignore[operator]
        return self.out(spatial_softmax(self.to_keypoints(self.backbone(x))))


def spatial_softmax(maps: Tensor) -> Tensor:
    """Expected coordinates in [-1, 1] under the softmax of each map, `[n, K, H, W] -> [n, 2 K]`: all x, then all y."""
    height, width = maps.shape[-2:]
    attention = maps.flatten(2).softmax(-1).unflatten(-1, (height, width))
    across = torch.linspace(-1, 1, width, device=maps.device, dtype=maps.dtype)
    down = torch.linspace(-1, 1, height, device=maps.device, dtype=maps.dtype)
    return torch.cat([(attention.sum(-2) * across).sum(-1), (attention.sum(-1) * down).sum(-1)], 1)


def load_imagenet(backbone: nn.Module, path: Path, channels: int) -> None:
    """Load torchvision's weights, without its classifier `fc` and its counters.

    Raises:
        UserError: no such file, another format, names or shapes that do not fit (lists five), no colour pictures.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if channels != 3:
        raise UserError(f"--model.encoder.weights needs pictures of 3 channels; these have {channels}")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--model.encoder.weights {path}: {error}; expected a safetensors file") from error
    weights = {k: v for k, v in weights.items() if not k.startswith("fc.") and not k.endswith("num_batches_tracked")}
    own = {key: tuple(value.shape) for key, value in backbone.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    odd = [
        f"{key}: {found.get(key)}, expected {own.get(key)}"
        for key in {**own, **found}
        if own.get(key) != found.get(key)
    ]
    if odd:
        raise UserError(f"--model.encoder.weights {path} does not hold ResNet-18's weights: {'; '.join(odd[:5])}")
    backbone.load_state_dict(weights)
