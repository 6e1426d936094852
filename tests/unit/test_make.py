"""What users may call an environment, and what they are told when it is none."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import textwrap
import threading

import cloudpickle
import envs_for_tests as envs
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv

from starling.envs.factories import env_factories, env_factory, env_name
from starling.envs.make import BACKENDS, load_backend, make_env, make_vec
from starling.envs.serial import SerialVectorEnv
from starling.errors import MissingExtraError, UserError
from starling.training.parallel_ppo import ParallelPPO

# ---- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CartPole-v1", "CartPole-v1"),
        ("CartPole", "CartPole-v1"),
        ("gymnasium:CartPole-v1", "CartPole-v1"),
        ("gymnasium.envs.classic_control:CartPoleEnv", None),
        ("envs_for_tests:CountingEnv", None),
    ],
)
def test_names_of_environments(name, expected):
    env = make_env(name)
    assert (env.spec.id if env.spec else None) == expected
    env.reset(seed=0)
    env.step(env.action_space.sample())


def test_a_callable_may_lie_deeper_in_a_module(monkeypatch):
    monkeypatch.setattr(envs, "box", type("Box", (), {"inner": envs.CountingEnv}), raising=False)
    assert isinstance(make_env("envs_for_tests:box.inner", {"length": 3}), envs.CountingEnv)


def test_a_spec():
    assert make_env(gym.spec("CartPole-v1")).spec.id == "CartPole-v1"


def test_arguments_reach_the_environment():
    assert make_env("CartPole-v1", {"sutton_barto_reward": True}).unwrapped._sutton_barto_reward
    assert make_env("CartPole-v1", {"max_episode_steps": 7}).spec.max_episode_steps == 7
    assert make_env(envs.CountingEnv, {"length": 3}).length == 3
    assert make_env("envs_for_tests:CountingEnv", {"length": 4}).length == 4
    assert make_env(envs.CountingEnv, render_mode="rgb_array").render_mode == "rgb_array"
    assert make_env("CartPole-v1", render_mode="rgb_array").render_mode == "rgb_array"


def test_what_gymnasium_cannot_make_comes_from_envpool():
    pytest.importorskip("envpool")
    if _importable("Box2D"):
        pytest.skip("Box2D is installed")
    env = make_env("LunarLander-v3", {"max_episode_steps": 5}, render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().ndim == 3
    steps = [env.step(0)[2:4] for _ in range(5)]
    assert steps[-1] == (False, True)
    assert env_name("LunarLander-v3") == env.spec.id
    env.close()


def _importable(module):
    return importlib.util.find_spec(module) is not None


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    """The folder that a command lies in is on the path, the current one is not."""
    (tmp_path / "folder_env_of_test.py").write_text(
        "from envs_for_tests import CountingEnv\ndef make(length=9): return CountingEnv(length)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    assert make_env("folder_env_of_test:make").length == 9
    assert str(tmp_path) in sys.path


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ("CartPole-v7", r"no environment 'CartPole-v7': did you mean CartPole-v1"),
        ("cartpole-v1", r"did you mean CartPole-v1"),
        ("LunarLandr-v3", "LunarLander-v3"),
        ("Nothing-like-it", "import the module that registers it"),
        ("no_such_module:make", "no module 'no_such_module'"),
        ("json:no_such_thing", "module 'json' has no 'no_such_thing'"),
        ("", "no environment ''"),
        (3, "env is 3; give an id"),
        (None, "env is None"),
    ],
)
def test_what_is_no_environment(env, message):
    with pytest.raises(UserError, match=message):
        make_env(env)


@pytest.mark.parametrize(
    ("env", "kwargs", "message"),
    [
        ("CartPole-v1", {"rendermode": 1}, "no argument 'rendermode': did you mean render_mode"),
        (envs.CountingEnv, {"lenght": 1}, "no argument 'lenght': did you mean length"),
        ("envs_for_tests:CountingEnv", {"lenght": 1}, "did you mean length"),
        ("CartPole-v1", {"max_episode_steps": 0}, "max_episode_steps is 0"),
        (envs.CountingEnv(), {"length": 1}, "without a spec, so it takes no arguments"),
    ],
)
def test_arguments_that_it_does_not_take(env, kwargs, message):
    with pytest.raises(UserError, match=message):
        make_env(env, kwargs)


def raising_import(**kwargs):
    raise ModuleNotFoundError("No module named 'pygame'", name="pygame")


raising_import.__name__ = "_raise_error"


@pytest.mark.parametrize(
    ("entry_point", "message"),
    [
        ("no_such_package_of_theirs:Env", "cannot be made here: No module named"),
        (raising_import, r"needs a package that is not installed: .*starling-rl\[render\]"),
    ],
)
def test_a_missing_package_is_named(entry_point, message, monkeypatch):
    monkeypatch.setitem(gym.registry, "Lacking-v0", EnvSpec("Lacking-v0", entry_point=entry_point))
    with pytest.raises(MissingExtraError, match=message):
        make_env("Lacking-v0")


@pytest.mark.skipif(_importable("ale_py"), reason="ale-py is installed")
@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "PongNoFrameskip-v4"])
def test_atari_names_its_extra(env_id):
    with pytest.raises(UserError, match=r"starling-rl\[atari\]"):
        make_env(env_id)


def test_an_error_inside_a_users_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "broken_env_of_test.py").write_text("1 / 0\n")
    (tmp_path / "lacking_env_of_test.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        make_env("broken_env_of_test:make")
    with pytest.raises(UserError, match="No module named 'no_such_module_at_all'"):
        make_env("lacking_env_of_test:make")


# ---- environments


def test_an_environment_is_made_again_from_its_spec_wrappers_included():
    original = gym.wrappers.TransformReward(
        gym.make("CartPole-v1", max_episode_steps=3, sutton_barto_reward=True), lambda r: r + 10
    )
    first, second = (factory() for factory in env_factories(original, 2))
    assert first.unwrapped is not original.unwrapped
    assert first.unwrapped is not second.unwrapped
    first.reset(seed=0)
    results = [first.step(0) for _ in range(3)]
    assert results[0][1] == 10.0, "the wrapper and the argument are there"
    assert results[2][3], "the time limit is there"


class OwnStreams(gym.Env):
    """Draws from generators of its own, which `reset` does not seed; has no spec."""

    observation_space = gym.spaces.Box(0, 1, (4,), np.float64)
    action_space = gym.spaces.Discrete(2)

    def __init__(self):
        self.generator = np.random.default_rng(0)
        self.nested = {"deep": [random.Random(1), np.random.RandomState(2)]}
        self.again = self.generator

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.step(0)[0], {}

    def step(self, action):
        python, numpys = self.nested["deep"]
        numbers = [self.generator.random(), python.random(), numpys.rand(), self.again.random()]
        return np.array(numbers), 0.0, False, False, {}


def test_copies_share_no_random_stream():
    original = OwnStreams()
    copies = [factory() for factory in env_factories(original, 3)]
    draws = np.array([env.reset()[0] for env in (original, *copies)])
    assert len(np.unique(draws)) == draws.size, "a number was drawn twice"
    assert all(copy.generator is copy.again for copy in copies)
    repeated = env_factories(OwnStreams(), 3)[1]().reset()[0]
    np.testing.assert_array_equal(repeated, draws[2]), "copies follow from the original"


def test_copies_in_several_vector_environments_of_a_run_share_no_random_stream():
    vectors = [make_vec(OwnStreams(), 2, "serial", first_env=first) for first in (0, 2)]
    draws = np.concatenate([vector.reset(seed=0)[0] for vector in vectors])
    assert len(np.unique(draws)) == draws.size, "a number was drawn twice"
    for vector in vectors:
        vector.close()


def test_copies_of_an_environment_in_use_have_different_episodes():
    original = gym.envs.classic_control.CartPoleEnv()
    original.reset(seed=0)
    vector = make_vec(original, 3, backend="serial")
    observations, _ = vector.reset()
    assert len(np.unique(observations, axis=0)) == 3
    vector.close()


def test_an_environment_whose_wrapper_cannot_be_made_again_is_copied():
    class Adding(gym.RewardWrapper):
        def __init__(self, env, amount):
            super().__init__(env)
            self.amount = amount

        def reward(self, reward):
            return reward + self.amount

    original = Adding(gym.make("CartPole-v1"), 5)
    copied = env_factory(original)()
    assert copied.unwrapped is not original.unwrapped
    copied.reset(seed=0)
    assert copied.step(0)[1] == 6.0


def test_an_environment_that_cannot_be_copied():
    env = OwnStreams()
    env.lock = threading.Lock()
    with pytest.raises(UserError, match=r"cannot be copied .* give a function that makes it"):
        make_env(env)


def test_factories_travel_to_other_processes():
    class Local(envs.CountingEnv):
        pass

    for env in (Local, lambda: Local(), "CartPole-v1", Local(), gym.make("CartPole-v1")):
        factory = cloudpickle.loads(cloudpickle.dumps(env_factory(env)))
        factory().reset(seed=0)


def test_names():
    assert env_name("CartPole-v1") == "CartPole-v1"
    assert env_name(gym.make("CartPole-v1")) == "CartPole-v1"
    assert env_name(envs.CountingEnv) == "CountingEnv"
    assert env_name(envs.CountingEnv()) == "CountingEnv"
    assert env_name(env_factory("CartPole-v1")) == "CartPole-v1"


@pytest.mark.timeout(60)
def test_what_a_script_registers_can_be_made_by_processes(tmp_path):
    """Neither the registry nor the script's module exists in a worker."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import gymnasium as gym
        import numpy as np
        import starling

        class Mine(gym.Env):
            observation_space = gym.spaces.Box(0, 1, (2,), np.float32)
            action_space = gym.spaces.Discrete(2)

            def reset(self, *, seed=None, options=None):
                super().reset(seed=seed)
                return self.np_random.random(2, np.float32), {}

            def step(self, action):
                return self.np_random.random(2, np.float32), 1.0, False, False, {}

        class Doubling(gym.RewardWrapper):
            def reward(self, reward):
                return 2 * reward

        gym.register("Mine-v0", entry_point=Mine, max_episode_steps=3)
        gym.register("Named-v0", entry_point="__main__:Mine", max_episode_steps=3)
        for env in ("Mine-v0", "Named-v0", Mine, lambda: Mine(), Doubling(gym.make("Mine-v0"))):
            envs = starling.make_vec(env, 2, "process", num_workers=2, seed=0)
            envs.reset()
            for _ in range(3):
                _, rewards, _, truncations, _ = envs.step([0, 0])
            print(rewards.tolist(), truncations.tolist())
            envs.close()
        """)
    )
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=50, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "[1.0, 1.0] [True, True]",
        "[1.0, 1.0] [True, True]",
        "[1.0, 1.0] [False, False]",
        "[1.0, 1.0] [False, False]",
        "[2.0, 2.0] [True, True]",
    ]


# ---- make_vec


@pytest.mark.timeout(60)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_by_its_name(backend, no_leaks):
    if backend == "envpool":
        pytest.importorskip("envpool")
    assert load_backend(backend).backend == backend
    vector = make_vec("CartPole-v1", 4, backend, num_workers=2, seed=0)
    workers = 1 if backend == "compiled" else 2
    assert (vector.backend, vector.num_envs, vector.num_workers) == (backend, 4, workers)
    observations, _ = vector.reset()
    assert observations.shape == (4, 4)
    vector.close()


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("backend", ["serial", "envpool", "compiled"])
def test_a_limit_that_nobody_can_keep_is_refused(backend):
    refusal = f"step_timeout cannot be kept by backend {backend}.*use backend process"
    with pytest.raises(UserError, match=refusal):
        make_vec("CartPole-v1", 2, backend, step_timeout=5.0)
    with pytest.raises(UserError, match=refusal):
        ParallelPPO("CartPole-v1", num_envs=2, backend=backend, step_timeout=5.0, preset="none")
    make_vec("CartPole-v1", 2, backend, step_timeout=5.0, require_timeout=False).close()


def test_a_limit_makes_auto_choose_processes(no_leaks, capfd):
    vector = make_vec("CartPole-v1", 1, step_timeout=60.0)
    assert vector.backend == "process"
    assert "backend process: it can keep a step_timeout" in capfd.readouterr().err
    vector.close()


@pytest.mark.parametrize("backend", ["serial", "thread", "process"])
def test_options_reach_the_backend(backend, no_leaks):
    vector = make_vec(
        "CartPole-v1",
        4,
        backend,
        num_workers=2,
        seed=3,
        batch_size=2,
        env_kwargs={"max_episode_steps": 2},
        infos="all",
        copy=False,
        episode_seeds=True,
        step_timeout=None if backend == "serial" else 20.0,
    )
    assert vector.restorable
    vector.reset()
    assert [state["episode"] for state in vector.state()] == [0] * 4
    vector.send(np.zeros(4, int))
    assert len(vector.recv()[0]) == 2
    vector.recv()
    vector.send(np.zeros(4, int))
    assert vector.recv()[3].all()
    vector.recv()
    vector.close()


def test_a_backend_of_the_users():
    vector = make_vec("CartPole-v1", 2, "starling.envs.serial:SerialVectorEnv", seed=0)
    assert isinstance(vector, SerialVectorEnv)
    vector.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed -1 is negative"),
        ({"num_envs": 10**11}, r"100000000000 environments need at least \d+ MB of memory; \d+ MB"),
        ({"num_envs": 0}, "num_envs is 0; it must be a whole number from 1 up"),
        ({"num_envs": 2.5}, "num_envs is 2.5"),
        ({"num_envs": True}, "num_envs is True"),
        ({"num_workers": 0}, "num_workers is 0"),
        ({"backend": "proces"}, "unknown backend 'proces': did you mean process"),
        ({"backend": "xyz"}, "there are auto, serial, thread, process, envpool, compiled"),
        ({"backend": "no_such_module:Class"}, "cannot be imported"),
        ({"backend": "starling.envs.serial:Nothing"}, "cannot be imported"),
        ({"backend": "serial", "batch_size": 9}, "batch_size 9"),
        ({"backend": "serial", "infos": "some"}, "infos is 'some'"),
        ({"env": "CartPole-v9"}, "CartPole-v1"),
        ({"env": envs.CountingEnv, "backend": "envpool"}, "from their ids"),
        ({"env": envs.CountingEnv, "backend": "compiled"}, "CountingEnv cannot be part of a"),
    ],
)
def test_what_make_vec_refuses(options, message):
    with pytest.raises(UserError, match=message):
        make_vec(**{"env": "CartPole-v1", "num_envs": 4, **options})


def test_memory_that_runs_out_is_told_with_the_numbers(monkeypatch):
    def full(size):
        raise MemoryError(f"{size} bytes")

    monkeypatch.setattr("starling.envs.requests.bytearray", full, raising=False)
    with pytest.raises(UserError, match=r"4 environments need more memory .*\d+ bytes.*num_envs"):
        make_vec("CartPole-v1", 4, "serial")


def test_more_workers_than_environments_are_not_started():
    with_too_many = make_vec("CartPole-v1", 2, "thread", num_workers=5)
    assert with_too_many.num_workers == 2
    with_too_many.close()


def test_a_space_that_cannot_be_handled_is_named():
    with pytest.raises(UserError, match="Text"):
        make_vec(lambda: envs.SampleEnv(gym.spaces.Text(3)), 2, "serial")


def test_a_vector_environment_is_many_environments():
    with pytest.raises(UserError, match="SyncVectorEnv is many environments"):
        make_env(SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2))


def test_a_factory_that_returns_one_environment_again_and_again():
    env = gym.make("CartPole-v1")
    with pytest.raises(UserError, match="same environment twice"):
        make_vec(lambda: env, 2, "serial")


def test_importing_starts_nothing_and_leaves_the_heavy_packages_alone():
    code = (
        "import sys, threading, starling.envs.make, starling.envs.stepping_rate\n"
        "starling.make_vec('CartPole-v1', 4, seed=0).close()\n"
        "heavy = {'jax', 'envpool', 'flax', 'torch', 'matplotlib', 'pygame'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "backend serial" in result.stderr
