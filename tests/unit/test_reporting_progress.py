"""The progress display: its pace, its figures, and that it cannot stop a run."""

import io
import os
import pty
import subprocess
import sys

import pytest

from starling.reporting import progress
from starling.reporting.progress import Progress, TimeSplit


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


SHARES = {
    "perf/collect_share": 0.5,
    "perf/update_share": 0.25,
    "perf/wait_share": 0.05,
    "perf/report_share": 0.2,
}


def test_a_plain_line_has_all_figures(clock):
    stream = io.StringIO()
    bar = Progress(100_000, title="Pendulum-v1", stream=stream)
    clock.now += 5
    bar.update(10_000, return_mean=-1234.56, shares=SHARES)
    assert stream.getvalue() == (
        "Pendulum-v1 | 10 % | 10,000 / 100,000 steps | 2,000 steps/s | 0:00:45 left | "
        "return -1,234.6 | collect 50% update 25% wait 5% report 20%\n"
    )


def test_plain_lines_come_every_few_seconds_however_often_it_is_told(clock):
    stream = io.StringIO()
    bar = Progress(100_000, stream=stream)
    for step in range(1, 10_001):
        clock.now += 0.01
        bar.update(step)
    assert 15 <= len(stream.getvalue().splitlines()) <= 20
    bar.update(10_050)
    bar.close()
    bar.close()
    last = stream.getvalue().splitlines()[-1]
    assert last.startswith("10 % | 10,050 / 100,000 steps")
    assert len(stream.getvalue().splitlines()) <= 21


def test_speed_and_time_left_are_of_the_last_half_minute_and_of_this_run_only(clock):
    stream = io.StringIO()
    bar = Progress(1_000_000, initial_step=500_000, stream=stream)
    clock.now += 100
    bar.update(500_100)  # slow: something was compiled
    for i in range(1, 101):
        clock.now += 1
        bar.update(500_100 + i * 1000)
    assert "1,000 steps/s | 0:06:40 left" in stream.getvalue().splitlines()[-1]


def test_a_hundred_percent_is_the_end_and_no_more(clock):
    stream = io.StringIO()
    bar = Progress(1000, stream=stream)
    for step in (999, 1000, 1024):
        clock.now += 5
        bar.update(step)
    assert [line.split(" |")[0] for line in stream.getvalue().splitlines()] == [
        "99 %",
        "100 %",
        "100 %",
    ]


def test_quiet_and_standard_output(clock, capsys):
    with Progress(10, quiet=True) as bar:
        clock.now += 100
        bar.update(10)
        bar.message("done")
    assert capsys.readouterr() == ("", "")
    with Progress(10) as bar:
        clock.now += 100
        bar.update(10)
        bar.message("done")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[1:] == ["done"]


@pytest.mark.parametrize("error", [BrokenPipeError, ValueError])
def test_a_stream_that_breaks_is_left_alone(clock, error):
    class Broken(io.StringIO):
        calls = 0

        def write(self, text):
            Broken.calls += 1
            raise error("gone")

    bar = Progress(100, stream=Broken())
    for step in range(50):
        clock.now += 10
        bar.update(step)
    bar.message("hello")
    bar.close()
    assert Broken.calls == 1


TERMINAL = """
import sys
from starling.reporting import progress
progress._BAR_INTERVAL = 0.0
with progress.Progress(1_000_000, title="CartPole-v1") as bar:
    for step in range(0, 1_000_001, 250_000):
        bar.update(step, return_mean=123.0)
        if step == 500_000:
            bar.message("halfway [there]")
    bar.update(1_000_000)
print('{"json": true}')
"""


@pytest.mark.timeout(60)
def test_on_a_terminal_there_is_a_bar_and_standard_output_stays_clean():
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(
        [sys.executable, "-c", TERMINAL],
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=follower,
        env=environment,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 65536)
        except OSError:  # the last end of the terminal was closed
            break
    os.close(leader)
    out, _ = child.communicate()
    assert child.returncode == 0
    assert out == b'{"json": true}\n'
    text = shown.decode()
    assert "━" in text
    assert "halfway [there]" in text
    assert "100 %  1,000,000 / 1,000,000 steps" in text
    assert text.count("return 123.0") >= 3
    assert text.rfind("\x1b[?25l") < text.rfind("\x1b[?25h")  # the cursor is back


def test_time_split_adds_up(clock):
    split = TimeSplit()
    for part, seconds in [("collect", 3), ("update", 4), ("wait", 1), ("collect", 1)]:
        split.enter(part)
        clock.now += seconds
    split.enter("report")
    clock.now += 1
    assert split.shares() == {
        "perf/collect_share": 0.4,
        "perf/update_share": 0.4,
        "perf/wait_share": 0.1,
        "perf/report_share": 0.1,
    }
    split.enter("update")
    clock.now += 2
    assert split.shares()["perf/update_share"] == 1.0
    assert sum(split.shares().values()) == 1.0  # even at once, in no time
