"""Other libraries, each in an environment of its own under .peers/, made when first needed.

Theirs and ours need not agree on versions that way, and installing Starling never installs them.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PEERS = Path(__file__).resolve().parent.parent / ".peers"

# What is installed, in this order, by exact version: figures are of something.
TORCH, SB3 = "2.13.0", "2.9.2"
PACKAGES = {
    "sb3": [
        [f"torch=={TORCH}"],
        [f"stable-baselines3=={SB3}", f"gymnasium=={version('gymnasium')}"],
    ]
}


def python(peer: str) -> Path:
    """The interpreter of a peer's environment."""
    folder = PEERS / peer
    interpreter, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        print(f"Installing {peer} into {folder} (some minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for packages in PACKAGES[peer]:
            pip = [interpreter, "-m", "pip", "install", "--quiet", *packages]
            subprocess.run(pip, check=True, stdout=sys.stderr)
        done.touch()
    return interpreter


if __name__ == "__main__":
    for name in PACKAGES:
        print(python(name))
