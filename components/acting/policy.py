"""A policy that acts in the environment's own units, step by step, from an observation history and action chunks."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.features import history_of
from ..data.normalisation import Normaliser
from ..errors import UserError, nearest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inference:
    """How a policy acts; the same weights may be far better or worse by it, so it travels with them."""

    action_steps: int | None = None
    """Steps of a chunk that are executed before the next one is planned; None for all of them."""
    ensemble: float | None = None
    """Temporal ensembling: average all chunks with weights exp(-m i), i = 0 the oldest; m, or None for off."""
    sampler: str | None = None
    """How noise becomes a chunk: ddim or ddpm (diffusion), euler or midpoint (flow)."""
    sampling_steps: int | None = None
    """Steps of the sampler; midpoint evaluates the network twice in each."""
    task: str | None = None
    """Text of the task, where the data has several and the environment names none."""


class Policy:
    """Normaliser, network, observation history and action chunks in one: numpy in, numpy out.

    Args:
        module: Normalised observations in, normalised action `[B, Da]` or chunk `[B, Ta, Da]` out. It takes the batch,
            or, when nothing but `observation.state` is observed, that tensor itself. One that draws noise may declare
            `noise_shape` and find `noise` `[B, *noise_shape]` in the batch, drawn per episode; if it samples in steps,
            it has `samplers` (names), `most_steps`, and the settings `sampler` and `sampling_steps`.
        normaliser: Of the data that it was trained on.
        spec: {key: {"shape", "dtype", ...}} of that data.
        settings: How it acts; what is None is left to the module.

    Raises:
        UserError: settings that this policy does not have, or that make no sense.
    """

    def __init__(
        self, module: nn.Module, normaliser: Normaliser, spec: dict[str, Any], settings: Inference | None = None
    ) -> None:
        self.module, self.normaliser, self.spec = module, normaliser, spec
        self.base: Any = None  # of a policy that corrects another one
        # History and chunk steps are the extra leading axis of the items; a bool mask comes with every chunk.
        self.chunked = "action_is_pad" in spec
        self.chunk = int(spec["action"]["shape"][0]) if self.chunked else 1
        self.observation_keys = [key for key in spec if key.startswith("observation.")]
        self.obs_steps = math.prod(history_of(spec))
        self.settings = Inference()
        self.configure(**asdict(settings or Inference()))
        self.takes_tensor = self._takes_tensor()
        self.reset()

    def configure(self, **settings: Any) -> "Policy":
        """Set how it acts (fields of `Inference`; the others stay as they are); returns itself.

        Raises:
            UserError: a setting that this policy does not have, or that makes no sense.
        """
        names = [field.name for field in fields(Inference)]
        if unknown := [name for name in settings if name not in names]:
            raise UserError(f"unknown policy setting {unknown[0]!r}; {nearest(unknown[0], names)}")
        wanted = replace(self.settings, **settings)
        module: Any = self.module
        samplers = getattr(module, "samplers", ())
        if wanted.action_steps is not None and not 1 <= wanted.action_steps <= self.chunk:
            raise UserError(
                f"--policy.action-steps {wanted.action_steps} must be 1 to {self.chunk}, the chunk's length"
            )
        if wanted.ensemble is not None:
            if not self.chunked:
                raise UserError("--policy.ensemble averages chunks; this policy gives single actions")
            if not math.isfinite(wanted.ensemble):
                raise UserError(f"--policy.ensemble {wanted.ensemble} must be a finite number, such as 0.01")
        if not samplers and (wanted.sampler or wanted.sampling_steps):
            raise UserError("--policy.sampler and --policy.sampling-steps: this policy does not sample in steps")
        if wanted.sampler is not None and wanted.sampler not in samplers:
            raise UserError(f"--policy.sampler {wanted.sampler}: this policy knows {', '.join(samplers)}")
        if wanted.sampling_steps is not None and not 1 <= wanted.sampling_steps <= module.most_steps:
            raise UserError(f"--policy.sampling-steps {wanted.sampling_steps} must be 1 to {module.most_steps}")
        tasks = self.spec.get("task", {}).get("values", ())
        if wanted.task is not None and wanted.task not in tasks:
            have = nearest(wanted.task, tasks) if tasks else "its data has one task only"
            raise UserError(f"--policy.task {wanted.task!r}: the policy does not know it; {have}")
        self.settings = wanted
        self.action_steps = wanted.action_steps or self.chunk
        # Whether nothing but the newest observation matters.
        self.plain = self.chunk == self.obs_steps == 1 and wanted.ensemble is None and "task" not in self.spec
        if wanted.sampler is not None:
            module.sampler = wanted.sampler
        if wanted.sampling_steps is not None:
            module.sampling_steps = wanted.sampling_steps
        self.reset()
        return self

    @property
    def inference(self) -> dict[str, Any]:
        """How it acts, recorded beside every evaluation."""
        how: dict[str, Any] = {"obs_steps": self.obs_steps, "chunk": self.chunk, "action_steps": self.action_steps}
        how["ensemble"] = self.settings.ensemble
        if hasattr(self.module, "samplers"):
            how |= {"sampler": self.module.sampler, "sampling_steps": self.module.sampling_steps}
        return how | ({"task": self.settings.task} if "task" in self.spec else {})

    def reset(self, seeds: Sequence[int] | None = None) -> None:
        """Start new episodes: forget the history and the chunk. `seeds` fix a stochastic policy's noise, one a row."""
        self._history: dict[str, list[Tensor]] = {}
        self._age: Tensor | None = None  # [N], steps since each row's episode began
        self._plan = torch.empty(0)  # [N, Ta, Da], each row's newest chunk
        self._plans: list[tuple[Tensor, Tensor]] = []  # ensembling: (each row's age then [N], -1 for none; chunk)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]

    def state_dict(self) -> dict[str, Any]:
        """Where it is in its episodes: histories and chunks, but not the generators of `reset`'s seeds."""
        return {"age": self._age, "plan": self._plan, "history": self._history, "plans": self._plans}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.reset()
        self._age, self._plan, self._plans = state["age"], state["plan"], state["plans"]
        self._history = {k: [frame.to(self._device) for frame in past] for k, past in state["history"].items()}

    def restart(self, rows: Tensor) -> None:
        """Start new episodes in some rows `[n]` of a batch, while the others go on."""
        if self._age is not None and len(rows):
            self._age[rows] = 0
            for ages, _ in self._plans:
                ages[rows] = -1

    @torch.no_grad()
    def act(self, observation: dict[str, Any], rows: Tensor | None = None) -> np.ndarray:
        """Next action, `[Da]` for one observation or `[N, Da]` for a batch, in the environment's units, float32.

        Discrete actions are their numbers, one or `[N]` int64.

        Args:
            observation: key -> array of one frame, or of N frames (the same N until `reset`); `task`, a text or N.
            rows: `[n]`, those of a batch that act, whose frames these are; the others stay where they are.

        Raises:
            UserError: an observation key is missing or has another width than the policy was trained with.
        """
        frames, batched = self._frames(observation)
        if self._age is None:
            self._age = torch.zeros(len(next(iter(frames.values()))), dtype=torch.int64)
        for key, frame in frames.items():
            if len(frame) != (len(self._age) if rows is None else len(rows)):
                found = f"{key!r} has {len(frame)} rows after {len(self._age)}"
                raise UserError(f"{found}; call reset() for other episodes")
        if self.plain:
            only = self._planned(frames, rows).numpy()
            return only if batched else only[0]
        chosen = torch.arange(len(self._age)) if rows is None else rows
        age = self._age[chosen]  # [n]
        self._remember(frames, chosen, age)
        due = age % self.action_steps == 0
        if due.any():
            self._replan(observation, chosen[due], age[due], due)
        if self.settings.ensemble is None:
            action = self._plan[chosen, age % self.action_steps]
        else:
            action = self._averaged(chosen, age)
        self._age[chosen] += 1
        return action.numpy() if batched else action[0].numpy()

    def _planned(self, batch: dict[str, Any], rows: Tensor | None) -> Tensor:
        """What the module gives for a batch, in the environment's units, on the CPU."""
        action = self._forward(self.normaliser(batch), rows)
        return self.normaliser.undo("action", action.float() if action.is_floating_point() else action).cpu()

    def _remember(self, frames: dict[str, Tensor], rows: Tensor, age: Tensor) -> None:
        """Add frames of `rows` to the history; a row's first one stands in the place of what came before."""
        for key, frame in frames.items():
            past = self._history.get(key, [frame] * self.obs_steps)
            everything, at = len(rows) == len(past[0]), rows.to(frame.device)
            newer = [*(before if everything else before[at] for before in past[1:]), frame]
            if self.obs_steps > 1 and not age.all():
                first = (age == 0).to(frame.device).view(-1, *[1] * (frame.ndim - 1))
                newer = [torch.where(first, frame, before) for before in newer]
            if not everything:
                newer = [before.index_copy(0, at, now) for before, now in zip(past, newer, strict=True)]
            self._history[key] = newer

    def _replan(self, observation: dict[str, Any], rows: Tensor, age: Tensor, due: Tensor) -> None:
        """Put new chunks in the place of those of `rows` `[n]`, in the environment's units, on the CPU."""
        everything = len(rows) == len(next(iter(self._history.values()))[0])
        batch: dict[str, Any] = {}
        for key, past in self._history.items():
            seen = past if everything else [frame[rows.to(frame.device)] for frame in past]
            batch[key] = torch.stack(seen, 1) if self.obs_steps > 1 else seen[-1]
        if "task" in self.spec:
            texts = self._tasks(observation, len(due))
            batch["task"] = [text for text, now in zip(texts, due.tolist(), strict=True) if now]
        action = self._planned(batch, rows)
        chunk = action if self.chunked else action[:, None]
        if everything:
            self._plan = chunk
        else:
            if not len(self._plan):
                assert self._age is not None
                self._plan = chunk.new_zeros(len(self._age), *chunk.shape[1:])
            self._plan = self._plan.index_copy(0, rows, chunk)
        if self.settings.ensemble is not None:
            assert self._age is not None
            ages = torch.full_like(self._age, -1)
            ages[rows] = age
            self._plans.append((ages, self._plan))

    def _averaged(self, rows: Tensor, age: Tensor) -> Tensor:
        """The mean of what all chunks of these rows' episodes say of this step, `[n, Da]` (Zhao et al., 2023)."""
        assert self.settings.ensemble is not None and self._age is not None
        said, counts = [], []
        for ages, chunk in self._plans:  # the oldest first
            planned = age - ages[rows]  # steps ago
            counts.append((ages[rows] >= 0) & (planned < self.chunk))
            said.append(chunk[rows, planned.clamp(0, self.chunk - 1)])
        valid = torch.stack(counts)  # [chunks, n]
        place = valid.cumsum(0) - 1  # the oldest one's is 0
        weights = (-self.settings.ensemble * place).masked_fill(~valid, -math.inf).softmax(0)
        kept = [bool(((self._age - ages < self.chunk) & (ages >= 0)).any()) for ages, _ in self._plans]
        self._plans = [plan for plan, alive in zip(self._plans, kept, strict=True) if alive]
        return (weights[..., None] * torch.stack(said)).sum(0)

    def _tasks(self, observation: dict[str, Any], rows: int) -> list[str]:
        """The text of each row's task."""
        task = observation.get("task", self.settings.task)
        if task is None:
            task, *others = self.spec["task"]["values"]
            logger.warning(
                "no task is named (--policy.task, or 'task' of act()); of %d it is %r", 1 + len(others), task
            )
            self.settings = replace(self.settings, task=task)  # said once, and recorded
        return [task] * rows if isinstance(task, str) else [str(text) for text in task]

    def _frames(self, observation: dict[str, Any]) -> tuple[dict[str, Tensor], bool]:
        """Check the observation and give it a batch dimension."""
        frames, batched = {}, True
        for key in self.observation_keys:
            if key not in observation:
                found = ", ".join(observation) or "nothing"
                raise UserError(f"the policy needs the observation {key!r}; found: {found}")
            stored = self.spec[key].get("stored_shape", self.spec[key]["shape"])  # pictures may be cut to their centre
            shape = tuple(stored)[self.obs_steps > 1 :]
            frame = torch.as_tensor(np.asarray(observation[key]))
            if tuple(frame.shape[-len(shape) :]) != shape or frame.ndim not in (len(shape), len(shape) + 1):
                raise UserError(f"the policy expects {key!r} of shape {shape}, found {tuple(frame.shape)}")
            batched = frame.ndim > len(shape)
            frame = frame if frame.dtype == torch.uint8 else frame.float()
            # What a GPU has under way is waited for once, by the action's way back.
            frames[key] = (frame if batched else frame[None]).to(self._device, non_blocking=True)
        return frames, batched

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def _forward(self, batch: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """What the module gives for a batch, of all rows or of `rows` `[n]`, whose generators draw its noise."""
        shape = getattr(self.module, "noise_shape", None)
        if shape is not None:
            count = len(next(iter(batch.values())))
            chosen = self._generators if rows is None else [self._generators[i] for i in rows if self._generators]
            drawn = [torch.randn(shape, generator=source) for source in chosen]
            noise = torch.stack(drawn) if drawn else torch.randn(count, *shape)
            batch = {**batch, "noise": noise.to(self._device, non_blocking=True)}
        return self.module(batch["observation.state"] if self.takes_tensor else batch)

    def _takes_tensor(self) -> bool:
        """Try the module on zeros, so that what does not fit is found before it acts.

        Raises:
            UserError: it fails, or its actions have another shape than the data's.
        """
        batch = {
            key: torch.zeros(
                1, *self.spec[key]["shape"], dtype=getattr(torch, self.spec[key]["dtype"]), device=self._device
            )
            for key in self.observation_keys
        }
        if "task" in self.spec:
            batch["task_index"] = torch.zeros(1, dtype=torch.int64, device=self._device)
        problems: list[str] = []
        action: Any = None
        training = self.module.training
        self.module.eval()
        self._generators = []
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for takes_tensor in (False, True) if self.observation_keys == ["observation.state"] else (False,):
                self.takes_tensor = takes_tensor
                try:
                    action = self._forward(batch)
                    break
                except Exception as error:
                    problems.append(str(error).splitlines()[0] if str(error) else repr(error))
            else:
                raise UserError(f"the policy fails on an observation: {'; on the bare state: '.join(problems)}")
        self.module.train(training)
        found, expected = tuple(getattr(action, "shape", ())[1:]), tuple(self.spec["action"]["shape"])
        if found != expected:
            raise UserError(f"the policy gives actions of shape {found}, the data has {expected}")
        return self.takes_tensor


def acting_policy(
    trainer: Any,
    models: nn.ModuleDict,
    normaliser: Normaliser,
    spec: dict[str, Any],
    settings: Inference,
    given: Callable[[str], bool],
) -> Policy | None:
    """What acts: the trainer's own `policy()`, or `models["policy"]`; None without either, or with nothing to act on.

    Args:
        settings: How it acts.
        given: Whether the command line itself sets an option; a default that goes beyond what there is shrinks to it.

    Raises:
        UserError: it fails on an observation, gives actions of another shape than the data's, or settings do not fit.
    """
    own = callable(getattr(trainer, "policy", None))
    observes = any(key.startswith("observation.") for key in spec)
    if not observes or "action" not in spec or not (own or "policy" in models):
        return None
    module = trainer.policy() if own else models["policy"]
    module.to(next(models.parameters()).device)  # it may have tensors of its own
    chunk = int(spec["action"]["shape"][0]) if "action_is_pad" in spec else 1
    if settings.action_steps is not None and not given("policy.action-steps"):
        settings = replace(settings, action_steps=min(settings.action_steps, chunk))
    if chunk == 1 and not given("policy.ensemble"):
        settings = replace(settings, ensemble=None)
    if settings.sampling_steps is not None and not given("policy.sampling-steps"):
        most = getattr(module, "most_steps", settings.sampling_steps)
        settings = replace(settings, sampling_steps=min(settings.sampling_steps, most))
    return Policy(module, normaliser, spec, settings)
