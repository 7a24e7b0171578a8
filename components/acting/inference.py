"""The settings with which a policy acts."""

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Inference:
    """Inference settings of a policy; they affect its success, so they are saved with its weights."""

    action_steps: int | None = None
    """Steps of a chunk that are executed before the next one is planned; None for all of them."""
    ensemble: float | None = None
    """Temporal ensembling: average all chunks with weights exp(-m i), i = 0 the oldest; m, or None for off."""
    sampler: str | None = None
    """Sampler of chunks from noise: ddim or ddpm (diffusion), euler or midpoint (flow); of a codebook, mode, the
    most probable codes, or sample."""
    sampling_steps: int | None = None
    """Steps of the sampler; midpoint evaluates the network twice in each."""
    task: str | None = None
    """Text of the task, where the data has several; by default what the environment says."""
    delay: int = 0
    """Environment steps from an observation to the first action planned from it; meanwhile the last chunk goes on."""
    real_time: bool = False
    """Real-time chunking: each chunk is made to agree with what is executed of the last one (flow, diffusion)."""
    blocking: bool = False
    """Hold still while a chunk is planned."""


def methods_of(settings: Inference) -> list[str]:
    """The ways to get from one chunk to the next that settings ask for."""
    asked = {"blocking": settings.blocking, "real_time": settings.real_time, "ensemble": settings.ensemble is not None}
    return [name for name, wanted in asked.items() if wanted]


def one_way(settings: Inference, asked: Callable[[str], bool]) -> Inference:
    """Settings in which a way from one chunk to the next that is `asked` for, by name, replaces one that is not."""
    ways = methods_of(settings)
    others = [name for name in ways if not asked(name)] if any(map(asked, ways)) else []
    return replace(settings, **{name: getattr(Inference, name) for name in others})
