"""Learn a policy from a fixed dataset: imitation and offline reinforcement learning.

accelerate launch offline_trainer.py --trainer bc                         # one process: a laptop, one GPU
accelerate launch --num_processes 8 offline_trainer.py --trainer bc       # eight GPUs of one machine
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 offline_trainer.py --trainer bc
python offline_trainer.py --trainer bc --dataset lerobot --help           # the options of what is chosen
python offline_trainer.py --trainer bc --debug                            # small, in one process, with a debugger
python offline_trainer.py --resume runs/x                                 # go on where a run stopped
"""

import math
import os
import time
from collections.abc import Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

import protocols
from components import REGISTRIES, UserError, ema, optimizers, parallel
from components.acting import evaluation, policy
from components.acting import saved as saved_policy
from components.acting.policy import Inference
from components.data import augmentation, features
from components.data.batches import Batches, derive_seed, fit_batch, to_device
from components.data.normalisation import Normaliser
from components.data.random_state import get_random_state
from components.datasets.transitions import prepared
from components.envs.vector import Environments
from components.errors import StoppedError
from components.learning.finite import Finite
from components.learning.metrics import Metrics
from components.run import checkpoint, debug, process
from components.run import command_line as cli
from components.run import record as run_record
from components.run.record import Run
from components.speed import compile as compiled
from components.speed import cuda_graphs as captured
from components.speed import matmul

# ---- arguments -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Names:
    """What the first pass over the command line reads: the components bring the options of the second."""

    trainer: str = ""
    dataset: str = ""
    model: tuple[str, ...] = ()
    loss: str = ""
    optimizer: str = ""
    env: str = ""
    plugins: tuple[str, ...] = ()
    resume: str = ""
    debug: bool = False


@dataclass(kw_only=True)
class Args(Names):
    """Learn a policy from a fixed dataset."""

    trainer: Annotated[str, cli.choose(REGISTRIES["trainer"])] = "bc"
    """Algorithm; it has defaults of its own for most of what follows."""
    dataset: Annotated[str, cli.choose(REGISTRIES["dataset"])] = "metaworld"
    """What to learn from."""
    model: Annotated[tuple[str, ...], cli.choose_some(REGISTRIES["model"])] = ()
    """Networks: the policy's, an image encoder's, or as NAME=ENTRY that of another model."""
    loss: Annotated[str, cli.choose(REGISTRIES["loss"])] = "mse"
    """Training objective."""
    optimizer: Annotated[str, cli.choose(REGISTRIES["optimizer"])] = "adamw"
    """Optimizer of every model."""
    env: Annotated[str, cli.choose(REGISTRIES["env"], "none")] = "none"
    """Environment of the evaluation; without this option, the dataset's own."""
    plugins: tuple[str, ...] = ()
    """Modules to import first, so that the components they register can be chosen."""
    resume: str = ""
    """Run folder to go on with; every option comes from it."""
    debug: bool = False
    """Everything small and in one process, autograd's anomaly detection on, shapes and norms printed."""
    init_from: str = ""
    """Run folder whose weights all models start from."""
    load: tuple[str, ...] = ()
    """Models that start from another run's weights, as NAME=RUN."""
    freeze: tuple[str, ...] = ()
    """Models that keep their weights."""
    steps: int = 3000
    """Updates: calls of `train_step` that take effect."""
    batch_size: int = 256
    """Samples per update, over all processes and micro-steps."""
    grad_accumulation: int = 1
    """Micro-steps per update."""
    grad_clip: float = 0.0
    """Largest norm of a model's gradient; 0 does not clip."""
    seed: int = 0
    """Seed of weights, data order and noise."""
    ema_decay: float = 0.0
    """Largest decay of averaged weights, which act and are exported in the place of the last ones; 0 for none."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Compute precision, no or bf16; None follows `accelerate launch`."""
    compile: bool = False
    """Compile the trainer's losses, and on a GPU replay whole updates as CUDA graphs; pays for long runs, and says from
    which step on."""
    matmul: Literal["default", "auto"] = "default"
    """Matrix products on a CPU: as torch has them, or the fastest that is still float32, which a probe finds."""
    normalise: tuple[str, ...] = ()
    """Modes of single keys (or `observation` for all of these), as KEY=mean_std, min_max, quantile, scale, return_range
    or none; of other keys what suits the trainer, or else what the statistics allow."""
    workers: int | None = None
    """Processes that load data which is not resident; None takes some for pictures that are decoded when needed."""
    augment: augmentation.Augmentation = augmentation.Augmentation()
    """Random changes to pictures."""
    policy: Inference = Inference()
    """How the policy acts, in evaluations and wherever it is loaded."""
    run_dir: str = ""
    """Folder of the run; by default one under runs/ with the time in its name."""
    log_every: int = 50
    """Updates between lines of metrics.jsonl."""
    eval_every: int = 500
    """Updates between evaluations; 0 evaluates at the end only."""
    eval_episodes: int = 50
    """Episodes of an evaluation; 0 for none."""
    eval_envs: int = 10
    """Environments that each process steps together."""
    eval_seed: int = 1_000_000
    """Seed of the first evaluation episode; the others follow."""
    env_timeout: float = 60.0
    """Seconds that a step of the environments may take; 0 for no limit."""
    hang_timeout: float = 1800.0
    """Seconds without progress after which a process, or a peer that waits for it, ends the job; 0 for never."""
    save_every: int = 1000
    """Updates between checkpoints; 0 saves at the end only."""
    save_minutes: float = 5.0
    """Minutes after which a checkpoint is due anyway; 0 for never."""
    keep_last: int = 2
    """Checkpoints to keep, besides the best."""
    track: bool = False
    """Mirror the metrics to Weights & Biases."""
    track_project: str = "tendon"
    """Project there."""
    track_name: str = ""
    """Name there; by default the run folder's."""
    track_group: str = ""
    """Group there."""
    trainer_options: Annotated[Any, tyro.conf.arg(name="trainer")]
    dataset_options: Annotated[Any, tyro.conf.arg(name="dataset")]
    model_options: Annotated[Any, tyro.conf.arg(name="model")]
    loss_options: Annotated[Any, tyro.conf.arg(name="loss")]
    optimizer_options: Annotated[Any, tyro.conf.arg(name="optimizer")]
    env_options: Annotated[Any, tyro.conf.arg(name="env")]


LEAST = {"steps": 1, "batch_size": 1, "grad_accumulation": 1, "grad_clip": 0, "seed": 0, "workers": 0, "log_every": 1}
LEAST |= {"eval_every": 0, "eval_episodes": 0, "eval_envs": 1, "eval_seed": 0}
LEAST |= {"save_every": 0, "save_minutes": 0, "keep_last": 1, "env_timeout": 0, "hang_timeout": 0}
RESUME_MAY_CHANGE = {"steps", "log_every", "eval_every", "save_every", "eval_episodes", "keep_last", "track", "resume"}
RESUME_MAY_CHANGE |= {"env_timeout", "hang_timeout"}
CHOICES = [option for option in REGISTRIES if hasattr(Args, option)]  # the options that choose a component
EXTRAS: dict[str, type] = {}  # options beside those of the component that is chosen
NEEDS_DATA, SUBJECT = True, "dataset"
# What a trainer may suit, but only the other script has.
OTHER_SCRIPTS = cli.OF_ONE_SCRIPT - set(Args.__dataclass_fields__)


def parse_args(argv: list[str]) -> tuple[Args, list[str], dict[str, Any]]:
    """Parse the names first, then everything.

    Returns the arguments, the command line that gives them (of a resumed run: its own, and what is given beside it),
    and the record of the run that is resumed.
    """
    names: Any = cli.parse_names(Names, argv)
    stored: dict[str, Any] = {}
    if resumed := names.resume:  # the run's own command line, and what is given beside it
        stored = run_record.read_args(Path(resumed), made_by=Path(__file__).name)
        asked = {option: getattr(names, option) or stored["args"][option] for option in CHOICES}
        run_record.refuse_changes(resumed, stored["args"], asked, set())
        argv = [*stored["argv"], *cli.without(argv, "--resume")]
        names = cli.parse_names(Names, argv)
    cli.import_plugins(names.plugins)
    names.trainer = names.trainer or Args.trainer
    trainer = cli.pick(REGISTRIES["trainer"], "trainer", names.trainer)
    suits = {option: getattr(Args, option) for option in CHOICES} | getattr(trainer, "defaults", {})
    if names.debug:
        suits |= {name: value for name, value in debug.SMALL.items() if hasattr(Args, name)}
    needs = needed_models(trainer, names.model)
    names.model = tuple(f"{name}={entry}" for name, entry in needs.items())
    names.dataset = names.dataset or (suits["dataset"] if NEEDS_DATA else "none")
    dataset = object if names.dataset == "none" else cli.pick(REGISTRIES["dataset"], "dataset", names.dataset)
    # The data's environment comes before the trainer's.
    names.env = names.env or getattr(dataset, "env_name", "none" if NEEDS_DATA else suits["env"])
    for option in CHOICES:
        setattr(names, option, getattr(names, option) or suits[option])

    def suitable(group: str) -> dict[str, Any]:
        found = ((key.rpartition("."), value) for key, value in suits.items())
        return {name.replace("-", "_"): value for (of, _, name), value in found if of == group}

    def options(option: str, name: str, model: str = "") -> Any:
        component = object if name == "none" else cli.pick(REGISTRIES[option], option, name)
        component = cli.extended(component, EXTRAS[option]) if option in EXTRAS else component
        first = model == next(iter(needs), "")
        suiting = suitable(option if first or not model else f"{option}.{model}")
        if option == "dataset":  # the windows that suit the trainer, of whatever dataset has them
            suiting = {k: v for k, v in suiting.items() if hasattr(component, k)}
        elif name != (needed_models(trainer, ())[model] if model else suits.get(option, name)):
            suiting = {}
        return cli.options_of(component, suiting | (getattr(component, "debug_options", {}) if names.debug else {}))

    simple = {k.replace("-", "_"): v for k, v in suits.items() if "." not in k and k not in REGISTRIES}
    simple = {name: value for name, value in simple.items() if name not in OTHER_SCRIPTS}
    groups = {f"{option}_options": options(option, getattr(names, option)) for option in CHOICES if option != "model"}
    models = cli.model_options({model: options("model", name, model) for model, name in needs.items()})
    with cli.one_line(f"defaults of the trainer {names.trainer!r}"):
        acting = Inference(**suitable("policy"))
        default = Args(**vars(names) | simple, **groups, model_options=models, policy=acting)
    args = cli.parse(Args, argv, default, quiet=os.environ.get("RANK", "0") != "0")
    cli.at_least(args, LEAST)
    args = debug.plain(args) if args.debug else args
    if resumed:
        run_record.refuse_changes(resumed, stored["args"], asdict(args), RESUME_MAY_CHANGE)
        args.resume = resumed
    return args, argv, stored


def needed_models(trainer: type, asked: Sequence[str]) -> dict[str, str]:
    """Model name -> registry name, as the trainer declares, the policy's first; `--model` replaces some of them."""
    needs = dict(getattr(trainer, "needs", {"policy": getattr(trainer, "defaults", {}).get("model", "mlp")}))
    first = "policy" if "policy" in needs else next(iter(needs))
    needs = {first: needs.pop(first), **needs}
    return needs | cli.chosen_models(REGISTRIES["model"], needs, asked)


# ---- accelerate ----------------------------------------------------------------------------------------------------


def start_accelerator(mixed_precision: str | None, hang_timeout: float) -> Accelerator:
    """Start the processes' group and refuse the launches in which the gradients would not be right."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError("DeepSpeed and FSDP launches are not supported; launch with --multi_gpu, or with one process")
    precision = mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed precision {precision} is not supported (its scaler fits one optimizer only); use bf16")
    # How long processes wait for one that hangs: a little longer than that one, which knows where, waits for itself.
    patience = timedelta(seconds=min(hang_timeout + 5, 1e9)) if hang_timeout else timedelta(days=365)
    group = InitProcessGroupKwargs(timeout=patience)
    accelerator = Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[group])
    if str(accelerator.distributed_type.value) not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
        raise UserError(
            f"{accelerator.distributed_type.value} launches are not supported; use --multi_gpu or one process"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate sees {accelerator.num_processes} process;"
            " on a CPU, launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    return accelerator


class StepHook:
    """Makes one model's plain `optimizer.step()` right on N processes: agree, average, check, clip, then step.

    Every process must step the same optimizers equally often, or the reduces would mix the gradients of two models
    without an error; so each step first compares the model's index and its count.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        index: int,
        name: str,
        optimizer: Any,
        args: Args,
        metrics: Metrics,
        finite: Finite,
    ) -> None:
        self.accelerator, self.index, self.name, self.args, self.metrics = accelerator, index, name, args, metrics
        self.count, self.waits = 0, accelerator.device.type != "cuda"
        self.finite, self.bad = finite, finite.flags[index]
        self.loss: Any = None  # sum of the losses since the last step; `watch_loss` adds them
        self.gates = all(group.get("fused") for group in optimizer.param_groups)  # torch's, which obey `found_inf`
        if self.gates and not self.waits:
            optimizer.found_inf = self.bad
        optimizer.register_step_pre_hook(self)
        if args.grad_accumulation > 1:
            accumulate(optimizer, args.grad_accumulation)

    def __call__(self, optimizer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        loss, self.loss = self.loss, None
        self.count += 1
        if self.accelerator.num_processes > 1:
            if len(arguments) > 1 or keywords.get("closure") is not None:
                raise RuntimeError(f"model {self.name!r}: step(closure) works on one process only")
            loss = self.average(parameters, 0.0 if loss is None else loss)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        if self.args.grad_accumulation > 1:
            torch._foreach_div_(gradients, self.args.grad_accumulation)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if not self.waits:  # no synchronisation on a GPU: the update is gated there, `check` reads the flag later
            self.finite.note(self.index, [norm] if loss is None else [norm, loss])
        elif not math.isfinite(norm if loss is None else norm + loss):
            self.bad.fill_(1.0)
            self.finite.check()
        if self.args.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.args.grad_clip, norm)
        if not (self.waits or self.gates):
            stopped = self.bad > 0
            for gradient in gradients:
                gradient.masked_fill_(stopped, 0.0)
        self.metrics.add({f"train/grad_norm.{self.name}": norm})

    def average(self, parameters: list[Any], loss: Any) -> torch.Tensor:
        """Average the gradients over processes in one flat vector; a parameter without any keeps None."""
        mine = torch.tensor([self.index, self.count % 4096, 0.0], device=self.accelerator.device)
        mine[2] = loss
        index, count, loss = self.accelerator.reduce(mine, "mean")
        if index != self.index or count != self.count % 4096:
            step = int(self.finite.step[self.index])
            raise RuntimeError(f"model {self.name!r}: a process skipped one of its optimizer steps (step {step})")
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=mine.device)
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parameters] + [has]
        )
        *means, has = self.accelerator.reduce(flat, "mean").split([p.numel() for p in parameters] + [len(has)])
        for parameter, mean, some in zip(parameters, means, has.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype) if some else None
        return loss


def watch_loss(loss: torch.nn.Module, hooks: list[StepHook]) -> None:
    """Tell the next optimizer step when the loss is not finite; its gradient may be finite all the same."""

    def look(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and torch.is_grad_enabled():
            value = output.detach().clone() if output.ndim == 0 else output.detach().sum()
            for hook in hooks:
                hook.loss = value if hook.loss is None else hook.loss + value

    loss.register_forward_hook(look)


def accumulate(optimizer: Any, micro_steps: int) -> None:
    """Make every n-th `step` real, and `zero_grad` only after a real one; exact in both usual orders of the calls."""
    real_step, real_zero_grad = optimizer.step, optimizer.zero_grad
    calls = 0

    def step(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return real_step(*arguments, **keywords) if calls % micro_steps == 0 else None

    def zero_grad(*arguments: Any, **keywords: Any) -> None:
        if calls % micro_steps == 0:
            real_zero_grad(*arguments, **keywords)

    optimizer.step, optimizer.zero_grad = step, zero_grad


@contextmanager
def evaluation_mode(models: Any, opts: dict[str, Any], args: Args) -> Any:
    """Dropout off, averaged weights in, and rank 0's buffers everywhere; afterwards back to training."""
    parallel.broadcast(models, buffers_only=True)
    models.eval()
    optimizers.set_mode(opts, training=False)
    yield
    training_mode(models, opts, args)


def training_mode(models: Any, opts: dict[str, Any], args: Args) -> None:
    """Everything in training mode but the frozen models, whose buffers must not move either."""
    models.train()
    for name in args.freeze:
        models[name].eval()
    optimizers.set_mode(opts, training=True)


# ---- the run -------------------------------------------------------------------------------------------------------

PROTOCOLS: dict[str, type] = {
    "dataset": protocols.DatasetFactory,
    "model": protocols.ModelFactory,
    "loss": protocols.LossFactory,
    "optimizer": protocols.OptimizerFactory,
    "env": protocols.EnvFactory,
}


def build(option: str, name: str, options: Any, *arguments: Any, **keywords: Any) -> Any:
    """Hold a factory against its protocol and call its `build`; whatever goes wrong is one line."""
    with cli.one_line(f"{option} {name!r}"):
        factory = cli.instantiate(REGISTRIES[option][name], options)
        if problem := protocols.violation(factory, PROTOCOLS[option]):
            raise UserError(problem)
        product = factory.build(*arguments, **keywords)
        if problem := protocols.misfit(product, PROTOCOLS[option]):
            raise UserError(f"build must return {problem}")
    return product


class Learner(NamedTuple):
    """Everything that learns: built alike, and used alike, in both scripts."""

    models: torch.nn.ModuleDict
    loss: torch.nn.Module
    opts: dict[str, torch.optim.Optimizer]
    trainer: Any
    passed: list[str]  # what the trainer's `train_step` is passed besides the batch
    update: captured.Update  # calls it
    metrics: Metrics
    hooks: list[StepHook]
    finite: Finite  # which of the models were, so far
    factories: dict[str, tuple[str, Any]]  # model name -> registry name and options


def build_learner(args: Args, accelerator: Accelerator, spec: Any, updates: int) -> Learner:
    """Models and loss, from scratch or from another run's weights; one optimizer per model that learns; the trainer."""
    needs = needed_models(REGISTRIES["trainer"][args.trainer], args.model)
    factories = {name: (entry, getattr(args.model_options, name)) for name, entry in needs.items()}
    sees = features.seen_by(REGISTRIES["trainer"][args.trainer], args.trainer_options)
    build_one: Any = lambda name, seen: build("model", *factories[name], seen)  # noqa: E731
    models = features.build_models(list(factories), build_one, spec, sees)
    loss = build("loss", args.loss, args.loss_options).to(accelerator.device)
    if any(p.requires_grad for p in loss.parameters()):
        models["loss"] = loss
    checkpoint.initialise(models.to(accelerator.device), args.init_from, args.load, args.freeze)
    learning = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    learning = {name: parameters for name, parameters in learning.items() if parameters}
    if not learning:
        raise UserError(f"nothing to train: --freeze {' '.join(args.freeze)} leaves no trainable parameters")
    with_length = optimizers.with_length(args.optimizer_options, updates)
    opts = {
        name: build("optimizer", args.optimizer, optimizers.for_model(with_length, name, models), parameters)
        for name, parameters in learning.items()
    }
    trainer, passed = make_trainer(args, models, opts, loss, spec, accelerator.device)
    averages = ema.averages(models, opts, args.ema_decay)
    models = torch.nn.ModuleDict({**models, **averages}).to(accelerator.device)  # with what the trainer has added
    parallel.broadcast(torch.nn.ModuleList([models, loss]))
    metrics = Metrics()
    finite = Finite(opts, accelerator.device)
    hooks = [StepHook(accelerator, i, name, opt, args, metrics, finite) for i, (name, opt) in enumerate(opts.items())]
    watch_loss(loss, hooks)
    alone = accelerator.num_processes == args.grad_accumulation == 1 and not averages
    update = captured.choose(trainer, metrics, opts, accelerator.device, args.compile, alone)
    return Learner(models, loss, opts, trainer, passed, update, metrics, hooks, finite, factories)


def make_trainer(args: Args, models: Any, opts: Any, loss: Any, spec: Any, device: Any) -> tuple[Any, list[str]]:
    """Construct the trainer with what its signature names; returns it, and what its `train_step` is passed."""
    cls = REGISTRIES["trainer"][args.trainer]
    with cli.one_line(f"trainer {args.trainer!r}"):
        extras = saved_policy.trainer_extras(cls, args.trainer_options, spec, device)
        if problem := protocols.unbindable(cls, "__init__", (), ("models", "optimizers", "loss", *extras)):
            raise UserError(problem)
        trainer = cls(models=models, optimizers=opts, loss=loss, **extras)
        if problem := protocols.violation(trainer, protocols.Trainer):
            raise UserError(problem)
        if args.grad_accumulation > 1 and not getattr(trainer, "accumulates", False):
            raise UserError("--grad-accumulation above 1 needs a trainer that declares accumulates = True; use 1")
        if args.compile:
            compiled.compile_losses(trainer, device)
    return trainer, protocols.accepted(trainer.train_step, protocols.LOOP_PASSES)


def tell_break_even(learner: Learner, batch: dict[str, Any], run: Run) -> bool:
    """Compile, and say from which step on that pays; returns False: there is nothing left to compile."""
    run.say(compiled.break_even(learner.trainer, batch, learner.models))
    if learner.update.note:
        run.say(learner.update.note)
    for hook in learner.hooks:
        hook.loss = None  # those losses were for measuring
    return False


def make_evaluator(args: Args, actor: Any, name: str, env: Any, rank: int, world: int, run: Run) -> Any:
    """What evaluates the acting policy, or None with a word about why not."""
    if not args.eval_episodes or actor is None or name == "none":
        if args.eval_episodes:
            run.say("no evaluation: " + ("no environment is known (see --env)" if actor else "no policy acts here"))
        return None
    seeds = range(args.eval_seed, args.eval_seed + args.eval_episodes)
    slots = min(args.eval_envs, -(-len(seeds) // world))
    with cli.one_line(f"env {name!r}"):
        make: Any = partial(build, "env", name, env)
        make = actor.base.under(make) if actor.base else make
        envs = Environments(make, slots, args.eval_seed, args.env_timeout)
        run.cleanup.callback(envs.close)
        return evaluation.Evaluator(actor, envs, {"name": name, **asdict(env)}, seeds, rank, world, run.tick)


def evaluate(evaluator: Any, step: int, run: Run) -> None:
    """Play the episodes and tell the result; a failure of theirs is told, too, and the run goes on.

    Raises StoppedError on all processes when a stop is asked for.
    """
    result, problem = evaluator.evaluate(step)
    if result is None:
        run.say(f"the evaluation at step {step} failed, training goes on: {problem}")
    else:
        run.evaluated(result)


def save(args: Args, learner: Learner, run: Run, progress: Any, mine: dict[str, Any], failed: int, last: bool) -> int:
    """Write a checkpoint; returns how many have failed in a row. Raises at the third, and when it was the last try."""
    models, loss, opts, trainer, *_ = learner
    learner.finite.check()
    parallel.broadcast(models, buffers_only=True)
    shared = checkpoint.shared_state(models, opts, loss, trainer, progress)
    mine = {"random": get_random_state(), "metrics": learner.metrics.floats(), **mine}
    info = {"trainer": args.trainer, "config": {k: v for k, v in run.config.items() if k != "run_dir"}}
    try:
        where, best = run.path / "checkpoints", progress["best_step"]
        checkpoint.save(where, run.step, shared, mine, info, args.keep_last, run.rank, best, run.settle)
    except Exception as error:
        run.say(f"CHECKPOINT AT STEP {run.step} FAILED, {failed + 1} in a row, older ones are kept: {error}")
        if failed == 2 or last:  # nothing ends well without its last checkpoint
            raise
        return failed + 1
    run.saved()
    return 0


def finish(args: Args, learner: Learner, run: Run, actor: Any, evaluator: Any, env: Any) -> None:
    """What is left behind: the policy, a film of it and the curves."""
    with evaluation_mode(learner.models, learner.opts, args):
        if run.first and actor is not None:
            origin = (
                (args.trainer, args.trainer_options),
                learner.factories,
                (args.loss, args.loss_options),
                args.plugins,
            )
            saved_policy.save_policy(run.path / "policy", actor, *origin)
        if run.first and evaluator is not None and not args.debug:
            film = run.path / "videos" / f"step-{run.step:09d}.mp4"
            if problem := evaluator.film(film, env):
                run.say(f"no video: {problem}")
    if args.debug:
        parts = {"models": learner.models, "optimizers": learner.opts, "loss": learner.loss, "trainer": learner.trainer}
        debug.load_again(run.path, partial(checkpoint.restore, **parts, name=args.trainer), actor is not None, run.say)
    run.finished()


def main(argv: list[str]) -> int:
    """Open the run folder and learn in it; returns the exit code."""
    args, argv, stored = parse_args(argv)
    accelerator = start_accelerator(args.mixed_precision or stored.get("mixed_precision"), args.hang_timeout)
    if args.debug and accelerator.num_processes > 1:
        raise UserError("--debug runs in one process; leave it out, or launch with --num_processes 1")
    set_seed(args.seed % 2**32)  # the same everywhere until the models exist
    rank = accelerator.process_index
    run_record.start_logging(rank)
    matmul_note = matmul.choose(args.matmul, stored.get("machine", {}).get("matmul"), accelerator.device)
    subject = cli.subject(args, SUBJECT)
    name = f"{args.trainer}-{subject}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = parallel.on_first(rank, lambda: args.resume or run_record.claim(args.run_dir, name))
    with Run(Path(path), rank, args.hang_timeout) as run, torch.autograd.set_detect_anomaly(args.debug):
        if matmul_note:
            run.say(matmul_note)
        if args.resume and run.finished_at() >= args.steps:
            run.say(f"{path} is finished at step {run.finished_at()}; give more --steps to go on")
        else:
            learn(args, argv, accelerator, run)
    accelerator.end_training()
    return 0


def learn_from_data(args: Args, argv: list[str], accelerator: Accelerator, run: Run) -> None:
    """Build everything, go on from a checkpoint when resuming, and loop over batches of the data."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes

    # Data: one process of each machine first, so that the others find what it has cached.
    launch = {"local_rank": accelerator.local_process_index, "dist_enabled": world > 1, "save_dir": str(run.path)}
    keywords = {"opt_params": launch, "params": asdict(args.dataset_options)}
    data = parallel.in_turns(
        accelerator.is_local_main_process, lambda: build("dataset", args.dataset, args.dataset_options, **keywords)
    )
    with cli.one_line(f"trainer {args.trainer!r}"):  # as the trainer wants it: transitions, goals, ...
        data = prepared(data, REGISTRIES["trainer"][args.trainer], args.trainer, args.trainer_options)
    dataset, validation = data["dataset"], data.get("validation")
    features.check_dataset(dataset, f"dataset {args.dataset!r}")
    tasks = getattr(dataset, "tasks", ())
    spec = args.augment.cropped(features.describe(dataset[0], data["norm_stats"] or {}, tasks))
    suits = getattr(REGISTRIES["trainer"][args.trainer], "defaults", {}).get("normalise", ())  # of keys not asked for
    normaliser = Normaliser(spec, cli.pairs("--normalise", (*suits, *args.normalise))).to(device)
    spec = normaliser.with_ranges(spec)
    if hasattr(dataset, "to"):  # a table that fits a GPU is read there
        dataset.to(device)
    micro_steps = args.grad_accumulation
    batch_size, note = fit_batch(args.batch_size, len(dataset), world * micro_steps, cli.given(argv, "batch-size"))
    batches = Batches(dataset, batch_size, args.seed, rank, world, micro_steps, args.workers)

    # What learns, what acts, and where it is evaluated: in the environment asked for, or in the dataset's own.
    learner = build_learner(args, accelerator, spec, args.steps)
    models, loss, opts, trainer, passed, update, metrics, *_ = learner
    actor = policy.acting_policy(trainer, models, normaliser, spec, args.policy, partial(cli.given, argv))
    env_name, env = evaluation.choose_env(args.env, args.env_options, partial(cli.given, argv), data.get("env"))
    evaluator = make_evaluator(args, actor, env_name, env, rank, world, run)
    if evaluator is not None:
        evaluator.reference = data.get("reference_scores")
    holds_out = validation is not None and callable(getattr(trainer, "losses", None))

    # From here on each process draws its own noise; a resumed run finds everything as it was.
    set_seed(derive_seed(args.seed, rank) % 2**32)
    training_mode(models, opts, args)
    progress: dict[str, Any] = {"step": 0, "best_step": -1, "best_loss": math.inf, "unevaluated": False}
    if args.resume:
        if found := parallel.on_first(rank, lambda: checkpoint.latest(run.path / "checkpoints")):
            progress |= checkpoint.restore(*found, models, opts, loss, trainer, args.trainer)
            own = checkpoint.restore_rank(*found, rank, derive_seed(args.seed, rank, progress["step"]))
            metrics.values = own.get("metrics", {})
        if progress["step"] > args.steps:
            raise UserError(f"--steps {args.steps} is below step {progress['step']}, which {run.path} has reached")
        run.rewind(progress["step"])
        run.say(f"going on from step {progress['step']}{optimizers.kept_length(opts, args.steps)}")
    step = progress["step"]
    run.begin(args, argv, evaluator.env if evaluator else None, step, accelerator.mixed_precision)
    run.say(f"{run.path}: {world} process(es), {len(dataset)} samples, batch {batch_size}{note}, {args.steps} steps")
    if args.debug:
        debug.show_models(models, run.say)

    # The loop. Whatever depends on a clock or a signal is decided once for all processes, about once a second.
    loading = run.cleanup.enter_context(closing(batches.stream(step)))  # it may have workers
    stream = zip(batches.indices(step), loading, strict=True)
    batch: dict[str, Any] = {}
    bf16 = accelerator.mixed_precision == "bf16"  # no cache: it would serve weights from before a step in the same call
    precision = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    stopping, failed_saves, next_vote, saved_at = False, 0, step, time.monotonic()
    to_compile = args.compile
    first, logged_at, data_s, step_s = step, step, 0.0, 0.0
    while not stopping and (step < args.steps or progress["unevaluated"]):
        # Learn; but first a resumed run makes up for the evaluation that a signal had cut short.
        began = time.perf_counter()
        owing, progress["unevaluated"] = progress["unevaluated"], False
        if not owing:
            where = {"epoch": step // batches.per_epoch, "total_epochs": -(-args.steps // batches.per_epoch)}
            where["iterations"] = step
            learner.finite.begin(step)
            for _ in range(micro_steps):
                drawn = time.perf_counter()
                (_, rows, mine), loaded_batch = next(stream)
                batch = to_device(loaded_batch, device)
                loaded = time.perf_counter()
                batch = normaliser(args.augment(batch, rows[mine], args.seed, step))
                if args.debug and step == first:
                    debug.show_batch(batch, run.say)
                with precision:
                    if to_compile:
                        to_compile = tell_break_even(learner, batch, run)
                    update(batch, **{name: where[name] for name in passed})
                data_s, step_s = data_s + loaded - drawn, step_s + time.perf_counter() - loaded
            run.step = step = step + 1
            run.beat()

        # Evaluate: the held-out loss, and episodes in the environment.
        held_out: dict[str, float] = {}
        improved = False
        if due(step, 1, args.eval_every, args.steps) and (holds_out or evaluator is not None):
            learner.finite.check()
            progress["unevaluated"] = True
            with evaluation_mode(models, opts, args), suppress(StoppedError):
                if holds_out:
                    held_out = evaluation.held_out_loss(trainer, validation, normaliser, batch_size, device, run.tick)
                    value = held_out["val/loss"]
                    if improved := value < progress["best_loss"]:
                        progress |= {"best_step": step, "best_loss": value}
                if evaluator is not None:
                    evaluate(evaluator, step, run)
                progress["unevaluated"] = False
            next_vote = step  # it may have been cut short because a stop was asked for

        # Log: means over the interval and over the processes.
        if (due(step, 1, args.log_every, args.steps) or held_out) and not progress["unevaluated"]:
            learner.finite.check()
            count, seconds = max(step - logged_at, 1), max(data_s + step_s, 1e-9)
            rates = {f"train/lr.{name}": opt.param_groups[0]["lr"] for name, opt in opts.items()}
            times = {"data_s": data_s / count, "step_s": step_s / count, "samples_per_s": count * batch_size / seconds}
            if "source" in batch:
                models.eval()
                metrics.add(evaluation.loss_by_source(trainer, batch, "train/"))
                training_mode(models, opts, args)
            record = {"step": step} | metrics.means() | held_out | rates | times
            run.log(record)
            if args.debug:
                debug.show_norms(record, run.say)
            logged_at, data_s, step_s = step, 0.0, 0.0

        # Save: by steps, by time, when the held-out loss is the best so far, and before stopping.
        overdue = False
        if step >= next_vote:
            late = 0 < args.save_minutes * 60 < time.monotonic() - saved_at
            votes = parallel.gather((run.stop.asked, late, time.perf_counter() - began))
            stopping, overdue = any(vote[0] for vote in votes), votes[0][1]
            next_vote = step + (1 if world == 1 else min(max(int(1 / votes[0][2]), 1), 50))
        if due(step, 1, args.save_every, args.steps) or improved or overdue or stopping:
            progress["step"], last = step, stopping or step >= args.steps
            failed_saves = save(args, learner, run, progress, {}, failed_saves, last)
            saved_at = time.monotonic()

    if step < args.steps or progress["unevaluated"]:
        run.preempted()
    else:
        finish(args, learner, run, actor, evaluator, env)


learn = learn_from_data  # for `main`, which is the same in both scripts


def due(step: int, stride: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happened since `stride` steps before."""
    return step >= steps or (every > 0 and step // every > (step - stride) // every)


if __name__ == "__main__":
    process.run(main)
