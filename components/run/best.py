"""Which step of a run is the best, by what it measured: evaluations, or else the held-out loss.

A measure is compared with others of the same metric only. `METRICS` says which metric counts where a run has several:
one of the first evaluation that succeeds replaces all held-out losses. Of equal success rates the one with the higher
return is better; what is equal in that, too, leaves the earlier step the best.
"""

import math
from pathlib import Path
from typing import Any, cast

from ..acting.evaluation import SCORES, score_of
from ..errors import plain
from ..intervals import number
from ..records import BestRecord
from .checkpoint import manifest_of, steps

LOSS = "val/loss"
METRICS = [*(name for name, _ in SCORES), LOSS]  # what counts most is first
NAMES = {"success_rate": "success rate", "return_mean": "return", "action_error": "action error", LOSS: "held-out loss"}


class Best:
    """The best step so far; the same on all processes.

    Attributes:
        record: {"step", "metric", "value"}; None before the first measure.
    """

    def __init__(self) -> None:
        self.record: BestRecord | None = None
        self.rank: tuple[float, ...] = ()  # of the best, larger is better
        self.before: tuple[BestRecord | None, tuple[float, ...]] = (None, ())
        self.measured_at = -1  # in this process: what a resumed run has not measured again is saved already

    def evaluated(self, result: dict[str, Any]) -> None:
        """Take an evaluation: a line of `eval.jsonl`."""
        if (score := score_of(result)) is not None:
            metric, value, sign = score
            further = result.get("return_mean") if metric == "success_rate" else None
            self._take(result["step"], metric, value, (sign * value, 0.0 if further is None else float(further)))

    def held_out(self, step: int, losses: dict[str, float]) -> dict[str, float]:
        """Take held-out losses, which count while no evaluation has succeeded; returns them."""
        if LOSS in losses:
            self._take(step, LOSS, losses[LOSS], (-losses[LOSS],))
        return losses

    def _take(self, step: int, metric: str, value: float, further: tuple[float, ...]) -> None:
        rank = (-float(METRICS.index(metric)), *further)
        if not all(map(math.isfinite, rank)):
            return
        self.measured_at = step
        if self.record is None or rank > self.rank:
            self.before = (self.record, self.rank)
            self.record, self.rank = {"step": step, "metric": metric, "value": float(value)}, rank

    @property
    def step(self) -> int:
        """The best step; -1 for none."""
        return -1 if self.record is None else self.record["step"]

    def improved(self, step: int) -> bool:
        """Whether this step was measured just now, and is the best so far: it is to be saved."""
        return self.measured_at == self.step == step

    def lost(self, step: int) -> None:
        """Go back to the best before, if the checkpoint of this step could not be written."""
        if self.improved(step):
            self.record, self.rank = self.before

    def state_dict(self) -> dict[str, Any]:
        """The best step, what was measured there, and how it compares."""
        return {"record": self.record, "rank": list(self.rank)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict`, or that of an older version, which compared held-out losses alone."""
        if "record" in state:
            self.record, self.rank = state["record"], tuple(state["rank"])
        elif state.get("best_step", -1) >= 0:
            self.held_out(state["best_step"], {LOSS: state["best_loss"]})
            self.measured_at = -1


def best_of(run: Path) -> BestRecord | None:
    """The best step of a run as its newest checkpoint has it: {"step", "metric", "value"}; None where none is known."""
    for folder in reversed(steps(run / "checkpoints")):
        if manifest := manifest_of(folder):
            best = manifest.get("best")
            return cast(BestRecord, best) if isinstance(best, dict) else None  # in an older version, the step alone
    return None


def described(best: BestRecord) -> str:
    """A best step's measure in a few words: "success rate 0.96"."""
    return f"{NAMES.get(best['metric'], plain(best['metric']))} {number(best['value'])}"
