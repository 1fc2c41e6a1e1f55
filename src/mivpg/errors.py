"""The errors that a user's input can cause; the command line prints them as one line and exits with 1."""


class MivpgError(ValueError):
    """Something in the user's files or settings is not as it has to be.

    The message is one line that names the file, the bag or the field, what was found there and what was expected.
    """


class BagError(MivpgError):
    """One bag cannot be read; the other bags of a long run can."""
