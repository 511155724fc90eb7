"""Observes a network's layers, and folds and fuses the steps of its graph."""
