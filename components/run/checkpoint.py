"""Checkpoints that are complete or absent, with hashes; safetensors and JSON only, no pickle.

    checkpoints/step-000001000/   <name>.safetensors (shared by all processes), rank-<r>.safetensors, manifest.json
    checkpoints/best              link to the step with the lowest held-out loss

A checkpoint is written to a temporary folder and becomes valid when that folder is renamed into place. The latest
checkpoint is the newest one whose manifest verifies. Names that start with a dot are temporary, stale or damaged.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import contracts, parallel
from ..data.random_state import derive_seed, get_random_state, seed_all, set_random_state
from ..errors import UserError, nearest
from ..optimizers import kept_length

logger = logging.getLogger(__name__)
FORMAT = 2
STEP_NAME = re.compile(r"step-(\d{9,})")


class DamagedError(Exception):
    """A checkpoint whose files do not match its manifest."""


@dataclass
class Parts:
    """Large pieces of a process's state that never change: one file each, which the next checkpoint links."""

    kept: Sequence[str] = ()
    """Names of the pieces that an earlier checkpoint has."""
    new: dict[str, Any] = field(default_factory=dict)
    """Name -> tree of the pieces to write."""


# ---- a tree of tensors and JSON values in one safetensors file -----------------------------------------------------


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a tree into its tensors and JSON that records their places. Dicts keep int keys, tuples stay tuples.

    Raises:
        TypeError: a value that could not be restored without pickle; names its place.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, place: str) -> Any:
        if isinstance(node, Tensor):
            tensors[place] = node.detach().cpu().contiguous().clone()  # shared memory is stored once for each name
            return {"tensor": place}
        if isinstance(node, dict):
            if not all(isinstance(key, (str, int)) for key in node):
                raise TypeError(f"{place or 'state'}: keys must be str or int")
            return {
                "dict": [[key, walk(value, f"{place}/{key}" if place else str(key))] for key, value in node.items()]
            }
        if isinstance(node, (list, tuple)):
            items = [walk(value, f"{place}/{i}" if place else str(i)) for i, value in enumerate(node)]
            return {"tuple": items} if isinstance(node, tuple) else items
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"{place or 'state'}: {type(node).__name__} is neither tensor nor JSON value")

    return tensors, walk(tree, "")


def unflatten(tensors: dict[str, Tensor], tree: Any) -> Any:
    """The inverse of `flatten`."""
    if isinstance(tree, list):
        return [unflatten(tensors, item) for item in tree]
    if isinstance(tree, dict):
        ((kind, value),) = tree.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "tuple":
            return tuple(unflatten(tensors, item) for item in value)
        return {key: unflatten(tensors, item) for key, item in value}
    return tree


def write_tree(path: Path, tree: Any) -> dict[str, list[int]]:
    """Write a tree and fsync it; returns the shapes of its tensors by their places."""
    from safetensors.torch import save_file

    tensors, description = flatten(tree)
    save_file(tensors, path, metadata={"tree": json.dumps(description)})
    sync(path)
    return {place: list(tensor.shape) for place, tensor in tensors.items()}


def read_tree(path: Path) -> Any:
    """Read a tree that `write_tree` wrote; the tensors are copies, so the file may be removed."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return unflatten(tensors, json.loads(file.metadata()["tree"]))


def sync(path: Path) -> None:
    """fsync a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _as_json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically: a reader finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}-new")
    try:
        with open(temporary, "w") as file:
            file.write(_as_json(value))
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


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
) -> None:
    """Write `root/step-<step>`; called by every process.

    Args:
        shared: name -> state that is the same on all processes; rank 0 writes one file each.
        of_rank: State of this process; of `Parts` under the key `parts` of an entry, only the new ones are written.
        info: Further entries of the manifest ("trainer", "config", ...).
        keep_last: Number of checkpoints to keep; older ones are removed once this one is valid.
        best: Step of the best checkpoint so far, which is linked as `best` and kept; -1 for none.
        before: Must succeed first, such as an fsync of the log.

    Raises:
        Exception: on every process, when any process could not write. The older checkpoints are then untouched, and
            the files of this one are removed.
    """
    writer = _Writer(root, step, rank)
    try:
        _on_all(before)
        _on_all(writer.prepare)
        _on_all(partial(writer.write, shared, of_rank))
        _on_all(partial(writer.commit, info, keep_last, best))
    except Exception:
        shutil.rmtree(writer.temporary, ignore_errors=True)  # frees the space on a full disk
        raise


class _Writer:
    """The phases of a save on one process; each begins once all processes have finished the one before."""

    def __init__(self, root: Path, step: int, rank: int) -> None:
        self.root, self.step, self.rank = root, step, rank
        self.final = root / f"step-{step:09d}"
        self.temporary = root / f".tmp-{self.final.name}"
        self.shapes: dict[str, dict[str, list[int]]] = {}

    def prepare(self) -> None:
        """Rank 0 removes the remains of earlier saves, and makes the temporary folder."""
        if self.rank == 0:
            self.root.mkdir(parents=True, exist_ok=True)
            for stale in [*self.root.glob(".tmp-*"), *self.root.glob(".old-*")]:
                shutil.rmtree(stale, ignore_errors=True)
            self.temporary.mkdir()

    def write(self, shared: dict[str, Any], of_rank: dict[str, Any]) -> None:
        """Write this process's file and parts; rank 0 also writes the shared state."""
        of_rank = dict(of_rank)
        earlier = [*(path for path in reversed(steps(self.root)) if path < self.final), self.final]  # or itself
        for key, state in of_rank.items():
            if isinstance(state, dict) and isinstance(parts := state.get("parts"), Parts):
                of_rank[key] = state | {"parts": [*parts.kept, *parts.new]}
                for name in parts.kept:
                    source = next(path for path in earlier if (path / f"{name}.safetensors").exists())
                    link(source, self.temporary, name)
                for name, tree in parts.new.items():
                    write_tree(self.temporary / f"{name}.safetensors", tree)
        write_tree(self.temporary / f"rank-{self.rank}.safetensors", of_rank)
        if self.rank == 0:
            for name, tree in shared.items():
                self.shapes[name] = write_tree(self.temporary / f"{name}.safetensors", tree)

    def commit(self, info: dict[str, Any], keep_last: int, best: int) -> None:
        """Rank 0 writes the manifest and renames the folder into place, which makes the checkpoint valid."""
        if self.rank != 0:
            return
        manifest = {"format": FORMAT, "step": self.step, "world_size": parallel.world_size(), **info}
        manifest["shapes"] = self.shapes
        known = _known_fingerprints(self.root)
        files = sorted(self.temporary.iterdir())
        manifest["files"] = {path.name: known.get(path.stat().st_ino) or _fingerprint(path) for path in files}
        manifest["sha256"] = _own_hash(manifest)
        write_json(self.temporary / "manifest.json", manifest)
        sync(self.temporary)
        if self.final.exists():  # stale: the run was resumed from an earlier step
            os.rename(self.final, self.root / f".old-{self.final.name}")
        os.rename(self.temporary, self.final)
        sync(self.root)
        link_best(self.root, best)
        _prune(self.root, keep_last)


def link(folder: Path, to: Path, name: str) -> None:
    """Hard-link a file of an earlier checkpoint into another one; copy it where the disk has no hard links."""
    source, target = folder / f"{name}.safetensors", to / f"{name}.safetensors"
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        sync(target)


def _known_fingerprints(root: Path) -> dict[int, list[Any]]:
    """Inode -> fingerprint of the newest checkpoint's files, so that a linked file is not read again."""
    for folder in reversed(steps(root)):
        try:
            files = json.loads((folder / "manifest.json").read_text())["files"]
            return {(folder / name).stat().st_ino: entry for name, entry in files.items()}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def link_best(root: Path, step: int) -> None:
    """Point `best` at a step atomically; remove it when there is no such checkpoint."""
    target = f"step-{step:09d}"
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


def _fingerprint(path: Path) -> list[Any]:
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _own_hash(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


# ---- finding and loading -------------------------------------------------------------------------------------------


def steps(root: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    found = [path for path in root.iterdir() if STEP_NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def verify(folder: Path) -> dict[str, Any]:
    """Return the manifest. Raises DamagedError naming the file that is missing, changed or unexpected."""
    path = folder / "manifest.json"
    try:
        text = path.read_text()
        manifest = json.loads(text)
        if manifest["sha256"] != _own_hash(manifest) or text != _as_json(manifest):
            raise DamagedError(f"{path}: the manifest's hash does not match")
        names = {entry.name for entry in folder.iterdir()} - {"manifest.json"}
        if names != set(manifest["files"]):
            odd = sorted(names ^ set(manifest["files"]))[0]
            raise DamagedError(f"{folder / odd}: {'unexpected' if odd in names else 'missing'}")
        for name, expected in manifest["files"].items():
            if _fingerprint(folder / name) != list(expected):
                raise DamagedError(f"{folder / name}: size or hash does not match")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: {type(error).__name__}: {error}") from error
    return manifest


def newest(root: Path, set_aside: bool = True) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that verifies, and its manifest; damaged ones are reported and renamed to a dot name.

    Raises:
        UserError: there is none, or all are damaged; a run never starts from scratch silently.
    """
    damaged = []
    for folder in reversed(steps(root)):
        try:
            return folder, verify(folder)
        except DamagedError as error:
            damaged.append(str(error))
            logger.warning("damaged checkpoint, trying the one before: %s", error)
            if set_aside:
                aside = folder.with_name(f".damaged-{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)  # from an earlier resume
                os.rename(folder, aside)
    if damaged:
        raise UserError(f"{root}: every checkpoint is damaged ({damaged[0]}); start a new run in another folder")
    raise UserError(f"{root}: no checkpoint here; expected folders such as step-000001000")


def latest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """`newest` for a resumed run; None when the run was stopped before its first checkpoint: nothing is lost."""
    ever_saved = steps(root) or (root.is_dir() and any(root.glob(".damaged-*")))
    return newest(root) if ever_saved else None


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Describe the keys whose shapes differ between two {key: shape}, in a few words each."""
    lines = []
    for key in {**expected, **found}:
        have, want = found.get(key), expected.get(key)
        if have != want and not (have is not None and want is not None and list(have) == list(want)):
            there, here = ("absent" if shape is None else str(list(shape)) for shape in (have, want))
            lines.append(f"{key}: {there} there, {here} here")
    return lines


def load_weights(module: torch.nn.Module, name: str, run: Path) -> None:
    """Load one named model from the newest checkpoint of a run; its averaged weights if there are any.

    Raises:
        UserError: no run or checkpoint there, no such model in it, or keys and shapes that differ (the first five).
    """
    if not run.exists():
        raise UserError(f"{run}: no such run folder to load model {name!r} from")
    folder, manifest = newest(run / "checkpoints", set_aside=False)
    stored = f"model-ema_{name}" if f"model-ema_{name}" in manifest["shapes"] else f"model-{name}"
    shapes = manifest["shapes"].get(stored)
    if shapes is None:
        known = [key.removeprefix("model-") for key in manifest["shapes"] if key.startswith("model-")]
        raise UserError(f"{folder}: no model {name!r}; it holds {', '.join(known)}")
    odd = differences(shapes, _shapes(module.state_dict()))
    if odd:
        raise UserError(f"{folder}: model {name!r} does not fit: {'; '.join(odd[:5])}")
    module.load_state_dict(read_tree(folder / f"{stored}.safetensors"))


def initialise(models: torch.nn.ModuleDict, init_from: str, load: Sequence[str], freeze: Sequence[str]) -> None:
    """Load trained weights of all models (`--init-from RUN`) or of single ones (`--load NAME=RUN`), and freeze models.

    Raises:
        UserError: an unknown model name, or weights that do not fit.
    """
    sources = dict.fromkeys(models, init_from) if init_from else {}
    for entry in load:
        name, equals, run = entry.partition("=")
        if not equals:
            raise UserError(f"--load {entry}: expected NAME=RUN, such as policy=runs/x")
        sources[name] = run
    for name in (*sources, *freeze):
        if name not in models:
            raise UserError(f"no model {name!r} to load or freeze; {nearest(name, list(models))}")
    for name, run in sources.items():
        load_weights(models[name], name, Path(run))
    for name in freeze:
        models[name].requires_grad_(False)


# ---- the checkpoints of a run --------------------------------------------------------------------------------------


class Checkpoints:
    """Saves and restores everything in a run that has state: the learner, and parts by name.

    A part has `state_dict()` and `load_state_dict(state)` for state that is the same on all processes, `rank_state()`
    and `load_rank_state(state)` for state of one process, or both. When the number of processes has changed, the state
    of one process is dropped, except for parts with `load_rank_states(states of all former processes)`. The method
    `saved()` of a part, if any, is called once a checkpoint is valid.

    Args:
        run: Has the step and the folder.
        args: With `trainer`, `steps`, `seed` and `keep_last`.
        learner: Its models, optimizers, loss and trainer have separate files.
        parts: name -> part.
    """

    def __init__(self, run: Any, args: Any, learner: Any, **parts: Any) -> None:
        self.run, self.args, self.learner, self.failed = run, args, learner, 0
        self.parts = {"run": run, "metrics": learner.metrics, **parts}
        self.root = run.path / "checkpoints"

    def save(self, best: int = -1, last: bool = False) -> None:
        """Write a checkpoint of the step; called by every process.

        Args:
            best: Step of the best checkpoint, which is kept; -1 for none.
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
        of_rank = {name: part.rank_state() for name, part in self.parts.items() if hasattr(part, "rank_state")}
        of_rank["random"] = get_random_state()
        config = {name: value for name, value in run.config.items() if name != "run_dir"}
        info = {"trainer": self.args.trainer, "config": config}
        try:
            save(self.root, run.step, shared, of_rank, info, self.args.keep_last, run.rank, best, run.settle)
        except Exception as error:
            self.failed += 1
            run.say(f"CHECKPOINT AT STEP {run.step} FAILED, {self.failed} in a row, older ones are kept: {error}")
            if self.failed == 3 or last:  # no run finishes without its last checkpoint
                raise
            return
        self.failed = 0
        run.saved()
        for part in self.parts.values():
            if hasattr(part, "saved"):
                part.saved()

    def restore(self) -> None:
        """Resume from the newest valid checkpoint; a run that was stopped before its first one starts at step 0.

        Raises:
            UserError: all checkpoints are damaged, do not fit, or are beyond `--steps`.
        """
        run, steps = self.run, self.args.steps
        if found := parallel.on_first(run.rank, lambda: latest(self.root)):
            run.step = found[1]["step"]
            for name, state in self.load(*found).items():
                self.parts[name].load_state_dict(state)
            self._load_ranks(*found)
        if run.step > steps:
            raise UserError(f"--steps {steps} is below step {run.step}, which {run.path} has reached")
        run.rewind(run.step)
        run.say(f"resumed at step {run.step}{kept_length(self.learner.optimizers, steps)}")

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
    """The state that one process saved; its parts are read lazily, one by one."""
    states = read_tree(folder / f"rank-{rank}.safetensors")
    for state in states.values():
        if isinstance(state, dict) and "parts" in state:
            state["parts"] = (read_tree(folder / f"{name}.safetensors") for name in state["parts"])
    return states
