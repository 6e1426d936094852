"""What is kept: rollouts and replays in memory, checkpoints on disk. NumPy only."""
