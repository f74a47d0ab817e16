"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A mistake a user can mend. The message is one line: what, where, the value, the bound, the fix.

    The command line prints it without a traceback and exits with status 2.
    """
