"""
Finds objects that the annotations of a data set lack: proposals that no annotation explains, the
most promising first, on a page, `index.html`, to review them in a browser with one key each. The
page saves a file of decisions; --merge adds what was accepted to a copy of the annotations.
"""

import argparse

from oln_d2.checks import InputError
from oln_d2.commands.arguments import pick, print_failures

GOES_ON = "the same command goes on"
HELP = "what the annotations of a data set lack, to be reviewed in a browser"
EXAMPLES = """\
examples:
  oln-d2 audit train.json --images train/
  oln-d2 audit train.json --merge decisions.json
  oln-d2 audit train.json --images train/ --cross-fit 3 --output output/audit3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gt", metavar="GT", help="annotations in COCO format; never changed")
    parser.add_argument("--images", metavar="DIR", help="where the images are")
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="output/audit",
        help="where everything goes (default %(default)s)",
    )
    parser.add_argument(
        "--merge",
        metavar="FILE",
        nargs="+",
        default=[],
        help="decisions that the page saved: the audit in OUTPUT goes on, writes merged.json there "
        "and lists the rest anew",
    )
    parser.add_argument(
        "--accept-above",
        type=float,
        metavar="T",
        help="also write OUTPUT/pseudo.json, the annotations with all candidates of at least this "
        "score, without a review",
    )
    parser.add_argument(
        "--accept-top",
        type=int,
        metavar="N",
        help="likewise, with the first N candidates of each image at most",
    )
    parser.add_argument(
        "--format",
        dest="export",
        choices=["labelstudio", "cvat"],
        help="also write the images of the list, with candidates and annotations, for this tool",
    )
    parser.add_argument(
        "--number",
        type=int,
        default=1000,
        metavar="N",
        help="candidates that are listed (default %(default)s)",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="also hide some annotations and count how many of them the candidates contain: how "
        "much of what is missing the list will show; OUTPUT/estimate.json",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of what is hidden and of parts, default 0"
    )
    parser.add_argument(
        "--cross-fit",
        type=int,
        metavar="K",
        help="divide the images into K parts, train on K - 1 of them and propose on the last, in "
        "turn: no image is judged by a model that has learnt its gaps (extras train and timm)",
    )
    parser.add_argument(
        "--recipe",
        metavar="YAML",
        help="how --cross-fit trains, options of `train` (default: configs/standalone/"
        "cross_fit.yaml, from the weights of this package)",
    )
    parser.add_argument("--weights", metavar="FILE", help="as of `propose`")
    parser.add_argument("--config-file", metavar="YAML", help="as of `propose`")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--min-size", type=int, metavar="PX", help="as of `propose`")
    parser.add_argument("--tiles", type=int, metavar="PX", help="as of `propose`")
    parser.add_argument(
        "--top-k",
        type=int,
        default=100,
        metavar="K",
        help="proposals of an image (default %(default)s)",
    )
    parser.add_argument(
        "--iou",
        type=float,
        help="overlap with an annotation that explains a proposal (default 0.5)",
    )
    parser.add_argument(
        "--copies",
        type=float,
        metavar="IOU",
        help="overlap with a better candidate that makes a copy (default 0.5)",
    )
    parser.add_argument(
        "--inside",
        type=float,
        metavar="X",
        help="the part of its score that a candidate inside an annotation loses, since it may be a "
        "part of that object (default 0.15)",
    )


def run(args: argparse.Namespace) -> int:
    from oln_d2.auditing import audit
    from oln_d2.loading import load

    chosen = pick(args, "weights config_file min_size tiles")
    given = [f"--{name.replace('_', '-')}" for name, value in chosen.items() if value is not None]
    if given and (args.cross_fit or args.merge):
        other = "--cross-fit trains its own models" if args.cross_fit else "--merge needs none"
        raise InputError(f"{', '.join(given)}: of a model, and {other}; leave one out")
    if args.recipe and not args.cross_fit:
        raise InputError("--recipe is how --cross-fit trains; give that, too, or leave it out")
    recipe = None
    if args.recipe:
        from oln_d2.commands.train import check_kinds
        from oln_d2.standalone.recipe import read_settings

        recipe = read_settings(args.recipe)
        check_kinds(args.recipe, recipe)
    done = audit(
        args.gt,
        args.images,
        args.output,
        proposer=load(**chosen, device=args.device) if given else None,
        recipe=recipe,
        hide=args.estimate,
        **pick(
            args,
            "cross_fit device merge accept_above accept_top export number top_k iou copies inside "
            "seed",
        ),
    )
    if done.merged:
        print(f"{done.added} annotations were added in {done.merged}")
        print(
            "The rest is ranked by what was decided"
            if done.learnt
            else "Decide on more for a new rank of the rest: accept 10 and reject 10 at least"
        )
    if done.pseudo:
        print(f"Candidates were added without a review in {done.pseudo}")
    listed = len(done.candidates.scores)
    if done.total == 0:
        print("No candidates: annotations explain all proposals")
    else:
        print(f"{done.total} candidates, the first {listed} of them are listed in {done.listed}")
        print(
            f"Open {done.page} in a browser; it needs the folder audit_files beside it, and the "
            "images where they are"
        )
    if done.summary:
        print(done.summary)
    for name, one in done.estimate.items():
        rows = [f"{t}: {n}, {100 * share:.0f} %" for t, (n, share) in one.by_score.items()]
        print(f"Hidden {name}; least score: candidates, hidden objects among them at least")
        print("  " + "; ".join(map(str, rows)))
    print_failures("Left out:", done.failures)
    return 0
