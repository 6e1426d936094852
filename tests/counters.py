"""What a run wrote, and whether it counts every step, iteration and episode once."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from starling.storage.checkpoint import load_checkpoint
from starling.training.run_folder import read_settings


def metrics_of(run: str | Path | None) -> list[dict[str, Any]]:
    """What a run has logged so far, a dictionary for each line."""
    assert run is not None
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=_refuse) for line in lines]


def _refuse(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def check_counters(folder: Path) -> dict[str, Any]:
    """Fails if a counter of a run goes back, leaves something out, or counts something twice.

    For runs that are over, however often they were stopped, killed and resumed. Rows that were
    lost by faults are no steps.

    Returns:
        The run's result.
    """
    config, lines = read_settings(folder), metrics_of(folder)
    result = json.loads((folder / "result.json").read_text())
    checkpoint = load_checkpoint(folder)
    counters = checkpoint.counters
    assert checkpoint.step == counters["step"] == result["steps"]
    assert counters["episodes"] == result["episodes"]
    check_iterations(config, lines, counters["iteration"])
    last = [line for line in lines if "time/iterations" in line][-1]
    assert last["time/total_timesteps"] == result["steps"]
    check_evaluations(config, lines)
    check_episodes(config, folder / "episodes.csv", result)
    return result


def rows_of(config: dict[str, Any]) -> int:
    """Steps of an iteration."""
    rows = config["num_envs"] * config["num_steps"]
    if config["algo"] == "distributed_ppo":
        return rows * config["num_workers"]
    return rows // config["num_actors"] if config["algo"] == "async_dqn" else rows


def check_iterations(config: dict[str, Any], lines: list[dict[str, Any]], last: int) -> None:
    """Every iteration that was to be reported is, once and in order; so is the last one.

    Its steps are the rows of all iterations so far but for those that were lost.
    """
    told = [line for line in lines if "time/iterations" in line]
    iterations = [line["time/iterations"] for line in told]
    assert iterations == sorted(set(iterations))
    assert set(range(config["log_interval"], last + 1, config["log_interval"])) <= set(iterations)
    assert iterations[-1] == last
    steps = [line["time/total_timesteps"] for line in told]
    assert steps == sorted(set(steps))
    for line in told:
        missing = line["time/iterations"] * rows_of(config) - line["time/total_timesteps"]
        lost = line.get("faults/lost_steps", 0)
        if line.get("faults/dropped_envs"):  # whose rows are missing from then on
            assert missing >= 0
        elif config["algo"].startswith(("async", "distributed")):  # rollouts may be under way
            assert 0 <= missing <= lost
        else:
            assert missing == lost


def check_evaluations(config: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """Evaluations come in order, at the iterations that were asked for, none of them twice."""
    steps = [line["time/total_timesteps"] for line in lines if "eval/mean_reward" in line]
    assert steps == sorted(set(steps))
    rows, lost = rows_of(config), any("faults/lost_steps" in line for line in lines)
    told = {
        x["time/total_timesteps"]: x["time/iterations"] for x in lines if "time/iterations" in x
    }
    for step in steps:
        if step in told or not lost:
            assert told.get(step, step // rows) % config["eval_interval"] == 0
        assert lost or step % rows == 0


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
    config, checkpoint = read_settings(folder), load_checkpoint(folder)
    told = [line for line in metrics_of(folder) if "replay/size" in line]
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
        if replay.inserted >= agent.config.learning_starts:
            counts.append(made or 0)
        return made

    replay.add = counting
    return counts
