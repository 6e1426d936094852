"""Environments that fail in training: what is said and counted, and that the run goes on."""

from __future__ import annotations

import functools
import json
from typing import Any

import envs_for_tests as envs
import pytest

from starling.envs.seeding import child_seeds
from starling.errors import WorkerError
from starling.training.async_dqn import AsyncDQN
from starling.training.async_ppo import AsyncPPO
from starling.training.dqn import DQN
from starling.training.parallel_ppo import ParallelPPO

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.usefixtures("no_leaks", "no_pauses", "shared_programs"),
]

SEED, N, T = 3, 4, 8
SMALL: dict[str, Any] = {
    "seed": SEED,
    "num_envs": N,
    "num_steps": T,
    "num_actors": 2,
    "serial": True,  # on threads, one actor may do it all while another is late
    "hidden_sizes": (8,),
    "preset": "none",
    "tensorboard": False,
    "log_interval": 1,
    "save_interval": 0,
}
PPO = {"mini_batch_size": 16, "epochs": 1}
REPLAY = {"mini_batch_size": 8, "learning_starts": N * T, "buffer_size": 20 * N * T}


def broken_envs(fault, indices):
    """A factory; the environments at these indices in the run have the fault in their third step.

    They know themselves by their seeds: what is made in their places later gets others.
    """
    seeds = [child_seeds(SEED, N)[i] for i in indices]
    return functools.partial(envs.BrokenEnv, fault, seeds)


def trained(tmp_path, kind, fault, broken, iterations=6, **settings):
    """What a short run logged last; the environments at these indices in the run are broken."""
    settings = {**SMALL, **(PPO if issubclass(kind, ParallelPPO) else REPLAY), **settings}
    if kind in (ParallelPPO, DQN):
        del settings["num_actors"], settings["serial"]
    with kind(broken_envs(fault, broken), log_dir=str(tmp_path), **settings) as agent:
        result = agent.train(iterations * N * T, quiet=True)
        assert result.status == "completed"
        assert result.steps >= iterations * N * T  # whole rollouts, without what was lost
        return json.loads((agent.run / "metrics.jsonl").read_text().splitlines()[-1])


FAULTS = {
    "failed in step()": envs.boom,
    "gave nan as its reward": envs.paid_nan,
    "was killed by signal 9": envs.kill_self,
}
CASES = [
    *((AsyncPPO, backend, "failed in step()") for backend in ("serial", "thread", "process")),
    *((AsyncPPO, backend, "gave nan as its reward") for backend in ("serial", "process")),
    (AsyncPPO, "process", "was killed by signal 9"),
    (AsyncDQN, "serial", "failed in step()"),
]


@pytest.mark.parametrize(("kind", "backend", "said"), CASES)
def test_an_environment_is_named_by_its_index_in_the_run(tmp_path, kind, backend, said):
    settings = {"backend": backend, "num_workers": 2, "actor_restarts": 0}
    with pytest.raises(WorkerError) as caught:
        trained(tmp_path, kind, FAULTS[said], [3], **settings)
    message = str(caught.value)
    assert message.startswith(f"environment 3 {said}"), message
    assert (caught.value.env_index, caught.value.step) == (3, 3)
    assert caught.value.seed == child_seeds(SEED, N)[3]
    assert f"worker pid {caught.value.pid}, seed {caught.value.seed}, step 3" in message


@pytest.mark.parametrize("backend", ["serial", "thread", "process"])
def test_an_environment_that_cannot_be_made_is_named_by_its_index_in_the_run(tmp_path, backend):
    """The second actor's first, which is the third of all: a number is taken for each made."""
    numbers = tmp_path / "numbers"
    numbers.mkdir()

    def make():
        number = len(list(numbers.iterdir()))
        (numbers / str(number)).touch()
        return envs.FaultyEnv(envs.boom, "constructor" if number == 2 else "never")

    with (
        pytest.raises(WorkerError, match=r"^environment 2 could not be made") as caught,
        AsyncPPO(make, log_dir=str(tmp_path), **SMALL, **PPO, backend=backend, num_workers=2) as a,
    ):
        a.train(N * T, quiet=True)
    assert caught.value.env_index == 2


@pytest.mark.parametrize("backend", ["serial", "thread", "process"])
def test_a_restart_is_logged_with_the_index_in_the_run(tmp_path, backend, caplog):
    settings = {"backend": backend, "num_workers": 2, "on_env_error": "restart"}
    last = trained(tmp_path, AsyncPPO, envs.boom, [3], **settings)
    assert "environment 3 failed in step()" in caplog.text
    assert "environments [3] begin anew, with seeds [" in caplog.text
    assert (last["faults/env_errors"], last["faults/restarts"]) == (1, 1)
