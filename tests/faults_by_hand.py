"""What becomes of environments that fail, by the documented rules and a plain loop over each."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np

from starling.envs.seeding import child_seeds, replacement_seed
from starling.errors import WorkerDiedError


def flat(observation):
    """The leaves of an observation, as arrays."""
    if isinstance(observation, dict):
        return [leaf for key in sorted(observation) for leaf in flat(observation[key])]
    if isinstance(observation, tuple):
        return [leaf for part in observation for leaf in flat(part)]
    return [np.asarray(observation)]


def moments(factory, seed, actions, on_env_error, on_invalid_data):
    """What one environment gives after its reset and after each step.

    It is sent whether its worker dies in the next step.

    Yields:
        Observation; reward, terminated, truncated and valid; final observation; faults so far;
        whether the next step kills the worker.
    """
    env, faults, dropped = factory(), Counter(), False
    last = [np.zeros_like(leaf) for leaf in flat(env.observation_space.sample())]

    def begin(new_seed=None, restarts=0):
        try:
            first = flat(env.reset(seed=new_seed)[0])
        except ValueError:
            return begin_anew()
        faults["restarts"] += restarts
        return first

    def begin_anew(failures=1):
        nonlocal env, seed, dropped
        faults["env_errors"] += failures
        if on_env_error == "drop":
            faults["dropped_envs"] += 1
            dropped = True
            return last
        env, seed = factory(), replacement_seed(seed)
        return begin(seed, restarts=failures)

    last = begin(seed)
    dies = yield last, [0, False, False, True], None, +faults, env.doomed
    for action in actions:
        if dropped:
            dies = yield last, [0, False, False, False], None, +faults, False
            continue
        final, lost = None, False
        try:
            if dies:
                raise WorkerDiedError("with whatever it had done in this step")
            observation, reward, terminated, truncated, _ = env.step(action)
        except WorkerDiedError:
            lost, observation = True, begin_anew(failures=0)  # it counts once for its worker
        except ValueError:
            lost, observation = True, begin_anew()
        else:
            observation, ended = flat(observation), terminated or truncated
            # Nobody learns from the observation that a terminated episode ends with.
            seen = [] if terminated else [x for x in observation if x.dtype.kind == "f"]
            paid = bool(np.isfinite(reward))
            if on_invalid_data != "off" and not (paid and all(np.isfinite(x).all() for x in seen)):
                faults["invalid_data"] += 1
                lost = on_invalid_data == "truncate"
                if not lost:
                    reward = reward if paid else 0.0
                    observation = observation if terminated else nearest(observation)
            if ended:
                final, observation = observation, begin()
            if lost and not (ended and paid) and not dropped:  # a bad reward costs the next, too
                observation = begin()
        if lost:
            faults["lost_steps"] += 1
            reward, terminated, truncated, final = 0.0, False, True, last
        last, row = observation, [reward, terminated, truncated, not lost]
        dies = yield last, row, final, +faults, env.doomed and not dropped


def nearest(observation):
    """With what `any_spaces` allow in the place of infinity."""
    return [np.asarray(np.nan_to_num(leaf, posinf=9)) for leaf in observation]


def steps_by_hand(factory, seed, actions, on_env_error, on_invalid_data, workers=1):
    """What several environments give, until none is left.

    Args:
        factory: Of one environment.
        seed: Of all.
        actions: `[T, N]`.
        on_env_error: `restart` or `drop`.
        on_invalid_data: `replace`, `truncate` or `off`.
        workers: That share them; one that dies takes all of its environments along.

    Returns:
        For each of up to T + 1 moments what each environment gave, and the faults so far.
    """
    rules, n = (on_env_error, on_invalid_data), actions.shape[1]
    lives = [
        moments(factory, child, own, *rules)
        for child, own in zip(child_seeds(seed, n), actions.T, strict=True)
    ]
    bounds = [round(w * n / workers) for w in range(workers + 1)]
    steps, deaths, dying = [], Counter(), [None] * n
    for _ in range(len(actions) + 1):
        given = [life.send(dies) for life, dies in zip(lives, dying, strict=True)]
        faults = sum((own for *_, own, _ in given), deaths)
        if faults["dropped_envs"] == n:
            break
        steps.append(([tuple(one) for *one, _, _ in given], faults))
        dying = []
        for start, stop in pairwise(bounds):
            dies = any(doomed for *_, doomed in given[start:stop])
            dying += [dies] * (stop - start)
            deaths["worker_deaths"] += dies
            deaths["restarts"] += dies and on_env_error == "restart"
    return steps
