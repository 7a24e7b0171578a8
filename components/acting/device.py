"""The device on which a policy computes."""

from typing import Any

import torch

from ..errors import UserError, first_line, plain


def usable(device: Any) -> torch.device:
    """A device by its name, on which a tensor can be made. Raises UserError: in one line, what there is."""
    try:
        if not isinstance(device, str | int | torch.device):
            raise TypeError('expected a name such as "cuda:0"')
        found = torch.device(device)
        if found.type == "meta":
            raise RuntimeError("it has no memory")
        torch.zeros(1, device=found)
    except Exception as error:  # of many types: a name that is none, a build without it, no driver, no such number
        kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if mps_is_there() else [])]
        reason = plain(first_line(error))[:120]
        raise UserError(f"device {device!r} cannot be used here ({reason}); there is: {', '.join(kinds)}") from error
    return found


def mps_is_there() -> bool:
    """Whether this machine has Apple's graphics processor."""
    return torch.backends.mps.is_available()
