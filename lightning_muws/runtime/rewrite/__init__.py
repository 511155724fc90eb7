"""Changes to a network's graph: observe its layers, fold and fuse them."""
