"""The Nature CNN forward and backward in eager PyTorch, run by a peer's environment (see peers.py).

Prints the milliseconds of each pass in PyTorch's default layout of images and in "channels last".
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from torch import nn

ROWS, ROLLOUT, OUTPUTS = 256, 1024, 8  # seven actions and a value


def milliseconds(layout: torch.memory_format, passes: int) -> float:
    """Median time of a pass over a minibatch out of a rollout of bytes."""
    network = nn.Sequential(
        *(nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()),
        *(nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, OUTPUTS)),
    ).to(memory_format=layout)
    images = torch.randint(0, 256, (ROLLOUT, 4, 84, 84), dtype=torch.uint8)
    images = images.to(memory_format=layout)
    order = torch.randperm(ROLLOUT).reshape(-1, ROWS)
    times = []
    for i in range(passes + 2):  # the first ones allocate
        start = time.perf_counter()
        network.zero_grad()
        out = network(images[order[i % len(order)]].float() / 255)
        out.square().mean().backward()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:])


def main(threads: int, passes: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layouts = {"default": torch.contiguous_format, "channels_last": torch.channels_last}
    print(json.dumps({name: milliseconds(layout, passes) for name, layout in layouts.items()}))


if __name__ == "__main__":
    main(threads=int(sys.argv[1]), passes=int(sys.argv[2]))
