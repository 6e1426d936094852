"""Starling: reinforcement learning on many environments in parallel."""

__version__ = "0.1.0"
