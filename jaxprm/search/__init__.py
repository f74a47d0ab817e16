"""Guided search over any environment, policy and scorer."""
