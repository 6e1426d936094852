"""Checks that are right or wrong: equal seeds, exact resumption, and the value at a truncation."""

from __future__ import annotations

import tempfile
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from measuring import Row, arguments, recorded, report

from starling import ParallelPPO

SETTINGS: dict[str, Any] = {
    "env_name": "CartPole-v1",
    "preset": "none",
    "backend": "process",
    "num_workers": 2,
    "num_envs": 8,
    "num_steps": 256,
    "normalize_observations": True,
    "normalize_rewards": True,
    "lr_schedule": "linear",
    "tensorboard": False,
}


def arrays(agent: ParallelPPO) -> dict[str, np.ndarray]:
    """Everything that a checkpoint keeps of an agent, by name."""
    return {
        f"{group}/{name}": array
        for group, content in agent.arrays().items()
        for name, array in content.items()
    }


def identical(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether all arrays are the same bit for bit."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes()
        for name in one
    )


def trained(logs: str, steps: int, **settings: Any) -> dict[str, np.ndarray]:
    """The arrays of a policy after some steps."""
    with ParallelPPO(log_dir=logs, timesteps=steps, **SETTINGS, **settings) as agent:
        agent.train(quiet=True)
        return arrays(agent)


def same_seed_twice(iterations: int) -> Row:
    steps = iterations * 8 * 256
    with tempfile.TemporaryDirectory() as logs:
        first, second, other = (trained(logs, steps, seed=seed) for seed in (1, 1, 2))
    same = identical(first, second) and not identical(first, other)
    return Row(
        what="The same seed twice gives the same parameters bit for bit",
        value=same,
        floor="identical",
        met=same,
        note=f"CartPole-v1, {steps:,} steps; another seed differs",
    )


def exact_resume(iterations: int) -> Row:
    steps = iterations * 8 * 256
    with tempfile.TemporaryDirectory() as logs:
        straight = trained(logs, 2 * steps, exact_resume=True)
        with ParallelPPO(log_dir=logs, timesteps=2 * steps, exact_resume=True, **SETTINGS) as agent:
            agent.train(quiet=True, callbacks=[lambda told: told.step < steps])
            run, stopped = agent.run, agent.step
        assert run is not None
        assert stopped == steps
        with ParallelPPO(resume=run) as agent:
            agent.train(quiet=True)
            resumed = arrays(agent)
    same = identical(straight, resumed)
    return Row(
        what="2N steps equal N steps, stopped and resumed with exact_resume, bit for bit",
        value=same,
        floor="identical",
        met=same,
        note=f"CartPole-v1, N = {steps:,}, observation and reward normalisation, linear schedule",
    )


class OneState(gymnasium.Env):
    """One state, reward 1 for ever, cut off at step 10."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """Begins again."""
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: int):
        """Whatever the action, the same happens."""
        self.steps += 1
        return np.zeros(1, np.float32), 1.0, False, self.steps == 10, {}


def truncation(iterations: int) -> Row:
    values: list[float] = []
    with (
        tempfile.TemporaryDirectory() as logs,
        ParallelPPO(
            OneState,
            backend="serial",
            num_steps=100,
            mini_batch_size=100,
            lr=3e-3,
            gamma=0.9,
            timesteps=iterations * 8 * 100,
            tensorboard=False,
            log_dir=logs,
        ) as agent,
    ):
        agent.train(
            quiet=True,
            callbacks=[lambda told: values.append(float(told.metrics["rollout/value_mean"]))],
        )
    value = values[-1]
    return Row(
        what="Value of one state, reward 1, truncated at step 10, discount 0.9",
        value=value,
        floor="10 +- 0.5",
        met=abs(value - 10) <= 0.5,
        note="taking truncation for an end would give 6.5",
    )


def replays(short: bool) -> list[Row]:
    """What the tests of the replay count, which a replay that did it wrong would fail."""
    writers = "tests/faults/test_replay_writers.py::test_nothing_is_torn_duplicated_or_lost"
    lines = recorded(
        "tests/unit/test_replay.py::test_priorities_decide_how_often_and_weights_make_up_for_it",
        "tests/unit/test_replay.py::test_a_restored_replay_goes_on_the_same",
        f"{writers}[{40 if short else 4000}]",
        which="slow or not slow",
    )
    chances = [line["p"] for line in lines if line["name"] == "drawn"]
    restored = [line for line in lines if line["name"] == "restored"]
    (written,) = (line for line in lines if line["name"] == "written")
    return [
        Row(
            what="Draws by priority against the shares asked for, chi-square: smallest p",
            value=min(chances),
            floor="> 0.01",
            met=min(chances) > 0.01,
            note=f"alpha 0, 0.6 and 1; {lines[0]['draws']:,} draws each",
        ),
        Row(
            what="Records that four processes write into one replay while it is drawn from: torn, "
            "duplicated or lost",
            value=written["torn"] + written["duplicated"] + written["lost"],
            floor="0",
            met=not (written["torn"] or written["duplicated"] or written["lost"]),
            note=f"{written['records']:,} records with a checksum each",
        ),
        Row(
            what="A replay that is saved and loaded: contents and next draws",
            value=True,
            floor="identical",
            met=True,
            note=f"{len(restored)} replays, each with {restored[0]['batches']} minibatches drawn "
            "afterwards, between further rollouts",
        ),
    ]


def main() -> None:
    options = arguments(__doc__).parse_args()
    short = options.quick
    report(
        [
            same_seed_twice(2 if short else 10),
            exact_resume(1 if short else 5),
            truncation(50 if short else 100),
            *replays(short),
        ]
    )


if __name__ == "__main__":
    main()
