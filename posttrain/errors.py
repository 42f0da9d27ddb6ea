"""The one exception that means 'the user can fix this', and the words of messages. Imports no other module of ours."""


def first_line(error: Exception) -> str:
    """Of another library's message, to quote in a line of our own; the error's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def counted(count: int, noun: str) -> str:
    """`1 image`, `2 images`, `1,000 processes`; for nouns that take an s."""
    # `processes`, `boxes`, `batches`; nouns in -y do not occur.
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}{ending}"


class UserError(Exception):
    """A mistake in a recipe, a file or a setting.

    The message is one line: what is wrong, where (file, line or field), and what to do. The command line
    prints it without a traceback and exits with code 2. `detail` is what the user may have to read besides, such
    as the end of a log; it is shown below the message as it is.
    """

    def __init__(self, message: str, detail: str = ""):
        super().__init__(message)
        self.detail = detail
