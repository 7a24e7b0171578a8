"""Options that have no effect, or not the one that they promise, each said once in one line with the remedy."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import contracts
from ..errors import UserError
from ..optimizers import longest_schedule
from .checkpoint import run_of
from .config_file import words_of
from .reading import flat, read_args

REWARDS = ("reward_shift", "reward_scale")  # options of a dataset that change what a critic estimates


def check_launch(grad_accumulation: int) -> None:
    """Refuse accumulation that only the launcher knows of: nothing here would obey it.

    Raises:
        UserError: `accelerate launch --gradient_accumulation_steps`, or its variable, is another than ours.
    """
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if asked not in ("1", "auto", str(grad_accumulation)):
        raise UserError(
            f"--gradient_accumulation_steps {asked} of the launch (ACCELERATE_GRADIENT_ACCUMULATION_STEPS) is not used;"
            f" leave it out and give the script --grad-accumulation {asked}"
        )


def no_effect(args: Any, learner: Any, batches: Any = None) -> list[str]:
    """Lines for the screen, when the run begins.

    Args:
        args: The script's arguments.
        learner: With the number of updates of the run. It is told which loss was asked for, and how late the trainer
            may update a model for the first time, so that it can say more after the first updates.
        batches: Of the dataset, of an offline run.
    """
    cls = type(learner.trainer)
    spans = contracts.spans_of(cls, args.trainer_options)
    learner.patience += sum(length for length, unit in spans.values() if unit == "updates")
    learner.asked_loss = args.loss if args.given("loss") else ""
    lines = [*getattr(args, "notes", ()), *_spans(spans, args, learner.planned, online=batches is None)]
    if not args.resume:  # which says how it differs
        lines += [*_schedules(args, learner), *_ignored(args, learner, batches), *_departed(args)]
    return lines


def _spans(spans: dict[str, tuple[int, str]], args: Any, updates: int, online: bool) -> list[str]:
    """Schedules of the trainer that are longer than the run."""
    lines = []
    for option, (length, unit) in spans.items():
        run = updates if unit == "updates" else args.steps if online else length
        if length > run:
            name = f"--trainer.{option.replace('_', '-')} {length}"
            lines.append(f"{name} is longer than the run of {run} {unit}, which ends before; set it to fit")
    return lines


def _schedules(args: Any, learner: Any) -> list[str]:
    """Learning-rate schedules of another length than the run."""
    options, updates, lines = args.optimizer_options, learner.planned, []
    warmup, schedule = (getattr(options, name, None) for name in ("warmup_steps", "schedule"))
    if found := longest_schedule(learner.optimizers):
        length, rate = found
        if length < updates:
            lines.append(
                f"--optimizer.schedule-steps {length} is shorter than the run of {updates} updates, whose learning rate"
                f" then stays at {rate:.1e}; leave it out to fit"
            )
        elif length > updates:
            lines.append(
                f"--optimizer.schedule-steps {length} is longer than the run of {updates} updates, so the learning rate"
                " does not reach its end; leave it out to fit"
            )
    if warmup and schedule != "onecycle" and warmup >= updates:
        lines.append(
            f"--optimizer.warmup-steps {warmup} is as long as the run of {updates} updates or longer: the learning rate"
            " is below --optimizer.lr all the time"
        )
    if schedule == "onecycle" and warmup and args.given("optimizer.warmup-steps"):
        lines.append("--optimizer.warmup-steps has no effect on the schedule onecycle, which has a rise of its own")
    if schedule == "constant" and args.given("optimizer.schedule-steps"):
        lines.append("--optimizer.schedule-steps has no effect on a constant learning rate; see --optimizer.schedule")
    return lines


def _ignored(args: Any, learner: Any, batches: Any) -> list[str]:
    """Options without effect beside the others."""
    lines = []
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("no", ""):
        lines.append("--dynamo_backend of the launch has no effect; use --compile")
    if not 0 < args.save_every <= args.steps and not args.save_minutes:
        when = f"--save-every {args.save_every}, --save-minutes 0"
        kept = "a run that is killed goes on from its best evaluation, or begins anew"
        lines.append(f"no checkpoint before the end ({when}): {kept}")
    if args.given("eval-every") and args.eval_every > args.steps and args.eval_episodes:
        lines.append(f"--eval-every {args.eval_every} is more than --steps {args.steps}: evaluated at the end only")
    needs: dict[str, Any] = dict.fromkeys(("track-project", "track-name", "track-group"), args.track == "wandb")
    if hasattr(args, "save_dataset"):
        needs |= dict.fromkeys(("save-format", "save-what", "save-episodes"), args.save_dataset)
    wanted = {option: "--track wandb" if option.startswith("track") else "--save-dataset" for option in needs}
    lines += [f"--{o} has no effect without {wanted[o]}" for o, on in needs.items() if args.given(o) and not on]
    for _, group, options in _models(args):
        idle = contracts.idle_options_of(options).items()
        lines += [f"--{group}.{o} has no effect without --{group}.{w}" for o, w in idle if args.given(f"{group}.{o}")]
    if batches is not None and args.workers and batches.resident:
        lines.append(f"--workers {args.workers} has no effect: this data is in memory")
    scaled = [entry.partition("=")[0] for entry in getattr(args.optimizer_options, "lr_scale", ())]
    frozen = [name for name in scaled if name not in learner.optimizers]
    lines += [f"--optimizer.lr-scale {name} has no effect: {name!r} has nothing to train" for name in frozen]
    loaded = {entry.partition("=")[0] for entry in args.load}
    named = contracts.from_files(args.models)
    for name in [] if args.init_from else [n for n in args.freeze if n not in {*loaded, *named}]:
        lines.append(f"--freeze {name}: it stays at random weights; load others with --load {name}=RUN")
    if (ratio := getattr(args, "dataset_ratio", None)) is not None and args.dataset != "none":
        lines += ["--dataset.ratio 0: the dataset has no part in any batch"] if ratio == 0 else []
    size = getattr(args, "buffer_size", None)
    on_policy = isinstance(contracts.request_of(type(learner.trainer), args.trainer_options), contracts.Rollouts)
    if size is not None and size < args.batch_size and not on_policy:
        lines.append(f"--buffer-size {size} is less than --batch-size {args.batch_size}: a batch repeats its samples")
    return lines


def _departed(args: Any) -> list[str]:
    """Options that the run whose weights all models start from had been given, and this one of its trainer has not.

    A policy that goes on with another `--trainer.method` acts by a network that was never trained; with another
    `--trainer.alpha`, `--model.activation` or scale of rewards it soon gets worse, or at once.
    """
    run = run_of(Path(args.init_from))
    if not args.init_from or not (run / "args.json").exists():
        return []
    stored = read_args(run)["args"]
    if stored["trainer"] != args.trainer:
        return []
    before = flat({owner: stored.get(f"{owner}_options") or {} for owner in ("trainer", "model", "dataset")})
    rewards = {name: value for name, value in _values(args.dataset_options).items() if name in REWARDS}
    now = [("trainer", "trainer", _values(args.trainer_options)), ("dataset", "dataset", rewards)]
    now[1:1] = [(f"model.{name}", group, _values(options)) for name, group, options in _models(args)]
    there: list[str] = []
    for place, group, options in now:
        for name, value in options.items():
            option, known = f"{group}.{name.replace('_', '-')}", before.get(f"{place}.{name}", value)
            if known != value and not args.given(option) and not args.given(option.removeprefix("dataset.")):
                there += words_of(option, known, type(known))
    return [f"{run} was trained with {' '.join(there)}: not given here, where other defaults hold"] if there else []


def _models(args: Any) -> list[tuple[str, str, Any]]:
    """Of each model: its name, the group of its options on the command line, and these."""
    first = next(iter(args.models), "")
    return [(name, "model" if name == first else f"model.{name}", of) for name, (_, of) in args.models.items()]


def _values(options: Any) -> dict[str, Any]:
    """A component's options as `args.json` has them, without those that name files."""
    values = json.loads(json.dumps(asdict(options), default=str))
    return {name: value for name, value in values.items() if name not in contracts.places_of(options)}
