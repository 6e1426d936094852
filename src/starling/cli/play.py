"""`starling play`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from starling.cli.parsing import Parser, print_json, stop_signals
from starling.cli.runs import add_policy, at_least_one, load_policy
from starling.envs.make import make_env
from starling.envs.spaces import flatten, unflatten
from starling.errors import UserError
from starling.reporting.video import check_video, write_video
from starling.training.fit import check_fit


def play(arguments: list[str]) -> int:
    """Show a policy in a window, or write a video of it; return the exit code."""
    parser = Parser(
        "play",
        "Watch a trained policy in a window, or write a video of it.",
        "examples:\n"
        "  starling play logs/CartPole-v1__ppo__s0\n"
        "  starling play logs/CartPole-v1__ppo__s0 --video cartpole.mp4 --episodes 3",
    )
    add_policy(parser)
    parser.add_argument("--episodes", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--video", metavar="FILE", help="write an .mp4 or .gif, open no window")
    args = parser.read(arguments)
    at_least_one("episodes", args.episodes)
    if args.video:
        check_video(args.video)
    else:
        _check_display()

    returns: list[float] = []
    with stop_signals(args) as stop, load_policy(args) as agent:
        mode = "rgb_array" if args.video else "human"
        env = make_env(agent.config.env, agent.config.env_kwargs, render_mode=mode)
        try:
            spaces = (agent.observation_space, agent.action_space)
            check_fit(agent.config.env, spaces, (env.observation_space, env.action_space))
            frames = _frames(agent, env, args, stop.is_set, returns)
            if args.video:
                # JAX warns of every fork; that of the encoder runs another program at once.
                warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
                write_video(frames, args.video, fps=env.metadata.get("render_fps", 30))
            else:
                for _ in frames:
                    pass
        finally:
            env.close()
    if args.video:
        print(args.video)
    if args.json:
        print_json({"returns": returns, "video": args.video})
    return stop.exit_code


def _frames(
    agent: Any, env: Any, args: Any, stop: Callable[[], bool], returns: list[float]
) -> Iterator[Any]:
    """Play episodes; yield each frame (None where the environment draws into its window)."""
    for episode in range(args.episodes):
        observation, info = env.reset(seed=args.seed if episode == 0 else None)
        total, steps, ended = 0.0, 0, False
        while not ended:
            yield env.render() if args.video else None
            if stop():
                return
            action = agent.predict(observation, not args.stochastic, info.get("action_mask"))
            # Environments want a Discrete action as a number, not as an array of none.
            action = unflatten(
                env.action_space, [leaf[()] for leaf in flatten(env.action_space, action)]
            )
            observation, reward, terminated, truncated, info = env.step(action)
            total, steps, ended = total + float(reward), steps + 1, terminated or truncated
        yield env.render() if args.video else None
        returns.append(total)
        print(f"episode {episode + 1}: return {total:.2f}, {steps} steps")


def _check_display() -> None:
    """Raise where no window can be opened, before anything is loaded."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER")
    if sys.platform == "linux" and not any(os.environ.get(name) for name in screens):
        raise UserError("there is no display to open a window on: write a video, --video FILE.mp4")
