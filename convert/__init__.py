"""Conversion between published checkpoints and jvdiff's parameter trees, as tables; numpy only, no torch."""
