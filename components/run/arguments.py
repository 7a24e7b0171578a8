"""The scripts' arguments, parsed in two passes. Bounds, debug values and resume rules annotate the fields.

The first pass reads the chosen components, since they define the options and the defaults of the second.
"""

import inspect
import math
import re
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from .. import contracts
from ..acting.evaluation import offered_env
from ..acting.inference import Inference
from ..errors import UserError, let_through, nearest, one_line
from . import command_line as cli
from . import debug
from .config_file import read as read_config
from .help import Option, catalogue, flags_of
from .places import located
from .process import is_first
from .reading import renewed_words
from .resumed import Resumed
from .seeds import spelled_out
from .tracking import check_tracker


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
    refused: tuple[str, str] = ("", "")
    """A word that users of other kits may try, which is not offered, and why it is refused."""


FP16 = ("fp16", "is not supported (its scaler fits one optimizer only); use bf16")


# Field of the scripts' options -> title of the section of --help that begins with it.
SECTIONS = {"trainer": "Components", "resume": "Training", "eval_every": "Evaluation", "run_dir": "Saving"}
SECTIONS |= {"env_timeout": "Training", "save_every": "Saving", "track": "Tracking"}
SECTIONS |= {"save_buffer": "Saving", "env_restarts": "Training"}
LIST = Option("list", ("--list",), "", "Print all components, each with a line about it; those of --plugins, too.")


@dataclass(kw_only=True)
class Arguments:
    """Base of the scripts' `Args`: the parsed options, and the command line that they come from."""

    def __post_init__(self) -> None:
        self.argv: list[str] = []  # the arguments; on a resume those of the run, then those given with --resume
        self.notes: list[str] = []  # about the command line, for the screen
        self.stored: dict[str, Any] = {}  # `args.json` of the resumed run
        self.defaults: dict[str, Any] = {}  # of the trainer: option -> value
        self.models: dict[str, tuple[str, Any]] = {}  # model name -> entry of the registry, its options

    def given(self, option: str) -> bool:
        """Whether the command line sets `option`, such as "batch-size"."""
        return cli.given(self.argv, option)

    @property
    def subject(self) -> str:
        """Part of the run folder's name: id, task or file of the dataset or environment, else its registry name."""
        options, name = self.dataset_options, self.dataset  # type: ignore[attr-defined]
        known = name == "none" or hasattr(options, "environment") or any(map(self.given, ("env", "env.id", "env.task")))
        if not learns_from_data(type(self)) and known:
            options, name = self.env_options, self.env  # type: ignore[attr-defined]
        texts = [getattr(options, option, "") for option in ("id", "task", "path")]
        named = next((text for text in texts if isinstance(text, str) and text), name)
        return re.sub(r"[^\w.-]+", "-", Path(named).stem if named == texts[2] else named)


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

    What the command line of a resumed run leaves out is as the run recorded it, whatever the defaults are by now. The
    options of a `--config` file are recorded as if they had been typed, so that a resumed run needs no such file.

    Args:
        options: The script's `Args`. Its fields `<option>` and `<option>_options` choose from `registries[option]`.

    Raises:
        UserError: an invalid command line; one line with the option, the expected value and the remedy.
    """
    typed = renewed_words(spelled_out(argv))
    given = _first_pass(registries, typed)
    quiet = not is_first()
    let_through(given.debug)
    cli.import_plugins(given.plugins)
    script = Path(inspect.getfile(options)).name
    if given.list:
        _list(registries, script, quiet)
    if given.resume and given.config:
        why = f"--resume {given.resume} takes every option from there"
        raise UserError(f"--config is for new runs: {why}; leave it out")

    # Whatever chooses components beside the command line: the run to resume, a file of options, or a dataset's path.
    names, argv = given, typed
    resumed = Resumed(given.resume, script, registries) if given.resume else None
    config = read_config(given.config, script, registries, typed) if given.config else None
    if resumed:
        argv = resumed.command_line(given, typed)
        names = resumed.chosen(_first_pass(registries, argv))
    elif config:
        argv = config.choose(names, registries, options.trainer, typed)
    trainer = cli.pick(registries["trainer"], "trainer", names.trainer or options.trainer)
    if not resumed and (found := _recognised(options, argv, names, trainer, registries["dataset"], quiet)):
        argv, names.dataset = ["--dataset", found, *argv], found

    # The chosen components and their defaults; then what the run or the file has instead; then the command line.
    defaults = _Defaults(options, registries, names, trainer)
    default = defaults.complete()
    if config:
        small = defaults.small() if cli.given(typed, "debug") else set()
        default, words = config.onto(default, small, registries)
        argv = [*words, *argv]
        with one_line(str(config.file)):
            check_bounds(default)
    default = resumed.onto(default) if resumed else _of_data(default, argv)
    _refuse_words(options, argv)
    args = cli.parse(options, argv, default, quiet, registries, SECTIONS, more=[LIST])
    check_bounds(args)
    check_tracker(args.track)

    # What no run may do, and what this run may not change.
    stored = resumed.record if resumed else {}
    args, same, moved = located(args, stored.get("args", {}), cli.without(typed, "--resume") if resumed else [])
    let_through(args.debug)
    rules = rules_of(options).items()
    if args.debug:
        args = debug.alone(args, {name: rule.debug for name, rule in rules if rule.always})
    if resumed:
        may_change = {"plugins", *same, *(name for name, rule in rules if rule.resume)}
        resumed.settle(args, default, may_change, moved, argv, typed, given.plugins)
    elif config:
        config.settle(args, typed, given.plugins)
    args.argv, args.stored, args.defaults = argv, stored, defaults.of_trainer
    args.models = {name: (entry, getattr(args.model_options, name)) for name, entry in defaults.needs.items()}
    return args


def _first_pass(registries: dict[str, Any], argv: list[str]) -> Any:
    """The options by which the others are found; each is empty where it is absent."""
    made: list[Any] = [(name, str, field(default="")) for name in (*registries, "resume", "config") if name != "model"]
    made += [(name, tuple[str, ...], field(default=())) for name in ("model", "plugins")]
    made += [(name, bool, field(default=False)) for name in ("debug", "list")]
    return cli.parse_names(make_dataclass("Names", made, kw_only=True), argv)


def _list(registries: dict[str, dict[str, type]], script: str, quiet: bool) -> NoReturn:
    """Print all components, and exit with 0."""
    if not quiet:
        print(catalogue(registries, script), end="")
    raise SystemExit(0)


def _refuse_words(options: type, argv: list[str]) -> None:
    """Raise UserError for a word that an option refuses with a reason."""
    for name, rule in rules_of(options).items():
        option, (word, reason) = name.replace("_", "-"), rule.refused
        if word and cli.last_value(argv, option) == word:
            raise UserError(f"--{option} {word} {reason}")


def _recognised(options: Any, argv: list[str], names: Any, trainer: type, readers: dict[str, type], quiet: bool) -> str:
    """The reader of the path that `--dataset.path` gives without `--dataset`; "" where the default one may read it.

    Raises:
        UserError: no such path, or a format that is not recognised.
    """
    path = cli.last_value(argv, "dataset.path")
    default: Any = readers.get(trainer_defaults(options, trainer).get("dataset", options.dataset), object)
    recognise = contracts.recogniser_of(readers.values())
    reads = any(flag == "--dataset.path" for flag in flags_of(default, "dataset"))
    if names.dataset or not recognise or (reads and not contracts.recogniser_of([default])):
        return ""
    if not path:
        if cli.given(argv, "dataset.path") and not reads:
            raise UserError("--dataset.path: expected a file or folder")
        return ""
    try:
        found = recognise(path)
    except UserError as error:
        if reads:
            return ""
        raise UserError(f"--dataset.path {error}") from error
    if readers.get(found) is default:
        return ""
    if not quiet and not cli.asks_for_help(argv):
        print(f"--dataset.path {path} is recognised, as with --dataset {found}")
    return found


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
            known = [(name, rule) for name, rule in rules if not (rule.replay and contracts.estimates(trainer))]
            self.values |= {name: rule.debug for name, rule in known if rule.debug is not None and not rule.always}
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
            everything = {k: v for k, v in vars(names).items() if k in known} | simple | groups
            return self.options(**everything, model_options=cli.model_options(models), policy=acting)

    def small(self) -> set[str]:
        """Keys of the options, such as "steps" and "trainer.horizon", that have a value of their own under --debug."""
        found = {name for name, rule in rules_of(self.options).items() if rule.debug is not None}
        chosen = [
            (f"{option}.", option, getattr(self.names, option)) for option in self.registries if option != "model"
        ]
        for place, (model, entry) in enumerate(self.needs.items()):
            chosen.append(("model." if place == 0 else f"model.{model}.", "model", entry))
        for prefix, option, name in chosen:
            found |= {f"{prefix}{key}" for key in contracts.debug_options_of(self.registries[option].get(name, object))}
        return found

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


def _of_data(default: Any, argv: list[str]) -> Any:
    """Defaults in which the environment's options are those of the dataset, if its own options tell them."""
    if not hasattr(default.dataset_options, "environment"):
        return default
    data, words = default.dataset_options, [word for word in argv if word not in ("-h", "--help")]
    if any(word.startswith("--dataset.") for word in words):
        try:
            data = cli.parse(type(default), words, default).dataset_options
        except UserError:  # which is parsed again, and reported then
            return default
    offered = data.environment()
    return replace(default, env_options=offered_env(offered)[1]) if offered["name"] == default.env else default
