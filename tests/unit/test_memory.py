"""What is left of memory, by what the system and a container say."""

from __future__ import annotations

import pytest

from starling import memory

KB = 1 << 10


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Writes what the system says into files of the test's own."""
    monkeypatch.setattr(memory, "_SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINER", tmp_path)

    def tell(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text)

    return tell


def test_nothing_is_known_where_nobody_says(told):
    assert memory.available_memory() is None


def test_the_smaller_of_machine_and_container_counts(told):
    told(meminfo="MemTotal:  9000 kB\nMemAvailable:   5000 kB\n")
    assert memory.available_memory() == 5000 * KB
    told(memory_max="max\n", memory_current="7", memory_stat="inactive_file 3\n")
    assert memory.available_memory() == 5000 * KB
    told(memory_max=f"{4000 * KB}\n", memory_current=str(3000 * KB))
    told(memory_stat=f"anon 9\ninactive_file {1000 * KB}\n")
    assert memory.available_memory() == 2000 * KB
    told(memory_current=str(9000 * KB))
    assert memory.available_memory() == 0
