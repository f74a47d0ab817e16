"""Reward models and checkpoints on disk: locating, reading and describing them."""
