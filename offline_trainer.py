"""Learn a policy from a fixed dataset: imitation and offline reinforcement learning.

accelerate launch offline_trainer.py --trainer bc                         # one process: a laptop, one GPU
accelerate launch --num_processes 8 offline_trainer.py --trainer bc       # eight GPUs of one machine
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 offline_trainer.py --trainer bc
python offline_trainer.py --trainer bc --dataset lerobot --help           # the options of what is chosen
python offline_trainer.py --resume runs/x                                 # go on where a run stopped
"""

import os
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, set_seed

import protocols
from components import REGISTRIES, UserError, checkpoint, evaluation, features, optimizers, parallel, policy, run_record
from components import command_line as cli
from components.metrics import Metrics
from components.normalisation import Normaliser
from components.random_state import get_random_state
from components.sampling import Batches, derive_seed, fit_batch, to_device
from components.tracking import Tracker

# ---- arguments -----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Names:
    """What the first pass over the command line reads: the components bring the options of the second."""

    trainer: str = "bc"
    dataset: str = ""
    model: str = ""
    loss: str = ""
    optimizer: str = ""
    env: str = ""
    plugins: tuple[str, ...] = ()
    resume: str = ""


@dataclass(kw_only=True)
class Args(Names):
    """Learn a policy from a fixed dataset."""

    trainer: Annotated[str, cli.choose(REGISTRIES["trainer"])] = "bc"
    """Algorithm; it has defaults of its own for most of what follows."""
    dataset: Annotated[str, cli.choose(REGISTRIES["dataset"])] = "metaworld"
    """What to learn from."""
    model: Annotated[str, cli.choose(REGISTRIES["model"])] = "mlp"
    """Network of the policy."""
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
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Compute precision, no or bf16; None follows `accelerate launch`."""
    compile: bool = False
    """Compile the trainer's losses; pays for long runs."""
    normalise: tuple[str, ...] = ()
    """Modes of single keys, as KEY=mean_std, min_max, quantile or none; otherwise what the statistics allow."""
    workers: int = 0
    """Processes that load data which is not resident."""
    run_dir: str = ""
    """Folder of the run; by default one under runs/ with the time in its name."""
    log_every: int = 50
    """Updates between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Updates between evaluations; 0 evaluates at the end only."""
    eval_episodes: int = 50
    """Episodes of an evaluation; 0 for none."""
    eval_envs: int = 10
    """Environments that each process steps together."""
    eval_seed: int = 1_000_000
    """Seed of the first evaluation episode; the others follow."""
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
LEAST |= {"save_every": 0, "save_minutes": 0, "keep_last": 1}
RESUME_MAY_CHANGE = {"steps", "log_every", "eval_every", "save_every", "eval_episodes", "keep_last", "track", "resume"}


def parse_args(argv: list[str]) -> tuple[Args, list[str]]:
    """Parse the names first, then everything; returns the arguments and the command line that gives them alone."""
    names, stored = cli.parse_names(Names, argv), {}
    if resumed := names.resume:  # the run's own command line, and what is given beside it
        stored = run_record.read_args(Path(resumed))
        asked = {option: getattr(names, option) or stored["args"][option] for option in REGISTRIES}
        run_record.refuse_changes(resumed, stored["args"], asked, set())
        argv = [*stored["argv"], *cli.without(argv, "--resume")]
        names = cli.parse_names(Names, argv)
    cli.import_plugins(names.plugins)
    trainer = cli.pick(REGISTRIES["trainer"], "trainer", names.trainer)
    suits = {"dataset": "metaworld", "loss": "mse", "optimizer": "adamw", **getattr(trainer, "defaults", {})}
    needs = needed_models(trainer, names.model)
    names.model = next(iter(needs.values()))
    for option in ("dataset", "loss", "optimizer"):
        setattr(names, option, getattr(names, option) or suits[option])
    dataset = cli.pick(REGISTRIES["dataset"], "dataset", names.dataset)
    names.env = names.env or suits.get("env") or getattr(dataset, "env_name", "none")

    def options(option: str, name: str) -> Any:
        component = object if (option, name) == ("env", "none") else cli.pick(REGISTRIES[option], option, name)
        suiting = {k.partition(".")[2]: v for k, v in suits.items() if k.startswith(f"{option}.")}
        return cli.options_of(component, suiting if name == suits.get(option, name) else {})

    simple = {k.replace("-", "_"): v for k, v in suits.items() if "." not in k and k not in REGISTRIES}
    groups = {
        f"{option}_options": options(option, getattr(names, option)) for option in REGISTRIES if option != "model"
    }
    models = cli.model_options({model: options("model", name) for model, name in needs.items()})
    default = Args(**vars(names) | simple, **groups, model_options=models)
    args = cli.parse(Args, argv, default, quiet=os.environ.get("RANK", "0") != "0")
    for name, least in LEAST.items():
        if not getattr(args, name) >= least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be {least} or more")
    if resumed:
        run_record.refuse_changes(resumed, stored["args"], asdict(args), RESUME_MAY_CHANGE)
        args.resume, args.mixed_precision = resumed, stored["mixed_precision"]
    return args, argv


def needed_models(trainer: type, model: str) -> dict[str, str]:
    """Model name -> registry name, as the trainer declares, the policy's first; `--model` replaces the first."""
    needs = dict(getattr(trainer, "needs", {"policy": getattr(trainer, "defaults", {}).get("model", "mlp")}))
    first = "policy" if "policy" in needs else next(iter(needs))
    return {first: model or needs.pop(first), **{name: entry for name, entry in needs.items() if name != first}}


# ---- accelerate ----------------------------------------------------------------------------------------------------


def start_accelerator(args: Args) -> Accelerator:
    """Start the processes' group and refuse the launches in which the gradients would not be right."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError("DeepSpeed and FSDP launches are not supported; launch with --multi_gpu, or with one process")
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed precision {precision} is not supported (its scaler fits one optimizer only); use bf16")
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if str(accelerator.distributed_type.value) not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
        raise UserError(
            f"{accelerator.distributed_type.value} launches are not supported; use --multi_gpu or one process"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate sees {accelerator.num_processes} process; on a CPU,"
            " launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    torch.set_float32_matmul_precision("highest")
    return accelerator


class StepHook:
    """Makes one model's plain `optimizer.step()` right on N processes: agree, average, check, clip, then step.

    Every process must step the same optimizers equally often, or the reduces would mix the gradients of two models
    without an error; so each step first compares the model's index and its count.
    """

    def __init__(
        self, accelerator: Accelerator, index: int, name: str, optimizer: Any, args: Args, metrics: Metrics
    ) -> None:
        self.accelerator, self.index, self.name, self.args, self.metrics = accelerator, index, name, args, metrics
        self.iterations, self.count = 0, 0
        self.loss_is_finite = torch.ones((), dtype=torch.bool, device=accelerator.device)  # `watch_loss` sees to it
        self.first_bad = torch.full((), -1, device=accelerator.device)  # iteration of the first non-finite gradient
        optimizer.register_step_pre_hook(self)
        if args.grad_accumulation > 1:
            accumulate(optimizer, args.grad_accumulation)

    def __call__(self, optimizer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        finite, self.loss_is_finite = self.loss_is_finite, torch.ones_like(self.loss_is_finite)
        self.count += 1
        if self.accelerator.num_processes > 1:
            if len(arguments) > 1 or keywords.get("closure") is not None:
                raise RuntimeError(f"model {self.name!r}: step(closure) works on one process only")
            finite = self.average(parameters, finite)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return
        if self.args.grad_accumulation > 1:
            torch._foreach_div_(gradients, self.args.grad_accumulation)
        norm = torch.nn.utils.get_total_norm(gradients)
        finite = norm.isfinite() & finite
        if finite.is_cuda:  # no synchronisation here: the update is gated on the device, `check` reads the flag later
            self.first_bad = torch.where((self.first_bad < 0) & ~finite, self.iterations, self.first_bad)
            for gradient in gradients:
                gradient.masked_fill_(self.first_bad >= 0, 0.0)
        elif not finite:
            self.first_bad.fill_(self.iterations)
            self.check()
        if self.args.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.args.grad_clip, norm)
        self.metrics.add({f"grad_norm.{self.name}": norm})

    def average(self, parameters: list[Any], finite: torch.Tensor) -> torch.Tensor:
        """Average the gradients over processes in one flat vector; a parameter without any keeps None."""
        mine = torch.tensor([self.index, self.count % 4096, 0.0], device=self.accelerator.device)
        mine[2] = finite
        index, count, finite = self.accelerator.reduce(mine, "mean")
        if index != self.index or count != self.count % 4096:
            raise RuntimeError(
                f"model {self.name!r}: a process skipped one of its optimizer steps (step {self.iterations})"
            )
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=mine.device)
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parameters] + [has]
        )
        *means, has = self.accelerator.reduce(flat, "mean").split([p.numel() for p in parameters] + [len(has)])
        for parameter, mean, some in zip(parameters, means, has.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype) if some else None
        return finite == 1

    def check(self) -> None:
        """Stop when a loss or gradient was not finite; also called before every save and evaluation."""
        if (step := int(self.first_bad)) >= 0:
            raise FloatingPointError(f"loss or gradient of model {self.name!r} is not finite at step {step}")


def watch_loss(loss: torch.nn.Module, hooks: list[StepHook]) -> None:
    """Tell the next optimizer step when the loss module gave no finite number; the gradient may be finite all the same."""

    def look(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and torch.is_grad_enabled():
            for hook in hooks:
                hook.loss_is_finite = hook.loss_is_finite & output.detach().isfinite().all()

    loss.register_forward_hook(look)


def accumulate(optimizer: Any, micro_steps: int) -> None:
    """Make every n-th `step` real, and `zero_grad` only after a real `step`; exact in both usual orders of the calls."""
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
def evaluation_mode(models: Any, named_optimizers: dict[str, Any], args: Args) -> Any:
    """Dropout off, averaged weights in, and rank 0's buffers everywhere; afterwards back to training."""
    parallel.broadcast(models, buffers_only=True)
    models.eval()
    optimizers.set_mode(named_optimizers, training=False)
    yield
    training_mode(models, named_optimizers, args)


def training_mode(models: Any, named_optimizers: dict[str, Any], args: Args) -> None:
    """Everything in training mode but the frozen models, whose buffers must not move either."""
    models.train()
    for name in args.freeze:
        models[name].eval()
    optimizers.set_mode(named_optimizers, training=True)


# ---- the run -------------------------------------------------------------------------------------------------------

PROTOCOLS = {"dataset": protocols.DatasetFactory, "model": protocols.ModelFactory, "loss": protocols.LossFactory}
PROTOCOLS |= {"optimizer": protocols.OptimizerFactory, "env": protocols.EnvFactory, "trainer": protocols.Trainer}


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


def make_trainer(args: Args, models: Any, named_optimizers: Any, loss: Any, spec: Any, device: Any) -> tuple[Any, Any]:
    """Construct the trainer with what its signature names; returns it, and what its `train_step` is passed."""
    cls = REGISTRIES["trainer"][args.trainer]
    with cli.one_line(f"trainer {args.trainer!r}"):
        extras = policy.trainer_extras(cls, args.trainer_options, spec, device)
        if problem := protocols.unbindable(cls, "__init__", (), ("models", "optimizers", "loss", *extras)):
            raise UserError(problem)
        trainer = cls(models=models, optimizers=named_optimizers, loss=loss, **extras)
        if problem := protocols.violation(trainer, protocols.Trainer):
            raise UserError(problem)
        if args.grad_accumulation > 1 and not getattr(trainer, "accumulates", False):
            raise UserError("--grad-accumulation above 1 needs a trainer that declares accumulates = True; use 1")
        if args.compile:
            if not callable(getattr(trainer, "losses", None)):
                raise UserError("--compile needs a trainer with losses(data)")
            trainer.losses = torch.compile(trainer.losses)
    return trainer, protocols.accepted(trainer.train_step, ("epoch", "total_epochs", "iterations"))


def main(argv: list[str]) -> int:
    """Parse, then train in a run folder; returns the exit code."""
    args, argv = parse_args(argv)
    accelerator = start_accelerator(args)
    set_seed(args.seed)  # the same everywhere until the models exist
    say = run_record.start_logging(accelerator.process_index)
    name = f"{args.trainer}-{args.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    opened = parallel.on_first(
        accelerator.process_index, lambda: run_record.open_folder(args.run_dir, name, args.resume)
    )
    with run_record.RunFolder(Path(opened), accelerator.process_index) as folder:
        if args.resume and folder.finished_at() >= args.steps:
            say(f"{folder.path} is finished at step {folder.finished_at()}; give more --steps to go on")
        else:
            train(args, argv, accelerator, folder, say)
    accelerator.end_training()
    return 0


def train(args: Args, argv: list[str], accelerator: Accelerator, folder: run_record.RunFolder, say: Any) -> None:
    """Build everything, go on from a checkpoint when resuming, and loop."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes

    # Data: one process of each machine first, so that the others find what it has cached.
    launch = {"local_rank": accelerator.local_process_index, "dist_enabled": world > 1, "save_dir": str(folder.path)}
    keywords = {"opt_params": launch, "params": asdict(args.dataset_options)}
    data = parallel.in_turns(
        accelerator.is_local_main_process, lambda: build("dataset", args.dataset, args.dataset_options, **keywords)
    )
    dataset, validation = data["dataset"], data.get("validation")
    features.check_dataset(dataset, f"dataset {args.dataset!r}")
    spec = features.describe(dataset[0], data["norm_stats"])
    normaliser = Normaliser(spec, cli.pairs("--normalise", args.normalise)).to(device)
    parts = world * args.grad_accumulation
    args.batch_size, note = fit_batch(args.batch_size, len(dataset), parts, cli.given(argv, "batch-size"))
    batches = Batches(dataset, args.batch_size, args.seed, rank, world, args.grad_accumulation, args.workers)

    # Models and loss, from scratch or from another run's weights; the same on all processes.
    needs = needed_models(REGISTRIES["trainer"][args.trainer], args.model)
    options = vars(args.model_options)
    models = torch.nn.ModuleDict({name: build("model", needs[name], options[name], spec) for name in needs}).to(device)
    checkpoint.initialise(models, args.init_from, args.load, args.freeze)
    loss = build("loss", args.loss, args.loss_options).to(device)
    if any(p.requires_grad for p in loss.parameters()):
        models["loss"] = loss

    # One optimizer for each model that has something to learn, then the trainer, which may add target networks.
    learning = {name: [p for p in model.parameters() if p.requires_grad] for name, model in models.items()}
    learning = {name: parameters for name, parameters in learning.items() if parameters}
    if not learning:
        raise UserError(f"nothing to train: --freeze {' '.join(args.freeze)} leaves no model with trainable parameters")
    optimizer_options = optimizers.with_length(args.optimizer_options, args.steps)
    named_optimizers = {
        name: build("optimizer", args.optimizer, optimizers.for_model(optimizer_options, name, learning), parameters)
        for name, parameters in learning.items()
    }
    trainer, passed = make_trainer(args, models, named_optimizers, loss, spec, device)
    parallel.broadcast(torch.nn.ModuleList([models, loss]))
    metrics = Metrics()
    hooks = [StepHook(accelerator, i, n, o, args, metrics) for i, (n, o) in enumerate(named_optimizers.items())]
    watch_loss(loss, hooks)

    # What acts, and where it is evaluated: the environment asked for, or the dataset's own.
    actor = policy.acting_policy(trainer, models, normaliser, spec)
    env_name, env_options = evaluation.choose_env(
        args.env, args.env_options, lambda option: cli.given(argv, option), data.get("env")
    )
    seeds = range(args.eval_seed, args.eval_seed + args.eval_episodes)
    envs = None
    if args.eval_episodes and env_name != "none" and actor is not None:
        envs = build("env", env_name, env_options, min(args.eval_envs, -(-len(seeds) // world)), args.eval_seed)
        evaluation.check_env(envs, spec, env_name)
    elif args.eval_episodes:
        say("no evaluation: " + ("no environment is known (--env)" if actor is not None else "nothing here acts"))
    can_hold_out = validation is not None and callable(getattr(trainer, "losses", None))

    # From here on each process draws its own noise. A resumed run finds everything as it was.
    set_seed(derive_seed(args.seed, rank) % 2**32)
    training_mode(models, named_optimizers, args)
    progress: dict[str, Any] = {"step": 0, "best_step": -1, "best_loss": None}
    if args.resume:
        saved, manifest = parallel.on_first(rank, lambda: checkpoint.newest(folder.path / "checkpoints"))
        progress = checkpoint.restore(saved, manifest, models, named_optimizers, loss, trainer, args.trainer)
        metrics.values = checkpoint.restore_rank(saved, manifest, rank, derive_seed(args.seed, rank, progress["step"]))
        folder.rewind(progress["step"])
        if kept := optimizers.kept_length(named_optimizers, args.steps):
            say(kept)
    step = progress["step"]
    env_record = {"name": env_name, **asdict(env_options)} if envs is not None else None
    chosen = [REGISTRIES[option][name] for option in REGISTRIES if (name := getattr(args, option)) != "none"]
    run = {
        "args": asdict(args) | {"resume": ""},
        "argv": argv,
        "env": env_record,
        "seed": args.seed,
        "world_size": world,
    }
    folder.begin(run | {"mixed_precision": accelerator.mixed_precision}, chosen, step)
    tracker = Tracker(folder.path, run, args.track and rank == 0, args.track_project, args.track_name, args.track_group)
    say(
        f"{folder.path}: {world} process(es), {len(dataset)} samples, {note}batch {args.batch_size}, steps {step} to {args.steps}"
    )
    shown = run_record.Progress(args.steps, step, rank == 0)

    # Batches are a function of (seed, step); whatever depends on a clock or a signal is decided once for all processes.
    stream, stop = batches.stream(step), run_record.StopRequest()
    precision = AutocastKwargs(cache_enabled=False)  # its cache would serve weights from before a step inside the call
    stopping, failed_saves, next_vote, saved_at = False, 0, step, time.monotonic()
    logged_at, data_s, step_s = step, 0.0, 0.0
    while step < args.steps and not stopping:
        place = {
            "epoch": step // batches.per_epoch,
            "total_epochs": -(-args.steps // batches.per_epoch),
            "iterations": step,
        }
        for hook in hooks:
            hook.iterations = step
        for _ in range(args.grad_accumulation):
            began = time.perf_counter()
            batch = normaliser(to_device(next(stream), device))
            loaded = time.perf_counter()
            with accelerator.autocast(autocast_handler=precision):
                metrics.add(trainer.train_step(batch, **{key: place[key] for key in passed}))
            data_s, step_s = data_s + loaded - began, step_s + time.perf_counter() - loaded
        step += 1

        def due(every: int, step: int = step) -> bool:
            return step == args.steps or (every > 0 and step % every == 0)

        record: dict[str, Any] = {}
        improved = save_due = False
        if due(args.eval_every) and (envs is not None or can_hold_out):
            for hook in hooks:
                hook.check()
            with evaluation_mode(models, named_optimizers, args):
                if can_hold_out:
                    held_out = evaluation.held_out_loss(trainer, validation, normaliser, args.batch_size, device)
                    record["val/loss"] = held_out = parallel.from_first(held_out)
                    improved = progress["best_loss"] is None or held_out < progress["best_loss"]
                    progress |= {"best_step": step, "best_loss": held_out} if improved else {}
                if envs is not None:
                    episodes, problem = evaluation.evaluate(actor, envs, seeds, rank, world)
                    if problem:
                        shown.say(f"evaluation at step {step} failed, training goes on: {problem}")
                    else:
                        result = evaluation.summarise(episodes, env_record, step, actor)
                        folder.append("eval.jsonl", result)
                        tracker.log(evaluation.scores(result), step)
                        shown.say(f"step {step}: {evaluation.headline(result)}")
        if due(args.log_every) or record:
            record = {"step": step, **metrics.means("train/"), **record}
            record |= {
                f"train/lr.{name}": optimizer.param_groups[0]["lr"] for name, optimizer in named_optimizers.items()
            }
            count = step - logged_at
            speed = count * args.batch_size / max(data_s + step_s, 1e-9)
            record |= {"data_s": data_s / count, "step_s": step_s / count, "samples_per_s": speed}
            folder.append("metrics.jsonl", record)
            tracker.log(record, step)
            shown.update(step, record, speed)
            logged_at, data_s, step_s = step, 0.0, 0.0
        if step >= next_vote:
            overdue = 0 < args.save_minutes * 60 < time.monotonic() - saved_at
            votes = parallel.gather((stop.asked, overdue, time.perf_counter() - began))
            stopping, save_due, seconds = any(vote[0] for vote in votes), votes[0][1], votes[0][2]
            next_vote = step + min(max(int(1 / seconds), 1), args.log_every)
        if due(args.save_every) or improved or save_due or stopping:
            for hook in hooks:
                hook.check()
            parallel.broadcast(models, buffers_only=True)
            progress["step"] = step
            shared = checkpoint.shared_state(models, named_optimizers, loss, trainer, progress)
            mine = {"random": get_random_state(), "metrics": metrics.floats()}
            info = {"trainer": args.trainer, "config": asdict(args)}
            try:
                checkpoint.save(
                    folder.path / "checkpoints", step, shared, mine, info, args.keep_last, rank, progress["best_step"]
                )
                failed_saves = 0
            except Exception as error:
                failed_saves += 1
                shown.say(
                    f"CHECKPOINT AT STEP {step} FAILED ({failed_saves} of 3 in a row; older ones are kept): {error}"
                )
                if failed_saves == 3:
                    raise
            saved_at = time.monotonic()
            folder.status("running", step)

    # What is left behind: the policy, a film, the curves, and how it ended.
    shown.close()
    if step < args.steps:
        folder.status("preempted", step, "stopped by a signal")
        say(f"stopped at step {step}; go on with --resume {folder.path}")
    else:
        with evaluation_mode(models, named_optimizers, args):
            if rank == 0 and actor is not None:
                named = {name: (needs[name], options[name]) for name in needs}
                parts = (args.trainer, args.trainer_options), named, (args.loss, args.loss_options), args.plugins
                own = callable(getattr(trainer, "policy", None))
                policy.save_policy(folder.path / "policy", actor, policy.recipe(*parts, own))
            if rank == 0 and envs is not None:
                film = folder.path / "videos" / f"step-{step:09d}.mp4"
                if problem := evaluation.record_video(actor, env_options, seeds[:3], film):
                    say(f"no video: {problem}")
                tracker.video(film, step)
        folder.curves()
        folder.status("finished", step)
        say(f"finished: {folder.path}")
    if envs is not None:
        envs.close()
    tracker.finish()


if __name__ == "__main__":
    sys.exit(run_record.run(main))
