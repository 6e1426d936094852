"""`starling presets` and `starling backends`."""

from __future__ import annotations

import inspect

from starling.cli.parsing import Parser, print_json, table
from starling.config import ALGORITHMS, find_config_class
from starling.errors import in_a_line
from starling.presets import load_presets


def presets(arguments: list[str]) -> int:
    """List the presets of all algorithms, or of one."""
    parser = Parser(
        "presets",
        "Settings known to work. `starling train --env ID` takes the preset of its environment; "
        "options given beside it win, and --preset none turns it off.",
    )
    parser.add_argument("--algo", help="only those of this algorithm")
    parser.add_argument("--env", help="only those of this environment")
    options = parser.read(arguments)
    if options.algo:
        find_config_class(options.algo)  # refuses unknown ones
    found = {
        algo: {
            env: settings
            for env, settings in load_presets(algo).items()
            if options.env in (None, env)
        }
        for algo in ([options.algo] if options.algo else ALGORITHMS)
    }
    for algo, by_env in found.items():
        rows = [
            [
                env,
                f"{settings['timesteps']:,}" if "timesteps" in settings else "",
                in_words(settings),
            ]
            for env, settings in by_env.items()
        ]
        if rows:
            print(table([algo, "timesteps", "settings"], rows), end="\n\n")
    if options.json:
        print_json(found)
    return 0


def in_words(settings: dict[str, object]) -> str:
    """Return settings as a table shows them."""
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name != "timesteps")


def backends(arguments: list[str]) -> int:
    """List what can step environments, each tried out on this machine."""
    parser = Parser(
        "backends",
        "What can step environments, tried out here with two CartPoles. --backend auto chooses "
        "among them; `starling bench env --env ID` measures them.",
    )
    options = parser.read(arguments)
    from starling.envs.make import BACKENDS, load_backend

    found = {}
    for name in BACKENDS:
        problem = _try(name)
        about = inspect.getdoc(load_backend(name)) or ""
        found[name] = {
            "works": problem is None,
            "about": about.split("\n\n")[0],
            "problem": problem,
        }
    rows = [
        [name, "yes" if facts["works"] else "no", str(facts["problem"] or facts["about"])]
        for name, facts in found.items()
    ]
    print(table(["backend", "works here", "what it does"], rows))
    if options.json:
        print_json(found)
    return 0


def _try(backend: str) -> str | None:
    """Step two environments once; return what went wrong, or None."""
    from starling.envs.make import make_vec

    try:
        envs = make_vec(
            "CartPole-v1", 2, backend=backend, seed=0, step_timeout=20.0, require_timeout=False
        )
        try:
            envs.reset()
            envs.step(envs.action_space.sample())
        finally:
            envs.close()
    except Exception as error:  # whatever it is, it is the answer
        return in_a_line(error)
    return None
