"""A check in a process of its own, so that an environment may hang, crash or end it.

What the process finds goes into files line by line, so that nothing is lost with it. A watchdog
in it, which does not need the interpreter lock, ends it when a call takes too long.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starling.envs.checks import run_checks
from starling.envs.findings import Finding, Findings, Report, users_place
from starling.envs.worker_process import ONE_THREAD, cause_of_death
from starling.errors import StarlingError, UserError

_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from starling.envs.check_process import main; main(*sys.argv[1:3])"
)
_FOUND, _TRACE, _CALL = "found.jsonl", "traceback.txt", "call"  # files of the process
_CALL_SIZE = 80  # bytes
_REARM = 0.25  # seconds between new settings of the watchdog, which take longer than a fast step
_MOST_CALLS = 30  # that may each take all of their time: the last resort
_PR_SET_PDEATHSIG = 1  # of Linux
_TIMEOUT = "Timeout ("  # how the watchdog's traceback begins
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in ', re.MULTILINE)


def check_in_process(
    env: str,
    env_kwargs: dict[str, Any] | None = None,
    steps: int = 1000,
    seconds: float = 10.0,
    seed: int = 0,
) -> Report:
    """`run_checks` in a process of its own; one that hangs or dies is a finding, too.

    Args:
        env: A name, as for `make_env`.
        env_kwargs: Arguments for making it, which JSON can hold.
        steps: Steps to look at.
        seconds: How long each phase and each call may take.
        seed: First seed.

    Raises:
        UserError: There is no such environment, or it does not take the arguments.
    """
    start = time.monotonic()
    settings = json.dumps([env, env_kwargs, steps, seconds, seed])
    path = [entry or os.getcwd() for entry in sys.path]
    with tempfile.TemporaryDirectory(prefix="starling-check-") as folder:
        process = subprocess.Popen(
            # -P: nothing in the current directory is imported before sys.path is set
            [sys.executable, "-P", "-c", _PROGRAM, folder, settings, *path],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD},
            start_new_session=True,  # all that it starts can be ended with it
        )
        code = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(_MOST_CALLS * (seconds + 2))
        finally:
            _end(process)
        return _report(Path(folder), code, seconds, time.monotonic() - start)


def _end(process: subprocess.Popen) -> None:
    """Ends the process, and what it has started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _report(folder: Path, code: int | None, seconds: float, elapsed: float) -> Report:
    findings = Findings()
    lines = _text(folder / _FOUND)
    for line in lines[: lines.rfind("\n") + 1].splitlines():  # the last one may be torn
        kind, content = json.loads(line)
        if kind == "refused":
            raise UserError(content)
        if kind == "failed":
            raise StarlingError(f"the check itself failed:\n{content}")
        if kind == "report":
            found = [Finding(**finding) for finding in content.pop("findings")]
            return Report(found, **content)
        findings.add(Finding(**content))
    findings.add(_about_the_end(folder, code, seconds))
    return Report(findings.sorted(), seconds=elapsed)


def _about_the_end(folder: Path, code: int | None, seconds: float) -> Finding:
    """What to say of a process that did not come to its end."""
    call, trace = _text(folder / _CALL).rstrip("\0 ") or "at the start", _text(folder / _TRACE)
    place = _place(trace)
    at = f" (at {place})" if place else ""
    if code is None or trace.startswith(_TIMEOUT):
        message = f"{call}: took longer than {seconds:g} s{at}; if it needs so long, give --seconds"
        return Finding("error", "hangs", message)
    message = f"{call}: {cause_of_death(code)}{at}; the other checks could not be made"
    return Finding("error", "process-ends", message)


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""


def _place(trace: str) -> str:
    """Where the user's code was in a traceback that `faulthandler` wrote."""
    for thread in trace.split("\n\n"):
        frames = [(file, int(line)) for file, line in _FRAME.findall(thread)]
        if any(file.endswith("checks.py") for file, _ in frames):
            return users_place(frames)
    return ""


# ---- in the process


def main(folder: str, settings: str) -> None:
    """Checks, and writes what it finds into files.

    Args:
        folder: Where they go.
        settings: The first arguments of `run_checks`, as JSON.
    """
    if sys.platform == "linux":  # whoever waits for it may be killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    env, env_kwargs, steps, seconds, seed = json.loads(settings)
    found = open(os.path.join(folder, _FOUND), "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    trace = open(os.path.join(folder, _TRACE), "w", encoding="utf-8")  # noqa: SIM115
    call = _shared_text(os.path.join(folder, _CALL))
    faulthandler.enable(trace)
    fires = 0.0  # when the watchdog does

    def write(kind: str, content: Any) -> None:
        found.write(json.dumps([kind, content]) + "\n")

    def calling(what: str, extra: float) -> None:
        nonlocal fires
        call[:] = what.encode()[:_CALL_SIZE].ljust(_CALL_SIZE)
        limit = seconds + extra
        now = time.monotonic()
        if not limit <= fires - now <= limit + _REARM:
            faulthandler.dump_traceback_later(limit + _REARM, exit=True, file=trace)
            fires = now + limit + _REARM

    def tell(finding: Finding) -> None:
        write("found", asdict(finding))

    try:  # in a session of its own, which no Ctrl-C reaches
        report = run_checks(env, env_kwargs, steps, seconds, seed, calling, tell, False)
        write("report", asdict(report))
    except UserError as error:
        write("refused", str(error))
    except BaseException:
        write("failed", traceback.format_exc())
    os._exit(0)  # whatever threads the environment has left


def _shared_text(path: str) -> mmap.mmap:
    """Memory that is in a file: to write there costs nothing, and outlives the process."""
    with open(path, "wb+") as file:
        file.truncate(_CALL_SIZE)
        return mmap.mmap(file.fileno(), _CALL_SIZE)
