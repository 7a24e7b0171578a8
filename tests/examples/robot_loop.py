"""A policy on a robot at a fixed rate: the next chunk is planned while the last one is executed.

python offline_trainer.py --trainer flow --run-dir runs/x
PYTHONPATH=. python tests/examples/robot_loop.py runs/x --rate 30

The robot is simulated here, by Meta-World or Push-T, whose time passes with the wall clock. For a real one, write
a class with the same three methods (`Robot` in protocols.py); all else stays.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np

from components import ENV_BUILDER_REGISTRY, UserError, load_policy
from components.acting.player import Player, RobotStoppedError
from components.envs.autoreset import Stepper
from components.envs.observations import success_of
from components.envs.vector import executed
from components.run.reading import read_args

HOLD = {"metaworld": (0, 0, 0, np.nan)}  # its actions move the hand: no movement, and the gripper as it was
SIMULATED = ("metaworld", "pusht")


class Simulated:
    """An environment of one robot."""

    def __init__(self, name: str, **options: Any) -> None:
        self.envs = ENV_BUILDER_REGISTRY[name](**options).build(1, 0)
        self.stepper = Stepper(self.envs)

    def begin(self, seed: int) -> None:
        """Put everything in its place, which a person does for a real robot."""
        self.observation, _ = self.stepper.reset(seed=[seed])
        self.ended = self.success = False

    def observe(self) -> dict[str, np.ndarray]:
        """What the sensors show now: joints, and pictures [H, W, C] or [C, H, W] uint8."""
        return {key: value[0] for key, value in self.observation.items()}

    def act(self, action: np.ndarray) -> None:
        """Send one action to the motors, without waiting for them."""
        step = self.stepper.step(executed(action[None], self.envs.single_action_space))
        self.observation, self.ended = step.observation, bool(step.ended[0])
        self.success |= bool(success_of(step.info, 0))

    def stop(self) -> None:
        """Brake, whatever has happened. The simulated robot moves in `act` alone."""


def main() -> str | None:
    """Run some episodes; returns why it failed, if it did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--rate", type=float, default=30, help="steps a second")
    parser.add_argument("--episodes", type=int, default=3)
    parser.add_argument(
        "--margin", type=float, default=0.5, help="of the actions' range, beyond which the robot is stopped"
    )
    parser.add_argument("--action-steps", type=int, help="steps between two plans")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    try:
        env = read_args(Path(args.run))["env"] or {}
        if env.get("name") not in SIMULATED:
            known = f"in {env['name']}" if env else "without an environment"
            return f"error: {args.run} was evaluated {known}; for a robot of yours, put a class in place of Simulated"
        policy = load_policy(args.run, **({} if args.action_steps is None else {"action_steps": args.action_steps}))
        robot = Simulated(**env)
        player = Player(policy, robot, rate=args.rate, margin=args.margin, hold=HOLD.get(env["name"]))
        for seed in range(args.episodes):
            robot.begin(seed)
            try:
                player.run(done=lambda: robot.ended)
            finally:
                print(f"episode {seed}: {'success' if robot.success else 'no success'}, {player.summary}")
    except (UserError, RobotStoppedError, KeyboardInterrupt) as error:
        return f"error: {error}" if str(error) else "stopped by Ctrl-C"
    return None


if __name__ == "__main__":
    sys.exit(main())
