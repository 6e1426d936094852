import json

import pytest

from starling.config import ALGORITHMS, resolve
from starling.errors import UserError
from starling.presets import find_preset, load_presets

PROMISED = [
    "CartPole-v1",
    "Acrobot-v1",
    "MountainCar-v0",
    "MountainCarContinuous-v0",
    "Pendulum-v1",
    "LunarLander-v3",
    "BipedalWalker-v3",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Walker2d-v5",
    "Ant-v5",
    "Humanoid-v5",
    "Pusher-v5",
    "Reacher-v5",
    "InvertedPendulum-v5",
]


def test_ppo_has_a_preset_for_every_promised_environment():
    assert set(PROMISED) <= set(load_presets("ppo"))


@pytest.mark.parametrize(
    ("algo", "env"), [(algo, env) for algo in ALGORITHMS for env in load_presets(algo)]
)
def test_preset_is_valid_and_taken_by_environment_id(algo, env):
    config, name = resolve(algo, {"env": env})
    assert name == config.preset == env
    for option, value in load_presets(algo)[env].items():
        taken = getattr(config, option)
        wanted = None if value == "none" else value
        assert (list(taken) if isinstance(taken, tuple) else taken) == wanted


def test_async_ppo_takes_the_presets_of_ppo_where_it_has_none_of_its_own():
    ppo, own = load_presets("ppo"), load_presets("async_ppo")
    assert own["Pendulum-v1"] == ppo["Pendulum-v1"]
    assert own["LunarLander-v3"]["gamma"] == ppo["LunarLander-v3"]["gamma"]
    assert own["LunarLander-v3"]["num_steps"] < ppo["LunarLander-v3"]["num_steps"]


def test_an_algorithm_without_a_file_has_no_presets():
    assert load_presets("no_such_algorithm") == {}


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_preset_from_a_file(tmp_path, ending):
    file = tmp_path / f"mine.{ending}"
    file.write_text("lr = 0.5\n" if ending == "toml" else json.dumps({"lr": 0.5}))
    config, name = resolve("ppo", {"env": "CartPole-v1", "preset": str(file)})
    assert name == str(file)
    assert config.lr == 0.5
    assert config.num_steps == 2048  # the default, not CartPole's preset


def test_a_preset_file_says_none_in_a_word(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('target_update_interval = "none"\ntau = 0.01\n')
    config, _ = resolve("dqn", {"env": "CartPole-v1", "preset": str(file)})
    assert config.target_update_interval is None

    file.write_text('lr = "none"\n')
    with pytest.raises(UserError, match="lr"):
        resolve("dqn", {"env": "CartPole-v1", "preset": str(file)})


@pytest.mark.parametrize("content", ["lr =", "[1, 2]"])
def test_preset_file_that_cannot_be_read(tmp_path, content):
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(UserError, match=r"mine\.json"):
        find_preset("ppo", str(file), "CartPole-v1")


def test_option_in_a_preset_file_that_there_is_not(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("n_steps = 5\n")
    with pytest.raises(UserError, match=r"mine\.toml.*calls it num_steps"):
        resolve("ppo", {"env": "CartPole-v1", "preset": str(file)})


@pytest.mark.parametrize("name", ["algo", "env", "preset"])
def test_what_is_given_beside_a_preset_file_is_not_in_it(tmp_path, name):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"lr": 0.5, name: "dqn"}))
    with pytest.raises(UserError, match=f"mine.json holds {name}, which is given beside it: rem"):
        resolve("dqn", {"env": "CartPole-v1", "preset": str(file)})


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean CartPole-v1"):
        find_preset("ppo", "CartPole-v2", "CartPole-v1")
