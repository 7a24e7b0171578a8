"""What `--help` and `--list` print, read from the dataclasses of options that tyro parses."""

import ast
import functools
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from .. import contracts
from ..records import hints_of

Registries = Mapping[str, Mapping[str, type]]  # option that chooses a component -> name -> component
COLUMN = 30  # of the texts, beside their options
WIDEST, NARROWEST = 120, 40  # longer lines are hard to read, shorter ones hold no text
NAMES = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}  # of what an option takes
TITLES = {"env": "Environment", "augment": "Pictures", "policy": "Acting"}  # of groups, others have their field's name


class Option(NamedTuple):
    """An option as `--help` shows it."""

    field: str
    flags: tuple[str, ...]  # such as ("--debug", "--no-debug"); none for a word without an option
    takes: str  # such as INT
    text: str


class Group(NamedTuple):
    """Options under a title."""

    title: str
    text: str
    options: list[Option]


# ---- options of a dataclass ----------------------------------------------------------------------------------------


def options_in(kind: type, values: Any = None, prefix: str = "") -> Iterator[tuple[str, list[Option]]]:
    """(prefix, options) of a dataclass and of those within it, as tyro names them.

    Args:
        values: An instance, which has the defaults.
    """
    hints, texts, own, inner = hints_of(kind), texts_of(kind), [], []
    for field in fields(kind):
        beside = getattr(hints.get(field.name), "__metadata__", ())
        said = _said(beside)
        name = f"{prefix}{name_of(field.name, beside)}"
        value = getattr(values, field.name, MISSING) if values is not None else field.default
        if getattr(said, "name", None) == "":
            name = prefix.removesuffix(".")
        if is_dataclass(value) and not isinstance(value, type):
            inner.append((type(value), value, f"{name}." if name else ""))
        elif field.init:
            own.append(_option(field.name, name, hints.get(field.name), beside, said, value, texts))
    if own or not inner:
        yield prefix, own
    for one in inner:
        yield from options_in(*one)


def _said(beside: Sequence[Any]) -> Any:
    """What `tyro.conf.arg` says beside a field's type; None for nothing."""
    return next((entry for entry in beside if hasattr(entry, "help_behavior_hint")), None)


def name_of(field: str, beside: Sequence[Any]) -> str:
    """The name of a field's option, from what stands beside the field's type."""
    return (getattr(_said(beside), "name", None) or field).replace("_", "-")


def _option(field: str, name: str, hint: Any, beside: Sequence[Any], said: Any, value: Any, texts: Any) -> Option:
    import tyro

    text = getattr(said, "help", None) or texts.get(field, "")
    takes = getattr(said, "metavar", None) or ("PATH" if _is_path(beside) else takes_of(hint))
    flags: tuple[str, ...] = () if tyro.conf.Positional in beside else (f"--{name}",)
    if takes == "" and flags:
        group, dot, last = name.rpartition(".")
        flags = (f"--{name}", f"--{group}{dot}no-{last}")
    takes = takes if flags else _repeated(name.upper(), takes)
    shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
    hint_of = getattr(said, "help_behavior_hint", None)
    default = "(required)" if value is MISSING else f"(default: {shown})" if shown else ""
    default = hint_of(shown) if callable(hint_of) else "" if value is False else default
    return Option(field, flags, takes, f"{text} {default if flags else ''}".strip())


def _is_path(beside: Sequence[Any]) -> bool:
    return any(isinstance(entry, contracts.Place) and entry.pattern == contracts.Place.pattern for entry in beside)


def _repeated(word: str, takes: str) -> str:
    return f"[{word} ...]" if "..." in takes else f"[{word}]"


def takes_of(hint: Any) -> str:
    """What an option takes, from its type; "" for a flag."""
    origin, arguments = get_origin(hint) or hint, get_args(hint)
    if origin is Annotated:
        return takes_of(arguments[0])
    if origin is bool:
        return ""
    if origin is Literal:
        return f"{{{','.join(map(str, arguments))}}}"
    if origin in (tuple, list, set) and arguments:
        one = takes_of(arguments[0])
        return " ".join(map(takes_of, arguments)) if origin is tuple and ... not in arguments else f"[{one} ...]"
    if origin is Union or type(hint).__name__ == "UnionType":
        kinds = [takes_of(kind) for kind in arguments if kind is not type(None)]
        words = "|".join(dict.fromkeys(kinds)) + "|None" * (len(kinds) < len(arguments))
        return words.replace("}|None", ",None}")
    return NAMES.get(origin, getattr(origin, "__name__", "VALUE").upper() if hint is not None else "VALUE")


@functools.cache
def texts_of(kind: type) -> dict[str, str]:
    """Field -> the text below it, or else the comment beside it; of classes whose source is there."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(cls))
            (tree,) = ast.parse(source).body
        except (OSError, TypeError, SyntaxError, ValueError):  # a built-in class, or one made in an interpreter
            continue
        lines, body = source.splitlines(), getattr(tree, "body", [])
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                below = after.value if isinstance(after, ast.Expr) else None
                text = below.value if isinstance(below, ast.Constant) and isinstance(below.value, str) else ""
                beside = lines[(node.end_lineno or 0) - 1][node.end_col_offset :].strip().removeprefix("#")
                found[node.target.id] = " ".join((text or beside).split())
    return found


# ---- components ----------------------------------------------------------------------------------------------------


def flags_of(component: type, option: str) -> set[str]:
    """The flags by which the command line sets a component's options, where it is chosen by `--<option>`."""
    kind = contracts.options_type(component)
    parts = options_in(kind, prefix=f"{option}.") if is_dataclass(kind) else ()
    return {flag for _, options in parts for one in options for flag in one.flags}


def about(component: type) -> str:
    """What a component says of itself: the first paragraph of its docstring."""
    text = component.__doc__ or ""
    if is_dataclass(component) and text.startswith(f"{component.__name__}("):  # Python's own, of a class without one
        text = ""
    return _paragraph(text or getattr(sys.modules.get(component.__module__), "__doc__", None) or "")


def _paragraph(text: str) -> str:
    return " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())


def catalogue(registries: Registries, script: str) -> str:
    """Each registry with a line for each entry: its name, what it says of itself, and the other script if it needs it.

    The lines are as wide as the terminal; in a file or pipe each is one, so that it can be searched.
    """
    width, bold = screen()
    width = width if sys.stdout.isatty() else sys.maxsize
    pages = []
    for option, registry in registries.items():
        made_by = [component.__module__ for component in registry.values()]
        longest = max(map(len, registry), default=0)
        title = TITLES.get(option, option.capitalize()) + ("es" if option.endswith("s") else "s")
        lines = [_heading(f"{title} (--{option} NAME)", bold)]
        for name, component in registry.items():
            text = about(component)
            if option == "trainer" and made_by.count(component.__module__) == 1:  # the module's names the paper
                text = _paragraph(getattr(sys.modules.get(component.__module__), "__doc__", None) or "") or text
                other = needed_script(component)
                text += f" [by {other}]" if other not in ("", script) else ""
            lines += _beside(f"{name:{longest}}", text, max(longest + 4, 16), width, bold)
        pages.append("\n".join(lines))
    return "\n\n".join(pages) + "\n"


def needed_script(trainer: type) -> str:
    """The one script that can run a trainer; "" if both can, or where its options have no defaults."""
    try:
        config = contracts.options_of(trainer)
        request, corrects = contracts.request_of(trainer, config), contracts.frozen_policy_of(trainer, config)
    except Exception:
        return ""
    if isinstance(request, contracts.Rollouts) or corrects:
        return "online_trainer.py"
    return "offline_trainer.py" if isinstance(request, (contracts.Demonstrations, contracts.Goals)) else ""


# ---- the page ------------------------------------------------------------------------------------------------------


def program(options: type) -> str:
    """How the command that `options` belong to is started."""
    module = options.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        module = spec.name if spec else Path(getattr(main, "__file__", None) or "script.py").stem
    return f"python -m {module}" if module.startswith("components.") else f"python {module}.py"


def groups_of(values: Any, registries: Registries, sections: Mapping[str, str]) -> list[Group]:
    """The options of a command in groups: those of each section, then those of each component that is chosen.

    Args:
        values: The defaults of the command, with the options of the components that are chosen.
        sections: Field -> title of the section that begins with it; sections of one title are one group.
    """
    parts = options_in(type(values), values)
    title = "Options"
    own: dict[str, list[Option]] = {name: [] for name in sections.values()}
    for option in next(parts)[1]:
        title = sections.get(option.field, title)
        own.setdefault(title if option.flags else "Arguments", []).append(option)
    groups = [Group(title, "", options) for title, options in own.items()]
    chosen = chosen_by(values, registries)
    for prefix, options in parts:
        if prefix in chosen:
            title, component = chosen[prefix]
            text = about(contracts.options_type(component)) if options else ""
            groups.append(Group(title, text or about(component), options))
        elif options:  # of a part of the command itself
            name, kind = prefix.removesuffix("."), type(values)
            text = texts_of(kind).get(name) or about(type(getattr(values, name, None)))  # type: ignore[arg-type]
            groups.append(Group(TITLES.get(name, name.capitalize()), text, options))
    return [group for group in groups if group.options or group.text]


def chosen_by(values: Any, registries: Registries) -> dict[str, tuple[str, type]]:
    """Prefix of options -> (title, component) of each component that is chosen."""
    chosen: dict[str, tuple[str, type]] = {}
    for option, registry in registries.items():
        words = getattr(values, option, "")
        for place, word in enumerate([words] if isinstance(words, str) else words):
            model, _, name = word.rpartition("=")
            prefix = f"{option}.{model}." if place else f"{option}."
            if name in registry:
                chosen[prefix] = (f"{TITLES.get(option, option.capitalize())} {word}", registry[name])
    return chosen


def page(
    values: Any,
    registries: Registries,
    sections: Mapping[str, str],
    usage: str,
    further: Sequence[Option],
) -> str:
    """The text of `--help`, as wide as the terminal.

    Args:
        values, registries, sections: As of `groups_of`.
        usage: The words after the program's name.
        further: Options that are not in `values`, besides --help.
    """
    width, bold = screen()
    groups = [*groups_of(values, registries, sections)]
    words = " ".join(option.takes for group in groups for option in group.options if not option.flags)
    begin = program(type(values))
    lines = [f"usage: {begin} {usage or ' '.join(filter(None, (words, '[OPTIONS]')))}", ""]
    lines += textwrap.wrap(_paragraph(type(values).__doc__ or ""), width)
    for paragraph in how_help_follows(values, registries, begin, usage):
        lines += ["", *textwrap.wrap(paragraph, width, break_on_hyphens=False)]
    asking = [Option("help", ("-h", "--help"), "", "Show this text."), *further]
    for group in [*groups, Group("Help", "", asking)]:
        lines += ["", _heading(group.title, bold)]
        lines += textwrap.wrap(group.text, width, initial_indent="  ", subsequent_indent="  ")
        for option in group.options:
            shown = f"{', '.join(option.flags)} {option.takes}".strip()
            lines += _beside(shown, option.text, COLUMN if width > 70 else 8, width, bold)
    return "\n".join(lines) + "\n"


def how_help_follows(values: Any, registries: Registries, begin: str, usage: str) -> list[str]:
    """Paragraphs that say whose options `--help` shows."""
    if not registries:
        return []
    if "trainer" not in registries:
        kinds = " and the ".join(TITLES.get(option, option).lower() for option in registries)
        words = " or ".join([usage.partition(" ")[0].strip("[]"), *(f"--{option}" for option in registries)])
        return [f"The options at the end are those of the {kinds} that are named before --help, by {words}."]
    named = {option: getattr(values, option) for option in registries}
    now = " ".join(f"--{option} {' '.join([v] if isinstance(v, str) else v)}" for option, v in named.items())
    other = "--trainer rlpd --dataset minari" if named["dataset"] == "none" else "--trainer act --dataset lerobot"
    return [
        "Help follows --trainer, --dataset, --model, --loss, --optimizer and --env: each chosen component has a group"
        f" with its options at the end, and the trainer sets defaults. This is for {now}.",
        f"Try: {begin} {other} --help, or --list for all components.",
    ]


def screen() -> tuple[int, bool]:
    """Width for a text, and whether it may be bold."""
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    return width, sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _heading(text: str, bold: bool) -> str:
    return f"\033[1m{text}:\033[0m" if bold else f"{text}:"


def _beside(left: str, text: str, column: int, width: int, bold: bool) -> list[str]:
    """Lines of a text beside, or below, what it is about."""
    indent = " " * column
    text = re.sub(r"\(default: .{1,30}\)$", lambda default: default[0].replace(" ", "\xa0"), text)  # is not cut
    lines = textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    lines = [line.replace("\xa0", " ") for line in lines]
    heads = textwrap.wrap(left, width, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    shown = [f"\033[1m{head}\033[0m" for head in heads] if bold else heads
    if lines and len(heads) == 1 and len(heads[0]) + 2 <= column:
        return [shown[0] + lines[0][len(heads[0]) :], *lines[1:]]
    return [*shown, *lines]
