"""Timing of kernels and networks, and the reports on it."""
