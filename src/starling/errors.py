"""What Starling raises: a user's mistakes apart from an environment's failures."""

from __future__ import annotations

import signal
import threading
import traceback

_LONGEST_MESSAGE, _LONGEST_TRACEBACK = 5_000, 50_000  # characters


def is_interrupt(error: BaseException) -> bool:
    """Whether it is Ctrl-C, which cannot come to workers: there an environment has raised it."""
    main = threading.current_thread() is threading.main_thread()
    heard = main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    return heard and isinstance(error, KeyboardInterrupt)


def said(error: BaseException) -> str:
    """What an exception says; some cannot, and some say too much."""
    try:
        return _shortened(str(error), _LONGEST_MESSAGE)
    except Exception:
        return "(what it says cannot be shown)"


def in_a_line(error: BaseException) -> str:
    """What an exception says, or its name where it says nothing, in one line."""
    return " ".join(said(error).split()) or type(error).__name__


def traceback_of(error: BaseException) -> str:
    """An exception's traceback, with those of its causes."""
    return _shortened("".join(traceback.format_exception(error)).rstrip(), _LONGEST_TRACEBACK)


def _shortened(text: str, most: int) -> str:
    """The text without its middle where that is too long to be sent, logged and read."""
    if len(text) <= most:
        return text
    cut = f" [... {len(text) - most:,} characters left out ...] "
    return text[: most // 2] + cut + text[len(text) - most // 2 :]


class StarlingError(Exception):
    """Base of every error that Starling raises on purpose."""


class UserError(StarlingError, ValueError):
    """Input that cannot be used; the message says what is wrong and how to fix it."""


class MissingExtraError(UserError, ImportError):
    """A feature needs a package that is not installed; the message names the extra."""


class CheckpointError(UserError):
    """A checkpoint or run folder that cannot be read or does not fit."""


class StoppedError(StarlingError):
    """What was under way was given up, as it was asked to stop."""


class WorkerError(StarlingError, RuntimeError):
    """An environment failed while it was stepped or reset.

    Attributes:
        env_index: Index of the environment in the vector, or -1 if not known.
        pid: Process that ran it.
        seed: Seed of the environment's last seeded reset, or None.
        step: Steps that the environment had made since it was built.
        original_traceback: Formatted traceback of the environment's own exception, or "".
    """

    def __init__(
        self,
        message: str,
        *,
        env_index: int = -1,
        pid: int = 0,
        seed: int | None = None,
        step: int = 0,
        original_traceback: str = "",
    ):
        super().__init__(message)
        self.env_index = env_index
        self.pid = pid
        self.seed = seed
        self.step = step
        self.original_traceback = original_traceback


class WorkerDiedError(WorkerError):
    """A worker process ended without being asked to."""


class StepTimeoutError(WorkerError, TimeoutError):
    """Environments did not answer before the deadline."""
