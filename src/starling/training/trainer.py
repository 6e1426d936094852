"""The loop of a run on one machine: collect, update, report, save."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from starling.errors import StarlingError
from starling.reporting.progress import FUSED_PARTS, PARTS, Progress, TimeSplit
from starling.reporting.writers import MetricsWriter
from starling.storage.checkpoint import Checkpoint, save_checkpoint
from starling.storage.rollout import Rollout
from starling.training.collector import HostCollector
from starling.training.compiled_collector import CompiledCollector
from starling.training.episode_counter import EpisodeCounter
from starling.training.fused import Ends, FusedLearner, Learnt
from starling.training.health import Health, frame_skip
from starling.training.not_finite import MOST_SKIPPED, check_rewards, looks_skipped, not_learning
from starling.training.ray_pool import Pool
from starling.training.result import TrainResult
from starling.training.run_folder import write_json

if TYPE_CHECKING:
    from starling.training.training_agent import TrainingAgent

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What a callback is told after each iteration.

    Attributes:
        agent: That is being trained; may be evaluated, saved, asked for actions.
        iteration: Rollouts learnt from.
        step: Environment steps in all.
        metrics: Of this iteration, and faults so far, by logged names; those of the update are
            scalars on the device, and reading one waits for it.
    """

    agent: TrainingAgent
    iteration: int
    step: int
    metrics: dict[str, Any]


Callback = Callable[[Iteration], bool | None]


class Trainer:
    """One call of `train`: from where the agent stands to `total_timesteps`.

    Args:
        agent: To train.
        collector: Of its environments; a call that this one goes on from brings its own.
        run: The run's folder.
        total_timesteps: Environment steps at which the run is done, in all.
        before: The checkpoint or the call that this one goes on from; None for a new run.
        callbacks: Called after every iteration; one that returns False stops the run.
        stop: Asked between environment steps, updates and evaluations.
        quiet: Show no progress.
    """

    def __init__(
        self,
        agent: TrainingAgent,
        collector: HostCollector | CompiledCollector | Pool,
        run: Path,
        total_timesteps: int,
        before: Checkpoint | Trainer | None,
        callbacks: Callback | Sequence[Callback],
        stop: Callable[[], bool],
        quiet: bool,
    ):
        self.agent, self.run = agent, run
        config = self.config = agent.config
        self.total_timesteps, self.stop = total_timesteps, stop
        self.callbacks = [callbacks] if callable(callbacks) else list(callbacks)
        self.envs, self.collector = agent.envs, collector
        self.statistics = EpisodeCounter(config.num_envs)
        self.best_score, self.metrics, self.reported = -np.inf, dict[str, Any](), agent.iteration
        self.saved_step, self.given_up, self.skipped_in_a_row = -1, False, 0
        self.states: list[dict[str, Any]] | None = None
        # Environments in programs are checked by nobody else; the others' backends do it.
        compiled = self.envs.compiled is not None
        self.unguarded = compiled and config.on_invalid_data != "off"
        self.health = Health(collector, evaluations=agent.evaluation_faults)
        if isinstance(before, Trainer):
            self.collector, self.statistics = before.collector, before.statistics
            self.health, self.best_score = before.health, before.best_score
            if before.given_up and not self._brought_back(before.states):
                self.statistics.forget()
        elif before is not None:
            self._restore(before)
        else:
            self.collector.reset(config.seed)
        self.first_step, resumed = agent.step, None if before is None else agent.step
        self.writer = MetricsWriter(run, config.tensorboard, config.wandb_project, resumed)
        self.progress = Progress(total_timesteps, agent.step, f"{config.env} {config.algo}", quiet)
        self.split = TimeSplit(FUSED_PARTS if isinstance(collector, FusedLearner) else PARTS)

    def _restore(self, checkpoint: Checkpoint) -> None:
        counters = checkpoint.counters
        if counters.get("best_score") is not None:
            self.best_score = float(counters["best_score"])
        self.health.past.update(counters.get("faults") or {})
        states = checkpoint.documents.get("environments") if self.config.exact_resume else None
        if self.config.exact_resume and states is None:
            _log.warning("%s has no episodes to go on with: others begin", checkpoint.path)
        exact = self._brought_back(states)
        self.collector.sequence = self.agent.iteration
        self.statistics.restore(checkpoint.arrays["episodes"], unfinished=exact)

    def _brought_back(self, states: list[dict[str, Any]] | None) -> bool:
        """Brings the environments back to where they were; if that is not known, False.

        Then other episodes begin than those that the run began with.
        """
        if states is not None:
            self.collector.restore(states)
            return True
        seeds = np.random.SeedSequence([self.config.seed, self.agent.iteration])
        self.collector.reset(int(seeds.generate_state(1)[0]))
        self.agent.forget_episodes()
        return False

    def train(self) -> TrainResult:
        """Runs to the end, or to what stops it, and saves."""
        try:
            status = self.begin()
            while status is None:
                learnt = self.learn()
                status = self.conclude(learnt) if learnt else self.end("stopped")
        finally:
            self.close()
        return self.finish(status)

    def begin(self) -> str | None:
        """Starts the clock; says why the run is over already, or None."""
        self.start = time.monotonic()
        self.steady_start, self.steady_step = self.start, self.agent.step
        if self.agent.step >= self.total_timesteps:
            return self.end("completed")
        return self.end("stop_iterations") if self._made_all_iterations() else None

    def close(self) -> None:
        """Closes what shows and writes the progress."""
        self.progress.close()
        self.writer.close()

    def finish(self, status: str) -> TrainResult:
        """Writes what came out of a run that is over."""
        result = self._result(status)
        if self.saved_step != self.agent.step:
            raise StarlingError(
                f"the run is over ({status}), but its last checkpoint could not be saved in "
                f"{self.run}; the ones before it are intact: make room and resume it"
            )
        try:
            write_json(self.run / "result.json", dataclasses.asdict(result))
        except OSError as error:  # all that counts is in the checkpoint
            _log.error("result.json was not written in %s: %s", self.run, error)
        return result

    def conclude(self, learnt: list[Learnt]) -> str | None:
        """Counts, reports and saves after iterations; says why the run is over, or None.

        Whatever goes wrong here, a callback or an evaluation say, goes up once the run is saved.
        """
        self.split.enter("report")
        try:
            for rollout, _ in learnt:
                self._count(rollout)
            if self.unguarded:
                check_rewards(self.collector, learnt, self.agent.iteration)
            status = self._conclude(last := learnt[-1])
            if self.skipped_in_a_row >= MOST_SKIPPED:
                raise not_learning(last.rollout, self.run, self.skipped_in_a_row, self.config.lr)
        except Exception:
            self._save_unless_saved()
            raise
        return status

    def _conclude(self, last: Learnt) -> str | None:
        agent, config = self.agent, self.config
        before, self.metrics = self.metrics, last.metrics
        if looks_skipped(before):  # of an update that has ended: a healthy run waits for none
            self.skipped_in_a_row = int(agent.state.skipped_in_a_row)
        if agent.iteration % config.log_interval == 0:
            self._report()
        self.progress.update(agent.step, self.statistics.return_mean)
        evaluated = config.eval_interval and agent.iteration % config.eval_interval == 0
        if evaluated and not self._evaluate():
            return self.end("stopped")
        if config.save_interval and agent.iteration % config.save_interval == 0:
            self._save()
        if self.callbacks or self.steady_start == self.start:
            agent.state  # noqa: B018 - waits for metrics that are not there yet, and for compiling
        if self.steady_start == self.start:
            self.steady_start, self.steady_step = time.monotonic(), agent.step
        if self.callbacks:
            known = {**self._progress(), **self.health.counts(), **self.metrics}
            told = Iteration(agent, agent.iteration, agent.step, known)
            answers = [callback(told) for callback in self.callbacks]  # all, also after a stop
            if any(isinstance(answer, bool | np.bool_) and not answer for answer in answers):
                return self.end("callback")
        if self._reached_return():
            return self.end("stop_return")
        if self._made_all_iterations():
            return self.end("stop_iterations")
        if config.max_time is not None and time.monotonic() - self.start >= config.max_time:
            return self.end("max_time")
        return self.end("completed") if agent.step >= self.total_timesteps else None

    def learn(self) -> list[Learnt]:
        """Collects and learns, once or as often as one call of a program may; [] if stopped.

        An environment's failure goes up once the run is saved, as before what is lost by it.
        """
        try:
            return self._learn()
        except Exception:
            if self.agent.step > self.first_step:
                self._save_unless_saved()
            raise

    def _learn(self) -> list[Learnt]:
        agent, collector = self.agent, self.collector
        if isinstance(collector, FusedLearner):
            self.split.enter("fused")
            return [] if self.stop() else collector.learn(agent, self.shares_ahead())
        self.split.enter(collector.activity)
        rollout, states, noise = None, self._states(), agent.sampler.next_table
        try:
            rollout = collector.collect(agent, self.stop)
        finally:
            self.given_up = rollout is None
            if self.given_up and states is not None:
                agent.sampler.rewind(noise)  # who goes on collects it again from its beginning
        if rollout is None:
            return []
        self.split.enter("update")
        learnt = Learnt(rollout, agent.update(rollout, self._share_done(agent.step)))
        self.states = None
        return [learnt]

    def _states(self) -> list[dict[str, Any]] | None:
        """What brings the environments back to where the next rollout begins, if that is asked."""
        if self.states is None and self.config.exact_resume:
            try:
                self.states = self.envs.state()
            except StarlingError as error:  # who resumes has to begin other episodes
                _log.error("the environments' episodes cannot be saved: %s", str(error))
        return self.states

    def _share_done(self, step: int) -> float:
        return min(1.0, step / self.total_timesteps)

    def shares_ahead(self) -> list[float]:
        """Share of the training that is done before each iteration until we are needed again."""
        config, agent, rows = self.config, self.agent, self.config.batch_size
        n = math.ceil((self.total_timesteps - agent.step) / rows)
        for interval in (config.log_interval, config.save_interval, config.eval_interval):
            if interval:
                n = min(n, interval - agent.iteration % interval)
        if config.stop_iterations is not None:
            n = min(n, config.stop_iterations - agent.iteration)
        if self.callbacks or config.stop_return is not None:
            n = 1
        return [self._share_done(agent.step + i * rows) for i in range(n)]

    def end(self, status: str) -> str:
        """Reports and saves for the last time; returns the status."""
        self._report()
        self._save_unless_saved()
        return status

    def _count(self, rollout: Rollout | Ends) -> None:
        step, width = self.agent.step, rollout.rewards.shape[1]
        if isinstance(self.collector, Pool):
            episodes = self.statistics.count_parts(self.collector.taken, step, width)
        else:
            episodes = self.statistics.count(rollout, step)
        self.writer.write_episodes(episodes)
        self.agent.step += self.health.made(rollout)
        self.agent.iteration += 1

    def _made_all_iterations(self) -> bool:
        most = self.config.stop_iterations
        return most is not None and self.agent.iteration >= most

    def _reached_return(self) -> bool:
        target, mean = self.config.stop_return, self.statistics.return_mean
        enough = self.statistics.episodes >= 100  # a few early ones are luck
        return target is not None and mean is not None and enough and mean >= target

    def _progress(self) -> dict[str, Any]:
        """How far the run is, and what its episodes return."""
        elapsed = time.monotonic() - self.start
        fps = (self.agent.step - self.first_step) / max(elapsed, 1e-9)
        return {
            "rollout/ep_rew_mean": self.statistics.return_mean,
            "rollout/ep_len_mean": self.statistics.length_mean,
            "time/fps": fps,
            "time/iterations": self.agent.iteration,
            "time/total_timesteps": self.agent.step,
            "time/time_elapsed": elapsed,
            "perf/frames_per_second": fps * frame_skip(self.envs),
        }

    def _report(self) -> None:
        """Logs the last iteration, unless it is logged already."""
        if self.reported == self.agent.iteration:
            return
        shares, state = self.split.shares(), self.agent.state
        update, counts = jax.device_get((self.metrics, (state.skipped, state.skipped_in_a_row)))
        skipped, self.skipped_in_a_row = map(int, counts)
        logged = {**self._progress(), **update, **shares, **self.health.metrics()}
        if skipped:
            logged["faults/skipped_updates"] = skipped
        self.writer.write(self.agent.step, logged)
        self.progress.update(self.agent.step, self.statistics.return_mean, shares)
        self.reported = self.agent.iteration

    def _evaluate(self) -> bool:
        """Scores the policy, and keeps it if it is the best so far; False if interrupted."""
        result = self.agent.evaluate(self.config.eval_episodes, self.config.seed, stop=self.stop)
        if result is None:
            return False
        self.writer.write(
            self.agent.step,
            {"eval/mean_reward": result.mean_return, "eval/mean_ep_length": result.mean_length},
        )
        if result.mean_return >= self.best_score:
            self.best_score = result.mean_return
            self._save(best=True)
        return True

    def _save_unless_saved(self) -> None:
        if self.saved_step != self.agent.step:
            self._save()

    def _save(self, best: bool = False) -> None:
        """Saves a checkpoint; a full disk costs that checkpoint and nothing else."""
        agent = self.agent
        documents, missing = agent.documents(), ["environments", *agent.left_out]
        if (states := self._states()) is not None:
            documents["environments"], missing = states, missing[1:]
        try:
            save_checkpoint(
                self.run / "checkpoints",
                agent.step,
                {**agent.arrays(), "episodes": self.statistics.state()},
                documents,
                {
                    "iteration": agent.iteration,
                    "step": agent.step,
                    "episodes": self.statistics.episodes,
                    "best_score": None if np.isinf(self.best_score) else self.best_score,
                    "faults": dict(self.health.faults()),
                },
                not_included=missing,
                keep_last=self.config.keep_checkpoints,
                best=best,
            )
            self.saved_step = agent.step
        except OSError as error:
            self.health.past["failed_saves"] += 1
            _log.error("%s; the next save tries again", error)

    def _result(self, status: str) -> TrainResult:
        config, agent, now = self.config, self.agent, time.monotonic()
        steps, steady = agent.step - self.first_step, agent.step - self.steady_step
        mean = self.statistics.return_mean
        return TrainResult(
            env=config.env,
            algo=config.algo,
            seed=config.seed,
            backend=self.envs.backend,
            num_envs=config.num_envs,
            preset=None if config.preset == "none" else config.preset,
            steps=agent.step,
            episodes=self.statistics.episodes,
            wall_time_s=now - self.start,
            steps_per_second=steps / max(now - self.start, 1e-9),
            steady_steps_per_second=steady / max(now - self.steady_start, 1e-9),
            episode_return_mean=mean if mean is not None and math.isfinite(mean) else None,
            status=status,
            run=str(self.run),
        )
