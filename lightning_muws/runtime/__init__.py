"""Runs compressed networks fast. Knows no training and no Lightning."""
