"""The policies of a run, also before its end: in each checkpoint, and the final one in `policy/`.

policy = load_policy("runs/x")                          # the newest, of a running or stopped run, too
policy = load_policy("runs/x", which="best")            # or a step, such as which=2000
policy = load_policy("runs/x/checkpoints/best")         # a checkpoint's folder is a policy's folder
"""

import logging
import operator
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..acting.device import usable
from ..acting.policy_folder import copy_policy, describe, load_folder
from ..errors import UserError
from ..records import check_folder
from . import hub
from .best import best_of, described
from .checkpoint import examine, folder_of, run_of, steadily, step_of, steps, whole
from .pieces import DamagedError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chosen:
    """A policy of a run."""

    folder: Path
    """Where its `policy.json` is."""
    step: int | None
    """Steps that it learnt for; None for a policy of an older version."""
    why: str
    """Which one it is, in a few words; "" where nothing has to be said."""

    def __str__(self) -> str:
        step = "the last step" if self.step is None else f"step {self.step}"
        return f"policy of {step}" + (f" ({self.why})" if self.why else "")


def load_policy(folder: str | Path, which: str | int = "last", device: Any = "cpu", **settings: Any) -> Any:
    """Load a policy from a run folder, its `policy/` folder alone, a checkpoint's folder, or the hub.

        policy = load_policy("runs/x"); policy.reset(); action = policy.act({"observation.state": array})
        policy = load_policy("runs/x", action_steps=4, sampling_steps=20)  # other settings as in its run
        policy = load_policy("hf://USER/NAME")  # from the Hugging Face hub; @REVISION may follow
        policy = load_policy("runs/x", device="cuda"); chunk = policy.plan({"observation.state": array})  # [Ta, Da]

    It is logged which one is taken, unless that is the final one or the one of the named step, and whether it is late.

    Args:
        which: Of a run: "last", which is the newest while it goes on or after it was stopped; "best", by success rate,
            else return, error of predicted actions, or held-out loss; or a step that has a checkpoint.
        device: Where it computes, such as "cuda"; `policy.to(device)` moves it later.
        settings: Fields of `Inference` that replace the saved ones.

    Raises:
        UserError: no policy there, a plugin to import first, weights that do not match, a statistic that is missing or
            has the wrong width, invalid settings, or no such device; each by name.
    """
    device = usable(device)
    policy, chosen = taken(hub.downloaded(folder) if hub.is_address(folder) else folder, which, **settings)
    if chosen.why not in ("", "last"):
        logger.warning("%s: %s", folder, chosen)
    if (steps := policy.settings.delay) and "delay" not in settings:
        words = "%s: act() simulates the delay of %d steps with which it was evaluated; delay=0 leaves it out"
        logger.warning(words, folder, steps)
    return policy.to(device)


def taken(folder: str | Path, which: str | int = "last", **settings: Any) -> tuple[Any, Chosen]:
    """The policy that `load_policy` loads, and which one it is."""

    def load() -> tuple[Any, Chosen]:
        chosen = _choose(Path(folder), which)
        return load_folder(chosen.folder, **settings), chosen

    return steadily(run_of(Path(folder)), load)


def choose(folder: str | Path, which: str | int = "last") -> Chosen:
    """Which policy `load_policy` loads.

    Raises:
        UserError: there is none; one line that names those that there are.
    """
    return steadily(run_of(Path(folder)), lambda: _choose(Path(folder), which))


def copy_chosen(folder: str | Path, to: Path) -> None:
    """Copy the policy that `load_policy` loads to a new folder. Raises UserError: there is none."""
    folder = hub.downloaded(folder) if hub.is_address(folder) else folder

    def copy() -> None:
        shutil.rmtree(to, ignore_errors=True)
        copy_policy(_choose(Path(folder), "last").folder, to)

    steadily(run_of(Path(folder)), copy)


def _choose(path: Path, which: str | int) -> Chosen:
    asked = _asked(which)
    if (path / "manifest.json").exists() or ((path / "policy.json").exists() and not (path / "policy").is_dir()):
        if asked != "last":
            raise UserError(f"{path} holds one policy; which={which!r} chooses among those of a run's folder")
        return _only(path)
    check_folder(path)
    final = _final(path)
    if asked == "last":
        return _last(path, final)
    best = best_of(path) if asked == "best" else None
    if asked == "best" and best is None:
        last = _last(path, final)
        return Chosen(last.folder, last.step, "the last: nothing is recorded by which one could be the best")
    step, why = (best["step"], f"best: {described(best)}") if best else (int(asked), "")
    saved, problem = folder_of(path / "checkpoints", step), ""
    if saved.exists():
        try:
            if "policy.json" in examine(saved, pieces=False)[0]["files"]:
                return Chosen(saved, step, why)
            problem = f", as {_without()}"
        except DamagedError as error:
            problem = f" that is whole ({error})"
    if final and final.step == step:
        return Chosen(final.folder, final.step, why)
    raise UserError(f"{path}: no policy of step {step}{f' ({why})' if why else ''}{problem}; {_known(path, final)}")


def _asked(which: str | int) -> str | int:
    if which in ("best", "last"):
        return which
    try:
        return int(which) if isinstance(which, str) else operator.index(which)
    except (TypeError, ValueError):
        raise UserError(f"which={which!r}: expected 'best', 'last' or a step, such as 2000") from None


def _only(path: Path) -> Chosen:
    """The policy of a checkpoint's folder, or of a policy's."""
    if not (path / "manifest.json").exists():
        return Chosen(path, describe(path)[1].get("step"), "")
    folder, manifest = whole(path)
    if "policy.json" not in manifest["files"]:
        raise UserError(f"{path}: no policy here: {_without()}")
    best = best_of(run_of(path))
    why = f"best: {described(best)}" if best and best["step"] == manifest["step"] else ""
    return Chosen(folder, manifest["step"], why)


def _final(run: Path) -> Chosen | None:
    """The policy that a run wrote when it ended, if it did."""
    if not (run / "policy" / "policy.json").exists():
        return None
    return Chosen(run / "policy", describe(run)[1].get("step"), "last")


def _last(run: Path, final: Chosen | None) -> Chosen:
    """The final policy or, of a run that goes on or was stopped, that of the newest checkpoint which is whole."""
    done, damaged, without = -1 if final is None or final.step is None else final.step, "", False
    for folder in reversed(steps(run / "checkpoints")):
        if step_of(folder) <= done:
            break
        try:
            manifest, _ = examine(folder, pieces=False)
        except DamagedError as error:
            damaged = damaged or str(error)
            if folder.exists():  # else the run has removed it
                logger.warning("damaged checkpoint, trying the one before: %s", error)
            continue
        if "policy.json" in manifest["files"]:
            return Chosen(folder, manifest["step"], "the newest checkpoint; the run has not finished")
        without = True
    if final:
        return final
    if damaged:
        raise UserError(f"{run}: every checkpoint with a policy is damaged ({damaged})")
    if without:
        raise UserError(f"{run}: no policy here: {_without()}")
    begun = (run / "args.json").exists()
    when = "the run has not saved a checkpoint yet" if begun else "a run writes it with each checkpoint, and at its end"
    if not run.exists():
        when = "no such folder" + (f"; of the hub it would be hf://{run}" if len(run.parts) == 2 else "")
    raise UserError(f"{run}: no policy here (policy/policy.json); {when}")


def _without() -> str:
    return "its trainer has none, or an older version wrote the checkpoint, which --resume goes on from"


def _known(run: Path, final: Chosen | None) -> str:
    """The steps with a policy, in words."""
    known = {step_of(folder) for folder in steps(run / "checkpoints") if (folder / "policy.json").exists()}
    known |= {final.step} if final and final.step is not None else set()
    best = best_of(run)
    texts = [f"{step} (best)" if best and best["step"] == step else str(step) for step in sorted(known)]
    return f"there are those of steps {', '.join(texts)}" if texts else "there is none"
