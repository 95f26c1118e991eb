"""The one exception for bad input from a user."""


class InputError(ValueError):
    """
    A file, setting or argument that cannot be used. Its message is one sentence that names the
    file, the field or entry and the remedy, fit to be shown without a traceback.
    """


DETECTRON2_INSTALL = (
    "python -m pip install 'git+https://github.com/facebookresearch/detectron2.git'"
)


def require_detectron2(what):
    """
    Args:
        what (str): the part of this package that is about to be used.

    Raises:
        ImportError: Detectron2 cannot be imported; the message says how to install it.
    """
    try:
        import detectron2.config  # noqa: F401  needs what Detectron2 itself depends on
    except ImportError as error:
        raise ImportError(
            f"{what} needs Detectron2, which cannot be imported ({error}); it is not on PyPI, "
            f"install it with: {DETECTRON2_INSTALL}"
        ) from None
