"""
Recall of unseen, seen and all objects from results files of any detector.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from oln_d2.commands.arguments import add_seen

if TYPE_CHECKING:
    from oln_d2.evaluation import OpenWorldResult

HELP = "recall of unseen, seen and all objects from a results file of any detector"
EXAMPLES = """\
examples:
  oln-d2 evaluate instances_val2017.json results.json --split voc --plot ar.png
  oln-d2 evaluate gt.json a.json b.json --seen cat,dog --protocol both --json out.json

RESULTS is in COCO's results format: a list of {"image_id", "bbox": [x, y, width, height] in pixels,
"score"}. category_id is ignored; an image may also go by its file_name. Write scores in full, and
more than 100 detections an image.

AR@k is the share of the objects that the first k detections of each image find, averaged over the
IoU thresholds .50 to .95. ARs, ARm, ARl: objects below 32 x 32 pixels, up to 96 x 96, above. AUC:
area under AR@k over log k up to 1000. "unseen" are the objects of all categories that are not in
the split. Protocol "xclass" (the OLN paper's): detections of seen objects cost no budget.
"filtered": they do. Numbers of different protocols are not comparable.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("gt", metavar="GT", help="ground truth in COCO format")
    parser.add_argument("results", metavar="RESULTS", nargs="+", help="detections in COCO format")
    add_seen(parser, required=True)
    parser.add_argument(
        "--protocol", choices=["xclass", "filtered", "both"], default="xclass", help="see below"
    )
    parser.add_argument(
        "--iou",
        choices=["box", "mask"],
        default="box",
        help="what overlaps; mask: the results need masks",
    )
    parser.add_argument("--k", type=_ks, metavar="K,...", help="budgets, default 1,10,20,...,1500")
    parser.add_argument(
        "--max-dets",
        type=int,
        metavar="N",
        help="only the N best detections of an image (default 1500; by the second protocol some "
        "papers take 100, some 900)",
    )
    parser.add_argument("--json", metavar="OUT", help="write all numbers here, values in 0..1")
    parser.add_argument("--plot", metavar="OUT", help="write a picture of AR@k here, e.g. ar.png")
    parser.add_argument(
        "--per-category", action="store_true", help="also the recall of each unseen category"
    )
    parser.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        help="also 95 %% confidence intervals from N draws of images",
    )
    parser.add_argument("--seed", type=int, default=0, help="of these draws, default 0")


def _ks(text: str) -> list[int]:
    try:
        return sorted({int(k) for k in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of integers such as 10,100"
        ) from None


def run(args: argparse.Namespace) -> None:
    from oln_d2.checks import POSITIVE_INT, SEED, check_limits
    from oln_d2.evaluation import GroundTruth, evaluate_by, plot_results
    from oln_d2.evaluation.open_world import PROTOCOLS
    from oln_d2.evaluation.plot import require_format
    from oln_d2.evaluation.result import GROUPS, percent, write_report
    from oln_d2.files import check_output

    check_limits(bootstrap=(args.bootstrap, POSITIVE_INT), seed=(args.seed, SEED))
    inputs = [args.gt, *args.results]
    for path in filter(None, (args.json, args.plot)):
        check_output(path, inputs)
        inputs.append(path)
    if args.plot:
        require_format(args.plot)
    settings: dict[str, Any] = {"iou_type": args.iou, "ks": args.k, "max_dets": args.max_dets}
    gt = GroundTruth.load(args.gt, args.split or args.seen, keep=False)
    protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)
    results = {}
    for path in args.results:
        for protocol, result in zip(protocols, evaluate_by(gt, path, protocols, **settings)):
            results[path, protocol] = result
    label = _short_names(args.results)
    titles = {key: f"{label[key[0]]}, {key[1]}" for key in results}
    report = {key: {"file": key[0], **result.to_dict()} for key, result in results.items()}
    for key, result in results.items():
        if args.per_category:
            report[key]["per_category"] = result.per_category()
        if args.bootstrap:
            report[key]["bootstrap"] = {
                "samples": args.bootstrap,
                "seed": args.seed,
                "level": 0.95,
                **result.bootstrap(args.bootstrap, args.seed),
            }
    if args.plot:
        plot_results(args.plot, {titles[key]: result for key, result in results.items()})
    if args.json:
        write_report(args.json, list(report.values()))

    if len(results) == 1:
        print(*results.values())
    else:
        _print_comparison(titles, results)
    for key, entry in report.items():
        ars = [f"AR@{k}" for k in results[key].ks]
        if args.per_category:
            rows = [
                [name, numbers["gts"], *(percent(numbers[ar]) for ar in ars)]
                for name, numbers in entry["per_category"].items()
            ]
            _print_table(f"Unseen categories, {titles[key]}", ["category", "number", *ars], rows)
        if args.bootstrap:
            names = [*ars, "AUC"]
            rows = [
                [
                    group,
                    *(" to ".join(map(percent, entry["bootstrap"][group][name])) for name in names),
                ]
                for group in GROUPS
            ]
            _print_table(f"95 % confidence intervals, {titles[key]}", ["objects", *names], rows)


def _print_comparison(titles: Mapping[Any, str], results: "Mapping[Any, OpenWorldResult]") -> None:
    from oln_d2.evaluation.result import GROUPS, percent

    for v, group in enumerate(GROUPS):
        rows = []
        for key, result in results.items():
            names = [f"AR@{k}" for k in result.ks]
            names += [f"AR{size}@{result.ks[-1]}" for size in "sml"] + ["AUC", "AP"]
            rows.append([titles[key], *(percent(result[group][name]) for name in names)])
        _print_table(f"{result.counts[v, 0].sum()} {group} objects", ["results", *names], rows)
    for key, result in results.items():
        print(f"\n{titles[key]}\n{result.summary()}")


def _print_table(title: str, headers: list[str], rows: list[list[Any]]) -> None:
    from oln_d2.evaluation.result import text_table

    print(f"\n{title}\n{text_table(headers, rows)}")


def _short_names(paths: Sequence[str]) -> dict[str, str]:
    """The files' names, or their paths where names repeat."""
    names = [os.path.basename(path) for path in paths]
    return dict(zip(paths, names if len(set(names)) == len(set(paths)) else paths))
