"""A policy in a self-contained folder: weights, statistics, and the components from which to build it."""

import contextlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..contracts import (
    construct,
    former_defaults_of,
    has_policy,
    instantiate,
    model_spec_of,
    options_of,
    weights_follow,
)
from ..data.actions import robot_width
from ..data.features import build_models
from ..data.normalisation import Normaliser
from ..data.tensor_files import save_tensors
from ..errors import UserError, one_line
from ..records import PolicyRecord, ResidualRecord, SteeredRecord, check_folder, leaves, misfit, read_record
from .correction import CorrectedPolicy, Middle, fingerprint
from .inference import Inference
from .policy import Policy

FORMAT = 1
CORRECTED, STEERED = "residual.json", "steered.json"  # records of a policy on top of a frozen one, beside its own
OPERATIONS = 300  # of torch, for each stored tensor, that building a module may take
ELEMENTS = 1 << 28  # of tensors that a module may have beyond those that are stored, such as a trainer's critics
REMEDY = "copy the policy's folder again"


def save_policy(folder: Path, policy: Policy, args: Any, step: int) -> None:
    """Write a policy to a new folder, which then replaces `folder`; arguments as of `write_policy`."""
    temporary = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_policy(temporary, policy, args, step, weights_of(policy.module))
    if policy.base is not None:
        policy.base.save(temporary)
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's weights, on the CPU."""
    return {key: value.detach().cpu().clone().contiguous() for key, value in module.state_dict().items()}


def write_policy(folder: Path, policy: Policy, args: Any, step: int, weights: dict[str, torch.Tensor]) -> None:
    """Write `model.safetensors` and `policy.json` into a folder, and the record of a policy on top of a frozen one.

    Args:
        args: Names and options of the components from which the policy's module is built again, and the plugins that
            register some of them.
        step: Steps that it has learnt for.
        weights: Of its module.
    """
    from .. import TRAINER_REGISTRY

    def entry(name: str, options: Any) -> dict[str, Any]:
        return {"name": name, "options": asdict(options)}

    description = {
        "format": FORMAT,
        "step": step,
        "trainer": entry(args.trainer, args.trainer_options),
        "models": {name: entry(*model) for name, model in args.models.items()},
        "loss": entry(args.loss, args.loss_options),
        "plugins": list(args.plugins),
        "own_policy": has_policy(TRAINER_REGISTRY[args.trainer]),
        "spec": policy.normaliser.describe(policy.spec),
        "normalisation": policy.normaliser.modes,
        "inference": asdict(policy.settings),
    }
    save_tensors(weights, folder / "model.safetensors")
    (folder / "policy.json").write_text(json.dumps(description, indent=1) + "\n")
    if policy.base is not None:
        (folder / policy.base.record_name).write_text(json.dumps(policy.base.record(), indent=1) + "\n")


def load_folder(folder: str | Path, **settings: Any) -> Any:
    """Load the policy of a `policy/` folder or of a checkpoint's; see `components.load_policy`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, description = describe(folder)
    try:
        weights = load_file(path.with_name("model.safetensors"))
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path.parent}: damaged or incomplete policy ({type(error).__name__}: {error})") from error
    spec, modes = description["spec"], description["normalisation"]
    steered = steered_by(path.parent)
    with one_line(f"{path}: no policy can be built from it"):
        with weights_follow(), Bounded(weights):
            module = _build_module(description, spec, path, steered)
        check_weights(module, weights, path)
        module.load_state_dict(weights)
        complete = {key: modes.get(key, "none") for key in spec}
        policy = Policy(module.eval(), Normaliser(spec, complete), spec, saved_settings(folder))
    return with_base(path.parent, policy).configure(**settings)


def check_weights(module: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Refuse weights of other names or shapes than a module's. Raises UserError naming the first."""
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if expected != found:
        key = next(key for key in {**expected, **found} if expected.get(key) != found.get(key))
        raise UserError(f"{path.parent}: weights {key!r} have shape {found.get(key)}, the model {expected.get(key)}")


class Bounded(TorchDispatchMode):
    """What is built in this context may take so many operations and so much memory; checked before each is allocated.

    So a record cannot ask for a network that is far larger than the weights which are stored beside it.
    """

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.operations = OPERATIONS * (len(weights) + 10)
        self.elements = ELEMENTS + 16 * sum(tensor.numel() for tensor in weights.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations -= 1
        if not (func.is_view or func._schema.is_mutable):
            imagined = {**kwargs, "device": "meta"} if "device" in kwargs else kwargs
            with contextlib.suppress(NotImplementedError, RuntimeError):  # it needs values, or fails below, too
                made = func(*tree_map(_imagined, args), **tree_map(_imagined, imagined))
                self.elements -= sum(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))
        if self.operations < 0 or self.elements < 0:
            raise UserError("it describes a far larger network than the one whose weights are stored")
        return func(*args, **kwargs)


def _imagined(value: Any) -> Any:
    """A tensor of the same shape that has no memory."""
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def describe(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Path and contents of the `policy.json` of a finished run's folder, or of a policy's.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folder = Path(folder)
    path = (folder / "policy" if (folder / "policy" / "policy.json").exists() else folder) / "policy.json"
    if not path.exists():
        raise UserError(f"{folder}: no policy here (policy/policy.json)")
    check_folder(path.parent)
    description = read_record(path, PolicyRecord, REMEDY)
    if description["format"] != FORMAT:
        raise UserError(f"{path}: its format is {description['format']}; this version reads {FORMAT}")
    if "action" not in description["spec"]:
        raise UserError(f"{path}: damaged or incomplete: no spec.action; {REMEDY}")
    return path, description


def saved_settings(folder: str | Path) -> Inference:
    """The inference settings that a policy was saved with. Raises UserError: no policy there, or damaged."""
    path, description = describe(folder)
    return recorded_options(Inference, description["inference"], f"{path}: inference")


def recorded_options(component: type, values: dict[str, Any], place: str) -> Any:
    """Options of a component as a record has them.

    Raises:
        UserError: an option that the component does not have, or of another type.
    """
    options = options_of(component)
    if problem := misfit(values, type(options), finite=False):
        raise UserError(f"{place}: damaged or incomplete: {problem}; {REMEDY}")
    with one_line(place):
        return options_of(component, values)


def normalisation_of(folder: str | Path, spec: dict[str, Any]) -> dict[str, str]:
    """Normalisation modes of a policy for the keys of `spec`, into which its statistics are copied.

    Raises:
        UserError: no policy there, or keys of other shapes.
    """
    path, description = describe(folder)
    check_sum(path.parent)
    there, modes = description["spec"], description["normalisation"]
    if "form" in there["action"]:
        raise UserError(
            f"--init-from {path.parent}: its actions are relative to the state, or 6D; here they are executed"
        )
    for key, feature in spec.items():
        stored = there.get(key, {})
        shape = tuple(stored.get("shape", ()))
        if key.startswith("observation.") and shape != tuple(feature["shape"]):
            raise UserError(
                f"--init-from {path.parent}: its {key!r} has shape {shape or None}, here {tuple(feature['shape'])}"
            )
        if "stats" in stored:
            # Its data may have shown an action that never changed, which this environment lets change.
            feature |= {"bounds": feature["stats"]} if "stats" in feature else {}
            feature["stats"] = stored["stats"]
    return {key: modes.get(key, "none") for key in spec if not key.startswith("next.")}


def _build_module(description: dict[str, Any], spec: dict[str, Any], path: Path, steered: Any = None) -> nn.Module:
    """Build the policy's module as the script did: one model, or the trainer's `policy()`.

    Args:
        steered: Module of the frozen policy that it steers, or None.
    """
    from .. import LOSS_BUILDER_REGISTRY, MODEL_BUILDER_REGISTRY, TRAINER_REGISTRY

    def component(registry: dict[str, type], entry: dict[str, Any]) -> tuple[type, Any]:
        if entry["name"] not in registry:
            files = (f"{Path(p).stem} ({p})" if p.endswith(".py") else p for p in description["plugins"])
            plugins = ", ".join(files) or "a plugin"
            raise UserError(f"{path}: {entry['name']!r} is not registered; import {plugins} before load_policy")
        cls = registry[entry["name"]]
        options = former_defaults_of(cls) | entry["options"]
        return cls, recorded_options(cls, options, f"{path}: {entry['name']}")

    wanted = description["models"]
    if not description["own_policy"]:
        if "policy" not in wanted:
            raise UserError(f"{path}: damaged or incomplete: no models.policy; {REMEDY}")
        wanted = {"policy": wanted["policy"]}
    factories = {name: instantiate(*component(MODEL_BUILDER_REGISTRY, entry)) for name, entry in wanted.items()}
    cls: Any = object
    config = None
    if description["own_policy"] or description["trainer"]["name"] in TRAINER_REGISTRY:
        cls, config = component(TRAINER_REGISTRY, description["trainer"])
    build_one: Any = lambda name, spec: factories[name].build(spec)  # noqa: E731
    models = build_models(list(factories), build_one, spec, model_spec_of(cls, config))
    if not description["own_policy"]:
        return models["policy"]
    loss = instantiate(*component(LOSS_BUILDER_REGISTRY, description["loss"])).build()
    return construct(cls, models, idle_optimizers(models), loss, spec, config, torch.device("cpu"), steered).policy()


def idle_optimizers(models: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    """Optimizers that never step, for a trainer that is built only for its policy."""
    named = ((name, [p for p in model.parameters() if p.requires_grad]) for name, model in models.items())
    return {name: torch.optim.SGD(params, lr=0.0) for name, params in named if params}


def with_base(folder: Path, correction: Policy) -> Any:
    """The policy of a folder, with the frozen policy that it corrects, if any. Raises UserError: a damaged folder."""
    path = folder / CORRECTED
    if not path.exists():
        return correction
    how = read_record(path, ResidualRecord, REMEDY)
    base = load_base(folder, how["sha256"], "corrected")
    width = robot_width(base.spec["action"])
    if not len(how["low"]) == len(how["high"]) == width:
        raise UserError(f"{path}: damaged: low and high must have {width} numbers, as the actions of its base")
    low, high = (np.array(how[name], dtype=np.float32) for name in ("low", "high"))
    return CorrectedPolicy(base, correction, Middle(low, high, how["scale"], how.get("clips", False)))


def check_sum(folder: Path) -> None:
    """Refuse to go on from the residual policy of an older version, whose critics know corrections, no sums.

    Raises UserError.
    """
    path = folder / CORRECTED
    if path.exists() and not read_record(path, ResidualRecord, REMEDY).get("clips"):
        learnt = "an older version's critics learnt the value of its corrections, here they learn that of the sum"
        raise UserError(f"{folder}: {learnt}; it acts as it did, but train it anew")


def steered_by(folder: Path) -> nn.Module | None:
    """The module of the frozen policy that a folder's policy steers, if any. Raises UserError: a damaged folder."""
    if not (folder / STEERED).exists():
        return None
    how = read_record(folder / STEERED, SteeredRecord, REMEDY)
    base = load_base(folder, how["sha256"], "steered")
    if not hasattr(base, "module"):
        raise UserError(f"{base_folder(folder)}: damaged: it has no noise; {REMEDY}")
    return base.module


def load_base(folder: Path, sha256: str, done: str) -> Any:
    """The frozen policy under that of a folder, without delay, as what is on top belongs to its own step.

    Raises UserError: other weights than when the run learnt.
    """
    base = load_folder(base_folder(folder), delay=0)
    if fingerprint(base_folder(folder)) != sha256:
        raise UserError(f"{base_folder(folder)}: not the weights of the policy that was {done}")
    return base


def base_folder(folder: Path) -> Path:
    """Folder of the frozen policy under that of a folder: in it or, for a checkpoint, where its run keeps it.

    Raises:
        UserError: it is not there, or leads out of the run.
    """
    real = folder.resolve()
    run = real.parent.parent if real.parent.name == "checkpoints" else real
    for base in (folder / "base", run / "inherited" / "base", run / "base"):
        if base.exists():
            if leaves(base, [real, run]):
                raise UserError(f"{base} is a link out of {run}; it is not followed, copy the folder instead")
            return base
    verb = "steers" if (folder / STEERED).exists() else "corrects"
    raise UserError(f"{folder}: the frozen policy that it {verb} is not there; copy the whole run's folder again")


def copy_policy(folder: Path, to: Path) -> None:
    """Copy a policy and the frozen one under it, if any, to a new folder, readable by whom the umask lets."""
    to.mkdir(parents=True)
    for name in ("policy.json", "model.safetensors", CORRECTED, STEERED):
        if (folder / name).exists():
            shutil.copyfile(folder / name, to / name)
    if (folder / CORRECTED).exists() or (folder / STEERED).exists():
        copy_policy(base_folder(folder), to / "base")
