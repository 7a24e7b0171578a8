"""The scripts' arguments, parsed in two passes. Bounds, debug values and resume rules annotate the fields.

The first pass reads the chosen components, since they define the options and the defaults of the second.
"""

import inspect
import json
import math
import os
import re
from collections.abc import Container
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from .. import contracts
from ..acting.policy import Inference
from ..errors import UserError, nearest, one_line
from ..records import misfit
from . import command_line as cli
from . import debug
from .checkpoint import recorded_options
from .inheritance import read_inherited
from .places import located
from .record import read_args


@dataclass(frozen=True)
class Rule:
    """Annotates a field of options, as in `steps: Annotated[int, Rule(1, resume=True, debug=40)] = 3000`."""

    least: float | None = None
    """Smallest valid value; None for no bound."""
    resume: bool = False
    """Whether `--resume` may change the value."""
    debug: Any = None
    """Default under `--debug`; None for the usual one."""
    always: bool = False
    """Whether that default overrides the command line under `--debug`."""
    replay: bool = False
    """Whether only trainers with a replay buffer use it."""


@dataclass(kw_only=True)
class Arguments:
    """Base of the scripts' `Args`: the parsed options, and the command line that they come from."""

    def __post_init__(self) -> None:
        self.argv: list[str] = []  # the arguments; on a resume those of the run, then those given with --resume
        self.stored: dict[str, Any] = {}  # `args.json` of the resumed run
        self.defaults: dict[str, Any] = {}  # of the trainer: option -> value
        self.models: dict[str, tuple[str, Any]] = {}  # model name -> entry of the registry, its options

    def given(self, option: str) -> bool:
        """Whether the command line sets `option`, such as "batch-size"."""
        return cli.given(self.argv, option)

    @property
    def subject(self) -> str:
        """Part of the run folder's name: task or id of the dataset or environment, else its registry name."""
        option = "dataset" if learns_from_data(type(self)) else "env"
        options = getattr(self, f"{option}_options")
        named = getattr(options, "id", "") or getattr(options, "task", "") or getattr(self, option)
        return re.sub(r"[^\w.-]+", "-", str(named))


def learns_from_data(options: Any) -> bool:
    """Whether a script needs a dataset; otherwise it needs an environment."""
    return options.dataset != "none"


def rules_of(options: type) -> dict[str, Rule]:
    """Field -> its rule, for the fields that have one."""
    hints = get_type_hints(options, include_extras=True)
    beside = ((name, entry) for name, hint in hints.items() for entry in getattr(hint, "__metadata__", ()))
    return {name: entry for name, entry in beside if isinstance(entry, Rule)}


def check_bounds(options: Any) -> None:
    """Refuse options below their smallest valid value, and infinite ones. Raises UserError naming the first."""
    for name, rule in rules_of(type(options)).items():
        value = getattr(options, name)
        if rule.least is not None and value is not None and not rule.least <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} {value} must be {rule.least:g} or more")


def parse(options: Any, argv: list[str], registries: dict[str, dict[str, type]]) -> Any:
    """Parse a script's command line; with `--resume`, the command line of that run and the arguments added to it.

    What the command line of a resumed run leaves out is as the run recorded it, whatever the defaults are by now.

    Args:
        options: The script's `Args`. Its fields `<option>` and `<option>_options` choose from `registries[option]`.

    Raises:
        UserError: an invalid command line; one line with the option, the expected value and the remedy.
    """
    names_only = _names_of(options, registries)
    names: Any = cli.parse_names(names_only, argv)
    stored: dict[str, Any] = {}
    beside: list[str] = []  # what is given beside --resume
    typed, plugins = argv, names.plugins
    if resumed := names.resume:
        stored = read_args(Path(resumed), made_by=Path(inspect.getfile(options)).name)
        _check_recorded(stored["args"], names_only, resumed)
        asked = {option: getattr(names, option) or stored["args"].get(option) for option in registries}
        _refuse_changes(resumed, stored["args"], asked, set())
        cli.import_for(Path(resumed), stored["args"]["plugins"], plugins)
        beside = cli.without(argv, "--resume")
        argv = [*cli.without(stored["argv"], "--plugins", several=True), *beside]
        names = cli.parse_names(names_only, argv)
        for option in registries:  # chosen by a default then
            known = stored["args"].get(option, "")
            setattr(names, option, getattr(names, option) or (tuple(known) if option == "model" else known))
    else:
        cli.import_plugins(plugins)
    trainer = cli.pick(registries["trainer"], "trainer", names.trainer or options.trainer)
    defaults = _Defaults(options, registries, names, trainer)
    default = defaults.complete()
    if resumed:
        default = _recorded(default, stored["args"], resumed)
    args = cli.parse(options, argv, default, quiet=os.environ.get("RANK", "0") != "0")
    check_bounds(args)
    args, same, moved = located(args, stored.get("args", {}), beside)
    if args.debug:
        always = {name: rule.debug for name, rule in rules_of(options).items() if rule.always}
        args = debug.alone(args, always)
    if resumed:
        for option in ("env", "dataset"):
            cli.check_reach(Path(resumed), option, getattr(args, f"{option}_options"), typed, plugins)
        may_change = {"plugins", *same, *(name for name, rule in rules_of(options).items() if rule.resume)}
        may_change |= moved if read_inherited(Path(resumed)).get("data") else set()  # other data will be refused
        for before in (asdict(default), recorded_options(Path(resumed) / "checkpoints")):
            _refuse_changes(resumed, before, asdict(args), may_change)
        args.resume = resumed
    args.argv, args.stored, args.defaults = argv, stored, defaults.of_trainer
    args.models = {name: (entry, getattr(args.model_options, name)) for name, entry in defaults.needs.items()}
    return args


def _names_of(options: type, registries: dict[str, Any]) -> type:
    """Dataclass of the options that the first pass reads; each is empty where it is absent."""
    made: list[Any] = [(name, str, field(default="")) for name in (*registries, "resume") if name != "model"]
    made += [(name, tuple[str, ...], field(default=())) for name in ("model", "plugins")]
    return make_dataclass("Names", [*made, ("debug", bool, field(default=False))], kw_only=True)


def trainer_defaults(options: Any, trainer: type) -> dict[str, Any]:
    """The trainer's defaults in one script; those with the prefix "online." or "offline." apply to that script only."""
    script, found = Path(inspect.getfile(options)).stem.partition("_")[0], {}
    for key, value in contracts.defaults_of(trainer).items():
        group, _, name = key.partition(".")
        if group not in ("offline", "online"):
            found[key] = value
        elif group == script:
            found[name] = value
    return found


class _Defaults:
    """The defaults of the second pass: the script's, then the trainer's, then those of `--debug`."""

    def __init__(self, options: Any, registries: dict[str, dict[str, type]], names: Any, trainer: type) -> None:
        self.options, self.registries, self.names, self.trainer = options, registries, names, trainer
        names.trainer = names.trainer or options.trainer
        self.of_trainer = trainer_defaults(options, trainer)
        self.values = {option: getattr(options, option) for option in registries} | self.of_trainer
        if names.debug:
            rules = rules_of(options).items()
            self.values |= {name: rule.debug for name, rule in rules if rule.debug is not None and not rule.always}
        # Model name -> registry name, as the trainer needs them, the policy first; `--model` replaces some.
        needs = contracts.needs_of(trainer)
        self.needs = needs | cli.chosen_models(registries["model"], needs, names.model)

    def complete(self) -> Any:
        """An instance of the script's `Args` with the chosen components and all defaults."""
        names, values = self.names, self.values
        names.model = tuple(f"{name}={entry}" for name, entry in self.needs.items())
        from_data = learns_from_data(self.options)
        names.dataset = names.dataset or (values["dataset"] if from_data else "none")
        dataset = object if names.dataset == "none" else cli.pick(self.registries["dataset"], "dataset", names.dataset)
        # The dataset's environment takes precedence over the trainer's.
        names.env = names.env or getattr(dataset, "env_name", "none" if from_data else values["env"])
        for option in self.registries:
            setattr(names, option, getattr(names, option) or values[option])
        groups = {
            f"{option}_options": self.component(option, getattr(names, option))
            for option in self.registries
            if option != "model"
        }
        models = {model: self.component("model", entry, model) for model, entry in self.needs.items()}
        known = [f.name for f in fields(self.options)]
        simple = {k.replace("-", "_"): v for k, v in values.items() if "." not in k and k not in self.registries}
        subject = f"defaults of the trainer {names.trainer!r}"
        for name in simple:
            if name not in known:
                raise UserError(f"{subject}: the script has no option {name!r}; {nearest(name, known)}")
        with one_line(subject):
            acting = Inference(**self.group("policy"))
            everything = vars(names) | simple | groups
            return self.options(**everything, model_options=cli.model_options(models), policy=acting)

    def group(self, option: str) -> dict[str, Any]:
        """Field name -> default, of the entries "<option>.<name>"."""
        found = ((key.rpartition("."), value) for key, value in self.values.items())
        return {name.replace("-", "_"): value for (of, _, name), value in found if of == option}

    def component(self, option: str, name: str, model: str = "") -> Any:
        """Default options of a component; the trainer's values apply only where its default component is chosen."""
        component = object if name == "none" else cli.pick(self.registries[option], option, name)
        first = model == next(iter(self.needs), "")
        values = self.group(option if first or not model else f"{option}.{model}")
        if option == "dataset":  # the windows that the trainer needs apply to any dataset with these options
            values = {k: v for k, v in values.items() if hasattr(component, k)}
        elif name != (contracts.needs_of(self.trainer)[model] if model else self.values[option]):
            values = {}
        small = contracts.debug_options_of(component) if self.names.debug else {}
        return contracts.options_of(component, values | small)


def _recorded(options: Any, values: Any, run: str, place: str = "args") -> Any:
    """Options with the values of a run's record; those that an older version did not have keep their defaults.

    Raises:
        UserError: a value that does not fit.
    """
    _check_recorded(values, type(options), run, place)
    changes = {}
    for name in (one.name for one in fields(options) if one.name in values):
        default, value = getattr(options, name), values[name]
        if is_dataclass(default):
            changes[name] = _recorded(default, value, run, f"{place}.{name}")
        else:
            changes[name] = tuple(value) if isinstance(value, list) else value
    with one_line(f"{run}/args.json"):
        return replace(options, **changes)


def _check_recorded(values: Any, kind: type, run: str, place: str = "args") -> None:
    if problem := misfit(values, kind, place, finite=False):
        raise UserError(f"{run}/args.json: damaged or incomplete: {problem}; its last checkpoint has the options, too")


def _refuse_changes(run: str, stored: dict[str, Any], asked: dict[str, Any], may_change: Container[str]) -> None:
    """Refuse changed options on a resume, but for those of `may_change`. Raises UserError listing them."""
    stored, asked = (_flat(json.loads(json.dumps(options))) for options in (stored, asked))
    fixed = [key for key in asked if key not in may_change and key.split(".")[0] not in may_change]
    changed = [key for key in fixed if asked[key] != stored.get(key, asked[key])]
    if changed:
        lines = [f"{key.replace('_options', '')} {stored.get(key)} -> {asked[key]}" for key in changed]
        raise UserError(
            f"--resume {run} cannot change: {'; '.join(lines)}; start a new run (--init-from {run}) for that"
        )


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
