"""Checkpoints that are complete or absent, with hashes; safetensors and JSON only, no pickle.

    checkpoints/step-000001000/   <name>.safetensors (shared by all processes), rank-<r>.safetensors, manifest.json
                                  policy.json, model.safetensors: the policy of that step, as in the run's policy/
    checkpoints/best              link to the step that `best.py` tells

A checkpoint is written to a temporary folder and becomes valid when that folder is renamed into place. The latest
checkpoint is the newest one whose manifest verifies. Names that start with a dot are temporary, stale or damaged.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import contracts, parallel
from ..acting.policy_folder import write_policy
from ..data.random_state import derive_seed, get_random_state, seed_all, set_random_state
from ..errors import UserError, crashes_pass, nearest, one_line
from ..optimizers import kept_length
from ..records import Manifest, check_folder, check_regular, problem_of
from .config_file import words_of
from .files import as_json, fingerprint, flatten, read_tree, sync, unflatten, write_json, write_tree
from .pieces import DamagedError, Parts, Records, keep, leave_out, recover
from .progress import SAVING, shown_as
from .reading import read_args

logger = logging.getLogger(__name__)
FORMAT = 2
PATIENCE = 10  # attempts to read a checkpoint of a run that replaces them
T = TypeVar("T")
STEP_NAME = re.compile(r"step-(\d{9,})")


__all__ = ["Checkpoints", "DamagedError", "flatten", "read_tree", "save", "unflatten", "verify", "write_tree"]


# ---- saving --------------------------------------------------------------------------------------------------------


def _on_all(action: Callable[[], None]) -> None:
    """Run a phase of a save on this process; a failure on any process raises on all, so that none waits forever."""
    failure: Exception | None = None
    try:
        action()
    except Exception as error:
        failure = error
    problems = [problem for problem in parallel.gather("" if failure is None else str(failure)) if problem]
    if failure is not None:
        raise failure
    if problems:
        raise RuntimeError(f"another process could not save: {problems[0]}")


def save(
    root: Path,
    step: int,
    shared: dict[str, Any],
    of_rank: dict[str, Any],
    info: dict[str, Any],
    keep_last: int,
    rank: int,
    best: int,
    before: Callable[[], None] = lambda: None,
    further: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write `root/step-<step>`; called by every process.

    Args:
        shared: name -> state that is the same on all processes; rank 0 writes one file each.
        of_rank: State of this process; of `Parts` under the key `parts` of an entry, only the new ones are written.
        info: Further entries of the manifest ("trainer", "config", ...).
        keep_last: Number of checkpoints to keep; older ones are removed once this one is valid.
        best: Step of the best checkpoint so far, which is linked as `best` and kept; -1 for none.
        before: Must succeed first, such as an fsync of the log.
        further: Writes further files into the folder that it gets, on rank 0.

    Raises:
        Exception: on every process, when any process could not write. The older checkpoints are then untouched, and
            the files of this one are removed.
    """
    writer = _Writer(root, step, rank)
    try:
        _on_all(before)
        _on_all(writer.prepare)
        _on_all(partial(writer.write, shared, of_rank, keep_last, further))
        pieces = [name for names in parallel.gather(writer.pieces) for name in names]
        _on_all(partial(writer.commit, {"pieces": pieces, "best": best, **info}, keep_last, best))
    except Exception:
        shutil.rmtree(writer.temporary, ignore_errors=True)  # frees the space on a full disk
        raise


class _Writer:
    """The phases of a save on one process; each begins once all processes have finished the one before."""

    def __init__(self, root: Path, step: int, rank: int) -> None:
        self.root, self.step, self.rank = root, step, rank
        self.final = folder_of(root, step)
        self.temporary = root / f".tmp-{self.final.name}"
        self.shapes: dict[str, dict[str, list[int]]] = {}
        self.pieces: list[str] = []  # file names of this process's

    def prepare(self) -> None:
        """Rank 0 removes the remains of earlier saves, and makes the temporary folder."""
        if self.rank == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            _remove_stale(self.root)
            self.temporary.mkdir()

    def write(
        self, shared: dict[str, Any], of_rank: dict[str, Any], keep_last: int, further: Callable[[Path], None]
    ) -> None:
        """Write this process's file and parts; rank 0 also writes the shared state, and `further` files."""
        of_rank = dict(of_rank)
        earlier = [path for path in reversed(steps(self.root)) if path < self.final]
        before = earlier[0] if earlier and keep_last > 1 else None
        records: Records = {path: _files(path) for path in (self.final, *earlier)}  # or itself, when it is renewed
        for key, state in of_rank.items():
            if isinstance(state, dict) and isinstance(parts := state.get("parts"), Parts):
                of_rank[key] = state | {"parts": [*parts.kept, *parts.new]}
                self.pieces += [f"{name}.safetensors" for name in of_rank[key]["parts"]]
                for name in parts.kept:
                    keep(f"{name}.safetensors", records, before, self.temporary)
                for name, tree in parts.new.items():
                    write_tree(self.temporary / f"{name}.safetensors", tree)
        write_tree(self.temporary / f"rank-{self.rank}.safetensors", of_rank)
        if self.rank == 0:
            for name, tree in shared.items():
                self.shapes[name] = write_tree(self.temporary / f"{name}.safetensors", tree)
            before_them = set(self.temporary.iterdir())
            further(self.temporary)
            for path in set(self.temporary.iterdir()) - before_them:
                sync(path)

    def commit(self, info: dict[str, Any], keep_last: int, best: int) -> None:
        """Rank 0 writes the manifest and renames the folder into place, which makes the checkpoint valid."""
        if self.rank != 0:
            return
        manifest = {"format": FORMAT, "step": self.step, "world_size": parallel.world_size(), **info}
        manifest["shapes"] = self.shapes
        known = _known_fingerprints(self.root)
        files = sorted(self.temporary.iterdir())
        manifest["files"] = {path.name: known.get(path.stat().st_ino) or fingerprint(path) for path in files}
        manifest["sha256"] = _own_hash(manifest)
        write_json(self.temporary / "manifest.json", manifest)
        sync(self.temporary)
        if self.final.exists():  # stale: the run was resumed from an earlier step
            os.rename(self.final, self.root / f".old-{self.final.name}")
        os.rename(self.temporary, self.final)
        sync(self.root)
        link_best(self.root, best)
        _prune(self.root, keep_last)


def _files(folder: Path) -> dict[str, list[Any]]:
    """File name -> fingerprint, as the manifest of a checkpoint has them; {} if there is none that can be read."""
    return manifest_of(folder).get("files", {})


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, whose files may not match it; {} if there is none that is whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return manifest if not problem_of(manifest, Manifest) and manifest["sha256"] == _own_hash(manifest) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def recorded_options(root: Path) -> dict[str, Any]:
    """The options of a run as its newest checkpoint with a whole manifest has them; {} if there is none."""
    return next((found["config"] for folder in reversed(steps(root)) if (found := manifest_of(folder))), {})


def _known_fingerprints(root: Path) -> dict[int, list[Any]]:
    """Inode -> fingerprint of the checkpoints' files, so that a linked file is not read again."""
    known: dict[int, list[Any]] = {}
    for folder in steps(root):
        for name, entry in _files(folder).items():
            with contextlib.suppress(OSError):
                known[(folder / name).stat().st_ino] = entry
    return known


def _remove_stale(root: Path) -> None:
    """Remove what saves that did not come to their end have left."""
    for stale in [*root.glob(".tmp-*"), *root.glob(".old-*")]:
        shutil.rmtree(stale, ignore_errors=True)


def tidy(root: Path, manifest: dict[str, Any], keep_last: int) -> None:
    """Do what the last save, which wrote this manifest, did not come to do after its checkpoint was valid."""
    with contextlib.suppress(OSError):  # a full disk: the next save does it
        _remove_stale(root)
        if "best" in manifest:
            best = manifest["best"]  # a record; in an older version, the step alone, or -1
            link_best(root, best["step"] if isinstance(best, dict) else -1 if best is None else best)
        _prune(root, keep_last)


def link_best(root: Path, step: int) -> None:
    """Point `best` at a step atomically; remove it when there is no such checkpoint."""
    target = folder_of(root, step).name
    if not (root / target).exists():
        (root / "best").unlink(missing_ok=True)
    elif not (root / "best").is_symlink() or os.readlink(root / "best") != target:
        (root / ".best-new").unlink(missing_ok=True)
        os.symlink(target, root / ".best-new")
        os.replace(root / ".best-new", root / "best")


def _prune(root: Path, keep_last: int) -> None:
    """Remove the oldest checkpoints; each is renamed first, so that no incomplete folder has a valid name."""
    best = os.readlink(root / "best") if (root / "best").is_symlink() else ""
    for path in steps(root)[:-keep_last]:
        if path.name != best:
            aside = root / f".old-{path.name}"
            os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)


def _shapes(state: dict[str, Any]) -> dict[str, list[int]]:
    """Shapes of a module's state dict; the keys are the places that `write_tree` returns."""
    return {key: list(value.shape) for key, value in state.items() if isinstance(value, Tensor)}


def _own_hash(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---- finding and loading -------------------------------------------------------------------------------------------


def steps(root: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    found = [path for path in root.iterdir() if STEP_NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def folder_of(root: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return root / f"step-{step:09d}"


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest. Raises DamagedError naming the file that is missing, changed or unexpected."""
    manifest, pieces = examine(folder)
    if pieces:
        raise DamagedError(f"{folder / pieces[0]}: missing, or size or hash does not match")
    return manifest


def examine(folder: Path, pieces: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest, and the names of the pieces that are missing or changed, unless `pieces` is false.

    Raises:
        DamagedError: any other file is missing, changed or unexpected; names it.
    """
    path, damaged = folder / "manifest.json", []
    try:
        check_regular(path)
        text = path.read_text()
        manifest = json.loads(text)
        if problem := problem_of(manifest, Manifest):
            raise DamagedError(f"{path}: {problem}")
        if manifest["sha256"] != _own_hash(manifest) or text != as_json(manifest):
            raise DamagedError(f"{path}: the manifest's hash does not match")
        parts = set(manifest.get("pieces", ()))
        names = {entry.name for entry in folder.iterdir() if entry.name[0] != "."} - {"manifest.json"}
        if odd := sorted((names ^ set(manifest["files"])) - parts):
            raise DamagedError(f"{folder / odd[0]}: {'unexpected' if odd[0] in names else 'missing'}")
        check_folder(folder)
        for name, expected in manifest["files"].items():
            if name in parts and not pieces:
                continue
            if name not in names or fingerprint(folder / name) != list(expected):
                if name not in parts:
                    raise DamagedError(f"{folder / name}: size or hash does not match")
                damaged.append(name)
    except UserError as error:
        raise DamagedError(str(error)) from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path}: {type(error).__name__}: {error}") from error
    return manifest, damaged


def whole(path: Path) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a path such as `checkpoints/best` leads to now, and its manifest; pieces are not looked at.

    Raises:
        UserError: it is damaged, or in another run than the path.
    """
    folder = path.resolve()
    if path.is_symlink():
        check_folder(run_of(path))
    try:
        return folder, examine(folder, pieces=False)[0]
    except DamagedError as error:
        raise UserError(f"{path}: damaged checkpoint ({error}); take another one") from error


def newest(root: Path, set_aside: bool = True) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that verifies, and its manifest; damaged ones are reported and renamed to a dot name.

    A damaged piece is recovered from another checkpoint. If every checkpoint lacks one, the newest that lacks nothing
    else is used without its damaged pieces. With `set_aside` false, nothing is changed, and pieces are not looked at.

    Raises:
        UserError: there is none, or all are damaged; a run never starts from scratch silently.
    """
    damaged: list[tuple[Path, str]] = []
    found: tuple[Path, dict[str, Any]] | None = None
    lacking: tuple[Path, dict[str, Any], list[str]] | None = None
    for folder in reversed(steps(root)):
        try:
            manifest, pieces = examine(folder, pieces=set_aside)
            if pieces:
                pieces = recover(folder, manifest["files"], pieces, _others(root, folder))
            if not pieces:
                found = folder, manifest
                break
            lacking = lacking or (folder, manifest, pieces)
            raise DamagedError(f"{folder / pieces[0]}: missing, or size or hash does not match")
        except DamagedError as error:
            if not folder.exists():  # removed by the run, which goes on
                continue
            damaged.append((folder, str(error)))
            logger.warning("damaged checkpoint, trying the one before: %s", error)
    if found is None and lacking is not None:
        leave_out(lacking[0], lacking[2])
        found = lacking[:2]
    for folder, _ in damaged if set_aside else ():
        if found is None or folder > found[0]:
            aside = folder.with_name(f".damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)  # from an earlier resume
            os.rename(folder, aside)
    if found is not None:
        return found
    if damaged:
        raise UserError(f"{root}: every checkpoint is damaged ({damaged[0][1]}); start a new run in another folder")
    raise UserError(f"{root}: no checkpoint here; expected folders such as step-000001000")


def _others(root: Path, folder: Path) -> list[Path]:
    """The other checkpoints, newest first, and those that were set aside: some of their files may be whole."""
    found = [path for path in root.iterdir() if re.fullmatch(r"(\.damaged-)?step-\d{9,}", path.name)]
    return sorted((path for path in found if path != folder), key=lambda path: path.name, reverse=True)


def latest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """`newest` for a resumed run; None when the run was stopped before its first checkpoint: nothing is lost."""
    return newest(root) if ever_saved(root) else None


def steadily(run: Path, read: Callable[[], T]) -> T:
    """The result of `read`, which reads checkpoints; anew, where the run goes on and has replaced some meanwhile."""
    for more in reversed(range(PATIENCE)):
        before = steps(run / "checkpoints")
        try:
            return read()
        except (UserError, OSError, RuntimeError):
            if not more or steps(run / "checkpoints") == before:
                raise
    raise AssertionError("the last attempt has returned or raised")


def ever_saved(root: Path) -> bool:
    """Whether there is a checkpoint, or was one that is damaged."""
    return bool(steps(root)) or (root.is_dir() and any(root.glob(".damaged-*")))


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Describe the keys whose shapes differ between two {key: shape}, in a few words each."""
    lines = []
    for key in {**expected, **found}:
        have, want = found.get(key), expected.get(key)
        if have != want and not (have is not None and want is not None and list(have) == list(want)):
            there, here = ("absent" if shape is None else str(list(shape)) for shape in (have, want))
            lines.append(f"{key}: {there} there, {here} here")
    return lines


def load_weights(module: torch.nn.Module, name: str, run: Path, args: Any = None) -> str:
    """Load one named model from the newest checkpoint of a run, or from a checkpoint's folder; returns which it took.

    Where the model has averaged weights, these are loaded. `args` has the options of the models here, if any.

    Raises:
        UserError: no run or checkpoint there, no such model in it, or keys and shapes that differ (the first five).
    """
    if not run.exists():
        raise UserError(f"{run}: no such run folder to load model {name!r} from")
    if (run / "manifest.json").exists():
        (folder, manifest), which = whole(run), ""
    else:
        folder, manifest = newest(run_of(run) / "checkpoints", set_aside=False)
        which = ", its newest checkpoint"
    stored = f"model-ema_{name}" if f"model-ema_{name}" in manifest["shapes"] else f"model-{name}"
    shapes = manifest["shapes"].get(stored)
    if shapes is None:
        known = [key.removeprefix("model-") for key in manifest["shapes"] if key.startswith("model-")]
        raise UserError(f"{folder}: no model {name!r}; it holds {', '.join(known)}")
    odd = differences(shapes, _shapes(module.state_dict()))
    if odd:
        table = "task.weight" in shapes and "task.layer.weight" in module.state_dict()
        hint = "; it reads tasks by --model.encoder.language table" if table else _built_with(run_of(run), name, args)
        raise UserError(f"{folder}: model {name!r} does not fit: {'; '.join(odd[:5])}{hint}")
    with one_line(f"{folder}: model {name!r} cannot be loaded"):
        module.load_state_dict(read_tree(folder / f"{stored}.safetensors"))
    return f"{run}: step {manifest['step']}{which}"


def _built_with(run: Path, name: str, args: Any) -> str:
    """The options of a run's model that this run's has otherwise, as the end of a line; empty where none are known."""
    if args is None or not (run / "args.json").exists():
        return ""
    stored, (entry, options) = read_args(run)["args"], args.models[name]
    there = dict(word.partition("=")[::2] for word in stored["model"] or []).get(name, entry)
    if there != entry:
        return f"; it was built with --model {name}={there}"
    words: list[str] = []
    group = "model" if name == next(iter(args.models)) else f"model.{name}"
    here = json.loads(json.dumps(asdict(options), default=str))
    for key, value in ((stored.get("model_options") or {}).get(name) or {}).items():
        if here.get(key) != value:
            words += words_of(f"{group}.{key.replace('_', '-')}", value, type(value))
    return f"; it was built with {' '.join(words)}" if words else ""


def run_of(path: Path) -> Path:
    """The run that a checkpoint's folder, such as `checkpoints/best`, or a `policy/` is of; else the folder itself."""
    for folder in (path, path.resolve()) if not (path / "args.json").exists() else ():
        for run, place in ((folder.parent.parent, folder.parent.name), (folder.parent, folder.name)):
            if place in ("checkpoints", "policy") and (run / "args.json").exists():
                return run
    return path


def initialise(models: torch.nn.ModuleDict, args: Any, inherited: Any) -> None:
    """Load trained weights of all models (`--init-from RUN`) or of single ones (`--load NAME=RUN`), and freeze models.

    Args:
        args: Also with the models' options; one that names a file of weights has had its effect.
        inherited: `Inheritance` of the run: what a new run loads is kept there, and a resumed one loads from there.

    Raises:
        UserError: an unknown model name, or weights that do not fit.
    """
    sources = dict.fromkeys(models, args.init_from) if args.init_from else {}
    for entry in args.load:
        name, equals, run = entry.partition("=")
        if not equals:
            raise UserError(f"--load {entry}: expected NAME=RUN, such as policy=runs/x")
        sources[name] = run
    for name in (*sources, *args.freeze):
        if name not in models:
            raise UserError(f"no model {name!r} to load or freeze; {nearest(name, list(models))}")
    if inherited.has_weights:
        inherited.load_weights(models)
    else:
        taken: dict[str, list[str]] = {}
        inherited.check_forms(dict.fromkeys(run for name, run in sources.items() if name != "encoder"))
        for name, run in sources.items():
            which = steadily(run_of(Path(run)), partial(load_weights, models[name], name, Path(run), args))
            taken.setdefault(which, []).append(name)
        for which, names in taken.items():
            logger.info("weights of %s from %s", ", ".join(names), which)
        inherited.keep_weights({name: models[name] for name in [*sources, *contracts.from_files(args.models)]})
    for name in args.freeze:
        models[name].requires_grad_(False)


# ---- the checkpoints of a run --------------------------------------------------------------------------------------


class Checkpoints:
    """Saves and restores everything in a run that has state: the learner, and parts by name.

    A part has `state_dict()` and `load_state_dict(state)` for state that is the same on all processes, `rank_state()`
    and `load_rank_state(state)` for state of one process, or both. When the number of processes has changed, the state
    of one process is dropped, except for parts with `load_rank_states(states of all former processes)`. The method
    `saved()` of a part, if any, is called once a checkpoint is valid; `rewrite()`, when a piece that it has kept turns
    out to be damaged in all of them.

    Args:
        run: Has the step and the folder.
        args: With `trainer`, `steps`, `seed` and `keep_last`.
        learner: Its models, optimizers, loss and trainer have separate files.
        policy: The policy that acts, which each checkpoint has; None for none.
        parts: name -> part.
    """

    def __init__(self, run: Any, args: Any, learner: Any, policy: Any = None, **parts: Any) -> None:
        self.run, self.args, self.learner, self.policy, self.failed = run, args, learner, policy, 0
        self.parts = {"run": run, "metrics": learner.metrics, **parts}
        self.root = run.path / "checkpoints"

    @shown_as(SAVING)
    def save(self, last: bool = False) -> None:
        """Write a checkpoint of the step, and keep the best one; called by every process.

        Args:
            last: Whether this is the last checkpoint of the run.

        Raises:
            FloatingPointError: a loss or gradient was not finite.
            Exception: the save failed for the third time in a row, or it was the last one; else it is only reported.
        """
        run, learner = self.run, self.learner
        learner.finite.check()
        parallel.broadcast(learner.models, buffers_only=True)
        states = {name: part.state_dict() for name, part in self.parts.items() if hasattr(part, "state_dict")}
        shared = {f"model-{name}": model.state_dict() for name, model in learner.models.items()}
        shared |= {f"optimizer-{name}": optimizer.state_dict() for name, optimizer in learner.optimizers.items()}
        own = contracts.state_of(learner.trainer)
        shared["trainer"] = {"loss": learner.loss.state_dict(), "own": own, "updates": learner.updates, "parts": states}
        config = {name: value for name, value in run.config.items() if name != "run_dir"}
        info = {"trainer": self.args.trainer, "config": config, "best": run.best.record}
        arguments = (info, self.args.keep_last, run.rank, run.best.step, run.settle, self._write_policy)
        try:
            try:
                save(self.root, run.step, shared, self._of_rank(), *arguments)
            except Exception as error:
                if not any(parallel.gather(isinstance(error, DamagedError))):
                    raise
                run.say(f"an earlier checkpoint has lost a piece, which is written again: {error}")
                self._tell("rewrite")
                save(self.root, run.step, shared, self._of_rank(), *arguments)
        except Exception as error:
            self.failed += 1
            run.best.lost(run.step)
            run.say(f"CHECKPOINT AT STEP {run.step} FAILED, {self.failed} in a row, older ones are kept: {error}")
            if self.failed == 3 or last or crashes_pass():  # no run finishes without its last checkpoint
                raise
            return
        self.failed = 0
        self._tell("saved")

    def _write_policy(self, folder: Path) -> None:
        """Write the policy into a checkpoint; the one that it corrects is in the run's folder once."""
        if self.policy is not None:
            weights = self.learner.acting_weights(self.policy.module)
            write_policy(folder, self.policy, self.args, self.run.step, weights)

    def _of_rank(self) -> dict[str, Any]:
        """The state of this process."""
        found = {name: part.rank_state() for name, part in self.parts.items() if hasattr(part, "rank_state")}
        return found | {"random": get_random_state()}

    def _tell(self, name: str) -> None:
        """Call a method of the parts that have it."""
        for part in self.parts.values():
            if hasattr(part, name):
                getattr(part, name)()

    def restore(self) -> None:
        """Resume from the newest valid checkpoint; a run that was stopped before its first one starts at step 0.

        Raises:
            UserError: all checkpoints are damaged, do not fit, or are beyond `--steps`.
        """
        run, steps = self.run, self.args.steps
        states = {"run": None}
        if found := parallel.on_first(run.rank, lambda: latest(self.root)):
            run.step = found[1]["step"]
            with one_line(f"{found[0]} cannot be resumed"):  # its hashes are right, so it was not written by this run
                states = self.load(*found)
                if older := states.pop("held_out", None):
                    states["run"]["best"] = older
                for name, state in states.items():
                    self.parts[name].load_state_dict(state)
                self._load_ranks(*found)
            if run.first:
                tidy(self.root, found[1], self.args.keep_last)
        if run.step > steps:
            raise UserError(f"--steps {steps} is below step {run.step}, which {run.path} has reached")
        parallel.on_first(run.rank, lambda: run.rewind(run.step, counted="run" in states))
        run.say(f"resumed at step {run.step}{kept_length(self.learner.optimizers, self.learner.planned)}")

    def load(self, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
        """Load the learner's state; returns the state of the parts.

        Raises:
            UserError: another format or trainer, or models of other names or shapes (the first five differences).
        """
        name, learner = self.args.trainer, self.learner
        if manifest["format"] != FORMAT or manifest["trainer"] != name:
            found = f"format {manifest['format']}, trainer {manifest['trainer']!r}"
            raise UserError(
                f"{folder}: {found}; expected format {FORMAT}, trainer {name!r}; --init-from takes its weights"
            )
        there = {key.removeprefix("model-"): s for key, s in manifest["shapes"].items() if key.startswith("model-")}
        odd = [f"model {n}: absent there" for n in learner.models if n not in there]
        odd += [f"model {n}: absent here" for n in there if n not in learner.models]
        for n in [n for n in learner.models if n in there]:
            odd += [f"{n}.{line}" for line in differences(there[n], _shapes(learner.models[n].state_dict()))]
        if odd:
            raise UserError(f"{folder} does not fit: {'; '.join(odd[:5])}")
        for n, model in learner.models.items():
            model.load_state_dict(read_tree(folder / f"model-{n}.safetensors"))
        for n, optimizer in learner.optimizers.items():
            optimizer.load_state_dict(read_tree(folder / f"optimizer-{n}.safetensors"))
        state = read_tree(folder / "trainer.safetensors")
        learner.loss.load_state_dict(state["loss"])
        contracts.load_state(learner.trainer, state["own"])
        learner.updates = state["updates"]
        return state["parts"]

    def load_newest(self) -> str:
        """Load the learner's state from the newest checkpoint; returns its name."""
        folder, manifest = newest(self.root, set_aside=False)
        self.load(folder, manifest)
        return folder.name

    def _load_ranks(self, folder: Path, manifest: dict[str, Any]) -> None:
        """Load the state of this process, or of all former ones, and its random generators."""
        rank, before = self.run.rank, manifest["world_size"]
        same = before == parallel.world_size()
        if same:
            states = [_rank_state(folder, rank)]
            set_random_state(states[0]["random"])
        else:
            logger.warning("%s was saved by %d process(es); the random generators are seeded anew", folder, before)
            seed_all(derive_seed(self.args.seed, rank, manifest["step"]))
            states = [_rank_state(folder, r) for r in range(before)]
        for name, part in self.parts.items():
            if same and hasattr(part, "load_rank_state"):
                part.load_rank_state(states[0][name])
            elif hasattr(part, "load_rank_states"):
                part.load_rank_states([state[name] for state in states])


def _rank_state(folder: Path, rank: int) -> dict[str, Any]:
    """The state that one process saved; its parts are read lazily, one by one, and None where they are left out."""
    states = read_tree(folder / f"rank-{rank}.safetensors")
    for state in states.values():
        if isinstance(state, dict) and "parts" in state:
            paths = [folder / f"{name}.safetensors" for name in state["parts"]]
            state["parts"] = (read_tree(path) if path.exists() else None for path in paths)
    return states
