"""Writers: what lands where, what a resumed run cuts, and that no failure reaches the caller."""

import builtins
import json
import logging
import resource
import struct
import sys
import textwrap
import threading
import warnings

import numpy as np
import pytest
from counters import metrics_of
from tensorboardX.proto.event_pb2 import Event, SessionLog

from starling.errors import MissingExtraError
from starling.reporting import metrics, writers
from starling.reporting.episodes import Episodes
from starling.reporting.metrics import UndefinedMetricWarning
from starling.reporting.writers import MetricsWriter

pytestmark = pytest.mark.usefixtures("no_leaks")


def events(path):
    """Read a TFRecord file of TensorBoard events without TensorBoard's own reader."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        found.append(Event.FromString(data[at + 12 : at + 12 + size]))
        at += 12 + size + 4
    return found


def scalars(path):
    return [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for event in events(path)
        if event.summary.value
    ]


def episodes(*rows):
    steps, returns, lengths = zip(*rows, strict=True)
    return Episodes(np.array(returns, np.float64), np.array(lengths), np.array(steps))


def warned(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_metrics_are_valid_json_one_line_each_at_once(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(
            64,
            {
                "rollout/ep_rew_mean": None,
                "train/value_loss": np.float32(0.5),
                "train/approx_kl": float("nan"),
                "train/grad_norm": float("inf"),
                "time/iterations": np.int64(2),
            },
        )
        expected = {
            "time/total_timesteps": 64,
            "train/value_loss": 0.5,
            "train/approx_kl": None,
            "train/grad_norm": None,
            "time/iterations": 2,
        }
        assert metrics_of(tmp_path) == [expected]  # before close
        writer.write(128, {"time/total_timesteps": 128, "time/fps": 1.5})
    assert metrics_of(tmp_path)[1] == {"time/total_timesteps": 128, "time/fps": 1.5}
    assert '"time/iterations": 2}' in (tmp_path / "metrics.jsonl").read_text()
    assert not list(tmp_path.glob("*tfevents*"))


def test_undefined_names_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_warned", set())
    with (
        MetricsWriter(tmp_path, tensorboard=False) as writer,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", UndefinedMetricWarning)
        with pytest.raises(UndefinedMetricWarning, match="train/loss_of_value"):
            writer.write(1, {"train/loss_of_value": 1.0})


def test_episodes_come_back_exactly(tmp_path):
    rows = [(10, 0.1 + 0.2, 10), (20, -1e300, 9), (20, 7.0, 3)]
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write_episodes(episodes(rows[0]))
        writer.write_episodes(Episodes(*(np.zeros(0) for _ in range(3))))
        writer.write_episodes(episodes(*rows[1:]))
    text = (tmp_path / "episodes.csv").read_text().splitlines()
    assert text[0] == "step,return,length"
    assert [tuple(map(float, line.split(","))) for line in text[1:]] == rows


def test_tensorboard_gets_the_same_values(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (64, 128):
            writer.write(step, {"time/fps": step / 4, "rollout/ep_rew_mean": None})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    assert scalars(path) == [(64, {"time/fps": 16}), (128, {"time/fps": 32})]


def test_a_resumed_run_has_no_gap_and_no_double_count(tmp_path):
    for _ in range(2):  # resuming twice cuts nothing more
        with MetricsWriter(tmp_path) as writer:
            for step in (100, 200, 300):
                writer.write(step, {"time/fps": 1})
                writer.write_episodes(episodes((step - 50, 1.0, 50), (step, 2.0, 50)))
        with MetricsWriter(tmp_path, resume_step=200) as writer:
            assert [line["time/total_timesteps"] for line in metrics_of(tmp_path)] == [100, 200]
            writer.write(300, {"time/fps": 2})
            writer.write_episodes(episodes((250, 3.0, 50), (300, 4.0, 50)))
        got = [(line["time/total_timesteps"], line["time/fps"]) for line in metrics_of(tmp_path)]
        assert got == [(100, 1), (200, 1), (300, 2)]
        text = (tmp_path / "episodes.csv").read_text().splitlines()
        assert [line.split(",")[0] for line in text] == (
            "step 50 100 150 200 250 300".split()  # noqa: SIM905
        )
        assert [line.split(",")[1] for line in text[-2:]] == ["3.0", "4.0"]
        assert {path.name for path in tmp_path.iterdir() if "tfevents" not in path.name} == {
            "metrics.jsonl",
            "episodes.csv",
        }
        # TensorBoard hides what an older file has from the step of a START on.
        starts = [
            event.step
            for path in tmp_path.glob("*tfevents*")
            for event in events(path)
            if event.session_log.status == SessionLog.START
        ]
        assert starts == [201]
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_line_torn_by_a_kill_is_cut_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"time/total_timesteps": 5}\n{"time/total_timesteps": 1'
    )
    (tmp_path / "episodes.csv").write_text("step,return,length\n5,1.0,5\n1")
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=20) as writer:
        writer.write(15, {})
        writer.write_episodes(episodes((15, 2.0, 10)))
    assert [line["time/total_timesteps"] for line in metrics_of(tmp_path)] == [5, 15]
    assert (tmp_path / "episodes.csv").read_text() == "step,return,length\n5,1.0,5\n15,2.0,10\n"


def test_a_full_disk_costs_one_warning_and_leaves_whole_lines(tmp_path, caplog):
    """The limit on the size of files stands for the disk; it cuts a line in the middle."""
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"time/fps": 1})
    whole = (tmp_path / "metrics.jsonl").read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 10, hard))
    try:
        for step in (2, 3):
            writer.write(step, {"time/fps": 1})
        assert (tmp_path / "metrics.jsonl").read_text() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.write(4, {"time/fps": 1})  # there is room again
    writer.close()
    assert [line["time/total_timesteps"] for line in metrics_of(tmp_path)] == [1, 4]
    (message,) = warned(caplog)
    assert "metrics.jsonl" in message


def test_a_folder_that_cannot_be_written_costs_a_warning_each(tmp_path, caplog):
    with MetricsWriter(tmp_path / "missing") as writer:
        for step in range(3):
            writer.write(step, {"time/fps": 1})
            writer.write_episodes(episodes((step, 1.0, 1)))
    messages = warned(caplog)
    assert len(messages) == 3
    for part in ("metrics.jsonl", "episodes.csv", "TensorBoard"):
        assert sum(part in message for message in messages) == 1


def test_tensorboard_goes_on_in_a_new_file_after_a_failure(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(writers._TensorBoard, "_pause", 0.0)
    board = writers._TensorBoard(tmp_path, None)
    feed = writers._Background("TensorBoard", board)
    real_open, broken = builtins.open, [True]

    def full(file, *args, **kwargs):
        if "tfevents" in str(file) and broken:
            return real_open("/dev/full", *args, **kwargs)
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    monkeypatch.setattr(feed, "_warn", lambda what, warn=feed._warn: (broken.clear(), warn(what)))
    feed.put({writers.STEP: 1, "time/fps": 1.0})
    feed.put({writers.STEP: 2, "time/fps": 2.0})
    feed.stop()
    feed.join(30)
    (path,) = tmp_path.glob("*tfevents*")
    assert scalars(path) == [(2, {"time/fps": 2})]
    (message,) = warned(caplog)
    assert "TensorBoard failed (OSError" in message


class Hanging:
    """A destination that never answers until it is let go."""

    def __init__(self):
        self.entered, self.go = threading.Event(), threading.Event()
        self.taken = []

    def write(self, values):
        self.entered.set()
        self.go.wait()
        self.taken.append(values[writers.STEP])

    def close(self):
        self.taken.append("closed")


@pytest.mark.timeout(60)
def test_a_destination_that_hangs_blocks_nobody(caplog):
    hanging = Hanging()
    feed = writers._Background("W&B", hanging, queue_size=2)
    feed.put({writers.STEP: 0})
    assert hanging.entered.wait(30)
    for step in range(1, 10):
        feed.put({writers.STEP: step})
    feed.stop()
    feed.join(0.01)
    assert len(warned(caplog)) == 1
    assert "W&B is too slow" in warned(caplog)[0]
    hanging.go.set()
    feed.join(30)
    assert hanging.taken == [0, 1, 2, "closed"]
    assert not feed._thread.is_alive()


WANDB = """
    import json, pathlib
    log = pathlib.Path(__file__).parent / "calls.jsonl"
    def note(*call):
        with log.open("a") as file:
            file.write(json.dumps(call) + "\\n")
    class Settings:
        mode = "{mode}"
        def __init__(self, **settings):
            self.settings = self
    def setup(settings):
        return settings
    def login(prompt):
        assert not prompt
        return {key}
    class Run:
        def log(self, values, step):
            note("log", step, values)
            {fault}
        def finish(self):
            note("finish")
    def init(*, id, project, name, resume, config, **other):
        note("init", id, project, name, resume, config)
        {start}
        return Run()
"""


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

    def make(fault="pass", start="pass", key=True, mode="online"):
        code = textwrap.dedent(WANDB).format(fault=fault, start=start, key=key, mode=mode)
        (package / "__init__.py").write_text(code)
        return package / "calls.jsonl"

    yield make
    sys.modules.pop("wandb", None)


def test_wandb_resumes_the_same_run(tmp_path, fake_wandb):
    calls_file = fake_wandb()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"lr": 0.1}')
    for step in (10, 20):
        with MetricsWriter(folder, tensorboard=False, wandb_project="birds") as writer:
            writer.write(step, {"time/fps": 3.0, "rollout/ep_rew_mean": None})
    calls = [json.loads(line) for line in calls_file.read_text().splitlines()]
    identity = calls[0][1]
    start = ["init", identity, "birds", "run", "allow", {"lr": 0.1}]
    assert len(identity) >= 16
    assert calls == [
        start,
        ["log", 10, {"time/total_timesteps": 10, "time/fps": 3.0}],
        ["finish"],
        start,
        ["log", 20, {"time/total_timesteps": 20, "time/fps": 3.0}],
        ["finish"],
    ]


@pytest.mark.parametrize("where", ["start", "fault"])
@pytest.mark.parametrize("error", ["ConnectionError('no route')", "KeyboardInterrupt"])
def test_wandb_being_down_costs_one_warning(tmp_path, fake_wandb, caplog, where, error):
    calls_file = fake_wandb(**{where: f"raise {error}"})
    with MetricsWriter(tmp_path, tensorboard=False, wandb_project="birds") as writer:
        for step in (1, 2, 3):
            writer.write(step, {"time/fps": 1.0})
    assert len(metrics_of(tmp_path)) == 3
    (message,) = warned(caplog)
    assert message.startswith(f"W&B failed ({error.split('(')[0]}")
    kinds = [json.loads(line)[0] for line in calls_file.read_text().splitlines()]
    assert kinds.count("init") == 1  # a login that fails is not tried at every iteration


def test_wandb_without_a_key_does_not_ask_for_one(tmp_path, fake_wandb, caplog):
    calls_file = fake_wandb(key=False)
    with MetricsWriter(tmp_path, tensorboard=False, wandb_project="birds") as writer:
        writer.write(1, {"time/fps": 1.0})
    (message,) = warned(caplog)
    assert "wandb login" in message
    assert not calls_file.exists()


def test_wandb_offline_needs_no_key(tmp_path, fake_wandb, caplog):
    calls_file = fake_wandb(key=False, mode="offline")
    with MetricsWriter(tmp_path, tensorboard=False, wandb_project="birds") as writer:
        writer.write(1, {"time/fps": 1.0})
    assert not warned(caplog)
    assert '["finish"]' in calls_file.read_text()


def test_wandb_missing_names_the_extra_and_writes_nothing(tmp_path, monkeypatch):
    leftovers = tmp_path / "cwd" / "wandb"  # as W&B leaves where it was run
    leftovers.mkdir(parents=True)
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(sys, "path", [str(leftovers.parent)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MissingExtraError, match=r"starling-rl\[wandb\]"):
        MetricsWriter(run, wandb_project="birds")
    assert list(run.iterdir()) == []


def test_closing_twice_and_writing_after_is_harmless(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.close()
    writer.close()
    writer.write(1, {"time/fps": 1})
    assert metrics_of(tmp_path) == []
