"""What `inspect`, `convert` and `label` share: their dataset is a `PATH`, or `--dataset NAME` with its options."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from typing import Annotated, Any

from ..contracts import instantiate, options_of
from ..errors import UserError, nearest, one_line
from ..run import command_line as cli
from ..run.progress import showing
from .episodes import EpisodeDataset
from .recognise import recognise


@dataclass(kw_only=True)
class Names:
    """What the first pass over the command line reads."""

    dataset: str = ""
    """Reader, or maker, of the data; of a PATH it is recognised."""
    plugins: tuple[str, ...] = ()
    """Modules, or files such as mine.py, to import first: the readers that they register can be chosen."""


def parse(
    options: type, argv: Sequence[str], positional: int, wants: dict[str, Any], usage: str
) -> tuple[Any, list[str], Any]:
    """Parse a command about a dataset, in two passes as the scripts do.

    Args:
        options: Dataclass of the command's own options, all with defaults.
        positional: Number of words before the first option. The first is the dataset's path; without a path there is
            one word less.
        wants: Defaults of the command for the dataset's options; options that the dataset lacks are left out.
        usage: The words after the command's name, for `--help`.

    Returns:
        The command's options, the words before them, and the dataset's factory.

    Raises:
        UserError: unknown names or options, a path that is not recognised.
    """
    from .. import DATASET_BUILDER_REGISTRY

    words: list[str] = []
    while argv and not argv[0].startswith("-") and len(words) < positional:
        words.append(argv[0])
        argv = argv[1:]
    names: Any = cli.parse_names(Names, argv)
    cli.import_plugins(names.plugins)
    asking = cli.asks_for_help(argv)
    path = cli.last_value(argv, "dataset.path") if len(words) < positional else words[0]
    if not (names.dataset or words or path or asking):
        raise UserError(f"which dataset? Give a path, or --dataset NAME; {nearest('', DATASET_BUILDER_REGISTRY)}")
    name = names.dataset or (recognise(path or words[0]) if path or words else "lerobot")
    component = cli.pick(DATASET_BUILDER_REGISTRY, "dataset", name)
    known = {field.name for field in fields(component)} if is_dataclass(component) else set()
    values = {key: value for key, value in wants.items() if key in known}
    if getattr(component, "renders", False):  # its pictures are drawn, and only those of the cameras that are named
        values.pop("cameras", None)
    if len(words) == positional:
        if "path" not in known:
            raise UserError(f"--dataset {name} takes no path, found {words[0]}")
        values["path"] = words[0]
    both = make_dataclass(
        "Both",
        [
            ("dataset", Annotated[str, cli.choose(DATASET_BUILDER_REGISTRY)]),
            ("plugins", tuple[str, ...]),
            ("dataset_options", Annotated[Any, cli.named("dataset")]),
        ],
        bases=(options, Names),
        kw_only=True,
    )
    both.__doc__, both.__module__ = options.__doc__, options.__module__
    default = both(dataset=name, plugins=names.plugins, dataset_options=options_of(component, values))
    parsed = cli.parse(both, argv, default, registries={"dataset": DATASET_BUILDER_REGISTRY}, usage=usage)
    return parsed, words, instantiate(component, parsed.dataset_options)


def built_by(factory: Any) -> dict[str, Any]:
    """Build a dataset with the arguments that the scripts pass."""
    launch = {"local_rank": 0, "dist_enabled": False, "save_dir": ""}
    with one_line("dataset"), showing():
        return factory.build(opt_params=launch, params=vars(factory) if is_dataclass(factory) else {})


def recorded_by(factory: Any) -> dict[str, Any]:
    """`built_by`, of data whose episodes can be written as they were recorded. Raises UserError: other data."""
    built = built_by(factory)
    dataset = built["dataset"]
    if not isinstance(dataset, EpisodeDataset):
        raise UserError(f"{type(factory).__name__} has no episodes to write; take its sources one by one")
    if dataset.form is not None or dataset.state_steps > 1:
        learnt = "--dataset.action, --dataset.rotations and --dataset.state-steps"
        raise UserError(f"{learnt} are of what is learnt; this writes what was recorded: leave them out")
    if "env" in built:
        dataset.episodes.stored.setdefault("environment", built["env"])  # which Minari's metadata can name
    return built
