"""Files of tensors, in the format of safetensors."""

import contextlib
import stat
from pathlib import Path

from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a file of tensors, readable by whom the umask lets.

    safetensors renames a temporary file that only its owner may read, so the mode is that of a file made before.
    """
    from safetensors.torch import save_file

    path.unlink(missing_ok=True)
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(tensors, path, metadata=metadata)
    with contextlib.suppress(OSError):  # a file system without modes
        path.chmod(mode)
