"""Whole iterations as one program: environments, advantages and updates without Python between."""

from __future__ import annotations

import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from starling.algorithms.ppo import PPO, TrainState
from starling.envs.compiled import CompiledEnv
from starling.storage.rollout import Rollout
from starling.training.compiled_collector import CompiledCollector, Position, scan_rollout

Array = jax.Array

# A program that runs cannot be interrupted: one call takes at most about so many seconds, so that
# signals are answered, and keeps at most so many bytes of what the host is to read.
_LONGEST_CALL = 1.0
_LARGEST_OUTPUT = 64 * 2**20


class Ends(NamedTuple):
    """What episodes are counted from, each `[T, N]`: a part of a `Rollout`."""

    rewards: Any
    terminated: Any
    truncated: Any
    valid: Any = None


class Learnt(NamedTuple):
    """What an iteration leaves for the report.

    Attributes:
        rollout: That was learnt from; episodes are counted from it.
        metrics: Of the update, by their logged names.
    """

    rollout: Rollout | Ends
    metrics: dict[str, Any]


class FusedLearner(CompiledCollector):
    """Collects and learns in one program, many iterations in a call; for pure JAX environments.

    Args:
        envs: The vector environment, whose `compiled` is stepped.
        num_steps: T, steps in a rollout.
        algorithm: That acts and learns.
        device: Where all of it runs.
        most: Iterations in one call at most.
    """

    def __init__(self, envs: Any, num_steps: int, algorithm: PPO, device: Any, most: int):
        super().__init__(envs, num_steps, algorithm, device)
        # Reward and two flags for each row; they are read after each call.
        fitting = _LARGEST_OUTPUT // (6 * num_steps * self.env.num_envs)
        self.most = max(1, min(most, fitting))
        self._affordable = 1
        self._program = jax.jit(
            functools.partial(iterations, self.env, algorithm, num_steps, self.most),
            donate_argnums=(0, 1),
        )

    def learn(self, agent: Any, progress: list[float]) -> list[Learnt]:
        """Makes some iterations of what an agent learns.

        Args:
            agent: Its state, version and sampler go on accordingly.
            progress: Share of the training that is done, in [0, 1], before each iteration that
                may be made.

        Returns:
            What each iteration that was made leaves: as many as fit into about a second, and at
            least one.
        """
        n = min(len(progress), self.most, self._affordable)
        padded = np.zeros(self.most, np.float32)
        padded[:n] = progress[:n]
        sampler, start = agent.sampler, time.monotonic()
        sampler.forget()
        agent.state, self.position, (metrics, ends) = self._program(
            agent.state,
            self.position,
            sampler.seed,
            np.uint32(sampler.next_table),
            np.uint32(sampler.stride),
            padded,
            np.int32(n),
        )
        sampler.next_table += n * sampler.stride
        agent.version += n
        self.sequence += n
        metrics, ends = jax.device_get((metrics, ends))
        seconds = (time.monotonic() - start) / n
        self._affordable = max(1, math.floor(_LONGEST_CALL / seconds))
        return [
            Learnt(
                Ends(*(None if x is None else x[i] for x in ends)),
                {name: values[i] for name, values in metrics.items()},
            )
            for i in range(n)
        ]


def iterations(
    env: CompiledEnv,
    algorithm: PPO,
    num_steps: int,
    most: int,
    state: TrainState,
    position: Position,
    seed: Array,
    first_table: Array,
    stride: Array,
    progress: Array,
    n: Array,
) -> tuple[TrainState, Position, tuple[dict[str, Array], Ends]]:
    """Collects a rollout and learns from it, n times; as a part of a compiled program.

    Args:
        env: The environments.
        algorithm: That acts and learns.
        num_steps: T, steps in a rollout.
        most: Iterations that there is room for in the results.
        state: Of what is learnt.
        position: Where the environments stand.
        seed: Of the noise that actions are sampled with.
        first_table: Number of the first table of noise.
        stride: From one table's number to the next.
        progress: `[most]`, share of the training that is done before each iteration.
        n: How many iterations; a number on the device, so that one program makes any number.

    Returns:
        State and position after them, and of each iteration `[most, ...]` metrics and ends.
    """

    def iteration(i: Array, state: TrainState, position: Position) -> tuple:
        noise = algorithm.draw_noise(seed, first_table + i * stride, (num_steps, env.num_envs))
        position, rollout = scan_rollout(
            env,
            algorithm,
            num_steps,
            state.params,
            state.observation_statistics,
            noise,
            position,
        )
        state, metrics = algorithm.update(state, rollout, progress[i])
        ends = Ends(rollout.rewards, rollout.terminated, rollout.truncated, rollout.valid)
        return state, position, (metrics, ends)

    first = jnp.uint32(0)
    left = jax.eval_shape(iteration, first, state, position)[2]
    rows = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), left)

    def body(i: Array, carry: tuple) -> tuple:
        state, position, rows = carry
        state, position, left = iteration(i.astype(jnp.uint32), state, position)
        return state, position, jax.tree.map(lambda row, x: row.at[i].set(x), rows, left)

    return jax.lax.fori_loop(0, n, body, (state, position, rows))
