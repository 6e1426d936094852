"""The documentation is true: what it shows is run, what it links to is there."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from leaks import children

import starling
from starling import cli
from starling.config import ALGORITHMS, PPOConfig
from starling.options import OTHER_NAMES, options
from starling.training.ray_cluster import Cluster
from starling.training.training_agent import TrainingAgent

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERYTHING = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What makes a command short, appended: the last one wins.
SHORT = {
    "evaluate": ["--episodes", "2"],
    "tune": ["--trials", "2", "--timesteps", "1024", "--num_steps", "64", "--epochs", "1"],
    "play": ["--episodes", "1"],
    "bench env": ["--seconds", "0.02"],
    "bench train": ["--iterations", "2"],
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(code: str) -> list[list[str]]:
    return [shlex.split(line, comments=True) for line in code.splitlines() if line.strip()]


@pytest.fixture
def short_training(monkeypatch):
    """Lets training end after one rollout more than there is, whoever starts it."""
    import starling.cli.train as command

    resolve, resume, train = command.resolve, command.resume, TrainingAgent.train

    def short_resolve(algo: str, given: Any) -> Any:
        config, preset = resolve(algo, given)
        interval = min(1, config.eval_interval)
        changes: dict[str, Any] = {"timesteps": config.batch_size, "eval_interval": interval}
        changes["eval_episodes"] = 1
        if hasattr(config, "learning_starts"):
            changes["learning_starts"] = config.batch_size
        return dataclasses.replace(config, **changes), preset

    def short_resume(config: Any, given: Any) -> Any:
        resume(config, given)
        return dataclasses.replace(config, timesteps=config.timesteps + config.batch_size)

    def short_train(
        self: TrainingAgent, total_timesteps: int | None = None, **settings: Any
    ) -> Any:
        if settings.get("callbacks"):  # they may stop it themselves
            return train(self, total_timesteps, **settings)
        assert total_timesteps is None or total_timesteps >= self.config.batch_size
        done = -(-self.step // self.config.batch_size) * self.config.batch_size
        if hasattr(self.config, "learning_starts"):
            starts: dict[str, Any] = {"learning_starts": self.config.batch_size}
            self.config = dataclasses.replace(self.config, **starts)
        return train(self, done + self.config.batch_size, **settings)

    def short_evaluate(
        self: TrainingAgent, episodes: int = 100, *rest: Any, **settings: Any
    ) -> Any:
        return evaluate(self, min(episodes, 2), *rest, **settings)

    evaluate = TrainingAgent.evaluate
    monkeypatch.setattr(command, "resolve", short_resolve)
    monkeypatch.setattr(command, "resume", short_resume)
    monkeypatch.setattr(TrainingAgent, "train", short_train)
    monkeypatch.setattr(TrainingAgent, "evaluate", short_evaluate)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) == str(tmp_path / f"{name}.py"):
            del sys.modules[name]


# Of the files whose tests the table of faults names: what they try has no processes or threads.
STARTING_NOTHING = {
    f"tests/unit/test_{name}.py"
    for name in (
        *("agent", "checkpoint", "cluster_warnings", "config", "rollout"),
        *("sharded_replay", "spaces"),
    )
}

SHOWING = [
    page for page in PAGES if any(language in ("bash", "python") for language, _ in blocks(page))
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", SHOWING, ids=name_of)
@pytest.mark.usefixtures("short_training")
def test_what_a_page_shows_runs_from_top_to_bottom(page, folder):
    names: dict[str, Any] = {"__name__": "__docs__"}
    processes = children()
    with contextlib.ExitStack() as stack:
        if page.name == "distributed.md":  # all that it shows joins one Ray: to start it takes 8 s
            stack.enter_context(contextlib.closing(Cluster(None)))
        for language, code in blocks(page):
            if language == "python":
                run_python(code, names, folder)
            elif language == "bash":
                for command in commands(code):
                    run_command(command)
        for value in names.values():
            if isinstance(value, TrainingAgent):
                value.close()
    assert children() <= processes, "a process was left behind"


def run_python(code: str, names: dict[str, Any], folder: Path) -> None:
    """Executes a block; one that begins with a file's name is a module of that name."""
    file = re.match(r"# (\w+)\.py\n", code)
    if file:
        (folder / f"{file[1]}.py").write_text(code, encoding="utf-8")
        importlib.import_module(file[1])
    else:
        exec(compile(code, "<documentation>", "exec"), names)


def run_command(command: list[str]) -> None:
    match command:
        case ["starling", *arguments]:
            name = " ".join(arguments[: 2 if arguments[0] == "bench" else 1])
            code = cli.main([*arguments, *SHORT.get(name, [])])
            assert code == 0, command
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case ["pip", "install", requirement]:
            assert requirement.partition("[")[0] == "."
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = re.findall(r"[\w-]+", requirement)
            assert set(extras) <= set(known["optional-dependencies"])
        case _:
            pytest.fail(
                f"nobody knows how to try out {command}: use ```text for what is no command"
            )


@pytest.mark.parametrize("page", EVERYTHING, ids=name_of)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"\W+", "-", heading.lower()) for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_that_pages_name_exist(page):
    configs = [algorithm.config for algorithm in ALGORITHMS.values()]
    known = {name for config in configs for name in options(config)}
    known |= {"help", "json", "algo", "resume", "quiet", "version", "num_seeds"}
    known |= {
        "episodes",
        "distributed",
        "trials",
        "scheduler",
        "space",
        "name",
        "address",
        "cpus_per_trial",
        "gpus_per_trial",
        "checkpoint",
        "grace_seconds",
        "video",
        "save_fig",
        "seconds",
        "steps",
        "only",
        "seeds",
        "repeats",
        "x",
    }
    known |= {f"no_{name}" for name in known}
    text = page.read_text(encoding="utf-8")
    ours = re.sub(r"^.*\bray (start|get-auth-token) .*$", "", text, flags=re.MULTILINE)
    written = re.findall(r"(?<![\w-])--(\w[\w-]*)", ours)
    named = {option.replace("-", "_") for option in written} - {"kl_coef"}
    if page.name == "coming_from.md":
        named -= set(OTHER_NAMES)
    assert named <= known


def test_files_that_pages_name_exist():
    for page in EVERYTHING:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:benchmarks|examples|tests|src|docs)/[\w/.]+)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_tests_that_the_table_of_faults_names_exist():
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", text)
    assert len(named) > 60
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all("::" in row or row.startswith(("| case |", "| --- |")) for row in rows)
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_tests_that_the_table_of_faults_names_look_for_what_is_left():
    text = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    for file in sorted(set(re.findall(r"`(tests/[\w/.]+)::", text))):
        if file.startswith("tests/distributed/") or file in STARTING_NOTHING:
            continue
        code = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        marks = [ast.unparse(node) for node in code.body if isinstance(node, ast.Assign)]
        if any(mark.startswith("pytestmark = ") and "no_leaks" in mark for mark in marks):
            continue
        tests = {node.name: node for node in code.body if isinstance(node, ast.FunctionDef)}
        for name in re.findall(rf"`{file}::(\w+)`", text):
            test = tests[name]
            asked = [ast.unparse(part) for part in (test.args, *test.decorator_list)]
            assert any("no_leaks" in part for part in asked), f"{file}::{name}"


def test_the_table_of_names_agrees_with_what_the_command_line_answers():
    text = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    rows = [[cell.strip().strip("`") for cell in row] for row in rows if len(row) == 6]
    assert len(rows) >= 20
    for ours, *others in rows:
        assert ours in options(PPOConfig)
        for other in filter(None, others):
            assert other == ours or OTHER_NAMES[other] == ours


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES if page.parent.name == "docs")


def test_the_table_of_benchmarks_is_that_of_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    run = importlib.import_module("run")
    rows = run.load(ROOT / "docs" / "benchmarks.json")
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == run.page(rows)


def test_scaling_on_paper_is_that_of_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    stored = json.loads((ROOT / "docs" / "scaling.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert page == importlib.import_module("scaling_page").page(stored)


def test_the_cluster_that_is_described_is_one_that_ray_takes():
    ray = importlib.util.find_spec("ray")
    if ray is None or ray.origin is None:
        pytest.skip("Ray is not installed")
    import jsonschema
    import yaml

    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    page = ROOT / "docs" / "distributed.md"
    (text,) = [code for language, code in blocks(page) if language == "yaml"]
    cluster = yaml.safe_load(text)
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError, match="'commands' was unexpected"):
        jsonschema.validate({**cluster, "commands": []}, schema)


def test_the_citation_names_this_version():
    for file in ("CITATION.cff", "README.md"):
        assert starling.__version__ in (ROOT / file).read_text(encoding="utf-8")
