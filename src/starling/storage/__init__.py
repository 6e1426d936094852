"""What is kept: rollouts in memory, checkpoints on disk. NumPy only."""
