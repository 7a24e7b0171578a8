"""Command lines in one line: plugins, names with suggestions, and tyro errors without the box."""

import contextlib
import importlib
import io
import math
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ..errors import UserError, nearest

T = TypeVar("T")
# Options that only one of the scripts has, and that a trainer may have defaults for.
OF_ONE_SCRIPT = {"normalise", "num_envs", "learning_starts", "updates_per_step", "buffer_size"}
OF_ONE_SCRIPT |= {"normalise_observations", "normalise_rewards"}


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
            raise UserError(f"--plugins {name}: {error} ({where(error)}); install it or mend the import") from error
        except Exception as error:
            raise UserError(f"--plugins {name}: {type(error).__name__}: {error} ({where(error)})") from error


def where(error: BaseException) -> str:
    """The file and line of the innermost frame of user code in which `error` was raised."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = list(traceback.extract_tb(error.__traceback__))
    own = [frame for frame in frames if "site-packages" not in frame.filename and "importlib" not in frame.filename]
    frames = own or frames
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown place"


def pick(registry: dict[str, type], option: str, name: str) -> type:
    """Look up the component that `option` names. Raises UserError with the nearest names."""
    if name not in registry:
        raise UserError(f"--{option} {name}: unknown {option}; {nearest(name, registry)}")
    return registry[name]


def options_of(component: type, values: dict[str, Any] | None = None) -> Any:
    """A factory is its own options dataclass; a trainer has a nested `Config`; a plain class has no options."""
    options = component if is_dataclass(component) else getattr(component, "Config", NoOptions)
    values = values or {}
    known = [field.name for field in fields(options)]
    for name in values:
        if name not in known:
            raise UserError(f"{component.__name__} has no option {name!r}; {nearest(name, known)}")
    return options(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def extended(component: type, extra: type) -> type:
    """A component with the options of a dataclass beside its own."""
    if not is_dataclass(component):
        return type(component.__name__, () if component is object else (component,), {"Config": extra})
    both = make_dataclass(component.__name__, [], bases=(component, extra), frozen=True, kw_only=True)
    both.__doc__ = component.__doc__
    return both


def instantiate(component: type, options: Any) -> Any:
    """The factory object: the options themselves when the factory is its own dataclass, else a plain instance."""
    return options if is_dataclass(component) else component()


@dataclass(frozen=True)
class NoOptions:
    """No options."""


# tyro is imported where it is used, so that a copy of this folder works without it.


def model_options(defaults: dict[str, Any]) -> Any:
    """One group of options for all models: `--model.X` for the first, the policy, `--model.<name>.X` for another."""
    import tyro

    prefixes = ["", *list(defaults)[1:]]
    fields_ = [(n, Annotated[Any, tyro.conf.arg(name=prefix)]) for n, prefix in zip(defaults, prefixes, strict=True)]
    return make_dataclass("Models", fields_, frozen=True)(**defaults)


def given(argv: Sequence[str], option: str) -> bool:
    """Whether the command line itself sets `option` ("batch-size"), rather than leaving it at its default."""
    group, _, name = option.rpartition(".")
    names = {f"--{option}", f"--{group}.no-{name}" if group else f"--no-{name}"}
    return any(word.partition("=")[0].replace("_", "-") in names for word in argv)


def without(argv: Sequence[str], option: str) -> list[str]:
    """The command line without an option and its value."""
    words, skip = [], False
    for word in argv:
        if not skip and word.partition("=")[0] != option:
            words.append(word)
        skip = word == option
    return words


def subject(args: Any, option: str) -> str:
    """What a run is about, for its folder's name: the task or id of what `option` chose, or else its name."""
    options = getattr(args, f"{option}_options")
    named = getattr(options, "id", "") or getattr(options, "task", "") or getattr(args, option)
    return re.sub(r"[^\w.-]+", "-", str(named))


def at_least(options: Any, least: dict[str, int]) -> None:
    """Refuse options below the least value that makes sense, and infinite ones. Raises UserError naming the first."""
    for name, value in least.items():
        if getattr(options, name) is not None and not value <= getattr(options, name) < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be {value} or more")


def pairs(option: str, entries: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE entries as a dict. Raises UserError for one without "="."""
    for entry in entries:
        if "=" not in entry:
            raise UserError(f"{option} {entry}: expected KEY=VALUE")
    return dict(entry.split("=", 1) for entry in entries)


@contextlib.contextmanager
def one_line(subject: str) -> Iterator[None]:
    """Whatever a component raises while it is built becomes a UserError: one line with its file and line."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(subject) else f"{subject}: {error}") from error
    except Exception as error:
        raise UserError(f"{subject}: {type(error).__name__}: {error} ({where(error)})") from error


def choose(registry: dict[str, type], *more: str) -> Any:
    """Let a `str` option take the registry's names, plugins' included, and show its default plainly."""
    import tyro

    return tyro.conf.arg(
        constructor_factory=lambda: tyro.extras.literal_type_from_choices([*registry, *more]),
        help_behavior_hint=lambda default: f"(default: {default.strip(chr(39) + '[]')})",
    )


def choose_some(registry: dict[str, type]) -> Any:
    """Let an option take any number of words; `--help` shows the registry's names, plugins' included."""
    import tyro
    from tyro.constructors import PrimitiveConstructorSpec

    def hint(default: str) -> str:
        return f"(of {', '.join(registry)}; default: {re.sub('[^a-z_0-9= ]', '', default)})"

    words = PrimitiveConstructorSpec("*", "NAME ...", tuple, lambda value: isinstance(value, tuple), list)
    make: Any = lambda: Annotated[tuple, words]  # noqa: E731  (tyro calls it when it needs it)
    return tyro.conf.arg(constructor_factory=make, help_behavior_hint=hint)


def chosen_models(registry: dict[str, type], needs: dict[str, str], asked: Sequence[str]) -> dict[str, str]:
    """Model name -> registry name of what `--model` asks for: NAME=ENTRY, or ENTRY for the model whose role it has.

    Args:
        needs: Model name -> default entry of what the trainer has; an entry without a role is for the first.

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
    """Call a field of options otherwise on the command line."""
    import tyro

    return tyro.conf.arg(name=name)


def parse_names(options: type[T], argv: Sequence[str]) -> T:
    """First pass: read only the fields of `options` and leave the rest of the command line alone, `--help` included."""
    return _tyro(options, argv, add_help=False)[0]


def parse(options: type[T], argv: Sequence[str], default: T | None = None, quiet: bool = False) -> T:
    """Parse with tyro. `--help` prints and exits 0; anything wrong raises UserError with one line.

    Args:
        quiet: Print no help (every process but the first).
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
    """What tyro parses and the words it does not know; its box with an error becomes one line."""
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
