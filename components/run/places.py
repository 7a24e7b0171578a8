"""Options that name files or folders (`contracts.Place`), as absolute paths: a run can be resumed from anywhere."""

import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ..contracts import Place, places_of
from . import command_line as cli


def located(args: Any, stored: dict[str, Any], beside: list[str]) -> tuple[Any, set[str], set[str]]:
    """The script's options with absolute paths.

    A resumed run finds its places where they were, whatever the working directory is now. Where they are not there any
    more, since everything has moved, the words of the command line apply from here.

    Args:
        args: The script's arguments.
        stored: Of a resumed run, the options as they were recorded; {} for a new run.
        beside: What is given beside `--resume`.

    Returns:
        the options; the keys, such as "trainer_options.base", that are the recorded place however it is written now;
        and the keys of places that may have moved.
    """
    same: set[str] = set()
    moved: set[str] = set()
    for owners, prefix, options in list(_groups(args)):
        known: Any = stored
        for owner in owners:
            known = known.get(owner) if isinstance(known, dict) else None
        changes = {}
        for name, place in places_of(options).items():
            key, option = ".".join([*owners, name]), prefix + name.replace("_", "-")
            value, before = getattr(options, name), known.get(name) if isinstance(known, dict) else None
            if not value:
                continue
            words, old = _words(value), _words(before)
            if len(words) == len(old) and all(_same(w, o, place) for w, o in zip(words, old, strict=True)):
                same.add(key)
                given = cli.given(beside, option)
                words = [_chosen(w, o, place, given) for w, o in zip(words, old, strict=True)]
            else:
                words = [absolute(word, place) for word in words]
            moved |= {key} if place.moves else set()
            changes[name] = type(value)(words) if isinstance(value, (tuple, list)) else words[0]
        args = _with(args, owners, changes)
    return args, same, moved


def absolute(word: str, place: Place) -> str:
    """A word with its path absolute; unchanged if nothing is there, unless the run is to make it."""
    found = re.fullmatch(place.pattern, word)
    if not found or "://" in word:
        return word
    path = Path(os.path.abspath(Path(found[1]).expanduser()))
    return f"{word[: found.start(1)]}{path}{word[found.end(1) :]}" if place.made or path.exists() else word


def _exists(word: str, place: Place) -> bool:
    found = re.fullmatch(place.pattern, word)
    return bool(found) and Path(found[1]).expanduser().exists()  # type: ignore[index]


def _same(word: str, known: str, place: Place) -> bool:
    """Whether a word names the recorded place: from here, or from the folder where the run began."""
    if known in (word, absolute(word, place)):
        return True
    one, other = re.fullmatch(place.pattern, word), re.fullmatch(place.pattern, known)
    if not one or not other or Path(one[1]).is_absolute() or one[1].startswith("~"):
        return False
    around = [(word[: one.start(1)], word[one.end(1) :]), (known[: other.start(1)], known[other.end(1) :])]
    parts = [part for part in Path(os.path.normpath(one[1])).parts if part != ".."]
    return around[0] == around[1] and (not parts or list(Path(other[1]).parts[-len(parts) :]) == parts)


def _chosen(word: str, known: str, place: Place, given: bool) -> str:
    """The word to use for a recorded place: the given one where it may move, else the record's if it is there."""
    here = absolute(word, place)
    if given and (place.moves or place.made):
        return here
    return absolute(known, place) if place.made or _exists(known, place) or not _exists(here, place) else here


def _groups(args: Any) -> Iterator[tuple[list[str], str, Any]]:
    """(path of fields, prefix on the command line, options) of the script's options and of each component's."""
    yield [], "", args
    for field in fields(args):
        options = getattr(args, field.name)
        if not field.name.endswith("_options") or not is_dataclass(options):
            continue
        if field.name != "model_options":
            yield [field.name], f"{field.name.removesuffix('_options')}.", options
        for i, model in enumerate(fields(options) if field.name == "model_options" else ()):
            yield [field.name, model.name], "model." if i == 0 else f"model.{model.name}.", getattr(options, model.name)


def _with(options: Any, owners: list[str], changes: dict[str, Any]) -> Any:
    """The options with changes in one of their groups."""
    if owners and changes:
        changes = {owners[0]: _with(getattr(options, owners[0]), owners[1:], changes)}
    return replace(options, **changes) if changes else options


def _words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(word) for word in value or ()]
