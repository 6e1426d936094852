"""The metrics Starling logs: one table of names, units and definitions.

The page ``docs/metrics.md`` is printed from it: ``python -m starling.reporting.metrics``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple


class UndefinedMetricWarning(UserWarning):
    """A metric was logged that ``METRICS`` does not define; the tests turn this into an error."""


class Metric(NamedTuple):
    """Unit and one-sentence definition of a metric."""

    unit: str
    definition: str


METRICS: dict[str, Metric] = {
    # What the policy achieves while it collects
    "rollout/ep_rew_mean": Metric(
        "reward",
        "Mean undiscounted return of the last 100 finished training episodes, before any reward "
        "normalisation.",
    ),
    "rollout/ep_len_mean": Metric(
        "steps", "Mean length of the last 100 finished training episodes."
    ),
    "rollout/value_mean": Metric(
        "discounted reward",
        "Mean value estimate over the observations of the latest rollout.",
    ),
    "rollout/epsilon": Metric(
        "fraction", "Share of random actions while the latest rollout was collected."
    ),
    # How far and how fast
    "time/fps": Metric(
        "steps/s",
        "Environment steps per second since training started or was resumed, frame skip not "
        "counted.",
    ),
    "time/iterations": Metric("iterations", "Rollouts collected and learnt from so far."),
    "time/total_timesteps": Metric(
        "steps",
        "Environment steps so far, over all environments: the x axis of every other metric.",
    ),
    "time/time_elapsed": Metric(
        "s", "Wall-clock time since training started or was resumed, on a monotonic clock."
    ),
    # The update
    "train/approx_kl": Metric(
        "nats",
        "Estimate of KL(old policy, new policy), the mean of (ratio - 1) - log(ratio) over the "
        "minibatches of the iteration.",
    ),
    "train/clip_fraction": Metric(
        "fraction", "Share of the samples whose probability ratio lay outside the clip range."
    ),
    "train/entropy_loss": Metric("nats", "Negative mean entropy of the policy."),
    "train/explained_variance": Metric(
        "fraction",
        "1 - Var(returns - values) / Var(returns) before the update: 1 is a perfect critic, 0 or "
        "less is no better than a constant.",
    ),
    "train/policy_gradient_loss": Metric(
        "advantage", "Mean policy loss (for PPO the clipped surrogate) over the minibatches."
    ),
    "train/value_loss": Metric(
        "reward^2", "Mean value loss over the minibatches, before `value_coef` weighs it."
    ),
    "train/learning_rate": Metric("1", "Step size of the optimiser in this iteration."),
    "train/grad_norm": Metric(
        "1", "Mean global norm of the gradient over the minibatches, before clipping."
    ),
    "train/clip_range": Metric("1", "Clip range of the probability ratio in this iteration."),
    "train/loss": Metric(
        "reward^2", "Mean weighted loss of the TD errors over the minibatches of the iteration."
    ),
    "train/q_mean": Metric(
        "discounted reward", "Mean value of the actions taken, over the minibatches."
    ),
    "train/td_error": Metric(
        "discounted reward", "Mean absolute TD error (target - value) over the minibatches."
    ),
    "train/std": Metric(
        "action",
        "Mean standard deviation of the Gaussian policy; only for continuous actions.",
    ),
    # The replay
    "replay/size": Metric("transitions", "Transitions that can be drawn from the replay."),
    "replay/sample_insert_ratio": Metric(
        "1",
        "Transitions drawn from the replay so far / transitions that were put in, those before "
        "learning started, too.",
    ),
    # Evaluation on separate environments
    "eval/mean_reward": Metric(
        "reward", "Mean undiscounted return of the evaluation episodes, actions deterministic."
    ),
    "eval/mean_ep_length": Metric("steps", "Mean length of the evaluation episodes."),
    # Where the time goes; the shares of a line add up to 1
    "perf/collect_share": Metric(
        "fraction", "Share of the time since the last line spent stepping environments and acting."
    ),
    "perf/update_share": Metric(
        "fraction",
        "Share of the time since the last line spent on advantages and gradient steps; of DQN, "
        "whose gradient steps are made while it collects, on the replay and on waiting for them.",
    ),
    "perf/fused_share": Metric(
        "fraction",
        "Share of the time since the last line spent in programs that collect and update; in place "
        "of `perf/collect_share` and `perf/update_share`, which cannot be told apart there.",
    ),
    "perf/wait_share": Metric(
        "fraction", "Share of the time since the last line spent idle, waiting for data."
    ),
    "perf/report_share": Metric(
        "fraction",
        "Share of the time since the last line spent on logging, evaluation, checkpoints and all "
        "else.",
    ),
    "perf/frames_per_second": Metric(
        "frames/s", "`time/fps` times the frame skip of the environment (1 if it has none)."
    ),
    "perf/straggler": Metric(
        "1",
        "Stepping time of the slowest worker since the last line, divided by the mean of all "
        "workers: 1 where none waits for another; only with two workers or more.",
    ),
    "perf/worker_memory_max": Metric(
        "MB",
        "Resident memory of the largest worker process; only where there are worker processes.",
    ),
    # Actors that go on while the policy learns
    "async/policy_lag_min": Metric(
        "updates",
        "Updates since the parameters that the newest part of the latest rollout was collected "
        "with.",
    ),
    "async/policy_lag_mean": Metric("updates", "The same, mean over the parts."),
    "async/policy_lag_max": Metric("updates", "The same for the oldest part."),
    "async/policy_lag_0": Metric(
        "rollouts",
        "Rollouts of single actors learnt from since training started or was resumed whose "
        "parameters were the newest; left out while there is none, as are those below.",
    ),
    "async/policy_lag_1": Metric("rollouts", "The same, 1 update old."),
    "async/policy_lag_2": Metric("rollouts", "The same, 2 updates old."),
    "async/policy_lag_3_to_4": Metric("rollouts", "The same, 3 or 4 updates old."),
    "async/policy_lag_5_to_8": Metric("rollouts", "The same, 5 to 8 updates old."),
    "async/policy_lag_9_to_16": Metric("rollouts", "The same, 9 to 16 updates old."),
    "async/policy_lag_above_16": Metric("rollouts", "The same, more than 16 updates old."),
    "async/dropped": Metric(
        "rollouts", "Rollouts of single actors so far that were too old to learn from."
    ),
    # Workers on a Ray cluster
    "distributed/workers": Metric("count", "Workers that can be asked for rollouts."),
    "distributed/collect_seconds": Metric(
        "s",
        "Time in which the slowest part of the latest rollout was collected, where it was; what "
        "`perf/wait_share` is beyond that goes into moving parameters and rollouts.",
    ),
    # What went wrong in the whole run and was survived; logged above 0, and never goes backwards
    "faults/env_errors": Metric("count", "Exceptions of environments so far."),
    "faults/worker_deaths": Metric("count", "Worker processes so far that died, replaced or not."),
    "faults/timeouts": Metric("count", "Workers so far that took longer than `step_timeout`."),
    "faults/invalid_data": Metric(
        "count",
        "Observations and rewards so far that were not finite, or too large for 32 bits, and "
        "replaced or cut out.",
    ),
    "faults/restarts": Metric(
        "count", "Environments, or workers with all of theirs, that were made anew so far."
    ),
    "faults/dropped_envs": Metric(
        "count", "Environments so far that failed and are no longer stepped."
    ),
    "faults/lost_steps": Metric(
        "steps", "Environment steps so far that were lost and are not learnt from."
    ),
    "faults/recycled_workers": Metric(
        "count", "Worker processes so far that were replaced since they had grown too large."
    ),
    "faults/actor_restarts": Metric("count", "Actors so far that failed and were begun anew."),
    "faults/workers_lost": Metric(
        "count",
        "Workers on a Ray cluster so far that were lost, and replaced; a lost node counts once.",
    ),
    "faults/worker_starts_failed": Metric(
        "count",
        "Workers on a Ray cluster so far that were lost before their first rollout, and replaced.",
    ),
    "faults/replay_shards_lost": Metric(
        "count",
        "Shards of the replay so far that were lost with all they had, and replaced.",
    ),
    "faults/skipped_updates": Metric(
        "count", "Updates so far whose result was not finite, so that the policy stayed as it was."
    ),
    "faults/failed_saves": Metric("count", "Checkpoints so far that could not be written."),
}

_warned: set[str] = set()


def check_names(names: Iterable[str]) -> None:
    """Warn, once per name, of metrics that ``METRICS`` does not define.

    Args:
        names: Names that are about to be logged.

    Raises:
        UndefinedMetricWarning: Where warnings of this class are errors, as in Starling's tests.
    """
    for name in names:
        if name not in METRICS and name not in _warned:
            message = f"metric {name!r} is not defined in starling.reporting.metrics.METRICS"
            warnings.warn(message, UndefinedMetricWarning, stacklevel=3)
            _warned.add(name)


def metrics_markdown() -> str:
    """Return the reference page of the metrics as Markdown."""
    lines = [
        "# Metrics",
        "",
        "<!-- Generated by `python -m starling.reporting.metrics`; edit the table there. -->",
        "",
        "Every logged iteration is one line of `metrics.jsonl` in the run folder, and the same",
        "values go to TensorBoard. A value that is not finite is `null` there; a metric without a",
        "value yet (because no episode has ended, say) is left out.",
        "",
        "| metric | unit | definition |",
        "| --- | --- | --- |",
    ]
    lines += [f"| `{name}` | {m.unit} | {m.definition} |" for name, m in METRICS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(metrics_markdown(), end="")
