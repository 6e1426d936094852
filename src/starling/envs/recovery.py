"""What becomes of environments that fail: the batch stays whole, and only what was lost is missing.

A step that was lost, because its environment raised, hung, took its process along or gave what no
policy can learn from, ends the episode as a truncation. Its row has reward 0 and the last good
observation as its final one, and it is not valid: nothing is learnt from it, and what came before
it is bootstrapped from the observation that it began with.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starling.envs.buffers import NO_SEED, Buffers
from starling.envs.guards import Guard, Invalid, invalid_error, masked_error
from starling.envs.messages import Infos, both_of
from starling.envs.requests import Answer, Workers
from starling.envs.restarts import Restarts, first_line
from starling.envs.safety import Safety
from starling.envs.seeding import replacement_seed
from starling.errors import StepTimeoutError, UserError, WorkerDiedError, WorkerError
from starling.flags import any_of

_LOOK_AT_MEMORY = 0.1  # seconds between two looks
_WHOLE = [slice(None)]
_RESETS = 5  # that may begin with invalid data before it is an error

_log = logging.getLogger(__name__)


class Recovery:
    """Looks through the answers to every step, and puts right what is wrong.

    Args:
        workers: Of the vector environment.
        buffers: That they write to.
        safety: What to do.
        guard: Looks for invalid data.
        faults: Counters to add to.
        batch_size: Environments that one step delivers.

    Attributes:
        retired: Workers that are gone for good.
        restarts: How often what has failed is tried again.
    """

    def __init__(
        self,
        workers: Workers,
        buffers: Buffers,
        safety: Safety,
        guard: Guard,
        faults: Counter[str],
        batch_size: int,
    ):
        self.retired: set[int] = set()
        self.restarts = Restarts(workers, safety.max_restarts)
        self._all = range(len(workers.rows))
        self._workers, self._rows, self._buffers = workers, workers.rows, buffers
        self._safety, self._guard, self._faults = safety, guard, faults
        self._survives = workers.survives = safety.on_env_error != "raise"
        keeps = self._survives or safety.on_invalid_data == "truncate"
        # What was delivered last, should a step that is under way be lost.
        self._kept = [array.copy() for array in buffers.observations] if keeps else []
        self._envs, self._first = range(len(buffers.rewards)), safety.first_env
        self._dropped = np.zeros(len(self._envs), np.bool_)
        self._any_dropped = False
        self._batch_size, self._next_look = batch_size, 0.0
        self._most_memory = (safety.worker_max_rss or 0) * 2**20
        self._check_memory_limit(self._all)

    def _check_memory_limit(self, new_workers: Sequence[int]) -> None:
        largest = max(map(self._workers.memory_of, new_workers))
        if self._most_memory and largest >= self._most_memory:
            raise UserError(
                f"worker_max_rss is {self._safety.worker_max_rss:g} MB, and a worker process takes "
                f"{largest / 2**20:.0f} MB with its environments just made: allow more"
            )

    # ---- after a step or a reset

    def after_step(self, answers: list[Answer]) -> NDArray[np.bool_] | None:
        """Mends what a step did.

        Args:
            answers: Of the workers that stepped; those that report a failure are replaced.

        Returns:
            bool `[N]`, False where a row is no experience; None if all are.
        """
        lost: set[int] = set()  # every call counts here: all steps pass through
        if self._any_dropped:  # nobody else writes to these rows
            gone = np.flatnonzero(self._dropped).tolist()
            self._buffers.rewards[gone] = 0.0
            self._buffers.terminations[gone] = self._buffers.truncations[gone] = False
            lost.update(gone)
        rows = [self._rows[answer.worker] for answer in answers]
        everyone = len(answers) + len(self.retired) == len(self._all)  # some may retire now
        spans = _WHOLE if everyone else rows
        if self._survives:
            answers[:] = [self._mended(answer, lost) for answer in answers]
        for span in spans:
            self._look_at_data(span, answers, lost)
        if self._most_memory and time.monotonic() >= self._next_look:
            self._recycle(answers)
        self._keep(spans)
        self.restarts.steps += sum(own.stop - own.start for own in rows)
        if not lost:
            return None
        valid = np.ones(len(self._dropped), np.bool_)
        valid[list(lost)] = False
        return valid

    def after_reset(self, answers: list[Answer], mask: NDArray[np.bool_] | None = None) -> None:
        """Mends what a reset did.

        Args:
            answers: Of the workers that reset environments.
            mask: Which environments were to be reset; None: all of them.
        """
        for answer in answers:
            rows = self._rows[answer.worker]
            if answer.failed and mask is not None and not mask[rows].all():
                raise self._workers.give_up(answer.result, "since other episodes were under way")
        if self._survives:
            no_step = set(self._envs)  # is under way that could be lost
            answers[:] = [self._mended(answer, no_step) for answer in answers]
        for invalid in self._guard.find(self._buffers.observations):
            self._count("invalid_data")
            if self._guard.policy in ("raise", "truncate"):
                raise self._invalid(invalid, invalid.row)
            self._guard.replace(self._buffers.observations, None, invalid.row)
        self._keep([slice(None)])

    def check_masks(self, masks: np.ndarray, workers: Sequence[int]) -> None:
        """Raises if an environment of some workers allows no action at all.

        Args:
            masks: bool `[B, choices]`, of these environments.
            workers: Whose they are.
        """
        row = self._guard.check_masks(masks)
        if row is not None:
            env = [env for w in workers for env in _range(self._rows[w])][row]
            self._workers.trouble = "an environment allows no action; call reset(), or close()"
            raise masked_error(self._first + env, **self._workers.where(env))

    def _keep(self, spans: Iterable[slice]) -> None:
        for rows in spans if self._kept else ():
            for kept, now in zip(self._kept, self._buffers.observations, strict=True):
                kept[rows] = now[rows]

    # ---- failures

    def _mended(self, answer: Answer, lost: set[int]) -> Answer:
        infos = answer.result
        if answer.failed:
            infos = self._replace_worker(answer.worker, answer.result, lost)
        elif infos is not None and infos.failed:
            infos = self._replace_envs(answer.worker, infos, lost)
        return answer._replace(result=infos, failed=False)

    def _begun(self, answer: Answer, reset: Callable[[], Infos | None], lost: set[int]) -> Answer:
        """An answer to a step with what a reset adds, which may fail as any other does."""
        try:
            result, failed = reset(), False
        except WorkerError as error:
            if not self._survives:
                self._workers.trouble = "an environment failed; call reset(), or close()"
                raise
            result, failed = error, True
        begun = self._mended(Answer(answer.worker, 0, result, failed), lost)
        return answer._replace(result=both_of(answer.result, begun.result))

    def _replace_worker(self, w: int, error: WorkerError, lost: set[int]) -> Infos:
        own = _range(self._rows[w])
        self._lose(own, lost)
        if self._safety.on_env_error == "restart":
            return self._restart(w, None, [error], lost)
        self._count_failures([error])
        self.retired.add(w)
        self._drop(own, error)
        return Infos([], [], [])

    def _replace_envs(self, w: int, infos: Infos, lost: set[int]) -> Infos:
        first, ended = self._rows[w].start, self._buffers.terminations | self._buffers.truncations
        failed, errors = zip(*infos.failed, strict=True)
        # Where only the reset failed that follows an episode's end, the step itself is whole.
        self._lose([first + i for i in failed if not ended[first + i]], lost)
        if self._safety.on_env_error == "restart":
            return both_of(infos, self._restart(w, failed, errors, lost)) or infos
        self._count_failures(errors)
        for i, error in infos.failed:
            self._drop([first + i], error)
        try:
            self._workers.ask(w, "drop", (failed,))
        except (WorkerDiedError, StepTimeoutError) as death:
            return self._replace_worker(w, death, lost)
        return infos._replace(failed=[])

    def _lose(self, envs: Iterable[int], lost: set[int]) -> None:
        """Makes the rows of environments those of a step that was lost."""
        buffers, new = self._buffers, [env for env in envs if env not in lost]
        lost.update(new)
        self._count("lost_steps", len(new))
        buffers.rewards[new] = 0.0
        buffers.terminations[new], buffers.truncations[new] = False, True
        for final, kept in zip(buffers.final_observations, self._kept, strict=True):
            final[new] = kept[new]

    def _drop(self, envs: Iterable[int], error: WorkerError) -> None:
        buffers, new = self._buffers, [env for env in envs if not self._dropped[env]]
        self._count("dropped_envs", len(new))
        self._dropped[new] = buffers.action_masks[new] = self._any_dropped = True
        for now, kept in zip(buffers.observations, self._kept, strict=True):
            now[new] = kept[new]
        left = len(self._dropped) - int(self._dropped.sum())
        if left == 0:
            raise self._workers.give_up(error, "since no environment is left")
        living = sum(len(_range(self._rows[w])) for w in set(self._all) - self.retired)
        if living < self._batch_size < len(self._dropped):
            raise self._workers.give_up(error, f"with fewer left than a batch ({self._batch_size})")
        where = f"{left} of environments {self._first} to {self._first + len(self._envs) - 1}"
        _log.warning("%s; %s are left", first_line(error), where)

    def _restart(
        self,
        w: int,
        indices: Sequence[int] | None,
        errors: Sequence[WorkerError],
        lost: set[int],
    ) -> Infos:
        """Makes environments of a worker anew, or the worker itself, until that succeeds.

        Args:
            w: The worker.
            indices: Environments in it; None for the worker and all of its environments.
            errors: Why.
            lost: Environments whose step is lost, to add to.
        """
        mended = Infos([], [], [])
        for attempt in itertools.count():
            self._count_failures(errors)
            self.restarts.admit(errors, attempt)
            try:
                if indices is None:
                    infos, mended = self._new_worker(w), Infos([], [], [])
                else:
                    seeds = self._fresh_seeds(w, indices)
                    infos = self._workers.ask(w, "rebuild", (indices, seeds))
            except WorkerError as error:  # the worker was lost, or a new one could not be made
                indices, errors = None, [error]
                self._lose(_range(self._rows[w]), lost)
                continue
            infos = infos or Infos([], [], [])
            failed = [i for i, _ in infos.failed]
            self._faults["restarts"] += 1 if indices is None else len(indices) - len(failed)
            mended = both_of(mended, infos) or mended
            if not failed:
                return mended
            indices, errors = failed, [error for _, error in infos.failed]
        raise AssertionError("too many restarts end this")

    def _new_worker(self, w: int) -> Infos | None:
        """Starts a worker in the place of another, and resets its environments."""
        rows = self._rows[w]
        seeds = self._fresh_seeds(w, range(rows.stop - rows.start))
        self._workers.respawn(w)
        gone = np.flatnonzero(self._dropped[rows]).tolist()
        if gone:
            self._workers.ask(w, "drop", (gone,))
        return self._workers.ask(w, "reset", (seeds, None, None))

    def _fresh_seeds(self, w: int, indices: Sequence[int]) -> list[int]:
        envs = [self._rows[w].start + i for i in indices]
        seeds = self._seeds_after(envs)
        told = [self._first + env for env in envs]
        _log.warning("environments %s begin anew, with seeds %s", told, seeds)
        return seeds

    def _seeds_after(self, envs: Sequence[int]) -> list[int]:
        """Seeds that follow from those the environments had, whoever steps them."""
        before = self._buffers.seeds[envs].tolist()
        return [replacement_seed(None if seed == NO_SEED else seed) for seed in before]

    # ---- workers that are lost while idle

    def state_of(self, w: int) -> list[dict[str, Any]]:
        """The state of a lost worker's environments: that in which they will begin anew."""
        seeds = self._seeds_after(_range(self._rows[w]))
        return [{"seed": seed, "episode": 0, "actions": []} for seed in seeds]

    def revive(self) -> None:
        """Puts new workers in the place of lost ones, whose environments are about to be reset."""
        for w in set(self._workers.losses) - self.retired:
            self._restart(w, None, [self._workers.losses[w]], set(self._envs))

    # ---- invalid data

    def _look_at_data(self, rows: slice, answers: list[Answer], lost: set[int]) -> None:
        buffers, first = self._buffers, rows.start or 0
        whole = rows.stop is None
        observations = [a if whole else a[rows] for a in buffers.observations]
        for invalid in self._guard.find(observations, buffers.rewards[rows]):
            env = first + invalid.row
            dropped = self._dropped[env]
            if dropped and env in lost:  # with the worker of one before it in this list
                continue
            self._treat(invalid, env, buffers.observations)
            if self._guard.policy == "truncate":
                self._lose([env], lost)
                if not dropped:  # as one is that failed in the reset after this step
                    self._begin_another_episode(env, answers, lost)
        if not any_of(buffers.truncations):
            return
        cut = np.flatnonzero(buffers.truncations[rows] & ~buffers.terminations[rows]) + first
        if len(cut):  # learning will look at how these episodes ended
            for invalid in self._guard.find([array[cut] for array in buffers.final_observations]):
                env = int(cut[invalid.row])
                self._treat(invalid, env, buffers.final_observations)
                if self._guard.policy == "truncate":
                    self._lose([env], lost)

    def _treat(self, invalid: Invalid, env: int, observations: Sequence[np.ndarray]) -> None:
        self._count("invalid_data")
        if self._guard.policy == "raise":
            self._workers.trouble = "an environment gave invalid data; call reset(), or close()"
            raise self._invalid(invalid, env)
        if self._guard.policy == "replace":
            self._guard.replace(observations, self._buffers.rewards, env)

    def _invalid(self, invalid: Invalid, env: int) -> WorkerError:
        others = f"replace{', truncate' * (self._guard.policy == 'raise')} or off"
        return invalid_error(invalid, self._first + env, others, **self._workers.where(env))

    def _begin_another_episode(self, env: int, answers: list[Answer], lost: set[int]) -> None:
        k = next(k for k, a in enumerate(answers) if env in _range(self._rows[a.worker]))
        w, rows = answers[k].worker, self._rows[answers[k].worker]
        mask = np.arange(rows.start, rows.stop) == env
        seeds = [None] * len(mask)
        found: list[Invalid] = []
        for _ in range(_RESETS):
            answers[k] = self._begun(
                answers[k], lambda: self._workers.ask(w, "reset", (seeds, None, mask)), lost
            )
            found = self._guard.find([array[env : env + 1] for array in self._buffers.observations])
            if not found:
                return
        self._workers.trouble = "an environment gave invalid data; call reset(), or close()"
        raise self._invalid(found[0], env)

    # ---- memory

    def _recycle(self, answers: list[Answer]) -> None:
        """Puts new workers in the place of those that have grown too large."""
        self._next_look = time.monotonic() + _LOOK_AT_MEMORY
        for k, answer in enumerate(answers):
            w = answer.worker
            size = self._workers.memory_of(w)
            if size < self._most_memory:
                continue
            megabytes = f"{size / 2**20:.0f} MB, of {self._safety.worker_max_rss:g} MB allowed"
            who = self._workers.envs_of(w)
            _log.warning("%s takes %s: another takes its place", who, megabytes)
            buffers, own = self._buffers, _range(self._rows[w])
            over = self._dropped | buffers.terminations | buffers.truncations
            cut = [env for env in own if not over[env]]
            buffers.truncations[cut] = True
            for final, now in zip(buffers.final_observations, buffers.observations, strict=True):
                final[cut] = now[cut]
            whole = set(own)  # steps, whatever comes after them
            answers[k] = self._begun(answer, functools.partial(self._new_worker, w), whole)
            if w not in self.retired:
                self._count("recycled_workers")
                self._check_memory_limit([w])

    # ---- counting and telling

    def _count(self, fault: str, times: int = 1) -> None:
        if times:
            self._faults[fault] += times

    def _count_failures(self, errors: Iterable[WorkerError]) -> None:
        for error in errors:
            timeout, death = isinstance(error, StepTimeoutError), isinstance(error, WorkerDiedError)
            self._count("timeouts" if timeout else "worker_deaths" if death else "env_errors")


def _range(rows: slice) -> range:
    return range(rows.start, rows.stop)
