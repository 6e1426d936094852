"""A Ray of the run's own, and a cluster with a token: who can reach them, and who is let in."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import starling, train, wait_for
from leaks import children, living_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
LISTENS = "0A"  # as /proc/net/tcp has it


def family(pid: int) -> set[int]:
    """A process, and all that descend from it."""
    return {pid}.union(*(family(child) for child in children(pid)))


def sockets(pid: int) -> set[str]:
    """The numbers of a process's sockets."""
    found = set()
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(file))
    return {name[len("socket:[") : -1] for name in found if name.startswith("socket:[")}


def listening(pids: set[int]) -> dict[tuple[str, int], str]:
    """Address and port of all TCP sockets of some processes that listen, with a process's name."""
    owner = {number: pid for pid in pids for number in sockets(pid)}
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *_, number = line.split()[:10]
            if state == LISTENS and number in owner:
                address, port = local.split(":")
                command = Path(f"/proc/{owner[number]}/cmdline").read_bytes()
                found[readable(address), int(port, 16)] = command.replace(b"\0", b" ").decode()
    return found


def readable(address: str) -> str:
    """An address of /proc/net/tcp, whose words of four bytes are in the machine's order."""
    words = [address[i : i + 8] for i in range(0, len(address), 8)]
    packed = b"".join(int(word, 16).to_bytes(4, sys.byteorder) for word in words)
    read = ipaddress.ip_address(packed)
    return str(getattr(read, "ipv4_mapped", None) or read)


def test_a_local_ray_listens_on_loopback_only_and_has_no_dashboard(tmp_path):
    words = train("--num_workers", "1", "--log_dir", str(tmp_path), algo="distributed_ppo")
    with starling(*words, folder=tmp_path) as process:
        wait_for(process, next_run(process, tmp_path) / "metrics.jsonl")
        processes = family(process.pid)
        found = listening(processes)
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert any("gcs_server" in command for command in found.values())
    assert any("RolloutWorker" in command for command in found.values())
    assert {address for address, _ in found} == {"127.0.0.1"}, found
    assert 8265 not in {port for _, port in found}
    assert not any("dashboard.py" in command for command in found.values())


def next_run(process: subprocess.Popen[str], logs: Path) -> Path:
    """The folder of a run that begins."""
    while not (runs := list(logs.glob("*/config.json"))):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    return runs[0].parent


@contextlib.contextmanager
def cluster_with_token(token: str) -> Iterator[str]:
    """A head node that lets in who has the token; its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        *(Path(sys.executable).with_name("ray"), "start", "--head", "--block", f"--port={port}"),
        *("--node-ip-address=127.0.0.1", "--include-dashboard=false", "--num-cpus=1"),
        *("--object-store-memory=100000000", "--disable-usage-stats"),
    ]
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    process = subprocess.Popen(
        command,
        env={**os.environ, **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout
        for line in process.stdout:
            if "Ray runtime started" in line:
                break
        assert process.poll() is None
        yield f"127.0.0.1:{port}"
    finally:
        for pid in family(process.pid) | living_in(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_who_has_another_token_is_refused_in_one_sentence(tmp_path, monkeypatch):
    words = train("--num_workers", "1", "--timesteps", "64", algo="distributed_ppo")
    right, wrong = "0123456789abcdef" * 2, "fedcba9876543210" * 2
    with cluster_with_token(right) as address:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        for token, code in ((wrong, 2), (right, 0)):
            monkeypatch.setenv("RAY_AUTH_TOKEN", token)
            with starling(*words, "--address", address, folder=tmp_path) as process:
                _, errors = process.communicate()
            assert process.returncode == code, errors
            assert "Traceback" not in errors
            if token == wrong:
                ours = [line for line in errors.splitlines() if "starling: error:" in line]
                assert len(ours) == 1, "beside what Ray itself writes"
                assert f"the Ray cluster at {address} cannot be joined" in ours[0]
                assert "use its token (~/.ray/auth_token) here" in ours[0]
