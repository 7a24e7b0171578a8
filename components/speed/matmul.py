"""The fastest matrix product of this CPU that still has float32 precision.

Torch's default on x86 is MKL, which may reach only half the speed of oneDNN on processors that are not Intel's. Torch's
setting "medium" selects oneDNN but, where the hardware supports it (AMX, CUDA), also a lower precision; so the probe
measures the error as well as the time.
"""

import time

import torch

from ..parallel import from_first

SIZE, WARM_UP, TIMES = 256, 5, 30
WORST = 1e-3  # largest error; that of a float32 product of this size is about 1e-5, of a bfloat16 one 1e-1
WORTH = 1.1  # speed-up below which the default is kept


def choose(asked: str, before: str | None, device: torch.device) -> str:
    """Set torch's float32 matrix products as `asked` ("default" or "auto"); returns a line for the screen, or "".

    Args:
        before: Setting of the resumed run, which is kept, since other kernels change the last bits; None for a new run.
    """
    if asked == "default":
        return ""
    if device.type != "cpu":
        return f"matrix products: unchanged on {device.type}"
    if before is not None:
        torch.set_float32_matmul_precision(before)
        return f"matrix products: {before!r}, as the run had begun"
    default = torch.get_float32_matmul_precision()
    rates: dict[str, float] = {}
    errors: dict[str, float] = {}
    for setting in ("highest", "medium"):
        torch.set_float32_matmul_precision(setting)
        rates[setting], errors[setting] = probe()
    faster = rates["medium"] > WORTH * rates["highest"] and errors["medium"] < WORST
    chosen = from_first("medium" if faster else default)  # one for all processes
    torch.set_float32_matmul_precision(chosen)
    found = ", ".join(f"{name} {rates[name]:.0f} GFLOP/s with error {errors[name]:.0e}" for name in rates)
    return f"matrix products: {chosen!r} ({found})"


def probe() -> tuple[float, float]:
    """GFLOP/s of a product of two standard normal matrices `[SIZE, SIZE]`, and its largest absolute error."""
    a, b = torch.randn(2, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y = a.float(), b.float()
    error = float((x @ y - x.double() @ y.double()).abs().max())
    seconds = []
    for _ in range(WARM_UP + TIMES):
        began = time.perf_counter()
        x @ y
        seconds.append(time.perf_counter() - began)
    return 2 * SIZE**3 / sorted(seconds[WARM_UP:])[TIMES // 2] / 1e9, error
