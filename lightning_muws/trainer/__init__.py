"""WHEN each step happens in Lightning. Imports no Lightning namespace."""
