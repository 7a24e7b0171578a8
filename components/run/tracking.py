"""Weights & Biases, or TensorBoard, as a mirror of a run's logs; if it fails, the run continues without it."""

import io
import json
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

from ..acting.evaluation import scores
from ..errors import first_line, one_line, require
from .curves import read_lines
from .logs import LATER
from .reading import flat

logger = logging.getLogger(__name__)
PATIENCE = 3.0  # seconds to reach the server, and to join it; `finish` waits for twice as long
WAITING = 10_000  # most records that wait for a server that does not answer; later ones are dropped
GIF = (480, 10)  # width of a film for TensorBoard, and most frames a second


def check_tracker(name: str) -> None:
    """Refuse `--track` before anything is built, where its package is missing. Raises UserError."""
    if name == "tensorboard":
        with one_line("--track tensorboard"):
            require("torch.utils.tensorboard", "tensorboard")


def tracker_of(name: str, folder: Path) -> Any:
    """The tracker that `--track` names, for a run folder."""
    return TensorBoard(folder) if name == "tensorboard" else Tracker(folder)


class Tracker:
    """A wandb run; its methods do nothing before `start`. A resumed run keeps its id, so that its curves continue.

    Args:
        folder: Run folder; wandb keeps its files there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run: Any = None
        self.records: queue.Queue[tuple[dict[str, Any], int] | None] = queue.Queue(WAITING)

    def start(self, config: dict[str, Any], project: str, name: str, group: str, step: int = 0) -> None:
        """Join the server within seconds, or log offline.

        Args:
            config: The run's options.
            project, name, group: As wandb names them; the name is the folder's by default.
            step: Where the run begins; wandb knows how far it was.
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
                logger.warning("--track: wandb %s failed (%s)", mode, first_line(error, repr(error)))
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

    def show(self, name: str, path: Path, step: int) -> None:
        """Send a film, or a picture."""
        if self.run is not None and path.exists():
            import wandb

            try:
                film = path.suffix == ".mp4"
                shown = wandb.Video(str(path), format="mp4") if film else wandb.Image(str(path))
            except Exception as error:
                logger.warning("--track: wandb does not take %s (%s)", path, error)
                return
            self.log({name: shown}, step)

    def flush(self) -> None:
        """Nothing: records are sent as they come."""

    def finish(self) -> None:
        """Send the remaining records, for a few seconds at most."""
        if self.run is not None:
            if not self.records.full():
                self.records.put(None)
            self.sender.join(2 * PATIENCE)
            if self.sender.is_alive():
                logger.warning("--track: wandb did not finish in time; its files stay in the run folder")


class TensorBoard:
    """Event files in the run folder, for `tensorboard --logdir runs`; its methods do nothing before `start`.

    Its records are those of the run's logs. They are on the disk before a checkpoint is valid, and what a killed run
    wrote after its last checkpoint is taken back when it is resumed.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def start(self, config: dict[str, Any], project: str, name: str, group: str, step: int = 0) -> None:
        """Open an event file, with the options as a text; project, name and group are wandb's.

        Args:
            step: Where the run begins; a run that was not tracked before it was resumed writes what its logs hold.
        """
        events = self.folder / "tensorboard"
        known = any(events.glob("events.*"))
        named = {f"{key}.".replace("_options.", ".")[:-1]: value for key, value in flat(config).items()}
        rows = "".join(f"| {key} | {json.dumps(value)} |\n" for key, value in named.items())
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(events), flush_secs=10, purge_step=step + 1 if known else None)
        except Exception as error:
            self._stopped(error)
            return
        self._try(lambda: self.writer.add_text("options", f"| option | value |\n|---|---|\n{rows}", step))
        if step and not known:
            self._try(self._write_logs)
        logger.info("TensorBoard: tensorboard --logdir %s", self.folder.parent)

    def log(self, record: dict[str, Any], step: int) -> None:
        """Add the numbers of one record."""
        numbers = {k: v for k, v in record.items() if k != "step" and isinstance(v, (int, float))}

        def add() -> None:
            from tensorboard.compat.proto.summary_pb2 import Summary

            values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in numbers.items()]
            self.writer.file_writer.add_summary(Summary(value=values), step)

        self._try(add)

    def show(self, name: str, path: Path, step: int) -> None:
        """Add a picture, or a film as a GIF, which TensorBoard shows among the pictures."""

        def add() -> None:
            from PIL import Image
            from tensorboard.compat.proto.summary_pb2 import Summary

            data = gif(path) if path.suffix == ".mp4" else path.read_bytes()
            width, height = Image.open(io.BytesIO(data)).size
            picture = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=data)
            self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=picture)]), step)

        if path.exists():
            self._try(add)

    def flush(self) -> None:
        """Write what is queued to the disk."""
        self._try(lambda: self.writer.flush())

    def finish(self) -> None:
        """Write what is queued, and close the file; for a few seconds at most."""
        if self.writer is not None:
            _within(2 * PATIENCE, self.writer.close)

    def _write_logs(self) -> None:
        """Write what the run's logs hold."""
        for line in read_lines(self.folder / "metrics.jsonl"):
            self.log(line, line["step"])
        for line in read_lines(self.folder / "eval.jsonl"):
            if LATER not in line:
                self.log(scores(line), line["step"])

    def _try(self, action: Callable[[], None]) -> None:
        """Call `action` if there is a writer, which a failure ends."""
        if self.writer is not None:
            try:
                action()
            except Exception as error:
                self._stopped(error)

    def _stopped(self, error: Exception) -> None:
        logger.warning("--track: TensorBoard stopped (%s); the run continues without it", error)
        self.writer = None


def gif(path: Path) -> bytes:
    """A film as an animated GIF, smaller and with fewer frames."""
    import av
    from PIL import Image

    width, most = GIF
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or most)
        every = max(round(fps / most), 1)
        pictures = [frame.to_image() for i, frame in enumerate(container.decode(stream)) if i % every == 0]
    size = (min(width, pictures[0].width), round(min(width / pictures[0].width, 1) * pictures[0].height))
    plain = Image.Dither.NONE  # whose pictures are packed better
    frames = [picture.resize(size).quantize(128, Image.Quantize.FASTOCTREE, dither=plain) for picture in pictures]
    file = io.BytesIO()
    frames[0].save(file, "gif", save_all=True, append_images=frames[1:], duration=round(1000 * every / fps), loop=0)
    return file.getvalue()


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
