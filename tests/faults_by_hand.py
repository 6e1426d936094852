"""What becomes of environments that fail, by the documented rules and a plain loop over each."""

from __future__ import annotations

from collections import Counter

import numpy as np

from starling.envs.seeding import child_seeds, replacement_seed


def flat(observation):
    """The leaves of an observation, as arrays."""
    if isinstance(observation, dict):
        return [leaf for key in sorted(observation) for leaf in flat(observation[key])]
    if isinstance(observation, tuple):
        return [leaf for part in observation for leaf in flat(part)]
    return [np.asarray(observation)]


def moments(factory, seed, actions, on_env_error, on_invalid_data):
    """What one environment gives after its reset and after each step.

    Yields:
        Observation; reward, terminated, truncated and valid; final observation; faults so far.
    """
    env, faults, dropped = factory(), Counter(), False
    last = [np.zeros_like(leaf) for leaf in flat(env.observation_space.sample())]

    def begin(new_seed=None, restarts=0):
        try:
            first = flat(env.reset(seed=new_seed)[0])
        except ValueError:
            return begin_after_failure()
        faults["restarts"] += restarts
        return first

    def begin_after_failure():
        nonlocal env, seed, dropped
        faults["env_errors"] += 1
        if on_env_error == "drop":
            faults["dropped_envs"] += 1
            dropped = True
            return last
        env, seed = factory(), replacement_seed(seed)
        return begin(seed, restarts=1)

    last = begin(seed)
    yield last, [0, False, False, True], None, +faults
    for action in actions:
        if dropped:
            yield last, [0, False, False, False], None, +faults
            continue
        final, lost = None, False
        try:
            observation, reward, terminated, truncated, _ = env.step(action)
        except ValueError:
            lost, observation = True, begin_after_failure()
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
        last = observation
        yield last, [reward, terminated, truncated, not lost], final, +faults


def nearest(observation):
    """With what `any_spaces` allow in the place of infinity."""
    return [np.asarray(np.nan_to_num(leaf, posinf=9)) for leaf in observation]


def steps_by_hand(factory, seed, actions, on_env_error, on_invalid_data):
    """What several environments give, until none is left.

    Args:
        factory: Of one environment.
        seed: Of all.
        actions: `[T, N]`.
        on_env_error: `restart` or `drop`.
        on_invalid_data: `replace`, `truncate` or `off`.

    Returns:
        For each of up to T + 1 moments what each environment gave, and the faults so far.
    """
    rules = on_env_error, on_invalid_data
    children = child_seeds(seed, actions.shape[1])
    lives = [
        moments(factory, child, own, *rules) for child, own in zip(children, actions.T, strict=True)
    ]
    steps = []
    for given in zip(*lives, strict=True):
        faults = sum((own for *_, own in given), Counter())
        if faults["dropped_envs"] == len(lives):
            break
        steps.append(([tuple(one) for *one, _ in given], faults))
    return steps
