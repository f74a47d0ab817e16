"""A training run compiled for a TPU slice that is not here."""
