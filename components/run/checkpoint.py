"""Checkpoints that are whole or absent: written beside, hashed, renamed; safetensors and JSON only, no pickle anywhere.

    checkpoints/step-000001000/   <name>.safetensors (shared by all processes), rank-<r>.safetensors, manifest.json
    checkpoints/best              link to the step with the lowest held-out loss

A folder's rename is the moment from which it counts. The newest one whose manifest verifies is the latest. Names that
start with a dot are temporary, set aside or damaged.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..data.random_state import seed_all, set_random_state
from ..errors import UserError, nearest

logger = logging.getLogger(__name__)
FORMAT = 1
STEP_NAME = re.compile(r"step-(\d{9,})")


class DamagedError(Exception):
    """A checkpoint whose files are not what its manifest says."""


@dataclass
class Parts:
    """Large pieces of a process's state that stay as they are: files of their own, which the next checkpoint links."""

    kept: Sequence[str] = ()
    """Names of those that an earlier checkpoint has."""
    new: dict[str, Any] = field(default_factory=dict)
    """Name -> tree of those to write."""


# ---- a tree of tensors and JSON values in one safetensors file -----------------------------------------------------


def flatten(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split a tree into its tensors and JSON that says where they go. Dicts keep int keys, tuples stay tuples.

    Raises:
        TypeError: something that could not be restored without pickle, by its place.
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
    """Write a tree and wait until it is on disk; returns the shapes of its tensors by their places."""
    from safetensors.torch import save_file

    tensors, description = flatten(tree)
    save_file(tensors, path, metadata={"tree": json.dumps(description)})
    sync(path)
    return {place: list(tensor.shape) for place, tensor in tensors.items()}


def read_tree(path: Path) -> Any:
    """Read what `write_tree` wrote; the tensors are copies, so the file may go away."""
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
    """Replace a JSON file at once: a reader sees the old one or the new one."""
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
    """Run a phase of a save on this process; when it fails on any, it fails on all, so that none waits for ever."""
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
    mine: Any,
    info: dict[str, Any],
    keep_last: int,
    rank: int,
    best: int,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Write `root/step-<step>`; called by every process.

    Args:
        shared: name -> state that all processes have alike; rank 0 writes one file each.
        mine: This process's own state; `parts` in it are `Parts`, whose files cost only what is new.
        info: Stands in the manifest ("trainer", "config", ...).
        keep_last: Older checkpoints beyond so many are removed, after this one counts.
        best: Step of the best checkpoint so far, which is linked as `best` and kept; -1 for none.
        before: What must succeed first, such as putting the log on disk.

    Raises:
        Exception: on every process when any could not write; the older checkpoints are untouched then, and what was
            written of this one is removed.
    """
    final = root / f"step-{step:09d}"
    temporary = root / f".tmp-{final.name}"
    shapes: dict[str, dict[str, list[int]]] = {}
    mine = dict(mine)
    parts = mine.pop("parts", Parts())

    def prepare() -> None:
        before()
        if rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            for stale in root.glob(".tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
            for stale in root.glob(".old-*"):
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir()

    def write() -> None:
        names = [*parts.kept, *parts.new]
        write_tree(temporary / f"rank-{rank}.safetensors", mine | ({"parts": names} if names else {}))
        earlier = [*(path for path in reversed(steps(root)) if path < final), final]  # the step may be saved again
        for name in parts.kept:
            link(next(path for path in earlier if (path / f"{name}.safetensors").exists()), temporary, name)
        for name, tree in parts.new.items():
            write_tree(temporary / f"{name}.safetensors", tree)
        if rank == 0:
            for name, tree in shared.items():
                shapes[name] = write_tree(temporary / f"{name}.safetensors", tree)

    def commit() -> None:
        if rank == 0:
            manifest = {"format": FORMAT, "step": step, "world_size": parallel.world_size(), **info, "shapes": shapes}
            known = _known_fingerprints(root)
            files = sorted(temporary.iterdir())
            manifest["files"] = {path.name: known.get(path.stat().st_ino) or _fingerprint(path) for path in files}
            manifest["sha256"] = _own_hash(manifest)
            write_json(temporary / "manifest.json", manifest)
            sync(temporary)
            if final.exists():  # the run was set back behind it: what is there belongs to a future that was undone
                os.rename(final, root / f".old-{final.name}")
            os.rename(temporary, final)
            sync(root)
            link_best(root, best)
            _prune(root, keep_last)

    try:
        for phase in (prepare, write, commit):
            _on_all(phase)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk the room is needed
        raise


def link(folder: Path, to: Path, name: str) -> None:
    """Give a file of an earlier checkpoint a place in another one, as a hard link where the disk has those."""
    source, target = folder / f"{name}.safetensors", to / f"{name}.safetensors"
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        sync(target)


def _known_fingerprints(root: Path) -> dict[int, list[Any]]:
    """Of the newest checkpoint's files, by inode: a linked file need not be read again."""
    for folder in reversed(steps(root)):
        try:
            files = json.loads((folder / "manifest.json").read_text())["files"]
            return {(folder / name).stat().st_ino: entry for name, entry in files.items()}
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def link_best(root: Path, step: int) -> None:
    """Point `best` at a step, at once; remove it when there is no such checkpoint."""
    target = f"step-{step:09d}"
    if not (root / target).exists():
        (root / "best").unlink(missing_ok=True)
    elif not (root / "best").is_symlink() or os.readlink(root / "best") != target:
        (root / ".best-new").unlink(missing_ok=True)
        os.symlink(target, root / ".best-new")
        os.replace(root / ".best-new", root / "best")


def _prune(root: Path, keep_last: int) -> None:
    """Remove the oldest checkpoints, by a rename first, so that none is ever half there under its name."""
    best = os.readlink(root / "best") if (root / "best").is_symlink() else ""
    for path in steps(root)[:-keep_last]:
        if path.name != best:
            aside = root / f".old-{path.name}"
            os.rename(path, aside)
            shutil.rmtree(aside, ignore_errors=True)


def _shapes(state: dict[str, Any]) -> dict[str, list[int]]:
    """Of a module's state dict; the keys are the places that `write_tree` gives."""
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
            raise DamagedError(f"{path}: its own hash does not fit")
        names = {entry.name for entry in folder.iterdir()} - {"manifest.json"}
        if names != set(manifest["files"]):
            odd = sorted(names ^ set(manifest["files"]))[0]
            raise DamagedError(f"{folder / odd}: {'unexpected' if odd in names else 'missing'}")
        for name, expected in manifest["files"].items():
            if _fingerprint(folder / name) != list(expected):
                raise DamagedError(f"{folder / name}: size or hash does not fit")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path}: {type(error).__name__}: {error}") from error
    return manifest


def newest(root: Path, set_aside: bool = True) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that verifies, and its manifest; damaged ones are named and set aside under a dot name.

    Raises:
        UserError: there is none, or all are damaged; a run never starts afresh in silence.
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
                shutil.rmtree(aside, ignore_errors=True)  # of an earlier time that the run came by here
                os.rename(folder, aside)
    if damaged:
        raise UserError(f"{root}: every checkpoint is damaged ({damaged[0]}); start a new run in another folder")
    raise UserError(f"{root}: no checkpoint here; expected folders such as step-000001000")


def latest(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """`newest` for a run that goes on; None when it was stopped before its first checkpoint: nothing is lost."""
    ever_saved = steps(root) or (root.is_dir() and any(root.glob(".damaged-*")))
    return newest(root) if ever_saved else None


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Keys whose shapes differ between two {key: shape}, each in a few words."""
    lines = []
    for key in {**expected, **found}:
        have, want = found.get(key), expected.get(key)
        if have != want and not (have is not None and want is not None and list(have) == list(want)):
            there, here = ("absent" if shape is None else str(list(shape)) for shape in (have, want))
            lines.append(f"{key}: {there} there, {here} here")
    return lines


def load_weights(module: torch.nn.Module, name: str, run: Path) -> None:
    """Load one named model from the newest checkpoint of a run, its averaged weights where there are any.

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
    """Start from trained weights, whole (`--init-from RUN`) or part by part (`--load NAME=RUN`), and freeze parts.

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


def shared_state(
    models: Any, optimizers: dict[str, Any], loss: Any, trainer: Any, progress: dict[str, Any]
) -> dict[str, Any]:
    """What all processes have alike, by the name of its file."""
    state = {f"model-{name}": model.state_dict() for name, model in models.items()}
    state |= {f"optimizer-{name}": optimizer.state_dict() for name, optimizer in optimizers.items()}
    own = trainer.state_dict() if callable(getattr(trainer, "state_dict", None)) else {}
    return state | {"trainer": {"loss": loss.state_dict(), "own": own, "progress": progress}}


def restore(
    folder: Path, manifest: dict[str, Any], models: Any, optimizers: dict[str, Any], loss: Any, trainer: Any, name: str
) -> dict[str, Any]:
    """Load what `shared_state` saved; returns the progress.

    Raises:
        UserError: another format or trainer, or models of other names or shapes (the first five differences).
    """
    if manifest["format"] != FORMAT or manifest["trainer"] != name:
        found = f"format {manifest['format']}, trainer {manifest['trainer']!r}"
        raise UserError(f"{folder}: {found}; expected format {FORMAT}, trainer {name!r}")
    there = {key.removeprefix("model-"): s for key, s in manifest["shapes"].items() if key.startswith("model-")}
    odd = [f"model {n}: absent there" for n in models if n not in there]
    odd += [f"model {n}: absent here" for n in there if n not in models]
    for n in [n for n in models if n in there]:
        odd += [f"{n}.{line}" for line in differences(there[n], _shapes(models[n].state_dict()))]
    if odd:
        raise UserError(f"{folder} does not fit: {'; '.join(odd[:5])}")
    for n, model in models.items():
        model.load_state_dict(read_tree(folder / f"model-{n}.safetensors"))
    for n, optimizer in optimizers.items():
        optimizer.load_state_dict(read_tree(folder / f"optimizer-{n}.safetensors"))
    state = read_tree(folder / "trainer.safetensors")
    loss.load_state_dict(state["loss"])
    if callable(getattr(trainer, "load_state_dict", None)):
        trainer.load_state_dict(state["own"])
    return state["progress"]


def restore_rank(folder: Path, manifest: dict[str, Any], rank: int, seed: int) -> dict[str, Any]:
    """Restore this process's random generators; returns its own state, such as the metrics since the last line.

    With another number of processes than before, the generators start from `seed` instead, which is said, and what is
    returned is {"ranks": the own states of all former processes}.
    """
    if manifest["world_size"] == parallel.world_size():
        state = _own_state(folder, rank)
        set_random_state(state["random"])
        return state
    logger.warning("%s was saved by %d process(es); the random generators start anew", folder, manifest["world_size"])
    seed_all(seed)
    return {"ranks": [_own_state(folder, r) for r in range(manifest["world_size"])]}


def _own_state(folder: Path, rank: int) -> dict[str, Any]:
    """What a process saved; its parts are read one by one, as they are asked for."""
    state = read_tree(folder / f"rank-{rank}.safetensors")
    if "parts" in state:
        state["parts"] = (read_tree(folder / f"{name}.safetensors") for name in state["parts"])
    return state
