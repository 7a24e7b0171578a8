"""Versions, commit and machine, on which a run's numbers depend besides its arguments."""

import hashlib
import inspect
import platform
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "accelerate",
    "wandb",
    "safetensors",
    "tyro",
    "numpy",
    "gymnasium",
    "metaworld",
    "mujoco",
    "pyarrow",
)


def environment(components: Iterable[type]) -> dict[str, Any]:
    """Versions, commit and machine, as `args.json` records them. No environment variables, so no secrets."""
    return {
        "component_versions": {f"{c.__module__}.{c.__qualname__}": _source_hash(c) for c in components},
        "packages": dict(_packages()),
        "python": platform.python_version(),
        "git_commit": _git_commit(),
        "machine": {
            "cpu": _cpu_name(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "matmul": torch.get_float32_matmul_precision(),
            "platform": platform.platform(),
        },
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _source_hash(component: type) -> str | None:
    """Version of a component: the first digits of the SHA-256 of its source file."""
    try:
        file = inspect.getsourcefile(component)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else None
    except (OSError, TypeError):
        return None


@lru_cache(maxsize=1)  # the versions that this process has loaded
def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@lru_cache(maxsize=1)
def _git_commit() -> str | None:
    """Of the repository that has this file; one that only lies around an installed copy is somebody else's."""
    git = ["git", "-C", str(Path(__file__).parent)]
    known = [*git, "ls-files", "--error-unmatch", Path(__file__).name]
    command = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        if subprocess.run(known, capture_output=True, timeout=5).returncode:
            return None
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
