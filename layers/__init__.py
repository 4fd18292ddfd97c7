"""Layers that are not plain attention or linear layers, a file a kind."""
