"""A reward model behind HTTP. Needs the `serve` extra; only the command line imports it."""
