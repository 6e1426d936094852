"""Which device the networks compute on, and how its runtime is set up."""

from __future__ import annotations

import os
from typing import Any

import jax

from starling.errors import UserError

# Multiplications of a minibatch, forward and backward, under which one thread is faster: waking
# others costs more than they do. Two 64-64 networks at 4096 rows are at the limit.
_SMALL = 3e8


def prepare_cpu(weights_times_rows: float) -> None:
    """Sets the CPU runtime up for host-driven collection; without effect once JAX has started.

    Programs run on the thread that calls them: a policy step takes 50 us and not 150. Small
    networks get one thread. `NPROC`, if set, is left alone: it is how XLA is told its threads.

    Args:
        weights_times_rows: Parameters of the networks x rows in a minibatch.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if weights_times_rows > _SMALL or "NPROC" in os.environ:
        jax.local_devices(backend="cpu")
        return
    os.environ["NPROC"] = "1"
    try:
        jax.local_devices(backend="cpu")  # starts the runtime, which reads NPROC now
    finally:
        del os.environ["NPROC"]


def find_device(name: str) -> Any:
    """The device of a name: auto, cpu, gpu, cuda, cuda:0, tpu.

    Raises:
        UserError: This machine, or this installation of JAX, has no such device.
    """
    if name == "auto":
        return jax.devices()[0]
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError):
        there = sorted({d.platform for d in jax.devices()} | {"cpu"})
        raise UserError(
            f"there is no device {name} here: JAX {jax.__version__} sees {', '.join(there)}; "
            "use --device auto, or install JAX for that device"
        ) from None
