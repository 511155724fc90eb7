"""WHAT a weight may become: geometry, sets and their nearest points, the plan. Pure functions of tensors."""
