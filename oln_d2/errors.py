"""The one exception for bad input from a user."""


class InputError(ValueError):
    """
    A file, setting or argument that cannot be used. Its message is one sentence that names the file,
    the field or entry and the remedy, fit to be shown without a traceback.
    """
