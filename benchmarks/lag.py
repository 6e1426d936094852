"""What V-trace is worth when rollouts are 20 updates old: AsyncPPO on CartPole-v1 with and without.

The lag is forced: actors get the parameters of 20 updates ago. Actors and learner take turns on one
thread, so a seed gives the same result each time. The figure is the mean return of all training
iterations, which falls with what the lag costs.
"""

from __future__ import annotations

import collections
import statistics
import tempfile
from typing import Any

from measuring import Row, arguments, report, shown

from starling.training.actor import Published
from starling.training.async_ppo import AsyncPPO

LAG, TIMESTEPS = 20, 100_000


class Lagging(AsyncPPO):
    """Publishes parameters that are `LAG` updates old."""

    def __init__(self, *args: Any, **settings: Any):
        self.history: collections.deque[Published] = collections.deque(maxlen=LAG + 1)
        super().__init__(*args, **settings)

    def _publish(self) -> None:
        super()._publish()
        self.history.append(self.published)
        self.published = self.history[0]


def mean_return(correction: str, seed: int, timesteps: int) -> float:
    """Trains one seed; the mean over iterations of the return of the last 100 episodes."""
    returns, lags = [], []

    def note(iteration: Any) -> None:
        returns.append(iteration.metrics["rollout/ep_rew_mean"] or 0.0)
        lags.append(iteration.metrics["async/policy_lag_min"])

    with (
        tempfile.TemporaryDirectory() as logs,
        Lagging(
            "CartPole-v1",
            preset="none",
            num_envs=8,
            num_actors=1,
            num_steps=32,
            epochs=4,
            mini_batch_size=64,
            lr=1e-3,
            gamma=0.98,
            gae_lambda=1.0,
            entropy_coef=0.0,
            correction=correction,
            max_policy_lag=2 * LAG,
            backend="compiled",
            serial=True,
            seed=seed,
            save_interval=0,
            tensorboard=False,
            log_dir=logs,
        ) as agent,
    ):
        agent.train(total_timesteps=timesteps, quiet=True, callbacks=note)
    assert lags[-1] == LAG
    return statistics.fmean(returns)


def main() -> None:
    options = arguments(__doc__).parse_args()
    seeds, timesteps = (1, 8_000) if options.quick else (options.repeats, TIMESTEPS)
    results = {
        correction: [mean_return(correction, seed, timesteps) for seed in range(seeds)]
        for correction in ("vtrace", "none")
    }
    better = sum(a > b for a, b in zip(results["vtrace"], results["none"], strict=True))
    on, off = (statistics.fmean(results[correction]) for correction in ("vtrace", "none"))
    lists = {name: ", ".join(map(shown, values)) for name, values in results.items()}
    report(
        [
            Row(
                what=f"Mean training return on CartPole-v1, rollouts {LAG} updates old, V-trace",
                value=on,
                unit="return",
                peer="without correction",
                peer_value=off,
                ratio=on / off,
                floor="> 1x, with each seed",
                met=better == seeds,
                note=f"{timesteps:,} steps; better with {better} of {seeds}; "
                f"seeds: {lists['vtrace']}; without: {lists['none']}",
            )
        ]
    )


if __name__ == "__main__":
    main()
