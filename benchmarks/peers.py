"""Other libraries, each in an environment of its own under .peers/, made when first needed.

Theirs and ours need not agree on versions that way, and installing Starling never installs them.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

PEERS = Path(__file__).resolve().parent.parent / ".peers"

# What is installed, in this order, by exact version: figures are of something. PyTorch comes first,
# alone, so that nothing that depends on it chooses another.
TORCH, SB3, SBX, RAY, SAMPLE_FACTORY = "2.13.0", "2.9.2", "0.28.0", "2.60.0", "2.1.1"
OURS = {name: f"{name}=={version(name)}" for name in ("gymnasium", "jax", "flax", "optax")}
PACKAGES = {
    "sb3": [[f"torch=={TORCH}"], [f"stable-baselines3=={SB3}", OURS["gymnasium"]]],
    "sbx": [
        [f"torch=={TORCH}"],
        [f"sbx-rl=={SBX}", f"stable-baselines3=={SB3}", *OURS.values()],
    ],
    "rllib": [[f"torch=={TORCH}"], [f"ray[rllib]=={RAY}"]],
    "sample_factory": [
        [f"torch=={TORCH}", "numpy==1.26.4"],
        [f"sample-factory=={SAMPLE_FACTORY}", "gymnasium==0.29.1"],
    ],
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
    for name in sys.argv[1:] or PACKAGES:
        print(python(name))
