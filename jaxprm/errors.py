"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake a user can mend. The message is one line: what, where, the value, the bound, the fix.

    The command line prints it without a traceback and exits with status 2.
    """


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
