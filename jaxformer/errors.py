"""The one exception that users are meant to read."""


class UserError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what is wrong, where, and how to fix it. The command lines
    print it after ``error:`` and exit with status 1; library callers may catch it as `ValueError`.
    """
