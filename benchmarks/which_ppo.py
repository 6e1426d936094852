"""Where it pays to collect while learning: ParallelPPO beside AsyncPPO, settings equal.

Fast and slow environments, in Python under the interpreter's lock, in processes, in EnvPool and in
one program, with small networks and large ones.
"""

from __future__ import annotations

import os

from measuring import BENCHMARKS, Row, arguments, in_turn, median, report, spread, train

SMALL = (*("--num_envs", 16, "--num_steps", 128), *("--epochs", 4, "--mini_batch_size", 256))
LARGE = (*SMALL, *("--hidden_sizes", 256, 256))
CASES = {
    "CartPole-v1, serial": ("CartPole-v1", "serial", SMALL, 15),
    "CartPole-v1, process": ("CartPole-v1", "process", SMALL, 15),
    "CartPole-v1, compiled": ("CartPole-v1", "compiled", SMALL, 60),
    "HalfCheetah-v5, EnvPool": ("HalfCheetah-v5", "envpool", SMALL, 15),
    "HalfCheetah-v5, EnvPool, networks 256-256": ("HalfCheetah-v5", "envpool", LARGE, 8),
    "1 ms asleep at each step": ("sleeping:Sleeping", "auto", SMALL, 8),
}


def rate(algo: str, env: str, backend: str, settings: tuple, iterations: int) -> float:
    """Steady steps per second of a training."""
    places = [str(BENCHMARKS), os.environ.get("PYTHONPATH")]
    result = train(
        *("--algo", algo, "--env", env, "--preset", "none", "--backend", backend, *settings),
        *("--timesteps", 16 * 128 * iterations, "--no_tensorboard"),
        environment={"PYTHONPATH": os.pathsep.join(filter(None, places))},
    )
    return result["steady_steps_per_second"]


def main() -> None:
    options = arguments(__doc__).parse_args()
    repeats = 1 if options.quick else options.repeats
    rows = []
    for name, (env, backend, settings, iterations) in CASES.items():
        few = 2 if options.quick else iterations

        def side(algo: str, case: tuple = (env, backend, settings, few)) -> float:
            return rate(algo, *case)

        rates = in_turn(repeats, {algo: lambda a=algo: side(a) for algo in ("async_ppo", "ppo")})
        ours, theirs = median(rates["async_ppo"]), median(rates["ppo"])
        rows.append(
            Row(
                what=f"AsyncPPO, {name}",
                value=ours,
                unit="steps/s",
                peer="ParallelPPO",
                peer_value=theirs,
                ratio=ours / theirs,
                note=f"{spread(rates['async_ppo'])}, beside it {spread(rates['ppo'])}",
            )
        )
    report(rows)


if __name__ == "__main__":
    main()
