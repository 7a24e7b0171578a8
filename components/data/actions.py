"""Actions as a policy learns them: absolute, relative to the state, or steps from one to the next; rotations as 6D.

    relative    a[t+k] - state[t]          for every step k of a chunk (UMI, pi0)
    delta       a[t+k] - a[t+k-1]          with state[t] in the place of a[t-1]

of the dimensions that `pairs` names; the others stay absolute. A rotation R is learnt as the first two columns of its
matrix (`rotations.py`); relative, it is R_state^T R_action, and a delta is R[k-1]^T R[k]. What is learnt has first the
dimensions that are no rotation, in their order, then 6 numbers for each rotation.

The two ways are `encode` and `decode`. An `ActionForm` stands in `spec["action"]["form"]`, hence in `policy.json`, so
that whoever has a policy's spec can undo it: `ActionForm.of(spec)`, then `to_robot` and `from_robot`, which take the
raw observations of a batch.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, nearest
from . import rotations as so3
from .normalisation import constants

MODES = ("absolute", "relative", "delta")
STATE = "observation.state"
RANGE = re.compile(r"(\d{1,6})(?::(\d{1,6}))?")
SHOWN = 40  # names in a message
FEW = 0.05  # share of the items that a step of a chunk needs for statistics of its own


@dataclass(frozen=True)
class Rotation:
    """Dimensions of an action that are a rotation."""

    places: tuple[int, ...]
    kind: str
    state: tuple[int, ...] = ()
    """Dimensions of the state with the rotation that it is relative to; none for an absolute one."""
    state_kind: str = ""


@dataclass(frozen=True)
class ActionForm:
    """How actions are learnt; without arguments beyond the width, as they are."""

    width: int
    """Dimensions of the robot's action."""
    mode: str = "absolute"
    pairs: tuple[tuple[int, int], ...] = ()
    """(dimension of the action, dimension of the state) of what is changed, without rotations."""
    rotations: tuple[Rotation, ...] = ()
    state_width: int = 0
    stats: dict[str, Any] = field(default_factory=dict)
    """Statistics `[width]` of the robot's actions."""

    @property
    def changes(self) -> bool:
        """Whether what is learnt differs from the robot's actions at all."""
        return bool(self.pairs or self.rotations)

    @property
    def relates(self) -> bool:
        """Whether it depends on the state."""
        return bool(self.pairs) or any(rotation.state for rotation in self.rotations)

    @property
    def plain(self) -> list[int]:
        """The dimensions that are no rotation."""
        turned = {place for rotation in self.rotations for place in rotation.places}
        return [place for place in range(self.width) if place not in turned]

    @property
    def learnt_width(self) -> int:
        """Dimensions of what is learnt."""
        return len(self.plain) + 6 * len(self.rotations)

    # ---- there and back ----

    def encode(self, action: Tensor, state: Tensor) -> Tensor:
        """Actions `[..., Da]` or chunks `[..., T, Da]` at states `[..., Ds]` as they are learnt, float32."""
        if not self.changes:
            return action
        single = action.ndim == state.ndim
        x, s = (action[..., None, :] if single else action).double(), state.double()
        changed = x - self._before(x, s)
        parts = [changed[..., self.plain] if self.rotations else changed]
        for rotation in self.rotations:
            matrix = so3.to_matrix(rotation.kind, x[..., list(rotation.places)])  # [..., T, 3, 3]
            if rotation.state:
                first = so3.to_matrix(rotation.state_kind, s[..., None, list(rotation.state)])
                before = torch.cat([first, matrix[..., :-1, :, :]], -3) if self.mode == "delta" else first
                matrix = before.transpose(-1, -2) @ matrix
            parts.append(so3.from_matrix("6d_columns", matrix))
        learnt = torch.cat(parts, -1).float()
        return learnt[..., 0, :] if single else learnt

    def decode(self, learnt: Tensor, state: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
        """The robot's actions from learnt ones, as `encode` takes them, float32; constants of the data are exact.

        Of the numbers that stand for a rotation, it has those that the data has.
        """
        if not self.changes:
            return learnt
        single = learnt.ndim == state.ndim
        x, s = (learnt[..., None, :] if single else learnt).to(precision), state.to(precision)
        plain, places = len(self.plain), list(self.plain)
        parts = [self._after(x[..., :plain], s)]
        for number, rotation in enumerate(self.rotations):
            six = x[..., plain + 6 * number : plain + 6 * number + 6]
            matrix, like = so3.to_matrix("6d_columns", six), None
            if rotation.state:
                before = s[..., None, list(rotation.state)]
                matrix = self._turned(so3.to_matrix(rotation.state_kind, before), matrix)
                like = before if rotation.kind == rotation.state_kind else None
            parts.append(self._as_recorded(rotation, so3.from_matrix(rotation.kind, matrix, like)))
            places += rotation.places
        action = torch.cat(parts, -1)[..., [places.index(place) for place in range(self.width)]]
        action = self.exact(action.float())
        return action[..., 0, :] if single else action

    def _before(self, x: Tensor, state: Tensor) -> Tensor:
        """What each dimension of chunks `[..., T, Da]` is relative to: 0 for an absolute one."""
        base = self._of_state(state)[..., None, :]  # [..., 1, Da]
        if self.mode != "delta":
            return base
        return torch.cat([base, x[..., :-1, :] * self._changed(x)], -2)

    def _after(self, x: Tensor, state: Tensor) -> Tensor:
        """Undo `_before` for the dimensions that are no rotation, `[..., T, plain]`."""
        base, changed = self._of_state(state)[..., None, self.plain], self._changed(x)[self.plain]
        steps = torch.where(changed > 0, x.cumsum(-2), x) if self.mode == "delta" else x
        return steps + base

    def _changed(self, x: Tensor) -> Tensor:
        """`[Da]`, 1 for the dimensions that are changed, else 0."""
        changed = dict(self.pairs)
        return torch.tensor([float(place in changed) for place in range(self.width)], dtype=x.dtype, device=x.device)

    def _of_state(self, state: Tensor) -> Tensor:
        """The state `[..., Ds]` in the place of the dimensions that are relative to it, `[..., Da]`; elsewhere 0."""
        if not self.pairs:
            return state.new_zeros(*state.shape[:-1], self.width)
        of = dict(self.pairs)
        return state[..., [of.get(place, 0) for place in range(self.width)]] * self._changed(state)

    def _as_recorded(self, rotation: Rotation, x: Tensor) -> Tensor:
        """Rotations `[..., n]` by the numbers that are nearer to the data's range: w < 0, an angle beyond pi, ..."""
        if not {"min", "max"} <= set(self.stats):
            return x
        sides = (np.asarray(self.stats[name])[list(rotation.places)] for name in ("min", "max"))
        low, high = (torch.as_tensor(side, dtype=x.dtype, device=x.device) for side in sides)
        other = so3.nearest(rotation.kind, x, (low + high) / 2 if rotation.kind in so3.EULER else -x)
        near, far = ((y - y.maximum(low).minimum(high)).abs().sum(-1, keepdim=True) for y in (other, x))
        return torch.where(near < far, other, x)

    def _turned(self, first: Tensor, matrix: Tensor) -> Tensor:
        """Rotations `[..., T, 3, 3]` of a chunk, absolute again; `first` `[..., 1, 3, 3]` is the state's."""
        if self.mode != "delta":
            return first @ matrix
        found, now = [], first[..., 0, :, :]
        for step in matrix.unbind(-3):
            now = now @ step
            found.append(now)
        return torch.stack(found, -3)

    # ---- for a policy ----

    @classmethod
    def of(cls, spec: dict[str, Any]) -> "ActionForm":
        """That of a policy's spec. Raises UserError: it does not fit the rest of the spec."""
        action = spec.get("action", {})
        record, learnt = action.get("form"), action["shape"][-1] if action.get("shape") else 0
        if record is None:
            return cls(learnt)
        turned = tuple(
            Rotation(tuple(r["places"]), r["kind"], tuple(r["state"]), r["state_kind"]) for r in record["rotations"]
        )
        pairs = tuple((int(action), int(state)) for action, state in record["pairs"])
        form = cls(record["width"], record["mode"], pairs, turned, record["state_width"], dict(record["stats"]))
        form.check(learnt, spec)
        return form

    def record(self) -> dict[str, Any]:
        """As `of` reads it, JSON-able."""
        turned = [
            {"places": list(r.places), "kind": r.kind, "state": list(r.state), "state_kind": r.state_kind}
            for r in self.rotations
        ]
        pairs = [list(pair) for pair in self.pairs]
        return {"width": self.width, "mode": self.mode, "pairs": pairs, "rotations": turned} | {
            "state_width": self.state_width,
            "stats": self.stats,
        }

    def check(self, learnt: int, spec: dict[str, Any]) -> None:
        """Refuse a form that is none, or of other data. Raises UserError."""
        places = [*(place for place, _ in self.pairs), *(place for r in self.rotations for place in r.places)]
        used = [*(place for _, place in self.pairs), *(place for r in self.rotations for place in r.state)]
        problem = ""
        if not 0 < self.width <= 1_000_000 or self.mode not in MODES:
            problem = f"width {self.width}, mode {self.mode!r:.20}"
        elif len(set(places)) != len(places) or any(not 0 <= place < self.width for place in places):
            problem = f"dimensions {places} of an action of width {self.width}"
        elif any(not 0 <= place < self.state_width for place in used) or (used and self.mode == "absolute"):
            problem = f"dimensions {used} of a state of width {self.state_width}, {self.mode}"
        for r in self.rotations if not problem else ():
            if len(r.places) != so3.WIDTHS.get(r.kind) or (r.state and len(r.state) != so3.WIDTHS.get(r.state_kind)):
                problem = (
                    f"a rotation {r.kind!r:.20} of {len(r.places)} numbers, {r.state_kind!r:.20} of {len(r.state)}"
                )
        if not problem and self.learnt_width != learnt:
            problem = f"{self.learnt_width} learnt dimensions, its shape has {learnt}"
        if not problem and any(np.shape(value) != (self.width,) for value in self.stats.values()):
            problem = "statistics of another width"
        shape = spec.get(STATE, {}).get("shape", ())
        if not problem and used and not (shape and shape[-1] % self.state_width == 0 and shape[-1]):
            problem = f"a state of width {self.state_width}, but {STATE!r} has the shape {tuple(shape)}"
        if problem:
            raise UserError(f"spec.action.form does not fit: {problem}")

    def newest(self, observation: dict[str, Any], like: Tensor) -> Tensor:
        """The newest state `[B, Ds]` of a raw batch with any history, where `like` is; zeros if it is not needed."""
        if not self.relates:
            return like.new_zeros(like.shape[0], max(self.state_width, 1))
        state = observation[STATE]
        return state.flatten(1)[:, -self.state_width :].to(like.device)

    def to_robot(self, learnt: Tensor, observation: dict[str, Any], precision: torch.dtype = torch.float64) -> Tensor:
        """The robot's actions `[B, (T,) Da]` from learnt ones and the raw batch of observations.

        Args:
            precision: Of the computation; float32 where a device or a format has no other.
        """
        return self.decode(learnt, self.newest(observation, learnt), precision) if self.changes else learnt

    def from_robot(self, action: Tensor, observation: dict[str, Any]) -> Tensor:
        """Undo `to_robot`: the robot's actions `[B, (T,) Da]`, relative to the state that is observed now."""
        return self.encode(action, self.newest(observation, action)) if self.changes else action

    def exact(self, action: Tensor) -> Tensor:
        """The robot's actions `[..., Da]` with those dimensions that never change in the data as they are there."""
        if not (found := constants({"stats": self.stats})):
            return action
        where, value = (part.to(action.device) for part in found)
        return torch.where(where, value, action)

    def mean(self, weights: Tensor, actions: Tensor) -> Tensor:
        """The mean `[..., Da]` of the robot's actions `[n, ..., Da]` by weights `[n, ...]` that sum to 1."""
        if not self.rotations:
            return self.exact((weights[..., None] * actions).sum(0))
        turned = tuple(replace(rotation, state=(), state_kind="") for rotation in self.rotations)
        plain = replace(self, mode="absolute", pairs=(), rotations=turned)
        mean = plain.decode((weights[..., None] * plain.encode(actions, actions)).sum(0), actions[0])
        count = torch.arange(len(actions)).view(-1, *[1] * (weights.ndim - 1))
        newest = torch.where(weights > 0, count, 0).argmax(0)  # of those that count
        return self.nearest(mean, actions.take_along_dim(newest[None, ..., None], 0)[0], so3.QUATERNIONS)

    def nearest(self, action: Tensor, to: Tensor, kinds: Sequence[str] = tuple(so3.WIDTHS)) -> Tensor:
        """The robot's actions `[..., Da]`, each rotation by those of its numbers that are nearest to those of `to`."""
        action = action.clone()
        for rotation in self.rotations:
            if rotation.kind in kinds:
                x, y = (values[..., list(rotation.places)] for values in (action, to))
                action[..., list(rotation.places)] = so3.nearest(rotation.kind, x, y)
        return action


def robot_width(feature: dict[str, Any]) -> int:
    """Width of the robot's action, of `spec["action"]`."""
    return int(feature["form"]["width"] if "form" in feature else feature["shape"][-1])


def learnt_names(feature: dict[str, Any]) -> list[str]:
    """Names of what is learnt, of `spec["action"]`, whose own are the robot's; places where it has none.

    The six numbers of a rotation have the names of its dimensions, joined by commas.
    """
    given, width = feature.get("names", []), robot_width(feature)
    given = given if len(given) == width else [str(place) for place in range(width)]
    turned = [rotation["places"] for rotation in feature["form"]["rotations"]] if "form" in feature else []
    plain = [name for place, name in enumerate(given) if all(place not in places for places in turned)]
    return plain + [name for places in turned for name in [",".join(given[place] for place in places)] * 6]


def robot_stats(feature: dict[str, Any]) -> dict[str, Any]:
    """Statistics of the robot's actions, of `spec["action"]`."""
    return feature["form"]["stats"] if "form" in feature else feature.get("stats") or {}


# ---- what the options say ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dimensions:
    """The dimensions of a vector, by name where the data has telling ones, or else by place."""

    key: str
    width: int
    names: list[str]
    """Empty where they have none."""

    @classmethod
    def of(cls, key: str, width: int, names: Sequence[str]) -> "Dimensions":
        """With the names, unless these are places in disguise, or some of them are there twice."""
        told = len(names) == width and len(set(names)) == width and not numbered(names)
        return cls(key, width, list(names) if told else [])

    def find(self, word: str, option: str) -> list[int]:
        """The places that a word means: a name, a place, or a range of places. Raises UserError."""
        if word in self.names:
            return [self.names.index(word)]
        if match := RANGE.fullmatch(word):
            low = int(match[1])
            high = int(match[2]) if match[2] else low + 1
            if low < high <= self.width:
                return list(range(low, high))
        have = nearest(word, self.names) if self.names else f"it has no names, say places from 0 to {self.width - 1}"
        raise UserError(f"{option}: {self.key} has no dimension {word!r}; {have}")

    def __str__(self) -> str:
        more = [f"and {self.width - SHOWN} more"] * (self.width > SHOWN)
        named = ", ".join([*self.names[:SHOWN], *more]) if self.names else f"{self.width} dimensions without names"
        return f"{self.key}: {named}"

    def name(self, place: int) -> str:
        """Of one dimension."""
        return self.names[place] if self.names else str(place)


def numbered(names: Sequence[str]) -> bool:
    """Whether names tell no more than places: "pose.0", "pose.1", ... in this order."""
    places: dict[str, int] = {}
    for prefix, _, number in (name.rpartition(".") for name in names):
        if number != str(places.setdefault(prefix, 0)):
            return False
        places[prefix] += 1
    return True


def form_of(
    mode: str, keys: Sequence[str], turned: Sequence[str], action: Dimensions, state: Dimensions | None
) -> ActionForm:
    """The form that the options `--dataset.action`, `--dataset.action-keys` and `--dataset.rotations` describe.

    Args:
        keys: Dimensions that are changed, as NAME, NAME=STATE_NAME, or !NAME for one that is not; all without a word.
        turned: NAMES=KIND of each rotation, or NAMES=KIND@NAMES=KIND with that of the state.
        state: None where the data has no `observation.state`.

    Raises:
        UserError: dimensions that do not exist, cannot be paired, or are said twice.
    """
    keys, turned = [str(word) for word in keys], [str(word) for word in turned]
    if mode == "absolute" and keys:
        raise UserError(f"--dataset.action-keys {' '.join(keys)}: they choose what --dataset.action relative changes")
    if mode != "absolute" and state is None:
        raise UserError(f"--dataset.action {mode} needs a state, {STATE!r}, which the data does not have")
    groups = [_rotation(word, action, state, mode) for word in turned]
    said = [place for group in groups for place in group.places]
    if twice := [action.name(place) for place in said if said.count(place) > 1]:
        raise UserError(f"--dataset.rotations: {twice[0]!r} is in it twice")
    if mode == "absolute" or state is None:
        return ActionForm(action.width, rotations=tuple(groups))
    chosen, told = _chosen(keys, action, state)
    known = {place for group in groups if group.state for place in group.places} | set(told)
    pairs = told | _paired([place for place in chosen if place not in known], action, state, mode)
    relative = []
    for group in groups:
        word = ",".join(action.name(place) for place in group.places)
        if (some := sum(place in chosen for place in group.places)) not in (0, len(group.places)):
            raise UserError(f"--dataset.action-keys: a part of the rotation {word} alone; name all of it, or none")
        if not some:
            group = replace(group, state=(), state_kind="")
        elif not group.state:
            group = replace(group, state=tuple(pairs[place] for place in group.places), state_kind=group.kind)
        relative.append(group)
    plain = tuple((place, pairs[place]) for place in sorted(pairs) if place not in said)
    if not plain and not any(group.state for group in relative):
        raise UserError(f"--dataset.action-keys {' '.join(keys)}: no dimension is left that is {mode}; {action}")
    return ActionForm(action.width, mode, plain, tuple(relative), state.width)


def _rotation(word: str, action: Dimensions, state: Dimensions | None, mode: str) -> Rotation:
    """A word of `--dataset.rotations`. Raises UserError."""
    here, at, there = word.partition("@")
    if at and (mode == "absolute" or state is None):
        raise UserError(f"--dataset.rotations {word}: a rotation of the state is needed for a relative one only")
    found = [_turned(part, of, word) for part, of in ((here, action), (there, state)) if of and (part or at)]
    (places, kind), (of_state, state_kind) = found[0], found[1] if at else ((), "")
    return Rotation(places, kind, of_state, state_kind)


def _turned(part: str, of: Dimensions, word: str) -> tuple[tuple[int, ...], str]:
    names, equals, kind = part.rpartition("=")
    option = f"--dataset.rotations {word}"
    if not equals or kind not in so3.WIDTHS:
        example = "rx,ry,rz=axis_angle or 3:7=quaternion_xyzw"
        known = nearest(kind, so3.WIDTHS) if equals else f"kinds: {', '.join(so3.WIDTHS)}"
        raise UserError(f"{option}: expected NAMES=KIND such as {example}; {known}")
    places = tuple(place for name in names.split(",") for place in of.find(name, option))
    if len(places) != so3.WIDTHS[kind] or len(set(places)) != len(places):
        have = f"{len(set(places))} dimension{'s' * (len(set(places)) != 1)}"
        raise UserError(f"{option}: {kind} has {so3.WIDTHS[kind]} numbers, {names} names {have}")
    return places, kind


def _chosen(keys: Sequence[str], action: Dimensions, state: Dimensions) -> tuple[list[int], dict[int, int]]:
    """The dimensions that `--dataset.action-keys` chooses, and the pairs that it says. Raises UserError."""
    kept: list[int] = []
    dropped: list[int] = []
    told: dict[int, int] = {}
    for word in keys:
        option, bare = f"--dataset.action-keys {word}", word.removeprefix("!")
        name, paired, of_state = bare.partition("=") if bare not in action.names else (bare, "", "")
        places = action.find(name, option)
        if paired:
            others = state.find(of_state, option)
            if word != bare or len(others) != len(places):
                raise UserError(f"{option}: expected NAME=STATE_NAME, as many of the state as of the action")
            for place, other in zip(places, others, strict=True):
                if told.setdefault(place, other) != other:
                    raise UserError(f"{option}: {action.name(place)} has two dimensions of the state")
        (kept if word == bare else dropped).extend(places)
    chosen = [place for place in range(action.width) if place in (kept or range(action.width))]
    chosen = [place for place in chosen if place not in dropped]
    return chosen, {place: other for place, other in told.items() if place in chosen}


def _paired(chosen: Sequence[int], action: Dimensions, state: Dimensions, mode: str) -> dict[int, int]:
    """The dimension of the state for each of the action: of the same name where both have names, else of its place.

    Raises:
        UserError: there is none; lists both.
    """
    if action.names and state.names:
        pairs = {place: state.names.index(action.name(place)) for place in chosen if action.name(place) in state.names}
    else:
        pairs = {place: place for place in chosen if place < state.width}
    if missing := [action.name(place) for place in chosen if place not in pairs]:
        more = [f"and {len(missing) - SHOWN} more"] * (len(missing) > SHOWN)
        raise UserError(
            f"--dataset.action {mode}: observation.state has no {', '.join(missing[:SHOWN] + more)} to subtract;"
            f" {action}; {state};"
            f" name pairs by --dataset.action-keys NAME=STATE_NAME, or what stays absolute as '!{missing[0]}'"
        )
    return pairs


def described(form: ActionForm, action: Dimensions, state: Dimensions | None) -> str:
    """The form in a line for the log."""
    parts = []
    to = {"relative": "the state at the chunk's start", "delta": "the action before, the first one the state"}
    if form.relates and state is not None:
        pairs = [f"{action.name(a)} - {state.name(s)}" for a, s in form.pairs]
        pairs += [f"rotation {','.join(map(action.name, r.places))}" for r in form.rotations if r.state]
        parts.append(f"actions are learnt relative to {to[form.mode]}: {', '.join(pairs)}")
        changed = {place for place, _ in form.pairs} | {p for r in form.rotations if r.state for p in r.places}
        if rest := [action.name(place) for place in range(form.width) if place not in changed]:
            parts.append(f"absolute: {', '.join(rest)}")
    if form.rotations:
        kinds = [f"{','.join(map(action.name, r.places))} ({r.kind})" for r in form.rotations]
        parts.append(f"rotations as 6D: {', '.join(kinds)}")
    return "; ".join(parts)


def check_rotations(form: ActionForm, action: Tensor, state: Tensor | None, name: str) -> None:
    """Refuse recorded numbers that are no rotations. Raises UserError with the first kind that is wrong."""
    for rotation in form.rotations:
        sides = [("action", rotation.kind, action[:, list(rotation.places)])]
        if rotation.state and state is not None:
            sides.append((STATE, rotation.state_kind, state[:, list(rotation.state)]))
        for key, kind, values in sides:
            if problem := so3.misfit(kind, values.double()):
                places = ", ".join(map(str, rotation.places if key == "action" else rotation.state))
                raise UserError(
                    f"--dataset.rotations: dimensions {places} of {key!r} of {name} are no {kind}: {problem}"
                )


def step_statistics(
    counts: Sequence[int], statistics: Callable[[Sequence[int]], dict[str, list[float]]]
) -> dict[str, list[list[float]]]:
    """Statistics `[T, D]` of each step of a chunk; steps at the end of a long one, which few items reach, share theirs.

    Args:
        counts: Items that have an action of their own at each step, before their episode ends.
        statistics: Those of the actions at some steps together, without padding.
    """
    few = next((k for k, count in enumerate(counts) if count < max(2, FEW * counts[0])), len(counts))
    few = max(few, 1)
    own = [statistics([k]) for k in range(few)]
    if few < len(counts):
        own += [statistics(range(few - 1, len(counts)))] * (len(counts) - few)
    return {name: [stats[name] for stats in own] for name in own[0]}
