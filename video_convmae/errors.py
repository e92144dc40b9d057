"""Errors that a user can mend; `video-convmae` prints them in one line, without a traceback."""


class UserError(ValueError):
    """Base class: the message names the value, what was expected and what to do."""
