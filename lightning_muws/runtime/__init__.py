"""RUN fast: kernels for packed blocks, and the measured choice among them."""
