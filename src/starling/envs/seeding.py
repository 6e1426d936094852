"""Seeds: one number in, an independent stream for every environment and episode out.

Seeds are below 2**31, because EnvPool, ALE and many users' environments take no larger ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from starling.errors import UserError

_REPLACEMENT = 1 << 31  # no episode has this number


def child_seeds(seed: int | None, n: int) -> list[int]:
    """Gives each of `n` environments a seed of its own, all of them different.

    Environment i's seed does not depend on `n`. `None` draws fresh entropy.
    """
    if seed is not None and seed < 0:
        raise UserError(f"seed {seed} is negative; give a whole number from 0 up")
    entropy = np.random.SeedSequence(seed).entropy
    taken: dict[int, None] = {}
    for i in range(n):
        words = 1
        while (child := _last_word(entropy, i, words)) in taken:
            words += 1
        taken[child] = None
    return list(taken)


def episode_seed(child_seed: int, episode: int) -> int:
    """Seed of an environment's episode, counted from 0."""
    return _last_word(child_seed, episode, 1)


def replacement_seed(seed: int | None) -> int:
    """Seed of an environment that takes the place of one whose seed was `seed`."""
    return _last_word(np.random.SeedSequence(seed).entropy, _REPLACEMENT, 1)


def _last_word(entropy: int | Sequence[int] | None, key: int, words: int) -> int:
    sequence = np.random.SeedSequence(entropy, spawn_key=(key,))
    return int(sequence.generate_state(words)[-1] >> 1)
