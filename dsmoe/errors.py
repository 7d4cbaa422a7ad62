"""The one exception for bad input: a single clear line for the user, exit status 2, no traceback."""


class UserError(ValueError):
    """Something the user gave is wrong.

    The message is one line that says what was wrong, where, the offending value and what would be right.
    Command-line entry points print it and exit with status 2.
    """
