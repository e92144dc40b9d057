"""Errors that a user can mend, and notes; `video-convmae` prints each in one line, without a traceback."""


class Note(UserWarning):
    """Something that a user should know: what was assumed, or taken in place of something else."""


class UserError(ValueError):
    """Base class: the message names the value, what was expected and what to do."""
