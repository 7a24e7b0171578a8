"""A policy in a self-contained folder: weights, statistics, and the components from which to build it."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..contracts import construct, has_policy, instantiate, model_spec_of, options_of
from ..data.features import build_models
from ..data.normalisation import Normaliser
from ..errors import UserError
from .correction import CorrectedPolicy, Middle, fingerprint
from .policy import Inference, Policy

FORMAT = 1


def save_policy(folder: Path, policy: Policy, args: Any) -> None:
    """Write `model.safetensors` and `policy.json` to a new folder, which then replaces `folder`.

    Args:
        args: Names and options of the components from which the policy's module is built again, and the plugins that
            register some of them.
    """
    from safetensors.torch import save_file

    from .. import TRAINER_REGISTRY

    def entry(name: str, options: Any) -> dict[str, Any]:
        return {"name": name, "options": asdict(options)}

    description = {
        "format": FORMAT,
        "trainer": entry(args.trainer, args.trainer_options),
        "models": {name: entry(*model) for name, model in args.models.items()},
        "loss": entry(args.loss, args.loss_options),
        "plugins": list(args.plugins),
        "own_policy": has_policy(TRAINER_REGISTRY[args.trainer]),
        "spec": policy.spec,
        "normalisation": policy.normaliser.modes,
        "inference": asdict(policy.settings),
    }
    temporary = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {key: value.detach().cpu().clone().contiguous() for key, value in policy.module.state_dict().items()}
    save_file(weights, temporary / "model.safetensors")
    (temporary / "policy.json").write_text(json.dumps(description, indent=1) + "\n")
    if policy.base is not None:
        policy.base.save(temporary)
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_policy(folder: str | Path, **settings: Any) -> Any:
    """Load a policy from a run folder, or from its `policy/` folder alone.

        policy = load_policy("runs/x"); policy.reset(); action = policy.act({"observation.state": array})
        policy = load_policy("runs/x", action_steps=4, sampling_steps=20)  # other settings as in its run

    Args:
        settings: Fields of `Inference` that replace the saved ones.

    Raises:
        UserError: no policy there, a plugin to import first, weights that do not match, a statistic that is missing or
            has the wrong width, or invalid settings; each by name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, description = describe(folder)
    try:
        weights = load_file(path.with_name("model.safetensors"))
        spec, modes = description["spec"], description["normalisation"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path.parent}: damaged or incomplete policy ({type(error).__name__}: {error})") from error
    module = _build_module(description, spec, path)
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if expected != found:
        key = next(key for key in {**expected, **found} if expected.get(key) != found.get(key))
        raise UserError(f"{path.parent}: weights {key!r} have shape {found.get(key)}, the model {expected.get(key)}")
    module.load_state_dict(weights)
    known = saved_settings(folder)
    complete = {key: modes.get(key, "none") for key in spec}
    policy = Policy(module.eval(), Normaliser(spec, complete), spec, known)
    return with_base(path.parent, policy).configure(**settings)


def describe(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """Path and contents of the `policy.json` of a run or policy folder. Raises UserError: none there, or damaged."""
    folder = Path(folder)
    path = (folder / "policy" if (folder / "policy" / "policy.json").exists() else folder) / "policy.json"
    if not path.exists():
        raise UserError(f"{folder}: no policy here (policy/policy.json); a run writes it when it ends")
    try:
        return path, json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged or incomplete policy ({type(error).__name__}: {error})") from error


def saved_settings(folder: str | Path) -> Inference:
    """The inference settings that a policy was saved with. Raises UserError: no policy there, or damaged."""
    path, description = describe(folder)
    try:
        return Inference(**description["inference"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged or incomplete policy ({type(error).__name__}: {error})") from error


def normalisation_of(run: str, spec: dict[str, Any]) -> dict[str, str]:
    """Normalisation modes of a run for the keys of `spec`, into which its statistics are copied; {} for no run.

    Raises:
        UserError: no policy there, or keys of other shapes.
    """
    if not run:
        return {}
    path, description = describe(run)
    there, modes = description["spec"], description["normalisation"]
    for key, feature in spec.items():
        stored = there.get(key, {})
        shape = tuple(stored.get("shape", ()))
        if key.startswith("observation.") and shape != tuple(feature["shape"]):
            raise UserError(f"--init-from {run}: its {key!r} has shape {shape or None}, here {tuple(feature['shape'])}")
        if "stats" in stored:
            feature["stats"] = stored["stats"]
    return {key: modes.get(key, "none") for key in spec if not key.startswith("next.")}


def _build_module(description: dict[str, Any], spec: dict[str, Any], path: Path) -> nn.Module:
    """Build the policy's module as the script did: one model, or the trainer's `policy()`."""
    from .. import LOSS_BUILDER_REGISTRY, MODEL_BUILDER_REGISTRY, TRAINER_REGISTRY

    def component(registry: dict[str, type], entry: dict[str, Any]) -> tuple[type, Any]:
        if entry["name"] not in registry:
            plugins = ", ".join(description["plugins"]) or "a plugin"
            raise UserError(f"{path}: {entry['name']!r} is not registered; import {plugins} before load_policy")
        cls = registry[entry["name"]]
        return cls, options_of(cls, entry["options"])

    wanted = description["models"]
    if not description["own_policy"]:
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
    return construct(cls, models, idle_optimizers(models), loss, spec, config, torch.device("cpu")).policy()


def idle_optimizers(models: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    """Optimizers that never step, for a trainer that is built only for its policy."""
    named = ((name, [p for p in model.parameters() if p.requires_grad]) for name, model in models.items())
    return {name: torch.optim.SGD(params, lr=0.0) for name, params in named if params}


def with_base(folder: Path, correction: Policy) -> Any:
    """The policy of a folder, with the frozen policy that it corrects, if any. Raises UserError: a damaged folder."""
    path = folder / "residual.json"
    if not path.exists():
        return correction
    try:
        how = json.loads(path.read_text())
        low, high = (np.array(how[name], dtype=np.float32) for name in ("low", "high"))
        bounds, sha256 = Middle(low, high, float(how["scale"])), how["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    base = load_policy(folder / "base")
    if fingerprint(folder / "base") != sha256:
        raise UserError(f"{folder / 'base'}: not the weights of the policy that was corrected")
    return CorrectedPolicy(base, correction, bounds)
