"""Ways to compute a layer. Each is ``build(layer, block_shape, example, *, relu=False) -> nn.Module | None``."""
