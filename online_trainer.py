"""Learn a policy in an environment: online reinforcement learning, alone or on top of data and of offline runs.

accelerate launch online_trainer.py --trainer sac                         # Pendulum-v1 in about two minutes
python online_trainer.py --trainer ppo --env.id CartPole-v1 --steps 50000 # on policy
python online_trainer.py --trainer rlpd --dataset metaworld --dataset.task push-v3     # beside demonstrations
python online_trainer.py --trainer iql --init-from runs/a --dataset d4rl --dataset.path old.hdf5    # on from offline
python online_trainer.py --trainer residual --trainer.base runs/b --env metaworld      # on top of a frozen policy
accelerate launch --num_processes 8 online_trainer.py --trainer sac       # eight GPUs of one machine
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 online_trainer.py --trainer sac
python online_trainer.py --trainer sac --env.id HalfCheetah-v5 --help     # the options of what is chosen
python online_trainer.py --trainer sac --debug                            # small, in one process, with a debugger
python online_trainer.py --resume runs/x                                  # go on where a run stopped
"""

import math
import os
import time
from collections.abc import Sequence
from contextlib import contextmanager, suppress
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
from components.data import features
from components.data.batches import derive_seed, fit_batch, fit_envs, to_device
from components.data.normalisation import Normaliser
from components.data.random_state import get_random_state
from components.data.running import RunningStatistics
from components.envs.vector import Environments
from components.errors import StoppedError
from components.experience import frozen_base as residual
from components.experience import mixed as experience
from components.experience import recording
from components.experience.collection import Collector, describe_env, random_actions
from components.experience.replay import ReplayBuffer, windowed
from components.experience.rollout import Rollout
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
    model: tuple[str, ...] = ()
    dataset: str = ""
    loss: str = ""
    optimizer: str = ""
    env: str = ""
    plugins: tuple[str, ...] = ()
    resume: str = ""
    debug: bool = False


@dataclass(kw_only=True)
class Args(Names):
    """Learn a policy in an environment."""

    trainer: Annotated[str, cli.choose(REGISTRIES["trainer"])] = "sac"
    """Algorithm; it has defaults of its own for most of what follows."""
    dataset: Annotated[str, cli.choose(REGISTRIES["dataset"], "none")] = "none"
    """Old transitions to learn from beside the new ones, a share of each batch (--dataset.ratio)."""
    model: Annotated[tuple[str, ...], cli.choose_some(REGISTRIES["model"])] = ()
    """Networks: the policy's, an image encoder's, or as NAME=ENTRY that of another model."""
    loss: Annotated[str, cli.choose(REGISTRIES["loss"])] = "mse"
    """Training objective."""
    optimizer: Annotated[str, cli.choose(REGISTRIES["optimizer"])] = "adam"
    """Optimizer of every model."""
    env: Annotated[str, cli.choose(REGISTRIES["env"])] = "gymnasium"
    """Environment to learn and to be evaluated in."""
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
    steps: int = 100_000
    """Environment steps over all processes."""
    num_envs: int = 4
    """Environments over all processes; each process steps its part of them together."""
    learning_starts: int = 1000
    """Environment steps before the first update, whose actions are drawn uniformly."""
    updates_per_step: float = 1.0
    """Updates per environment step."""
    buffer_size: int = 1_000_000
    """Transitions that the replay buffer keeps, over all processes."""
    normalise_observations: bool = False
    """Give vector observations mean 0 and deviation 1, by what the environments have given so far."""
    normalise_rewards: bool = False
    """Divide the rewards by the deviation of the discounted return so far."""
    reward_shift: float | None = None
    """Added to every reward that is learnt from; None takes what the dataset adds, or that of the run that this one
    begins from."""
    reward_scale: float | None = None
    """Factor on every reward that is learnt from, after the shift; None as for the shift."""
    save_buffer: bool = True
    """Keep the replay buffer in the checkpoints; without it a resumed run fills a new one."""
    env_restarts: int = 10
    """Faults of its environments that each process mends by new ones."""
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
    policy: Inference = Inference()
    """How the policy acts, in evaluations and wherever it is loaded."""
    run_dir: str = ""
    """Folder of the run; by default one under runs/ with the time in its name."""
    log_every: int = 50
    """Environment steps between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Environment steps between evaluations; 0 evaluates at the end only."""
    eval_episodes: int = 20
    """Episodes of an evaluation; 0 for none."""
    eval_envs: int = 10
    """Environments that each process steps together."""
    eval_seed: int = 1_000_000
    """Seed of the first evaluation episode; the others follow."""
    env_timeout: float = 60.0
    """Seconds that a step of the environments may take; 0 for no limit."""
    hang_timeout: float = 1800.0
    """Seconds without progress after which a process, or a peer that waits for it, ends the job; 0 for never."""
    save_every: int = 5000
    """Environment steps between checkpoints; 0 saves at the end only."""
    save_minutes: float = 5.0
    """Minutes after which a checkpoint is due anyway; 0 for never."""
    keep_last: int = 2
    """Checkpoints to keep, besides the best."""
    save_dataset: str = ""
    """Folder of a dataset to write when the run has finished; empty for none."""
    save_format: Literal["minari", "lerobot"] = "minari"
    """Format of that dataset."""
    save_what: Literal["policy", "collected"] = "policy"
    """Its contents: episodes of the final policy, or what the replay buffer still holds."""
    save_episodes: int = 50
    """Episodes of the final policy."""
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


LEAST = {"steps": 1, "batch_size": 1, "grad_accumulation": 1, "grad_clip": 0, "seed": 0, "num_envs": 1, "log_every": 1}
LEAST |= {"learning_starts": 0, "updates_per_step": 0, "buffer_size": 1, "env_restarts": 0}
LEAST |= {"eval_every": 0, "eval_episodes": 0, "eval_envs": 1, "eval_seed": 0}
LEAST |= {"save_episodes": 1, "save_every": 0, "save_minutes": 0, "keep_last": 1, "env_timeout": 0, "hang_timeout": 0}
RESUME_MAY_CHANGE = {"steps", "log_every", "eval_every", "save_every", "eval_episodes", "keep_last", "track", "resume"}
RESUME_MAY_CHANGE |= {"env_timeout", "env_restarts", "hang_timeout"}
RESUME_MAY_CHANGE |= {"save_dataset", "save_format", "save_what", "save_episodes"}
CHOICES = [option for option in REGISTRIES if hasattr(Args, option)]  # the options that choose a component
EXTRAS: dict[str, type] = {"dataset": experience.Share}  # options beside those of the component that is chosen
NEEDS_DATA, SUBJECT = False, "env"
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


def learn_in_environment(args: Args, argv: list[str], accelerator: Accelerator, run: Run) -> None:
    """Build everything, go on from a checkpoint when resuming, and loop: act, remember, learn."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    given = partial(cli.given, argv)
    learns: Any = REGISTRIES["trainer"][args.trainer]
    experience.check_options(learns, args.trainer, args.dataset, given)
    keeps = not experience.on_policy(learns)
    recording.check_destination(args.save_dataset, args.save_format, args.save_what, keeps, bool(args.resume))

    # Data, where there is some: old transitions beside the new ones, from an environment that it may know.
    env_name, env, data = args.env, args.env_options, {}
    if args.dataset != "none":
        launch = {"local_rank": accelerator.local_process_index, "dist_enabled": world > 1, "save_dir": str(run.path)}
        keywords = {"opt_params": launch, "params": experience.own_options(args.dataset_options)}
        data = parallel.in_turns(
            accelerator.is_local_main_process, lambda: build("dataset", args.dataset, args.dataset_options, **keywords)
        )
        env_name, env = evaluation.choose_env(args.env, args.env_options, given, data.get("env"))
        if env_name == "none":
            raise UserError(f"dataset {args.dataset!r} knows no environment to learn in; name one with --env")

    # Environments: every process has its part of them, known by their place among all, and remembers what they give.
    num_envs, note = fit_envs(args.num_envs, world, given("num-envs"))
    mine = num_envs // world
    with cli.one_line(f"env {env_name!r}"):
        base = parallel.in_turns(rank == 0, lambda: residual.base_of(learns, args.trainer_options, run.path, rank == 0))
        make: Any = partial(build, "env", env_name, env)
        make = base.under(make) if base else make
        environments = Environments(make, mine, derive_seed(args.seed, rank) % 2**31, args.env_timeout)
        run.cleanup.callback(environments.close)
        spec = describe_env(environments)
    before = args.init_from or (learns.base(args.trainer_options)[0] if base else "")
    rewards = experience.reward_scale(args.reward_shift, args.reward_scale, args.dataset_options, before)
    collector = Collector(environments, args.seed, rank * mine, args.env_restarts, run.tell, rewards)

    # What the models see: normalised as in the run that they come from, or by what the environment has given so far.
    window = experience.window_of(learns, args.trainer_options)
    modes = saved_policy.normalisation_of(args.init_from, spec)
    running = RunningStatistics(
        spec, args.normalise_observations, args.normalise_rewards, window.get("discount", 0.99), mine
    )
    normaliser = Normaliser(spec, modes | running.modes).to(device)
    described = normaliser.with_ranges(windowed(spec, window))
    with cli.one_line(f"dataset {args.dataset!r}"):
        data = residual.relabelled(data, base)
        old = experience.old_transitions(data, learns, args.trainer, args.trainer_options, described, normaliser)

    # What learns, what acts, what explores, and what evaluates.
    micro_steps = args.grad_accumulation
    batch_size, _ = fit_batch(args.batch_size, args.batch_size, world * micro_steps, asked=True)
    learning_starts = args.learning_starts
    if learning_starts >= args.steps and not given("learning-starts"):
        learning_starts = args.steps // 2
        note += f"; learning starts at step {learning_starts}, the default of {args.learning_starts} is beyond the run"
    total_updates = experience.total_updates(
        learns, args.trainer_options, args.steps - learning_starts, args.updates_per_step, num_envs, batch_size
    )
    note += "" if total_updates else "; NO UPDATES (see --learning-starts, --updates-per-step)"
    learner = build_learner(args, accelerator, described, max(total_updates, 1))
    models, loss, opts, trainer, passed, update, metrics, *_ = learner
    part = batch_size // (world * micro_steps)
    if experience.on_policy(learns):
        memory: Any = Rollout(trainer, normaliser, device, mine, part, **learns.rollout(args.trainer_options))
    else:
        memory = ReplayBuffer(spec, args.buffer_size, num_envs, mine, window, num_envs * args.updates_per_step)
        if old is not None:
            memory = experience.Mixed(memory, old, args.dataset_options.ratio, part)
    actor = policy.acting_policy(trainer, models, normaliser, described, args.policy, given)
    if actor is None:
        raise UserError(f"trainer {args.trainer!r} has nothing that acts: no policy(), and no model named 'policy'")
    actor.base = base
    explorer = trainer.explorer() if hasattr(trainer, "explorer") else actor.module
    explorer = policy.Policy(explorer, normaliser, described)  # its own history: evaluations come between its steps
    evaluator = make_evaluator(args, actor, env_name, env, rank, world, run)

    # From here on each process draws its own noise; a resumed run finds everything as it was but its environments.
    set_seed(derive_seed(args.seed, rank) % 2**32)
    training_mode(models, opts, args)
    progress: dict[str, Any] = {"step": 0, "updates": 0, "owed": 0.0, "filled_from": 0, "best_step": -1}
    progress |= {"learning_starts": learning_starts, "unevaluated": bool(args.init_from or base)}
    progress["statistics"] = running.state_dict()
    own: dict[str, Any] = {}
    ended: list[dict[str, Any]] = []  # episodes since the last line of the log
    if args.resume:
        if found := parallel.on_first(rank, lambda: checkpoint.latest(run.path / "checkpoints")):
            progress |= checkpoint.restore(*found, models, opts, loss, trainer, args.trainer)
            own = checkpoint.restore_rank(*found, rank, derive_seed(args.seed, rank, progress["step"]))
            metrics.values = own.get("metrics", {})
            running.load_state_dict(progress["statistics"], own.get("statistics"), normaliser)
            ended = own.get("episodes", [])
            if not memory.restore(own, rank * mine):
                progress["filled_from"] = progress["step"]
        if progress["step"] > args.steps:
            raise UserError(f"--steps {args.steps} is below step {progress['step']}, which {run.path} has reached")
        run.rewind(progress["step"])
        run.say(f"going on from step {progress['step']}{optimizers.kept_length(opts, args.steps)}")
    step, learning_starts = progress["step"], progress["learning_starts"]
    run.begin(args, argv, {"name": env_name, **asdict(env)}, step, accelerator.mixed_precision)
    run.say(f"{run.path}: {world} process(es), {num_envs} environments{note}, batch {batch_size}, {args.steps} steps")
    run.say(memory.describe(args.steps // num_envs, world, args.save_buffer))
    if rewards != experience.PLAIN:
        run.say(
            f"rewards: {rewards[0]:+g}, then times {rewards[1]:g}, as the data's; returns are the environment's own"
        )
    if collector.restore(own.get("collector", {}), step):
        explorer.load_state_dict(own["explorer"])
    else:
        memory.cut()
        running.cut()
    if args.debug:
        debug.show_models(models, run.say)

    # The loop. Whatever depends on a clock or a signal is decided once for all processes, about once a second.
    bf16 = accelerator.mixed_precision == "bf16"  # no cache: it would serve weights from before a step in the same call
    precision = torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)
    stopping, failed_saves, next_vote, saved_at = False, 0, step, time.monotonic()
    to_compile = args.compile
    first, logged_at, logged_updates, data_s, step_s = progress["updates"], step, progress["updates"], 0.0, 0.0
    while not stopping and (step < args.steps or progress["unevaluated"]):
        # Act and learn; but first a run evaluates what it is given, or makes up for what a signal had cut short.
        began = time.perf_counter()
        owing, progress["unevaluated"] = progress["unevaluated"], False
        if not owing:
            # Act: at random until learning starts, then as the trainer explores; given weights explore from the start.
            if step < learning_starts and not args.init_from:
                action = random_actions(environments)
            else:
                if hasattr(explorer.module, "env_step"):
                    explorer.module.env_step = step
                action = explorer.act(collector.observation)
            transitions, episodes = collector.step(action)
            while transitions is None and not len(memory):  # a fault before there is anything to learn from
                transitions, episodes = collector.step(action)
            if transitions is None:  # a fault: the episodes are cut, new ones begin
                memory.miss()
                running.cut()
                explorer.reset()
            else:
                memory.add(transitions)
                running.add(transitions)
                explorer.restart(transitions["ended"].nonzero().flatten())
            run.step = step = step + num_envs
            for episode in episodes:
                ended.append({"step": step, **episode})
                metrics.add({key: value for key, value in episode.items() if key != "env"}, "train/")
            run.beat()
            data_s += time.perf_counter() - began

            # Learn: so many updates for each environment step, or for each rollout.
            progress["owed"] += memory.due(step - progress["filled_from"] > learning_starts)
            learner.finite.begin(step)
            while progress["owed"] >= 1:
                where = {"epoch": 0, "total_epochs": 1, "iterations": progress["updates"]}
                for _ in range(micro_steps):
                    drawn = time.perf_counter()
                    batch = memory.sample(part)
                    if not experience.on_policy(learns):
                        batch = normaliser(to_device(batch, device))
                    if args.debug and progress["updates"] == first:
                        debug.show_batch(batch, run.say)
                    loaded = time.perf_counter()
                    with precision:
                        if to_compile:
                            to_compile = tell_break_even(learner, batch, run)
                        update(batch, **{name: where[name] for name in passed})
                    data_s, step_s = data_s + loaded - drawn, step_s + time.perf_counter() - loaded
                progress["owed"] -= 1
                progress["updates"] += 1
                run.beat()
            if memory.between:
                running.settle(normaliser)

        # Evaluate: episodes in environments of their own.
        if evaluator is not None and due(step, num_envs, args.eval_every, args.steps):
            learner.finite.check()
            progress["unevaluated"] = True
            with evaluation_mode(models, opts, args), suppress(StoppedError):
                evaluate(evaluator, step, run)
                progress["unevaluated"] = False
            next_vote = step  # it may have been cut short because a stop was asked for

        # Log: means over the interval and over the processes.
        if due(step, num_envs, args.log_every, args.steps) and not progress["unevaluated"]:
            learner.finite.check()
            count, seconds = max(step - logged_at, 1), max(data_s + step_s, 1e-9)
            made = progress["updates"] - logged_updates
            rates = {f"train/lr.{name}": opt.param_groups[0]["lr"] for name, opt in opts.items()}
            times = {"data_s": data_s / count, "step_s": step_s / count, "samples_per_s": made * batch_size / seconds}
            times["env_steps_per_s"] = count / seconds
            record = {"step": step, "updates": progress["updates"]} | metrics.means() | rates | times
            run.log(record)
            run.episodes([episode for episodes in parallel.gather(ended) for episode in episodes])
            if args.debug:
                debug.show_norms(record, run.say)
            logged_at, logged_updates, data_s, step_s, ended = step, progress["updates"], 0.0, 0.0, []

        # Save: by steps, by time, and before stopping.
        overdue = False
        if step >= next_vote:
            late = 0 < args.save_minutes * 60 < time.monotonic() - saved_at
            votes = parallel.gather((run.stop.asked, late, time.perf_counter() - began))
            stopping, overdue = any(vote[0] for vote in votes), votes[0][1]
            next_vote = step + num_envs * (1 if world == 1 else min(max(int(1 / votes[0][2]), 1), 50))
        if due(step, num_envs, args.save_every, args.steps) or overdue or stopping:
            progress |= {"step": step, "statistics": running.state_dict()}
            state = {"collector": collector.state_dict(), "explorer": explorer.state_dict(), "episodes": ended}
            state["statistics"] = running.own_state()
            if args.save_buffer:
                state |= {"parts": memory.new_parts(rank), "buffer": memory.state_dict()}
            last = stopping or step >= args.steps
            failed_saves = save(args, learner, run, progress, state, failed_saves, last)
            if not failed_saves:
                memory.saved()
            saved_at = time.monotonic()

    described.update(running.describe(described))  # what the policy is saved with
    if step < args.steps or progress["unevaluated"]:
        run.preempted()
        return
    if args.save_dataset:
        fps, how = environments.metadata.get("render_fps", 30), (args.eval_envs, args.eval_seed, args.env_timeout)
        parts = parallel.gather(memory.transitions()) if args.save_what == "collected" else []
        with evaluation_mode(models, opts, args):
            if run.first and parts:
                saved: Any = recording.collected(parts, spec, environments.single_action_space, rewards)
            elif run.first:
                acting = base.corrected(actor) if base else actor
                saved = recording.play(acting, partial(build, "env", env_name, env), args.save_episodes, *how, run.beat)
            if run.first:
                origin = f"{args.trainer}, {args.save_what}, step {step}"
                run.say(recording.write(saved, args.save_dataset, args.save_format, (env_name, env), origin, fps))
    finish(args, learner, run, actor, evaluator, env)


learn = learn_in_environment  # for `main`, which is the same in both scripts


def due(step: int, stride: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happened since `stride` steps before."""
    return step >= steps or (every > 0 and step // every > (step - stride) // every)


if __name__ == "__main__":
    process.run(main)
