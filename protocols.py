"""The contracts between the two scripts and all pluggable components.

The contracts are structural. A component needs no base class and never imports this file; the scripts check each
component by `components.contracts.check`, which binds the arguments of these signatures besides `isinstance`.

Shapes: B samples, To observation steps, Ta action steps, Ds state width, Da action width. A batch is a dict of tensors:

    observation.state               [B, Ds], or [B, To, Ds] with a history        float32
    observation.environment_state   like observation.state                        float32
    observation.images.<camera>     [B, C, H, W], or [B, To, C, H, W]              uint8
    action                          [B, Da], or [B, Ta, Da] when chunked          float32
                                    [B], the number of a discrete one              int64
    action_is_pad                   [B, Ta], only when chunked                    bool
    reward, terminated, truncated   [B]                                           float32, bool, bool
    intervention                    [B], only where the data has it: an expert    bool
                                    or a person, not the policy, chose the action
    next.<observation key>          the successor, never across an episode's end
    next.is_pad                     [B], only where some successor is not stored    bool
    task, source                    list of B texts: the task, a mixture's source

Every key that has statistics arrives normalised. Bootstrapping stops at `terminated`, never at `truncated`.

A trainer has a constructor and `train_step`; all else is optional. `components/contracts.py` reads it and defines the
objects that are named here:

    member of a trainer                 who calls or reads it                     default

    needs: {model: default entry}       the scripts, to build the models; an      {"policy": "mlp"}
                                        `encoder` comes first, the others are
                                        built for its output
    defaults: {option: value}           the scripts, for their options            {}
    debug_options: {option: value}      the scripts, under --debug                {}
    Config (frozen dataclass)           the scripts, as --trainer.X; passed as    no options
                                        `config`
    data(config) (static)               `prepared` and the online script: a       unchanged items; online,
                                        Window, Goals, Rollouts, Demonstrations   `n_step` and `discount`
                                        or Corrections                            of Config shape the batches
    model_spec(model, spec, config)     `build_models`: the spec that this        the data's
      (static)                          model is built for
    base(config) (static)               `experience/frozen_base.py`: (run         none
                                        folder, scale) of a frozen policy that
                                        the trainer's actions correct or, with
                                        None for the scale, that it steers

    losses(data) -> (loss, metrics)     the held-out loss, and --compile          no held-out loss
    estimate(rollout) -> rollout        `Rollout`, once for each; required        none
                                        with Rollouts
    adds_auxiliary: (model, ...)        the scripts, which refuse other models     none
                                        with losses of their own (`ModelFactory`)
    accumulates: bool                   the scripts: one step of every            False, so that
                                        optimizer per call                        --grad-accumulation is 1
    promises: Promises                  --compile, for CUDA graphs, and the       losses alone are compiled
                                        methods to compile
    spans: {option: unit}               the scripts, which say that a schedule    none
                                        of so many "updates" or "environment
                                        steps" is longer than the run
    updates: int                        CUDA graphs, to keep the trainer's        not counted
                                        count of its calls

    policy() -> nn.Module               evaluation, export: normalised            models["policy"]
                                        observations to action or chunk
    explorer() -> nn.Module             the online script, to collect; its        the policy
                                        `env_step`, if any, is set to the
                                        environment steps so far, and
                                        `random_until` to the first that it
                                        need not draw at random

    state_dict(), load_state_dict(s)    checkpoints: tensors and JSON values      nothing; tensors with
                                                                                  state live in `models`
"""

from collections.abc import Iterable
from typing import Annotated, Any, NotRequired, Protocol, TypedDict, Unpack, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset


@runtime_checkable
class Trainer(Protocol):
    """One algorithm. It calls `loss.backward()`, `optimizer.step()`, `optimizer.zero_grad()`; the script does the rest.

    The constructor may also name any of `device`, `norm_stats`, `spec`, `config` and `base`, a frozen policy's module.
    Every tensor with state lives in `models`: the trainer adds target networks there.
    """

    def __init__(self, models: nn.ModuleDict, optimizers: dict[str, Optimizer], loss: nn.Module) -> None: ...

    def train_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Learn from one batch; return metric name -> float, or tensor that detaches to a scalar.

        It may also name `epoch` (the pass over the data, from 0), `total_epochs` and `iterations` (calls that took
        effect so far).
        """
        ...


# ---- what a trainer may offer besides ------------------------------------------------------------------------------


@runtime_checkable
class RequestsData(Protocol):
    """A trainer that requests its data."""

    @staticmethod
    def data(config: Any) -> Any: ...


@runtime_checkable
class SpecifiesModels(Protocol):
    """A trainer with models that are built for another spec than the data's."""

    @staticmethod
    def model_spec(model: str, spec: dict[str, Any], config: Any) -> dict[str, Any]: ...


@runtime_checkable
class CorrectsPolicy(Protocol):
    """A trainer whose actions correct those of a frozen policy, or that steers one."""

    @staticmethod
    def base(config: Any) -> tuple[str, float | None]: ...


@runtime_checkable
class HasLosses(Protocol):
    """A trainer whose loss can be computed without an update."""

    def losses(self, data: dict[str, Any]) -> Any: ...


@runtime_checkable
class OnPolicy(Protocol):
    """A trainer that asks for Rollouts, and estimates advantages or the like from each."""

    def estimate(self, rollout: dict[str, Tensor]) -> dict[str, Tensor]: ...


@runtime_checkable
class HasPolicy(Protocol):
    """A trainer whose policy is more than `models["policy"]`; a stochastic module has `noise_shape`."""

    def policy(self) -> nn.Module: ...


@runtime_checkable
class Explores(Protocol):
    """A trainer with another policy for collecting data."""

    def explorer(self) -> nn.Module: ...


@runtime_checkable
class HasState(Protocol):
    """A trainer with state beside its models: tensors and JSON values."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


# ---- factories -----------------------------------------------------------------------------------------------------


class BuildKeywords(TypedDict):
    """Keywords of a dataset's `build`."""

    opt_params: dict[str, Any]  # {"local_rank", "dist_enabled", "save_dir"}
    params: dict[str, Any]  # the factory's options


class Built(TypedDict):
    """Result of a dataset's `build`."""

    dataset: Dataset  # map-style, of dicts
    norm_stats: dict[str, Any]  # {key: {"mean", "std", "min", "max", ...}}
    validation: NotRequired[Dataset]
    env: NotRequired[dict[str, Any]]  # {"name": environment, its options}
    reference_scores: NotRequired[tuple[float, float]]  # random and expert return, by which D4RL normalises


@runtime_checkable
class DatasetFactory(Protocol):
    """Reads or makes data."""

    def build(self, **kwargs: Unpack[BuildKeywords]) -> Annotated[dict[str, Any], Built]:
        """A dataset may offer `get_batch(indices [B], seed) -> dict of batched tensors`, which resident data should.

        A dataset that decodes sets `resident = False` and is read by worker processes; one whose items have a `task`
        lists the texts in `tasks`. A resumed run compares what `fingerprint()` returns, such as a version; without it
        the number of items, the statistics and a few items. Further attributes are in `components/data/batches.py`.
        A factory whose options name the environment may say so by `environment()`, which returns what `env` will be.
        """
        ...


@runtime_checkable
class LossFactory(Protocol):
    """Makes a loss module; the supervised ones map (prediction, target) of equal shapes to a scalar."""

    def build(self) -> nn.Module: ...


@runtime_checkable
class OptimizerFactory(Protocol):
    """Makes the optimizer of one named model, complete with its learning-rate schedule."""

    def build(self, params: Iterable[nn.Parameter]) -> Optimizer: ...


@runtime_checkable
class ModelFactory(Protocol):
    """Makes one network from `spec`: {key: {"shape": of one item, "dtype": str, "stats": its statistics, if any}}.

    An option that names a file of initial weights is annotated by `contracts.Place`, and `build` opens the file only
    where `contracts.reads_weights()`: a saved policy and a resumed run do without it.

    The policy maps a batch of observations (the dict, or the bare `observation.state` tensor) to `action`. An encoder
    maps a batch to a batch and describes it in `spec`; a denoiser (`denoises = True`) has `condition(observation)` and
    maps (noisy action, time in [0, 1], that condition) to a tensor of the action's shape.

    A network may have losses of its own, which trainers with `adds_auxiliary` add and log: `auxiliary_weights`,
    {name: weight}, and `auxiliary(...)`, which returns (what `forward` returns, {name: scalar}). It takes the same
    arguments, and in `bc` the keywords `target` and `is_pad`, the latter None without padding. They are means over
    samples, or else use the means of all processes.
    """

    def build(self, spec: dict[str, Any]) -> nn.Module: ...


class VectorEnv(Protocol):
    """The part of `gymnasium.vector.VectorEnv` that the scripts use; all autoreset modes are supported.

    `metadata["autoreset_mode"]` says which. Without it, `final_obs` of the first `info` that ends an episode means
    SAME_STEP. Rewards and flags are `[N]`; a reset under DISABLED takes `options={"reset_mask": [N] bool}`.

    It may offer `state_dict()` and `load_state_dict()` (tensors and JSON values: everything, also what its wrappers
    keep); then a resumed online run continues in the middle of its episodes. In `tracked` it may name numbers of its
    `info`: evaluations record their last and largest values. Its `hold(observation, last action) -> action`, all `[n,
    ...]`, tells evaluations with a delay how a robot stands still; NaN is the last action before the first. By default
    it is zeros. Its `expert() -> actions [N, ...]` are those that a scripted expert would take now, whatever it
    observes, of which `--trainer.expert scripted` learns; where an episode is over, they are ignored.
    """

    num_envs: int
    single_action_space: Any
    single_observation_space: Any

    def reset(self, *, seed: Any = None, options: Any = None) -> Any: ...

    def step(self, actions: Any) -> Any: ...


@runtime_checkable
class EnvFactory(Protocol):
    """Makes `num_envs` environments as one vector environment; `reset(seed=[...])` fixes the episodes."""

    def build(self, num_envs: int, seed: int) -> VectorEnv: ...


@runtime_checkable
class Robot(Protocol):
    """What `components.acting.player.Player` drives, one of it and at a fixed rate. All is called from one thread.

    A method returns within a part of the control period, or raises; the player stops the robot then.
    """

    def observe(self) -> dict[str, Any]:
        """The newest observation by the data's keys, without a batch: arrays, pictures as uint8, and `task`, if any."""
        ...

    def act(self, action: Any) -> None:
        """Send one action, `[Da]` float32 in the data's units; it does not wait until it is executed."""
        ...

    def stop(self) -> None:
        """Bring the robot to rest. Called once at the end of a run, whatever ended it, before the first action too."""
        ...


# The option that chooses a factory -> its contract.
FACTORIES: dict[str, type] = {
    "dataset": DatasetFactory,
    "model": ModelFactory,
    "loss": LossFactory,
    "optimizer": OptimizerFactory,
    "env": EnvFactory,
}
