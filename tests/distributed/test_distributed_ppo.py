"""Workers on a Ray cluster: what they hand over, what happens when one is lost, what is refused."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import time
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from counters import metrics_of
from elastic_cases import Taken, numbers_of
from looking_at_weights import LooksAtWeights

from starling import cli
from starling.errors import UserError, WorkerError
from starling.storage.checkpoint import load_checkpoint
from starling.training.distributed_ppo import DistributedPPO
from starling.training.run_folder import read_settings

WORKERS, N, T = 2, 2, 16
ROWS = N * T
SMALL = {
    "num_workers": WORKERS,
    "num_envs": N,
    "num_steps": T,
    "mini_batch_size": 16,
    "epochs": 2,
    "hidden_sizes": (8,),
    "preset": "none",
    "backend": "serial",
    "tensorboard": False,
    "timesteps": 6 * WORKERS * ROWS,
    "log_interval": 1,
    "save_interval": 0,
}
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def make(tmp_path, cluster, closed_at_the_end):
    """Makes agents that are closed in the end."""

    def make_agent(env: Any = "CartPole-v1", **settings: Any) -> DistributedPPO:
        if "resume" in settings:
            env = None
        else:
            settings = {**SMALL, "log_dir": str(tmp_path), **settings}
        return closed_at_the_end(DistributedPPO(env, address=cluster.address, **settings))

    return make_agent


def test_blocking_runs_are_alike_and_can_be_resumed(make):
    taken = Taken()
    one = make(normalize_observations=True, normalize_rewards=True)
    result = one.train(callbacks=taken, quiet=True)
    assert result.steps == 6 * WORKERS * ROWS
    assert [origin.version for origin in taken.origins] == [i // WORKERS for i in range(12)]
    assert [origin.worker for origin in taken.origins] == [0, 1] * 6
    assert (taken.missing(), taken.repeated()) == (0, 0)
    lines = metrics_of(one.run)
    assert [line["async/policy_lag_max"] for line in lines] == [0] * 6
    assert [line["async/policy_lag_0"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert lines[-1]["distributed/workers"] == WORKERS
    one.close()

    other = make(normalize_observations=True, normalize_rewards=True)
    other.train(quiet=True)
    np.testing.assert_array_equal(numbers_of(one), numbers_of(other))
    other.close()

    resumed = make(resume=one.run, timesteps=8 * WORKERS * ROWS)
    np.testing.assert_array_equal(resumed.state.params, one.state.params)
    assert resumed.train(quiet=True).steps == 8 * WORKERS * ROWS


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["compiled", "envpool"])
def test_workers_step_compiled_environments(make, backend):
    """Episodes, put together here from what each environment gave, are those that are counted."""
    agent, taken = make(backend=backend, timesteps=20 * WORKERS * ROWS), Taken()
    streams: dict[tuple[int, int], list[bool]] = {}  # whether each step ended its episode

    def look(iteration: Any) -> None:
        for rollout in [report.rollout for report in agent._pool.reports]:
            ended = rollout.terminated | rollout.truncated
            assert ended.shape == rollout.rewards.shape == (T, N)
            real = np.ones_like(ended) if rollout.valid is None else rollout.valid
            assert (rollout.rewards[real] == 1).all()
            for i in range(N):
                stream = streams.setdefault((rollout.origin.worker, i), [])
                stream += ended[real[:, i], i].tolist()

    result = agent.train(callbacks=[taken, look], quiet=True)
    assert agent.config.backend == backend
    assert result.steps == 20 * WORKERS * ROWS
    assert len(streams) == WORKERS * N
    assert (taken.missing(), taken.repeated(), len(taken.origins)) == (0, 0, 20 * WORKERS)
    assert sum(map(len, streams.values())) == result.steps
    ends = [np.flatnonzero([True, *stream]) for stream in streams.values()]
    counted = np.loadtxt(agent.run / "episodes.csv", delimiter=",", skiprows=1)
    lengths = np.sort(np.concatenate([np.diff(of_one) for of_one in ends]))
    np.testing.assert_array_equal(lengths, np.sort(counted[:, 2]))
    np.testing.assert_array_equal(counted[:, 1], counted[:, 2])


@pytest.mark.slow
def test_a_learner_on_two_devices_learns_what_one_does(make, cluster, tmp_path):
    """The devices are virtual, and of a process of its own."""
    with make(timesteps=3 * WORKERS * ROWS, normalize_observations=True) as one:
        one.train(quiet=True)
    given = {**SMALL, "hidden_sizes": 8, "timesteps": 3 * WORKERS * ROWS, "num_devices": "all"}
    given |= {"address": cluster.address, "log_dir": tmp_path, "run_name": "two"}
    words = [f"--{name}={value}" for name, value in given.items()]
    command = [sys.executable, "-m", "starling", "train", "--distributed", "--env", "CartPole-v1"]
    ended = subprocess.run(
        [*command, *words, "--normalize_observations"],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert read_settings(tmp_path / "two")["num_devices"] == 2
    two = make(resume=tmp_path / "two", num_devices=1, timesteps=4 * WORKERS * ROWS)
    np.testing.assert_allclose(numbers_of(two), numbers_of(one), atol=1e-5)
    assert two.train(quiet=True).steps == 4 * WORKERS * ROWS


class KillsAWorker(LooksAtWeights):
    """Kills worker 0 once.

    Args:
        agent: Whose pool is there.
        when: "collecting", which a worker that is ahead does while the learner learns; or
            "broadcast", when parameters are published and not yet with the workers.
    """

    def __init__(self, agent: DistributedPPO, when: str):
        super().__init__(agent)
        self.when = when

    def publish(self) -> Any:
        published = super().publish()
        if self.when == "broadcast" and published.version == 3:
            self._kill()
        return published

    def _kill(self) -> None:
        self.pool.cluster.kill(self.pool.workers[0].handle)

    def __call__(self, iteration: Any) -> bool:
        super().__call__(iteration)
        if self.when == "collecting" and iteration.iteration == 3:
            self._kill()
        begun = {origin.restarts for origin in self.origins if origin.worker == 0}
        return len(begun) < 2


@pytest.mark.parametrize("when", ["broadcast", pytest.param("collecting", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "sync_mode", ["non_blocking", pytest.param("blocking", marks=pytest.mark.slow)]
)
def test_a_worker_that_is_killed_is_replaced(make, sync_mode, when):
    agent = make(sync_mode=sync_mode, max_policy_lag=3, timesteps=10**6, lr=0.01)
    kills = KillsAWorker(agent, when)
    result = agent.train(callbacks=kills, quiet=True)
    assert result.status == "callback"
    assert result.steps == result.steps // (WORKERS * ROWS) * WORKERS * ROWS, "no update shrank"
    last = metrics_of(agent.run)[-1]
    assert (kills.missing(), kills.repeated()) == (0, 0)
    assert last["faults/workers_lost"] == 1
    assert last["async/policy_lag_max"] <= 3
    if sync_mode == "blocking":
        assert {line["async/policy_lag_max"] for line in metrics_of(agent.run)} == {0}


def test_what_was_asked_for_with_older_parameters_is_looked_at_anew(make):
    """As a worker's rollout may be, that went on while another was lost."""
    agent = make(num_workers=1)
    seen: list[tuple[list[int], bool]] = []
    update = agent.update

    def watched(rollout: Any, *rest: Any) -> Any:
        seen.append((agent._pool.lags, rollout.outputs is None))
        return update(rollout, *rest)

    def ask_early(iteration: Any) -> None:
        if iteration.iteration == 2:
            agent._pool._ask_for_rollout(agent._pool.workers[0])

    agent.update = watched
    agent.train(callbacks=ask_early, quiet=True)
    assert seen[:4] == [([0], False), ([0], False), ([1], True), ([0], False)]


class OutOfTurn(queue.SimpleQueue):
    """Hands over every first of two answers of a worker after the second, as Ray sometimes does."""

    def __init__(self):
        super().__init__()
        self.held: dict[Any, Any] = {}

    def put(self, answer: Any) -> None:
        request = answer[0]
        if request.sequence >= 0 and request not in self.held and request.sequence % 2 == 0:
            self.held[request] = answer
            return
        super().put(answer)
        before = request._replace(sequence=request.sequence - 1)
        if before in self.held:
            super().put(self.held[before])


def test_answers_out_of_turn_are_taken_in_turn(make):
    agent, taken = make(sync_mode="non_blocking", timesteps=20 * WORKERS * ROWS), Taken()
    agent.make_collector()._answers = OutOfTurn()
    assert agent.train(callbacks=taken, quiet=True).status == "completed"
    assert (taken.missing(), taken.repeated()) == (0, 0)
    assert len(taken.origins) == 20 * WORKERS


def test_rollouts_that_are_too_old_are_dropped_and_counted(make):
    settings = {"num_workers": 1, "sync_mode": "non_blocking", "max_policy_lag": 0}
    agent, taken = make(FiveSteps, **settings), Taken()
    result = agent.train(callbacks=taken, quiet=True)
    lengths = np.loadtxt(agent.run / "episodes.csv", delimiter=",", skiprows=1)[:, 2]
    assert (lengths == 5).all(), "episodes go on in what is dropped"
    lines = metrics_of(agent.run)
    assert result.steps == 6 * WORKERS * ROWS, "what was dropped does not count"
    assert {line["async/policy_lag_max"] for line in lines} == {0}
    dropped = [line["async/dropped"] for line in lines]
    assert dropped == sorted(dropped)
    assert dropped[-1] > 0
    assert (taken.missing(), taken.repeated()) == (0, 0)
    assert len(taken.origins) > 6


class FiveSteps(gym.Wrapper):
    """Episodes of five steps, which no rollout's length is a multiple of."""

    def __init__(self):
        super().__init__(gym.make("CartPole-v1", max_episode_steps=5))


class Fails(gym.Wrapper):
    """Fails at its 40th step."""

    def __init__(self):
        super().__init__(gym.make("CartPole-v1"))
        self.left = 40

    def step(self, action: Any) -> Any:
        self.left -= 1
        if not self.left:
            raise RuntimeError("worn out")
        return super().step(action)


def test_an_environment_that_fails_is_told_with_its_worker_and_the_run_is_saved(make, caplog):
    settings = {"on_env_error": "restart", "max_restarts": N, "num_workers": 1}
    agent = make(Fails, timesteps=10 * ROWS, **settings)
    with pytest.raises(WorkerError, match=r"worker 0 \(pid \d+ on node .*worn out") as caught:
        agent.train(quiet=True)
    assert "in step" in caught.value.original_traceback
    assert caught.value.original_traceback in str(caught.value), "which is shown once"
    told = [record for record in caplog.records if record.name.startswith("starling.envs.")]
    assert re.match(r"in worker 0 \(pid \d+ on node .* worn out", told[0].getMessage())
    assert load_checkpoint(agent.run).step == agent.step > 0


class SlowWithItsProcess(gym.Env):
    """Shows the number of the process that steps it, and takes its time."""

    observation_space = gym.spaces.Box(0, 2**22, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return self._shown(), {}

    def step(self, action: Any) -> Any:
        time.sleep(0.002)
        return self._shown(), 1.0, False, False, {}

    def _shown(self) -> np.ndarray:
        return np.array([os.getpid()], np.float32)


def test_a_worker_with_two_cores_has_the_backend_that_pays_for_its_environments(make):
    settings = {"num_workers": 1, "cpus_per_worker": 2, "num_envs": 4, "steps_per_worker": 64}
    agent = make(SlowWithItsProcess, backend="auto", timesteps=64, **settings)
    assert agent.config.backend == "process"
    agent.train(quiet=True)
    (report,) = agent._pool.reports
    processes = np.unique(report.rollout.observations)
    assert len(processes) == 2
    worker = int(agent._pool.workers[0].where.split()[1])
    assert worker not in processes


def far_away():
    """Can be built where the policy learns, but not by a worker."""
    import ray

    if ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None:
        raise FileNotFoundError("no map of the labyrinth here")
    return gym.make("CartPole-v1")


def test_a_run_that_is_stopped_at_once_can_go_on(make):
    agent = make(num_workers=1)
    assert agent.train(stop=lambda: True, quiet=True).status == "stopped"
    assert agent.train(quiet=True).steps == 6 * WORKERS * ROWS


def test_an_environment_that_a_worker_cannot_build_is_told(make):
    where = r"worker 0 \(pid \d+ on node \S+\) failed: .*FileNotFoundError: no map of the labyrinth"
    with pytest.raises(WorkerError, match=where) as caught:
        make(far_away, num_workers=1).train(quiet=True)
    assert "far_away" in caught.value.original_traceback
    assert "make_vec" not in str(caught.value), "which is ours"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 4}, r"4 x cpus_per_worker 1 = 4 cores, and the cluster has 3: use .* 3"),
        *(
            (
                {"num_workers": n, "cpus_per_worker": 8},
                r"8 is more than any .* largest has \d cores",
            )
            for n in (None, 1, "all")
        ),
        ({"steps_per_worker": 33}, "steps_per_worker 33 .* num_envs 2: use 32 or 34"),
        ({"buffer_size": 100}, "buffer_size 100 .* whole rollouts .* 32: use 128"),
        ({"mini_batch_size": 48}, "mini_batch_size 48 does not divide num_parts x steps_per"),
        ({"num_workers": "many"}, "num_workers must be a whole number or all or none, not many"),
        ({"exact_resume": True}, "exact_resume does not go with distributed_ppo"),
    ],
)
def test_what_cannot_be_is_refused(make, settings, message):
    with pytest.raises(UserError, match=message):
        make(**settings)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("here", "address 'here' is not HOST:PORT"),
        (f"127.0.0.1:{10**20}", "address '127.0.0.1:100000000000000000000' is not HOST:PORT"),
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1: give HOST:PORT"),
    ],
)
def test_a_cluster_that_is_not_there_is_told(tmp_path, capsys, address, message):
    words = ["train", "--distributed", "--env", "CartPole-v1", "--address", address]
    assert cli.main([*words, "--log_dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_what_has_no_distributed_form_is_told(capsys):
    assert cli.main(["train", "--distributed", "--algo", "a2c", "--env", "CartPole-v1"]) == 2
    assert "a2c has no distributed form: use --distributed with --algo ppo" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(("cpus_per_worker", "workers"), [(1, 2), (0.5, 4)])
def test_four_fifths_of_the_cores_are_used_by_default(make, cpus_per_worker, workers):
    """Of three."""
    agent = make(num_workers=None, cpus_per_worker=cpus_per_worker)
    assert agent.config.num_workers == workers


def test_steps_per_worker_decides_the_steps(make):
    agent = make(steps_per_worker=64, buffer_size=64, num_workers=1)
    assert agent.config.num_steps == 32
    assert agent.config.batch_size == 64
