"""The transformer, its attention and prefix cache, and how they are sharded."""
