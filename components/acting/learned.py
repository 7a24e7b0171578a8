"""The policy of what a script trains."""

from dataclasses import replace
from typing import Any

from .. import contracts
from ..data.normalisation import Normaliser
from ..data.pictures import RULE, pictures_of
from ..errors import UserError
from .inference import one_way
from .policy import Policy

AT_ONCE = "a residual policy corrects the action of each step from the observation of that step, and cannot be late"


def check_encoder(args: Any, spec: dict[str, Any]) -> None:
    """Refuse an image encoder that the command line asks for, where there are no pictures. Raises UserError."""
    from .. import MODEL_BUILDER_REGISTRY

    if not args.given("model") or pictures_of(spec):
        return
    for word in args.model:
        entry = word.rpartition("=")[2]
        if getattr(MODEL_BUILDER_REGISTRY.get(entry), "role", "") == "encoder":
            found = ", ".join(key for key in spec if key.startswith("observation."))
            raise UserError(
                f"--model {word} encodes pictures, and there are none; leave it out, or see --dataset.cameras;"
                f" found: {found or 'no observations'}; {RULE}"
            )


def acting_policy(
    learner: Any, normaliser: Normaliser, spec: dict[str, Any], args: Any, needed: bool = False, base: Any = None
) -> Any:
    """The policy of a learner: its trainer's `policy()`, or `models["policy"]`; None if it cannot act on the data.

    Args:
        args: With `policy`, the inference settings, and `given`, which returns whether the command line sets an option:
            a default out of range is reduced.
        needed: Refuse a trainer without a policy.
        base: The frozen policy under it, or None.

    Raises:
        UserError: it fails on an observation, its actions have another shape than the data's, invalid settings, or an
            encoder without pictures.
    """
    check_encoder(args, spec)
    if "action" not in spec or not any(key.startswith("observation.") for key in spec):
        return None
    if (module := contracts.acting_module(learner.trainer, learner.models)) is None:
        if needed:
            raise UserError(f"trainer {args.trainer!r} has no policy: neither policy() nor a model named 'policy'")
        return None
    module.to(learner.device)  # it may have further tensors
    given = args.given
    settings = one_way(args.policy, lambda name: given(f"policy.{name.replace('_', '-')}"))
    chunk = int(spec["action"]["shape"][0]) if "action_is_pad" in spec else 1
    if settings.action_steps is not None and not given("policy.action-steps"):
        most = chunk if settings.blocking or chunk == 1 else max(chunk - settings.delay, 1)
        settings = replace(settings, action_steps=min(settings.action_steps, most))
    if chunk == 1 and not given("policy.ensemble"):
        settings = replace(settings, ensemble=None)
    if settings.sampling_steps is not None and not given("policy.sampling-steps"):
        most = getattr(module, "usual_steps", getattr(module, "most_steps", settings.sampling_steps))
        settings = replace(settings, sampling_steps=min(settings.sampling_steps, most))
    if base and base.module and getattr(args, "normalise_observations", False):
        raise UserError("--normalise-observations: the frozen policy needs its own normalisation; leave it out")
    if base and base.at_once and settings.delay:
        raise UserError(f"--policy.delay {settings.delay}: {AT_ONCE}")
    policy = Policy(module, normaliser, spec, settings)
    policy.base = base
    return policy
