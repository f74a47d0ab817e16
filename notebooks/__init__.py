"""The notebooks, and what they share."""
