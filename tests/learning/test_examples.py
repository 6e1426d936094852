"""The examples run, and learn what they say."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(120)
def test_custom_loop_runs():
    assert 1 <= load(ROOT / "examples" / "custom_loop.py").main(timesteps=512) <= 500


def test_custom_loop_is_as_short_as_the_page_says():
    lines = (ROOT / "examples" / "custom_loop.py").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if "agent = " in line)
    end = next(i for i, line in enumerate(lines) if "agent.close()" in line)
    code = [x for x in lines[start : end + 1] if x.strip() and not x.strip().startswith("#")]
    assert len(code) <= 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_custom_loop_solves_cartpole():
    assert load(ROOT / "examples" / "custom_loop.py").main() >= 475


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pytorch_agent_solves_cartpole_without_jax():
    # Runs in the environment of a peer, which has PyTorch and no JAX.
    python = load(ROOT / "benchmarks" / "peers.py").python("sb3")
    without_jax = [python, "-c", "import importlib.util as u; assert not u.find_spec('jax')"]
    subprocess.run(without_jax, check=True)
    done = subprocess.run(
        [python, ROOT / "examples" / "pytorch_agent.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("mean return ")
    assert float(done.stdout.split()[-1]) >= 475
