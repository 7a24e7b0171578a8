"""A person at the terminal who steers one environment by keys, and takes over and gives back by one of them."""

import os
import re
import select
import sys
import time
from typing import Any

import numpy as np
from torch import Tensor

from ..acting.policy import motionless
from ..envs.vector import action_bounds
from ..errors import UserError, require

PAIRS = tuple(zip("asqfghjkl", "dwertyuio", strict=True))  # of the numbers of an action: down, up
TOGGLE = " "
SPECIAL = re.compile(r"\x1b(\[[0-9;]*.|O.|)", re.DOTALL)  # what an arrow or another special key sends: it has letters


class Keyboard:
    """An expert who is asked at a fixed rate. Where no key is pressed, the robot stands still (`hold`).

    Args:
        environments: One environment; `hold` is its own, or zeros.
        rate: Steps per second.
        speed: Action of a pressed key, in half ranges.
        fd: File descriptor of the terminal; by default that of standard input.

    Raises:
        UserError: no terminal, or more numbers in an action than there are keys.
    """

    def __init__(self, environments: Any, rate: float, speed: float, fd: int | None = None) -> None:
        option = "--trainer.expert keyboard"
        self.termios: Any = require("termios", "termios, which is a part of Python on Unix")
        if fd is None:
            try:
                fd = sys.stdin.fileno()
            except (AttributeError, OSError, ValueError):
                fd = -1
        if fd < 0 or not os.isatty(fd):
            raise UserError(f"{option} needs a terminal, and standard input is none; start the run in one")
        low, high = action_bounds(environments.single_action_space)
        if len(low) > len(PAIRS):
            raise UserError(f"{option} has keys for {len(PAIRS)} numbers of an action, the environment has {len(low)}")
        self.fd, self.period, self.low, self.high = fd, 1 / rate, low, high
        self.step, self.pairs = speed * (high - low) / 2, PAIRS[: len(low)]
        self.hold = getattr(environments.envs, "hold", None) or motionless
        self.before: Any = None  # the terminal's settings
        self.steers = self.toggled = False
        self.due, self.last = 0.0, np.full((1, len(low)), np.nan, np.float32)

    def open(self, steers: bool) -> tuple[str, ...]:
        """Read keys one by one, without showing them; returns lines about the keys.

        Args:
            steers: Whether the person acts at first.
        """
        import tty

        self.steers, self.before = steers, self.termios.tcgetattr(self.fd)
        tty.setcbreak(self.fd)
        moves = ", ".join(f"{down}/{up} number {i}" for i, (down, up) in enumerate(self.pairs, 1))
        return "keys: space takes over and gives back; down and up:", f"  {moves}"

    def close(self) -> None:
        """Give the terminal back as it was."""
        if self.before is not None:
            self.termios.tcsetattr(self.fd, self.termios.TCSADRAIN, self.before)
            self.before = None

    def act(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """The person's action `[1, Da]`, after the time of a step, by the keys that were pressed in it."""
        keys = self._keys()
        self.toggled = keys.count(TOGGLE) % 2 == 1
        self.steers ^= self.toggled
        action = np.array(self.hold(observation, self.last), np.float32).reshape(1, -1)
        for i, (down, up) in enumerate(self.pairs):
            if moved := (up in keys) - (down in keys):
                action[0, i] = (self.low + self.high)[i] / 2 + moved * self.step[i]
        return action

    def _keys(self) -> str:
        """What was typed until the next step is due."""
        now = time.monotonic()
        self.due = max(self.due + self.period, now)
        typed = b""
        while self.before is not None and select.select([self.fd], [], [], max(self.due - time.monotonic(), 0))[0]:
            if not (more := os.read(self.fd, 1024)):
                break
            typed += more
            if time.monotonic() >= self.due:
                break
        return SPECIAL.sub("", typed.decode("ascii", "ignore")).lower()

    def follow(self, transitions: dict[str, Tensor] | None) -> None:
        """Remember the action that was executed; a new episode begins without any."""
        if transitions is None or bool(transitions["begins"][0]):
            self.last[:] = np.nan
        else:
            self.last = transitions["action"].numpy().reshape(1, -1).astype(np.float32)

    def rank_state(self) -> dict[str, Any]:
        """None: a person goes on as they like."""
        return {}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore the state of `rank_state`."""
