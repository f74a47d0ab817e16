"""Hugging Face checkpoints and config.json, read and written; models on the hub."""
