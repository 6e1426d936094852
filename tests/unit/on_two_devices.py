"""Updates and runs on two devices: a program of its own, since JAX counts its devices only once.

Run with a folder, by `test_devices.py`; what came out is left there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_ppo import ACTIONS, BOX, CASES, NETWORK, PLAIN, N, T, make_rollout, start

from starling import AsyncPPO, ParallelPPO, train_seeds
from starling.algorithms import minibatches
from starling.algorithms.ppo import PPO
from starling.algorithms.vtrace_ppo import VTracePPO
from starling.config import AsyncPPOConfig
from starling.errors import UserError
from starling.storage.rollout import Rollout
from starling.training.device import find_devices, mesh_of, on_all, on_first

RUN = {
    "num_envs": 4,
    "num_steps": 16,
    "mini_batch_size": 32,
    "epochs": 2,
    "hidden_sizes": (8,),
    "preset": "none",
    "tensorboard": False,
    "timesteps": 3 * 64,
    "log_interval": 1,
    "save_interval": 0,
}


# --- mistakes ----------------------------------------------------------------------------------


class StandardizedByDevice(PPO):
    def loss(self, params, batch, clip):
        return super().loss(
            params, batch._replace(advantage=self._standardized(batch).advantage), clip
        )


class WeighedByDevice(PPO):
    """The mean of means over those rows of each device that count, however few they are."""

    def loss(self, params, batch, clip):
        return super().loss(params, batch._replace(weight=self._standardized(batch).weight), clip)


def summed(x: Any, axis: str) -> Any:
    return jax.lax.psum(x, axis)


def left_alone(x: Any, axis: str) -> Any:
    return x


MISTAKES: dict[str, tuple[str, type[PPO], Any]] = {
    "standardized by device": ("choice", StandardizedByDevice, None),
    "weighed by device": ("valid", WeighedByDevice, None),
    "sum of gradients": ("valid", PPO, summed),
    "no mean of gradients": ("choice", PPO, left_alone),
}


# --- updates -----------------------------------------------------------------------------------


def lagging_rollouts() -> list[Rollout]:
    rng = np.random.default_rng(3)
    return [
        make_rollout("choice", seed, masks=True, valid=True)._replace(
            log_probs=rng.normal(-1.0, 0.4, (T, N)).astype(np.float32),
            reward_sums=rng.normal(size=N).astype(np.float32),
        )
        for seed in (20, 21)
    ]


def algorithm(name: str, kind: type[PPO] = PPO) -> tuple[PPO, list[Rollout]]:
    if name == "vtrace":
        told = {**dataclasses.asdict(PLAIN), "num_steps": T, "normalize_rewards": True}
        options = AsyncPPOConfig(env="test", num_envs=N, timesteps=T * N, **told)
        return VTracePPO(BOX, ACTIONS["choice"], options, NETWORK, N), lagging_rollouts()
    case = CASES[name]
    return kind(BOX, ACTIONS[case.kind], case.options, NETWORK, N), case.rollouts()


def learnt(ppo: PPO, rollouts: list[Rollout], devices: int) -> list[dict[str, np.ndarray]]:
    """State and metrics after each update."""
    mesh = mesh_of(find_devices("cpu", devices))
    assert (mesh is None) == (devices == 1)
    state, results = start(ppo), []
    for rollout, progress in zip(rollouts, (0.0, 0.5), strict=True):
        if mesh is None:
            state, metrics = ppo.update(state, rollout, progress)
        else:
            ppo.mesh = mesh
            state, metrics = ppo.update(*on_all(mesh, (state, rollout)), progress)
            state = on_first(state)
        leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
        numbers = {f"state/{i}": np.array(leaf) for i, leaf in enumerate(leaves)}
        results.append(numbers | {name: np.array(value) for name, value in metrics.items()})
    return results


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minibatches, "_CACHED", 0)
        patch.setattr(minibatches, "_FEWEST_ROWS", 3)
        yield


def updates() -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name in (*CASES, "vtrace"):
        for devices in (1, 2):
            found[name, devices] = learnt(*algorithm(name), devices)
    with small_blocks():
        found["a2c in blocks", 2] = learnt(*algorithm("a2c"), 2)
    for mistake, (name, kind, mean) in MISTAKES.items():
        with pytest.MonkeyPatch.context() as patch:
            if mean is not None:
                patch.setattr(jax.lax, "pmean", mean)
            found[mistake, 2] = learnt(*algorithm(name, kind), 2)
    return found


# --- runs --------------------------------------------------------------------------------------


def runs(folder: Path) -> dict[str, Any]:
    """Trains by each that learns on several devices; parameters at the end of each run."""
    found = {}
    for name, trainer, settings in [
        ("ppo", ParallelPPO, {"backend": "serial"}),
        ("compiled", ParallelPPO, {"backend": "compiled"}),
        ("async", AsyncPPO, {"backend": "serial", "num_actors": 2, "serial": True}),
        ("threads", AsyncPPO, {"backend": "serial", "num_actors": 2}),
    ]:
        for number in ("all",) if name == "threads" else (1, "all"):
            told = {**RUN, **settings, "num_devices": number, "run_name": f"{name}-{number}"}
            with trainer("CartPole-v1", log_dir=str(folder), **told) as agent:
                assert agent.config.num_devices == (1 if number == 1 else 2)
                result = agent.train(quiet=True)
                assert result.status == "completed"
                assert (agent.algorithm.mesh is None) == (number == 1)
                assert agent.state.params.devices() == {jax.devices()[0]}
                found[f"{name}-{number}"] = np.array(agent.state.params)
            if name == "ppo" and number == "all":
                assert agent.algorithm._learn._cache_size() == 1
    with pytest.raises(UserError, match="num_seeds does not go with num_devices 2, since"):
        train_seeds("CartPole-v1", num_seeds=2, num_devices="all", log_dir=str(folder), **RUN)
    with ParallelPPO(resume=folder / "ppo-1", num_devices=2) as agent:
        np.testing.assert_array_equal(agent.state.params, found["ppo-1"])
        assert agent.train(4 * 64, quiet=True).steps == 4 * 64
    return found


if __name__ == "__main__":
    assert len(jax.devices()) == 2
    folder = Path(sys.argv[1])
    (folder / "found.pickle").write_bytes(pickle.dumps((updates(), runs(folder))))
