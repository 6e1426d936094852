import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from starling.config import (
    ALGORITHMS,
    RESUMABLE,
    A2CConfig,
    DQNConfig,
    PPOConfig,
    config_from_dict,
    find_config_class,
    find_trainer_class,
    reference_markdown,
    resolve,
    resume,
)
from starling.errors import UserError
from starling.options import OTHER_NAMES, convert, markdown_reference, options, parse
from starling.presets import load_presets


def test_every_option_is_documented_in_a_sentence():
    for algorithm in ALGORITHMS.values():
        for option in options(algorithm.config).values():
            assert option.doc.endswith("."), option.name


def test_defaults_are_the_documented_ones():
    config = PPOConfig(env="X")
    assert (config.timesteps, config.num_envs, config.num_steps) == (1_000_000, 8, 2048)
    assert (config.epochs, config.mini_batch_size, config.lr) == (10, 64, 3e-4)
    assert (config.gamma, config.gae_lambda, config.clip_param) == (0.99, 0.95, 0.2)
    assert (config.value_coef, config.entropy_coef, config.max_grad_norm) == (0.5, 0.01, 0.5)
    assert (config.seed, config.device, config.log_dir, config.backend) == (
        0,
        "auto",
        "./logs",
        "auto",
    )
    assert (config.log_interval, config.save_interval, config.hidden_sizes) == (10, 50, None)


def test_a2c_is_one_pass_over_the_whole_rollout_without_clip():
    config = A2CConfig(env="X")
    assert (config.epochs, config.mini_batch_size, config.clip_param) == (1, None, None)
    assert config.num_minibatches == 1


def test_derived_sizes():
    config = PPOConfig(env="X", num_envs=4, num_steps=30, mini_batch_size=40, timesteps=1000)
    assert config.batch_size == 120
    assert config.num_minibatches == 3
    assert config.num_iterations == 9  # 8 rollouts are 960 steps


def test_given_wins_over_preset_and_preset_over_default():
    config, preset = resolve("ppo", {"env": "CartPole-v1", "lr": 0.5})
    assert preset == config.preset == "CartPole-v1"
    assert config.lr == 0.5
    assert config.num_steps == load_presets("ppo")["CartPole-v1"]["num_steps"]
    assert config.value_coef == 0.5


def test_preset_none_leaves_the_defaults():
    config, preset = resolve("ppo", {"env": "CartPole-v1", "preset": "none"})
    assert preset is None
    assert config.preset == "none"
    assert config.num_steps == 2048


def test_preset_of_another_environment():
    config, preset = resolve("ppo", {"env": "MyCartPole-v0", "preset": "CartPole-v1"})
    assert preset == "CartPole-v1"
    assert config.env == "MyCartPole-v0"
    assert config.num_steps == load_presets("ppo")["CartPole-v1"]["num_steps"]


def test_env_name_means_env():
    assert resolve("ppo", {"env_name": "X"})[0].env == "X"


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_config_survives_json(algo):
    config, _ = resolve(algo, {"env": "X", "env_kwargs": {"g": 9.81}, "hidden_sizes": [32]})
    data = json.loads(json.dumps(config.to_dict()))
    assert data["algo"] == algo
    assert config_from_dict({**data, "versions": {"starling": "0.1.0"}}) == config


def test_config_of_an_older_version_takes_the_defaults_of_new_settings():
    data = PPOConfig(env="X").to_dict()
    del data["adam_eps"]
    assert config_from_dict(data).adam_eps == 1e-5


def test_config_of_a_newer_version_is_refused():
    data = {**PPOConfig(env="X").to_dict(), "warp_factor": 9}
    with pytest.raises(UserError, match=r"warp_factor.* 9\.0"):
        config_from_dict({**data, "versions": {"starling": "9.0"}})


def test_config_that_is_none_is_refused():
    with pytest.raises(UserError, match=r"no config\.json"):
        config_from_dict({"lr": 1})


def test_resuming_may_change_how_long_and_where():
    config = PPOConfig(env="X", timesteps=20_000)
    where = {"backend": "serial", "device": "cpu", "num_workers": 3, "step_timeout": None}
    often = {"timesteps": 40_000, "max_time": 60.0, "log_interval": 1, "save_interval": 1}
    resumed = resume(config, {**where, **often, "env": "X"})
    assert resumed == dataclasses.replace(config, **where, **often)


def test_resuming_with_other_settings_is_refused_with_the_difference():
    with pytest.raises(UserError, match=r"num_envs 8, not 4; lr 0\.0003, not 0\.1: leave"):
        resume(PPOConfig(env="X"), {"num_envs": 4, "lr": 0.1, "gamma": 0.99, "timesteps": 20_000})
    with pytest.raises(UserError, match="calls it num_envs"):
        resume(PPOConfig(env="X"), {"n_envs": 4})


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_whatever_learning_depends_on_is_refused_when_a_run_is_resumed(algo):
    config = find_config_class(algo)(env="X")
    fixed = options(type(config)).keys() - RESUMABLE
    assert {"env", "num_envs", "num_steps", "seed", "lr", "hidden_sizes"} <= fixed
    for name in fixed:
        with pytest.raises(UserError) as caught:
            resume(config, {name: "something else"})
        assert f"{name} {getattr(config, name)}, not something else" in str(caught.value)


def test_what_may_change_are_options():
    known = set().union(*(options(algorithm.config) for algorithm in ALGORITHMS.values()))
    assert known > RESUMABLE


def test_env_kwargs_that_json_lacks_are_kept_as_text():
    data = PPOConfig(env="X", env_kwargs={"f": len}).to_dict()
    assert "len" in data["env_kwargs"]["f"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mini_batch_size": 100}, "does not divide .* = 8 x 2048 = 16384: use 64 or 128"),
        ({"mini_batch_size": 20_000}, "use 16384$"),
        ({"timesteps": 1000}, "8 x 2048 = 16384: use .* 16384 or num_steps at most 125"),
        ({"num_envs": 0}, "num_envs must be at least 1, not 0"),
        ({"num_envs": 2.5}, "num_envs must be a whole number, not 2.5"),
        ({"num_envs": True}, "num_envs must be a whole number"),
        ({"num_envs": None}, "num_envs must be a whole number"),
        ({"num_steps": 0}, "num_steps must be at least 1"),
        ({"lr": 0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"gamma": 1.01}, r"gamma must be in \[0, 1\], not 1.01"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"activation": "rely"}, "unknown activation 'rely': did you mean relu"),
        ({"precision": "float16"}, "unknown precision 'float16': did you mean .*float32"),
        ({"lr_schedule": "linaer"}, "did you mean linear"),
        ({"hidden_sizes": [64, 0]}, "hidden_sizes must be at least 1"),
        ({"hidden_sizes": 64}, "hidden_sizes must be whole numbers such as 64 64 or none, not 64"),
        ({"device": "gpuu"}, "unknown device 'gpuu': use auto, cpu"),
        ({"run_name": "a/b"}, "no name of a folder"),
        ({"run_name": ".."}, "no name of a folder"),
        ({"env": ""}, "env is missing"),
        ({"n_steps": 5}, "unknown option n_steps: Starling calls it num_steps"),
        ({"n-steps": 5}, "unknown option n-steps: Starling calls it num_steps"),
        ({"gama": 0.9}, "unknown option gama: did you mean gamma"),
        ({"qqqqq": 1}, "unknown option qqqqq: starling train --help lists them all"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_sentence(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        resolve("ppo", {"env": "X", **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_no_value_of_any_option_is_refused_but_in_words(algo):
    refused = 0
    for name in options(find_config_class(algo)).keys() - {"env"}:
        for value in (0, -1, 13, 10**18, None, "none", {}):
            try:
                config, _ = resolve(algo, {"env": "X", "preset": "none", name: value})
                assert config.batch_size * config.num_iterations >= config.timesteps
            except UserError:
                refused += 1
    assert refused > 100


def test_no_num_steps_are_advised_where_steps_per_worker_decides_them():
    with pytest.raises(UserError, match=r"2 x 1600 = 3200: use timesteps at least 3200$"):
        resolve(
            "distributed_ppo",
            {"env": "X", "timesteps": 100, "num_workers": 2, "steps_per_worker": 1600},
        )


def test_unknown_algorithm_names_the_nearest():
    with pytest.raises(UserError, match="unknown algo 'pp0': did you mean ppo"):
        find_config_class("pp0")


def test_trainer_of_ones_own_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_trainer.py").write_text(
        "from starling.config import PPOConfig\nclass Mine:\n    config_class = PPOConfig\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_config_class("my_trainer:Mine") is PPOConfig
    with pytest.raises(UserError, match="my_trainer:Other"):
        find_trainer_class("my_trainer:Other")


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig(env="X").lr = 1  # type: ignore[misc]


def test_replace_validates():
    with pytest.raises(UserError, match="num_envs"):
        dataclasses.replace(PPOConfig(env="X"), num_envs=0)


def test_numpy_numbers_become_python_numbers():
    config = PPOConfig(env="X", num_envs=np.int64(4), lr=np.float32(0.5))  # type: ignore[arg-type]
    assert type(config.num_envs) is int
    assert type(config.lr) is float


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("timesteps", "1e6", 1_000_000),
        ("timesteps", "1_000", 1000),
        ("lr", "3e-4", 3e-4),
        ("clip_param", "none", None),
        ("hidden_sizes", ["256", "128"], (256, 128)),
        ("hidden_sizes", "256,128", (256, 128)),
        ("hidden_sizes", [], ()),
        ("shared_network", "true", True),
        ("env_kwargs", '{"g": 9.81}', {"g": 9.81}),
        ("run_name", "none", None),
    ],
)
def test_values_from_text(name, text, value):
    parsed = parse(options(PPOConfig)[name], text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("timesteps", "1.5"),
        ("lr", "fast"),
        ("gamma", "none"),
        ("tensorboard", "yes"),
        ("env_kwargs", "g=1"),
    ],
)
def test_text_that_is_no_value(name, text):
    with pytest.raises(UserError, match=rf"{name} must be .*, not {text}"):
        parse(options(PPOConfig)[name], text)


def test_names_of_other_libraries_lead_to_options_that_there_are():
    ours = {*options(PPOConfig), *options(DQNConfig)}
    assert set(OTHER_NAMES.values()) <= ours
    assert not set(OTHER_NAMES) & ours


def test_choices_are_checked_for_values_from_code():
    with pytest.raises(UserError, match="unknown activation"):
        convert(options(PPOConfig)["activation"], "swish")


def test_reference_page_is_what_the_code_says():
    page = Path(__file__).parents[2] / "docs" / "parameters.md"
    assert page.read_text(encoding="utf-8") == reference_markdown(), (
        "run python -m starling.config > docs/parameters.md"
    )


def test_reference_has_a_row_for_each_option():
    page = markdown_reference(PPOConfig)
    for name in options(PPOConfig):
        assert f"\n| `{name}` |" in page
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "## Environment",
        "## Run",
        "## Update",
        "## Layer",
        "## PPO",
        "## Network",
    ]


@pytest.mark.timeout(60)
def test_configuration_imports_no_jax():
    code = (
        "import sys, starling.config; sys.exit('jax' in sys.modules or 'gymnasium' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
