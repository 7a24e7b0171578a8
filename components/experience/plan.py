"""What an online run is asked for, before it is built: options that fit its trainer, scale of rewards, updates."""

from pathlib import Path
from typing import Any

from ..contracts import Corrections, Demonstrations, Goals, Request, Rollouts, Window
from ..errors import UserError
from ..run.arguments import rules_of
from ..run.checkpoint import run_of
from ..run.inheritance import read_inherited
from ..run.reading import read_args

PLAIN = (0.0, 1.0)  # shift and scale of unchanged rewards


def check_options(request: Request, args: Any) -> None:
    """Refuse options that this trainer, or a run without a dataset, would ignore. Raises UserError.

    Args:
        request: The data that the trainer asks for.
    """
    name = args.trainer
    for field, rule in rules_of(type(args)).items() if isinstance(request, Rollouts) else ():
        option = field.replace("_", "-")
        if rule.replay and args.given(option):
            raise UserError(f"--{option}: {name} learns from rollouts of its own policy; see --trainer.rollout")
    if isinstance(request, Demonstrations):
        raise UserError(
            f"--trainer {name} imitates demonstrations, not its own experience; run it by offline_trainer.py"
        )
    if isinstance(request, Goals):
        raise UserError(f"--trainer {name} learns from a dataset as a whole (its goals); run it by offline_trainer.py")
    if isinstance(request, Window) and request.needs_dataset and args.dataset == "none":
        raise UserError(f"--trainer {name} also learns from a dataset; name one, as in --dataset metaworld")
    if isinstance(request, Corrections):
        check_labels(request, args)
        if args.init_from and not args.given("normalise-observations"):
            args.normalise_observations = False  # a clone keeps the statistics that it has learnt with
    if args.dataset == "none" and args.given("dataset.ratio"):
        raise UserError("--dataset.ratio is a share of a dataset; choose one with --dataset")


def check_labels(request: Corrections, args: Any) -> None:
    """Refuse options that an expert's labels do not go with. Raises UserError."""
    starts = starts_learning(args)[0]
    if not args.save_buffer:
        raise UserError("--no-save-buffer: the expert's labels are in the replay buffer; leave it out")
    if args.buffer_size < args.steps:
        raise UserError(
            f"--buffer-size {args.buffer_size} would forget labels of the expert, with the oldest of --steps"
            f" {args.steps}; set it to {args.steps} or more"
        )
    if args.dataset == "none" and args.given("trainer.mix"):
        raise UserError("--trainer.mix says how demonstrations join the labels; choose them with --dataset")
    if request.aggregated and args.given("dataset.ratio"):
        raise UserError("--dataset.ratio: demonstrations and labels are drawn as from one set; add --trainer.mix share")
    if not args.init_from and starts > request.labels:
        raise UserError(
            f"--learning-starts {starts}: the expert acts until then, and gives --trainer.labels {request.labels} at"
            f" most; set it to {request.labels} or less"
        )
    if request.expert == "keyboard":
        if not request.gated:
            raise UserError("--trainer.expert keyboard: a person takes over, so use --trainer.method hg_dagger")
        if args.num_envs != 1:
            raise UserError(f"--trainer.expert keyboard: a person steers --num-envs 1, found {args.num_envs}")


def rewards_of(args: Any, inherited: Any, base: Any) -> tuple[float, float]:
    """(shift, scale) of the training rewards of a run, as when it began.

    Args:
        inherited: `Inheritance` of the run.
        base: Frozen policy that is corrected, whose run is the one before without `--init-from`; None for none.
    """
    named = args.init_from or (base.origin if base else "")
    before = str(run_of(Path(named))) if named else ""
    shift, scale = inherited.keep("rewards", lambda: reward_scale(args, before))
    return float(shift), float(scale)


def reward_scale(args: Any, before: str) -> tuple[float, float]:
    """(shift, scale) of the training rewards: from the options, else from the dataset, or the run before.

    Args:
        before: Folder of the run that this one starts from; "" for none.
    """
    options = vars(args.dataset_options)
    if "reward_scale" not in options and before and (Path(before) / "args.json").exists():
        stored = read_args(Path(before))["args"]
        options = stored.get("dataset_options") or {}
        kept = read_inherited(Path(before))
        if "rewards" in kept:  # of an online run, which may have them from yet another
            options = dict(zip(("reward_shift", "reward_scale"), kept["rewards"], strict=True))
        elif stored.get("reward_scale") is not None:  # of one of an older version
            options = stored
    values = [options.get("reward_shift"), options.get("reward_scale")]
    found = [PLAIN[i] if value is None else value for i, value in enumerate(values)]
    shift, scale = args.reward_shift, args.reward_scale
    return (found[0] if shift is None else shift, found[1] if scale is None else scale)


def describe_rewards(rewards: tuple[float, float]) -> str:
    """A line about the shift and scale of the rewards; "" when they are unchanged."""
    shift, scale = rewards
    text = f"rewards: {shift:+g}, then times {scale:g}, as in the data; logged returns are the environment's"
    return "" if rewards == PLAIN else text


def starts_learning(args: Any) -> tuple[int, str]:
    """Environment steps before the first update, and a note if the default was shortened for the run."""
    if args.learning_starts < args.steps or args.given("learning-starts"):
        return args.learning_starts, ""
    half = args.steps // 2
    return half, f"; learning starts at step {half}, the default of {args.learning_starts} is beyond the run"


def planned_updates(request: Request, args: Any, num_envs: int) -> tuple[int, str]:
    """Number of updates of a run, for the learning-rate schedule, and a note about their start for the screen.

    Args:
        request: The data that the trainer asks for.
        num_envs: Environments over all processes.
    """
    starts, note = starts_learning(args)
    steps = args.steps - starts
    if isinstance(request, Rollouts):
        samples = request.steps * num_envs
        updates = (steps // samples) * request.epochs * (samples // args.batch_size)
    else:
        updates = max(int(steps * args.updates_per_step), 0)
    return updates, note if updates else f"{note}; NO UPDATES (see --learning-starts, --updates-per-step)"
