"""A reward model or a checkpoint on disk: found, read, described."""
