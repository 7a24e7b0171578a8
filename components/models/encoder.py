"""Observation encoders: they map pictures and task to one vector, so that any policy network takes any observation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..data.features import history_of
from ..data.pictures import pictures_of
from ..errors import UserError
from .language import TaskTexts

FEATURES = "observation.features"


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Options of all image encoders."""

    role: ClassVar[str] = "encoder"  # `--model cnn` replaces the encoder, not the policy
    former_defaults: ClassVar[dict[str, Any]] = {"language": "table"}

    features: int = 64
    """Numbers that describe one picture."""
    share_weights: bool = False
    """One network for all cameras instead of one for each."""
    task_features: int = 32
    """Width of the task's embedding where the data has more than one task; 0 omits the task."""
    language: Literal["ngrams", "table"] = "ngrams"
    """How a task's text is read: by its n-grams, so that new wordings are understood by the words that they share with
    the learnt ones, or as an entry of a table, which knows the learnt texts alone."""

    def check(self, **sizes: tuple[int, ...]) -> None:
        """Refuse sizes below 1. Raises UserError naming the option."""
        for name, values in {"features": (self.features,), "task_features": (self.task_features + 1,), **sizes}.items():
            if not values or any(value < 1 for value in values):
                option = name.replace("_", "-")
                raise UserError(f"--model.encoder.{option} {' '.join(map(str, values))} must be positive")


class ObservationEncoder(nn.Module):
    """Replaces a batch's pictures and task by `observation.features`; a batch without both is unchanged.

    Args:
        spec: {key: {"shape", ...}} of the data; the texts of its tasks in `spec["task"]["values"]`.
        make: (channels, height, width) -> a network `[n, C, H, W]` in [0, 1] -> `[n, features]`.

    The attribute `spec` describes the input of the other models: vectors only.
    """

    def __init__(
        self, spec: dict[str, Any], make: Callable[[int, int, int], nn.Module], options: EncoderOptions
    ) -> None:
        super().__init__()
        self.cameras = [key for key in sorted(pictures_of(spec)) if key.startswith("observation.")]
        shapes = [tuple(spec[key]["shape"]) for key in self.cameras]
        if options.share_weights and len(set(shapes)) > 1:
            found = ", ".join(f"{key} {shape}" for key, shape in zip(self.cameras, shapes, strict=True))
            raise UserError(f"--model.encoder.share-weights needs cameras of one shape; found: {found}")
        networks = 1 if options.share_weights else len(shapes)
        self.networks = nn.ModuleList([make(*shape[-3:]) for shape in shapes[:networks]])
        texts, self.task = spec.get("task", {}).get("values", ()), None
        if len(texts) > 1 and options.task_features:
            table = options.language == "table"
            self.task = (TaskTable if table else TaskTexts)(texts, options.task_features)
        width = len(self.cameras) * options.features + (options.task_features if self.task is not None else 0)
        self.history = history_of(spec)
        gone = {*self.cameras, "task"} if width else set()
        self.spec = {key: feature for key, feature in spec.items() if key not in gone}
        if width:
            self.spec[FEATURES] = {"shape": (*self.history, width), "dtype": "float32"}

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        parts = []
        for i, key in enumerate(self.cameras):
            pictures = batch[key]  # [B, (To,) C, H, W] uint8
            encoded = self.networks[i % len(self.networks)](pictures.flatten(0, -4).float() / 255)
            parts.append(encoded.unflatten(0, pictures.shape[:-3]))  # [B, (To,) F]
        if self.task is not None:
            embedded = self.task(batch)  # [B, E]
            parts.append(embedded[:, None].expand(-1, *self.history, -1) if self.history else embedded)
        if not parts:
            return batch
        return {key: value for key, value in batch.items() if key not in self.cameras} | {
            FEATURES: torch.cat(parts, -1)
        }


class TaskTable(nn.Embedding):
    """The task of each row -> its own entry `[B, features]` of a table."""

    def __init__(self, texts: Sequence[str], features: int) -> None:
        super().__init__(len(texts), features)

    def forward(self, batch: Any) -> Tensor:
        return super().forward(batch["task_index"])


def encoder_of(models: nn.ModuleDict, name: str = "encoder") -> nn.Module:
    """The model `encoder`, or the identity without one."""
    return models[name] if name in models else nn.Identity()


def encoded(encoder: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch with encoded pictures; those of the successors are encoded without gradient."""
    if not getattr(encoder, "networks", ()):
        return batch
    with torch.no_grad():
        then = {key.removeprefix("next."): value for key, value in batch.items() if key.startswith("next.")}
        then = {f"next.{key}": value for key, value in encoder(then).items()}
    return encoder({key: value for key, value in batch.items() if not key.startswith("next.")}) | then


def detached(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose features are detached from the graph."""
    return batch | {FEATURES: batch[FEATURES].detach()} if FEATURES in batch else batch


class EncodedPolicy(nn.Module):
    """Encoder and network of a regression policy: observations -> action, or the mode of its distribution."""

    def __init__(self, encoder: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.encoder, self.network = encoder, network

    def forward(self, observation: dict[str, Tensor]) -> Tensor:
        action = self.network(self.encoder(observation))
        return action if isinstance(action, Tensor) else action.mode
