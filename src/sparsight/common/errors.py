"""The one exception that stands for a user's mistake."""


class SparsightError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do.

    Stage scripts print it as one line and exit with status 1; every other exception is a defect of
    sparsight and keeps its traceback.
    """


def reason(error: Exception) -> str:
    """What another library's exception says, in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]
