"""The architecture, held: imports point downwards, light things stay light, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import starling

SOURCE = Path(starling.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))

# Every part of the package, and the parts that it may import. Top to bottom.
BASE = {"errors", "flags", "memory", "options", "ranges", "standard_error"}
MAY_IMPORT = {
    "cli": {"training", "config", "configs", "presets", "envs", "storage", "reporting", *BASE},
    "training": {
        *("config", "configs", "run_parameters", "presets"),
        *("algorithms", "networks", "envs", "storage", "reporting"),
        *BASE,
    },
    "config": {"configs", "presets", "run_parameters", *BASE},
    "configs": {"run_parameters", "algorithms", "networks", *BASE},
    "run_parameters": {"envs", *BASE},
    "presets": BASE,
    "algorithms": {"networks", "storage", *BASE},
    "networks": BASE,
    "envs": BASE,
    "reporting": BASE,
    "storage": BASE,
    "options": {"errors"},
    "ranges": {"errors", "options"},
    "errors": set(),
    "flags": set(),
    "memory": set(),
    "standard_error": set(),
}
WITHOUT_JAX = (
    "envs",
    "reporting",
    "storage",
    "config",
    "configs",
    "presets",
    "run_parameters",
    *BASE,
)
# Modules of compiled environments, which only callers that have JAX import, by these first words.
COMPILED = ("compiled", "jax_")
JAX = {"jax", "jaxlib", "flax", "optax", "chex"}
HEAVY = {"envpool", "imageio", "matplotlib", "pygame", "ray", "tensorboardX", "wandb"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "core"}


def part_of(file: Path) -> str:
    return file.relative_to(SOURCE).with_suffix("").parts[0]


def imports(node: ast.AST, inside_functions: bool = True) -> Iterator[str]:
    """Yields the dotted names that a module imports, those for type checkers alone apart."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative imports hide the layer"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (name for other in child.orelse for name in imports(other))
        elif inside_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, inside_functions)


def imported(file: Path, inside_functions: bool = True) -> set[str]:
    return set(imports(ast.parse(file.read_bytes()), inside_functions))


def runs_without_jax(file: Path) -> bool:
    compiled = part_of(file) == "envs" and file.stem.startswith(COMPILED)
    return part_of(file) in WITHOUT_JAX and not compiled


def name_of(file: Path) -> str:
    return str(file.relative_to(SOURCE))


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_imports_point_downwards(file):
    part = part_of(file)
    if part in ("__init__", "__main__"):  # the front doors import everything, lazily
        return
    assert part in MAY_IMPORT, f"give {part} its place in MAY_IMPORT"
    for name in imported(file):
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package == "starling" and target not in ("__version__", part):
            assert target in MAY_IMPORT[part], f"{part} may not import {name}"


def test_the_layers_have_no_circle():
    done: set[str] = set()
    while left := {part for part in MAY_IMPORT if part not in done}:
        free = {part for part in left if MAY_IMPORT[part] <= done}
        assert free, f"a circle among {sorted(left)}"
        done |= free


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_no_jax_in_what_others_may_use(file):
    if not runs_without_jax(file):
        return
    # Checkpoints take pytrees apart, in functions that only callers with JAX call.
    everywhere = name_of(file) != "storage/checkpoint.py"
    found = {name.partition(".")[0] for name in imported(file, inside_functions=everywhere)}
    assert not found & JAX


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_heavy_packages_are_imported_where_they_are_used(file):
    found = {name.partition(".")[0] for name in imported(file, inside_functions=False)}
    assert not found & HEAVY


@pytest.mark.parametrize("file", MODULES, ids=name_of)
def test_files_are_short_and_well_named(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < 600
    assert not VAGUE_NAMES & set(file.relative_to(SOURCE).with_suffix("").parts)


@pytest.mark.timeout(60)
def test_importing_starling_starts_nothing():
    run(
        "import os, signal, sys, threading\n"
        "signals = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]\n"
        "environment = dict(os.environ)\n"
        "import starling\n"
        "heavy = {'jax', 'numpy', 'gymnasium', 'flax', 'multiprocessing'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert threading.active_count() == 1\n"
        "assert signals == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]\n"
        "assert environment == os.environ\n"
    )


@pytest.mark.timeout(60)
def test_environments_storage_and_reporting_run_without_jax():
    names = [
        ".".join(("starling", *file.relative_to(SOURCE).with_suffix("").parts))
        for file in MODULES
        if runs_without_jax(file)
    ]
    run(
        "import importlib, sys\n"
        "sys.modules['jax'] = None\n"  # importing it is now an error
        f"for name in {names}:\n"
        "    importlib.import_module(name.removesuffix('.__init__'))\n"
    )
