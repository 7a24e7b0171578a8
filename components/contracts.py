"""The optional members of trainers and models, which are read only here, and the checks of components by protocols.

A trainer requests data by a static `data(config)` that returns one of `Window`, `Goals`, `Rollouts`, `Demonstrations`
and `Corrections`; its `promises` state what may speed it up. The functions below read these and all other optional
members with their defaults; `protocols.py`, which this file does not import, has a table of them. Methods are looked up
on the class: an attribute of an instance, such as a network in `self.policy`, is not one.
"""

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import UserError, nearest

STATE, GOAL = "observation.state", "observation.goal"  # what a goal-conditioned policy observes
LOOP_PASSES = ("epoch", "total_epochs", "iterations")  # what the loop passes to a `train_step` that names it


# ---- the data that a trainer asks for ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Transitions, from a dataset or from the replay buffer: a step, its reward, and its successor.

    `reward` is the discounted sum over a window of steps, `discount` the factor of the value that follows it,
    `terminated` and `next.*` are those of the window's last step. A window never crosses an episode's end.
    """

    discount: float = 0.99
    """Factor per environment step."""
    n_step: int = 1
    """Steps whose rewards are summed, at least those of `chunk`."""
    chunk: int = 1
    """Make `action` the first `[chunk, Da]` of the window, with `action_is_pad` and `complete`: 1.0 unless truncation
    or the end of the data cuts it. Where termination cuts it, its return is known: no later action could change it."""
    next_action: bool = False
    """Add `next.action` `[Da]`, the data's next action; steps without one are left out."""
    to_go: bool = False
    """Add `return_to_go`, the discounted rewards until a terminated step, or the episode's end."""
    needs_dataset: bool = False
    """Online, refuse a run without a dataset beside the environment."""


@dataclass(frozen=True)
class GoalSampling:
    """Where the goal of a step comes from. Raises UserError unless the three shares sum to 1."""

    shares: tuple[float, float, float]
    """Of goals that are the state itself, a later one of the same episode, one of any episode."""
    geometric: bool
    """Distance of a later state: geometric with parameter 1 - discount, or else uniform up to the episode's end."""

    def __post_init__(self) -> None:
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(f"the shares of current, later and random goals must sum to 1, found {self.shares}")


@dataclass(frozen=True)
class Goals:
    """Transitions of a whole dataset with goals that are drawn among its states."""

    actor: GoalSampling
    """How the goals of the policy are drawn."""
    value: GoalSampling | None = None
    """How those of the value functions are drawn; None for a trainer without any."""
    discount: float = 0.99
    """Factor per environment step, for geometric distances."""
    subgoal_steps: int = 0
    """Steps to the subgoals of a hierarchy; 0 for none."""


@dataclass(frozen=True)
class Rollouts:
    """The newest steps of the trainer's policy and no others, for on-policy training.

    Such a trainer has `estimate(rollout) -> rollout`. It receives the steps of each environment `[T, N, ...]`,
    normalised, with the actions as they were drawn and the flags `ended` and `valid` `[T, N]`, adds what its losses
    need, and is then passed the result in minibatches.
    """

    steps: int
    """Steps of each environment between updates."""
    epochs: int
    """Passes over a rollout."""


@dataclass(frozen=True)
class Demonstrations:
    """Items of a dataset, unchanged; the trainer imitates them, so it does not learn from its own experience."""


@dataclass(frozen=True)
class Corrections:
    """Observations of the trainer's own policy with an expert's actions, to imitate; beside a dataset, if any.

    Batches have the observations and `action`, the expert's. What the policy does alone is stored, but never drawn.
    """

    expert: str
    """"scripted", "keyboard", or the run folder of a policy."""
    labels: int
    """Largest number of actions that the expert gives, over all processes."""
    gated: bool
    """The expert acts while it deems that necessary, and labels these steps; else it labels steps of the policy."""
    aggregated: bool
    """Draw from dataset and labels as from one set; else --dataset.ratio of each batch is the dataset's."""
    takes_over: float = 0.0
    """Gated: distance of the policy's action beyond which a simulated expert acts, in half ranges of an action."""
    gives_back: float = 0.0
    """Gated: distance below which it leaves the rest to the policy."""
    share: float = 1.0
    """Not gated: share of the steps that are labelled."""
    beta: float = 0.0
    """Not gated: in iteration i the expert acts with probability beta^i; its first one is before learning starts."""
    iteration: int = 1
    """Environment steps of an iteration, over all processes."""
    rate: float = 10.0
    """Steps per second with a person."""
    speed: float = 1.0
    """Action of a key, in half ranges."""


Request = Window | Goals | Rollouts | Demonstrations | Corrections | None


@dataclass(frozen=True)
class Promises:
    """Promises of a trainer on which `--compile` relies; the attribute `promises` of its class or of an instance."""

    repeats_after: int | None = None
    """Calls of `train_step` after which its Python code repeats. It never waits for a tensor's value, so CUDA graphs
    may replay its kernels. It may count its calls in `updates`, which replays keep up to date. None: no promise."""
    compiles: tuple[str, ...] = ("losses",)
    """Methods of the kind `losses(data) -> (loss, metrics)` that are compiled."""


# ---- the optional members of a trainer, with their defaults --------------------------------------------------------


def needs_of(cls: type) -> dict[str, str]:
    """Model name -> default entry of the model registry, the policy's first: `needs`, or a policy alone."""
    needs = dict(getattr(cls, "needs", {"policy": defaults_of(cls).get("model", "mlp")}))
    first = "policy" if "policy" in needs else next(iter(needs))
    return {first: needs.pop(first), **needs}


def defaults_of(cls: type) -> dict[str, Any]:
    """Option of the command line -> default of this trainer: `defaults`."""
    return dict(getattr(cls, "defaults", {}))


def debug_options_of(component: type) -> dict[str, Any]:
    """Options of any component under `--debug`: `debug_options`."""
    return dict(getattr(component, "debug_options", {}))


def idle_options_of(options: Any) -> dict[str, str]:
    """Option of any component, such as "code-width", that has no effect -> without which one: `idle_options()`."""
    return options.idle_options() if hasattr(options, "idle_options") else {}


def former_names_of(component: type) -> dict[str, str]:
    """Former name of an option of any component -> its name by now, for the records of older runs: `former_names`."""
    return dict(getattr(component, "former_names", {}))


def former_defaults_of(component: type) -> dict[str, Any]:
    """Option of any component -> what a record of an older version means, which lacks it: `former_defaults`."""
    return dict(getattr(component, "former_defaults", {}))


def recogniser_of(readers: Iterable[Any]) -> Callable[[str], str] | None:
    """The function that finds the reader of a path, which dataset readers offer: `recognise(path)`; None without."""
    return next(filter(None, (getattr(reader, "recognise", None) for reader in readers)), None)


def request_of(cls: type, config: Any) -> Request:
    """The data that a trainer asks for: `data(config)`; None for unchanged items.

    Raises:
        UserError: options out of range, or another kind of request.
    """
    request = cls.data(config) if hasattr(cls, "data") else None
    if not isinstance(request, Request):
        kinds = "Window, Goals, Rollouts, Demonstrations or Corrections"
        raise UserError(f"{cls.__name__}.data(config) must return {kinds}, found {type(request).__name__}")
    return request


def window_of(cls: type, config: Any) -> Window:
    """The windows of the online script: the requested ones, or else by `n_step` and `discount` of the options."""
    request = request_of(cls, config)
    if isinstance(request, Window):
        return request
    return Window(**{name: getattr(config, name) for name in ("discount", "n_step") if hasattr(config, name)})


def model_spec_of(cls: type, config: Any) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """(model, spec of the data) -> the spec that it is built for: `model_spec(model, spec, config)`, or the data's."""
    method = getattr(cls, "model_spec", None)
    return (lambda model, spec: method(model, spec, config)) if method else (lambda model, spec: spec)


def frozen_policy_of(cls: type, config: Any) -> tuple[str, float | None] | None:
    """(run folder, scale) of the frozen policy that the trainer learns on top of: `base(config)`, or None.

    Its actions are corrections up to that scale. With None for the scale it steers: its constructor gets the frozen
    policy's module as `base`, and the action in `spec` has the shape of its `noise` and normalised `limits`.
    """
    return cls.base(config) if hasattr(cls, "base") else None


def accumulates(trainer: Any) -> bool:
    """Whether every call steps every optimizer once, so that gradients may be accumulated; False by default."""
    return bool(getattr(trainer, "accumulates", False))


def promises_of(trainer: Any) -> Promises:
    """The promises of a trainer, or none."""
    return getattr(trainer, "promises", Promises())


def spans_of(cls: type, config: Any) -> dict[str, tuple[int, str]]:
    """Option of a trainer that is a length -> (its value, its unit: "environment steps" or "updates"): `spans`."""
    spans = getattr(cls, "spans", {})
    return {option: (int(getattr(config, option)), unit) for option, unit in spans.items() if hasattr(config, option)}


def updates_of(trainer: Any) -> int | None:
    """The calls of `train_step` that a trainer counts in `updates`; None without that."""
    return getattr(trainer, "updates", None)


def losses_of(trainer: Any, name: str = "losses") -> Callable[[dict[str, Any]], Any] | None:
    """A loss method of a trainer as its class defines it, hence not compiled; None without it."""
    method = getattr(type(trainer), name, None)
    return types.MethodType(method, trainer) if callable(method) else None


def estimates(trainer: Any) -> bool:
    """Whether a trainer, or its class, has `estimate(rollout)`, so that it learns from rollouts."""
    return callable(getattr(trainer, "estimate", None))


def estimate_of(trainer: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The method `estimate(rollout)` of a trainer that asks for rollouts. Raises UserError: there is none."""
    if not estimates(trainer):
        raise UserError(f"{type(trainer).__name__} asks for Rollouts, but has no estimate(rollout)")
    return trainer.estimate


def has_policy(cls: type) -> bool:
    """Whether a trainer builds its acting module by `policy()`."""
    return callable(getattr(cls, "policy", None))


def acting_module(trainer: Any, models: Any) -> nn.Module | None:
    """The policy: the trainer's `policy()`, or `models["policy"]`; None without either."""
    if has_policy(type(trainer)):
        return trainer.policy()
    return models["policy"] if "policy" in models else None  # noqa: SIM401  (a ModuleDict has no `get`)


def exploring_module(trainer: Any, default: nn.Module) -> Any:
    """The policy that collects data online: the trainer's `explorer()`, or `default`."""
    return trainer.explorer() if callable(getattr(type(trainer), "explorer", None)) else default


def random_steps(explorer: Any, steps: int) -> int:
    """Environment steps whose actions are drawn uniformly: `steps`, or 0 for an explorer that is random by itself.

    Such a one has `random_until`, which is set to `steps`.
    """
    if not hasattr(explorer, "random_until"):
        return steps
    explorer.random_until = steps
    return 0


def set_env_step(explorer: Any, step: int) -> None:
    """Report the environment steps so far to an explorer that has `env_step`."""
    if hasattr(explorer, "env_step"):
        explorer.env_step = step


def state_of(trainer: Any) -> dict[str, Any]:
    """The state of a trainer besides its models, for a checkpoint: `state_dict()`, or {}."""
    return trainer.state_dict() if callable(getattr(type(trainer), "state_dict", None)) else {}


def load_state(trainer: Any, state: dict[str, Any]) -> None:
    """Restore the state that `state_of` returned, by `load_state_dict(state)`."""
    if callable(getattr(type(trainer), "load_state_dict", None)):
        trainer.load_state_dict(state)


def construct(
    cls: Any,
    models: nn.ModuleDict,
    optimizers: dict[str, Optimizer],
    loss: nn.Module,
    spec: dict[str, Any],
    config: Any,
    device: torch.device,
    base: nn.Module | None = None,
) -> Any:
    """The trainer, with those of `device`, `norm_stats`, `spec`, `config` and `base` that its constructor names.

    Args:
        base: Module of the frozen policy that it steers.

    Raises:
        UserError: a constructor that cannot be called with these arguments.
    """
    fit_loss(loss, spec, cls, config, device)
    check_auxiliary(cls, models, optimizers)
    norm_stats = {key: feature["stats"] for key, feature in spec.items() if "stats" in feature}
    available = {"device": device, "norm_stats": norm_stats, "spec": spec, "config": config, "base": base}
    keywords = {name: available[name] for name in accepted(cls, available)}
    if problem := unbindable(cls, "__init__", (), ("models", "optimizers", "loss", *keywords)):
        raise UserError(problem)
    return cls(models=models, optimizers=optimizers, loss=loss, **keywords)


def fit_loss(loss: Any, spec: dict[str, Any], cls: type, config: Any, device: torch.device) -> None:
    """Tell a loss that has `fit_action(action, device)` what it compares: it has weights of the action's dimensions.

    Raises:
        UserError: weights that do not fit the action, or a trainer whose loss is also of other things.
    """
    if not callable(getattr(loss, "fit_action", None)):
        return
    if "action" not in spec or not isinstance(request_of(cls, config), Demonstrations | Corrections | None):
        raise UserError("--loss.weights: they are for imitation; this trainer's loss is also of values")
    loss.fit_action(spec["action"], device)


def check_auxiliary(cls: type, models: nn.ModuleDict, trained: Iterable[str]) -> None:
    """Refuse trained models with losses of their own that the trainer does not add: `adds_auxiliary` names the models.

    Raises:
        UserError: naming the model and these losses.
    """
    for name in sorted(set(trained) - set(getattr(cls, "adds_auxiliary", ()))):
        if lost := [loss for loss, weight in auxiliary_weights_of(models[name]).items() if weight]:
            option = "--model.experts, or --model.head codebook"
            option = option if name == "policy" else option.replace("--model.", f"--model.{name}.")
            raise UserError(
                f"{cls.__name__} does not add {', '.join(lost)}, losses that its model {name!r} has of its own; leave"
                f" out {option}, or choose bc, act, diffusion, flow, recap or dagger"
            )


def passed_to(trainer: Any) -> list[str]:
    """The keywords that the loop passes to `train_step`: those of LOOP_PASSES that it names."""
    return accepted(trainer.train_step, LOOP_PASSES)


# ---- the optional members of a model -------------------------------------------------------------------------------


def auxiliary_weights_of(model: Any) -> dict[str, float]:
    """The losses of its own that a model has, by name, and their weights: `auxiliary_weights`; {} without any."""
    return getattr(model, "auxiliary_weights", {})


def with_auxiliary(model: Any, *arguments: Any, **known: Any) -> tuple[Any, dict[str, Tensor]]:
    """What a model returns in training, and its own losses, unweighted: `auxiliary(...)`, or its forward pass and {}.

    Args:
        known: What the loss is about, `target` and `is_pad`, where that is known before; for `auxiliary` alone.

    Raises:
        UserError: the model has weights, and no such method; a loss that is no scalar, or has no weight.
    """
    if not (weights := auxiliary_weights_of(model)):
        return model(*arguments), {}
    if not callable(getattr(model, "auxiliary", None)):
        raise UserError(
            f"{type(model).__name__} has auxiliary_weights, but no auxiliary(...) that returns these losses"
        )
    output, losses = model.auxiliary(*arguments, **known)
    for name, value in losses.items():
        if name not in weights or value.ndim:
            expected = f"a scalar tensor for each of {', '.join(weights)}"
            raise UserError(f"{type(model).__name__}.auxiliary: expected {expected}; found {name} {list(value.shape)}")
    return output, losses


# ---- options of any component --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoOptions:
    """No options."""


def options_type(component: type) -> type:
    """The dataclass of a component's options: a factory that is one, a trainer's nested `Config`, or none."""
    return component if is_dataclass(component) else getattr(component, "Config", NoOptions)


def options_of(component: type, values: dict[str, Any] | None = None) -> Any:
    """Options of a component with `values`, an instance of `options_type`.

    Raises UserError: an option that does not exist.
    """
    options = options_type(component)
    values = values or {}
    known = [field.name for field in fields(options)]
    for name in values:
        if name not in known:
            raise UserError(f"{component.__name__} has no option {name!r}; {nearest(name, known)}")
    return options(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def instantiate(component: type, options: Any) -> Any:
    """The factory object: the options themselves when the factory is a dataclass, else a plain instance."""
    return options if is_dataclass(component) else component()


# ---- files that options name ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Annotates an option that names a file or folder, as in `path: Annotated[str, Place()] = ""`.

    A run records where it is, so that it can be resumed from another working directory.
    """

    pattern: str = "(.+)"
    """Of a word; its group is the path."""
    made: bool = False
    """Whether the run makes it; otherwise a word that names nothing stays as it is."""
    moves: bool = False
    """Whether a resumed run may find it elsewhere: its content is compared."""


def places_of(options: Any) -> dict[str, Place]:
    """Field -> `Place`, for the options of a component that name a file or folder."""
    try:
        hints = typing.get_type_hints(type(options), include_extras=True)
    except (NameError, TypeError):  # annotations of a plugin that cannot be evaluated here
        return {}
    beside = ((name, entry) for name, hint in hints.items() for entry in getattr(hint, "__metadata__", ()))
    return {name: entry for name, entry in beside if isinstance(entry, Place) and hasattr(options, name)}


def from_files(models: dict[str, tuple[str, Any]]) -> list[str]:
    """The models, of name -> (entry, options), whose options name a file of initial weights."""
    return [name for name, (_, options) in models.items() if any(getattr(options, p) for p in places_of(options))]


_follow = False  # inside `weights_follow`


@contextmanager
def weights_follow(follow: bool = True) -> Iterator[None]:
    """A context in which models are built for weights that are loaded afterwards, from a run or a policy's folder.

    So a model factory that reads initial weights from a file leaves that out where `reads_weights()` is False: the file
    need not be there any more.
    """
    global _follow
    _follow, before = follow, _follow
    try:
        yield
    finally:
        _follow = before


def reads_weights() -> bool:
    """Whether a model factory has to read the file of initial weights that its options name."""
    return not _follow


# ---- checks against a protocol -------------------------------------------------------------------------------------


def check(component: object, protocol: type) -> None:
    """Refuse a component that the scripts cannot call. Raises UserError: one line, as of `violation`."""
    if problem := violation(component, protocol):
        raise UserError(problem)


def check_product(product: object, protocol: type) -> None:
    """Refuse a result of a factory's `build` of the wrong type. Raises UserError naming the expected type."""
    if problem := misfit(product, protocol):
        raise UserError(f"build must return {problem}")


def violation(component: object, protocol: type) -> str:
    """Describe in one line how `component` violates `protocol`, or return "" when the scripts can call it.

    `isinstance` looks at names alone; this binds the arguments of the protocol's one method.
    """
    method = _methods(protocol)[0]
    parameters = inspect.signature(getattr(protocol, method)).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]
    # `**keywords: Unpack[SomeTypedDict]` names the keywords that are passed.
    unpacked = [typing.get_args(p.annotation)[0] for p in parameters if p.kind is p.VAR_KEYWORD]
    keywords = [name for entries in unpacked for name in entries.__annotations__]
    expected = f"{method}({', '.join([*positional, *(f'{name}=...' for name in keywords)])})"
    found = getattr(component, method, None)
    if not isinstance(component, protocol) or not callable(found):
        have = "is missing" if found is None else f"is a {type(found).__name__}"
        return f"{protocol.__name__} needs {expected}, but {type(component).__name__}.{method} {have}"
    return unbindable(found, method, positional, passed_to(component) if method == "train_step" else keywords)


def misfit(product: object, protocol: type) -> str:
    """Describe what `build` should have returned, by the protocol's annotation, or return "" when it did."""
    wanted: Any = inspect.signature(protocol.build).return_annotation  # type: ignore[attr-defined]
    if typing.get_origin(wanted) is typing.Annotated:  # a dict, annotated by the TypedDict of its entries
        entries = wanted.__metadata__[0].__required_keys__
        return "" if isinstance(product, dict) and entries <= set(product) else f"a dict with {sorted(entries)}"
    if typing.Protocol in wanted.__mro__:
        lacks = [name for name in (*wanted.__annotations__, *_methods(wanted)) if not hasattr(product, name)]
        return f"a gymnasium.vector.{wanted.__name__}, {lacks[0]!r} is missing" if lacks else ""
    return "" if isinstance(product, wanted) else f"a {wanted.__name__}, found {type(product).__name__}"


def _methods(protocol: type) -> list[str]:
    """The public methods that a protocol itself names, in their order."""
    return [name for name, member in vars(protocol).items() if inspect.isfunction(member) and name[0] != "_"]


def accepted(function: Callable[..., Any], names: Iterable[str]) -> list[str]:
    """Those of `names` that a function takes as keywords."""
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return [name for name in names if takes_all or name in {p.name for p in parameters}]


def unbindable(function: Any, name: str, positional: Iterable[str], keywords: Iterable[str] = ()) -> str:
    """Describe in one line why `function` cannot be called with these arguments, or return ""."""
    signature = inspect.signature(function)
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        expected = ", ".join([*positional, *(f"{keyword}=..." for keyword in keywords)])
        return f"expected {name}({expected}), found {name}{signature}: {error}"
    return ""
