"""Measures kernels and networks, and reports the numbers."""
