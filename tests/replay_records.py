"""Rollouts of records that bear checksums, for tests and for processes that they start."""

from __future__ import annotations

import os
import time

import numpy as np

from starling.storage.replay_writers import ReplayWriter
from starling.storage.rollout import Origin, Rollout


def observations(writer, env, t):
    """Records `[..., 4]`: whose, of which environment, which, and a checksum of these."""
    fields = np.stack(np.broadcast_arrays(writer, env, t), -1).astype(np.int64)
    return np.concatenate([fields, checksum(fields)[..., None]], -1)


def checksum(fields):
    mixed = fields.astype(np.uint64) * np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 3], "u8")
    mixed = mixed[..., 0] ^ mixed[..., 1] ^ (mixed[..., 2] << 7)
    return ((mixed * np.uint64(0xD6E8FEB86659FD93)) >> 1).astype(np.int64)


def rollout(writer, sequence, steps, envs, restarts=0) -> Rollout:
    """The `sequence`-th rollout of a writer; its steps are numbered on from the one before."""
    t = (sequence * steps + np.arange(steps + 1) + restarts * 10**9)[:, None]
    shown = observations(writer, np.arange(envs), t)
    t = np.broadcast_to(t[:-1], (steps, envs))
    terminated, truncated = ends(t)
    at = np.flatnonzero(truncated)
    final = np.where(truncated, -t, 0)
    return Rollout(
        shown,
        shown[:-1, :, 3] % 5,
        (t % 251).astype(np.float32),
        terminated,
        truncated,
        observations(writer, np.arange(envs), final).reshape(-1, 4)[at],
        at.astype(np.int32),
        origin=Origin(worker=writer, sequence=sequence, restarts=restarts),
    )


def ends(t):
    return t % 17 == 16, (t % 29 == 28) & (t % 17 != 16)


def torn(batch) -> int:
    """How many rows of a batch of one step are not what was sent."""
    shown, following = batch.observations, batch.next_observations
    t = shown[..., 2]
    terminated, truncated = ends(t)
    right = shown[..., 3] == checksum(shown[..., :3])
    right &= (batch.actions == shown[..., 3] % 5) & (batch.returns == t % 251)
    right &= (batch.discounts == 0) == terminated
    expected = observations(shown[..., 0], shown[..., 1], np.where(truncated, -t, t + 1))
    right &= (following == expected).all(-1) | terminated
    return int((~right).sum())


def contents(state) -> np.ndarray:
    """All transitions that can be sampled, `[M, 4]`."""
    return state["column0"][state["lengths"] > 0]


def write(connection, writer, rollouts, steps, envs, restarts=0, pause=0.0):
    """A writer's process: adds its rollouts until it is told that nobody takes them."""
    with connection:
        replay = ReplayWriter(connection)
        for sequence in range(rollouts):
            if replay.add(rollout(writer, sequence, steps, envs, restarts)) is None:
                break
            time.sleep(pause)


def write_until_killed(connection, writer, steps, envs):
    write(connection, writer, 10**9, steps, envs)
    os._exit(1)
