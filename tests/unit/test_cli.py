import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import starling
from starling.cli import COMMANDS, main
from starling.cli.compilation_cache import keep_compiled_programs
from starling.cli.parsing import Parser, given_options, table
from starling.config import ALGORITHMS, PPOConfig
from starling.errors import UserError
from starling.options import options


def read(*arguments):
    parser = Parser("train", "")
    parser.add_options(PPOConfig)
    return given_options(parser.read(list(arguments)), PPOConfig)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--num_envs", "4"], {"num_envs": 4}),
        (["--num-envs", "4"], {"num_envs": 4}),
        (["--num-envs=4"], {"num_envs": 4}),
        (["--shared_network"], {"shared_network": True}),
        (["--shared-network", "True"], {"shared_network": True}),
        (["--shared_network", "false"], {"shared_network": False}),
        (["--shared_network=False"], {"shared_network": False}),
        (["--no-tensorboard"], {"tensorboard": False}),
        (["--no_tensorboard", "False"], {"tensorboard": True}),
        (["--stop_return", "-200"], {"stop_return": -200.0}),
        (["--stop_return", "-2e2"], {"stop_return": -200.0}),
        (["--hidden_sizes", "32", "16", "--seed", "1"], {"hidden_sizes": (32, 16), "seed": 1}),
        (["--hidden_sizes", "32,16"], {"hidden_sizes": (32, 16)}),
        (["--env_kwargs", '{"a-b": -1}'], {"env_kwargs": {"a-b": -1}}),
        (["--seed", "1", "--seed", "2"], {"seed": 2}),
        ([], {}),
    ],
)
def test_spellings_of_options(arguments, given):
    assert read(*arguments) == given


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--n-steps", "5"], "unknown option --n-steps: Starling calls it --num_steps"),
        (["--n_steps=5"], "unknown option --n_steps: Starling calls it --num_steps"),
        (["--gama", "0.9"], "unknown option --gama: did you mean --gamma"),
        (["--qqqqq"], "unknown option --qqqqq: starling train --help lists them all"),
        (["--num"], "unknown option --num"),  # no abbreviations: they would break with new options
        (["--shared_network=maybe"], "--shared_network must be True or False, not maybe"),
        (["--lr"], "--lr: expected one argument"),
        (["CartPole-v1"], "unexpected argument 'CartPole-v1'"),
        (["--tensorboard", "maybe"], "unexpected argument 'maybe'"),
    ],
)
def test_command_lines_that_cannot_be_read(arguments, words):
    with pytest.raises(UserError, match=words):
        read(*arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: starling {command}" in shown
    assert "--json" in shown or command == "bench"


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_help_of_train_shows_every_option_with_its_default(algo, capsys):
    assert main(["train", "--algo", algo, "--help"]) == 0
    shown = "".join(capsys.readouterr().out.split())
    for option in options(ALGORITHMS[algo].config).values():
        assert f"--{option.name}" in shown
        assert "".join(option.doc.split()) in shown
    assert f"(default:{options(ALGORITHMS[algo].config)['lr'].default})" in shown


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_overview_names_every_command(arguments, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"starling {starling.__version__}\n"
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert project["project"]["version"] == starling.__version__


def test_presets_as_json(capsys):
    assert main(["presets", "--algo", "ppo", "--env", "CartPole-v1", "--json"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["ppo"]["CartPole-v1"]["num_steps"] == 32


def test_table_puts_numbers_to_the_right():
    assert (
        table(["a", "steps"], [["xx", "1,000"], ["y", "20"]]) == "a   steps\nxx  1,000\ny      20"
    )


def test_compiled_programs_are_kept_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    for name in ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"):  # fmt: skip # noqa: E501
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled_programs()
    import os

    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "starling" / "jax")
    assert (tmp_path / "starling" / "jax").is_dir()


def test_a_cache_folder_that_cannot_be_made_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled_programs()
    import os

    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "code",
    [
        "import starling; starling.UserError; starling.PPOConfig",
        "from starling.cli import main; assert main(['--help']) == 0",
        "from starling.cli import main; assert main(['train', '--help']) == 0",
        "from starling.cli import main; assert main(['presets']) == 0",
        "from starling.cli import main; assert main(['train', '--n_steps', '3']) == 2",
    ],
)
def test_what_is_cheap_imports_no_jax(code):
    code += "; import sys; sys.exit(10 if 'jax' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.timeout(60)
def test_run_as_a_module_without_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "starling", "train", "--env", "X", "--n-steps", "3"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "starling: error: unknown option --n-steps: Starling calls it --num_steps\n"
    )


def test_all_that_is_exported_is_there():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = starling.nothing
    for name in starling.__all__:
        assert getattr(starling, name) is not None
