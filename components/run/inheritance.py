"""What a run begins with and does not compute itself, kept in its folder, so that it needs nothing else to go on.

    inherited/record.json    fingerprint of its data and frozen policy, normalisation, shift and scale of its rewards
    inherited/weights/       initial weights that come from other runs or files, until the first checkpoint holds them
    inherited/base/          a frozen policy that is corrected or steered; expert/ one that labels; policy-<hash>/ one
                             that made the data

A new run fills the folder before it begins. A resumed run reads it and nothing else; a run of an older version, which
has none, reads the others once more and keeps what it found.
"""

import copy
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ..acting.policy_folder import describe, normalisation_of
from ..contracts import weights_follow
from ..data.features import check_widths, reordered
from ..data.fingerprint import changes, fingerprint
from ..data.normalisation import Normaliser
from ..errors import UserError
from ..parallel import on_first
from ..records import Inherited, read_record
from .checkpoint import ever_saved, run_of, steadily
from .files import read_tree, write_json, write_tree
from .policies import choose

T = TypeVar("T")
logger = logging.getLogger(__name__)
NAME, RECORD = "inherited", "record.json"
REMEDY = "without this file the run goes on unchecked"
SHOWN = 16  # names in a message
PARTS = {"statistics": "stats", "bounds": "bounds"}  # of a normalisation: name in the record -> in `spec`
CONTENTS = re.compile(r"record\.json|\.record\.json-new|weights|\.weights-new|base|expert|\.?policy-[0-9a-f]{8}.*")


class Inheritance:
    """The folder `inherited/` of a run.

    Args:
        run: Run folder.
        rank: Of this process; the first one writes.
        resumed: Whether the run has begun before.
    """

    def __init__(self, run: Path, rank: int, resumed: bool) -> None:
        self.run, self.folder, self.rank, self.resumed = run, run / NAME, rank, resumed
        self.values: dict[str, Any] = {}  # of the record, on the first process
        self.spec: dict[str, Any] = {}  # of the data here

    def open(self) -> None:
        """On the first process: read the record of a resumed run, or remove what a start that failed has left.

        Raises:
            UserError: a damaged record, or a folder of this name with other files.
        """
        if self.resumed:
            self.values = read_inherited(self.run)
        elif self.folder.exists():
            if odd := [path.name for path in self.folder.iterdir() if not CONTENTS.fullmatch(path.name)]:
                raise UserError(f"{self.folder} holds other files ({odd[0]}); choose another --run-dir")
            self.discard()

    def write(self) -> None:
        """On the first process, when the run begins: write the record. Raises OSError."""
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / RECORD, {"format": 1, **self.values})

    def discard(self) -> None:
        """Remove everything, of a run that did not begin."""
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- values ----

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON value as it was when the run began, on every process; `make` gives it then, on the first one."""

        def value() -> Any:
            if name not in self.values:
                self.values[name] = json.loads(json.dumps(make()))
            return self.values[name]

        return on_first(self.rank, value)

    def same_data(self, built: dict[str, Any]) -> dict[str, Any]:
        """What a dataset's factory returned, if it is the data that the run began with.

        Raises:
            UserError: other data; one line that names both.
        """

        def check() -> None:
            now, before = fingerprint(built), self.values.setdefault("data", None)
            self.values["data"] = before or now
            if before is None and self.resumed:
                logger.warning("%s: an older version began it, without a record of its data: not checked", self.run)
            if before and (found := described(lambda: changes(before, now), self.folder)):
                raise UserError(
                    f"the data changed since the run began: {found}; restore it, or start a new run with"
                    f" --init-from {self.run}"
                )

        on_first(self.rank, check)
        return built

    def normaliser(self, spec: dict[str, Any], modes: dict[str, str]) -> Normaliser:
        """The normaliser of the run's data. On a resume its modes and statistics are those of the beginning.

        Args:
            spec: Of the data; the statistics of the beginning replace those in it.
            modes: As asked for.
        """
        self.spec = spec
        kept = self.keep("normalisation", lambda: _normalisation(Normaliser(spec, modes).modes, spec))
        applied = described(lambda: _applied(kept, spec), self.folder)
        return Normaliser(spec, applied)

    def normalisation(self, before: str, spec: dict[str, Any], base: Any = None) -> dict[str, str]:
        """Modes by which the run that this one begins from normalises, and into `spec` its statistics; {} for no run.

        Args:
            before: Folder of that run; "" for none.
            spec: Of the environments' transitions.
            base: Frozen policy, whose modes come first if it has to have them.

        Raises:
            UserError: no policy there, keys of other shapes, or another normalisation than that of `base`.
        """
        fitted = base.fit(spec) if base else None
        needed = copy.deepcopy(spec)

        def found() -> dict[str, Any]:
            modes = _modes(before, spec) if before or fitted is None else fitted
            for key, mode in (fitted or {}).items():
                seen = key == "action" or key.startswith("observation.")
                if seen and (modes[key] != mode or mode != "none" and spec[key]["stats"] != needed[key]["stats"]):
                    other = f"its {key!r} is normalised in another way than by the policy of --trainer.base"
                    raise UserError(f"--init-from {before}: {other}; steer the same one, or leave out --init-from")
            return _normalisation(modes, spec)

        kept = self.keep("normalisation", found)
        modes = described(lambda: _applied(kept, spec), self.folder)
        return modes if before or fitted is not None else {}

    # ---- weights and folders ----

    @property
    def has_weights(self) -> bool:
        """Whether the run has weights of its own: in a checkpoint, or those that it began with."""
        return self.resumed and (ever_saved(self.run / "checkpoints") or (self.folder / "weights").is_dir())

    def weights_follow(self) -> AbstractContextManager[None]:
        """A context to build the models in; those of a resumed run open no file of initial weights."""
        return weights_follow(self.has_weights)

    def check_forms(self, runs: Iterable[str]) -> None:
        """Refuse the weights of runs with actions in another form than here, or dimensions in another order.

        Raises UserError.
        """
        for run in runs:
            try:
                spec = describe(choose(run).folder)[1]["spec"]
            except UserError:  # it has no policy
                continue
            for key, feature in spec.items():
                orders = [of.get("names", []) for of in (feature, self.spec.get(key, {}))]
                if reordered(*orders):
                    there, here = (", ".join(names[:SHOWN]) for names in orders)
                    problem = f"its weights are of {key!r} in the order {there}, here it is {here}"
                    raise UserError(f"{run}: {problem}; train anew, or put the data in that order")
            there, here = (of.get("action", {}).get("form", {}) for of in (spec, self.spec))
            if _how(there) != _how(here):
                modes = [form.get("mode", "absolute") for form in (there, here)]
                differ = f"as {modes[0]} ones, here as {modes[1]} ones" if len(set(modes)) > 1 else "in another form"
                remedy = "set --dataset.action, --dataset.action-keys and --dataset.rotations alike"
                raise UserError(f"{run}: its weights are of actions that are learnt {differ}; {remedy}")

    def keep_weights(self, models: dict[str, nn.Module]) -> None:
        """Keep initial weights that come from elsewhere."""
        if self.rank == 0 and models:
            temporary = self.folder / ".weights-new"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, model in models.items():
                write_tree(temporary / f"model-{name}.safetensors", model.state_dict())
            temporary.rename(self.folder / "weights")

    def load_weights(self, models: nn.ModuleDict) -> None:
        """Load the weights that the run began with, unless a checkpoint has later ones."""
        if not ever_saved(self.run / "checkpoints"):
            for path in sorted((self.folder / "weights").glob("model-*.safetensors")):
                models[path.stem.removeprefix("model-")].load_state_dict(read_tree(path))

    def drop_weights(self) -> None:
        """Remove the initial weights, once a checkpoint holds the models."""
        shutil.rmtree(self.folder / "weights", ignore_errors=True)

    def copied(self, name: str, copy: Callable[[Path], None]) -> Path:
        """A folder that is copied when the run begins, and read from then on; call it on the first process first."""
        kept, older = self.folder / name, self.run / name  # where older versions kept it
        if self.resumed and older.exists() and not kept.exists():
            return older
        if self.rank == 0 and not kept.exists():
            copy(kept)
        return kept


def read_inherited(run: Path) -> dict[str, Any]:
    """The record of a run; {} for one of an older version. Raises UserError: it is damaged."""
    path = run / NAME / RECORD
    if not path.exists():
        return {}
    record = read_record(path, Inherited, REMEDY)
    return {key: value for key, value in record.items() if key != "format"}


def described(read: Callable[[], T], folder: Path) -> T:
    """The result of `read`, which reads a value of the record. Raises UserError: it is not what was written."""
    try:
        return read()
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        raise UserError(f"{folder / RECORD}: damaged ({kind}{error}); {REMEDY}") from error


def _how(form: dict[str, Any]) -> str:
    """The record of a form, without what it has of the data, by which two are compared."""
    kept = {name: form[name] for name in ("mode", "pairs", "rotations") if name in form}
    return json.dumps(kept, sort_keys=True)


def _modes(before: str, spec: dict[str, Any]) -> dict[str, str]:
    """The modes of the run that this one begins from, whose statistics join `spec`."""
    if not before:
        return {}
    return steadily(run_of(Path(before)), lambda: normalisation_of(choose(before).folder, spec))


def _normalisation(modes: dict[str, str], spec: dict[str, Any]) -> dict[str, Any]:
    kept = {part: {key: of[name] for key, of in spec.items() if name in of} for part, name in PARTS.items()}
    return {"modes": modes, **kept}


def _applied(kept: dict[str, Any], spec: dict[str, Any]) -> dict[str, str]:
    """Put the recorded statistics into `spec`; returns the recorded mode of every key."""
    for part, name in PARTS.items():
        for key, stats in kept[part].items():
            spec[key][name] = dict(stats)
            check_widths(key, {**spec[key], "stats": stats})
    return {key: kept["modes"].get(key, "none") for key in spec}
