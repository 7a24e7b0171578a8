"""Learn a policy from a fixed dataset: imitation and offline reinforcement learning.

accelerate launch offline_trainer.py --trainer bc                         # one process: a laptop, one GPU
accelerate launch --num_processes 8 offline_trainer.py --trainer bc       # eight GPUs of one machine
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 offline_trainer.py --trainer bc
python offline_trainer.py --trainer bc --dataset lerobot --help           # the options of what is chosen
python offline_trainer.py --list                                          # all components, a line each
python offline_trainer.py --trainer bc --debug                            # small, in one process, with a debugger
python offline_trainer.py --resume runs/x                                 # resume a run where it stopped
python offline_trainer.py --config runs/x/args.json --seeds 0 1 2         # a run's options, or a TOML's; three seeds

The file reads top to bottom: the options, then accelerate (how a plain optimizer step becomes right on several
processes), then how one run is built, and its loop. Algorithms, data and bookkeeping are in `components/`.
"""

import os
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

import protocols
from components import REGISTRIES, UserError, contracts, parallel
from components.acting.evaluation import Evaluator, choose_env
from components.acting.inference import Inference
from components.acting.learned import acting_policy
from components.contracts import Place
from components.data.augmentation import Augmentation
from components.data.batches import Batches, fit_batch, to_device
from components.data.features import build_models, describe_data
from components.data.random_state import derive_seed
from components.datasets.transitions import prepared
from components.errors import one_line
from components.learning.held_out import HeldOut
from components.learning.learner import Learner
from components.optimizers import for_model, trainable, with_length
from components.run import debug
from components.run.arguments import FP16, Arguments, Rule, parse
from components.run.checkpoint import Checkpoints, initialise
from components.run.clock import Clock
from components.run.command_line import choose, choose_some, pairs
from components.run.overlooked import check_launch, no_effect
from components.run.process import run_script
from components.run.record import Run
from components.run.seeds import Seeds
from components.speed import matmul
from components.speed.compile import compiled

# ---- arguments ------------------------------------------------------------------------------------------------------
# A `Rule` beside a type says its smallest value, whether it may change when a run is resumed, and what it is under
# --debug. Each chosen component adds its own options, such as --trainer.expectile: see --help.


@dataclass(kw_only=True)
class Args(Arguments):
    """Learn a policy from a fixed dataset."""

    # What is trained, on what, and how it is measured: names of the registries, whose options join by themselves.
    trainer: Annotated[str, choose(REGISTRIES["trainer"])] = "bc"
    """Algorithm; it has defaults of its own for most of what follows."""
    dataset: Annotated[str, choose(REGISTRIES["dataset"])] = "metaworld"
    """What to learn from."""
    model: Annotated[tuple[str, ...], choose_some(REGISTRIES["model"])] = ()
    """Networks: the policy's, an image encoder's, or as NAME=ENTRY that of another model."""
    loss: Annotated[str, choose(REGISTRIES["loss"])] = "mse"
    """Training objective."""
    optimizer: Annotated[str, choose(REGISTRIES["optimizer"])] = "adamw"
    """Optimizer of every model."""
    env: Annotated[str, choose(REGISTRIES["env"], "none")] = "none"
    """Environment of the evaluation; without this option, the dataset's own."""
    # Where components, weights and a whole run come from.
    plugins: Annotated[tuple[str, ...], Place(r"(.+\.py)", moves=True)] = ()
    """Modules, or files such as mine.py, to import first: the components that they register can be chosen."""
    resume: Annotated[str, Rule(resume=True)] = ""
    """Run folder to resume; every option comes from it."""
    config: str = ""
    """File of options, which those beside it override: the args.json of a run, or a TOML."""
    debug: bool = False
    """Everything small and in one process, shapes, gradients and times shown; a crash reaches the debugger."""
    init_from: Annotated[str, Place()] = ""
    """Run or checkpoint folder whose weights all models start from."""
    load: Annotated[tuple[str, ...], Place("[^=]*=(.+)")] = ()
    """Models that start from another run's weights, as NAME=RUN."""
    freeze: tuple[str, ...] = ()
    """Models that keep their weights."""
    # How long, and what an update is.
    steps: Annotated[int, Rule(1, resume=True, debug=40)] = 3000
    """Updates: calls of `train_step` that take effect."""
    batch_size: Annotated[int, Rule(1, debug=32)] = 256
    """Samples per update, over all processes and micro-steps."""
    grad_accumulation: Annotated[int, Rule(1)] = 1
    """Micro-steps per update."""
    grad_clip: Annotated[float, Rule(0)] = 0.0
    """Largest norm of a model's gradient; 0 does not clip."""
    seed: Annotated[int, Rule(0)] = 0
    """Seed of weights, data order and noise."""
    seeds: tuple[int, ...] = ()
    """Several seeds, in a run each, one after the other; ends with a table of them."""
    # How it is computed.
    ema_decay: float = 0.0
    """Largest decay of averaged weights, which act and are exported in the place of the last ones; 0 for none."""
    mixed_precision: Annotated[Literal["no", "bf16"] | None, Rule(refused=FP16)] = None
    """Compute precision; None follows `accelerate launch`."""
    compile: Annotated[bool, Rule(debug=False, always=True)] = False
    """Compile the trainer's losses, and on a GPU replay whole updates as CUDA graphs; pays for long runs, and says from
    which step on."""
    matmul: Literal["default", "auto"] = "default"
    """Matrix products on a CPU: as torch has them, or the fastest that is still float32, which a probe finds."""
    normalise: tuple[str, ...] = ()
    """Modes of single keys (or `observation` for all of these), as KEY=mean_std, min_max, quantile, scale, return_range
    or none; of other keys the trainer's, or else what the statistics allow."""
    workers: Annotated[int | None, Rule(0, debug=0, always=True)] = None
    """Processes that load data which is not resident; None takes some for pictures that are decoded when needed."""
    augment: Augmentation = Augmentation()
    """Random changes to pictures."""
    policy: Inference = Inference()
    """How the policy acts, in evaluations and wherever it is loaded."""
    # What is written when, and how the policy is evaluated.
    run_dir: str = ""
    """Folder of the run; by default one under runs/ with the time in its name."""
    log_every: Annotated[int, Rule(1, resume=True, debug=10)] = 50
    """Updates between lines of metrics.jsonl."""
    eval_every: Annotated[int, Rule(0, resume=True, debug=20)] = 500
    """Updates between evaluations; 0 evaluates at the end only."""
    eval_episodes: Annotated[int, Rule(0, resume=True, debug=1)] = 50
    """Episodes of an evaluation; 0 for none."""
    eval_envs: Annotated[int, Rule(1, debug=1)] = 10
    """Environments that each process steps together."""
    eval_seed: Annotated[int, Rule(0)] = 1_000_000
    """Seed of the first evaluation episode; the others follow."""
    # How long to wait for an environment or a process that does not answer.
    env_timeout: Annotated[float, Rule(0, resume=True, debug=0.0, always=True)] = 60.0
    """Seconds that a step of the environments may take; 0 for no limit."""
    hang_timeout: Annotated[float, Rule(0, resume=True, debug=0.0, always=True)] = 1800.0
    """Seconds without progress after which a process, or a peer that waits for it, ends the job; 0 for never."""
    # What is kept, and who is shown it.
    save_every: Annotated[int, Rule(0, resume=True, debug=20)] = 1000
    """Updates between checkpoints; 0 saves the best and the last only."""
    save_minutes: Annotated[float, Rule(0)] = 5.0
    """Minutes after which a checkpoint is due anyway; 0 for never."""
    keep_last: Annotated[int, Rule(1, resume=True)] = 2
    """Checkpoints to keep, besides the best."""
    track: Annotated[Literal["none", "wandb", "tensorboard"], Rule(resume=True)] = "none"
    """Show metrics, film and curves in Weights & Biases, or in TensorBoard, whose files are in the run folder."""
    track_project: str = "tendon"
    """Project in Weights & Biases."""
    track_name: str = ""
    """Name there; by default the run folder's."""
    track_group: str = ""
    """Group there."""
    # The options of the components that are chosen: the second pass over the command line fills them in.

    trainer_options: Annotated[Any, tyro.conf.arg(name="trainer")]
    dataset_options: Annotated[Any, tyro.conf.arg(name="dataset")]
    model_options: Annotated[Any, tyro.conf.arg(name="model")]
    loss_options: Annotated[Any, tyro.conf.arg(name="loss")]
    optimizer_options: Annotated[Any, tyro.conf.arg(name="optimizer")]
    env_options: Annotated[Any, tyro.conf.arg(name="env")]
    """A dataset that knows its environment comes before these defaults."""


# ---- accelerate -----------------------------------------------------------------------------------------------------
# Components are plain PyTorch: a trainer calls `loss.backward()` and `optimizer.step()`, and knows of no processes.
# What makes that right on many: accelerate starts the group, and a hook on each optimizer averages the gradients before
# they are used. DDP would be silently wrong, as soon as one step calls two networks, or one of them twice, or a method
# other than `forward`.


def start_accelerator(args: Args) -> Accelerator:
    """Start the group of processes, and refuse the launches in which gradients would not be right."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError("DeepSpeed and FSDP launches are not supported; launch with --multi_gpu, or with one process")
    check_launch(args.grad_accumulation)
    # A resumed run computes as it began. fp16 needs a loss scaler, and accelerate's belongs to a single optimizer.
    wanted = args.mixed_precision or args.stored.get("mixed_precision")
    precision = wanted or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise UserError(f"mixed precision {precision} is not supported (its scaler fits one optimizer only); use bf16")
    # Whoever hangs ends itself, and says where, after --hang-timeout. The others wait for it a little longer, so that
    # this message comes first, not theirs about a lost connection.
    seconds = min(args.hang_timeout + 5, 1e9) if args.hang_timeout else 365 * 86400
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=seconds))
    accelerator = Accelerator(mixed_precision=wanted, kwargs_handlers=[group])
    kind, processes = str(accelerator.distributed_type.value), accelerator.num_processes
    if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
        raise UserError(f"{kind} launches are not supported; use --multi_gpu or one process")
    # `accelerate launch --cpu --num_processes 2` starts one process, and other launchers may start several that
    # accelerate does not group: each would believe that it is the only one, and all would write the same run.
    if int(os.environ.get("WORLD_SIZE", "1")) != processes:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but accelerate sees {processes} process;"
            " on a CPU, launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
        )
    if args.debug and processes > 1:
        raise UserError("--debug runs in one process; leave it out, or launch with --num_processes 1")
    return accelerator


def autocast(accelerator: Accelerator) -> Any:
    """bf16 where `--mixed-precision` asks for it; enter it around each call of `train_step`.

    It has no cache, unlike accelerate's. With one, the bf16 copy of a weight from before an optimizer's step would
    serve the forward passes after it, when one call of `train_step` makes several steps.
    """
    bf16 = accelerator.mixed_precision == "bf16"
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


class StepHook:
    """Runs before each `optimizer.step()` of one model: agree, average, check, clip; then the optimizer steps."""

    def __init__(self, accelerator: Accelerator, learner: Learner, name: str, clip: float) -> None:
        self.accelerator, self.name, self.clip = accelerator, name, clip
        self.gradients, self.metrics = learner.gradients[name], learner.metrics
        learner.optimizers[name].register_step_pre_hook(self)

    def __call__(self, optimizer: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        gradients = self.gradients
        gradients.begin()
        # Every process must step the same optimizers equally often. If one skipped a step, the average below would mix
        # the gradients of two models, without an error. So all first say which model they step, for the how-manieth
        # time, and the mean must be what each of them said. The loss travels along: its mean is checked below.
        if self.accelerator.num_processes > 1:
            if len(arguments) > 1 or keywords.get("closure") is not None:
                raise RuntimeError(f"model {self.name!r}: step(closure) works on one process only")
            gradients.agree(self.accelerator.reduce(gradients.place(), "mean"))
            # One flat vector, hence one reduce for all parameters. One that has a gradient on no process keeps None: a
            # zero would let weight decay move it.
            gradients.unpack(self.accelerator.reduce(gradients.packed(), "mean"))
        norm = gradients.norm()
        if norm is None:
            return
        # A loss or gradient that is not finite stops the run here, before it can reach a weight. A GPU is not waited
        # for: it skips the update by itself, and the flag is read before the next log, evaluation or save.
        gradients.guard(norm)
        if self.clip > 0:
            gradients.clip(self.clip, norm)
        gradients.gate()
        self.metrics.add({f"train/grad_norm.{self.name}": norm})


# ---- what a run is built from ---------------------------------------------------------------------------------------
# Components come from the registries by name. They share no base class: what one must have is in protocols.py, and is
# checked here, before anything is trained, so that a mistake in a plugin is one line that names it.


def build(option: str, name: str, options: Any, *arguments: Any, **keywords: Any) -> Any:
    """Build what `--<option> NAME` chose. Raises UserError: it breaks its protocol, or fails."""
    with one_line(f"{option} {name!r}"):
        factory = contracts.instantiate(REGISTRIES[option][name], options)
        contracts.check(factory, protocols.FACTORIES[option])
        product = factory.build(*arguments, **keywords)
        contracts.check_product(product, protocols.FACTORIES[option])
    return product


def build_dataset(args: Args, accelerator: Accelerator, run: Run) -> dict[str, Any]:
    """The dataset, first on one process of each machine, so that the others find what that one downloads or caches."""
    local_rank, several = accelerator.local_process_index, accelerator.num_processes > 1
    launch = {"local_rank": local_rank, "dist_enabled": several, "save_dir": str(run.path)}
    factory = (args.dataset, args.dataset_options)
    make = partial(build, "dataset", *factory, opt_params=launch, params=asdict(args.dataset_options))
    # A resumed run refuses other data than it began with.
    return run.inherited.same_data(parallel.in_turns(accelerator.is_local_main_process, make))


def build_learner(
    args: Args, accelerator: Accelerator, run: Run, spec: dict[str, Any], updates: int, base: Any = None
) -> Learner:
    """Models, loss, one optimizer for each model that is trained, and the trainer; the same on all processes."""
    cls, device = REGISTRIES["trainer"][args.trainer], accelerator.device
    build_model = lambda name, spec: build("model", *args.models[name], spec)  # noqa: E731
    # An encoder is built first, the others for its output; a trainer may have some of them built for another spec.
    with run.inherited.weights_follow():
        models = build_models(list(args.models), build_model, spec, contracts.model_spec_of(cls, args.trainer_options))
    loss = build("loss", args.loss, args.loss_options).to(device)
    if any(parameter.requires_grad for parameter in loss.parameters()):
        models["loss"] = loss  # it is trained, so it has an optimizer and a place in checkpoints
    # Weights of other runs come before the optimizers, which leave out what is frozen, and before the trainer, which
    # copies its target networks. A resumed run has them in its folder.
    initialise(models.to(device), args, run.inherited)
    factory = with_length(args.optimizer_options, updates)  # of its learning-rate schedule
    optimizers = {
        name: build("optimizer", args.optimizer, for_model(factory, name, models), parameters)
        for name, parameters in trainable(models, args.freeze).items()
    }
    with one_line(f"trainer {args.trainer!r}"):
        trainer = contracts.construct(cls, models, optimizers, loss, spec, args.trainer_options, device, base)
        contracts.check(trainer, protocols.Trainer)
        # Here averages of the weights join, all that the trainer has added moves to the device, and every process takes
        # rank 0's weights and buffers, whatever it had drawn itself.
        how = (args.ema_decay, args.grad_accumulation, args.freeze, updates)
        learner = Learner(trainer, models, optimizers, loss, device, *how)
    for name in optimizers:
        StepHook(accelerator, learner, name, args.grad_clip)
    if args.debug:
        debug.watch(learner, run)
    return learner


# ---- the run --------------------------------------------------------------------------------------------------------


def learn(args: Args, accelerator: Accelerator, run: Run) -> None:
    """From data to a policy: build everything, continue from a checkpoint if there is one, and loop over batches."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes

    # Data, in the form that the trainer asks for: items as they are, transitions, goals.
    cls = REGISTRIES["trainer"][args.trainer]
    data = build_dataset(args, accelerator, run)
    with one_line(f"trainer {args.trainer!r}"):
        data = prepared(data, cls, args.trainer, args.trainer_options)
    spec = args.augment.cropped(describe_data(data, f"dataset {args.dataset!r}"))
    modes = pairs("--normalise", (*args.defaults.get("normalise", ()), *args.normalise))
    normaliser = run.inherited.normaliser(spec, modes).to(device)  # of the batches here, and saved with the policy
    spec = normaliser.with_ranges(spec)

    # Batches are a function of (seed, step), whatever the number of processes; so a resumed run gets the same ones.
    dataset, parts = data["dataset"], world * args.grad_accumulation
    batch_size, note = fit_batch(args.batch_size, len(dataset), parts, args.given("batch-size"))
    batches = Batches(dataset, batch_size, args.seed, rank, world, args.grad_accumulation, args.workers, device)
    args.batch_size, args.workers = batch_size, batches.workers  # the run records what is used

    # What is trained, and how it is measured: by the held-out loss, and by episodes in the environment asked for, or in
    # the data's own.
    learner = build_learner(args, accelerator, run, spec, args.steps)
    update = compiled(learner, run.say) if args.compile else learner.update
    policy = acting_policy(learner, normaliser, spec, args)
    evaluator = Evaluator.of(args, run, policy, choose_env(args, data.get("env")), partial(build, "env"), world, data)
    if evaluator:
        evaluator.reference = data.get("reference_scores")
    held_out = HeldOut(learner, data.get("validation"), normaliser, batch_size, run.tick)

    # Where the run begins. From here on each process draws its own noise; a resumed run finds everything as it was.
    set_seed(derive_seed(args.seed, rank) % 2**32)
    clock = Clock(args, run, evaluates=bool(evaluator or held_out))
    checkpoints = Checkpoints(run, args, learner, policy, clock=clock)
    if args.resume:
        checkpoints.restore()
    size = f"{len(dataset)} samples, batch {batch_size}{note}, {args.steps} steps"
    run.begin(args, evaluator.env if evaluator else None, accelerator.mixed_precision, size)
    run.say(*no_effect(args, learner, batches))

    # The loop. It learns at its end: what is due before the first step, or after the last one, is done where it always
    # is, and a resumed run does what its predecessor did not come to do.
    precision = autocast(accelerator)
    stream = run.closing(batches.with_rows(run.step))  # it may have workers
    while True:
        # Evaluate, log and save what is due by now. All processes decide the same, also on a clock or a signal.
        if clock.due("eval"):
            with clock.owing_evaluation(), learner.evaluating():
                learner.metrics.add(run.best.held_out(run.step, held_out.measure(run.step)))
                if evaluator:
                    run.evaluated(*evaluator.evaluate(run.step))
        if clock.due("log", held_out.measured_at == run.step):
            run.log(learner.summary() | clock.rates(batch_size))
        if clock.due("save", run.best.improved(run.step)):
            checkpoints.save(last=clock.over)
        if clock.over:
            break

        # Learn: one update, from the batch that (seed, step) names; the gradients of its micro-steps add up.
        learner.begin(run.step, *batches.epoch(run.step, args.steps))
        for _ in range(args.grad_accumulation):
            with clock.measure("data_s"):
                rows, batch = next(stream)
                batch = to_device(batch, device)
            with clock.measure("step_s"), precision:
                update(normaliser(args.augment(batch, rows, args.seed, run.step)))
        run.advance(1)

    # What is left: the policy, a film of it and the curves; a run that was stopped only says how to resume it.
    if clock.unfinished:
        run.preempted()
        return
    with learner.evaluating():
        run.leave_policy(policy, evaluator, args)
    if args.debug:
        debug.load_again(run, checkpoints, policy is not None)
    run.finished()


def main(argv: list[str]) -> int:
    """Read the arguments, open the run folder, and learn in it; returns the exit code."""
    args = parse(Args, argv, REGISTRIES)
    if args.seeds:
        return Seeds(args, argv).run()
    accelerator = start_accelerator(args)
    set_seed(args.seed % 2**32)  # the same on all processes until the models exist
    with Run.of(args, accelerator.process_index) as run, torch.autograd.set_detect_anomaly(args.debug):
        if not run.already_finished(args.steps):
            run.say(matmul.choose(args.matmul, args.stored.get("machine", {}).get("matmul"), accelerator.device))
            learn(args, accelerator, run)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_script(main)
