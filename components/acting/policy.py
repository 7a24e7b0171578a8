"""A policy in the environment's units: one action per step, with an observation history and action chunks."""

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import contracts
from ..data.actions import ActionForm
from ..data.features import frame_shape, history_of
from ..data.normalisation import Normaliser
from ..errors import UserError, crashes_pass, first_line, nearest, one_line, where
from ..models.language import language_of
from ..records import misfit
from .device import usable
from .inference import Inference, methods_of, one_way
from .observed import frames_of, numbers
from .timing import Rest, Timing, timing_of, whole_delay

logger = logging.getLogger(__name__)


class Policy:
    """Normaliser, network, observation history and action chunks in one: numpy in, numpy out; for one thread at a time.

    Args:
        module: Normalised observations in, normalised action `[B, Da]` or chunk `[B, Ta, Da]` out. It takes the batch,
            or, if the only observation is `observation.state`, that tensor itself. A stochastic module declares
            `noise_shape` and receives `noise` `[B, *noise_shape]` in the batch, drawn per episode; if it samples in
            steps, it has `samplers` (names), `most_steps`, and the settings `sampler` and `sampling_steps`; one
            that can be guided has the setting `guidance`, its weight.
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
        self.form = ActionForm.of(spec)  # how actions are learnt
        self.base: Any = None  # the frozen `Base` under it
        self.hold: Hold = motionless  # of the robot; an evaluation takes the environment's
        # History and chunk steps are the leading axis of an item; every chunk has a bool mask.
        self.chunked = "action_is_pad" in spec
        self.chunk = int(spec["action"]["shape"][0]) if self.chunked else 1
        self.action_shape = (self.form.width,) if spec["action"]["shape"][self.chunked :] else ()  # of one, executed
        self.observation_keys = [key for key in spec if key.startswith("observation.")]
        self.obs_steps = math.prod(history_of(spec))
        # A key may have a history of its own, flattened.
        self.steps_of = {key: max(self.obs_steps, spec[key].get("steps", 1)) for key in self.observation_keys}
        self.frames = {key: frame_shape(spec[key], self.obs_steps) for key in self.observation_keys}  # of one moment
        self.seen_steps = max(self.steps_of.values(), default=1)
        self.settings = Inference()
        normaliser.language = language_of(module)
        self.told: str | list[str] | None = None  # the task by the environment
        self.assumed: str | None = None  # the task, where none is named
        self.configure(**asdict(settings or Inference()))
        self.takes_tensor = self._takes_tensor()
        self.reset()

    def configure(self, **settings: Any) -> "Policy":
        """Change inference settings (fields of `Inference`; the others are kept); returns itself.

        Of real time, blocking and ensembling, one that is newly asked for takes the place of the one in effect.

        Raises:
            UserError: a setting that this policy does not have, or that is out of range.
        """
        names = [field.name for field in fields(Inference)]
        if unknown := [name for name in settings if name not in names]:
            raise UserError(f"unknown policy setting {unknown[0]!r}; {nearest(unknown[0], names)}")
        plainly = {name: x.item() if isinstance(x, np.generic) else x for name, x in settings.items()}
        wanted = replace(self.settings, **plainly)
        if problem := misfit(asdict(wanted), Inference, finite=False):
            raise UserError(f"policy setting {problem}")
        wanted = one_way(wanted, lambda name: getattr(wanted, name) != getattr(self.settings, name))
        module: Any = self.module
        samplers = getattr(module, "samplers", ())
        timing = self._check_timing(wanted)
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
        if wanted.guidance is not None:
            if getattr(module, "guidance", None) is None:
                learned = "train it by recap, or by flow with --trainer.unconditional 0.1"
                raise UserError(f"--policy.guidance: this policy has not learned to act without a condition; {learned}")
            if not 0 <= wanted.guidance < math.inf:
                raise UserError(f"--policy.guidance {wanted.guidance} must be a number of 0 or more")
        tasks = self.spec.get("task", {}).get("values", ())
        if wanted.task is not None and wanted.task not in tasks:
            if not tasks or self.normaliser.language is None:
                have = nearest(wanted.task, tasks) if tasks else "its data has one task only"
                raise UserError(f"--policy.task {wanted.task!r}: the policy does not know it; {have}")
            with one_line("--policy.task"):
                self.normaliser.described([wanted.task])
        if wanted.ensemble is not None and wanted != self.settings and timing.steps + timing.delay >= self.chunk:
            often = f"one of {self.chunk} steps is planned every {timing.steps}"
            often += f", and arrives {timing.delay} later" if timing.delay else ""
            nothing = "--policy.ensemble averages nothing, as no two chunks overlap"
            logger.warning("%s: %s; see --policy.action-steps", nothing, often)
        self.settings, self.timing, self.action_steps = wanted, timing, timing.steps
        # Whether an action depends on the newest observation only.
        now = wanted.ensemble is None and "task" not in self.spec and not timing.delay
        self.plain = self.chunk == self.seen_steps == 1 and now
        if wanted.sampler is not None:
            module.sampler = wanted.sampler
        if wanted.sampling_steps is not None:
            module.sampling_steps = wanted.sampling_steps
        if wanted.guidance is not None:
            module.guidance = wanted.guidance
        self.reset()
        return self

    def _check_timing(self, wanted: Inference) -> Timing:
        """The timing of inference settings. Raises UserError: settings that exclude each other, or that it cannot."""
        if len(methods := methods_of(wanted)) > 1:
            two = " and ".join(f"--policy.{name.replace('_', '-')}" for name in methods[:2])
            raise UserError(f"{two} are two ways to get from one chunk to the next; leave one out")
        if wanted.ensemble is not None and self.chunk == 1 and wanted.delay:
            raise UserError("--policy.ensemble averages chunks; with --policy.delay, these need two steps or more")
        if wanted.real_time and not self.chunked:
            raise UserError("--policy.real-time joins chunks; this policy returns single actions")
        if wanted.real_time and not getattr(self.module, "real_time", False):
            raise UserError("--policy.real-time needs a policy that samples chunks in steps, as flow and diffusion do")
        if wanted.real_time:
            self._check_prefix("--policy.delay", wanted.delay)
        return timing_of(self.chunk, wanted.action_steps, wanted.delay, wanted.blocking)

    def _check_prefix(self, option: str, delay: int) -> None:
        """Raise UserError for more given actions than a policy has learned to continue."""
        most = getattr(self.module, "most_prefix", 0)
        if most and delay > most:
            learned = f"this policy has learned to continue up to {most} actions (--trainer.prefix {most})"
            raise UserError(f"{option} {delay}: {learned}; train it with --trainer.prefix {delay}, or 0 for guidance")

    def exploring(self, module: nn.Module) -> "Policy":
        """The policy that collects with another module, or the same one; it plans as often."""
        return Policy(module, self.normaliser, self.spec, Inference(action_steps=self.settings.action_steps))

    @property
    def most_delay(self) -> int:
        """The largest `delay` that `plan` takes: in real time, of a policy that has learned it, --trainer.prefix."""
        return (self.settings.real_time and getattr(self.module, "most_prefix", 0)) or self.chunk

    @property
    def method(self) -> str:
        """How the time that planning takes is bridged."""
        return next(iter(methods_of(self.settings)), "naive")

    @property
    def inference(self) -> dict[str, Any]:
        """The inference settings in effect, recorded with every evaluation."""
        how: dict[str, Any] = {"obs_steps": self.obs_steps, "chunk": self.chunk, "action_steps": self.action_steps}
        how["ensemble"] = self.settings.ensemble
        if hasattr(self.module, "samplers"):
            how |= {"sampler": self.module.sampler, "sampling_steps": self.module.sampling_steps}
        if getattr(self.module, "guidance", None) is not None:
            how |= {"guidance": self.module.guidance}
        if self.settings.delay or self.method in ("blocking", "real_time"):
            how |= {"delay": self.settings.delay, "method": self.method}
        return how | ({"task": self.settings.task or self.told or self.assumed} if "task" in self.spec else {})

    def tell(self, task: str | list[str] | None) -> None:
        """Name the task of the environment, a text or one for each row; None, or one not understood, names none."""
        self.told = None
        if task is not None and "task" in self.spec:
            with contextlib.suppress(UserError):
                texts = [task] if isinstance(task, str) else task
                self.normaliser.described(texts)
                self.told = texts[0] if len(set(texts)) == 1 else texts

    def reset(self, seeds: Sequence[int] | None = None) -> None:
        """Start new episodes: clear history and chunks. `seeds` fix a stochastic policy's noise, one per row."""
        self._history: dict[str, list[Tensor]] = {}
        self._age: Tensor | None = None  # [N], actions since each row's episode began
        self._seen = torch.empty(0, dtype=torch.bool)  # [N], whether each row has frames in its history
        self._plan = torch.empty(0)  # [slots, N, Ta, Da], each row's newest chunks, by their number
        self._plans: list[tuple[Tensor, Tensor]] = []  # ensembling: (where each begins [N], -1 for none; chunk)
        self._last = torch.empty(0)  # [N, Da], with a delay: each row's last action; of a first step NaN, or -1
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]

    def to(self, device: Any) -> "Policy":
        """Move the policy to a device, such as "cuda", "cuda:1", "mps" or "cpu"; returns itself.

        Raises:
            UserError: there is no such device here.
        """
        device = usable(device)
        self.module.to(device)
        self.normaliser.to(device)
        self._history = {key: [frame.to(device) for frame in past] for key, past in self._history.items()}
        return self

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
        state: dict[str, Any] = {"age": self._age, "seen": self._seen, "history": self._history}
        state |= {"plan": self._plan, "plans": self._plans, "last": self._last}
        return state | {"generators": [generator.get_state() for generator in self._generators]}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
        self.reset()
        self._age, self._plan, self._plans = state["age"], state["plan"], state["plans"]
        if self._plan.ndim == 3:  # of an older version
            self._plan = self._plan[None]
        self._last = state.get("last", self._last)
        if self._age is not None:
            self._seen = state.get("seen", self._age > 0)
        self._history = {k: [frame.to(self._device) for frame in past] for k, past in state["history"].items()}
        for saved in state.get("generators", ()):
            self._generators.append(torch.Generator())
            self._generators[-1].set_state(saved)

    def restart(self, rows: Tensor) -> None:
        """Start new episodes in the rows `[n]` of a batch; the other rows continue."""
        if self._age is not None and len(rows):
            self._age[rows], self._seen[rows] = 0, False
            if len(self._last):
                self._last[rows] = unknown(self._last)
            for ages, _ in self._plans:
                ages[rows] = -1

    @torch.no_grad()
    def act(self, observation: dict[str, Any], rows: Tensor | None = None, env_step: int | None = None) -> np.ndarray:
        """Next action, `[Da]` for one observation or `[N, Da]` for a batch, in the environment's units, float32.

        Discrete actions are their numbers, one or `[N]` int64. With a delay it is what a robot would execute now, while
        the policy plans: `hold(observation, last)` gives the actions where it stands still.

        Args:
            observation: key -> array of one frame, or of N frames (the same N until `reset`); `task`, a text or N.
                Pictures are uint8, or floats from 0 to 1, with the channels first or last; of any size where the
                policy's data was resized (--dataset.image-size), as they are then resized in the same way.
            rows: `[n]`, the rows of the batch that act, whose frames these are; the other rows are unchanged.
            env_step: Environment steps of the run so far, for a module whose exploration depends on it.

        Raises:
            UserError: an observation key is missing, has another width than the policy was trained with, values that
                are not finite, or pictures that do not follow the rule of `data.pictures`.
        """
        if env_step is not None:
            contracts.set_env_step(self.module, env_step)
        frames, batched = self._looked(observation, rows)
        if self.plain:
            only = self._planned(frames, rows).numpy()
            return only if batched else only[0]
        assert self._age is not None
        chosen = torch.arange(len(self._age)) if rows is None else rows
        age = self._age[chosen]  # [n]
        self._remember(frames, chosen)
        due = self.timing.due(age)
        if due.any():
            self._replan(observation, chosen[due], age[due], due)
        action = self._now(chosen, age) if self.settings.ensemble is None else self._averaged(chosen, age)
        if self.settings.delay:
            action = self._held(action, frames, chosen, age)
        self._age[chosen] += 1
        return action.numpy() if batched else action[0].numpy()

    @torch.no_grad()
    def plan(self, observation: dict[str, Any], previous: Any = None, delay: int = 0) -> np.ndarray:
        """A whole chunk, `[Ta, Da]` for one observation or `[N, Ta, Da]` for a batch, in the environment's units.

        The observation joins the history, as in `act`. The chunk is float32, of single actions `[1, Da]`, and of
        discrete ones `[Ta]` int64. It is neither kept nor executed: what `act` does next does not depend on it.

        Args:
            observation: As of `act`.
            previous: What is left of the last chunk, `[Tp, Da]` or `[N, Tp, Da]`, whose first action is that of this
                step. With `real_time`, the chunk is made to agree with it.
            delay: How many of these are executed before the chunk takes over; with `real_time` it begins with them.

        Raises:
            UserError: as of `act`, or `previous` and `delay` that do not fit.
        """
        rows, batched = self._observed(observation)
        rest = None if previous is None else self._rest_of(previous, delay, len(rows), batched)
        chunk = self._chunks(observation, rows, rest=rest).numpy()
        return chunk if batched else chunk[0]

    def _rest_of(self, previous: Any, delay: int, rows: int, batched: bool) -> Rest | None:
        """The rest of the last chunk, as of `plan`; None where nothing is made of it."""
        shape = ((rows,) if batched else ()) + ("Tp", *self.action_shape)
        given = numbers(previous, "previous").float()
        if given.ndim != len(shape) or any(a != b for a, b in zip(given.shape, shape, strict=True) if b != "Tp"):
            raise UserError(f"previous has shape {list(given.shape)}, expected [{', '.join(map(str, shape))}]")
        left = given.shape[batched]
        if left > self.chunk:
            raise UserError(f"previous has {left} actions, expected at most {self.chunk}, the chunk's")
        delay = whole_delay("delay", delay, left, "actions of previous")
        if not given.isfinite().all():
            raise UserError("previous has NaN or Inf; expected the actions that are executed next")
        if not self.settings.real_time or not left:
            return None
        self._check_prefix("delay", delay)
        given = given if batched else given[None]
        actions = given.new_zeros(rows, self.chunk, given.shape[-1])
        actions[:, :left] = given
        return Rest(actions, torch.full((rows,), left), delay)

    @torch.no_grad()
    def observe(self, observation: dict[str, Any]) -> None:
        """Add an observation to the history, at a step at which nothing is planned. Raises UserError, as of `act`."""
        self._observed(observation)

    def _observed(self, observation: dict[str, Any]) -> tuple[Tensor, bool]:
        """Add an observation to the history; returns (all rows `[N]`, whether it came as a batch)."""
        frames, batched = self._looked(observation, None)
        rows = torch.arange(len(next(iter(frames.values()))))
        self._remember(frames, rows)
        return rows, batched

    def _looked(self, observation: dict[str, Any], rows: Tensor | None) -> tuple[dict[str, Tensor], bool]:
        """The checked frames of an observation, on the module's device, and whether they came as a batch.

        Raises UserError: as of `frames_of`, or another number of rows than before, or than of seeds.
        """
        frames, batched = frames_of(observation, self.spec, self.frames)
        # The GPU is synchronised only once, when the action is copied back.
        frames = {key: frame.to(self._device, non_blocking=True) for key, frame in frames.items()}
        if self._age is None:
            if not (count := len(next(iter(frames.values())))):
                raise UserError("the observation has no rows")
            if rows is not None and int(rows.max()) >= count:
                raise UserError(f"an episode begins with all rows; found rows {rows.tolist()} of {count}")
            if (seeds := len(self._generators)) not in (0, count):
                raise UserError(
                    f"the observation has {count} rows, reset() had {seeds} seeds; give it one seed per row"
                )
            self._age, self._seen = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
        for key, frame in frames.items():
            if len(frame) != (len(self._age) if rows is None else len(rows)):
                found = f"{key!r} has {len(frame)} rows after {len(self._age)}"
                raise UserError(f"{found}; call reset() for other episodes")
        return frames, batched

    def _planned(self, batch: dict[str, Any], rows: Tensor | None, rest: Rest | None = None) -> Tensor:
        """The module's output for a batch, in the environment's units, on the CPU.

        Args:
            batch: Observations in the environment's units.
            rest: What is left of the last chunks, with which these are to agree, or None.
        """
        normalised = self.normaliser(batch)
        action = self._forward(normalised if rest is None else normalised | self._known(batch, rest), rows)
        action = self.normaliser.undo("action", action.float() if action.is_floating_point() else action).cpu()
        action = self.form.to_robot(action, batch)
        if rest is not None:
            frozen = torch.arange(self.chunk) < rest.frozen[:, None]
            action = torch.where(frozen[..., None], rest.actions, action)  # they are executed in any case
        return action

    def _known(self, batch: dict[str, Any], rest: Rest) -> dict[str, Tensor]:
        """What a sampler is told of the last chunks: `previous`, normalised, `previous_weight` and `prefix`."""
        ended = torch.arange(self.chunk) >= rest.left[:, None]
        previous = self.form.from_robot(rest.actions, batch).to(self._device)  # to what is observed now
        previous = self.normaliser({"action": previous})["action"]
        previous = previous.masked_fill(ended[..., None].to(self._device), 0.0)
        told = {"previous": previous, "previous_weight": rest.weight, "prefix": rest.frozen}
        return {key: value.to(self._device) for key, value in told.items()}

    def _every(self, rows: Tensor) -> bool:
        """Whether `rows` `[n]` are all rows, in their order."""
        return torch.equal(rows, torch.arange(len(self._seen)))

    def _remember(self, frames: dict[str, Tensor], rows: Tensor) -> None:
        """Add frames of `rows` to the history; the first frame of an episode fills its whole history."""
        begins, everything = self.seen_steps > 1 and not bool((seen := self._seen[rows]).all()), self._every(rows)
        for key, frame in frames.items():
            past, at = self._history.get(key, [frame] * self.steps_of[key]), rows.to(frame.device)
            newer = [*(before if everything else before[at] for before in past[1:]), frame]
            if begins:
                first = (~seen).to(frame.device).view(-1, *[1] * (frame.ndim - 1))
                newer = [torch.where(first, frame, before) for before in newer]
            if not everything:
                newer = [before.index_copy(0, at, now) for before, now in zip(past, newer, strict=True)]
            self._history[key] = newer
        if begins:
            self._seen[rows] = True

    def _chunks(
        self, observation: dict[str, Any], rows: Tensor, due: Tensor | None = None, rest: Rest | None = None
    ) -> Tensor:
        """New chunks `[n, Ta, Da]` of `rows` `[n]` from their histories, in the environment's units, on the CPU.

        Args:
            due: Which rows of the observation these are, bool; None for all.
            rest: What is left of their last chunks.
        """
        everything = self._every(rows)
        batch: dict[str, Any] = {}
        for key, past in self._history.items():
            frames = past if everything else [frame[rows.to(frame.device)] for frame in past]
            batch[key] = torch.stack(frames, 1) if self.obs_steps > 1 else torch.cat(frames, 1)
        if "task" in self.spec:
            texts = self._tasks(observation, len(rows) if due is None else len(due))
            batch["task"] = [text for i, text in enumerate(texts) if due is None or due[i]]
        action = self._planned(batch, rows, rest)
        return action if self.chunked else action[:, None]

    def _replan(self, observation: dict[str, Any], rows: Tensor, age: Tensor, due: Tensor) -> None:
        """Plan new chunks of `rows` `[n]`, which take their places among those that are kept."""
        assert self._age is not None
        number = self.timing.number(age)
        rest = self._unfinished(rows, number) if self.settings.real_time else None
        chunk = self._chunks(observation, rows, due, rest)
        count, everything = len(self._age), self._every(rows)
        if self.settings.ensemble is not None:
            starts = torch.full_like(self._age, -1)
            starts[rows] = self.timing.start(age)
            whole = chunk if everything else chunk.new_zeros(count, *chunk.shape[1:]).index_copy(0, rows, chunk)
            self._plans.append((starts, whole))
        elif everything and self.timing.slots == 1:
            self._plan = chunk[None]
        else:
            if not len(self._plan):
                self._plan = chunk.new_zeros(self.timing.slots, count, *chunk.shape[1:])
            self._plan = self._plan.index_put((number % self.timing.slots, rows), chunk)

    def _unfinished(self, rows: Tensor, number: Tensor) -> Rest | None:
        """What is left, after their `steps`, of the plans before those of `number` `[n]`; None where all are first."""
        left = torch.where(number > 0, self.chunk - self.action_steps, 0)
        if not left.any():
            return None
        before = self._plan[(number - 1).clamp(min=0) % self.timing.slots, rows]
        return Rest(before.roll(-self.action_steps, 1), left, self.settings.delay)

    def _now(self, rows: Tensor, age: Tensor) -> Tensor:
        """The actions `[n, Da]` of this step, by the chunks that have arrived."""
        if self.timing.slots == 1 and not self.settings.delay:
            return self._plan[0][rows, age % self.action_steps]
        number, step = self.timing.current(age)
        return self._plan[number.clamp(min=0) % self.timing.slots, rows, step.clamp(min=0)]

    def _held(self, action: Tensor, frames: dict[str, Tensor], rows: Tensor, age: Tensor) -> Tensor:
        """`action` `[n, Da]` with those in place that hold the robot still where no chunk has arrived."""
        assert self._age is not None
        if not len(self._last):
            self._last = torch.empty(len(self._age), *action.shape[1:], dtype=action.dtype)
            self._last[:] = unknown(self._last)
        still = self.timing.current(age)[1] < 0
        if still.any():
            seen = {key: frame.cpu()[still].numpy() for key, frame in frames.items()}
            held = np.asarray(self.hold(seen, self._last[rows[still]].numpy()))
            action = action.clone()
            if held.shape != action[still].shape:
                raise UserError(f"hold() returned actions of shape {held.shape}, expected {tuple(action[still].shape)}")
            action[still] = torch.as_tensor(held, dtype=action.dtype)
        self._last[rows] = action
        return action

    @property
    def borders(self) -> np.ndarray:
        """`[N]` bool: another chunk than in the step before it, or stillness, has given the last action of `act`.

        Of single actions each is one.
        """
        assert self._age is not None
        return np.ones(len(self._age), bool) if self.plain else self.timing.borders(self._age - 1).numpy()

    def _averaged(self, rows: Tensor, age: Tensor) -> Tensor:
        """The weighted mean `[n, Da]` of the actions that all chunks plan for this step (Zhao et al., 2023)."""
        assert self.settings.ensemble is not None and self._age is not None
        actions, counts = [], []
        for starts, chunk in self._plans:  # the oldest first
            start = starts[rows]
            planned = age - start  # steps ago
            there = (start >= 0) & (planned < self.chunk)
            counts.append(there & self.timing.arrived(start, age) if self.settings.delay else there)
            actions.append(chunk[rows, planned.clamp(0, self.chunk - 1)])
        valid = torch.stack(counts)  # [chunks, n]
        place = valid.cumsum(0) - 1  # 0 for the oldest
        weights = (-self.settings.ensemble * place).masked_fill(~valid, -math.inf).softmax(0)
        kept = [bool(((self._age - starts < self.chunk) & (starts >= 0)).any()) for starts, _ in self._plans]
        self._plans = [plan for plan, alive in zip(self._plans, kept, strict=True) if alive]
        return self.mean(weights, torch.stack(actions))

    def mean(self, weights: Tensor, actions: Tensor) -> Tensor:
        """The mean `[..., Da]` of actions `[n, ..., Da]` by weights `[n, ...]` that sum to 1; of rotations, a rotation.

        What never changes in the data is exact.
        """
        if self.form.changes:
            return self.form.mean(weights, actions)
        return self.normaliser.exact("action", (weights[..., None] * actions).sum(0))

    def _tasks(self, observation: dict[str, Any], rows: int) -> list[str]:
        """The text of each row's task."""
        told = self.told if isinstance(self.told, str) or len(self.told or ()) == rows else None
        task = observation.get("task", self.settings.task or told or self.assumed)
        if task is None:
            task, *others = self.spec["task"]["values"]
            logger.warning(
                "no task is named (--policy.task, or 'task' of act()); of %d it is %r", 1 + len(others), task
            )
            self.assumed = task  # warned once, and recorded with evaluations
        texts = [task] * rows if isinstance(task, str) else [str(text) for text in task]
        if len(texts) != rows:
            raise UserError(f"'task' has {len(texts)} texts; expected one, or one for each of {rows} rows")
        return texts

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
                    problems.append(first_line(error, repr(error)))
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


Hold = Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray]
"""(observation, one frame of each of n rows; last action `[n, Da]`, NaN in an episode's first step) -> the action `[n,
Da]` with which the robot stands still."""


def motionless(observation: dict[str, np.ndarray], last: np.ndarray) -> np.ndarray:
    """Zeros, of which an environment takes what is nearest within its bounds."""
    return np.zeros_like(last)


def unknown(last: Tensor) -> float:
    """What stands for no action."""
    return math.nan if last.is_floating_point() else -1
