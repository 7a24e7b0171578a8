"""Progress of a run: a bar on a terminal, plain lines otherwise."""

import shutil
import sys
import time
from typing import Any

from ..errors import plain


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class Progress:
    """A bar on a terminal, plain lines otherwise; silent on all processes but the first.

    Args:
        total: Steps of the run.
        shown: Whether this process shows anything.
    """

    def __init__(self, total: int, start: int, shown: bool) -> None:
        self.total, self.start, self.shown, self.began = total, start, shown, time.monotonic()
        self.bar: Any = None
        if shown and sys.stderr.isatty() and shutil.get_terminal_size((0, 0)).columns >= 40:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def update(self, step: int, metrics: dict[str, Any]) -> None:
        """Show the losses, the speed and the time left."""
        losses = "  ".join(
            f"{k.removeprefix('train/')} {v:.4g}" for k, v in metrics.items() if "loss" in k and v is not None
        )
        of = "env_steps" if "env_steps_per_s" in metrics else "samples"
        shown = "  ".join(filter(None, (losses, f"{metrics[f'{of}_per_s']:.0f} {of}/s")))
        if self.bar is not None:
            self.bar.n = step
            self.bar.set_postfix_str(shown)
        elif self.shown:
            left = (time.monotonic() - self.began) / max(step - self.start, 1) * (self.total - step)
            print(f"step {step}/{self.total}  {shown}  {clock(left)} left", flush=True)

    def say(self, text: str) -> None:
        """Print a line, above the bar."""
        if self.bar is not None:
            self.bar.write(plain(text))
        elif self.shown:
            print(plain(text), flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
