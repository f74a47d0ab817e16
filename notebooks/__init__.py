"""The notebooks and the code that they share."""
