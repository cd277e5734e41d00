"""Conversion between published checkpoints and jvdiff's parameter trees, as tables of rules; numpy only, no torch."""
