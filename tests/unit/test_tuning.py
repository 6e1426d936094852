"""Searches for settings: what is searched, what is refused, and whole searches on Ray Tune."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import threading
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commands import done, starling, wait_until_gone
from leaks import PATIENCE, children, ends_within

from starling import ParallelPPO, cli
from starling.config import ALGORITHMS, PPOConfig, resolve
from starling.errors import MissingExtraError, StarlingError, UserError
from starling.options import convert, options
from starling.ranges import Choice, Range, declared_space
from starling.run_parameters import check_limit
from starling.storage.checkpoint import load_checkpoint
from starling.training import search_plan, search_watch, tuning
from starling.training.schedulers import explore
from starling.training.search_plan import learning_options, read_plan
from starling.training.trials import RETURN, SETTINGS_FILE, STEP, reports, take_over
from starling.training.tuning import tune

# Trainings of a second, all of one compiled program but for what is searched.
TINY = {
    "preset": "none",
    "num_envs": 4,
    "num_steps": 16,
    "mini_batch_size": 64,
    "epochs": 1,
    "hidden_sizes": (8,),
    "backend": "serial",
    "tensorboard": False,
}
NEW = {"env": "CartPole-v1", "trials": 2, "algo": "ppo", "scheduler": "asha", "space": None}


@pytest.fixture(scope="module")
def two_cores():
    """Ray on this machine, with two cores as it counts them."""
    import ray

    before = children()
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    with tuning._ray_tune():
        ray.init("local", num_cpus=2, _node_ip_address="127.0.0.1", **quiet)
    yield
    ray.shutdown()
    assert all(ends_within(pid, PATIENCE) for pid in children() - before)


def plan(**changes):
    given = {**NEW, **changes}
    fixed = {name: given.pop(name) for name in list(given) if name not in NEW}
    return search_plan.make_plan(*given.values(), fixed)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_declared_ranges_hold_values_that_the_algorithm_takes(algo):
    config_class, source = ALGORITHMS[algo].config, random.Random(0)
    space = declared_space(config_class)
    assert {"lr", "gamma", "hidden_sizes", "mini_batch_size"} - set(space) <= {"mini_batch_size"}
    assert any(domain.in_run for domain in space.values())
    assert set(space) <= set(learning_options(config_class))
    for name, domain in space.items():
        option = options(config_class)[name]
        value = domain.draw(source)
        for _ in range(50):
            assert convert(option, value) == value
            if not isinstance(value, tuple):
                check_limit(name, value)
            value = domain.move(value, source)


@pytest.mark.parametrize(
    ("domain", "middle"),
    [
        (Range(0.0, 1.0), 0.5),
        (Range(1e-4, 1e-2, "log"), 1e-3),
        (Range(0.9, 0.999, "near_1"), 0.99),
        (Range(10, 1000, "log"), 100),
    ],
    ids=str,
)
def test_draws_are_even_in_the_scale_of_a_range(domain, middle):
    source = random.Random(0)
    drawn = [domain.draw(source) for _ in range(1000)]
    assert all(domain.low <= value <= domain.high for value in drawn)
    assert 450 < sum(value < middle for value in drawn) < 550
    assert all(type(value) is type(domain.low) for value in drawn)


def test_a_move_is_short_or_a_new_draw():
    source, domain = random.Random(0), Range(1e-4, 1e-2, "log")
    moved = [domain.move(1e-3, source) for _ in range(1000)]
    near = [value for value in moved if 0.7e-3 < value < 1.4e-3 and value != 1e-3]
    assert {0.000794, 0.00126} <= set(near)
    assert 650 < len(near) < 900
    assert domain.move(1.0, source) <= 1e-2  # a preset's value may lie beyond
    assert 1e-4 <= domain.move(0.0, source) <= 1e-2
    assert Choice((1, 2, 3)).move(9, source) in (1, 2, 3)


def test_a2c_searches_nothing_that_it_has_no_use_for():
    assert not {"epochs", "clip_param", "mini_batch_size"} & set(
        declared_space(ALGORITHMS["a2c"].config)
    )


def test_a_space_takes_the_place_of_declared_ranges(tmp_path):
    file = tmp_path / "space.toml"
    file.write_text(
        'lr = {low = 1e-4, high = 1e-3, scale = "log"}\nepochs = [4, 8]\ngamma = false\n'
        "hidden_sizes = [[32], [64, 64]]\nvalue_coef = {low = 0.1, high = 1.0}\n"
    )
    space = search_plan.find_space(PPOConfig, file, {"clip_param": 0.2})
    assert space["lr"] == Range(1e-4, 1e-3, "log", in_run=True)
    assert space["epochs"] == Choice((4, 8))
    assert space["hidden_sizes"] == Choice(((32,), (64, 64)))
    assert space["value_coef"] == Range(0.1, 1.0)
    assert not {"gamma", "clip_param"} & set(space)
    assert space["gae_lambda"] == declared_space(PPOConfig)["gae_lambda"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate = [1, 2]", "Starling calls it lr"),
        ("env = ['a', 'b']", "env cannot be searched"),
        ("seed = [1, 2]", "seed cannot be searched"),
        ("lr = [1e-3]", "lr has 1 values"),
        ("lr = 1e-3", "the range of lr must be a list of values"),
        ("lr = {low = 1e-3}", "the range of lr must be"),
        ("lr = {low = 1e-3, high = 1e-4}", "low must be below high"),
        ("lr = {low = 0.0, high = 1e-4, scale = 'log'}", "scale log needs one above 0"),
        ("gamma = {low = 0.9, high = 1.0, scale = 'near_1'}", "scale near_1 needs one below 1"),
        ("lr = {low = 1e-4, high = 1e-3, scale = 'exp'}", "unknown scale 'exp' of lr"),
        ("gamma = {low = 0.9, high = 1.2}", r"gamma must be in \[0, 1\], not 1.2"),
        ("epochs = [0, 4]", "epochs must be at least 1, not 0"),
        ("epochs = ['few', 4]", "epochs must be a whole number, not few"),
        ("hidden_sizes = {low = 1, high = 4}", "hidden_sizes is no number"),
        ("lr = ", "cannot be read"),
    ],
)
def test_wrong_spaces_are_told_in_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "space.toml"
    file.write_text(content)
    command = ["tune", "--env", "CartPole-v1", "--trials", "2", "--space", str(file)]
    with pytest.raises(UserError, match=message):
        search_plan.find_space(PPOConfig, file, {})
    assert cli.main([*command, "--log_dir", str(tmp_path / "logs")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "env is missing: give a Gymnasium id"),
        (["--trials", "2"], "env is missing: give a Gymnasium id"),
        (["--env", "CartPole-v1"], "trials is missing: say how many settings to try, such as 16"),
        (["--env", "CartPole-v1", "--trials", "0"], "trials must be at least 1"),
        (["--env", "CartPole-v1", "--trials", "1", "--scheduler", "pbt"], "at least 2 with pbt"),
        (["--env", "CartPole-v1", "--trials", "2", "--scheduler", "psha"], "did you mean asha"),
        (["--env", "CartPole-v1", "--trials", "2", "--lr", "-1"], "lr must be above 0"),
        (["--algo", "distributed_ppo"], "workers of its own: use ppo"),
        (["--algo", "distributed_dqn"], "tune does not go with distributed_dqn, which has workers"),
        (["--env", "CartPole-v1", "--trials", "2", "--distributed"], "distributed_ppo"),
        (["--env", "CartPol-v1", "--trials", "2"], "CartPol-v1"),
        (["--env", "CartPole-v1", "--trials", "2", "--run_name", "a"], "run_name does not go"),
        (["--env", "CartPole-v1", "--trials", "2", "--log_interval", "1"], "log_interval does not"),
        (["--env", "CartPole-v1", "--trials", "2", "--space", "no.toml"], "no.toml cannot be read"),
        (["--env", "CartPole-v1", "--trials", "2", "--trails", "3"], "did you mean --trials"),
        (["--resume", "nowhere"], "nowhere is no search to go on with"),
        (["--resume", "nowhere", "--lr", "1e-3"], "lr does not go with resume"),
        (["--resume", "nowhere", "--trials", "3"], "trials does not go with resume"),
        (["--resume", "nowhere", "--algo", "dqn"], "algo does not go with resume"),
    ],
)
def test_wrong_options_are_told_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_no_node_has_room_for_is_refused():
    """Ray would wait for one, however many cores or devices the nodes have together."""
    there = {"CPU": [4.0, 2.0], "GPU": [0.0, 2.0]}
    cluster = SimpleNamespace(on_nodes=there.__getitem__)

    def check(new: bool, cpus: int, gpus: float) -> None:
        given = {"cpus_per_trial": cpus, "gpus_per_trial": gpus}
        tuning._check_resources(cluster, given, new)  # type: ignore[arg-type]

    check(True, 4, 1)
    for new, cpus, gpus, message in [
        (True, 5, 0, "cpus_per_trial .* at most 4, not 5"),
        (True, 1, 3, "gpus_per_trial .* at most 2, not 3"),
        (True, 1, 1.5, "gpus_per_trial .* share of one, not 1.5"),
        (False, 5, 0, r"the search has cpus_per_trial 5, .* more than 4: go on with it on a mach"),
    ]:
        with pytest.raises(UserError, match=message):
            check(new, cpus, gpus)


def test_what_is_fixed_is_not_searched():
    assert "lr" not in plan(lr=1e-3)["space"]
    with pytest.raises(UserError, match="lr is given, and to be searched as well"):
        plan(lr=1e-3, space={"lr": [1e-3, 1e-4]})
    with pytest.raises(UserError, match="all settings are fixed"):
        plan(**{name: getattr(resolve("ppo", {"env": "CartPole-v1"})[0], name)
                for name in declared_space(PPOConfig)})  # fmt: skip
    in_run = [name for name, domain in declared_space(PPOConfig).items() if domain.in_run]
    with pytest.raises(UserError, match="pbt changes settings in mid-run: search one of"):
        plan(scheduler="pbt", space=dict.fromkeys(in_run, False))


@pytest.mark.parametrize("algo", ["ppo", "a2c", "dqn"])
def test_drawn_settings_go_together_and_the_preset_comes_first(algo):
    # 6 environments: most sizes of minibatches divide few of the rollouts
    made = plan(algo=algo, trials=20, num_envs=6, timesteps=5000)
    assert made == plan(algo=algo, trials=20, num_envs=6, timesteps=5000)
    assert (
        made["trials"] != plan(algo=algo, trials=20, num_envs=6, timesteps=5000, seed=1)["trials"]
    )
    configs = [resolve(algo, {**made["given"], **sample})[0] for sample in made["trials"]]
    assert len({config.lr for config in configs}) == 20
    preset = resolve(algo, made["given"])[0]
    assert configs[0] == preset


def test_settings_that_never_go_together_end_the_search():
    with pytest.raises(UserError, match="does not divide"):
        plan(num_envs=1, space={"mini_batch_size": [7, 11]}, trials=3, preset="none")


def test_the_preset_file_says_what_differs_from_the_defaults():
    made = plan(value_clip=0.3, seed=4, target_kl=None, normalize_rewards=True)
    settings = {**made["trials"][0], "lr": 0.002, "hidden_sizes": [32]}
    best = tuning.Trial("trial_1", "runs/trial_1", "completed", 9, 1.0, settings, None)
    text = tuning._preset(made, best)
    read = tomllib.loads(text)
    assert read["lr"] == 0.002
    assert read["hidden_sizes"] == [32]
    assert read["normalize_rewards"] is True
    assert "seed" not in read
    assert read["timesteps"] == resolve("ppo", made["given"])[0].timesteps
    before = resolve("ppo", {**made["given"], **settings})[0]
    after = resolve("ppo", {"env": "CartPole-v1", "preset": "none", **read})[0]
    assert {n: getattr(after, n) for n in learning_options(PPOConfig)} == {
        n: getattr(before, n) for n in learning_options(PPOConfig)
    }
    assert "trial_1" in text.splitlines()[0]


class AsksForRay:
    """Notes the environment's variables where Ray is imported, which reads some only then."""

    def find_spec(self, name: str, *rest: Any) -> None:
        if name == "ray":
            self.variables = dict(os.environ)
            raise ModuleNotFoundError


def test_ray_is_imported_without_what_it_does_at_a_signal(monkeypatch):
    """It would end a search that a SIGTERM asks to save, or write over what is said of it."""
    asks = AsksForRay()
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "meta_path", [asks])
    for name in ("ray", "ray.tune"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with (
        pytest.raises(MissingExtraError, match=r"tune needs Ray Tune, .*pip install"),
        tuning._ray_tune(),
    ):
        pass
    assert asks.variables["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] == "1"


def test_a_search_whose_cluster_is_lost_says_how_to_go_on(tmp_path, caplog):
    """Before Ray ends the process, whatever it is at."""
    with search_watch.Watch(tmp_path, 2, lambda: False, lambda: True, quiet=True) as watch:
        watch._thread.join(10.0)
        assert not watch._thread.is_alive()
    (told,) = caplog.messages
    assert told.startswith("the Ray cluster does not answer any more")
    assert f"starling tune --resume {tmp_path}, with the --address of another" in told
    assert not watch.stopped


def result_of(number: int, score: float, **reported: Any) -> Any:
    """What Ray Tune tells of a trial."""
    metrics = {STEP: 9, RETURN: score, **reported}
    return SimpleNamespace(metrics=metrics, path=f"ray/trial_{number}", error=None)


def test_of_trials_that_are_alike_the_first_is_best(tmp_path):
    """However Ray Tune lists them: once a search was gone on with, in another order."""
    made, done = plan(trials=4), {"status": "completed"}
    scores = {3: 500.0, 1: 500.0, 0: 500.0}
    grid = [result_of(n, score, **done) for n, score in scores.items()] + [result_of(2, 501.0)]
    result = tuning._conclude(tmp_path, made, grid, stopped=False)
    names = [trial.name for trial in result.trials]
    assert names == ["trial_0", "trial_1", "trial_3", "trial_2"], "the last was stopped early"
    assert result.best == result.trials[0]


def test_a_preset_of_trials_without_an_episode_says_so(tmp_path):
    grid = [result_of(0, math.nan, status="completed")]
    result = tuning._conclude(tmp_path, plan(trials=1), grid, stopped=False)
    assert "no episode of its training has ended" in Path(str(result.preset)).read_text()


def test_a_cluster_that_does_not_reach_the_search_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    unmade = result_of(0, math.nan)
    unmade.error = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: ImplicitFunc\nThe "
        "actor is dead because all references to the actor were removed including lineage ref "
        "count. The actor never ran - it was cancelled before it started running."
    )
    with pytest.raises(StarlingError, match=r"RAY_AUTH_MODE has to be the same here, .* is token"):
        tuning._conclude(tmp_path, plan(trials=1), [unmade], stopped=False)


@pytest.mark.parametrize("given", [{"trials": 3}, {"env_name": "CartPole-v1"}, {"gamma": 0.9}])
def test_what_a_search_has_already_is_not_given_again(tmp_path, given):
    (name,) = given
    with pytest.raises(UserError, match=f"{name} does not go with resume"):
        tune(resume=tmp_path, **given)


def test_a_search_without_what_ray_tune_kept_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is no search to go on with: .*tuner\.pkl"):
        tuning._tuner(tmp_path, {**plan(), "cpus_per_trial": 1, "gpus_per_trial": 0.0}, new=False)


def test_what_a_trial_takes_over_is_the_other_ones_policy(tmp_path):
    made = {}
    for seed in (0, 1):
        with ParallelPPO("CartPole-v1", seed=seed, log_dir=str(tmp_path), run_name=f"trial_{seed}",
                         **TINY) as agent:  # fmt: skip
            agent.train(64 * (2 + seed), save_interval=1, quiet=True)
            made[seed] = agent.config
    good, bad = tmp_path / "trial_0", tmp_path / "trial_1"
    source = load_checkpoint(good)
    settings = explore(
        {"lr": Range(1e-4, 1e-3, in_run=True), "epochs": Range(1, 9)},
        random.Random(0),
        {"settings": {"lr": 5e-4, "epochs": 1}},
    )["settings"]
    assert settings["lr"] != 5e-4
    assert settings["epochs"] == 1
    take_over(bad, source.path, settings)

    config, _ = resolve("ppo", {**TINY, "env": "CartPole-v1", **settings, "seed": 1})
    with ParallelPPO(config=config, resume=bad) as agent:
        assert (agent.step, agent.iteration) == (128, 2)
        for name, array in agent.arrays()["parameters"].items():
            np.testing.assert_array_equal(array, source.arrays["parameters"][name])
        agent.train(192, quiet=True)
    noted = json.loads((bad / SETTINGS_FILE).read_text())
    assert noted == {"step": 128, "from": "trial_0", **settings}
    assert json.loads((bad / "config.json").read_text())["lr"] == settings["lr"]
    assert [step for step, _ in reports(bad / "metrics.jsonl")] == sorted(
        {step for step, _ in reports(bad / "metrics.jsonl")}
    )


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("two_cores")
def test_a_search_that_was_stopped_goes_on_to_a_preset(tmp_path, capsys):
    space = tmp_path / "space.toml"
    # the last of which is nothing for a CartPole
    only = [f"{name} = false" for name in declared_space(PPOConfig) if name not in TINY]
    space.write_text("\n".join([*only, 'network = ["mlp", "nature_cnn"]']))
    fixed = {**TINY, "lr": 0.002, "timesteps": 64 * 54, "log_dir": str(tmp_path), "seed": 4}
    first = tmp_path / "search" / "trial_0"

    def begun():
        return any(first.glob("checkpoints/step_*"))

    variables = dict(os.environ)
    stopped = tune(
        "CartPole-v1", trials=3, space=space, name="search", stop=begun, quiet=True, **fixed
    )
    assert dict(os.environ) == variables
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert stopped.status == "stopped"
    assert stopped.preset is None
    assert not (tmp_path / "search" / "best.toml").exists()
    before = reports(first / "metrics.jsonl")
    assert before

    assert cli.main(["tune", "--resume", stopped.folder, "--json"]) == 0
    output, told = capsys.readouterr()
    what = "CartPole-v1: 3 trials of ppo with asha, over network, in " + stopped.folder
    assert told.splitlines()[0] == what
    result = json.loads(output.splitlines()[-1])
    assert result == json.loads(Path(stopped.folder, "result.json").read_text())
    assert result["status"] == "completed"
    assert {trial["name"] for trial in result["trials"]} == {"trial_0", "trial_1", "trial_2"}
    assert "trial_0" in output
    statuses = {trial["settings"]["network"]: trial["status"] for trial in result["trials"]}
    assert statuses.pop("nature_cnn") == "failed"
    assert set(statuses.values()) <= {"completed", "stopped early"}
    *trained, failed = result["trials"]
    assert "nature_cnn" in failed["error"]
    assert result["best"] == trained[0]
    assert trained[0]["status"] == "completed"
    for trial in trained:
        made = reports(Path(trial["run"], "metrics.jsonl"))
        assert made[-1][0] >= trial["steps"]
        assert len({step for step, _ in made}) == len(made)
        assert load_checkpoint(trial["run"]).step >= trial["steps"]
    # it went on, rather than begun anew
    assert reports(first / "metrics.jsonl")[: len(before)] == before
    assert not (tmp_path / "search" / "trial_0__2").exists()

    command = ["train", "--env", "CartPole-v1", "--preset", result["preset"], "--quiet"]
    command += ["--timesteps", "64", "--log_dir", str(tmp_path), "--run_name", "again", "--json"]
    assert cli.main([*command, "--backend", "serial"]) == 0
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["lr"] == 0.002
    assert config["network"] == result["best"]["settings"]["network"]
    assert config["num_steps"] == TINY["num_steps"]


@pytest.mark.timeout(120)
@pytest.mark.usefixtures("two_cores")
def test_a_search_that_is_stopped_while_ray_starts_begins_no_trial(tmp_path):
    settings = {**TINY, "timesteps": 64, "log_dir": str(tmp_path)}
    stopped = tune("CartPole-v1", trials=1, stop=lambda: True, quiet=True, **settings)
    assert (stopped.status, stopped.trials, stopped.best) == ("stopped", [], None)
    assert not list(Path(stopped.folder).glob("trial_*"))
    assert read_plan(Path(stopped.folder))[1]["trials"], "as of a search killed at this point"


class Killed(BaseException):
    """What comes after is done by nobody."""


def killed(tuner: Any) -> None:
    raise Killed


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("two_cores")
def test_settings_of_dqn_are_searched(tmp_path, capsys, recwarn, monkeypatch):
    """Also where the search was killed before Ray Tune had made a trial."""
    space = tmp_path / "space.toml"
    others = [name for name in declared_space(ALGORITHMS["dqn"].config) if name != "lr"]
    space.write_text("\n".join(f"{name} = false" for name in others))
    words = ["--algo", "dqn", "--env", "CartPole-v1", "--preset", "none", "--backend", "serial"]
    words += ["--hidden_sizes", "8", "--mini_batch_size", "16", "--learning_starts", "64"]
    words += ["--log_dir", str(tmp_path), "--timesteps", "512", "--no_tensorboard", "--quiet"]
    search = ["--trials", "2", "--space", str(space), "--name", "search"]
    with monkeypatch.context() as patch:
        patch.setattr("ray.tune.Tuner.fit", killed)
        with pytest.raises(Killed):
            cli.main(["tune", *words, *search])
    assert not list(tmp_path.glob("search/trial_*"))
    assert cli.main(["tune", "--resume", str(tmp_path / "search"), "--quiet", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["status"] == "completed"
    assert len({trial["settings"]["lr"] for trial in result["trials"]}) == 2
    assert not [str(told.message) for told in recwarn if "NaN" in str(told.message)]
    for trial in result["trials"]:
        assert trial["status"] in ("completed", "stopped early")
        assert json.loads(Path(trial["run"], "config.json").read_text())["algo"] == "dqn"
        assert load_checkpoint(trial["run"]).arrays["training"]["updates"] > 0
    assert cli.main(["train", *words, "--preset", result["preset"], "--run_name", "again"]) == 0
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["lr"] == result["best"]["settings"]["lr"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("two_cores")
def test_bad_trials_go_on_from_copies_of_good_ones(tmp_path):
    fixed = {**TINY, "timesteps": 64 * 200, "log_dir": str(tmp_path)}
    space = dict.fromkeys(declared_space(PPOConfig), False)
    space["lr"] = {"low": 1e-7, "high": 1e-2, "scale": "log"}
    result = tune("CartPole-v1", trials=4, scheduler="pbt", space=space, quiet=True, **fixed)
    assert [trial.status for trial in result.trials] == ["completed"] * 4
    copied = []
    for trial in result.trials:
        file = Path(trial.run, SETTINGS_FILE)
        noted = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        copied += [line["from"] for line in noted]
        assert trial.name not in copied[-len(noted) :]
        if noted:
            assert noted[-1]["lr"] == trial.settings["lr"]
            assert json.loads(Path(trial.run, "config.json").read_text())["lr"] == noted[-1]["lr"]
        steps = [step for step, _ in reports(Path(trial.run, "metrics.jsonl"))]
        assert steps == sorted(set(steps))
        assert steps[-1] == load_checkpoint(trial.run).step == 64 * 200
    assert copied
    assert (
        tomllib.loads(Path(str(result.preset)).read_text())["lr"] == result.trials[0].settings["lr"]
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("two_cores")
def test_ctrl_c_in_python_saves_a_search(tmp_path):
    def interrupt():
        while not any(tmp_path.glob("search/trial_*/checkpoints/step_*")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    fixed = {**TINY, "timesteps": 64 * 270, "log_dir": str(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        tune("CartPole-v1", trials=2, name="search", quiet=True, **fixed)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    result = json.loads((tmp_path / "search" / "result.json").read_text())
    assert result["status"] == "stopped"
    assert not result["preset"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_search_survives_signals(tmp_path, signum):
    words = ["--env", "CartPole-v1", "--trials", "3", "--name", "search", "--quiet", "--json"]
    for name, value in {**TINY, "timesteps": 64 * 270}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    folder = tmp_path / "logs" / "search"
    with starling("tune", *words, folder=tmp_path) as process:
        while not any(folder.glob("trial_*/checkpoints/step_*")):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(signum)
        _, errors = process.communicate()
        assert process.returncode == (-9 if signum == signal.SIGKILL else 128 + signum), errors
        assert "received at time" not in errors, "Ray's own handler of signals"
        wait_until_gone(process)
    before = {run: reports(run / "metrics.jsonl") for run in folder.glob("trial_*")}
    assert any(before.values())

    done("tune", "--resume", str(folder), folder=tmp_path)
    result = json.loads((folder / "result.json").read_text())
    assert {trial["status"] for trial in result["trials"]} <= {"completed", "stopped early"}
    assert len(result["trials"]) == 3
    for run, rows in before.items():
        saved = [row for row in rows if row[0] <= 64 * 10 * (len(rows) - 1)]
        assert reports(run / "metrics.jsonl")[: len(saved)] == saved
