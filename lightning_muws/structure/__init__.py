"""WHAT a weight may become: blocks, structures and their nearest points, and the plan. Pure functions of tensors."""
