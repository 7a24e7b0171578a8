"""Weights & Biases as a mirror of `metrics.jsonl`; if it fails, the run continues without it."""

import logging
import netrc
import os
import queue
import socket
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

logger = logging.getLogger(__name__)
PATIENCE = 3.0  # seconds to reach the server, and to join it; `finish` waits for twice as long
WAITING = 10_000  # most records that wait for a server that does not answer; later ones are dropped


class Tracker:
    """A wandb run; its methods do nothing before `start`. A resumed run keeps its id, so that its curves continue.

    Args:
        folder: Run folder; wandb keeps its files there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Any = None
        self.records: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(WAITING)

    def start(self, config: dict[str, Any], project: str, name: str, group: str) -> None:
        """Join the server within seconds, or log offline.

        Args:
            config: The run's options.
            project, name, group: As wandb names them; the name is the folder's by default.
        """
        try:
            import wandb
        except ImportError:
            logger.warning("--track: wandb is missing (pip install wandb); the run continues without it")
            return
        id_file = self.folder / ".wandb-id"
        run_id = id_file.read_text() if id_file.exists() else uuid.uuid4().hex[:8]
        id_file.write_text(run_id)
        options = {"project": project, "name": name or self.folder.name, "group": group or None, "config": config}
        options |= {"id": run_id, "resume": "allow", "dir": str(self.folder)}
        server = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
        wanted = os.environ.get("WANDB_MODE") or ("online" if self._reachable(server) else "offline")
        for mode in dict.fromkeys((wanted, "offline")):
            try:
                settings = wandb.Settings(init_timeout=PATIENCE, silent=True)
                self.run = wandb.init(mode=mode, settings=settings, **options)  # type: ignore[arg-type]
            except Exception as error:
                logger.warning("--track: wandb %s failed (%s)", mode, (str(error) or repr(error)).splitlines()[0])
                options["id"] = run_id = uuid.uuid4().hex[:8]  # wandb may still hold the id of the failed run
                id_file.write_text(run_id)
                continue
            if mode == "offline":
                logger.warning("--track: wandb is offline; later: wandb sync %s/wandb/offline-run-*", self.folder)
            self.sender = threading.Thread(target=self._send, daemon=True)
            self.sender.start()
            return

    @staticmethod
    def _reachable(base_url: str) -> bool:
        """Whether there is an API key and the server answers within seconds; wandb itself would wait for 100 s."""
        found: list[bool] = []

        def knock() -> None:
            url = urlparse(base_url)
            if os.environ.get("WANDB_API_KEY") or netrc.netrc().authenticators(url.hostname or ""):
                port = url.port or (443 if url.scheme == "https" else 80)
                with socket.create_connection((url.hostname or "", port), timeout=PATIENCE):
                    found.append(True)

        _within(PATIENCE, knock)
        return bool(found)

    def log(self, record: dict[str, Any], step: int) -> None:
        """Queue one record; a thread sends it, so that a lost network does not delay the run."""
        if self.run is not None and not self.records.full():
            self.records.put(({key: value for key, value in record.items() if key != "step"}, step))

    def _send(self) -> None:
        """In a thread: send the queued records until `finish`, or until wandb fails."""
        run = self.run
        while (item := self.records.get()) is not None:
            try:
                run.log(item[0], step=item[1])
            except Exception as error:
                logger.warning("--track: wandb stopped (%s); the run continues without it", error)
                self.run = None
                return
        try:
            run.finish()
        except Exception as error:
            logger.warning("--track: wandb did not finish (%s); its files stay in the run folder", error)

    def video(self, path: Path, step: int) -> None:
        """Send a video file."""
        if self.run is not None and path.exists():
            import wandb

            self.log({"eval/video": wandb.Video(str(path), format="mp4")}, step)

    def finish(self) -> None:
        """Send the remaining records, for a few seconds at most."""
        if self.run is not None:
            if not self.records.full():
                self.records.put(None)
            self.sender.join(2 * PATIENCE)
            if self.sender.is_alive():
                logger.warning("--track: wandb did not finish in time; its files stay in the run folder")


def _within(seconds: float, action: Callable[[], Any]) -> bool:
    """Run `action` in a thread that is abandoned when it takes longer; returns whether it ended in time."""

    def quietly() -> None:
        try:
            action()
        except Exception as error:
            logger.debug("%s", error)

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
