"""Meta-World, 50 manipulation tasks with a simulated Sawyer arm."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..data.pictures import sizes_of
from ..errors import UserError
from .workers import spread

# What to tell a policy that has learnt several tasks; their order is Meta-World's.
INSTRUCTIONS = {
    "assembly-v3": "assemble the parts: put the ring on the peg",
    "basketball-v3": "dunk the basketball into the basket",
    "bin-picking-v3": "pick the block out of one bin and put it into the other",
    "box-close-v3": "close the box with its lid",
    "button-press-topdown-v3": "press the button down from the top",
    "button-press-topdown-wall-v3": "press the button down from the top, over the wall",
    "button-press-v3": "press the button",
    "button-press-wall-v3": "press the button behind the wall",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "disassemble the parts: take the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door",
    "hand-insert-v3": "insert the hand into the hole",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-open-v3": "open the faucet",
    "faucet-close-v3": "close the faucet",
    "hammer-v3": "hammer the nail into the wall",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "pick-place-wall-v3": "pick up the puck and place it at the goal behind the wall",
    "pick-out-of-hole-v3": "pick the puck out of the hole",
    "pick-place-v3": "pick up the puck and place it at the goal",
    "plate-slide-v3": "slide the plate into the cabinet",
    "plate-slide-side-v3": "slide the plate sideways into the cabinet",
    "plate-slide-back-v3": "slide the plate back out of the cabinet",
    "plate-slide-back-side-v3": "slide the plate back out of the cabinet, sideways",
    "peg-insert-side-v3": "insert the peg into the hole from the side",
    "peg-unplug-side-v3": "unplug the peg sideways",
    "soccer-v3": "kick the soccer ball into the goal",
    "stick-push-v3": "push the box with the stick",
    "stick-pull-v3": "pull the box with the stick",
    "push-v3": "push the puck to the goal",
    "push-wall-v3": "push the puck around the wall to the goal",
    "push-back-v3": "push the puck back to the goal",
    "reach-v3": "reach the goal with the hand",
    "reach-wall-v3": "reach the goal behind the wall with the hand",
    "shelf-place-v3": "pick up the puck and place it on the shelf",
    "sweep-into-v3": "sweep the puck into the hole",
    "sweep-v3": "sweep the puck off the table",
    "window-open-v3": "open the window",
    "window-close-v3": "close the window",
}


def hold(observation: dict[str, np.ndarray], last: np.ndarray) -> np.ndarray:
    """The actions `[n, 4]` with which hands stay where they are, and grippers as they were, at first open."""
    return np.where([False, False, False, True], np.where(np.isnan(last), -1, last), 0)


def draw_off_screen() -> None:
    """Set up MuJoCo to render without a display, which its default on Linux requires."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")


def sizes_drawn(
    image_size: int | Sequence[Any], cameras: Sequence[str], option: str = "--env.image-size"
) -> dict[str, tuple[int, int]]:
    """Camera -> (height, width) in which it is drawn. Raises UserError: as `sizes_of`; a camera without a size."""
    sizes = sizes_of(image_size, cameras, option) if cameras or image_size != 64 else {}
    if rest := [camera for camera in cameras if camera not in sizes]:
        raise UserError(f"{option}: no size for the camera {rest[0]!r}; add {rest[0]}=64x64")
    return sizes


@dataclass(frozen=True)
class MetaWorldEnv:
    """Meta-World v3: success ends an episode, and a seed determines the goal."""

    task: str = "push-v3"
    """One of the 50 tasks, such as push-v3, pick-place-v3, drawer-open-v3."""
    max_episode_steps: int = 200
    """Steps until an episode is cut; Meta-World's own limit is 500, its experts need 50 to 105."""
    render_mode: Literal["rgb_array"] | None = None
    """Render frames off screen."""
    cameras: tuple[str, ...] = ()
    """Cameras that are observed, such as behindGripper or corner2; the state is then hand and gripper alone."""
    image_size: int | tuple[int | str, ...] = 64
    """Height and width of their pictures: 64 for squares, 48 64, or behindGripper=64x64 corner2=48x64."""
    reward: Literal["dense", "sparse"] = "dense"
    """Meta-World's rewards, 0 to 10, with 10 at success; or 10 at success and 0 otherwise. Dense ones may rise while
    fewer episodes succeed."""
    workers: int = 0
    """Processes that share the environments; 0 steps them in this process."""

    def build(self, num_envs: int, seed: int) -> Any:
        """Make a vector environment.

        Raises:
            UserError: an unknown task, steps outside 1 to 500, or the package is missing.
        """
        if self.workers:
            shared = spread(replace(self, workers=0).build, num_envs, seed, self.workers)
            shared.hold = hold
            return shared
        if not 1 <= self.max_episode_steps <= 500:
            raise UserError(
                f"--env.max-episode-steps {self.max_episode_steps} must be 1 to 500, Meta-World's own limit"
            )
        sizes_drawn(self.image_size, self.cameras)
        if self.render_mode is not None or self.cameras:
            draw_off_screen()
        from gymnasium.vector import SyncVectorEnv

        from .metaworld_simulator import MetaWorld

        view: Any = {"render_mode": self.render_mode, "cameras": self.cameras, "image_size": self.image_size}
        view["reward"] = self.reward
        envs: Any = SyncVectorEnv([lambda: MetaWorld(self.task, self.max_episode_steps, **view)] * num_envs)
        envs.hold, envs.expert = hold, lambda: np.stack([env.unwrapped.expert() for env in envs.envs])
        envs.reset(seed=seed)
        envs.task_description = INSTRUCTIONS.get(self.task)
        return envs
