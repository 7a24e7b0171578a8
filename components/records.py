"""Reading of files that anybody may have written: JSON records against a declared shape, and what a folder may hold.

A record is declared as a TypedDict, whose field names and types are what its file must have. Whatever is wrong is one
line: the file, the field, what was expected and what was found.
"""

import functools
import json
import math
import operator
import os
import stat
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, Union

from .errors import UserError

JSON_LIMIT = 1 << 27  # bytes; real metadata takes a few MB
LINES_LIMIT = 2_000_000  # lines of a file of metadata
DEPTH = 50  # lists and objects inside each other, in a record
LARGEST = 1 << 53  # whole numbers up to here are exact as a float

Numbers = float | list[float] | list[list[float]] | list[list[list[float]]]
NOT_NEGATIVE, FROM_0_TO_1 = "a whole number, 0 or more", "a number from 0 to 1"
Size = Annotated[int, NOT_NEGATIVE]
Share = Annotated[float, FROM_0_TO_1]
Dtype = Literal[
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "text"
]  # fmt: skip


class RotationRecord(TypedDict):
    """Dimensions of an action that are a rotation, and those of the state that it is relative to."""

    places: list[Size]
    kind: str
    state: list[Size]
    state_kind: str


class FormRecord(TypedDict):
    """How actions are learnt (`data/actions.py`)."""

    width: Size
    mode: Literal["absolute", "relative", "delta"]
    pairs: list[tuple[Size, Size]]
    rotations: list[RotationRecord]
    state_width: Size
    stats: dict[str, list[float]]


class Told(TypedDict):
    """What a dataset tells of a key beside its shape, in its attribute `facts`."""

    names: NotRequired[list[str]]
    fps: NotRequired[float]
    form: NotRequired[FormRecord]
    steps: NotRequired[Size]
    resized_from: NotRequired[list[list[Size]]]


class Feature(Told):
    """One key of a policy's data."""

    shape: list[Size]
    dtype: Dtype
    stats: NotRequired[dict[str, Numbers]]
    like: NotRequired[str]
    values: NotRequired[list[str]]
    classes: NotRequired[Size]
    stored_shape: NotRequired[list[Size]]
    range: NotRequired[Numbers]
    bounds: NotRequired[dict[str, Numbers]]
    noise: NotRequired[list[Size]]  # shape of what a frozen policy makes it of
    limits: NotRequired[Numbers]


class Component(TypedDict):
    """A component by its name in the registry, and its options."""

    name: str
    options: dict[str, Any]


class PolicyRecord(TypedDict):
    """`policy.json`."""

    format: int
    trainer: Component
    models: dict[str, Component]
    loss: Component
    plugins: list[str]
    own_policy: bool
    spec: dict[str, Feature]
    normalisation: dict[str, str]
    inference: dict[str, Any]
    step: NotRequired[Size]


class ResidualRecord(TypedDict):
    """`residual.json`."""

    scale: float
    low: list[float]
    high: list[float]
    sha256: str
    clips: NotRequired[bool]  # the frozen action before it is corrected; older versions did not


class SteeredRecord(TypedDict):
    """`steered.json`."""

    sha256: str


class Options(TypedDict):
    """The options in `args.json` that others than the script read."""

    seed: Size
    trainer: str
    dataset: str
    plugins: list[str]
    trainer_options: dict[str, Any]
    dataset_options: dict[str, Any]
    env_options: NotRequired[dict[str, Any] | None]
    reward_shift: NotRequired[float | None]
    reward_scale: NotRequired[float | None]


class Environment(TypedDict):
    """An environment by its name in the registry; its options are further fields."""

    name: str


class RunRecord(TypedDict):
    """`args.json`."""

    script: str
    args: Options
    argv: list[str]
    env: Environment | None
    seed: Size
    world_size: Size
    mixed_precision: str
    packages: dict[str, str | None]
    machine: dict[str, Any]
    git_commit: str | None


class Normalisation(TypedDict):
    """How a run's data is normalised: key -> mode, statistics, range of its actions."""

    modes: dict[str, str]
    statistics: dict[str, dict[str, Numbers]]
    bounds: dict[str, dict[str, Numbers]]


class Inherited(TypedDict):
    """`inherited/record.json`: what a run began with."""

    format: int
    data: NotRequired[dict[str, Any] | None]
    normalisation: NotRequired[Normalisation]
    rewards: NotRequired[tuple[float, float]]
    base: NotRequired[str]  # SHA-256 of the frozen policy's weights


class StatusRecord(TypedDict):
    """`status.json`."""

    state: str
    step: Size
    reason: str


class BestRecord(TypedDict):
    """The best step of a run, in a manifest."""

    step: Size
    metric: str
    value: float


class SeedsRecord(TypedDict):
    """`seeds.json` of the folder of several seeds."""

    script: str
    seeds: list[Size]


class Manifest(TypedDict):
    """`manifest.json` of a checkpoint."""

    format: int
    step: Size
    world_size: Size
    trainer: str
    config: dict[str, Any]
    shapes: dict[str, dict[str, list[Size]]]
    files: dict[str, list[Any]]
    pieces: NotRequired[list[str]]
    best: NotRequired[BestRecord | int | None]
    sha256: str


class Line(TypedDict):
    """A line of `metrics.jsonl` or `eval.jsonl`."""

    step: Size


class Evaluation(TypedDict):
    """A line of `eval.jsonl`."""

    step: Size
    env: dict[str, Any]
    episodes: Size
    success_rate: Share | None
    success_ci: tuple[Share, Share] | None
    return_mean: float | None
    length_mean: NotRequired[float]
    jerk_mean: NotRequired[float | None]
    border_mean: NotRequired[float | None]
    inside_mean: NotRequired[float | None]
    action_error: NotRequired[float | None]
    action_error_by_name: NotRequired[dict[str, float]]


class ResultRow(TypedDict):
    """A row of a results file."""

    suite: str
    task: str
    trainer: str
    steps: Any
    metric: str
    value: float
    episodes: Size
    train_seconds: float


# ---- files ---------------------------------------------------------------------------------------------------------


def check_regular(path: Path, may_be_folder: bool = False) -> None:
    """Refuse a pipe, socket or device, which would be waited for. Raises UserError."""
    if path.exists() and not (path.is_file() or (may_be_folder and path.is_dir())):
        kind = "a folder" if path.is_dir() else "a pipe, socket or device"
        raise UserError(f"{path} is {kind}; expected a file")


def check_folder(folder: Path) -> None:
    """Refuse a run or policy folder with links out of it, or with pipes, sockets or devices, wherever they are in it.

    Links of huggingface_hub's cache into its folder of blobs are allowed.

    Raises:
        UserError: names the first of them.
    """
    allowed = allowed_folders(folder)
    for where, names, files in os.walk(folder):
        for name in (*names, *files):
            path = Path(where) / name
            try:
                mode = path.lstat().st_mode
            except OSError:  # a run that goes on has removed it
                continue
            if stat.S_ISLNK(mode) and leaves(path, allowed):
                raise UserError(f"{path} is a link out of {folder}; it is not followed, copy the file instead")
            if not (stat.S_ISLNK(mode) or stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise UserError(f"{path} is a pipe, socket or device; remove it, it is no part of a run")
        if Path(where) == folder and "wandb" in names:
            names.remove("wandb")  # which has links to wandb's logs elsewhere; nothing here reads them


def allowed_folders(root: Path) -> list[Path]:
    """The folders in which the files of a folder may lie: itself, and the blobs of huggingface_hub's cache."""
    resolved = root.resolve()
    for folder in (resolved, *resolved.parents):
        if folder.parent.name == "snapshots":
            return [resolved, folder.parent.parent / "blobs"]
    return [resolved]


def leaves(path: Path, allowed: Iterable[Path]) -> bool:
    """Whether a path leads, by links or `..`, out of all of some folders; also one that leads nowhere at all."""
    try:
        return not any(path.resolve().is_relative_to(folder) for folder in allowed)
    except (OSError, ValueError, RuntimeError):  # a loop of links, a null byte, or too long a name
        return True


def read_json(path: Path, lines: bool = False) -> Any:
    """A JSON file, or the list of its lines. Raises UserError naming the file."""
    check_regular(path)
    try:
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise UserError(f"{path}: {size >> 20} MB is too much for metadata")
        text = path.read_text(encoding="utf-8")
        if not lines:
            return json.loads(text)
        if (count := text.count("\n")) > LINES_LIMIT:
            raise UserError(f"{path}: {count} lines are too many for metadata")
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing") from error
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {str(error)[:80]})") from error


def read_record(path: Path, schema: Any, remedy: str) -> Any:
    """The record in a JSON file. Raises UserError: missing, damaged, or a field that does not fit `schema`."""
    try:
        record = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {remedy}" if remedy else str(error)) from error
    if problem := problem_of(record, schema):
        raise UserError(f"{path}: damaged or incomplete: {problem}; {remedy}")
    return record


def problem_of(record: Any, schema: Any) -> str:
    """What is wrong with a record, parsed from JSON, in a few words; "" for nothing."""
    return "it is nested too deeply" if too_deep(record) else misfit(record, schema)


# ---- values against types ------------------------------------------------------------------------------------------


def misfit(value: Any, kind: Any, place: str = "", finite: bool = True) -> str:
    """Describe in a few words where `value`, parsed from JSON, does not fit the type `kind`, or return "".

    Args:
        kind: A TypedDict, a dataclass of options, or a type made of None, bool, int, float, str, Literal, unions,
            lists, tuples and dicts. Everything fits another type.
        place: Name of the value.
        finite: Whether NaN and infinity are no numbers.
    """
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (Annotated, NotRequired, typing.Required):
        kind, *rules = arguments
        if problem := misfit(value, kind, place, finite):
            return problem
        rule = next((rule for rule in rules if rule in (NOT_NEGATIVE, FROM_0_TO_1)), "")
        return _wrong(value, rule, place) if rule and not 0 <= value <= (1 if rule == FROM_0_TO_1 else LARGEST) else ""
    if origin in (Union, types.UnionType):
        return _misfit_union(value, arguments, place, finite)
    if typing.is_typeddict(kind) or (isinstance(kind, type) and is_dataclass(kind)):
        return _misfit_fields(value, kind, place, finite)
    if origin in (list, tuple, dict):
        return _misfit_items(value, origin, arguments, place, finite)
    if origin is Literal:
        fits = any(value == one and type(value) is type(one) for one in arguments)
    elif kind is int:
        fits = type(value) is int and abs(value) <= LARGEST
    elif kind is float:
        fits = type(value) is float or (type(value) is int and abs(value) <= LARGEST)
        fits = fits and (not finite or math.isfinite(value))
    elif kind in (bool, str, None, types.NoneType):
        fits = type(value) is (types.NoneType if kind is None else kind)
    else:
        fits = True
    return "" if fits else _wrong(value, kind, place)


def _misfit_union(value: Any, kinds: Sequence[Any], place: str, finite: bool) -> str:
    """`misfit` of a union; where only one of its types can be meant, what is wrong with that."""
    found = [misfit(value, kind, place, finite) for kind in kinds]
    if "" in found:
        return ""
    meant = [text for text, kind in zip(found, kinds, strict=True) if kind is not types.NoneType]
    if len(meant) == 1 and value is not None:
        return meant[0]
    return _wrong(value, functools.reduce(operator.or_, kinds), place)


def _misfit_fields(value: Any, kind: Any, place: str, finite: bool) -> str:
    """`misfit` of a TypedDict, whose required fields must be there, or of a dataclass, whose fields may be absent."""
    if not isinstance(value, dict):
        return _wrong(value, kind, place)
    hints = hints_of(kind)
    for name, hint in hints.items():
        if name not in value and name in getattr(kind, "__required_keys__", ()):
            return f"no {_below(place, name)}; expected {expected(hint)}"
    texts = (misfit(value[name], hint, _below(place, name), finite) for name, hint in hints.items() if name in value)
    return next(filter(None, texts), "")


@functools.lru_cache(maxsize=256)
def hints_of(kind: Any) -> dict[str, Any]:
    """Field -> type; {} where a plugin's annotations cannot be resolved."""
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except Exception:
        return {}


def _misfit_items(value: Any, kind: Any, arguments: tuple[Any, ...], place: str, finite: bool) -> str:
    """`misfit` of a list, a tuple (a list in JSON) or a dict."""
    if not isinstance(value, dict if kind is dict else list):
        return _wrong(value, kind[arguments] if arguments else kind, place)
    if not arguments:
        return ""
    if isinstance(value, dict):
        named: Iterable[tuple[str, Any, Any]] = ((str(key), item, arguments[1]) for key, item in value.items())
    elif kind is list or arguments[-1] is Ellipsis:
        named = ((str(i), item, arguments[0]) for i, item in enumerate(value))
    elif len(value) != len(arguments):
        return _wrong(value, kind[arguments], place)
    else:
        named = ((str(i), item, one) for i, (item, one) in enumerate(zip(value, arguments, strict=True)))
    return next(filter(None, (misfit(item, one, _below(place, name), finite) for name, item, one in named)), "")


def _below(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _wrong(value: Any, kind: Any, place: str) -> str:
    found = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
    return f"{place or 'it'} is {found[:60]}; expected {expected(kind)}"


def expected(kind: Any) -> str:
    """A type in a user's words."""
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin in (Annotated, NotRequired, typing.Required):
        return next((word for word in (NOT_NEGATIVE, FROM_0_TO_1) if word in arguments), expected(arguments[0]))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(expected(one) for one in arguments))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    words: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    words |= {list: "a list", tuple: "a list", None: "null", types.NoneType: "null"}
    return origin if isinstance(origin, str) else words.get(origin, "an object")


def too_deep(value: Any) -> bool:
    """Whether lists and objects lie more than `DEPTH` inside each other."""
    level = [value]
    for _ in range(DEPTH):
        inner = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list)))
        if not (level := [item for items in inner for item in items]):
            return False
    return True
