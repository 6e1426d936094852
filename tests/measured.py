"""What long tests measured, for benchmarks/storms.py to make a page of."""

from __future__ import annotations

import json
import os
from pathlib import Path


def record(name: str, **figures: float | str) -> None:
    """Appends a line of JSON to the file that `STARLING_MEASURED` names, if that is set."""
    if file := os.environ.get("STARLING_MEASURED"):
        with Path(file).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"name": name, **figures}) + "\n")
