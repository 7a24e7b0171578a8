"""The environment that a dataset was recorded in, offered for evaluation where it can be made again."""

import json
import logging
import math
from typing import Any

from ..envs.gymnasium import GymnasiumEnv
from .episodes import Episodes

logger = logging.getLogger(__name__)


def recoverable(episodes: Episodes, options: dict[str, Any]) -> dict[str, Any] | None:
    """{"name", options} of a Gymnasium environment, or None, with a word about why, when it does not fit the data.

    Args:
        options: Of `GymnasiumEnv`.
    """
    from ..evaluation import observation_batch

    name = options["id"]
    try:
        envs = GymnasiumEnv(**options).build(1, 0)
        try:
            observation, _ = envs.reset(seed=0)
            found = {key: math.prod(value.shape[1:]) for key, value in observation_batch(observation).items()}
            found["action"] = math.prod(envs.single_action_space.shape)
        finally:
            envs.close()
        wanted = {
            key: math.prod(store.shape[1:]) for key, store in episodes.observations.items() if "images" not in key
        }
        wanted["action"] = math.prod(episodes.columns["action"].shape[1:])
        for key, width in wanted.items():
            if found.get(key) != width:
                raise ValueError(f"its {key} has width {found.get(key, 0)}, the data has {width}")
    except Exception as error:  # of whatever kind: an environment is a bonus here
        reason = " ".join(str(error).split())[:160]
        logger.info("%s: the environment %s cannot be made again here (%s); no evaluation", episodes.name, name, reason)
        return None
    return {"name": "gymnasium", **options}


def plain_words(values: Any) -> str:
    """Those arguments of an environment that are numbers, flags or plain words, as JSON: the file is not trusted."""
    kept = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        plain = isinstance(value, (bool, int, float)) or (isinstance(value, str) and value.replace("-", "").isalnum())
        if plain and key != "render_mode":
            kept[str(key)] = value
        else:
            logger.info("the environment's argument %s is left out", key)
    return json.dumps(kept) if kept else ""
