"""A reward model behind HTTP. Needs the `serve` extra."""
