"""What is said where Ray ends this process, which it does without a word.

A process that talks to its node's raylet when that dies is ended by Ray on the spot (`_Exit` in its
core worker): nothing can be caught, and nothing of this process is run any more.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

_CODE = """
import socket, sys
if not sys.stdin.read():
    try:
        socket.create_connection((sys.argv[1], int(sys.argv[2])), 1.0).close()
    except OSError:
        print(sys.argv[3], file=sys.stderr)
"""


class Witness:
    """A process that outlives this one by a moment, and says so where the raylet is gone.

    Args:
        raylet: HOST:PORT of Ray's process on this node.
    """

    def __init__(self, raylet: str):
        host, _, port = raylet.rpartition(":")
        words = (
            f"starling: error: Ray's process here (raylet) is gone, and process {os.getpid()}, "
            "which was connected to it, has ended: unless it told of a save, its last checkpoint "
            "stands; go on with --resume and the --address of another cluster"
        )
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError):  # where there is none, a run is as good
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CODE, host.strip("[]"), port, words],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is not meant for it
            )

    def dismiss(self) -> None:
        """Ends it without a word."""
        if self._process is not None:
            with contextlib.suppress(OSError):  # somebody has ended it
                self._process.communicate(b"over")
