"""Experience to learn from again and again: rollouts go in, random transitions come out."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from starling.errors import CheckpointError, UserError
from starling.storage.batch import Batch, map_batches
from starling.storage.replay_rings import Change, Rings
from starling.storage.rollout import Rollout, Tree
from starling.storage.sequences import Sequences, read_sequences
from starling.storage.sum_tree import SumTree

_WORD = (1 << 64) - 1


class Replay:
    """The newest transitions of N environments.

    Memory is taken at the first rollout. Each observation is stored once: what a step led to is the
    observation of the row after it, and only the true final observations of truncated episodes are
    kept beside. Rollouts of one environment follow one another; call `cut` where environments were
    reset in between.

    With priorities, transition i is drawn with the probability P(i) = p_i^alpha / sum_j p_j^alpha,
    in strata (Schaul et al. 2016, arXiv:1511.05952, section 3.3), and weighted with
    (size P(i))^-beta, divided by the largest weight of its batch as in the paper's algorithm 1.
    The largest of the whole replay instead would follow from one small priority that is hardly
    ever drawn, and shrink every update; the price is that a transition's weight differs a little
    from batch to batch.

    It is for one thread at a time; `SharedReplay` is for several.

    Args:
        capacity: Transitions to keep.
        num_envs: N.
        n_step: Rewards that are summed, at most.
        gamma: Discount.
        prioritized: Draw by priority rather than all alike.
        alpha: How much priorities count: 0 is uniform, 1 is proportional.
        frame_stack: Number of frames S in image observations `[S, height, width, ...]`, newest
            last, which are then stored frame by frame. None stores observations as they are.
        seed: Of the draws.

    Attributes:
        inserted: Transitions that could be sampled, ever.
        sampled: Transitions that were, ever.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        *,
        n_step: int = 1,
        gamma: float = 0.99,
        prioritized: bool = False,
        alpha: float = 0.6,
        frame_stack: int | None = None,
        seed: int = 0,
    ):
        if min(num_envs, n_step) < 1 or (frame_stack is not None and frame_stack < 2):
            raise UserError(
                f"num_envs {num_envs}, n_step {n_step} and frame_stack {frame_stack} cannot be "
                "had: the first two are at least 1, and frame_stack is at least 2 or None"
            )
        if not (0 <= gamma <= 1 and 0 <= alpha <= 1):
            raise UserError(f"gamma {gamma} and alpha {alpha} have to lie between 0 and 1")
        self._settings = {
            "capacity": capacity,
            "num_envs": num_envs,
            "n_step": n_step,
            "gamma": gamma,
            "prioritized": prioritized,
            "alpha": alpha if prioritized else 0,
            "frame_stack": frame_stack or 0,
        }
        self.num_envs, self.prioritized, self.alpha = num_envs, prioritized, alpha
        self.inserted = self.sampled = 0
        tree_bytes = SumTree.LEAF_BYTES if prioritized else 0
        self._rings = Rings(capacity, num_envs, n_step, gamma, frame_stack, tree_bytes)
        self._tree: SumTree | None = None
        self._given = np.full((num_envs, n_step), np.nan)  # priorities of the newest rows, if any
        self._largest = 1.0
        self._random = np.random.default_rng(seed)
        self._size = 0
        self._listed: np.ndarray | None = None

    def __len__(self) -> int:
        """Transitions that can be sampled."""
        return self._size

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._rings.nbytes + (0 if self._tree is None else self._tree.nbytes)

    @property
    def rows_per_env(self) -> int:
        """Rows of the ring of each environment."""
        return self._rings.rows_per_env

    @property
    def total(self) -> float:
        """What draws are in proportion to: the sum of all p^alpha, or without priorities `len`."""
        if not self.prioritized:
            return self._size
        return 0.0 if self._tree is None else self._tree.total

    def check_memory(self, observations: Tree, actions: Tree, available: int | None = None) -> None:
        """Looks whether it can keep such rows, and has the memory, before there is any of them.

        Args:
            observations: Rows `[T, N, ...]` like those that will come.
            actions: The same.
            available: Bytes that are free where it will be; if None, those that are free here.

        Raises:
            UserError: There is too little memory, and the message has the arithmetic; or there are
                no images of `frame_stack` frames.
        """
        self._rings.check_memory(observations, actions, available)

    def add(self, rollout: Rollout, *, first_env: int = 0) -> int:
        """Copies a rollout in, over the oldest rows where the replay is full.

        Args:
            rollout: Of T steps, of all N environments, or of some that always come together; its
                transitions get the largest priority so far where it has none.
            first_env: The first environment of these.

        Returns:
            How many transitions can now be sampled in addition. The last n - 1 steps of an episode
            that goes on are not among them, until the steps after them are there; nor, with action
            masks, is the one before, until it is known what is allowed next.

        Raises:
            UserError: Something does not fit; nothing was added.
        """
        steps, envs = np.shape(rollout.rewards)
        given = np.full((envs, steps), np.nan)
        if rollout.priorities is not None:
            given = self._checked(rollout.priorities, (steps, envs), rollout.valid).T
        change = self._rings.add(rollout, first_env)
        if self.prioritized and self._tree is None:
            self._tree = SumTree(self._rings.num_slots)
        return self._change(change, given, first_env)

    def cut(self, first_env: int = 0, num_envs: int | None = None) -> int:
        """Says that environments begin anew: what they did last is a truncated episode's end.

        Args:
            first_env: The first environment.
            num_envs: How many; all if None.

        Returns:
            How many transitions can now be sampled in addition.
        """
        envs = self.num_envs if num_envs is None else num_envs
        change = self._rings.cut(first_env, envs)
        return 0 if change is None else self._change(change, np.full((envs, 1), np.nan), first_env)

    def sample(self, batch_size: int, num_batches: int = 1, beta: float = 0.4) -> Batch:
        """Draws transitions, with replacement.

        Args:
            batch_size: B.
            num_batches: K.
            beta: How far importance weights make up for priorities: 0 not at all, 1 wholly.

        Raises:
            UserError: A batch is larger than what there is.
        """
        if not 0 < batch_size <= self._size:
            raise UserError(
                f"a batch of {batch_size} transitions cannot be drawn from the {self._size} that "
                "can be sampled: collect more before learning, or lower the batch size"
            )
        shape = (num_batches, batch_size)
        drawn = self.draw(self.places(shape).ravel())
        weights = np.ones(shape, np.float32)
        if self.prioritized:
            weights = importance_weights(drawn.weights.reshape(shape), self._size, beta)
        batch = map_batches(lambda x: x.reshape(*shape, *x.shape[1:]), drawn)
        return batch._replace(weights=weights)

    def sample_sequences(self, batch_size: int, length: int) -> Sequences:
        """Draws steps that follow one another, for policies that remember, with replacement.

        Every transition that can be sampled is equally likely to be the first of a sequence,
        whatever its priority; `n_step` means nothing here.

        Args:
            batch_size: B.
            length: L, steps of a sequence at most; fewer where its episode ends before.

        Raises:
            UserError: There is nothing to draw from, or one of the numbers is not positive.
        """
        if min(batch_size, length, self._size) < 1:
            raise UserError(
                f"{batch_size} sequences of {length} steps cannot be drawn from the {self._size} "
                "transitions that can be sampled: give numbers above 0, and collect before learning"
            )
        slots = self._at(self._random.random(batch_size))
        sequences = read_sequences(self._rings, slots, length)
        self.sampled += int(sequences.valid.sum())
        return sequences

    def places(self, shape: tuple[int, int]) -> np.ndarray:
        """Draws places for `draw`, `[K, B]` in [0, 1): with priorities in B strata."""
        places = self._random.random(shape)
        return (np.arange(shape[1]) + places) / shape[1] if self.prioritized else places

    def draw(self, places: np.ndarray) -> Batch:
        """The transitions at some places of all that there are.

        Args:
            places: `[M]` in [0, 1), as shares of `total`. Where all of these are equally likely,
                transitions are drawn in proportion to p^alpha, or all alike.

        Returns:
            M of them, not in batches, with their probabilities P(i) in place of weights.
        """
        self.sampled += len(places)
        if self._tree is None:
            return self._rings.read(self._at(places), np.full(len(places), 1.0 / self._size))
        slots = self._tree.find(places * self._tree.total)
        return self._rings.read(slots, self._tree.get(slots) / self._tree.total)

    def set_priorities(self, indices: np.ndarray, priorities: np.ndarray) -> None:
        """Gives transitions new priorities; those that have been written over are ignored.

        Args:
            indices: As in `Batch.indices`, of any shape.
            priorities: Positive, of the same shape. Of an index that comes twice the last counts.
        """
        indices = np.asarray(indices)
        priorities = self._checked(priorities, indices.shape, None).ravel()
        if self._tree is None:  # nothing has been added yet
            return
        slots, there = self._rings.find(indices.ravel())
        if there.any():
            self._largest = max(self._largest, float(priorities[there].max()))
            self._tree.set(slots[there], priorities[there] ** self.alpha)

    def _checked(
        self, priorities: np.ndarray, shape: tuple[int, ...], valid: np.ndarray | None
    ) -> np.ndarray:
        if not self.prioritized:
            raise UserError("priorities were given to a replay without: make it with prioritized")
        priorities = np.array(priorities, np.float64)
        if priorities.shape != shape:
            raise UserError(f"priorities have shape {priorities.shape} and not {shape}")
        bad = ~((priorities > 0) & np.isfinite(priorities))
        if valid is not None:
            bad &= np.asarray(valid, np.bool_)
        if bad.any():
            raise UserError(
                f"{priorities[bad][0]} is no priority: it has to be positive and finite, such as "
                "an absolute error plus 1e-6"
            )
        return priorities

    def _change(self, change: Change, given: np.ndarray, first_env: int) -> int:
        """Counts what came and went, and gives it priorities."""
        added = len(change.complete)
        self._size += added - len(change.retired)
        self.inserted += added
        self._listed = None
        if self._tree is not None:
            block = slice(first_env, first_env + len(given))
            given = np.concatenate([self._given[block], given], 1)
            self._given[block] = given[:, -self._given.shape[1] :]
            given = given[:, given.shape[1] - change.fresh.shape[1] :][change.fresh]
            known = ~np.isnan(given)
            self._largest = max(self._largest, given[known].max(initial=0.0))
            weights = np.where(known, given, self._largest) ** self.alpha
            # In one pass, since a slot may be in both.
            slots = np.concatenate([change.retired, change.complete])
            self._tree.set(slots, np.concatenate([np.zeros(len(change.retired)), weights]))
        return added

    def _at(self, places: np.ndarray) -> np.ndarray:
        """Slots `[M]`, all that can be sampled being equally likely."""
        lengths, rows = self._rings.lengths, self.num_envs * self._rings.filled
        if self._size * 8 < rows:
            # Most guesses would be in vain: choose from a list.
            if self._listed is None:
                self._listed = np.flatnonzero(lengths)
            return self._listed[(places * self._size).astype(np.int64)]
        slots = self._slots_of((places * rows).astype(np.int64))
        while len(vain := np.flatnonzero(lengths[slots] == 0)):
            slots[vain] = self._slots_of(self._random.integers(rows, size=len(vain)))
        return slots

    def _slots_of(self, written: np.ndarray) -> np.ndarray:
        """Slots of rows by their numbers among those that have been written."""
        filled, rows_per_env = self._rings.filled, self._rings.rows_per_env
        if filled == rows_per_env:
            return written
        envs, rows = np.divmod(written, filled)
        return envs * rows_per_env + rows

    # ---- keeping it

    def state(self) -> dict[str, np.ndarray]:
        """Everything as a flat group of arrays for a checkpoint.

        Large ones may be views, which the next `add` changes.
        """
        state = self._rings.state()
        state["settings"] = np.array(list(self._settings.values()), np.float64)
        state["counters"] = np.array([self.inserted, self.sampled], np.int64)
        state["random"] = _words_of(self._random)
        if self._tree is not None:
            state["weights"] = self._tree.get(np.flatnonzero(self._rings.lengths))
            state["given"], state["largest"] = self._given, np.array([self._largest])
        return state

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes over what `state` gave: contents, counters and the next samples.

        Args:
            state: Its arrays are copied.

        Raises:
            CheckpointError: The replay was made with other settings.
            ValueError: Something is in this replay already.
        """
        if self._rings.nbytes:
            raise ValueError("a replay is restored before anything is added to it")
        saved = dict(zip(self._settings, state["settings"].tolist(), strict=True))
        differ = [
            f"{name} {saved[name]:g} there and {value:g} here"
            for name, value in self._settings.items()
            if saved[name] != value
        ]
        if differ:
            raise CheckpointError(
                f"the checkpoint's replay does not fit: {', '.join(differ)}; keep the settings, or "
                "leave it aside (save_replay False) and begin with an empty one"
            )
        self._rings.restore(state)
        self.inserted, self.sampled = map(int, state["counters"])
        _set_words(self._random, state["random"])
        live = np.flatnonzero(self._rings.lengths) if self._rings.nbytes else ()
        self._size = len(live)
        if "weights" in state:
            self._tree = SumTree(self._rings.num_slots)
            self._tree.set(np.asarray(live), state["weights"])
            self._given[:], self._largest = state["given"], float(state["largest"][0])


def importance_weights(probabilities: np.ndarray, size: int, beta: float) -> np.ndarray:
    """Weights (size P(i))^-beta, divided by the largest of each batch, `[K, B]` float32.

    Args:
        probabilities: `[K, B]`, P(i) of the transitions that were drawn.
        size: Transitions that there were to draw from.
        beta: How far they make up for unequal probabilities.
    """
    weights = (probabilities * size) ** -beta
    return (weights / weights.max(1, keepdims=True)).astype(np.float32)


def _words_of(random: np.random.Generator) -> np.ndarray:
    """State of a generator, `[6]` uint64."""
    state = random.bit_generator.state
    words = [w for n in state["state"].values() for w in (n >> 64, n & _WORD)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], np.uint64)


def _set_words(random: np.random.Generator, words: np.ndarray) -> None:
    s1, s0, i1, i0, has, spare = map(int, words)
    random.bit_generator.state = {
        "bit_generator": "PCG64",
        "state": {"state": s1 << 64 | s0, "inc": i1 << 64 | i0},
        "has_uint32": has,
        "uinteger": spare,
    }
