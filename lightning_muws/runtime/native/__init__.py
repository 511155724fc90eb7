"""The kernels in C++, behind a plain C interface. Everything works without them, in torch operations."""
