"""Which devices the networks compute on, and how their runtime is set up."""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


def find_devices(name: str, number: int | str = 1) -> list[Any]:
    """So many devices, from that of a name on: auto, cpu, gpu, cuda, cuda:0, tpu.

    Args:
        name: Of the first.
        number: How many, or "all".

    Raises:
        UserError: This machine, or this installation of JAX, has no such device, or too few.
    """
    platform, _, index = name.partition(":")
    try:
        found = jax.devices(None if name == "auto" else platform)[int(index or 0) :]
    except (RuntimeError, ValueError):
        found = []
    if not found:
        there = sorted({d.platform for d in jax.devices()} | {"cpu"})
        raise UserError(
            f"there is no device {name} here: JAX {jax.__version__} sees {', '.join(there)}; "
            "use --device auto, or install JAX for that device"
        )
    if number == "all":
        return found
    if int(number) > len(found):
        raise UserError(
            f"num_devices {number} is more than JAX sees here from device {name} on, which is "
            f"{len(found)}: use --num_devices {len(found)}, or all"
        )
    return found[: int(number)]


def mesh_of(devices: list[Any]) -> Mesh | None:
    """What an algorithm shares minibatches out to; None for one device."""
    return Mesh(devices, ("devices",)) if len(devices) > 1 else None


def on_all(mesh: Mesh, tree: Any) -> Any:
    """Arrays as copies on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def on_first(tree: Any) -> Any:
    """The first device's copies, as they are: nothing is moved."""
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
