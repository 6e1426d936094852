"""Whether what a run wrote counts every step, iteration and episode once."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from starling.storage.checkpoint import load_checkpoint
from starling.training.run_folder import read_run


def check_counters(folder: Path) -> dict[str, Any]:
    """Fails if a counter of a run goes back, leaves something out, or counts something twice.

    For runs that are over, however often they were stopped, killed and resumed, of environments
    whose every row is experience.

    Returns:
        The run's result.
    """
    run = read_run(folder)
    result = json.loads(run.result.read_text())
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    check_iterations(run.config, lines, result["steps"])
    check_evaluations(run.config, lines)
    check_episodes(run.config, run.path / "episodes.csv", result)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.step == checkpoint.counters["step"] == result["steps"]
    assert checkpoint.counters["iteration"] * rows_of(run.config) == result["steps"]
    assert checkpoint.counters["episodes"] == result["episodes"]
    return result


def rows_of(config: dict[str, Any]) -> int:
    """Steps of an iteration."""
    rows = config["num_envs"] * config["num_steps"]
    if config["algo"] == "distributed_ppo":
        return rows * config["num_workers"]
    return rows // config["num_actors"] if config["algo"] == "async_dqn" else rows


def check_iterations(config: dict[str, Any], lines: list[dict[str, Any]], steps: int) -> None:
    """Every iteration that was to be reported is, once and in order; so is the last one."""
    told = [line for line in lines if "time/iterations" in line]
    iterations = [line["time/iterations"] for line in told]
    assert iterations == sorted(set(iterations))
    assert [line["time/total_timesteps"] for line in told] == [
        iteration * rows_of(config) for iteration in iterations
    ]
    interval, last = config["log_interval"], steps // rows_of(config)
    assert set(range(interval, last + 1, interval)) <= set(iterations)
    assert iterations[-1] == last


def check_evaluations(config: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Evaluations come in order, at the iterations that were asked for, none of them twice."""
    steps = [line["time/total_timesteps"] for line in lines if "eval/mean_reward" in line]
    assert steps == sorted(set(steps))
    apart = config["eval_interval"] * rows_of(config)
    assert not steps or all(step % apart == 0 for step in steps)


def check_episodes(config: dict[str, Any], file: Path, result: dict[str, Any]) -> None:
    """The file has each episode that was counted, in order, and none is longer than the run."""
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    ends = [int(row["step"]) for row in rows]
    assert len(rows) == result["episodes"]
    assert ends == sorted(ends)
    assert not ends or 0 < ends[0] <= ends[-1] <= result["steps"]
    if config["algo"] != "async_ppo":  # there rollouts that came too late are counted, too
        assert max(Counter(ends).values(), default=0) <= config["num_envs"]
        assert sum(int(row["length"]) for row in rows) <= result["steps"]


def check_replay(folder: Path) -> None:
    """Fails if a transition of a run of DQN is missing in its replay or in there twice.

    For runs with `n_step` 1 and `learning_starts` within the first rollout; see `check_counters`.
    """
    run = read_run(folder)
    config, checkpoint = run.config, load_checkpoint(folder)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    told = [line for line in lines if "replay/size" in line]
    assert told
    for line in told:
        size, made, room = line["replay/size"], line["time/total_timesteps"], config["buffer_size"]
        # Once it is full, what the last steps before a stop led to takes places of transitions.
        assert size == made if made < room else 0.9 * room < size <= room
    inserted = checkpoint.arrays["replay"]["counters"][0]
    updates = checkpoint.arrays["training"]["updates"]
    assert inserted == checkpoint.step
    assert updates == int(config["updates_per_transition"] * checkpoint.step)


def count_what_is_learnt_from(agent: Any) -> list[int]:
    """Lists the transitions that each rollout of a DQN agent adds once learning has begun.

    Returns:
        One number for each rollout, more of them as the agent trains.
    """
    replay, add, counts = agent.replay, agent.replay.add, []

    def counting(rollout: Any, **where: Any) -> int | None:
        made = add(rollout, **where)
        if len(replay) >= agent.config.learning_starts:
            counts.append(made or 0)
        return made

    replay.add = counting
    return counts
