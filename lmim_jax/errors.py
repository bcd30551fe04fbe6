"""The one exception that is shown to users without a traceback."""


class UserError(ValueError):
    """Something only the user can mend: the message names the key or file at fault and says what to do, in one line."""
