"""What a run tells: metrics, their writers, progress, plots and videos (NumPy only)."""
