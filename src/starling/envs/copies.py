"""How environments and what makes them travel; copies of one share no random stream.

The pickle never leaves memory: it goes to workers of this process, and nowhere else.
"""

from __future__ import annotations

import io
import pickle
import random
from typing import Any

import cloudpickle
import numpy as np

from starling.errors import UserError


def pack(env: Any) -> bytes:
    """Pickles an environment for `unpack`, lambdas and classes of the main script included."""
    file = io.BytesIO()
    _SeparatingPickler(file).dump(env)
    return file.getvalue()


def unpack(pickled: bytes, index: int) -> Any:
    """Makes copy number `index`.

    Every random generator in it, however deep, has a stream that belongs to the index and follows
    from the state of the generator that was copied.
    """
    return _SeparatingUnpickler(io.BytesIO(pickled), index).load()


def pack_factories(work: Any, worker: str, instead: str) -> bytes:
    """Pickles what a worker makes its environments from.

    Args:
        work: Factories, with what belongs to them.
        worker: Who is to have it, for the message.
        instead: What can do without.

    Raises:
        UserError: It cannot be pickled.
    """
    try:
        return cloudpickle.dumps(work)
    except Exception as error:
        raise UserError(
            f"the environment factory cannot be sent to {worker} ({error}); let it make what it "
            f"needs inside itself, or use {instead}"
        ) from error


class _SeparatingPickler(cloudpickle.Pickler):
    """Pickles random generators apart, so that loading can tell them from the rest."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, np.random.Generator | np.random.RandomState | random.Random):
            return id(obj), pickle.dumps(obj)
        return None


class _SeparatingUnpickler(pickle.Unpickler):
    """Loads an environment for place `index`: its generators differ from those of all others."""

    def __init__(self, file: io.BytesIO, index: int):
        super().__init__(file)
        self._index = index
        self._loaded: dict[int, Any] = {}

    def persistent_load(self, pid: tuple[int, bytes]) -> Any:
        identity, pickled = pid
        if identity not in self._loaded:
            self._loaded[identity] = _separated(pickle.loads(pickled), self._index)
        return self._loaded[identity]


def _separated(generator: Any, index: int) -> Any:
    if isinstance(generator, random.Random):
        generator.seed(f"{generator.random()} {index}")
        return generator
    words = generator.bytes(32)  # follows from the generator's state, so copies repeat
    seeds = np.random.SeedSequence(int.from_bytes(words, "little"), spawn_key=(index,))
    if isinstance(generator, np.random.RandomState):
        return np.random.RandomState(np.random.MT19937(seeds))
    return np.random.Generator(type(generator.bit_generator)(seeds))
