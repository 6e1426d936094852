"""A training whose second worker is behind a link that delays packets and loses some.

`python slow_network.py SYNC_MODE UPDATES DELAY LOSS FOLDER` prints as JSON how it went; FOLDER is
for what Ray keeps. It has to run in namespaces of its own for the network and for processes, of
which all end with it, and with the rights to make one more for a network: see
test_slow_network.py. It passes on itself what is between the two networks, as `tc qdisc add dev ...
netem` would, since not every kernel has that.
"""

from __future__ import annotations

import collections
import ctypes
import fcntl
import json
import os
import random
import select
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LEARNER, WORKER = "10.77.0.1", "10.77.0.2"
PORT = 6379
ROWS = 2 * 2 * 32  # of an update
TUN_SET_INTERFACE, TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
NEW_NETWORK = 0x40000000
MOST_PACKETS = 1000  # on their way at a time, as netem has it


class Link:
    """Packets on their way between this network namespace and another.

    Args:
        delay: Seconds that each takes.
        loss: Share of packets that are lost.
    """

    def __init__(self, delay: float, loss: float):
        self.delay, self.loss = delay, loss
        self.carried = self.lost = 0
        self.ends = [interface("learner", LEARNER)]

    def start_there(self, command: list[str]) -> subprocess.Popen[str]:
        """Makes the other namespace, starts a command there, and carries packets from then on."""
        started: list[subprocess.Popen[str]] = []

        def begin() -> None:
            if ctypes.CDLL(None, use_errno=True).unshare(NEW_NETWORK):
                raise OSError(ctypes.get_errno(), "no further network namespace")
            self.ends.append(interface("worker", WORKER))
            threading.Thread(target=self._carry, daemon=True).start()
            started.append(popen(command))

        there = threading.Thread(target=begin)  # namespaces are a thread's
        there.start()
        there.join()
        return started[0]

    def _carry(self) -> None:
        chance, way = random.Random(0), collections.deque[tuple[float, int, bytes]]()
        opposite = dict(zip(self.ends, self.ends[::-1], strict=True))
        while True:
            wait = max(0.0, way[0][0] - time.monotonic()) if way else None
            for end in select.select(self.ends, [], [], wait)[0]:
                packet = os.read(end, 2**16)
                if chance.random() < self.loss or len(way) == MOST_PACKETS:
                    self.lost += 1
                else:
                    way.append((time.monotonic() + self.delay, opposite[end], packet))
            while way and way[0][0] <= time.monotonic():
                _, end, packet = way.popleft()
                os.write(end, packet)
                self.carried += 1


def interface(name: str, address: str) -> int:
    """A new interface of this thread's namespace; what is sent to it can be read from the file."""
    file = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(file, TUN_SET_INTERFACE, struct.pack("16sH22x", name.encode(), TUN_WITHOUT_HEADER))
    for words in (
        "link set lo up",
        f"addr add {address}/24 dev {name}",
        f"link set {name} up",
        f"route add default dev {name}",  # by which Ray finds out its address
    ):
        subprocess.run(["ip", *words.split()], check=True)
    return file


def popen(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_until_started(node: subprocess.Popen[str]) -> None:
    """Waits until a node of Ray has started."""
    assert node.stdout
    said = []
    for line in node.stdout:
        said.append(line)
        if "Ray runtime started" in line:
            return
    raise RuntimeError("".join(said))


def train(sync_mode: Any, updates: int, link: Link) -> dict[str, Any]:
    """Trains, and looks at every rollout."""
    from looking_at_weights import LooksAtWeights

    from starling import DistributedPPO

    most_waiting = 0

    def look(iteration: Any) -> None:
        nonlocal most_waiting
        pool = iteration.agent._pool
        most_waiting = max(most_waiting, len(pool._requests) + len(pool._parts))

    with (
        tempfile.TemporaryDirectory() as logs,
        DistributedPPO(
            "CartPole-v1",
            num_workers=2,
            num_envs=2,
            num_steps=32,
            mini_batch_size=32,
            epochs=1,
            hidden_sizes=(8,),
            lr=0.01,
            preset="none",
            backend="serial",
            sync_mode=sync_mode,
            address=f"{LEARNER}:{PORT}",
            timesteps=updates * ROWS,
            tensorboard=False,
            save_interval=0,
            log_dir=logs,
        ) as agent,
    ):
        weights = LooksAtWeights(agent)
        start = time.monotonic()
        result = agent.train(callbacks=[weights, look], quiet=True)
        return {
            "status": result.status,
            "steps": result.steps,
            "seconds": time.monotonic() - start,
            "rollouts": [[origin.worker, origin.sequence] for origin in weights.origins],
            "dropped": agent._pool.dropped,
            "workers_lost": agent._pool.faults["workers_lost"],
            "most_waiting": most_waiting,
            "packets": link.carried,
            "packets_lost": link.lost,
        }


def main() -> None:
    sync_mode, updates, delay, loss, folder = sys.argv[1:]
    # A head that "ray start" starts asks for a token where it finds one: all are to have the same.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}
    link = Link(float(delay), float(loss))
    ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1"]
    ray += ["--object-store-memory=100000000", "--disable-usage-stats"]
    head = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={folder}"]
    wait_until_started(popen([*ray, *head, f"--node-ip-address={LEARNER}"]))
    other = [f"--address={LEARNER}:{PORT}", f"--node-ip-address={WORKER}"]
    wait_until_started(link.start_there([*ray, *other]))
    print(json.dumps(train(sync_mode, int(updates), link)))


if __name__ == "__main__":
    main()
