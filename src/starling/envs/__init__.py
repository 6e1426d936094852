"""Environments in parallel: the vector environment contract and its backends. NumPy only."""
