"""The exceptions a user is meant to read."""

from __future__ import annotations

from data_pipeline.terminal import escape

# Exit status of interrupted work that the same command resumes (EX_TEMPFAIL of sysexits.h).
RESUMABLE = 75


class UserError(ValueError):
    """A mistake that a user can fix. The message is one line: what, where, the value, the bound, the fix.

    The command line prints it without a traceback and exits with status 2.
    """

    def __init__(self, message: object = ""):
        super().__init__(escape(str(message)))


class Interrupted(Exception):
    """The machine is being taken away, or a process of the run is gone. The message is one line; finished work is kept.

    The command line prints it and exits with status 75: the same command resumes.
    """
