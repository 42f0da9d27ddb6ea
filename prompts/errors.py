"""The one exception that means 'the user can fix this'. It lives in the package that imports no other."""


class UserError(Exception):
    """A mistake in a recipe, a file or a setting.

    The message is one line: what is wrong, where (file, line or field), and what to do. The command line
    prints it without a traceback and exits with code 2.
    """
