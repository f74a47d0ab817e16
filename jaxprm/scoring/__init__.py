"""Promises of steps and candidates, jitted and cached."""
