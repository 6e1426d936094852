"""The memory that a replay asks for: how to need less, and what a restored one takes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import starling
from starling.errors import UserError
from starling.storage import replay_checks
from starling.storage.checkpoint import load_checkpoint, save_checkpoint
from starling.storage.replay import Replay
from starling.storage.rollout import Rollout


def test_images_that_do_not_fit_may_be_kept_frame_by_frame():
    images, actions = np.zeros((1, 1, 4, 84, 84), np.uint8), np.zeros((1, 1), np.int64)
    with pytest.raises(UserError, match=r"at most, or set frame_stack if its images are stacks"):
        Replay(10_000, 1).check_memory(images, actions, 10**8)
    Replay(10_000, 1, frame_stack=4).check_memory(images, actions, 10**8)
    with pytest.raises(UserError, match=r"at most$"):
        Replay(100_000, 1, frame_stack=4).check_memory(images, actions, 10**8)


def test_action_masks_count(monkeypatch):
    monkeypatch.setattr(replay_checks, "available_memory", lambda: 10**8)
    flags = np.zeros((2, 1), bool)
    rewards, masks = np.ones((2, 1), np.float32), np.ones((2, 1, 10_000), bool)
    rollout = Rollout(np.zeros((3, 1)), flags, rewards, flags, flags, None, None)
    replay = Replay(100_000, 1)
    with pytest.raises(UserError, match=r"transitions of 10,\d\d\d bytes takes 1\.0 GB"):
        replay.add(rollout._replace(action_masks=masks))
    assert len(replay) == replay.nbytes == 0
    assert replay.add(rollout) == 2


def test_what_is_restored_is_in_memory_once(tmp_path):
    shape, random = (10_000, 2), np.random.default_rng(0)
    flags, observations = np.zeros(shape, bool), random.normal(size=(10_001, 2, 50))
    replay = Replay(30_000, 2)
    rewards = np.ones(shape, np.float32)
    replay.add(Rollout(observations, flags, rewards, flags, flags, None, None))
    kept = replay.state()
    save_checkpoint(tmp_path, 0, {"replay": kept}, {}, {})
    saved, size = sum(array.nbytes for array in kept.values()), replay.nbytes
    assert 0.6 * size < saved < 0.7 * size
    peaks = {}
    for mapped in ((), ("replay",)):
        tracemalloc.start()
        try:
            loaded = load_checkpoint(tmp_path, mapped=mapped).arrays["replay"]
            restored = Replay(30_000, 2)
            restored.restore(loaded)
            peaks[mapped] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert restored.state().keys() == kept.keys()
        for name, array in restored.state().items():
            np.testing.assert_array_equal(array, kept[name], err_msg=name)
    assert peaks["replay",] < 1.1 * size
    assert peaks[()] > size + 0.9 * saved  # which it would have noticed


@pytest.mark.timeout(120)
def test_a_resumed_run_takes_no_more_than_its_replay(tmp_path, monkeypatch, shared_programs):
    settings = {"num_envs": 2, "num_steps": 8, "mini_batch_size": 8, "hidden_sizes": (8,)}
    settings |= {"learning_starts": 16, "buffer_size": 96, "timesteps": 96, "tensorboard": False}
    agent = starling.DQN("CartPole-v1", **settings, preset="none", log_dir=str(tmp_path))
    agent.train(quiet=True)
    agent.close()
    size, kept = agent.replay.nbytes, agent.replay.state()
    assert sum(array.nbytes for array in kept.values()) > 0.8 * size
    monkeypatch.setattr(replay_checks, "available_memory", lambda: int(1.2 * size))
    resumed = starling.DQN(resume=agent.run)
    resumed.close()
    np.testing.assert_array_equal(resumed.replay.state()["column0"], kept["column0"])
    monkeypatch.setattr(replay_checks, "available_memory", lambda: size // 2)
    with pytest.raises(UserError, match="lower buffer_size to"):
        starling.DQN(resume=agent.run)
