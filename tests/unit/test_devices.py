"""Several devices that share minibatches out: they learn what one does. Two virtual CPU devices."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from on_two_devices import MISTAKES, RUN
from test_ppo import CASES

import starling
from starling.config import PPOConfig
from starling.errors import UserError
from starling.training.device import find_devices, mesh_of
from starling.training.parallel_ppo import ParallelPPO

pytestmark = pytest.mark.timeout(240)
TOLERANCE = 5e-6  # sums in another order make 5e-7


class Found(NamedTuple):
    updates: dict[Any, list[dict[str, np.ndarray]]]
    runs: dict[str, np.ndarray]
    folder: Path


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    """What `on_two_devices.py` leaves."""
    folder = tmp_path_factory.mktemp("devices")
    ended = subprocess.run(
        [sys.executable, Path(__file__).with_name("on_two_devices.py"), folder],
        env={
            **os.environ,
            "JAX_NUM_CPU_DEVICES": "2",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    updates, runs = pickle.loads((folder / "found.pickle").read_bytes())
    return Found(updates, runs, folder)


# --- updates -----------------------------------------------------------------------------------


def difference(ours: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> float:
    """The largest, absolute for small numbers and relative for large ones, of state and metrics."""
    apart = [
        np.max(np.abs(one[name] - other[name]) / np.maximum(1.0, np.abs(other[name])), initial=0.0)
        for one, other in zip(ours, right, strict=True)
        for name in one.keys() | other.keys()
    ]
    return max(map(float, apart))


@pytest.mark.parametrize("name", [*CASES, "vtrace"])
def test_two_devices_learn_what_one_does(found, name):
    assert difference(found.updates[name, 2], found.updates[name, 1]) < TOLERANCE


def test_shares_may_go_through_the_networks_in_blocks(found):
    assert difference(found.updates["a2c in blocks", 2], found.updates["a2c", 1]) < TOLERANCE


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_tells_a_mistake(found, mistake):
    right = found.updates[MISTAKES[mistake][0], 1]
    assert difference(found.updates[mistake, 2], right) > 1000 * TOLERANCE


# --- runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "compiled", "async"])
def test_a_run_on_two_devices_is_that_on_one(found, name):
    one, two = found.runs[f"{name}-1"], found.runs[f"{name}-all"]
    np.testing.assert_allclose(two, one, atol=TOLERANCE)


def test_one_device_goes_on_with_what_two_have_learnt(found):
    """The run was on two; this process has one."""
    run, params = found.folder / "ppo-all", found.runs["ppo-all"]
    with pytest.raises(UserError, match=r"num_devices 2 is more than JAX sees here .* is 1: use"):
        ParallelPPO(resume=run)
    with starling.load(run) as agent:
        np.testing.assert_array_equal(agent.state.params, params)
        assert agent.predict(np.zeros(4, np.float32)) in (0, 1)
    with ParallelPPO(resume=run, num_devices=1) as agent:
        np.testing.assert_array_equal(agent.state.params, params)
        result = agent.train(RUN["timesteps"] + 64, quiet=True)
        assert (result.steps, agent.version) == (RUN["timesteps"] + 64, 4)
        assert not np.array_equal(agent.state.params, params)


# --- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_devices": 3}, "num_devices 3 does not divide the 64 rows .* use 2 or 4, or another"),
        (
            {"num_devices": 3, "mini_batch_size": None, "num_envs": 1, "num_steps": 5},
            "num_devices 3 does not divide the 5 rows of a minibatch: use 1 or 5",
        ),
        ({"num_devices": 0}, "num_devices must be at least 1, not 0"),
        ({"num_devices": "many"}, "num_devices must be .* or all"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        PPOConfig(env="test", **settings)


def test_more_devices_than_there_are_are_refused():
    with pytest.raises(UserError, match=r"num_devices 4 is more than JAX .* cpu on, which is 1"):
        find_devices("cpu", 4)
    devices = find_devices("cpu", "all")
    assert len(devices) == 1
    assert mesh_of(devices) is None
