"""Experiments: sweeps on Ray Tune, and several recipes at an equal budget of tokens."""
