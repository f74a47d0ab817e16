"""The exceptions a user is meant to read."""

# The exit status of work that was taken away and that the same command goes on with (EX_TEMPFAIL of sysexits.h).
RESUMABLE = 75


class UserError(ValueError):
    """A mistake a user can mend. The message is one line: what, where, the value, the bound, the fix.

    The command line prints it without a traceback and exits with status 2.
    """


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Interrupted(Exception):
    """The machine is being taken away, or a part of it is gone. The message is one line; what was done is kept.

    The command line prints it and exits with status 75: the same command goes on where it stopped.
    """
