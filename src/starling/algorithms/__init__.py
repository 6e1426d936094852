"""Algorithms: one file each, pure functions of a state and a rollout."""
