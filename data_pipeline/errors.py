"""Errors about the user's data."""


class DataError(ValueError):
    """Bad input data. The message is one line that names the file, the row and the fix."""
