"""What a user is told: bad input, and what is not installed."""

import importlib


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


def require_extra(module, what, extra):
    """
    Args:
        module (str): of another project.
        what (str): the part of this package that is about to use it.
        extra (str): of setup.py, which installs it.

    Returns:
        module: imported.

    Raises:
        ImportError: it cannot be imported; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{what} needs {module}, which cannot be imported ({error}); install the extra "
            f"`{extra}`: python -m pip install -c constraints.txt -e '.[{extra}]'"
        ) from None


def check_limits(rows):
    """
    Args:
        rows (iterable): name, value, whether it fits, and what fits: "1 or more".

    Raises:
        InputError: of the first that does not.
    """
    for name, value, fits, allowed in rows:
        if not fits:
            raise InputError(f"{name} is {value}; it has to be {allowed}")
