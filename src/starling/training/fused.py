"""Whole iterations as one program: environments, advantages and updates without Python between."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from starling.algorithms.acting import Acting
from starling.algorithms.ppo import PPO
from starling.algorithms.ppo_state import TrainState
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
        self._program = jax.jit(self._iterations, donate_argnums=0)

    def beside(self) -> FusedLearner:
        """One for another agent of the same settings, which shares the compiled program."""
        return copy.copy(self)

    def _iterations(
        self, states: list[TrainState], positions: list[Position], seeds: Array, *alike: Array
    ) -> tuple[list[TrainState], list[Position], list[Any]]:
        """Iterations of one agent, or of several at once, as a part of a program."""
        run: Any = functools.partial(iterations, self.env, self.algorithm, self.num_steps)
        if len(states) == 1:
            made = [run(states[0], positions[0], seeds[0], *alike)]
        else:
            stacked = jax.tree.map(lambda *x: jnp.stack(x), *zip(states, positions, strict=True))
            run = jax.vmap(run, in_axes=(0, 0, 0, *(None for _ in alike)))
            of_all = run(*stacked, seeds, *alike)
            made = [jax.tree.map(lambda x, k=k: x[k], of_all) for k in range(len(states))]
        after, at, left = zip(*made, strict=True)
        return list(after), list(at), list(left)

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
        return self.learn_together([agent], [self], progress)[0]

    def learn_together(
        self, agents: Sequence[Any], learners: Sequence[FusedLearner], progress: list[float]
    ) -> list[list[Learnt]]:
        """Makes the same iterations of several agents at once, in one program.

        Args:
            agents: Agents that differ in nothing but their seeds, and are equally far.
            learners: Theirs.
            progress: See `learn`.

        Returns:
            What `learn` returns, for each agent.
        """
        start = time.monotonic()
        n = min(len(progress), self.most, self._affordable)
        padded = np.zeros(self.most, np.float32)
        padded[:n] = progress[:n]
        sampler = agents[0].sampler
        states, positions, left = self._program(
            [agent.state for agent in agents],
            [learner.position for learner in learners],
            np.array([agent.sampler.seed for agent in agents], np.uint32),
            np.uint32(sampler.next_table),
            np.uint32(sampler.stride),
            padded,
            np.int32(n),
        )
        for agent, learner, state, position in zip(
            agents, learners, states, positions, strict=True
        ):
            agent.state, learner.position = state, position
            agent.version += n
            agent.sampler.next_table += n * sampler.stride
            agent.sampler.forget()
            learner.sequence += n
        left = jax.device_get(left)
        seconds = (time.monotonic() - start) / n
        self._affordable = max(1, math.floor(_LONGEST_CALL / seconds))
        return [[_iteration(i, *one) for i in range(n)] for one in left]


def _iteration(i: int, metrics: dict[str, np.ndarray], ends: Ends) -> Learnt:
    return Learnt(
        Ends(*(None if x is None else x[i] for x in ends)),
        {name: values[i] for name, values in metrics.items()},
    )


def iterations(
    env: CompiledEnv,
    algorithm: PPO,
    num_steps: int,
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
        state: Of what is learnt.
        position: Where the environments stand.
        seed: Of the noise that actions are sampled with.
        first_table: Number of the first table of noise.
        stride: From one table's number to the next.
        progress: `[most]`, share of the training that is done before each iteration; as many as
            there is room for in the results.
        n: How many iterations; a number on the device, so that one program makes any number.

    Returns:
        State and position after them, and of each iteration `[most, ...]` metrics and ends.
    """

    def iteration(i: Array, state: TrainState, position: Position) -> tuple:
        noise = algorithm.draw_noise(seed, first_table + i * stride, (num_steps, env.num_envs))
        acting = Acting(state.params, state.observation_statistics)
        position, rollout = scan_rollout(env, algorithm, num_steps, acting, noise, position)
        state, metrics = algorithm.update(state, rollout, progress[i])
        ends = Ends(rollout.rewards, rollout.terminated, rollout.truncated, rollout.valid)
        return state, position, (metrics, ends)

    first = jnp.uint32(0)
    left = jax.eval_shape(iteration, first, state, position)[2]
    rows = jax.tree.map(lambda x: jnp.zeros((len(progress), *x.shape), x.dtype), left)

    def body(i: Array, carry: tuple) -> tuple:
        state, position, rows = carry
        state, position, left = iteration(i.astype(jnp.uint32), state, position)
        return state, position, jax.tree.map(lambda row, x: row.at[i].set(x), rows, left)

    return jax.lax.fori_loop(0, n, body, (state, position, rows))
