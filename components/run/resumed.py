"""`--resume RUN`: the options of a run, what may be given beside them, and what may not change."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError, one_line
from ..records import misfit
from . import command_line as cli
from .checkpoint import recorded_options
from .inheritance import read_inherited
from .reading import flat, read_args, renewed


class Resumed:
    """The run that a command line resumes.

    Args:
        run: Its folder.
        script: File name of this script; a run of the other one is refused.
        registries: Of the options by which components are chosen.

    Raises:
        UserError: no run, or a damaged one.
    """

    def __init__(self, run: str, script: str, registries: dict[str, dict[str, type]]) -> None:
        self.run, self.registries = run, registries
        self.record = read_args(Path(run), made_by=script)

    def command_line(self, given: Any, typed: list[str]) -> list[str]:
        """The run's command line, and after it what is given beside `--resume`.

        Args:
            given: The names that the first pass finds in `typed`.

        Raises:
            UserError: another component than the run's, or a plugin of it that is not named.
        """
        args = self.record["args"]
        _check_recorded(args, type(given), self.run)
        asked = {option: getattr(given, option) or args.get(option) for option in self.registries}
        _refuse_changes(self.run, args, asked, set())
        cli.import_for(Path(self.run), args["plugins"], given.plugins)
        self.record = renewed(self.record, self.registries)
        recorded = cli.without(self.record["argv"], "--plugins", several=True)
        return [*recorded, *cli.without(typed, "--resume")]

    def chosen(self, names: Any) -> Any:
        """The names, with the run's components that a default has chosen."""
        for option in self.registries:
            known = self.record["args"].get(option, "")
            setattr(names, option, getattr(names, option) or (tuple(known) if option == "model" else known))
        return names

    def onto(self, default: Any) -> Any:
        """The script's options with those of the run. Raises UserError: a value that does not fit."""
        return _recorded(default, self.record["args"], self.run)

    def settle(
        self,
        args: Any,
        default: Any,
        may_change: set[str],
        moved: set[str],
        argv: Sequence[str],
        typed: Sequence[str],
        plugins: Sequence[str],
    ) -> None:
        """Refuse what the run would import or open unless this command line names it, and changes of its options.

        Args:
            args: The script's arguments.
            default: The run's options.
            may_change: Fields that may.
            moved: Fields that name other places; those of the data may change where the data is known by its content.
            argv: The whole command line; `typed` and `plugins` are what was given beside `--resume`.

        Raises:
            UserError: names the option.
        """
        run = Path(self.run)
        cli.check_reach_of_run(run, args, argv, typed, plugins)
        if read_inherited(run).get("data"):  # other data will be refused
            may_change = may_change | moved
        for before in (asdict(default), recorded_options(run / "checkpoints")):
            _refuse_changes(self.run, before, asdict(args), may_change)
        args.resume = self.run


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


def _refuse_changes(run: str, stored: dict[str, Any], asked: dict[str, Any], may_change: Collection[str]) -> None:
    """Refuse changed options on a resume, but for those of `may_change`. Raises UserError listing them."""
    stored, asked = (flat(json.loads(json.dumps(options))) for options in (stored, asked))
    fixed = [key for key in asked if key not in may_change and key.split(".")[0] not in may_change]
    changed = [key for key in fixed if asked[key] != stored.get(key, asked[key])]
    if changed:
        lines = [f"{key.replace('_options', '')} {stored.get(key)} -> {asked[key]}" for key in changed]
        raise UserError(
            f"--resume {run} cannot change: {'; '.join(lines)}; start a new run (--init-from {run}) for that"
        )
