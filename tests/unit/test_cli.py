import json
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import starling
from starling.cli import COMMANDS, main
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


@pytest.mark.parametrize("option", ["--address=10.0.0.5:6379", "--cpus-per-worker=2"])
def test_options_of_clusters_say_what_they_need(option, capsys):
    told = f"{option.partition('=')[0]} is for workers on a Ray cluster: use --distributed (with"
    for algo in ("ppo", "a2c", "async_dqn"):
        assert main(["train", "--env", "CartPole-v1", option, "--algo", algo]) == 2
        error = capsys.readouterr().err
        assert f"{told} --algo ppo or dqn)" in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: starling {command}" in shown
    assert "--json" in shown or command == "bench"


@pytest.mark.parametrize("benchmark", ["env", "train"])
def test_every_benchmark_explains_itself(benchmark, capsys):
    assert main(["bench", "--help"]) == 0
    assert f"  {benchmark} " in capsys.readouterr().out
    assert main(["bench", benchmark, "--help"]) == 0
    assert f"usage: starling bench {benchmark}" in capsys.readouterr().out


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


def test_presets_of_all_algorithms_are_listed(capsys):
    assert main(["presets"]) == 0
    assert {"CartPole-v1", "rainbow"} <= set(capsys.readouterr().out.split())


def test_presets_as_json(capsys):
    assert main(["presets", "--algo", "ppo", "--env", "CartPole-v1", "--json"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["ppo"]["CartPole-v1"]["num_steps"] == 64


def test_table_puts_numbers_to_the_right():
    assert (
        table(["a", "steps"], [["xx", "1,000"], ["y", "20"]]) == "a   steps\nxx  1,000\ny      20"
    )


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


THREADED = """
import sys, threading
import starling.cli
starling.cli._PATIENCE = 0.1
threading.Thread(target=threading.Event().wait, name="a simulator's").start()
sys.exit(starling.cli.main())
"""


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize(("words", "code"), [("--version", 0), ("nothing", 2)])
def test_a_command_ends_although_an_environment_has_left_threads(words, code):
    done = subprocess.run(
        [sys.executable, "-c", THREADED, words],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert done.stdout.startswith("starling 0.") == (code == 0)
    assert done.stderr.endswith("ended, though not a simulator's: end threads in close()\n")


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


TRAIN = ["train", "--env", "CartPole-v1", "--backend", "serial"]
SMALL = ["--num_steps", "16", "--mini_batch_size", "128", "--timesteps", "512"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN, *SMALL, "--log_dir", str(folder), "--quiet"]) == 0
    return folder / "CartPole-v1__ppo__s0"


def test_train_says_what_came_out(tmp_path, capfd):
    settings = ["--seed", "3", "--log-dir", str(tmp_path), "--no-tensorboard", "--json"]
    assert main([*TRAIN, *SMALL, *settings]) == 0
    told = capfd.readouterr()
    result = json.loads(told.out.splitlines()[-1])
    folder = tmp_path / "CartPole-v1__ppo__s3"
    assert result == json.loads((folder / "result.json").read_text())
    assert result["run"] == str(folder)
    assert (result["preset"], result["steps"], result["status"]) == (
        "CartPole-v1",
        512,
        "completed",
    )
    assert "preset CartPole-v1" in told.err
    config = json.loads((folder / "config.json").read_text())
    assert (config["algo"], config["num_steps"], config["lr"]) == ("ppo", 16, 1e-3)
    assert {"starling", "jax", "numpy", "gymnasium"} <= set(config["versions"])
    assert not list(folder.glob("events.out*"))


def test_resume_goes_on_in_the_same_folder(tmp_path, capfd):
    assert main([*TRAIN, *SMALL, "--log_dir", str(tmp_path), "--algo", "a2c", "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")
    (folder,) = tmp_path.iterdir()
    assert main(["train", "--resume", str(folder), "--timesteps", "1024", "--json"]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert (result["steps"], result["algo"], result["run"]) == (1024, "a2c", str(folder))
    assert list(tmp_path.iterdir()) == [folder]
    assert main(["train", "--resume", str(folder), "--distributed"]) == 2
    assert "does not go with a run that was made with algo a2c" in capfd.readouterr().err


def test_evaluate_as_json(run, capfd):
    scores = []
    for _ in range(2):
        assert main(["evaluate", str(run), "--episodes", "3", "--json"]) == 0
        scores.append(json.loads(capfd.readouterr().out.splitlines()[-1]))
    names = ["mean_return", "std_return", "median_return", "mean_length", "episodes"]
    assert list(scores[0]) == names
    assert scores[0]["episodes"] == 3
    assert scores[0] == scores[1]


def test_plot_writes_where_it_is_told(run, tmp_path, capfd):
    figure = tmp_path / "curve.png"
    assert main(["plot", str(run), "--save_fig", str(figure), "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1]) == {"figure": str(figure)}
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_play_writes_a_video(run, tmp_path, capfd, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    video = tmp_path / "cartpole.mp4"
    assert main(["play", str(run), "--video", str(video), "--json"]) == 0
    played = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert played["video"] == str(video)
    assert len(played["returns"]) == 1
    assert b"ftyp" in video.read_bytes()[:16]


def test_play_of_what_cannot_be_rendered(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    code = (
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "from gymnasium.wrappers import TimeLimit\n"
        "def make():\n"
        "    return TimeLimit(CartPoleEnv(), 50)\n"
    )
    (tmp_path / "unseen_env.py").write_text(code, encoding="utf-8")
    train = ["train", "--env", "unseen_env:make", "--backend", "serial", "--num_envs", "2"]
    settings = ["--num_steps", "16", "--mini_batch_size", "32", "--timesteps", "32"]
    assert main([*train, *settings, "--run_name", "r", "--quiet"]) == 0
    capfd.readouterr()
    assert main(["play", "logs/r", "--video", "a.gif"]) == 2
    assert capfd.readouterr().err == (
        "starling: error: unseen_env:make cannot be rendered: it takes no argument 'render_mode'\n"
    )


def test_too_many_environments_leave_no_run(tmp_path, capfd):
    settings = ["--num_envs", "100000000000", "--timesteps", "1" + "0" * 15]
    assert main([*TRAIN, *settings, "--log_dir", str(tmp_path / "logs")]) == 2
    assert "MB are available: lower num_envs" in capfd.readouterr().err
    assert not (tmp_path / "logs").exists()


def test_play_in_a_window(run, capfd, monkeypatch):
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert main(["play", str(run), "--episodes", "2", "--stochastic"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 2


def test_bench_env_of_one_backend(capfd):
    bench = ["bench", "env", "--env", "CartPole-v1", "--num_envs", "2", "--seconds", "0.05"]
    assert main([*bench, "--backend", "serial", "--json"]) == 0
    measured = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert measured["backend"] == "serial"
    assert measured["steps_per_second"] > 0


@pytest.mark.timeout(120)
def test_bench_env_compares_all_backends(capfd):
    bench = ["bench", "env", "--env", "CartPole-v1", "--num_envs", "4", "--seconds", "0.05"]
    assert main([*bench, "--num_workers", "2", "--json"]) == 0
    measured = json.loads(capfd.readouterr().out.splitlines()[-1])
    rates = {rate["backend"]: rate["steps_per_second"] for rate in measured["backends"]}
    assert set(rates) >= {"serial", "thread", "process"}
    assert measured["steps_per_second"] == max(rates.values()) == rates[measured["backend"]]


def test_bench_train_leaves_nothing_behind(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bench = ["bench", "train", "--env", "CartPole-v1", "--backend", "serial", "--iterations", "2"]
    assert main([*bench, "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["steps_per_second"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.timeout(120)
def test_backends_are_tried_out(capfd):
    assert main(["backends", "--json"]) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    for backend in ("serial", "thread", "process"):
        assert told[backend]["works"], told[backend]["problem"]


@pytest.mark.timeout(60)
@pytest.mark.usefixtures("no_leaks")
def test_a_signal_stops_a_run_without_traceback(tmp_path):
    command = [*TRAIN, "--timesteps", "100_000_000", "--log_dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "starling", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert "preset CartPole-v1" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert process.returncode == 143
    assert "Traceback" not in err
    assert "stopped" in out
    (folder,) = tmp_path.iterdir()
    assert json.loads((folder / "result.json").read_text())["status"] == "stopped"
