"""`DistributedDQN`: Q-learning from a replay that workers on a Ray cluster fill."""

from __future__ import annotations

import math
from typing import Any

from starling.configs import DistributedDQNConfig
from starling.storage.replay import Replay
from starling.storage.replay_shard import ReplayShard
from starling.storage.rollout import Rollout
from starling.storage.shared_replay import SharedReplay
from starling.training.async_dqn import ApeXDQN
from starling.training.distributed_agent import DistributedAgent, spread
from starling.training.ray_pool import RayPool
from starling.training.sharded_replay import ShardedReplay


class DistributedDQN(DistributedAgent, ApeXDQN):
    """Trains action values by DQN from rollouts of workers on a Ray cluster (Ape-X).

    Takes what `DQN` takes. The replay is here, with the learner, or in shards on the cluster; all
    checkpoints are here. As with `AsyncDQN`, gradient steps keep to `updates_per_transition`;
    workers that are ahead wait.

    Example:
        >>> agent = starling.DistributedDQN(env_name="CartPole-v1", num_workers=3, num_envs=4)
        >>> result = agent.train(total_timesteps=200_000)
    """

    config_class = DistributedDQNConfig
    config: DistributedDQNConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def make_collector(self) -> RayPool:
        """The workers, made at the first call."""
        if self._pool is None:
            self.envs  # noqa: B018 - with them goes the cluster, after `close`
            beside: dict[str, Any] = {}
            if isinstance(self.replay, ShardedReplay):
                beside = {"apart": True, "faults": self.replay.faults}
            self._pool = self._new_pool(1, False, math.inf, **beside)
        return self._pool

    def _new_replay(self) -> SharedReplay | ShardedReplay:
        if not self.config.replay_shards:
            return super()._new_replay()
        config, cluster = self.config, self._cluster
        assert cluster is not None
        remote = spread(cluster.ray, ReplayShard, 0)  # it takes no core of those that are counted

        def new_shard(writers: range) -> Any:
            return remote.remote(writers.start, len(writers), self._settings_of(len(writers)))

        whole = Replay(config.buffer_size, config.total_envs, **self._replay_settings())
        replay = ShardedReplay(
            cluster,
            new_shard,
            whole,
            config.replay_shards,
            config.num_writers,
            config.worker_restarts,
        )
        rows, saved = self._sample_rows(), config.save_replay
        replay.check_memory(*rows, lambda n: Replay(**self._settings_of(n)), saved)
        return replay

    def _settings_of(self, num_writers: int) -> dict[str, Any]:
        """What a replay is made with that has the environments of so many workers."""
        config, envs = self.config, num_writers * self.config.num_envs
        rows = config.buffer_size // config.total_envs
        return {"capacity": rows * envs, "num_envs": envs, **self._replay_settings()}

    def _take_in(self, rollout: Rollout) -> int:
        replay, pool = self.replay, self._pool
        if not isinstance(replay, ShardedReplay) or rollout.observations is not None:
            return super()._take_in(rollout)
        assert pool is not None
        report = pool.reports[0]
        if report.seen is not None:
            self.state = self.algorithm.observe(self.state, report.seen)
        return replay.add(rollout, content=report.content)

    def close(self) -> None:
        """Ends workers and shards, the connection to Ray, and the environments; idempotent."""
        if isinstance(self.__dict__.get("_replay"), ShardedReplay):
            self.__dict__.pop("_replay").close()  # what is trained afterwards begins with another
        super().close()
