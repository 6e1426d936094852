"""How DistributedPPO grows with its workers: measured with few of them, predicted for many.

Measures what Ray takes to move bytes, and runs of 1 to 4 workers on this machine. Environments that
sleep stand for some on machines of their own: what the learner does is what it does with any.
Writes docs/scaling.md, with docs/scaling.json beside it; `scaling_model.py` has the formulae.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from measuring import ONE_THREAD, here, write_page
from scaling_page import page

from starling.storage.rollout import Origin, join_rollouts
from starling.training.distributed_ppo import DistributedPPO

QUIET = {"log_to_driver": False, "logging_level": "error"}
NODE = {"include_dashboard": False, "object_store_memory": 10**9}
SIZES = (10**4, 10**5, 10**6, 10**7, 10**8)  # bytes
WARM_UP = 3  # iterations, in which programs are compiled

SMALL_NETWORK = {"epochs": 10, "mini_batch_size": 64}
SIMULATOR = {"env": "sleeping:Sleeping", "num_envs": 1, "steps_per_worker": 256}
SETTINGS = {
    "light": {**SIMULATOR, **SMALL_NETWORK},
    "heavy": {**SIMULATOR, **SMALL_NETWORK, "epochs": 400},
    "pendulum": {
        **SMALL_NETWORK,
        "env": "Pendulum-v1",
        "num_envs": 8,
        "steps_per_worker": 16 * 1024,
    },
    "pixels": {
        "env": "sleeping:SleepingPixels",
        "num_envs": 8,
        "steps_per_worker": 256,
        "epochs": 4,
        "mini_batch_size": 256,
    },
}


class Giver:
    """What messages are measured with."""

    def nothing(self) -> None:
        """Answers."""

    def give(self, size: int) -> np.ndarray:
        """Answers with so many bytes."""
        return np.ones(size, np.uint8)


def measure_messages(sizes: Sequence[int], repeats: int) -> dict[str, Any]:
    """Seconds that Ray takes for bytes and calls, between two nodes that are both here."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **NODE})
    cluster.add_node(num_cpus=2, resources={"away": 1}, **NODE)
    try:
        ray.init(cluster.address, **QUIET)
        giver: Any = ray.remote(Giver)
        near, away = giver.remote(), giver.options(resources={"away": 1}).remote()

        def put(size: int) -> float:
            array = np.ones(size, np.uint8)
            return seconds(lambda: ray.put(array))

        def get(actor: Any, size: int) -> float:
            answer = actor.give.remote(size)
            ray.wait([answer], fetch_local=False)
            return seconds(lambda: ray.get(answer))

        found = [
            {
                "size": size,
                "put": median_of(put, repeats, size),
                "near": median_of(get, repeats, near, size),
                "away": median_of(get, repeats, away, size),
            }
            for size in sizes
        ]
        many = 100 * repeats
        calls = {
            "there and back": median_of(seconds, many, lambda: ray.get(away.nothing.remote())),
            "one of many": seconds(lambda: ray.get([away.nothing.remote() for _ in range(many)]))
            / many,
        }
        return {"sizes": found, "calls": calls}
    finally:
        ray.shutdown()
        cluster.shutdown()


def measure_joining(size: int, repeats: int) -> float:
    """Bytes a second at which arrays are put side by side."""
    parts = [np.ones((64, size // 4 // 64), np.uint8) for _ in range(4)]
    return size / median_of(seconds, repeats, lambda: np.concatenate(parts, 1))


def seconds(what: Callable[[], Any]) -> float:
    """That something takes."""
    start = time.perf_counter()
    kept = what()
    took = time.perf_counter() - start
    del kept
    return took


def median_of(measure: Callable[..., float], repeats: int, *about: Any) -> float:
    """The median of some measurements, after one that does not count."""
    measure(*about)
    return statistics.median(measure(*about) for _ in range(repeats))


class Answers:
    """A pool's queue of answers, which counts the seconds that the learner waits for one."""

    def __init__(self, answers: Any):
        self.answers, self.put, self.waited = answers, answers.put, 0.0

    def get(self, timeout: float) -> Any:
        """The next answer, as a queue gives it."""
        start = time.perf_counter()
        try:
            return self.answers.get(timeout=timeout)
        finally:
            self.waited += time.perf_counter() - start


class Watch:
    """Says where the time of a DistributedPPO goes; a callback of its training."""

    def __init__(self, agent: Any):
        self.agent, self.pool = agent, agent.make_collector()
        self.answers: Any = Answers(self.pool._answers)
        self.pool._answers = self.answers
        self.learn, agent.update = agent.update, self._update
        self.updating = 0.0
        self.marks: list[tuple[float, float, float]] = []
        self.collects: list[float] = []

    def _update(self, *rollout: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.learn(*rollout)
        finally:
            self.updating += time.perf_counter() - start

    def __call__(self, iteration: Any) -> None:
        """Takes note of the clocks."""
        self.marks.append((time.perf_counter(), self.updating, self.answers.waited))
        self.collects.append(self.pool.seconds)

    def figures(self) -> dict[str, float]:
        """Seconds of an iteration, and of its parts."""
        marks = np.array(self.marks[WARM_UP:])
        total, update, waited = (marks[-1] - marks[0]) / (len(marks) - 1)
        return {
            "iteration": total,
            "update": update,
            "waited": waited,
            "busy": total - update - waited,
            "collect": statistics.median(self.collects[WARM_UP:]),
        }


def run(what: str, mode: str, workers: int, iterations: int) -> dict[str, Any]:
    """Figures of one training, after its warm-up."""
    settings = dict(SETTINGS[what])
    with (
        tempfile.TemporaryDirectory() as logs,
        DistributedPPO(
            settings.pop("env"), num_workers=workers, sync_mode=mode, preset="none",
            backend="serial", tensorboard=False, save_interval=0, log_dir=logs, **settings,
        ) as agent,
    ):  # fmt: skip
        watch, rows = Watch(agent), agent.config.batch_size
        agent.train((WARM_UP + 1 + iterations) * rows, callbacks=watch, quiet=True)
        parts = [report.rollout for report in watch.pool.reports]
        found = {
            "what": what,
            "mode": mode,
            "workers": workers,
            "rows": rows,
            "rollout_bytes": size_of(parts[0]),
            "parameter_bytes": size_of(agent.acting),
            **watch.figures(),
        }
        if workers == 1 and mode == "blocking":
            found["look"] = looking(agent, join_rollouts(parts))
    rate = rows / found["iteration"]
    print(f"{what}, {mode}, {workers} workers: {rate:,.0f} steps/s", file=sys.stderr, flush=True)
    return found


def size_of(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))


def looking(agent: DistributedPPO, rollout: Any) -> float:
    """Seconds that an update takes for values, V-trace and advantages of all its steps."""
    algorithm, state = agent.algorithm, agent.state
    finals = rollout.final_observations, rollout.final_index
    rest = rollout._replace(final_observations=(), final_index=(), origin=Origin(), outputs=None)
    prepare = jax.jit(algorithm._prepare)

    def look() -> Any:
        values = algorithm._values_at(
            state.params, state.observation_statistics, finals, rollout.rewards.shape
        )
        return jax.block_until_ready(prepare(state, rest, values))

    return median_of(seconds, 7, look)


def measure_runs(quick: bool) -> list[dict[str, Any]]:
    """Runs of each kind, in a cluster that all of them share."""
    import ray

    counts, ahead = ((1, 2), (2,)) if quick else ((1, 2, 3, 4), (1, 2, 3, 4))
    iterations = 4 if quick else 20
    # Not for computing: the workers are asleep.
    ray.init("local", num_cpus=8, _node_ip_address="127.0.0.1", **NODE, **QUIET)
    try:
        runs = [run("light", "blocking", n, iterations) for n in counts]
        for what in ("light", "heavy"):
            runs += [run(what, "non_blocking", n, iterations) for n in ahead]
        return runs + [run(what, "blocking", 1, iterations // 4) for what in ("pendulum", "pixels")]
    finally:
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="briefly, to see that it works; writes to build/"
    )
    quick = parser.parse_args().quick
    os.environ.update(ONE_THREAD)
    sizes, repeats = (SIZES[:3], 3) if quick else (SIZES, 9)
    stored = {
        "measured": here(),
        "load": os.getloadavg()[0],
        "messages": measure_messages(sizes, repeats),
        "join": measure_joining(2**26, repeats),
        "runs": measure_runs(quick),
    }
    write_page("scaling", stored, page, quick)


if __name__ == "__main__":
    main()
