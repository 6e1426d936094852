"""Metrics and episodes on their way to files, TensorBoard and W&B; none of them can stop a run."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import itertools
import json
import logging
import math
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, Self

from starling.errors import MissingExtraError
from starling.reporting.episodes import Episodes
from starling.reporting.metrics import check_names

STEP = "time/total_timesteps"
METRICS_FILE = "metrics.jsonl"
EPISODES_FILE = "episodes.csv"
EPISODES_HEADER = "step,return,length"

_log = logging.getLogger(__name__)


class MetricsWriter:
    """Writes a run's metrics and episodes into its folder and to whoever else is asked for.

    The files are written at once, whole lines only. TensorBoard and W&B are fed by a thread each
    through a bounded queue, so that a slow or broken one costs the training loop nothing. Whatever
    fails says so in one warning of the logger ``starling.reporting.writers``, and training goes on.
    """

    def __init__(
        self,
        run_folder: Path | str,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        resume_step: int | None = None,
    ):
        """Open everything.

        Args:
            run_folder: Folder of the run; its ``config.json``, if there, is shown in W&B.
            tensorboard: Whether to write TensorBoard events into the run folder.
            wandb_project: W&B project to log to, None for no W&B.
            resume_step: Environment step that the run goes on from: whatever was written for later
                steps is cut, so that nothing is counted twice. None: cut nothing.

        Raises:
            MissingExtraError: W&B is asked for and not installed.
        """
        if wandb_project:
            require_wandb()
        folder = Path(run_folder)
        if resume_step is not None:
            _cut(folder / METRICS_FILE, resume_step, _step_of_metrics)
            _cut(folder / EPISODES_FILE, resume_step, _step_of_episode)
        self._metrics = _LineFile(folder / METRICS_FILE)
        self._episodes = _LineFile(folder / EPISODES_FILE, header=EPISODES_HEADER + "\n")
        self._background: list[_Background] = []
        if tensorboard:
            purge = None if resume_step is None else resume_step + 1
            self._background.append(_Background("TensorBoard", _TensorBoard(folder, purge)))
        if wandb_project:
            self._background.append(_Background("W&B", _WandB(folder, wandb_project)))

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log one iteration.

        Args:
            step: Environment steps so far; written as ``time/total_timesteps``.
            metrics: Values by name. None is left out, a value that is not finite becomes ``null``
                in the file.
        """
        check_names(metrics)
        values: dict[str, float] = {STEP: int(step)}
        for name, value in metrics.items():
            if value is not None and name != STEP:
                values[name] = int(value) if isinstance(value, Integral) else float(value)
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._metrics.append(json.dumps(line, allow_nan=False) + "\n")
        for background in self._background:
            background.put(values)

    def write_episodes(self, episodes: Episodes) -> None:
        """Append finished episodes to ``episodes.csv``."""
        rows = zip(
            episodes.end_steps.tolist(),
            episodes.returns.tolist(),
            episodes.lengths.tolist(),
            strict=True,
        )
        text = "".join([f"{step},{ret!r},{length}\n" for step, ret, length in rows])
        if text:
            self._episodes.append(text)

    def close(self, timeout: float = 10.0) -> None:
        """Hand over what is queued and close; returns within ``timeout`` seconds. Idempotent."""
        deadline = time.monotonic() + timeout
        for background in self._background:
            background.stop()
        for background in self._background:
            background.join(max(0.0, deadline - time.monotonic()))
        self._background = []
        self._metrics.close()
        self._episodes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def require_wandb() -> None:
    """Check that W&B is installed.

    Raises:
        MissingExtraError: It is not.
    """
    spec = importlib.util.find_spec("wandb")
    # W&B leaves a folder "wandb" where it runs, which Python takes for an empty package.
    if spec is None or spec.origin is None:
        raise MissingExtraError(
            "logging to W&B needs the package wandb: pip install 'starling-rl[wandb]', "
            "or leave out --wandb_project"
        )


class _LineFile:
    """Appends whole lines: one that does not fit on the disk is taken back, and tried no more."""

    def __init__(self, path: Path, header: str = ""):
        self._path = path
        self._file = None
        self._end = 0
        self._warned = False
        try:
            # Unbuffered, so that a line is with the system when append returns.
            self._file = path.open("ab", buffering=0)
            self._end = self._file.tell()
        except OSError as error:
            self._warn(error)
        if self._end == 0 and header:
            self.append(header)

    def append(self, text: str) -> None:
        if self._file is None:
            return
        data = text.encode()
        try:
            if self._file.write(data) == len(data):
                self._end += len(data)
                return
            error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError as raised:
            error = raised
        with contextlib.suppress(OSError):  # half a line would spoil the next one too
            self._file.truncate(self._end)
        self._warn(error)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(
                "%s cannot be written (%s); training goes on without it",
                self._path,
                error.strerror or error,
            )


def _cut(path: Path, last_step: int, step_of: Callable[[str], int]) -> None:
    """Remove the lines after a step, and those that a killed run left torn."""
    rest = path.with_name(f".{path.name}.rest")
    try:
        with path.open(encoding="utf-8", errors="replace") as old, rest.open("w") as new:
            for line in old:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if line.endswith("\n") and step_of(line) <= last_step:
                        new.write(line)
        rest.replace(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        rest.unlink(missing_ok=True)
        _log.warning("%s keeps lines after step %d: %s", path, last_step, error)


def _step_of_metrics(line: str) -> int:
    return json.loads(line)[STEP]


def _step_of_episode(line: str) -> int:
    if line.rstrip("\n") == EPISODES_HEADER:
        return 0
    step, _, _ = line.split(",")
    return int(step)


class _Destination(Protocol):
    """Something that takes metrics; ``write`` may be slow and may raise, at any time."""

    def write(self, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _Background:
    """Feeds a destination from a thread, through a queue that drops what does not fit."""

    def __init__(self, name: str, destination: _Destination, queue_size: int = 1000):
        self._name = name
        self._destination = destination
        self._queue: queue.Queue[Mapping[str, float] | None] = queue.Queue(queue_size)
        self._stopped = threading.Event()
        self._warned = False
        # A daemon: a destination that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"starling-{name}", daemon=True)
        self._thread.start()

    def put(self, values: Mapping[str, float]) -> None:
        try:
            self._queue.put_nowait(values)
        except queue.Full:
            self._warn("is too slow, some values are dropped")

    def stop(self) -> None:
        self._stopped.set()
        with contextlib.suppress(queue.Full):  # then the thread sees the flag after the next value
            self._queue.put_nowait(None)

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn("did not take its last values in time")

    def _run(self) -> None:
        while True:
            values = self._queue.get()
            if values is not None:
                self._attempt(lambda values=values: self._destination.write(values))
            if self._stopped.is_set() and self._queue.empty():
                break
        self._attempt(self._destination.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:  # W&B has been seen to raise KeyboardInterrupt here
            self._warn(f"failed ({type(error).__name__}: {error})")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("%s %s; training goes on", self._name, what)


class _TensorBoard:
    """TensorBoard events in the run folder; a minute after a failure it goes on in a new file."""

    _files = itertools.count()
    _pause = 60.0

    def __init__(self, folder: Path, purge_step: int | None):
        self._folder = folder
        self._purge_step = purge_step
        self._events: Any = None
        self._retry_at = -math.inf

    def write(self, values: Mapping[str, float]) -> None:
        if time.monotonic() < self._retry_at:
            return
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if name != STEP
        ]
        event = Event(wall_time=time.time(), step=int(values[STEP]), summary=Summary(value=scalars))
        # tensorboardX's SummaryWriter blocks its caller for ever once its thread has met a full
        # disk, and pickles through a process queue; the writer beneath it does neither.
        try:
            self._events = self._events or self._open()
            self._events.write_event(event)
            self._events.flush()
            self._purge_step = None
        except Exception:
            self._events = None  # what follows a torn record cannot be read
            self._retry_at = time.monotonic() + self._pause
            raise

    def _open(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

        # A file of its own even where a run stops and resumes within one second.
        suffix = f".{os.getpid()}.{next(self._files)}"
        events = EventsWriter(str(self._folder / "events"), suffix)
        if self._purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            events.write_event(
                Event(wall_time=time.time(), step=self._purge_step, session_log=start)
            )
        return events

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


class _WandB:
    """One W&B run per run folder; where it cannot be started it is off for good."""

    def __init__(self, folder: Path, project: str):
        self._folder = folder
        self._project = project
        self._run: Any = None
        self._started = False

    def write(self, values: Mapping[str, float]) -> None:
        if not self._started:
            self._started = True
            self._run = self._start()
        if self._run is not None:
            # W&B ignores steps that it has already: a resumed run is not counted twice.
            self._run.log(dict(values), step=int(values[STEP]))

    def _start(self) -> Any:
        import wandb

        settings = wandb.Settings(console="off", silent=True)  # the console is the progress bar's
        if wandb.setup(settings).settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("no key is configured: run `wandb login`, or set WANDB_MODE=offline")
        config = {}
        with contextlib.suppress(OSError, ValueError):
            config = json.loads((self._folder / "config.json").read_text())
        identity = self._folder / "wandb_id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex)
        return wandb.init(
            project=self._project,
            name=self._folder.name,
            id=identity.read_text().strip(),
            resume="allow",
            dir=str(self._folder),
            config=config,
            settings=settings,
        )

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
