"""What is said of an option that does not exist: whose it is, or which one may be meant."""

import difflib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from .. import contracts
from ..errors import nearest
from .help import Registries, flags_of, options_in

SCRIPTS = ("offline_trainer.py", "online_trainer.py")
ALIKE = 0.85  # from here on an option of a component that is not chosen counts as a misspelt one


def about_unknown(word: str, values: Any, registries: Registries) -> str:
    """A line about an option that the command does not have.

    Args:
        word: Such as "--trainer.kl-weight", or a word that belongs to no option.
        values: The defaults of the command, with the options of the components that are chosen.
        registries: Of the options by which components are chosen.
    """
    if not word.startswith("-"):
        return f"unexpected word {word}: it is no option's value; see --help"
    word = word.replace("_", "-")
    known = {flag for _, options in options_in(type(values), values) for one in options for flag in one.flags}
    option, dot, name = word[2:].rpartition(".")
    if dot and (told := _renamed(option, name, values, registries) or _owned(option, name, values, registries)):
        return f"unknown option {word}; {told}"
    if other := _other_script(word, getattr(sys.modules.get(type(values).__module__), "__file__", None) or ""):
        return f"unknown option {word}; {word} is an option of {other}"
    near = nearest(word, known)
    near = near if near.startswith("nearest") else ""
    if further := _alike(word, known, values, registries):
        near = f"nearest: {further}"
    return f"unknown option {word}; {near or 'see --help'}"


def _renamed(option: str, name: str, values: Any, registries: Registries) -> str:
    """Says that a chosen component's option has another name by now."""
    component = registries.get(option, {}).get(str(getattr(values, option, "")), object)
    now = contracts.former_names_of(component).get(name.replace("-", "_"))
    return f"it is called --{option}.{now.replace('_', '-')} now" if now else ""


def _owned(option: str, name: str, values: Any, registries: Registries) -> str:
    """Says which components have an option `--<option>.<name>`, and how they are chosen; "" for none."""
    option, _, model = option.partition(".")
    if option not in registries:
        return ""
    owners = [
        entry for entry, component in registries[option].items() if f"--{option}.{name}" in flags_of(component, option)
    ]
    if not owners:
        return ""
    chosen = getattr(values, option, "")
    if option == "model":
        models = dict(one.split("=", 1) for one in chosen)
        first = next(iter(models), "")
        model = model or first
        if model not in models:
            return f"the trainer {values.trainer} has no model {model!r}; it has {', '.join(models)}"
        roles = {entry: getattr(registries[option][entry], "role", first) for entry in owners}
        if elsewhere := [m for m, entry in models.items() if entry in owners and m != model]:
            places = [f"--model.{name}" if m == first else f"--model.{m}.{name}" for m in elsewhere]
            return f"nearest: {', '.join(places)}"
        owners = [entry for entry in owners if roles[entry] in (model, first)] or owners
        option = option if model == first else f"model {model}="
    ways = f"--{option} {_either(owners)}".replace("= ", "=")
    return f"an option of {_either(owners, 'and')}: {ways}"


def _either(names: list[str], word: str = "or") -> str:
    return f" {word} ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _alike(word: str, known: set[str], values: Any, registries: Registries) -> str:
    """The option of a component that is not chosen that a misspelt one is nearest to, if none here is nearer."""
    ratio = lambda flag: difflib.SequenceMatcher(None, flag[:100], word[:100]).ratio()  # noqa: E731
    best, found = max(map(ratio, known), default=0.0), ""
    for option, registry in registries.items():
        if not word.startswith(f"--{option}."):
            continue
        for entry, component in registry.items():
            for flag in flags_of(component, option) - known:
                if ratio(flag) > max(best, ALIKE):
                    best, found = ratio(flag), f"{flag} (with --{option} {entry})"
    return found


def _other_script(word: str, file: str) -> str:
    """The name of the other script, if it has the option; "" if not, or where there is none."""
    for name in SCRIPTS if Path(file).name in SCRIPTS else ():
        other = Path(file).with_name(name)
        if name == Path(file).name or not other.exists():
            continue
        found = _module_of(other)
        groups = options_in(found.Args) if found is not None else ()
        if word in {flag for _, options in groups for one in options for flag in one.flags}:
            return name
    return ""


def _module_of(path: Path) -> Any:
    """A script as a module; None if it fails, since this is for a hint alone."""
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    try:
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[path.stem] = module  # where `get_type_hints` looks
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    except (Exception, SystemExit):
        sys.modules.pop(path.stem, None)
        return None
    return module
