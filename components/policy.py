"""A policy that acts in the environment's own units, saved in a folder that loads alone."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .command_line import instantiate, options_of
from .errors import UserError
from .normalisation import Normaliser

FORMAT = 1


class Policy:
    """Normaliser, network, observation history and action chunks in one: numpy in, numpy out.

    Args:
        module: Normalised observations in, normalised action `[B, Da]` or chunk `[B, Ta, Da]` out. It takes the batch,
            or, when nothing but `observation.state` is observed, that tensor itself. One that draws noise may declare
            `noise_shape` and find `noise` `[B, *noise_shape]` in the batch, drawn per episode.
        normaliser: Of the data that it was trained on.
        spec: {key: {"shape", "dtype", ...}} of that data.
    """

    def __init__(self, module: nn.Module, normaliser: Normaliser, spec: dict[str, Any]) -> None:
        self.module, self.normaliser, self.spec = module, normaliser, spec
        # History and chunk steps are the extra leading axis of the items; a bool mask comes with every chunk.
        self.chunked = "action_is_pad" in spec
        self.action_steps = int(spec["action"]["shape"][0]) if self.chunked else 1
        self.observation_keys = [key for key in spec if key.startswith("observation.")]
        state = next((key for key in self.observation_keys if "images" not in key), None)
        self.obs_steps = int(spec[state]["shape"][0]) if state and len(spec[state]["shape"]) == 2 else 1
        self.takes_tensor = self._takes_tensor()
        self.reset()

    @property
    def inference(self) -> dict[str, Any]:
        """How it acts, recorded beside every evaluation."""
        return {"obs_steps": self.obs_steps, "chunk": self.action_steps, "executed_steps": self.action_steps}

    def reset(self, seeds: Sequence[int] | None = None) -> None:
        """Start new episodes: forget the history and the chunk. `seeds` fix a stochastic policy's noise, one a row."""
        self._history: dict[str, list[Tensor]] = {}
        self._plan: list[Tensor] = []
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds or ()]

    @torch.no_grad()
    def act(self, observation: dict[str, Any]) -> np.ndarray:
        """Next action, `[Da]` for one observation or `[N, Da]` for a batch, in the environment's units, float32.

        Args:
            observation: key -> array of one frame, or of N frames (the same N until `reset`).

        Raises:
            UserError: an observation key is missing or has another width than the policy was trained with.
        """
        frames, batched = self._frames(observation)
        for key, frame in frames.items():
            past = self._history.setdefault(key, [frame] * self.obs_steps)
            if len(past[0]) != len(frame):
                raise UserError(f"{key!r} has {len(frame)} rows after {len(past[0])}; call reset() for other episodes")
            past.append(frame)
            del past[: -self.obs_steps]
        if not self._plan:
            history = self._history.items()
            batch = {key: torch.stack(past, 1) if self.obs_steps > 1 else past[-1] for key, past in history}
            actions = self._forward(self.normaliser(batch))
            actions = self.normaliser.undo("action", actions.float()).cpu()
            self._plan = list(actions.unbind(1)) if self.chunked else [actions]
        action = self._plan.pop(0).numpy()
        return action if batched else action[0]

    def _frames(self, observation: dict[str, Any]) -> tuple[dict[str, Tensor], bool]:
        """Check the observation and give it a batch dimension."""
        frames, batched = {}, True
        for key in self.observation_keys:
            if key not in observation:
                found = ", ".join(observation) or "nothing"
                raise UserError(f"the policy needs the observation {key!r}; found: {found}")
            stored = self.spec[key].get("stored_shape", self.spec[key]["shape"])  # pictures may be cut to their centre
            shape = tuple(stored)[self.obs_steps > 1 :]
            frame = torch.as_tensor(np.asarray(observation[key]))
            if tuple(frame.shape[-len(shape) :]) != shape or frame.ndim not in (len(shape), len(shape) + 1):
                raise UserError(f"the policy expects {key!r} of shape {shape}, found {tuple(frame.shape)}")
            batched = frame.ndim > len(shape)
            frame = frame if frame.dtype == torch.uint8 else frame.float()
            frames[key] = (frame if batched else frame[None]).to(self._device)
        return frames, batched

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def _forward(self, batch: dict[str, Tensor]) -> Tensor:
        shape = getattr(self.module, "noise_shape", None)
        if shape is not None:
            rows = len(next(iter(batch.values())))
            sources: list[torch.Generator | None] = [*self._generators] or [None] * rows
            noise = torch.stack([torch.randn(shape, generator=source) for source in sources])
            batch = {**batch, "noise": noise.to(self._device)}
        return self.module(batch["observation.state"] if self.takes_tensor else batch)

    def _takes_tensor(self) -> bool:
        """Try the module on zeros, so that what does not fit is found before it acts.

        Raises:
            UserError: it fails, or its actions have another shape than the data's.
        """
        batch = {
            key: torch.zeros(
                1, *self.spec[key]["shape"], dtype=getattr(torch, self.spec[key]["dtype"]), device=self._device
            )
            for key in self.observation_keys
        }
        problems: list[str] = []
        action: Any = None
        training = self.module.training
        self.module.eval()
        self._generators = []
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            for takes_tensor in (False, True) if self.observation_keys == ["observation.state"] else (False,):
                self.takes_tensor = takes_tensor
                try:
                    action = self._forward(batch)
                    break
                except Exception as error:
                    problems.append(str(error).splitlines()[0] if str(error) else repr(error))
            else:
                raise UserError(f"the policy fails on an observation: {'; on the bare state: '.join(problems)}")
        self.module.train(training)
        found, expected = tuple(getattr(action, "shape", ())[1:]), tuple(self.spec["action"]["shape"])
        if found != expected:
            raise UserError(f"the policy gives actions of shape {found}, the data has {expected}")
        return self.takes_tensor


def acting_policy(trainer: Any, models: nn.ModuleDict, normaliser: Normaliser, spec: dict[str, Any]) -> Policy | None:
    """What acts: the trainer's own `policy()`, or `models["policy"]`; None without either, or with nothing to act on.

    Raises:
        UserError: it fails on an observation, or gives actions of another shape than the data's.
    """
    own = callable(getattr(trainer, "policy", None))
    observes = any(key.startswith("observation.") for key in spec)
    if not observes or "action" not in spec or not (own or "policy" in models):
        return None
    return Policy(trainer.policy() if own else models["policy"], normaliser, spec)


def save_policy(
    folder: Path,
    policy: Policy,
    trainer: tuple[str, Any],
    models: dict[str, tuple[str, Any]],
    loss: tuple[str, Any],
    plugins: Sequence[str],
) -> None:
    """Write `model.safetensors` and `policy.json`, replacing the folder at once.

    Args:
        trainer, models, loss: (registry name, options) of the components from which the acting module is built again.
        plugins: Modules that register some of them.
    """
    from safetensors.torch import save_file

    from . import TRAINER_REGISTRY

    def entry(name: str, options: Any) -> dict[str, Any]:
        return {"name": name, "options": asdict(options)}

    description = {
        "format": FORMAT,
        "trainer": entry(*trainer),
        "models": {name: entry(*model) for name, model in models.items()},
        "loss": entry(*loss),
        "plugins": list(plugins),
        "own_policy": callable(getattr(TRAINER_REGISTRY[trainer[0]], "policy", None)),
        "spec": policy.spec,
        "normalisation": policy.normaliser.modes,
        "inference": policy.inference,
    }
    temporary = folder.with_name(f".{folder.name}-new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {key: value.detach().cpu().clone().contiguous() for key, value in policy.module.state_dict().items()}
    save_file(weights, temporary / "model.safetensors")
    (temporary / "policy.json").write_text(json.dumps(description, indent=1) + "\n")
    old = folder.with_name(f".{folder.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_policy(folder: str | Path) -> Policy:
    """Load a policy from a run folder, or from its `policy/` folder alone.

        policy = load_policy("runs/x"); policy.reset(); action = policy.act({"observation.state": array})

    Raises:
        UserError: no policy there, a plugin to import first, weights that do not fit, or a statistic that is missing or
            has the wrong width; each by name.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    folder = folder / "policy" if (folder / "policy" / "policy.json").exists() else folder
    path = folder / "policy.json"
    if not path.exists():
        raise UserError(f"{folder}: no policy here (policy/policy.json); a run writes it when it ends")
    try:
        description = json.loads(path.read_text())
        weights = load_file(folder / "model.safetensors")
        spec, modes = description["spec"], description["normalisation"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged or incomplete policy ({type(error).__name__}: {error})") from error
    module = _build_module(description, spec, path)
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    if expected != found:
        key = next(key for key in {**expected, **found} if expected.get(key) != found.get(key))
        raise UserError(f"{folder}: weights {key!r} have shape {found.get(key)}, the model {expected.get(key)}")
    module.load_state_dict(weights)
    complete = {key: modes.get(key, "none") for key in spec}
    return Policy(module.eval(), Normaliser(spec, complete), spec)


def _build_module(description: dict[str, Any], spec: dict[str, Any], path: Path) -> nn.Module:
    """Build the acting module as the script did: one model, or the trainer's own `policy()`."""
    from . import LOSS_BUILDER_REGISTRY, MODEL_BUILDER_REGISTRY, TRAINER_REGISTRY

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
    models = nn.ModuleDict({name: factory.build(spec) for name, factory in factories.items()})
    if not description["own_policy"]:
        return models["policy"]
    cls, config = component(TRAINER_REGISTRY, description["trainer"])
    loss = instantiate(*component(LOSS_BUILDER_REGISTRY, description["loss"])).build()
    extras = trainer_extras(cls, config, spec, torch.device("cpu"))
    return cls(models=models, optimizers=idle_optimizers(models), loss=loss, **extras).policy()


def idle_optimizers(models: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    """Optimizers that never step, for a trainer that is built only to act."""
    named = ((name, [p for p in model.parameters() if p.requires_grad]) for name, model in models.items())
    return {name: torch.optim.SGD(params, lr=0.0) for name, params in named if params}


def trainer_extras(cls: type, config: Any, spec: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Those of `device`, `norm_stats`, `spec` and `config` that a trainer's constructor asks for."""
    import inspect

    norm_stats = {key: feature["stats"] for key, feature in spec.items() if "stats" in feature}
    extras = {"device": device, "norm_stats": norm_stats, "spec": spec, "config": config}
    parameters = inspect.signature(cls).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return extras
    names = {p.name for p in parameters}
    return {name: value for name, value in extras.items() if name in names}
