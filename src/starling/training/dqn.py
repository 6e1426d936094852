"""`DQN`: Q-learning from a replay, on many environments of one machine."""

from __future__ import annotations

import functools
import logging
import math
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from starling.algorithms.acting import Acting
from starling.algorithms.dqn import LEAST_PRIORITY, NUM_SUMS, DQNAlgorithm
from starling.configs import DQNConfig
from starling.storage.batch import Batch
from starling.storage.checkpoint import Checkpoint
from starling.storage.replay import Replay
from starling.storage.rollout import Rollout, map_tree
from starling.storage.shared_replay import SharedReplay
from starling.training.device import prepare_cpu
from starling.training.sharded_replay import ShardedReplay
from starling.training.training_agent import TrainingAgent

# Minibatches that one program learns from at most: with more, calling it costs nothing any more,
# and priorities are older.
_MOST_MINIBATCHES = 32

_log = logging.getLogger(__name__)


class DQN(TrainingAgent):
    """Trains action values by DQN: short rollouts go into a replay, minibatches come out of it.

    Gradient steps are made on a thread of their own while the next rollout is collected, with the
    parameters from before them; whoever asks for `state` or `replay` waits for them. Takes what
    `TrainingAgent` takes.

    Example:
        >>> agent = starling.DQN(env_name="CartPole-v1", num_envs=4, seed=0)
        >>> result = agent.train(total_timesteps=100_000)
        >>> agent.evaluate(episodes=100).mean_return
    """

    config_class = DQNConfig
    algorithm_class = DQNAlgorithm
    config: DQNConfig
    _overlaps: ClassVar[bool] = True  # gradient steps are made while it collects
    _epsilon_step = -1
    # Gradient steps that are being made, and what their metrics will be added to.
    _steps: tuple[Future[dict[str, Any]], dict[str, Any]] | None = None
    _before_steps: Any = None  # parameters and statistics from before the newest of them

    def __init__(self, *args: Any, **settings: Any):
        if self._overlaps:
            # With the one thread that small networks get otherwise, the programs of acting and of
            # learning would wait for each other.
            prepare_cpu(math.inf)
        super().__init__(*args, **settings)
        try:
            content: dict[str, np.ndarray] = {}
            if isinstance(self._before, Checkpoint):
                self._go_on_acting(self._before.arrays.get("acting"))
                content = self._before.arrays.pop("replay", content)
            self.replay  # noqa: B018 - refuses here what does not fit into memory
            if content and self.config.save_replay:  # who goes on without it begins with another
                self._owed = float(content.pop("owed"))
                self.replay.restore(content)
        except BaseException:
            self.close()
            raise

    @property
    def state(self) -> Any:
        """What changes while learning."""
        self._end_steps()
        return self._state

    @state.setter
    def state(self, state: Any) -> None:
        self._end_steps()
        self._state, self._before_steps = state, None

    @property
    def replay(self) -> Replay | SharedReplay | ShardedReplay:
        """The transitions that are learnt from."""
        self._end_steps()
        return self._replay

    @functools.cached_property
    def _replay(self) -> Replay | SharedReplay | ShardedReplay:
        self._owed = 0.0
        return self._new_replay()

    def _new_replay(self) -> Replay | SharedReplay | ShardedReplay:
        replay = Replay(self.config.buffer_size, self.config.total_envs, **self._replay_settings())
        replay.check_memory(*self._sample_rows())
        return replay

    def _replay_settings(self) -> dict[str, Any]:
        """What any part of the replay is told, whichever environments it has."""
        config = self.config
        return {
            "n_step": config.n_step,
            "gamma": config.gamma,
            "prioritized": config.prioritized,
            "alpha": config.priority_alpha,
            "frame_stack": config.frame_stack,
            "seed": config.seed,
        }

    def _sample_rows(self) -> tuple[Any, Any]:
        """Observations and actions of one step of one environment, which stands for all."""
        observation, action = self.observation_space.sample(), self.action_space.sample()
        return map_tree(_step_of, observation), map_tree(_step_of, action)

    @property
    def epsilon(self) -> np.ndarray:
        """Share of random actions in each environment, `[N]`, by the transitions made so far."""
        if self._epsilon_step != self.step:  # once a rollout, though each of its steps asks
            config, self._epsilon_step = self.config, self.step
            done = np.float32(min(1.0, self.step / config.epsilon_steps))
            start = config.epsilon_start
            self._epsilon = start + done * (self.last_epsilon - start)
        return self._epsilon

    @functools.cached_property
    def last_epsilon(self) -> np.ndarray:
        """Share of random actions in each environment at last, `[N]`."""
        return np.full(self.config.total_envs, self.config.epsilon_end, np.float32)

    @property
    def acting(self) -> Acting:
        """What it acts with now."""
        if self._before_steps is not None:
            params, statistics = self._before_steps
            return Acting(params, statistics, self.epsilon)
        state = self.state
        return Acting(state.params, state.observation_statistics, self.epsilon)

    def forget_episodes(self) -> None:
        """Takes note that all environments begin new episodes."""
        self.replay.cut()

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, Any]:
        """Puts a rollout into the replay, and begins the gradient steps that are due.

        Args:
            rollout: Of any version of the parameters.
            progress: Share of the training that is done, in [0, 1].

        Returns:
            Metrics by their logged names; those of the gradient steps come in once these have
            ended.
        """
        self._end_steps()
        self._before_steps = None
        metrics, due = self._prepare(rollout)
        if due:
            state = self._state  # the steps will write over it
            self._before_steps = jax.tree.map(
                jnp.copy, (state.params, state.observation_statistics)
            )
            steps = self._learner.submit(self._learn_from_replay, due, progress)
            self._steps = steps, metrics
        return metrics

    @functools.cached_property
    def _learner(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="starling-learner")

    def _end_steps(self) -> None:
        """Waits for the gradient steps that are being made."""
        if self._steps is not None:
            steps, metrics = self._steps
            wait([steps])
            self._steps = None  # also if they failed: that is told once
            metrics |= steps.result()

    def _learn(self, rollout: Rollout, progress: float) -> dict[str, Any]:
        metrics, due = self._prepare(rollout)
        return metrics | self._learn_from_replay(due, progress)

    def _prepare(self, rollout: Rollout) -> tuple[dict[str, Any], int]:
        """Puts a rollout into the replay; metrics, and the gradient steps that are due now."""
        config, replay, due = self.config, self.replay, 0
        metrics: dict[str, Any] = {"rollout/epsilon": float(self.epsilon.mean())}
        made = self._take_in(rollout)
        # A replay that is full may hold fewer: rows that are no experience take places, too.
        if replay.inserted >= config.learning_starts and len(replay) >= config.mini_batch_size:
            self._owed += config.updates_per_transition * made
            due = int(self._owed)
            self._owed -= due
        metrics |= {"replay/size": len(replay), **self._ratio()}
        self.version += 1
        return metrics, due

    def _ratio(self) -> dict[str, float]:
        replay = self._replay
        return {"replay/sample_insert_ratio": replay.sampled / max(replay.inserted, 1)}

    def _take_in(self, rollout: Rollout) -> int:
        """Puts a rollout into the replay; how many transitions can be sampled in addition."""
        if self.config.normalize_observations:
            before = jax.tree.map(lambda x: x[:-1], rollout.observations)
            seen = self.algorithm.seen(before, rollout.valid)
            # The rollout's arrays may be written again once this returns.
            self.state = self.algorithm.observe(self.state, jax.block_until_ready(seen))
        return self.replay.add(rollout) or 0

    def _learn_from_replay(self, due: int, progress: float) -> dict[str, Any]:
        """Makes gradient steps, several in a program.

        Those of large networks, and on accelerators, go on while it draws for the next program.
        """
        config, replay = self.config, self._replay
        beta = config.priority_beta + progress * (1.0 - config.priority_beta)
        size, sums = self._minibatches_in_a_program, np.zeros(NUM_SUMS, np.float32)
        metrics: dict[str, Any] = {}
        indices = errors = None
        while due > 0:
            count = min(due, size)
            batches = replay.sample(config.mini_batch_size, count, beta)
            self._set_priorities(indices, errors)
            if batches is None:  # all of it was lost: the steps are made once there is more
                self._owed += due
                return metrics
            indices, batches = batches.indices, batches._replace(indices=None)
            batches = _padded(batches, size)
            self._state, sums, errors, metrics = self.algorithm.update(
                self._state, sums, batches, np.int32(count), np.float32(progress)
            )
            due -= count
        self._set_priorities(indices, errors)
        return metrics | self._ratio()

    def _set_priorities(self, indices: np.ndarray | None, errors: jax.Array | None) -> None:
        if self.config.prioritized and indices is not None:
            priorities = np.asarray(errors)[: len(indices)] + LEAST_PRIORITY  # waits for them
            known = np.isfinite(priorities)  # all, unless the update was skipped
            self._replay.set_priorities(indices[known], priorities[known])

    @functools.cached_property
    def _minibatches_in_a_program(self) -> int:
        """So many that a rollout's fill a few programs alike, and none compiles twice."""
        due = math.ceil(self.config.updates_per_transition * self.config.batch_size)
        return math.ceil(due / math.ceil(due / _MOST_MINIBATCHES))

    @property
    def left_out(self) -> list[str]:
        """What checkpoints do not hold."""
        return [] if self.config.save_replay and "_replay" in self.__dict__ else ["replay"]

    def arrays(self) -> dict[str, dict[str, np.ndarray]]:
        """Groups of arrays for a checkpoint; see `Agent.arrays`."""
        groups = super().arrays()
        if self.config.exact_resume and self._before_steps is not None:
            groups["acting"] = {"parameters": np.asarray(self._before_steps[0])}
        if not self.left_out:
            groups["replay"] = {**self.replay.state(), "owed": np.array(self._owed)}
        return groups

    def _go_on_acting(self, before: dict[str, np.ndarray] | None) -> None:
        """Acts with the parameters that the run acted with when it was saved, if it says so."""
        if before is not None and self.config.exact_resume:
            params = jax.device_put(before["parameters"], self.device)
            self._before_steps = params, self.state.observation_statistics

    def close(self) -> None:
        """Ends the environments, and the thread that learns; idempotent."""
        if "_learner" in self.__dict__:
            self.__dict__.pop("_learner").shutdown()
        try:
            self._end_steps()
        except Exception as error:  # nobody asked for what they would have given
            _log.error("the newest gradient steps failed: %r", error)
        super().close()


def _step_of(value: Any) -> np.ndarray:
    return np.asarray(value)[None, None]


def _padded(batches: Batch, size: int) -> Batch:
    """K minibatches as `size`, of which the last mean nothing: one program for any number."""
    missing = size - len(batches.returns)
    if not missing:
        return batches
    return jax.tree.map(lambda x: np.concatenate([x, np.repeat(x[:1], missing, 0)]), batches)
