"""One fault under one library, in a process that may hang or die of it; see faults.py.

What happens is appended to the file `told` in the folder given, a JSON object a line, so that it is
known however this process ends.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import functools
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fault_envs import FAULTY_STEP, Faulty

NUM_ENVS, BROKEN = 3, 1
AFTERWARDS = 3  # steps that follow where a library goes on
TIMEOUTS = {"hang": 1.0, "late": 0.3}  # seconds that a step may take, where it can be told


def make(library: str, fault: str, folder: Path, options: dict[str, Any]) -> Any:
    """Environments of which one is broken, a worker for each, all else as it is by default."""
    faults = [fault if i == BROKEN or fault == "slow" else "" for i in range(NUM_ENVS)]
    makers: list[Callable[[], Any]] = [functools.partial(Faulty, f, str(folder)) for f in faults]
    if library == "sb3":
        from stable_baselines3.common.vec_env import SubprocVecEnv

        return SubprocVecEnv(makers)
    if library == "gymnasium":
        from gymnasium.vector import AsyncVectorEnv

        return AsyncVectorEnv(makers)
    from starling.envs.process import ProcessVectorEnv  # make_vec, which takes one maker for all

    if options:
        from starling.envs.safety import Safety

        options = {"safety": Safety(**options)}
    return ProcessVectorEnv(
        makers, num_workers=NUM_ENVS, step_timeout=TIMEOUTS.get(fault), **options
    )


def step(envs: Any, timeout: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observations `[N, 2]` (the last ones where an episode ended), rewards `[N]`, lost rows `[N]`.

    Lost are those of which the library itself says that they are no experience.
    """
    actions = np.zeros(NUM_ENVS, np.int64)
    if timeout is not None and hasattr(envs, "call_async"):  # Gymnasium's
        envs.step_async(actions)
        result = envs.step_wait(timeout=timeout)
    else:
        result = envs.step(actions)
    observations, infos = np.array(result[0]), result[-1]
    lost = np.zeros(NUM_ENVS, np.bool_)
    if isinstance(infos, dict):
        last = infos.get("final_obs", [None] * NUM_ENVS)
        lost |= ~infos.get("valid", ~lost)
    else:
        last = [info.get("terminal_observation") for info in infos]
    for i, observation in enumerate(last):
        if observation is not None:
            observations[i] = observation
    return observations, np.asarray(result[1]), lost


def flaw(observations: np.ndarray, rewards: np.ndarray, due: dict[int, int]) -> str:
    """What is wrong with the data of a step, of which `due` says each environment's number."""
    if observations.dtype != np.float32:
        return f"the whole batch is {observations.dtype}"
    for what, values in (("observation", observations), ("reward", rewards)):
        if not np.isfinite(values).all():
            return f"{'NaN' if np.isnan(values).any() else 'inf'} as {what}"
    for i, number in due.items():
        seen, paid = observations[i, 1], rewards[i]
        if not seen == paid == number:
            return f"observation of step {seen:g}, reward of step {paid:g} in step {number}"
    return ""


def past_the_fault(envs: Any, fault: str, tell: Callable[..., None]) -> bool:
    """Steps until the fault has happened; whether the broken environment begins anew then."""
    for _ in range(1, FAULTY_STEP):
        step(envs)
    observations, rewards, lost = step(envs, TIMEOUTS.get(fault))
    due = {i: FAULTY_STEP for i in range(NUM_ENVS) if not lost[i]}
    tell(flaw=flaw(observations, rewards, due))
    return bool(lost[BROKEN])


def go_on(envs: Any, anew: bool, tell: Callable[..., None]) -> None:
    """Takes some more steps, which must be those after the one with the fault."""
    for number in range(1, AFTERWARDS + 1):
        due = dict.fromkeys(range(NUM_ENVS), FAULTY_STEP + number)
        if anew:
            due[BROKEN] = number
        observations, rewards, _ = step(envs)
        if found := flaw(observations, rewards, due):
            tell(later=found)
            return
    tell(later="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", choices=["starling", "sb3", "gymnasium"])
    parser.add_argument("fault")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--options", type=json.loads, default={}, help="for Starling, as JSON")
    args = parser.parse_args()
    # What a shell runs in the background ignores Ctrl-C, and so would this.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def tell(**facts: Any) -> None:
        with open(args.folder / "told", "a") as file:
            file.write(json.dumps(facts) + "\n")

    def tell_error(error: BaseException) -> None:
        happened = args.folder / "happened"
        since = time.monotonic() - float(happened.read_text()) if happened.exists() else None
        tell(error=type(error).__name__, message=str(error), seconds=since)

    envs, anew = None, False
    try:
        tell(stage="make")
        envs = make(args.library, args.fault, args.folder, args.options)
        tell(stage="reset")
        envs.reset()
        tell(stage="step")
        while args.fault == "slow":  # until a signal comes
            step(envs)
        anew = past_the_fault(envs, args.fault, tell)
    except (Exception, KeyboardInterrupt) as error:
        tell_error(error)
    if envs is not None and (anew or args.fault == "late"):
        tell(stage="later step")
        try:
            go_on(envs, anew, tell)
        except Exception as error:
            tell(refused=type(error).__name__)
    if envs is not None:
        tell(stage="close")
        try:
            envs.close()
            tell(closed=True)
        except (Exception, KeyboardInterrupt) as error:
            tell(close_error=type(error).__name__)
    tell(stage="end")


if __name__ == "__main__":
    main()
