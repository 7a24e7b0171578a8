"""Shared by all command lines: plugins, choices, and tyro's errors as one line."""

import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from ..errors import UserError, crashes_pass, nearest, where
from ..records import hints_of
from .help import Option, Registries, name_of, page
from .unknown import about_unknown

T = TypeVar("T")
SHELL = "--tyro-"  # begin of tyro's own options, which print or write a shell's completion


def import_plugins(plugins: Sequence[str]) -> None:
    """Import what `--plugins` names, so that it registers components: modules, also from here, and Python files.

    Raises UserError: a module or file is missing, or fails while it is imported (names its file and line).
    """
    if not all(map(is_file, plugins)) and (folder := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, folder)
    for plugin in plugins:
        name = module_of(plugin)
        if is_file(plugin):
            _make_importable(plugin)
        missing = f"--plugins {plugin}: no such module in {Path.cwd()} or on the Python path, nor a file {plugin}.py"
        if Path(f"{plugin}.py").is_file() and not name.isidentifier():
            raise UserError(f"--plugins {plugin}: no module's name; for the file, write --plugins {plugin}.py")
        if name.startswith("."):
            raise UserError(missing)
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name and (name == error.name or name.startswith(error.name + ".")):
                raise UserError(missing) from error
            raise UserError(f"--plugins {plugin}: {error} ({where(error)}); install it or fix the import") from error
        except Exception as error:
            if crashes_pass():
                raise
            raise UserError(f"--plugins {plugin}: {type(error).__name__}: {error} ({where(error)})") from error


def is_file(plugin: str) -> bool:
    """Whether a word of `--plugins` is a Python file, and not the name of a module."""
    return plugin.endswith(".py")


def module_of(plugin: str) -> str:
    """The name of the module that a word of `--plugins` is imported as, whichever folder a file is in."""
    return Path(plugin).stem if is_file(plugin) else plugin


def _make_importable(plugin: str) -> None:
    """Make a file importable by its name, also for processes that this one starts, without hiding any module.

    Raises UserError: no such file, a name that no module can have, or that another one has.
    """
    path, name = Path(plugin).expanduser(), module_of(plugin)
    if not path.is_file():
        raise UserError(f"--plugins {plugin}: no such file; the working directory is {Path.cwd()}")
    if not name.replace("-", "_").isidentifier():
        raise UserError(f"--plugins {plugin}: no module can be called {name!r}; rename the file")
    loaded = sys.modules.get(name)
    spec = getattr(loaded, "__spec__", None) if loaded else importlib.util.find_spec(name)
    file = getattr(loaded, "__file__", None) or (spec.origin if spec else None)
    if file and Path(file).exists() and path.samefile(file):
        return
    if loaded or file:  # a folder of this name that is no package has neither
        raise UserError(f"--plugins {plugin}: {file or 'a part of Python'} has the name {name!r}; rename one of them")
    sys.path.append(str(path.parent.absolute()))
    importlib.invalidate_caches()


def import_for(run: Path, recorded: Sequence[str], given: Sequence[str]) -> None:
    """Import the plugins that this command line names, for a run that was made with others, too.

    A run folder may be a stranger's, so nothing that it names is imported by itself. A file may lie elsewhere by now.

    Raises:
        UserError: a plugin of the run is not named; or as of `import_plugins`.
    """
    named = set(map(module_of, given))
    if missing := [plugin for plugin in recorded if module_of(plugin) not in named]:
        add = f"--plugins {shlex.join(dict.fromkeys([*given, *missing]))}"
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
        if not given(argv, word[2:]) and module not in map(module_of, plugins):
            how = f"--plugins {module}" if module else f"{word} again"
            raise UserError(f"{run} has {word} {getattr(factory, name)!r}, which {what}; if you trust it, add {how}")


def check_reach_of_run(run: Path, args: Any, argv: Sequence[str], typed: Sequence[str], plugins: Sequence[str]) -> None:
    """`check_reach` for the dataset of a resumed run, and for its environment where the options name it."""
    asked_env = any(re.match("--env([.=]|$)", word) for word in argv)
    for option in ("env", "dataset") if args.dataset == "none" or asked_env else ("dataset",):
        check_reach(run, option, getattr(args, f"{option}_options"), typed, plugins)


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


def last_value(argv: Sequence[str], option: str) -> str:
    """The word that the command line sets an option to, the last time that it does; "" for none."""
    words = [*argv, "--"]
    found = ""
    for word, after in zip(words, words[1:], strict=False):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == f"--{option}":
            found = value if equals else "" if after.startswith("--") else after
    return found


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
    """tyro's annotation of a `str` option that takes the registry's names, plugins included."""
    import tyro

    return tyro.conf.arg(
        constructor_factory=lambda: tyro.extras.literal_type_from_choices([*registry, *more]),
        metavar="NAME",
        help_behavior_hint=lambda default: one_of([*registry, *more], default),
    )


def choose_some(registry: dict[str, type]) -> Any:
    """tyro's annotation of an option of any number of words, among them the registry's names, plugins included."""
    import tyro
    from tyro.constructors import PrimitiveConstructorSpec

    words = PrimitiveConstructorSpec("*", "NAME ...", tuple, lambda value: isinstance(value, tuple), list)
    make: Any = lambda: Annotated[tuple, words]  # noqa: E731  (tyro calls it when it needs it)
    hint = lambda default: one_of([*registry], default)  # noqa: E731
    return tyro.conf.arg(constructor_factory=make, metavar="NAME ...", help_behavior_hint=hint)


def one_word() -> Any:
    """tyro's annotation of a `str` without an option before it; "" where there is none, and after unknown options."""
    from tyro.constructors import PrimitiveConstructorSpec

    def read(words: list[str]) -> str:
        if len(words) > 1:
            raise ValueError(f"expected one, found {' '.join(words)}")
        return "".join(words)

    return PrimitiveConstructorSpec("*", "RUN", read, lambda value: isinstance(value, str), lambda word: [word])


def one_of(names: Sequence[str], default: str) -> str:
    """The end of the text of an option that chooses one of `names`, or some."""
    return f"One of {', '.join(names)}. (default: {default})"


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
    return _tyro(options(), [word for word in argv if not asks_for_help([word]) and not word.startswith(SHELL)])[0]


def parse(
    options: type[T],
    argv: Sequence[str],
    default: T | None = None,
    quiet: bool = False,
    registries: Registries | None = None,
    sections: Mapping[str, str] | None = None,
    usage: str = "",
    more: Sequence[Option] = (),
) -> T:
    """Parse with tyro. `--help` prints and exits with 0; any error raises UserError with one line.

    Args:
        quiet: Print no help, as on all processes but the first.
        registries: Of the options by which components are chosen, whose own options join.
        sections: Field -> title of the section of `--help` that begins with it.
        usage: The words after the program's name, where they are not what `options` says.
        more: Further options that `--help` is to show.
    """
    values: Any = options() if default is None else default
    registries = registries or {}
    if asks_for_help(argv):
        if not quiet:
            print(page(values, registries, sections or {}, usage, more), end="")
        raise SystemExit(0)
    parsed, unknown = _tyro(values, argv)
    unknown_options = [word for word in unknown if word.startswith("--")] or unknown
    if unknown_options:
        raise UserError(about_unknown(unknown_options[0].partition("=")[0], values, registries))
    return parsed


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether the command line has `-h` or `--help`."""
    return any(word in ("-h", "--help") for word in argv)


def _tyro(values: Any, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """`values` with the options that tyro parses, and the unknown words.

    tyro looks at each field, its type and its text, whether it is set or not, so it is given those that may be.

    Raises:
        UserError: tyro's error as one line.
    """
    import tyro

    asked, out = _asked(values, argv), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            found, unknown = tyro.cli(
                type(asked), args=list(argv), return_unknown_args=True, default=asked, add_help=False, description=""
            )
    except SystemExit as stop:
        if not stop.code:  # tyro has printed a shell's completion
            print(out.getvalue(), end="")
            raise
        text = re.sub(r"[\s╭╮╰╯│─]+|-{3,}", " ", out.getvalue())
        text = re.sub(r" +", " ", re.split(r"Argument helptext|For full helptext", text)[0]).strip()
        raise UserError(re.sub(r"^(Value error|Invalid choice|Missing argument) ", "", text)) from None
    return replace(values, **{field.name: getattr(found, field.name) for field in fields(found)}), unknown


def _asked(values: Any, argv: Sequence[str]) -> Any:
    """The part of `values` that a command line may set: its options, their groups, and plain words."""
    import tyro

    if argv and argv[0].startswith(SHELL):
        return values
    kind: Any = type(values)
    hints, asked = hints_of(kind), []
    for field in fields(kind):
        hint = hints.get(field.name, field.type)
        beside = getattr(hint, "__metadata__", ())
        name = name_of(field.name, beside)
        grouped = any(word.replace("_", "-").startswith(f"--{name}.") for word in argv)
        if grouped or given(argv, name) or tyro.conf.Positional in beside:
            asked.append((field.name, hint))
    part = make_dataclass("Asked", asked, repr=False, eq=False, namespace={"__doc__": " "})
    return part(**{name: getattr(values, name) for name, _ in asked})
