"""A policy in the environment's units: one action per step, with an observation history and action chunks."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import contracts
from ..data.features import history_of
from ..data.normalisation import Normaliser
from ..data.pictures import RULE, as_recorded, is_picture, pictures_of
from ..errors import UserError, crashes_pass, nearest, where

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inference:
    """Inference settings of a policy; they affect its success, so they are saved with its weights."""

    action_steps: int | None = None
    """Steps of a chunk that are executed before the next one is planned; None for all of them."""
    ensemble: float | None = None
    """Temporal ensembling: average all chunks with weights exp(-m i), i = 0 the oldest; m, or None for off."""
    sampler: str | None = None
    """Sampler of chunks from noise: ddim or ddpm (diffusion), euler or midpoint (flow)."""
    sampling_steps: int | None = None
    """Steps of the sampler; midpoint evaluates the network twice in each."""
    task: str | None = None
    """Text of the task, where the data has several and the environment names none."""


class Policy:
    """Normaliser, network, observation history and action chunks in one: numpy in, numpy out.

    Args:
        module: Normalised observations in, normalised action `[B, Da]` or chunk `[B, Ta, Da]` out. It takes the batch,
            or, if the only observation is `observation.state`, that tensor itself. A stochastic module declares
            `noise_shape` and receives `noise` `[B, *noise_shape]` in the batch, drawn per episode; if it samples in
            steps, it has `samplers` (names), `most_steps`, and the settings `sampler` and `sampling_steps`.
        normaliser: Of the data that it was trained on.
        spec: {key: {"shape", "dtype", ...}} of that data.
        settings: Inference settings; where they are None, the module's defaults apply.

    Raises:
        UserError: settings that this policy does not have, or that are out of range.
    """

    def __init__(
        self, module: nn.Module, normaliser: Normaliser, spec: dict[str, Any], settings: Inference | None = None
    ) -> None:
        self.module, self.normaliser, self.spec = module, normaliser, spec
        self.base: Any = None  # the frozen `Base` of a residual policy
        # History and chunk steps are the leading axis of an item; every chunk has a bool mask.
        self.chunked = "action_is_pad" in spec
        self.chunk = int(spec["action"]["shape"][0]) if self.chunked else 1
        self.observation_keys = [key for key in spec if key.startswith("observation.")]
        self.obs_steps = math.prod(history_of(spec))
        self.settings = Inference()
        self.assumed: str | None = None  # the task, where none is named
        self.configure(**asdict(settings or Inference()))
        self.takes_tensor = self._takes_tensor()
        self.reset()

    def configure(self, **settings: Any) -> "Policy":
        """Change inference settings (fields of `Inference`; the others are kept); returns itself.

        Raises:
            UserError: a setting that this policy does not have, or that is out of range.
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
                raise UserError("--policy.ensemble averages chunks; this policy returns single actions")
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
        # Whether an action depends on the newest observation only.
        self.plain = self.chunk == self.obs_steps == 1 and wanted.ensemble is None and "task" not in self.spec
        if wanted.sampler is not None:
            module.sampler = wanted.sampler
        if wanted.sampling_steps is not None:
            module.sampling_steps = wanted.sampling_steps
        self.reset()
        return self

    @property
    def inference(self) -> dict[str, Any]:
        """The inference settings in effect, recorded with every evaluation."""
        how: dict[str, Any] = {"obs_steps": self.obs_steps, "chunk": self.chunk, "action_steps": self.action_steps}
        how["ensemble"] = self.settings.ensemble
        if hasattr(self.module, "samplers"):
            how |= {"sampler": self.module.sampler, "sampling_steps": self.module.sampling_steps}
        return how | ({"task": self.settings.task or self.assumed} if "task" in self.spec else {})

    def reset(self, seeds: Sequence[int] | None = None) -> None:
        """Start new episodes: clear history and chunks. `seeds` fix a stochastic policy's noise, one per row."""
        self._history: dict[str, list[Tensor]] = {}
        self._age: Tensor | None = None  # [N], steps since each row's episode began
        self._plan = torch.empty(0)  # [N, Ta, Da], each row's newest chunk
        self._plans: list[tuple[Tensor, Tensor]] = []  # ensembling: (each row's age then [N], -1 for none; chunk)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]

    def follow(self, transitions: dict[str, Any] | None) -> None:
        """Start new episodes where the next observation is the first of one; None (after a fault): in all rows."""
        if transitions is None:
            self.reset()
        else:
            self.restart(transitions["begins"].nonzero().flatten())

    def cut(self) -> None:
        """Start new episodes in all rows."""
        self.reset()

    def rank_state(self) -> dict[str, Any]:
        """The state of its episodes: histories, chunks, and the generators of `reset`'s seeds."""
        state = {"age": self._age, "plan": self._plan, "history": self._history, "plans": self._plans}
        return state | {"generators": [generator.get_state() for generator in self._generators]}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
        self.reset()
        self._age, self._plan, self._plans = state["age"], state["plan"], state["plans"]
        self._history = {k: [frame.to(self._device) for frame in past] for k, past in state["history"].items()}
        for saved in state.get("generators", ()):
            self._generators.append(torch.Generator())
            self._generators[-1].set_state(saved)

    def restart(self, rows: Tensor) -> None:
        """Start new episodes in the rows `[n]` of a batch; the other rows continue."""
        if self._age is not None and len(rows):
            self._age[rows] = 0
            for ages, _ in self._plans:
                ages[rows] = -1

    @torch.no_grad()
    def act(self, observation: dict[str, Any], rows: Tensor | None = None, env_step: int | None = None) -> np.ndarray:
        """Next action, `[Da]` for one observation or `[N, Da]` for a batch, in the environment's units, float32.

        Discrete actions are their numbers, one or `[N]` int64.

        Args:
            observation: key -> array of one frame, or of N frames (the same N until `reset`); `task`, a text or N.
                Pictures are uint8, or floats from 0 to 1, with the channels first or last.
            rows: `[n]`, the rows of the batch that act, whose frames these are; the other rows are unchanged.
            env_step: Environment steps of the run so far, for a module whose exploration depends on it.

        Raises:
            UserError: an observation key is missing, has another width than the policy was trained with, values that
                are not finite, or pictures that do not follow the rule of `data.pictures`.
        """
        if env_step is not None:
            contracts.set_env_step(self.module, env_step)
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
        """The module's output for a batch, in the environment's units, on the CPU."""
        action = self._forward(self.normaliser(batch), rows)
        return self.normaliser.undo("action", action.float() if action.is_floating_point() else action).cpu()

    def _remember(self, frames: dict[str, Tensor], rows: Tensor, age: Tensor) -> None:
        """Add frames of `rows` to the history; the first frame of an episode fills its whole history."""
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
        """Replace the chunks of `rows` `[n]` by new ones, in the environment's units, on the CPU."""
        everything = len(rows) == len(next(iter(self._history.values()))[0])
        batch: dict[str, Any] = {}
        for key, past in self._history.items():
            frames = past if everything else [frame[rows.to(frame.device)] for frame in past]
            batch[key] = torch.stack(frames, 1) if self.obs_steps > 1 else frames[-1]
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
        """The weighted mean `[n, Da]` of the actions that all chunks plan for this step (Zhao et al., 2023)."""
        assert self.settings.ensemble is not None and self._age is not None
        actions, counts = [], []
        for ages, chunk in self._plans:  # the oldest first
            planned = age - ages[rows]  # steps ago
            counts.append((ages[rows] >= 0) & (planned < self.chunk))
            actions.append(chunk[rows, planned.clamp(0, self.chunk - 1)])
        valid = torch.stack(counts)  # [chunks, n]
        place = valid.cumsum(0) - 1  # 0 for the oldest
        weights = (-self.settings.ensemble * place).masked_fill(~valid, -math.inf).softmax(0)
        kept = [bool(((self._age - ages < self.chunk) & (ages >= 0)).any()) for ages, _ in self._plans]
        self._plans = [plan for plan, alive in zip(self._plans, kept, strict=True) if alive]
        return self.normaliser.exact("action", (weights[..., None] * torch.stack(actions)).sum(0))

    def _tasks(self, observation: dict[str, Any], rows: int) -> list[str]:
        """The text of each row's task."""
        task = observation.get("task", self.settings.task or self.assumed)
        if task is None:
            task, *others = self.spec["task"]["values"]
            logger.warning(
                "no task is named (--policy.task, or 'task' of act()); of %d it is %r", 1 + len(others), task
            )
            self.assumed = task  # warned once, and recorded with evaluations
        return [task] * rows if isinstance(task, str) else [str(text) for text in task]

    def _frames(self, observation: dict[str, Any]) -> tuple[dict[str, Tensor], bool]:
        """Check the observation and add a batch dimension if it has none; returns (frames, whether it had one)."""
        frames, batched = {}, True
        for key in self.observation_keys:
            if key not in observation:
                found = ", ".join(observation) or "nothing"
                raise UserError(f"the policy needs the observation {key!r}; found: {found}")
            stored = self.spec[key].get("stored_shape", self.spec[key]["shape"])  # pictures may be cropped
            shape = tuple(stored)[self.obs_steps > 1 :]
            frame = numbers(observation[key], key)
            if is_picture(key, self.spec[key]["dtype"]):
                frame, batched = as_recorded(frame, shape, key)
            else:
                frame, batched = vectors(frame, shape, key)
            # The GPU is synchronised only once, when the action is copied back.
            frames[key] = frame.to(self._device, non_blocking=True)
        return frames, batched

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def _forward(self, batch: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
        """The module's output for a batch of all rows or of `rows` `[n]`, with noise from the rows' generators."""
        shape = getattr(self.module, "noise_shape", None)
        if shape is not None:
            count = len(next(iter(batch.values())))
            chosen = self._generators if rows is None else [self._generators[i] for i in rows if self._generators]
            drawn = [torch.randn(shape, generator=source) for source in chosen]
            noise = torch.stack(drawn) if drawn else torch.randn(count, *shape)
            batch = {**batch, "noise": noise.to(self._device, non_blocking=True)}
        return self.module(batch["observation.state"] if self.takes_tensor else batch)

    def _takes_tensor(self) -> bool:
        """Call the module on zeros, to find mismatches early; returns whether it takes the bare state tensor.

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
        problems, crashes = list[str](), list[Exception]()
        action: Any = None
        modes = [(part, part.training) for part in self.module.modules()]  # some may be frozen
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
                    crashes.append(error)
            else:
                if crashes_pass():
                    raise crashes[0]
                text = "; on the bare state: ".join(problems)
                raise UserError(f"the policy fails on an observation: {text} ({where(crashes[0])})")
        for part, training in modes:
            part.training = training
        found, expected = tuple(getattr(action, "shape", ())[1:]), tuple(self.spec["action"]["shape"])
        if found != expected:
            raise UserError(f"the policy returns actions of shape {found}, the data has {expected}")
        return self.takes_tensor


def numbers(value: Any, key: str) -> Tensor:
    """An observation as a tensor. Raises UserError: it holds no numbers, or rows of several lengths."""
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise UserError(f"the observation {key!r} is no array of numbers ({str(error)[:80]})") from error


def vectors(frame: Tensor, shape: tuple[int, ...], key: str) -> tuple[Tensor, bool]:
    """An observation as float32 `[N, *shape]`, and whether it came as a batch; one of several axes is flattened.

    Raises:
        UserError: another width, or values that are not finite in float32.
    """
    if tuple(frame.shape[-len(shape) :]) == shape and frame.ndim - len(shape) in (0, 1):
        batched = frame.ndim > len(shape)
    elif frame.ndim != 1 and frame.numel() == math.prod(shape):
        batched = False
    elif frame.ndim > 1 and len(frame) and frame[0].numel() == math.prod(shape):
        batched = True
    else:
        raise UserError(f"the policy expects {key!r} of shape {shape}, found {tuple(frame.shape)}")
    converted = frame.float().reshape(-1 if batched else 1, *shape)
    if not converted.isfinite().all():
        beyond = frame.isfinite().all() if frame.is_floating_point() else True
        problem = "values beyond the range of float32" if beyond else "NaN or Inf"
        raise UserError(f"the observation {key!r} has {problem}, which no policy can act on; check what it comes from")
    return converted, batched


def check_encoder(args: Any, spec: dict[str, Any]) -> None:
    """Refuse an image encoder that the command line asks for, where there are no pictures. Raises UserError."""
    from .. import MODEL_BUILDER_REGISTRY

    if not args.given("model") or pictures_of(spec):
        return
    for word in args.model:
        entry = word.rpartition("=")[2]
        if getattr(MODEL_BUILDER_REGISTRY.get(entry), "role", "") == "encoder":
            found = ", ".join(key for key in spec if key.startswith("observation."))
            raise UserError(
                f"--model {word} encodes pictures, and there are none; leave it out, or see --dataset.cameras;"
                f" found: {found or 'no observations'}; {RULE}"
            )


def acting_policy(
    learner: Any, normaliser: Normaliser, spec: dict[str, Any], args: Any, needed: bool = False, base: Any = None
) -> Any:
    """The policy of a learner: its trainer's `policy()`, or `models["policy"]`; None if it cannot act on the data.

    Args:
        args: With `policy`, the inference settings, and `given`, which returns whether the command line sets an option:
            a default out of range is reduced.
        needed: Refuse a trainer without a policy.
        base: The frozen policy that it corrects, or None.

    Raises:
        UserError: it fails on an observation, its actions have another shape than the data's, invalid settings, or an
            encoder without pictures.
    """
    check_encoder(args, spec)
    if "action" not in spec or not any(key.startswith("observation.") for key in spec):
        return None
    if (module := contracts.acting_module(learner.trainer, learner.models)) is None:
        if needed:
            raise UserError(f"trainer {args.trainer!r} has no policy: neither policy() nor a model named 'policy'")
        return None
    module.to(learner.device)  # it may have further tensors
    settings, given = args.policy, args.given
    chunk = int(spec["action"]["shape"][0]) if "action_is_pad" in spec else 1
    if settings.action_steps is not None and not given("policy.action-steps"):
        settings = replace(settings, action_steps=min(settings.action_steps, chunk))
    if chunk == 1 and not given("policy.ensemble"):
        settings = replace(settings, ensemble=None)
    if settings.sampling_steps is not None and not given("policy.sampling-steps"):
        most = getattr(module, "most_steps", settings.sampling_steps)
        settings = replace(settings, sampling_steps=min(settings.sampling_steps, most))
    policy = Policy(module, normaliser, spec, settings)
    policy.base = base
    return policy
