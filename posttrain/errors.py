"""The one exception that means 'the user can fix this'. It lives in the package that imports no other."""


class UserError(Exception):
    """A mistake in a recipe, a file or a setting.

    The message is one line: what is wrong, where (file, line or field), and what to do. The command line
    prints it without a traceback and exits with code 2. `detail` is what the user may have to read besides, such
    as the end of a log; it is shown below the message as it is.
    """

    def __init__(self, message: str, detail: str = ""):
        super().__init__(message)
        self.detail = detail
