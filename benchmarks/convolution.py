"""The Nature CNN forward and backward on the CPU, in batches of 256 images of 84 x 84 x 4 bytes.

Starling's figure is a pass inside `lax.scan` over the minibatches of a rollout, which is what an
update does; the other one a pass alone. PyTorch, which has no such difference, gets as many
threads. Beside them: JAX's own convolution, alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import peers
from measuring import BENCHMARKS, Row, arguments, in_turn, median, report, run_json, spread

from starling.envs.worker_count import usable_cores
from starling.networks import convolution
from starling.networks.network_parameters import NetworkParameters
from starling.networks.policy import Policy

ROWS, ROLLOUT = 256, 1024
FLOOR = 1.1

Array = jax.Array


def policy() -> Policy:
    """The network, with seven actions and a value."""
    images = gymnasium.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    return Policy(images, gymnasium.spaces.Discrete(7), NetworkParameters())


def gradient(network: Policy) -> Callable[[Array, Array], Array]:
    """Of the mean square of all outputs, for images."""

    def loss(params: Array, images: Array) -> Array:
        out = network(params, network.features(images), None)
        return jnp.square(out.outputs).mean() + jnp.square(out.value).mean()

    return jax.grad(loss)


def timer(in_scan: bool, library: bool = False) -> Callable[[int], list[float]]:
    """What measures the milliseconds of some passes, each over a minibatch."""
    network = policy()
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (ROLLOUT, 4, 84, 84), np.uint8))
    order = jnp.asarray(rng.permutation(ROLLOUT).reshape(-1, ROWS))
    one = gradient(network)

    def several(params: Array, images: Array, order: Array) -> Array:
        def step(params: Array, index: Array) -> tuple[Array, None]:
            return params - 1e-4 * one(params, images[index]), None

        return jax.lax.scan(step, params, order)[0]

    def alone(params: Array, images: Array, order: Array) -> Array:
        return params - 1e-4 * one(params, images[order[0]])

    params = jnp.asarray(network.init(0))
    everywhere: Any = convolution.library_convolution
    with (
        mock.patch.object(
            convolution,
            "block_convolution",
            everywhere if library else convolution.block_convolution,
        ),
        mock.patch.object(convolution, "CHUNK", ROWS if library else convolution.CHUNK),
    ):
        run = jax.jit(several if in_scan else alone).lower(params, images, order).compile()
    passes = len(order) if in_scan else 1
    jax.block_until_ready(run(params, images, order))

    def measure(repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run(params, images, order))
            times.append(1e3 * (time.perf_counter() - start) / passes)
        return times

    return measure


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats, passes = (1, 4) if options.quick else (options.repeats, 20)
    threads = usable_cores()
    with jax.default_device(jax.devices("cpu")[0]):
        in_scan, alone = timer(in_scan=True), timer(in_scan=False)
        library = timer(in_scan=False, library=True)

    def torch_times() -> dict[str, float]:
        command = [peers.python("sb3"), BENCHMARKS / "torch_convolution.py", threads, passes]
        return run_json(command)

    sides: dict[str, Callable[[], Any]] = {
        "Starling": lambda: median(in_scan(max(1, passes // 4))),
        "Starling, alone": lambda: median(alone(passes)),
        "JAX's convolution, alone": lambda: median(library(max(1, passes // 4))),
        "PyTorch": torch_times,
    }
    times = in_turn(repeats, sides)
    theirs = {
        layout: [measured[layout] for measured in times["PyTorch"]]
        for layout in ("default", "channels_last")
    }
    ours, default = median(times["Starling"]), median(theirs["default"])
    last, outside = median(theirs["channels_last"]), median(times["Starling, alone"])
    what = f"Nature CNN, batch {ROWS}, forward and backward"
    peer = f"PyTorch {peers.TORCH}, eager, threads: {threads}"
    report(
        [
            Row(
                what=f"{what}, inside a scan over minibatches",
                value=ours,
                unit="ms",
                peer=peer,
                peer_value=default,
                ratio=default / ours,
                floor=f"<= {FLOOR:g}x PyTorch's time",
                met=ours <= FLOOR * default,
                note=f"{spread(times['Starling'], 'ms')}, "
                f"PyTorch {spread(theirs['default'], 'ms')}",
            ),
            Row(
                what=f"{what}, PyTorch's images with channels last",
                value=ours,
                unit="ms",
                peer=f"{peer}, channels last",
                peer_value=last,
                ratio=last / ours,
                note=f"PyTorch {spread(theirs['channels_last'], 'ms')}",
            ),
            Row(
                what=f"{what}, alone",
                value=outside,
                unit="ms",
                peer="JAX's own convolution",
                peer_value=median(times["JAX's convolution, alone"]),
                ratio=median(times["JAX's convolution, alone"]) / outside,
                note=f"{spread(times['Starling, alone'], 'ms')}; inside a scan JAX's own takes "
                "seconds",
            ),
        ]
    )


if __name__ == "__main__":
    main()
