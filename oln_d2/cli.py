"""The command line, `oln-d2` or `python -m oln_d2`: gathers the commands of `oln_d2.commands`."""

import argparse
import os
import sys
from collections.abc import Sequence

from oln_d2.checks import interrupted, reason
from oln_d2.commands import (
    alternate,
    audit,
    benchmark,
    compare,
    convert,
    evaluate,
    export,
    propose,
    quickstart,
    train,
    visualize,
)

COMMANDS = (
    quickstart,
    propose,
    evaluate,
    compare,
    visualize,
    audit,
    train,
    alternate,
    convert,
    export,
    benchmark,
)
# See `reason`.
REMEDIES = (
    "give it more, as in docker run --shm-size 8g, or use fewer --workers",
    "use smaller batches or images, or end other programs",
)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a command. Return its exit code: 0, 1 if what it ran on failed (trainings, all
    images), 2 for bad input, for training that diverged and where the machine did not have what was
    needed, 130 for Ctrl-C, 141 if nobody reads what is printed any more.
    """
    parser = argparse.ArgumentParser(prog="oln-d2", description="Open-world object localization.")
    version = sys.modules["oln_d2"].__version__  # the facade must not be imported here
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
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
        subparser.set_defaults(run=command.run, goes_on=getattr(command, "GOES_ON", ""))
    goes_on = ""
    try:
        try:
            if (sys.argv[1:] if argv is None else argv)[:1] == ["sweep"]:
                parser.error(
                    "sweep is a part of compare now, which trains recipes and compares what they "
                    "find: oln-d2 compare GT RECIPE ... --images DIR --split voc --output DIR"
                )
            args = parser.parse_args(argv)
            goes_on = args.goes_on
            return args.run(args) or 0
        finally:
            print(end="", flush=True)  # here, where a reader that is gone does no harm
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return 141
    except BaseException as error:
        if interrupted(error):
            print(f"\nstopped{goes_on and '; ' + goes_on}", file=sys.stderr)
            return 130
        sentence = reason(error, *REMEDIES)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
