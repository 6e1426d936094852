"""Standard error that nobody has to read: no run ends because its reader did."""

from __future__ import annotations

import io
import os
from typing import Any

STDERR = 2


class StandardError(io.TextIOWrapper):
    """Standard error; what cannot be written to it is lost, and nothing else."""

    def __init__(self):
        raw = _Lossy(STDERR, "w", closefd=False)
        super().__init__(io.BufferedWriter(raw), errors="backslashreplace", line_buffering=True)


class _Lossy(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or len(data)  # None: a full pipe that is not waited for
        except OSError:  # its reader is gone, or its disk is full
            return len(data)


def occupy_standard_streams() -> None:
    """Opens those that are closed, lest another file take their number and get what they are sent.

    Subprocesses would also lose a descriptor that they are handed under such a number.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(descriptor)
