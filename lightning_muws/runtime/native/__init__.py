"""The C++ kernels, behind a plain C interface. The package works without them, with torch operations."""
