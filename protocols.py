"""What fits what: the contracts between the two scripts and every pluggable component.

The contracts are structural. A component needs no base class and never imports this file; the scripts check each
component with `isinstance(component, Protocol)` and then with `violation`, because `isinstance` looks at names alone.

Shapes: B samples, To observation steps, Ta action steps, Ds state width, Da action width. A batch is a dict of tensors:

    observation.state               [B, Ds], or [B, To, Ds] with a history        float32
    observation.environment_state   like observation.state                        float32
    observation.images.<camera>     [B, C, H, W], or [B, To, C, H, W]              uint8
    action                          [B, Da], or [B, Ta, Da] when chunked          float32
                                    [B], the number of a discrete one              int64
    action_is_pad                   [B, Ta], only when chunked                    bool
    reward, terminated, truncated   [B]                                           float32, bool, bool
    next.<observation key>          the successor, never across an episode's end
    next.is_pad                     [B], only where some successor is not stored    bool
    task, source                    list of B texts: the task, a mixture's source

Every key that has statistics arrives normalised. Bootstrapping stops at `terminated`, never at `truncated`.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer


@runtime_checkable
class Trainer(Protocol):
    """One algorithm. It calls `loss.backward()`, `optimizer.step()`, `optimizer.zero_grad()`; the script does the rest.

    The constructor may also name any of `device`, `norm_stats`, `spec` and `config` (the instance of its own `Config`
    dataclass). Every tensor with state lives in `models`: the trainer adds target networks there.

    Optional: `needs` (model name -> default model; one named `encoder` is built first, and the others are built for
    what it makes of the observations), `defaults` (option -> value that suits it), `accumulates = True` (one step of
    every optimizer per call, so that gradients may be accumulated), `losses(data) -> (loss, metrics)` (what the
    held-out loss is computed with, and what `--compile` compiles unless `compiles` names other methods of that kind),
    `policy() -> nn.Module` (normalised observations in, normalised action or chunk out; otherwise `models["policy"]`
    acts), `explorer() -> nn.Module` (the same, for what acts while the online script collects; otherwise the policy
    does), `state_dict()` and `load_state_dict()` (tensors and JSON values), `cycle` (after so many calls the Python of
    `train_step` repeats, and it waits for no tensor's value, so that `--compile` may record its kernels in CUDA graphs;
    it may count its calls in `updates`), `needs_data = True` (it learns online only with a dataset beside), `imitates =
    True` (it does as the data does, so that its own experience teaches it nothing: never online). An explorer with an
    attribute `env_step` finds there how many steps its environments have made.

    Optional and static: `window(config) -> options` (it learns from transitions, of a dataset or of the replay buffer,
    and these options of `datasets.transitions.Transitions` say what one of them is: `discount`, `n_step`, `chunk`,
    `next_action`, `to_go`), `prepare(data, config) -> data` (otherwise, what a dataset's `build` returned as this
    trainer learns from it: goals, ...), `sees(model, spec, config) -> spec` (what one of its models is built for, where
    that is not the data's spec), and `base(config) -> (run folder, scale)` (a frozen policy that its actions correct,
    see `experience/frozen_base.py`). Without `window`, `n_step` and `discount` in `Config` shape the online script's
    batches: `reward` is the sum over n steps, `next.*` and `terminated` are those of the last of them, and `discount`
    [B] is the factor of the value that follows.

    A trainer learns on policy when it has `estimate(rollout) -> rollout` and the static `rollout(config) -> {"steps",
    "epochs"}`: it is given so many steps of each environment `[T, N, ...]`, normalised, with the actions as they were
    drawn and the flags `ended` and `valid`, adds what it learns from, and then gets that in minibatches.
    """

    def __init__(self, models: nn.ModuleDict, optimizers: dict[str, Optimizer], loss: nn.Module) -> None: ...

    def train_step(self, data: dict[str, Any]) -> dict[str, float | Tensor]:
        """Learn from one batch; return metric name -> scalar. May also take `epoch`, `total_epochs`, `iterations`."""
        ...


@runtime_checkable
class DatasetFactory(Protocol):
    """Reads or makes data. Called as `build(opt_params={"local_rank", "dist_enabled", "save_dir"}, params=options)`."""

    def build(self, **kwargs: Any) -> dict[str, Any]:
        """Return {"dataset": map-style Dataset of dicts, "norm_stats": {key: {"mean", "std", "min", "max", ...}}}.

        Optional entries: "validation" (another Dataset), "env" ({"name": environment, its options}) and
        "reference_scores" (the random and the expert return, by which D4RL normalises). A dataset may offer
        `get_batch(indices [B], seed) -> dict of batched tensors`, which resident data should have; one that decodes
        says `resident = False` and gets worker processes; one whose items have a `task` lists the texts in `tasks`.
        More of what it may say is in `components/data/batches.py`.
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

    The acting policy maps a batch of observations (the dict, or the bare `observation.state` tensor) to `action`. An
    encoder maps a batch to a batch and describes it in `spec`; a denoiser (`denoises = True`) has
    `condition(observation)` and maps (noisy action, time in [0, 1], that condition) to a tensor of the action's shape.
    """

    def build(self, spec: dict[str, Any]) -> nn.Module: ...


@runtime_checkable
class EnvFactory(Protocol):
    """Makes `num_envs` environments as one `gymnasium.vector.VectorEnv`; `reset(seed=[...])` fixes the episodes.

    Any autoreset mode will do. A vector environment may offer `state_dict()` and `load_state_dict()` (tensors and JSON
    values: everything, also what its wrappers keep); then a resumed online run goes on in the middle of its episodes.
    In `tracked` it may name numbers of its `info`: evaluations record their last and largest values.
    """

    def build(self, num_envs: int, seed: int) -> Any: ...


# What the loop passes to a `train_step` that names it: pass over the data, number of passes, calls that took effect.
LOOP_PASSES = ("epoch", "total_epochs", "iterations")

# How the scripts call each method: (method, positional arguments, keyword arguments).
CALLS: dict[type, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    Trainer: ("train_step", ("data",), ()),
    DatasetFactory: ("build", (), ("opt_params", "params")),
    LossFactory: ("build", (), ()),
    OptimizerFactory: ("build", ("params",), ()),
    ModelFactory: ("build", ("spec",), ()),
    EnvFactory: ("build", ("num_envs", "seed"), ()),
}


def violation(component: object, protocol: type) -> str:
    """Say in one line how `component` breaks `protocol`, or return "" when the scripts can call it."""
    method, positional, keywords = CALLS[protocol]
    expected = f"{method}({', '.join(positional + tuple(f'{name}=...' for name in keywords))})"
    found = getattr(component, method, None)
    if not isinstance(component, protocol) or not callable(found):
        have = "is missing" if found is None else f"is a {type(found).__name__}"
        return f"{protocol.__name__} needs {expected}, but {type(component).__name__}.{method} {have}"
    if protocol is Trainer:
        keywords = tuple(accepted(found, LOOP_PASSES))
    return unbindable(found, method, positional, keywords)


def misfit(product: object, protocol: type) -> str:
    """What `build` should have returned, or "" when it did."""
    if protocol is DatasetFactory:
        entries = {"dataset", "norm_stats"}
        return "" if isinstance(product, dict) and entries <= set(product) else f"a dict with {sorted(entries)}"
    if protocol is EnvFactory:
        wants = ("num_envs", "reset", "step", "single_action_space", "single_observation_space")
        lacks = [name for name in wants if not hasattr(product, name)]
        return f"a gymnasium.vector.VectorEnv, {lacks[0]!r} is missing" if lacks else ""
    kinds: dict[type, type] = {LossFactory: nn.Module, ModelFactory: nn.Module, OptimizerFactory: Optimizer}
    wanted = kinds.get(protocol, object)
    return "" if isinstance(product, wanted) else f"a {wanted.__name__}, found {type(product).__name__}"


def accepted(function: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """Those of `names` that a function takes as keywords."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [name for name in names if takes_all or name in {p.name for p in parameters}]


def unbindable(function: Any, name: str, positional: Iterable[str], keywords: Iterable[str] = ()) -> str:
    """Say in one line why `function` cannot be called with these arguments, or return ""."""
    signature = inspect.signature(function)
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        expected = ", ".join([*positional, *(f"{keyword}=..." for keyword in keywords)])
        return f"expected {name}({expected}), found {name}{signature}: {error}"
    return ""
