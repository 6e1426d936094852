"""Environments that fail in training: what is said and counted, and that the run goes on."""

from __future__ import annotations

import functools
from typing import Any

import envs_for_tests as envs
import pytest
from counters import check_counters, metrics_of

from starling.envs.seeding import child_seeds
from starling.errors import WorkerError
from starling.training.async_dqn import AsyncDQN
from starling.training.async_ppo import AsyncPPO
from starling.training.dqn import DQN
from starling.training.parallel_ppo import ParallelPPO
from starling.training.trainer import Iteration

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
        check_counters(agent.run)
        return metrics_of(agent.run)[-1]


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


# ---- every trainer goes on

PROCESSES = {"backend": "process", "num_workers": 2, "on_env_error": "restart"}
SURVIVED = {
    "restart": (
        *(envs.boom, {"on_env_error": "restart"}),
        {"env_errors": 1, "restarts": 1, "lost_steps": 1},
    ),
    "drop": (
        *(envs.boom, {"on_env_error": "drop"}),
        {"env_errors": 1, "dropped_envs": 1, "lost_steps": 1},
    ),
    "truncate": (
        *(envs.paid_nan, {"on_invalid_data": "truncate"}),
        {"invalid_data": 1, "lost_steps": 1},
    ),
    "killed": (envs.kill_self, PROCESSES, {"worker_deaths": 1, "restarts": 1, "lost_steps": 2}),
}


@pytest.mark.parametrize("kind", [ParallelPPO, AsyncPPO, DQN])
@pytest.mark.parametrize("case", SURVIVED)
def test_training_goes_on_and_counts_what_was_lost(tmp_path, kind, case):
    fault, settings, expected = SURVIVED[case]
    last = trained(tmp_path, kind, fault, [1], **{"backend": "serial", **settings})
    counted = {name.removeprefix("faults/"): n for name, n in last.items() if "faults/" in name}
    assert counted == expected


# ---- actors that have no environment left


@pytest.mark.parametrize("serial", [True, False])
@pytest.mark.parametrize("kind", [AsyncPPO, AsyncDQN])
def test_an_actor_without_environments_ends_and_the_others_go_on(tmp_path, kind, serial, caplog):
    settings = {**SMALL, **(PPO if kind is AsyncPPO else REPLAY), "serial": serial, "num_actors": 4}
    settings |= {"backend": "serial", "on_env_error": "drop"}
    left = []

    def note(it: Iteration) -> bool:
        left.append(len(it.agent._pool.going))
        return left[-6:] != [1] * 6

    with kind(broken_envs(envs.boom, [0, 1, 3]), log_dir=str(tmp_path), **settings) as agent:
        agent.train(10**6, quiet=True, callbacks=note)
        last = metrics_of(agent.run)[-1]
    counted = {name: last[f"faults/{name}"] for name in ("env_errors", "dropped_envs")}
    assert counted == {"env_errors": 3, "dropped_envs": 3}
    for actor in (0, 1, 3):
        assert f"actor {actor} ends, as none of its environments is left" in caplog.text
    assert "given up since no environment is left: environment 3 failed" in caplog.text


def test_an_actor_ends_whose_worker_is_killed(tmp_path, caplog):
    settings = {"backend": "process", "num_workers": 2, "on_env_error": "drop"}
    last = trained(tmp_path, AsyncPPO, envs.kill_self, [1], **settings)
    assert (last["faults/worker_deaths"], last["faults/dropped_envs"]) == (1, 2)
    assert "actor 0 ends, as none of its environments is left (actors that go on: 1)" in caplog.text


@pytest.mark.parametrize("kind", [AsyncPPO, ParallelPPO])
def test_some_of_the_environments_are_dropped_and_the_others_go_on(tmp_path, kind, caplog):
    settings = {"backend": "serial", "on_env_error": "drop"}
    last = trained(tmp_path, kind, envs.boom, [0, 2], **settings)
    assert (last["faults/env_errors"], last["faults/dropped_envs"]) == (2, 2)
    left = "1 of environments 2 to 3" if kind is AsyncPPO else "2 of environments 0 to 3"
    assert f"{left} are left" in caplog.text
    assert "ends" not in caplog.text


@pytest.mark.parametrize("serial", [True, False])
def test_the_last_actor_without_environments_ends_the_run(tmp_path, serial):
    settings = {"backend": "serial", "on_env_error": "drop", "serial": serial}
    with pytest.raises(WorkerError, match=r"no environment is left: environment \d failed in step"):
        trained(tmp_path, AsyncPPO, envs.boom, range(N), **settings)


def test_a_run_without_one_of_its_actors_goes_on_when_it_is_asked_again(tmp_path):
    settings = {**SMALL, **PPO, "backend": "serial", "on_env_error": "drop"}
    env = broken_envs(envs.boom, [0, 1])
    seen = []

    def note(it: Iteration) -> None:
        seen.append({rollout.origin.worker for rollout in it.agent._pool.taken})

    with AsyncPPO(env, log_dir=str(tmp_path), **settings) as agent:
        agent.train(4 * N * T, quiet=True)
        result = agent.train(8 * N * T, quiet=True, callbacks=note)
        assert (result.status, result.steps) == ("completed", 8 * N * T)
        assert agent.envs is agent._pool.actors[1].envs
    assert seen == [{1}] * 4
