"""Policies: networks over nested spaces, and distributions over actions."""
