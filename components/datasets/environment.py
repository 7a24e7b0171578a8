"""The environment that a dataset was recorded in, offered for evaluation where it can be built again."""

import json
import logging
import math
import string
from typing import Any

from ..contracts import options_of
from ..envs.observations import observation_batch
from ..envs.vector import Environments
from .episodes import Episodes

logger = logging.getLogger(__name__)
WORD = string.ascii_letters + string.digits + "-_/."
# The environments that a file may name. ENV_BUILDER_REGISTRY also holds plugins, and a file must not choose a plugin.
BUILT_IN = ("gymnasium", "metaworld", "ogbench", "pusht")


def recoverable(episodes: Episodes, options: dict[str, Any]) -> dict[str, Any] | None:
    """{"name", options} of an environment; None, and the reason in the log, when it does not fit the data.

    Args:
        options: `name` in the registry ("gymnasium" by default) and options: numbers, plain words or lists of these.
    """
    from .. import ENV_BUILDER_REGISTRY

    options = {key: value for key, value in options.items() if key != "workers"}
    family, name = options.pop("name", "gymnasium"), options.get("id") or options.get("task") or ""
    try:
        odd = [key for key, value in options.items() if key != "kwargs" and not is_plain(value)]
        if family not in BUILT_IN or odd:
            raise ValueError(f"the environment {family!r} with {odd[0] if odd else name!r}")
        factory = options_of(ENV_BUILDER_REGISTRY[family], options)
        reached: list[tuple[str, str, str]] = getattr(factory, "reaches", list)()
        if reached:
            raise ValueError(f"its {reached[0][0]} {reached[0][2]}")
        envs = Environments(factory.build, 1, 0, 0.0)
        try:
            observation, _ = envs.reset(seed=0)
            named = observation_batch(observation, envs.single_observation_space)
            found = {key: math.prod(value.shape[1:]) for key, value in named.items()}
            found["action"] = math.prod(envs.single_action_space.shape)
        finally:
            envs.close()
        wanted = {
            key: math.prod(store.shape[1:])
            for key, store in episodes.observations.items()
            if key not in episodes.cameras
        }
        wanted["action"] = math.prod(episodes.columns["action"].shape[1:])
        for key, width in wanted.items():
            if found.get(key) != width:
                raise ValueError(f"its {key} has width {found.get(key, 0)}, the data has {width}")
    except Exception as error:  # of any kind: the data can be used without its environment
        reason = " ".join(str(error).split())[:160]
        logger.info("%s: the environment %s cannot be made again here (%s)", episodes.name, name, reason)
        return None
    return {"name": family, **options}


def is_plain(value: Any) -> bool:
    """Whether a value from a file is a number, a flag, a plain word, or a list of these."""
    if isinstance(value, list):
        return all(is_plain(part) for part in value)
    if isinstance(value, str):
        return not value.strip(WORD) and len(value) < 100
    return value is None or isinstance(value, bool) or (isinstance(value, (int, float)) and abs(value) <= 100_000)


def plain_words(values: Any) -> str:
    """The arguments of an environment that are numbers, flags or plain words, as JSON; others are not trusted."""
    kept = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        plain = isinstance(value, (bool, int, float)) or (isinstance(value, str) and value.replace("-", "").isalnum())
        if plain and key != "render_mode":
            kept[str(key)] = value
        else:
            logger.info("the environment's argument %s is left out", key)
    return json.dumps(kept) if kept else ""
