"""Learn a policy in an environment: online reinforcement learning, alone or on top of data and of offline runs.

accelerate launch online_trainer.py --trainer sac                         # Pendulum-v1 in about two minutes
python online_trainer.py --trainer ppo --env.id CartPole-v1 --steps 50000 # on policy
python online_trainer.py --trainer rlpd --dataset metaworld --dataset.task push-v3     # beside demonstrations
python online_trainer.py --trainer iql --init-from runs/a --dataset d4rl --dataset.path old.hdf5    # on from offline
python online_trainer.py --trainer residual --trainer.base runs/b --env metaworld      # on top of a frozen policy
python online_trainer.py --trainer dsrl --trainer.base runs/c --env metaworld          # by the noise of a frozen flow
accelerate launch --num_processes 8 online_trainer.py --trainer sac       # eight GPUs of one machine
ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 online_trainer.py --trainer sac
python online_trainer.py --trainer sac --env.id HalfCheetah-v5 --help     # the options of what is chosen
python online_trainer.py --list                                           # all components, a line each
python online_trainer.py --trainer sac --debug                            # small, in one process, with a debugger
python online_trainer.py --resume runs/x                                  # resume a run where it stopped
python online_trainer.py --config runs/x/args.json --seeds 0 1 2          # a run's options, or a TOML's; three seeds

The file reads top to bottom: the options, then accelerate (how a plain optimizer step becomes right on several
processes), then how one run is built, and its loop: act, remember, learn. What stands between the options and the run
is the same text as in offline_trainer.py.
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
from components.data.batches import fit_batch, fit_envs
from components.data.features import build_models
from components.data.normalisation import RunningStatistics
from components.data.random_state import derive_seed
from components.envs.vector import Environments
from components.errors import one_line
from components.experience import plan, recording
from components.experience.collection import Collector, describe_env
from components.experience.frozen_base import base_of, relabelled
from components.experience.guide import guide_of
from components.experience.memory import memory_of, old_transitions
from components.experience.replay import windowed
from components.learning.learner import Learner
from components.optimizers import for_model, trainable, with_length
from components.run import debug
from components.run.arguments import FP16, Arguments, Rule, parse
from components.run.checkpoint import Checkpoints, initialise
from components.run.clock import Clock
from components.run.command_line import choose, choose_some
from components.run.overlooked import check_launch, no_effect
from components.run.process import run_script
from components.run.record import Run
from components.run.seeds import Seeds
from components.speed import matmul
from components.speed.compile import compiled

# ---- arguments ------------------------------------------------------------------------------------------------------
# A `Rule` beside a type says its smallest value, whether it may change when a run is resumed, what it is under --debug,
# and whether only a replay buffer heeds it. Each chosen component adds its own options: see --help.


@dataclass(kw_only=True)
class Args(Arguments):
    """Learn a policy in an environment."""

    # What is trained, on what, and how it is measured: names of the registries, whose options join by themselves.
    trainer: Annotated[str, choose(REGISTRIES["trainer"])] = "sac"
    """Algorithm; it has defaults of its own for most of what follows."""
    dataset: Annotated[str, choose(REGISTRIES["dataset"], "none"), Rule(replay=True)] = "none"
    """Old transitions to learn from beside the new ones."""
    dataset_ratio: Annotated[float, tyro.conf.arg(name="dataset.ratio")] = 0.5
    """Share of every batch that comes from the dataset."""
    model: Annotated[tuple[str, ...], choose_some(REGISTRIES["model"])] = ()
    """Networks: the policy's, an image encoder's, or as NAME=ENTRY that of another model."""
    loss: Annotated[str, choose(REGISTRIES["loss"])] = "mse"
    """Training objective."""
    optimizer: Annotated[str, choose(REGISTRIES["optimizer"])] = "adam"
    """Optimizer of every model."""
    env: Annotated[str, choose(REGISTRIES["env"])] = "gymnasium"
    """Environment to learn and to be evaluated in."""
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
    steps: Annotated[int, Rule(1, resume=True, debug=60)] = 100_000
    """Environment steps over all processes."""
    num_envs: Annotated[int, Rule(1, debug=2)] = 4
    """Environments over all processes; each process steps its part of them together."""
    learning_starts: Annotated[int, Rule(0, debug=20, replay=True)] = 1000
    """Environment steps before the first update, whose actions are drawn uniformly."""
    updates_per_step: Annotated[float, Rule(0, replay=True)] = 1.0
    """Updates per environment step."""
    buffer_size: Annotated[int, Rule(1, debug=1000, replay=True)] = 1_000_000
    """Transitions that the replay buffer keeps, over all processes."""
    normalise_observations: bool = False
    """Give vector observations mean 0 and deviation 1, by what the environments have returned so far."""
    normalise_rewards: bool = False
    """Divide the rewards by the deviation of the discounted return so far."""
    reward_shift: float | None = None
    """Added to every reward of the training; None takes what the dataset adds, or that of the run that this one begins
    from."""
    reward_scale: float | None = None
    """Factor on every reward of the training, after the shift; None as for the shift."""
    save_buffer: bool = True
    """Keep the replay buffer in the checkpoints; without it a resumed run fills a new one."""
    env_restarts: Annotated[int, Rule(0, resume=True)] = 10
    """Faults of its environments that each process mends by new ones."""
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
    policy: Inference = Inference()
    """How the policy acts, in evaluations and wherever it is loaded."""
    # What is written when, and how the policy is evaluated.
    run_dir: str = ""
    """Folder of the run; by default one under runs/ with the time in its name."""
    log_every: Annotated[int, Rule(1, resume=True, debug=10)] = 50
    """Environment steps between lines of metrics.jsonl, which wait for the end of a rollout."""
    eval_every: Annotated[int, Rule(0, resume=True, debug=20)] = 1000
    """Environment steps between evaluations; 0 evaluates at the end only."""
    eval_episodes: Annotated[int, Rule(0, resume=True, debug=1)] = 20
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
    save_every: Annotated[int, Rule(0, resume=True, debug=20)] = 5000
    """Environment steps between checkpoints; 0 saves the best and the last only."""
    save_minutes: Annotated[float, Rule(0)] = 5.0
    """Minutes after which a checkpoint is due anyway; 0 for never."""
    keep_last: Annotated[int, Rule(1, resume=True)] = 2
    """Checkpoints to keep, besides the best."""
    save_dataset: Annotated[str, Rule(resume=True), Place(made=True)] = ""
    """Folder of a dataset to write when the run has finished; empty for none."""
    save_format: Annotated[Literal["minari", "lerobot"], Rule(resume=True)] = "minari"
    """Format of that dataset."""
    save_what: Annotated[Literal["policy", "collected"], Rule(resume=True)] = "policy"
    """Its contents: episodes of the final policy, or what the replay buffer still holds."""
    save_episodes: Annotated[int, Rule(1, resume=True)] = 50
    """Episodes of the final policy."""
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
    """From environments to a policy: build everything, continue from a checkpoint if there is one, and loop."""
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes

    # What the trainer asks for: rollouts of its own policy, or transitions, beside those of a dataset if one is chosen,
    # which may know the environment.
    cls, config = REGISTRIES["trainer"][args.trainer], args.trainer_options
    request, window = contracts.request_of(cls, config), contracts.window_of(cls, config)
    plan.check_options(request, args)
    recording.check_destination(args, request)
    data = build_dataset(args, accelerator, run) if args.dataset != "none" else {}
    env = choose_env(args, data.get("env")) if data else (args.env, args.env_options)
    if env[0] == "none":
        raise UserError(f"dataset {args.dataset!r} knows no environment to learn in; name one with --env")

    # Environments: each process steps its part of them together. A trainer may correct the actions of a frozen policy,
    # which is a part of the environments then, so that all else need not know of it; or steer one by its noise.
    num_envs, note = fit_envs(args, world)
    seed = derive_seed(args.seed, rank) % 2**31
    base = base_of(cls, config, run)
    with one_line(f"env {env[0]!r}"):
        make: Any = partial(build, "env", *env)
        make_all = base.under(make) if base else make
        environments = run.closing(Environments(make_all, num_envs // world, seed, args.env_timeout))
        spec = describe_env(environments)

    # Normalisation: as in the run that this one begins from or steers, or by what the environments returned so far.
    scaling = (args.normalise_observations, args.normalise_rewards, window.discount)
    modes = run.inherited.normalisation(args.init_from, spec, base)  # whose statistics join `spec`
    statistics = RunningStatistics(spec, *scaling, environments.num_envs)
    normaliser = statistics.normaliser_of(spec, modes).to(device)
    described = normaliser.with_ranges(windowed(spec, window))  # what the models are built for
    with one_line(f"dataset {args.dataset!r}"):
        old = old_transitions(relabelled(data, base), cls, args, described, normaliser)

    # What is trained, for a schedule of so many updates, and its memory, which says how many are due when.
    fit_batch(args.batch_size, args.batch_size, world * args.grad_accumulation, asked=True)
    updates, more = plan.planned_updates(request, args, num_envs)
    learner = build_learner(args, accelerator, run, described, max(updates, 1), base and base.module)
    update = compiled(learner, run.say) if args.compile else learner.update
    memory = memory_of(args, run, learner, normaliser, spec, old, (num_envs, world))

    # The policy of evaluations, and the explorer, which acts while data is collected. Each has a history of its own,
    # since evaluations come between the explorer's steps.
    policy = acting_policy(learner, normaliser, described, args, needed=True, base=base)
    explorer = policy.exploring(contracts.exploring_module(learner.trainer, policy.module))
    rewards = plan.rewards_of(args, run.inherited, base)
    first = rank * environments.num_envs
    guide = guide_of(request, args, run, environments, world, device)
    collector = Collector(environments, args.seed, first, args.env_restarts, run.report, rewards, guide)
    evaluator = Evaluator.of(args, run, policy, env, partial(build, "env"), world)

    # Where the run begins. From here on each process draws its own noise; a resumed run finds everything as it was, but
    # for environments that cannot be saved: their episodes are cut. Weights from elsewhere are evaluated first.
    set_seed(derive_seed(args.seed, rank) % 2**32)
    clock = Clock(args, run, evaluates=evaluator is not None, at_start=bool(args.init_from or base))
    state = {"clock": clock, "statistics": statistics, "memory": memory, "collector": collector, "explorer": explorer}
    checkpoints = Checkpoints(run, args, learner, policy, **state)
    if args.resume:
        checkpoints.restore()
    size = f"{num_envs} environments{note}{more}, batch {args.batch_size}, {args.steps} steps"
    run.begin(args, {"name": env[0], **asdict(env[1])}, accelerator.mixed_precision, size)
    run.say(*memory.describe(args.steps // num_envs, world), plan.describe_rewards(rewards), *no_effect(args, learner))
    collector.begin(run.step, memory, statistics, explorer)
    # Weights from elsewhere explore from the start, and an explorer may have a random beginning of its own.
    random_until = contracts.random_steps(explorer.module, 0 if args.init_from else memory.learning_starts)

    # The loop. It learns at its end: what is due before the first step, or after the last one, is done where it always
    # is, and a resumed run does what its predecessor did not come to do.
    precision = autocast(accelerator)
    while True:
        # Evaluate, log and save what is due by now. All processes decide the same, also on a clock or a signal.
        if clock.due("eval"):
            with clock.owing_evaluation(), learner.evaluating():
                if evaluator:
                    run.evaluated(*evaluator.evaluate(run.step))
        if clock.due("log", settled=memory.between):
            run.log({"updates": learner.updates} | learner.summary() | clock.rates(args.batch_size, "env_steps"))
            run.write_episodes()
        if clock.due("save", run.best.improved(run.step)):
            checkpoints.save(last=clock.over)
        if clock.over:
            break

        # Act: at random until learning starts, then as the trainer explores. Memory, statistics and explorer follow. A
        # fault of an environment cuts all episodes, and the transitions are None; where there is nothing to cut yet,
        # the collector insists on some.
        with clock.measure("data_s"):
            if run.step < random_until:
                action = collector.random_actions()
            else:
                action = explorer.act(collector.observation, env_step=run.step)
            transitions, episodes = collector.step(action, insist=memory.empty)
            memory.add(transitions)
            statistics.add(transitions)
            explorer.follow(transitions)
        run.advance(num_envs)
        run.count_episodes(episodes, learner.metrics)

        # Learn: so many updates for each environment step, or for each rollout, from batches of the memory, normalised
        # by the statistics as they are now. These change between rollouts only, whose steps are to be alike.
        learner.begin(run.step)
        for _ in range(memory.due()):
            for _ in range(args.grad_accumulation):
                with clock.measure("data_s"):
                    batch = memory.next_batch()
                with clock.measure("step_s"), precision:
                    update(batch)
        if memory.between:
            statistics.settle()

    # What is left: a dataset if one was asked for, the policy, a film of it and the curves; a run that was stopped only
    # says how to resume it.
    if clock.unfinished:
        run.preempted()
        return
    with learner.evaluating():
        recording.save_dataset(args, run, policy, memory, collector, spec, env, make)
        run.leave_policy(policy, evaluator, args)
    if args.debug:
        debug.load_again(run, checkpoints, acts=True)
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
