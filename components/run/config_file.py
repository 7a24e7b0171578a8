"""`--config FILE`: options from a run's `args.json` or from a TOML; those of the command line win.

A file is somebody's, so what holds for a run folder holds for it: it imports nothing, and writes nothing outside of the
working directory, that the command line does not name, too.
"""

import tomllib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import numpy as np

from .. import contracts
from ..errors import UserError, nearest, one_line
from ..records import JSON_LIMIT, RunRecord, check_regular, hints_of, leaves, misfit, read_record, too_deep
from . import command_line as cli
from .help import Registries
from .reading import renewed
from .unknown import about_unknown

OF_A_RUN = ("run_dir", "resume", "config", "seeds")  # of the run that an args.json is from, not of the next one
WRITTEN = ("run_dir", "save_dataset", "dataset.cache_dir")  # options that name what a run writes


@dataclass
class Config:
    """The options in a file. Keys are those of the command line with "_", such as "trainer.expectile"."""

    file: Path
    names: dict[str, str]
    """Registry's option -> name of the component; without the models."""
    models: list[str]
    """As of `--model`."""
    plugins: list[str]
    debug: bool
    values: dict[str, Any]
    """All other options."""
    asked: set[str]
    """Keys that count as given on the command line, "trainer" and "model" among them; an args.json has more."""
    instead: list[str] = field(default_factory=list)
    """Components that the command line chooses, where the file has others."""
    left_out: list[str] = field(default_factory=list)
    """What was asked for of those others, and does not apply."""
    changed: set[str] = field(default_factory=set)
    """Keys that have another value than their default."""

    def choose(
        self, names: Any, registries: dict[str, dict[str, type]], default: str, typed: Sequence[str]
    ) -> list[str]:
        """Fill in the components that the command line leaves open; returns it with words for these and for all models.

        Args:
            names: Of the first pass; changed.
            default: The script's own trainer.
            typed: This command line.

        Raises:
            UserError: a component or model that does not exist, or a plugin that the command line does not name.
        """
        cli.import_for(self.file, self.plugins, names.plugins)
        for option, name in self.names.items():
            if name not in (*registries[option], "none"):
                raise UserError(f"{self.file}: {option} is {name!r}; {nearest(name, registries[option])}")
        replaced = {option for option, name in self.names.items() if (getattr(names, option) or name) != name}
        trainer = cli.pick(registries["trainer"], "trainer", names.trainer or self.names.get("trainer", default))
        needs = contracts.needs_of(trainer)
        given = cli.chosen_models(registries["model"], needs, names.model)
        if "trainer" in replaced:  # what is left of an args.json is what its command asked for
            self._drop(lambda key: key not in self.asked)
            self._drop(lambda key: key.count(".") > 1 and key.split(".")[1] not in needs)
            self.models = self.models if "model" in self.asked else []
        elif "dataset" in replaced:  # which may know another environment
            self._drop(lambda key: key.startswith("env.") and key not in self.asked)
        if {"trainer", "dataset"} & replaced:
            self.names = {option: name for option, name in self.names.items() if option in {*self.asked, *replaced}}
        entries = self.models
        if "trainer" in replaced:
            entries = [word for word in entries if "=" not in word or word.partition("=")[0] in needs]
            self.left_out += [f"model {word}" for word in self.models if word not in entries]
        with one_line(str(self.file)):
            models = cli.chosen_models(registries["model"], needs, entries)
        for option in replaced:
            self._drop(lambda key, group=f"{option}.": key.startswith(group))  # type: ignore[misc]
        others = {model for model, entry in given.items() if models.get(model, entry) != entry}
        self._drop(lambda key: _model_of(key, needs) in others)
        names.model = tuple(f"{model}={entry}" for model, entry in (models | given).items())
        kept = {option: name for option, name in self.names.items() if option not in replaced}
        for option, name in kept.items():
            setattr(names, option, getattr(names, option) or name)
        self.instead = [f"--{option} {getattr(names, option)}" for option in sorted(replaced)]
        self.instead += ["--model " + " ".join(f"{model}={given[model]}" for model in sorted(others))] if others else []
        names.debug = names.debug or self.debug
        words = [word for option, name in kept.items() if option in self.asked for word in (f"--{option}", name)]
        if not names.dataset and "dataset.path" in self.asked:  # by which a reader may be recognised
            words += ["--dataset.path", str(self.values["dataset.path"])]
        words += ["--model", *names.model] if given or (models and "model" in self.asked) else []
        words += ["--debug"] * self.debug
        return [*words, *cli.without(cli.without(typed, "--config"), "--model", several=True)]

    def _drop(self, which: Callable[[str], bool]) -> None:
        """Leave out some options."""
        for key in [key for key in self.values if which(key)]:
            del self.values[key]
            self.left_out += [key] if key in self.asked else []

    def note(self) -> str:
        """What of the file does not apply, for the screen; "" for nothing."""
        if not self.instead:
            return ""
        text = f"{self.file}, with {' '.join(self.instead)} instead of its own"
        return text + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")

    def onto(self, default: Any, small: Collection[str], registries: Registries) -> tuple[Any, list[str]]:
        """The script's options with the file's, and the words of the command line that say the same.

        Args:
            default: Options with the chosen components.
            small: Keys that keep their value, since `--debug` on the command line sets them.

        Raises:
            UserError: an option that does not exist, or a value that does not fit; names file, key, what would.
        """
        known, words = slots(default), []
        changes: dict[tuple[str, ...], dict[str, Any]] = {}
        for key, value in self.values.items():
            if key not in known:
                raise UserError(f"{self.file}: {about_unknown(f'--{key}', default, registries)}")
            slot = known[key]
            if problem := misfit(value, slot.hint, key, finite=False):
                raise UserError(f"{self.file}: {problem}")
            if key not in small:
                self.changed |= {key} if reduce(getattr, (*slot.owners, slot.name), default) != value else set()
                changes.setdefault(slot.owners, {})[slot.name] = tuple(value) if isinstance(value, list) else value
                words += words_of(slot.option, value, slot.hint) if key in self.asked else []
        with one_line(str(self.file)):
            for owners in sorted(changes, key=len, reverse=True):
                default = within(default, owners, changes[owners])
        return default, words

    def settle(self, args: Any, typed: Sequence[str], plugins: Sequence[str]) -> None:
        """Refuse what the file would import, open or write elsewhere, unless the command line names it, too.

        Args:
            args: The script's arguments, with the file's. They keep no name of it, since they have all of it; the
                command line that was typed is recorded beside them.
            typed: This command line.
            plugins: Modules that it names.

        Raises:
            UserError: names the option, and how to confirm it.
        """
        args.notes += filter(None, [self.note()])
        args.config, beside = "", cli.without(typed, "--config")
        for option in ("env", "dataset"):
            cli.check_reach(self.file, option, getattr(args, f"{option}_options"), beside, plugins)
        for key in WRITTEN:
            option, value = key.replace("_", "-"), self.values.get(key)
            if (
                value
                and key in self.changed
                and not cli.given(beside, option)
                and leaves(Path(value).expanduser(), [Path.cwd().resolve()])
            ):
                where = f"{self.file} has --{option} {value!r}, outside of the working directory"
                raise UserError(f"{where}; if files may be written there, add --{option} again")


def read(name: str, script: str, registries: Registries, typed: Sequence[str]) -> Config:
    """Read a file of options: a run's `args.json`, the folder of a run, or a TOML.

    Args:
        script: File name of this script; a run of the other one is refused.
        typed: The command line. `--seed` on it takes the place of the file's seeds, `--no-debug` of its debug.

    Raises:
        UserError: no such file, damaged, or no file of options.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "args.json").exists():
        raise UserError(f"--config {name}: no run here (args.json is missing)")
    path = path / "args.json" if path.is_dir() else path
    if path.suffix not in (".json", ".toml"):
        raise UserError(f"--config {name}: expected an args.json of a run, or a TOML of options, such as options.toml")
    if not path.exists():
        raise UserError(f"--config {name}: no such file")
    if path.suffix == ".toml":
        with one_line(str(path)):
            found = flat(read_toml(path), registries)
        if "seed" in found and found.get("seeds"):
            raise UserError(f"{path}: seed and seeds; keep one of them")
        for key in ("resume", "config"):  # a run has its options already, and a file is one file
            if key in found:
                raise UserError(f"{path}: {key} is for the command line; remove it here")
        asked = set(found)
    else:
        record = read_record(path, RunRecord, "expected the args.json of a run")
        if record["script"] != script:
            raise UserError(f"{path} is of a run of {record['script']}; use it with that script")
        record = renewed(record, registries)
        found = from_record(record["args"], registries)
        asked = {key for key in found if cli.given(record["argv"], key.replace("_", "-"))}
    for option, key in (("seed", "seeds"), ("debug", "debug")):
        if cli.given(typed, option):
            found.pop(key, None)
    return sorted_out(path, found, asked, registries)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises UserError naming it."""
    check_regular(path)
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise UserError(f"{path}: {path.stat().st_size >> 20} MB is too much for options")
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: no valid TOML ({str(error)[:120] or type(error).__name__})") from error
    if too_deep(tables):
        raise UserError(f"{path}: it is nested too deeply")
    return tables


def flat(tables: dict[str, Any], registries: Collection[str]) -> dict[str, Any]:
    """Key -> value, of nested tables; the table of a component may be called as in an args.json, "trainer_options".

    Raises UserError: a key that is there twice, such as "batch-size" beside "batch_size".
    """
    found: dict[str, Any] = {}

    def walk(table: dict[str, Any], prefix: str) -> None:
        for key, value in table.items():
            name = key.replace("-", "_")
            if not prefix and name.removesuffix("_options") in registries:
                name = name.removesuffix("_options")
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            elif f"{prefix}{name}" in found:
                raise UserError(f"{prefix}{name} is there twice")
            else:
                found[f"{prefix}{name}"] = value

    walk(tables, "")
    return found


def from_record(recorded: dict[str, Any], registries: Collection[str]) -> dict[str, Any]:
    """Key -> value, of the options that a run recorded."""
    kept = {k: v for k, v in recorded.items() if k not in OF_A_RUN and not (v is None and k.endswith("_options"))}
    models = kept.pop("model_options", None)
    found = flat(kept, registries)
    for place, (model, options) in enumerate(models.items() if isinstance(models, dict) else ()):
        found |= flat({"model": options if place == 0 else {model: options}}, registries)
    return found


def sorted_out(path: Path, found: dict[str, Any], asked: set[str], registries: Collection[str]) -> Config:
    """A `Config` of flat options: the names of components and plugins apart from the other values.

    Raises:
        UserError: a name that is no text.
    """
    values = dict(found)
    # TOML has no room for a name beside a table: `[trainer]` has it inside. Where there is one, `name` is an option.
    for option in set(registries) - {"model"} - values.keys():
        if f"{option}.name" in values:
            values[option] = values.pop(f"{option}.name")
            asked.add(option)
    names = {option: values.pop(option) for option in registries if option in values and option != "model"}
    plugins, debug = values.pop("plugins", []), values.pop("debug", False)
    inside = [] if "model" in values else [k for k in values if k.startswith("model.") and k.endswith(".name")]
    models = values.pop("model", [])
    models = [models] if isinstance(models, str) else models
    for key in inside:
        name, model = values.pop(key), ".".join(key.split(".")[1:-1])
        models.append(f"{model}={name}" if model else name)
        asked.add("model")
    checks: list[tuple[Any, Any, str]] = [(name, str, option) for option, name in names.items()]
    checks += [(models, list[str], "model"), (plugins, list[str], "plugins"), (debug, bool, "debug")]
    for value, kind, key in checks:
        if problem := misfit(value, kind, key):
            raise UserError(f"{path}: {problem}")
    return Config(path, names, models, plugins, debug, values, asked)


def _model_of(key: str, needs: dict[str, str]) -> str:
    """The model whose option a key is; "" for none."""
    if not key.startswith("model."):
        return ""
    model = key.split(".")[1]
    return model if model in needs and key.count(".") > 1 else next(iter(needs))


# ---- where an option is --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """Where an option is in the script's options."""

    option: str
    """On the command line, without "--"."""
    owners: tuple[str, ...]
    """Fields that lead to its group."""
    name: str
    """Field in that group."""
    hint: Any
    """Its type."""
    again: bool = False
    """Whether the key is a second one for this option."""


def slots(options: Any) -> dict[str, Slot]:
    """Key -> place, of all options of a script with its chosen components."""
    found: dict[str, Slot] = {}
    for prefix, alias, owners, group in groups(options):
        kind: Any = type(group)
        hints = hints_of(kind)
        for one in fields(group):
            if is_dataclass(getattr(group, one.name)) or (not owners and one.name.endswith("_options")):
                continue
            hint = hints.get(one.name, Any)
            renamed = next(filter(None, (getattr(entry, "name", None) for entry in get_args(hint)[1:])), one.name)
            option = f"{prefix}{renamed}".replace("_", "-")
            slot = Slot(option, owners, one.name, hint)
            found[option.replace("-", "_")] = slot
            for key in {f"{prefix}{one.name}", f"{alias}{one.name}"} - found.keys():
                found[key.replace("-", "_")] = replace(slot, again=True)
    return found


def groups(options: Any) -> Iterator[tuple[str, str, tuple[str, ...], Any]]:
    """(prefix on the command line, another one, fields that lead there, options) of the script and each component."""
    yield "", "", (), options
    for one in fields(options):
        group = getattr(options, one.name)
        if one.name == "model_options":
            for place, model in enumerate(fields(group)):
                long = f"model.{model.name}."
                yield "model." if place == 0 else long, long, (one.name, model.name), getattr(group, model.name)
        elif is_dataclass(group):
            prefix = f"{one.name.removesuffix('_options')}."
            yield prefix, prefix, (one.name,), group


def within(options: Any, owners: Sequence[str], changes: dict[str, Any]) -> Any:
    """The options with changes in one of their groups."""
    if owners:
        changes = {owners[0]: within(getattr(options, owners[0]), owners[1:], changes)}
    return replace(options, **changes)


def words_of(option: str, value: Any, hint: Any) -> list[str]:
    """The words of a command line that set an option; none for what words cannot say, such as null."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if isinstance(value, bool) and hint is bool:
        group, _, name = option.rpartition(".")
        return [f"--{option}" if value else f"--{group}.no-{name}" if group else f"--no-{name}"]
    if isinstance(value, (list, tuple)):
        texts = [text_of(item) for item in value]
        plain = not any(isinstance(item, (list, tuple, dict)) for item in value)
        plain = plain and all(text and (text[0] != "-" or text[1:2].isdigit()) for text in texts)
        return [f"--{option}", *texts] if texts and plain else []
    if value is None or isinstance(value, dict):
        return []
    text = text_of(value)
    return [f"--{option}={text}"] if text[:1] == "-" else [f"--{option}", text]


def text_of(value: Any) -> str:
    """A value as a word; numbers below zero without an exponent, which would look like an option."""
    negative = isinstance(value, float) and -np.inf < value < 0
    return np.format_float_positional(value, trim="0") if negative else str(value)
