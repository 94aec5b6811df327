"""The exception for a user's mistakes."""


class SparsightError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do.

    Stage scripts print the message in one line and exit with status 1. Any other exception is a bug in
    sparsight and keeps its traceback.
    """


def reason(error: Exception) -> str:
    """First line of another library's error message, or the exception's class name if there is no message.

    Of an error of the system only its text, without number and file name.
    """
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return (text.strip() or type(error).__name__).splitlines()[0]
