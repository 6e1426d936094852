"""`starling presets` and `starling backends`."""

from __future__ import annotations

from starling.cli.parsing import Parser, print_json, table
from starling.config import ALGORITHMS, find_config_class
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
            [env, f"{settings['timesteps']:,}", _in_words(settings)]
            for env, settings in by_env.items()
        ]
        if rows:
            print(table([algo, "timesteps", "settings"], rows), end="\n\n")
    if options.json:
        print_json(found)
    return 0


def _in_words(settings: dict[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if name != "timesteps")
