"""SBX's PPO, which is Stable-Baselines3's on JAX, run by its own environment (see peers.py).

It takes the options of sb3_train.py and prints what that prints. Its networks are, as there, two of
64-64 with tanh, and the environments are stepped in process.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import sb3_train
import sbx

if __name__ == "__main__":
    sb3_train.main(sbx.PPO)
