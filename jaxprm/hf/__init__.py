"""Hugging Face checkpoints and config.json, read and written, and models on the hub."""
