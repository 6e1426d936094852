"""One fault of checkpoints under one library; see checkpoint_faults.py.

Prints what came of it, a JSON object in the last line.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

STEPS = 256  # of a rollout, after each of which is saved
ROOM = 16384  # bytes that a file may have on the disk that is "full": metrics fit, weights do not
PPO: dict[str, Any] = {"n_steps": STEPS // 4, "batch_size": 64, "n_epochs": 2, "seed": 0}
STARLING: dict[str, Any] = {"num_envs": 4, "num_steps": STEPS // 4, "mini_batch_size": 64}
STARLING |= {"epochs": 2, "seed": 0, "timesteps": 2 * STEPS}


def sb3_model(**settings: Any) -> Any:
    """PPO on CartPole-v1, all else as it is by default."""
    from stable_baselines3 import PPO as Model
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env("CartPole-v1", n_envs=4, seed=0)
    return Model("MlpPolicy", envs, device="cpu", **PPO, **settings)


def starling_agent(folder: Path, **settings: Any) -> Any:
    """The same of Starling."""
    from starling import ParallelPPO

    return ParallelPPO("CartPole-v1", log_dir=str(folder), **STARLING, **settings)


def room_for(step: int) -> None:
    """Has the disk full after the first rollout of four, until the end of the third."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    full = STEPS <= step < 3 * STEPS
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM if full else hard, hard))


def attempt(call: Callable[[], object]) -> str:
    """What a call raises, or ""."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- a disk that is full


def sb3_save(folder: Path) -> dict[str, Any]:
    model, file = sb3_model(), folder / "model.zip"
    model.learn(STEPS)
    model.save(file)
    room_for(STEPS)
    error = attempt(lambda: model.save(file))
    return {"error": error, "first": attempt(lambda: model.load(file))}


def starling_save(folder: Path) -> dict[str, Any]:
    import starling

    with starling_agent(folder) as agent:
        agent.train(STEPS, quiet=True)
        path = agent.save(folder / "saved")
        room_for(STEPS)
        error = attempt(lambda: agent.save(folder / "saved"))
    return {"error": error, "first": attempt(lambda: starling.load(path).close())}


def sb3_training(folder: Path) -> dict[str, Any]:
    from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback

    class Disk(BaseCallback):
        def _on_step(self) -> bool:
            room_for(self.num_timesteps)
            return True

    model = sb3_model()
    saving = CheckpointCallback(STEPS // 4, str(folder))  # a call steps four environments
    error = attempt(lambda: model.learn(4 * STEPS, callback=[saving, Disk()]))
    room_for(4 * STEPS)
    files = sorted(folder.glob("*.zip"), key=os.path.getmtime)
    return {
        "error": error,
        "steps": model.num_timesteps,
        "first": attempt(lambda: model.load(files[0])),
        "newest": attempt(lambda: model.load(files[-1])),
    }


def starling_training(folder: Path) -> dict[str, Any]:
    import starling

    firsts = []

    def watch(it: Any) -> None:
        room_for(it.step)
        if it.step == 3 * STEPS:
            firsts.append(attempt(lambda: starling.load(it.agent.run).close()))

    with starling_agent(folder, save_interval=1) as agent:
        error = attempt(lambda: agent.train(4 * STEPS, callbacks=watch, quiet=True))
        newest = attempt(lambda: starling.load(agent.run).close())
        return {"error": error, "steps": agent.step, "first": firsts[0], "newest": newest}


# ---- one that is made to do harm


class Canary:
    """Unpickling this makes a file."""

    def __init__(self, file: Path):
        """Names the file."""
        self.file = file

    def __reduce__(self):
        """What unpickling calls."""
        return (open, (str(self.file), "w"))


def sb3_crafted(folder: Path) -> dict[str, Any]:
    canary, file = folder / "canary", folder / "model.zip"
    model = sb3_model()
    model.save(file)
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = json.loads(members["data"])
    data["policy_class"][":serialized:"] = base64.b64encode(pickle.dumps(Canary(canary))).decode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (members | {"data": json.dumps(data)}).items():
            archive.writestr(name, content)
    return {"error": attempt(lambda: model.load(file)), "ran": canary.exists(), "files": 1}


def starling_crafted(folder: Path) -> dict[str, Any]:
    """The payload takes the place of each file in turn; the manifest is made to agree."""
    import starling

    canary, payload = folder / "canary", pickle.dumps(Canary(folder / "canary"))
    with starling_agent(folder) as agent:
        agent.train(STEPS, quiet=True)
        path = agent.save(folder / "saved")
    manifest, errors = json.loads((path / "manifest.json").read_text()), []
    for file in [entry["name"] for entry in manifest["files"]]:
        forged = json.loads(json.dumps(manifest))
        (entry,) = [entry for entry in forged["files"] if entry["name"] == file]
        entry |= {"size": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
        del forged["sha256"]
        canonical = json.dumps(forged, sort_keys=True, separators=(",", ":"))
        forged["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
        whole = (path / file).read_bytes()
        (path / file).write_bytes(payload)
        (path / "manifest.json").write_text(json.dumps(forged))
        errors.append(attempt(lambda: starling.load(path).close()))
        (path / file).write_bytes(whole)
    return {
        "error": min(errors),  # "" if one was not refused
        "ran": canary.exists(),
        "files": len(errors),
    }


# ---- half of a run, and the other half


def sb3_halves(folder: Path) -> dict[str, Any]:
    def weights(model: Any) -> dict[str, np.ndarray]:
        return {key: value.numpy() for key, value in model.policy.state_dict().items()}

    whole, half = sb3_model(), sb3_model()
    whole.learn(2 * STEPS)
    half.learn(STEPS)
    half.save(folder / "model.zip")
    rest = half.load(folder / "model.zip", env=sb3_model().get_env(), device="cpu")
    rest.learn(STEPS, reset_num_timesteps=False)
    return {"difference": difference(weights(whole), weights(rest))}


def starling_halves(folder: Path) -> dict[str, Any]:
    from starling import ParallelPPO

    told = {}
    for key, exact in (("difference", True), ("by_default", False)):
        with starling_agent(folder, exact_resume=exact) as agent:
            agent.train(quiet=True)
            whole = agent.arrays()["parameters"]
        with starling_agent(folder, exact_resume=exact) as agent:
            run = agent.train(STEPS, quiet=True).run
        with ParallelPPO(resume=run, timesteps=2 * STEPS) as agent:
            agent.train(quiet=True)
            told[key] = difference(whole, agent.arrays()["parameters"])
    return told


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """The largest difference of two weights in the same place."""
    return max(float(np.abs(one[key] - other[key]).max(initial=0)) for key in one)


CASES: dict[str, dict[str, Callable[[Path], dict[str, Any]]]] = {
    "full disk, same place": {"starling": starling_save, "sb3": sb3_save},
    "full disk, training": {"starling": starling_training, "sb3": sb3_training},
    "crafted": {"starling": starling_crafted, "sb3": sb3_crafted},
    "halves": {"starling": starling_halves, "sb3": sb3_halves},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=["starling", "sb3"])
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(json.dumps(CASES[args.case][args.library](args.folder)))


if __name__ == "__main__":
    main()
