"""Policies, which propose actions, and episodes sampled from them."""
