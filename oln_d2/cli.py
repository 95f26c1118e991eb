"""The command line, `oln-d2` or `python -m oln_d2`: gathers the commands of `oln_d2.commands`."""

import argparse
import sys
from collections.abc import Sequence

from oln_d2.checks import InputError
from oln_d2.commands import (
    benchmark,
    convert,
    evaluate,
    export,
    propose,
    quickstart,
    sweep,
    train,
    visualize,
)

COMMANDS = (
    quickstart,
    propose,
    evaluate,
    visualize,
    train,
    sweep,
    convert,
    export,
    benchmark,
)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command. Return its exit code: 0, 1 if what it ran on failed (recipes of a sweep, all
    images), or 2 for bad input and for training that diverged.
    """
    parser = argparse.ArgumentParser(prog="oln-d2", description="Open-world object localization.")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.HELP,
            description=command.__doc__,
            epilog=getattr(command, "EXAMPLES", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except (InputError, ImportError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
