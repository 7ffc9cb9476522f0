"""Noise schedules, inversion along them, and the network's conditioning."""
