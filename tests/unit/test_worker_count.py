"""How many workers there are, and what they share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from starling.envs import worker_count
from starling.envs.worker_count import choose_workers, usable_cores
from starling.errors import UserError


@given(n=st.integers(1, 200), data=st.data(), cores=st.integers(1, 64))
def test_what_is_chosen_fits(n, data, cores):
    batch = data.draw(st.none() | st.integers(1, n))
    workers = choose_workers(n, None, batch, cores)
    assert 1 <= workers <= n
    if batch in (None, n):
        assert workers == min(cores, n)
    else:
        assert n % workers == 0
        assert batch % (n // workers) == 0
    assert choose_workers(n, workers, batch, 1) == workers  # and may be asked for


def test_no_more_workers_than_environments():
    assert choose_workers(3, 8, None, 4) == 3


@pytest.mark.parametrize(("n", "workers", "batch"), [(8, 3, 4), (8, 2, 2), (7, 7, 8), (4, 0, None)])
def test_what_does_not_fit_is_refused(n, workers, batch):
    with pytest.raises(UserError):
        choose_workers(n, workers, batch, 4)


def test_a_containers_share_of_the_cores_counts(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(worker_count, "_CPU_QUOTA", quota)
    unlimited = usable_cores()
    quota.write_text("100000 100000\n")
    assert usable_cores() == 1
    quota.write_text("50000 100000\n")
    assert usable_cores() == 1
    quota.write_text("max 100000\n")
    assert usable_cores() == unlimited >= 1
