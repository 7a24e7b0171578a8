"""Shared by all command lines: plugins, suggestions for misspelt names, and tyro's errors as one line."""

import contextlib
import importlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ..errors import UserError, nearest, where

T = TypeVar("T")


def import_plugins(modules: Sequence[str]) -> None:
    """Import the modules named by `--plugins`, also from the working directory, so that they register components.

    Raises UserError: a module is missing, or fails while it is imported (names its file and line).
    """
    if modules and (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(error.name + ".")):
                raise UserError(f"--plugins {name}: no such module in {Path.cwd()} or on the Python path") from error
            raise UserError(f"--plugins {name}: {error} ({where(error)}); install it or fix the import") from error
        except Exception as error:
            raise UserError(f"--plugins {name}: {type(error).__name__}: {error} ({where(error)})") from error


def import_for(run: Path, recorded: Sequence[str], given: Sequence[str]) -> None:
    """Import the plugins that this command line names, for a run that was made with others, too.

    A run folder may be a stranger's, so nothing that it names is imported by itself.

    Raises:
        UserError: a plugin of the run is not named; or as of `import_plugins`.
    """
    if missing := [name for name in recorded if name not in given]:
        add = f"--plugins {' '.join(dict.fromkeys([*given, *missing]))}"
        raise UserError(f"{run} needs plugins, and imports none by itself; if you trust it, add {add}")
    import_plugins(given)


def check_reach(run: Path, option: str, factory: Any, argv: Sequence[str], plugins: Sequence[str]) -> None:
    """Refuse options of a run by which an environment or dataset would import a module, or open or write a file.

    Args:
        factory: It may have `reaches()`, which returns (option, module or "", what it does) of each such option.
        argv: This command line; what it sets is the user's.
        plugins: Modules that it names.

    Raises:
        UserError: names the option, and how to confirm it.
    """
    for name, module, what in getattr(factory, "reaches", list)():
        word = f"--{option}.{name.replace('_', '-')}"
        if not given(argv, word[2:]) and module not in plugins:
            how = f"--plugins {module}" if module else f"{word} again"
            raise UserError(f"{run} has {word} {getattr(factory, name)!r}, which {what}; if you trust it, add {how}")


def pick(registry: dict[str, type], option: str, name: str) -> type:
    """Look up the component that `option` names. Raises UserError with the nearest names."""
    if name not in registry:
        raise UserError(f"--{option} {name}: unknown {option}; {nearest(name, registry)}")
    return registry[name]


# tyro is imported where it is used, so that a copy of this folder works without it.


def model_options(defaults: dict[str, Any]) -> Any:
    """One group of options for all models: `--model.X` for the first, the policy, `--model.<name>.X` for another."""
    import tyro

    prefixes = ["", *list(defaults)[1:]]
    fields_ = [(n, Annotated[Any, tyro.conf.arg(name=prefix)]) for n, prefix in zip(defaults, prefixes, strict=True)]
    return make_dataclass("Models", fields_, frozen=True)(**defaults)


def given(argv: Sequence[str], option: str) -> bool:
    """Whether the command line sets `option`, such as "batch-size"."""
    group, _, name = option.rpartition(".")
    names = {f"--{option}", f"--{group}.no-{name}" if group else f"--no-{name}"}
    return any(word.partition("=")[0].replace("_", "-") in names for word in argv)


def without(argv: Sequence[str], option: str, several: bool = False) -> list[str]:
    """The command line without an option and its value, or its `several` values."""
    words, skip = [], False
    for word in argv:
        skip = skip and not (several and word.startswith("--"))
        if not skip and word.partition("=")[0] != option:
            words.append(word)
        skip = word == option or (several and skip)
    return words


def pairs(option: str, entries: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE entries as a dict. Raises UserError for one without "="."""
    for entry in entries:
        if "=" not in entry:
            raise UserError(f"{option} {entry}: expected KEY=VALUE")
    return dict(entry.split("=", 1) for entry in entries)


def choose(registry: dict[str, type], *more: str) -> Any:
    """tyro's annotation of a `str` option that takes the registry's names, plugins included, and shows its default."""
    import tyro

    return tyro.conf.arg(
        constructor_factory=lambda: tyro.extras.literal_type_from_choices([*registry, *more]),
        help_behavior_hint=lambda default: f"(default: {default.strip(chr(39) + '[]')})",
    )


def choose_some(registry: dict[str, type]) -> Any:
    """tyro's annotation of an option of any number of words; `--help` shows the registry's names, plugins included."""
    import tyro
    from tyro.constructors import PrimitiveConstructorSpec

    def hint(default: str) -> str:
        return f"(of {', '.join(registry)}; default: {re.sub('[^a-z_0-9= ]', '', default)})"

    words = PrimitiveConstructorSpec("*", "NAME ...", tuple, lambda value: isinstance(value, tuple), list)
    make: Any = lambda: Annotated[tuple, words]  # noqa: E731  (tyro calls it when it needs it)
    return tyro.conf.arg(constructor_factory=make, help_behavior_hint=hint)


def chosen_models(registry: dict[str, type], needs: dict[str, str], asked: Sequence[str]) -> dict[str, str]:
    """Model name -> registry name, from `--model`: NAME=ENTRY, or ENTRY for the model of that entry's role.

    Args:
        needs: Model name -> default entry, of the trainer; an entry without a role is for the first model.

    Raises:
        UserError: an entry or model that does not exist, or two entries for one model.
    """
    chosen: dict[str, str] = {}
    for word in asked:
        name, equals, entry = word.rpartition("=")
        component = pick(registry, "model", entry)
        name = name if equals else getattr(component, "role", next(iter(needs)))
        if name not in needs:
            raise UserError(f"--model {word}: the trainer has no model {name!r}; it has {', '.join(needs)}")
        if name in chosen:
            raise UserError(
                f"--model {' '.join(asked)}: {chosen[name]!r} and {entry!r} are both for the model {name!r}"
            )
        chosen[name] = entry
    return chosen


def named(name: str) -> Any:
    """tyro's annotation that renames an option on the command line."""
    import tyro

    return tyro.conf.arg(name=name)


def parse_names(options: type[T], argv: Sequence[str]) -> T:
    """First pass: read only the fields of `options`, and ignore the rest of the command line, `--help` included."""
    return _tyro(options, argv, add_help=False)[0]


def parse(options: type[T], argv: Sequence[str], default: T | None = None, quiet: bool = False) -> T:
    """Parse with tyro. `--help` prints and exits with 0; any error raises UserError with one line.

    Args:
        quiet: Print no help, as on all processes but the first.
    """
    extra = {} if default is None else {"default": default}
    try:
        parsed, unknown = _tyro(options, argv, **extra)
    except _HelpText as text:
        if not quiet:
            print(text, end="")
        raise SystemExit(0) from None
    unknown_options = [word for word in unknown if word.startswith("--")] or unknown
    if unknown_options:
        try:
            _tyro(options, ["--help"], **extra)
        except _HelpText as text:
            word = unknown_options[0].partition("=")[0]
            known = set(re.findall(r"--[a-z][\w.-]*", str(text))) - {"--help"}
            near = nearest(word, known)
            raise UserError(f"unknown option {word}; {near if near.startswith('nearest') else 'see --help'}") from None
    return parsed


class _HelpText(Exception):  # noqa: N818  (no error)
    """tyro's help text."""


def _tyro(options: type[T], argv: Sequence[str], **extra: Any) -> tuple[T, list[str]]:
    """The options that tyro parses, and the unknown words. Raises UserError with tyro's error as one line."""
    import tyro

    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return tyro.cli(options, args=list(argv), return_unknown_args=True, **extra)
    except SystemExit as stop:
        if not stop.code:
            raise _HelpText(out.getvalue()) from None
        text = re.sub(r"[\s╭╮╰╯│─]+|-{3,}", " ", out.getvalue())
        text = re.sub(r" +", " ", re.split(r"Argument helptext|For full helptext", text)[0]).strip()
        raise UserError(re.sub(r"^(Value error|Invalid choice|Missing argument) ", "", text)) from None
