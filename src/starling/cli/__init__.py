"""The command `starling`.

Each command is a module that is imported when it is called, so that what needs no JAX is fast, and
wrong options are told before anything heavy is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import time
from collections.abc import Sequence

from starling.errors import StarlingError, UserError, WorkerError
from starling.options import did_you_mean
from starling.standard_error import StandardError, occupy_standard_streams

# Name -> (what it does, the function that does it).
COMMANDS = {
    "train": ("train a policy on an environment", "starling.cli.train:train"),
    "tune": ("search for settings: many runs, the best of them", "starling.cli.tune:tune"),
    "evaluate": ("score a trained policy over fresh episodes", "starling.cli.runs:evaluate"),
    "play": ("watch a trained policy, or write a video", "starling.cli.play:play"),
    "plot": ("draw learning curves as PNG", "starling.cli.runs:plot"),
    "check": ("look for what is wrong with an environment", "starling.cli.check:check"),
    "bench": ("measure steps per second: bench env, bench train", "starling.cli.bench:bench"),
    "presets": ("list the settings known to work, by environment", "starling.cli.lists:presets"),
    "backends": ("list what can step environments here", "starling.cli.lists:backends"),
}


_PATIENCE = 5.0  # seconds for threads to end that an environment has left


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: What stands after `starling`; by default that of this process, which has nothing else
            to do then, and ends whatever threads are left.

    Returns:
        The exit code: 0 done; 2 wrong input, told in one line; 130 or 143 stopped by a signal
        after a clean save; 1 anything else.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    occupy_standard_streams()
    if sys.stderr is sys.__stderr__ and not (sys.stderr and sys.stderr.isatty()):
        sys.stderr = StandardError()  # a log whose disk is full ends no run
    code = 1
    try:
        code = _outcome(arguments)
    finally:
        if argv is None:
            _end_without_threads(code)
    return code


def _outcome(arguments: list[str]) -> int:
    """Run one command, and return its exit code, whatever it raises."""
    try:
        return _dispatch(arguments)
    except UserError as error:
        _complain(" ".join(str(error).split()))
        return 2
    except WorkerError as error:
        _complain(str(error))
        if error.original_traceback and error.original_traceback not in str(error):
            print(error.original_traceback.rstrip(), file=sys.stderr)
        return 1
    except StarlingError as error:
        _complain(str(error))
        return 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:  # `starling presets | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as done:  # argparse, after --help
        return int(done.code or 0)


def _dispatch(arguments: list[str]) -> int:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if name == "--version":
        from starling import __version__

        print(f"starling {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}: {did_you_mean(name, COMMANDS)}")
    module, _, function = COMMANDS[name][1].partition(":")
    return getattr(importlib.import_module(module), function)(arguments[1:])


def _overview() -> str:
    lines = [f"  {name:<10}{does}" for name, (does, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: starling COMMAND ...",
            "",
            "Reinforcement learning on many environments in parallel.",
            "",
            *lines,
            "",
            "starling COMMAND --help says more of each; starling --version shows the version.",
            "",
            "  starling train --env CartPole-v1",
            "  starling evaluate logs/CartPole-v1__ppo__s0",
        ]
    )


def _complain(message: str) -> None:
    print(f"starling: error: {message}", file=sys.stderr)


def _end_without_threads(code: int) -> None:
    """Has the process end although threads are left, for which Python waits."""

    def left() -> list[str]:
        threads = (t for t in threading.enumerate() if t is not threading.main_thread())
        return [thread.name for thread in threads if not thread.daemon]

    def end() -> None:
        time.sleep(_PATIENCE)
        if not left():
            return
        told = f"starling: ended, though not {', '.join(left())}: end threads in close()"
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it, or can
            print(told, file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(code)

    if left():
        threading.Thread(target=end, daemon=True).start()
