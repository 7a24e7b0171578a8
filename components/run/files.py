"""Files that are whole or absent: trees of tensors and JSON values without pickle, JSON, temporary names."""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.tensor_files import save_tensors


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
    tensors, description = flatten(tree)
    save_tensors(tensors, path, {"tree": json.dumps(description)})
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


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically: a reader finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}-new")
    try:
        with open(temporary, "w") as file:
            file.write(as_json(value))
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def fingerprint(path: Path) -> list[Any]:
    """Size and SHA-256 of a file, as a manifest has them."""
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def beside(path: Path) -> Path:
    """A temporary name for what will be renamed to `path`; removes what killed processes have left under such names.

    The name has the machine and the process, so that nothing is removed that another one is still writing.
    """
    machine = re.sub(r"\W+", "-", socket.gethostname())
    for stale in path.parent.glob(f".{glob.escape(path.name)}-{machine}-*"):
        pid = stale.name.rpartition("-")[2]
        if pid.isdigit() and not _alive(int(pid)):
            remove(stale)
    return path.with_name(f".{path.name}-{machine}-{os.getpid()}")


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _alive(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True
