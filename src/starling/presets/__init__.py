"""Settings that are known to work, one TOML file per algorithm, one table per environment id."""

from __future__ import annotations

import functools
import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from starling.errors import UserError
from starling.options import did_you_mean

# Algorithms that take the presets of another; what their own file says wins.
_SHARED = {f"{kind}_{algo}": algo for kind in ("async", "distributed") for algo in ("ppo", "dqn")}


@functools.cache
def load_presets(algo: str) -> dict[str, dict[str, Any]]:
    """Return the presets of an algorithm by environment id; none for an algorithm without."""
    presets = load_presets(_SHARED[algo]) if algo in _SHARED else {}
    file = resources.files(__name__) / f"{algo}.toml"
    own = tomllib.loads(file.read_text("utf-8")) if file.is_file() else {}
    return {env: {**presets.get(env, {}), **own.get(env, {})} for env in {**presets, **own}}


def find_preset(algo: str, preset: str, env: str) -> tuple[str | None, dict[str, Any]]:
    """Return the name and the settings of the preset that a run starts from.

    Args:
        algo: Name of the algorithm.
        preset: "auto" for that of the environment, "none", the name of another, or a .toml or
            .json file of settings.
        env: The environment's id.

    Returns:
        The preset's name, None if there is none, and its settings.

    Raises:
        UserError: There is no such preset, or the file cannot be read.
    """
    if preset == "none":
        return None, {}
    if preset.endswith((".toml", ".json")):
        return preset, _read_file(Path(preset))
    presets = load_presets(algo)
    if preset == "auto":
        return (env, presets[env]) if env in presets else (None, {})
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r} of {algo}: {did_you_mean(preset, presets)}")
    return preset, presets[preset]


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
        settings = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"preset {path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"preset {path} must hold settings by name")
    return settings
