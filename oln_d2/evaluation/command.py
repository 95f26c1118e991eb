"""The command `python -m oln_d2 evaluate`."""

import os

from tabulate import tabulate

from oln_d2.errors import InputError
from oln_d2.evaluation.coco_results import read_results
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.open_world import DEFAULT_KS, PROTOCOLS, OpenWorldRecall
from oln_d2.evaluation.plot import plot_results, require_format
from oln_d2.evaluation.result import GROUPS, percent, write_report
from oln_d2.files import check_output


def evaluate(args):
    """
    Args:
        args: the command's arguments, see `oln_d2.cli`.

    Raises:
        InputError: files or arguments that cannot be used; nothing is written then.
    """
    if args.bootstrap is not None and args.bootstrap < 1:
        raise InputError(f"--bootstrap {args.bootstrap}: expected at least one draw")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: expected 0 or more")
    outputs = [path for path in (args.json, args.plot) if path]
    for path in outputs:
        check_output(path, (args.gt, *args.results))
    if args.plot:
        require_format(args.plot)
    max_dets = max(1500, *(args.k or [0])) if args.max_dets is None else args.max_dets
    ks = args.k or [k for k in DEFAULT_KS if k <= max_dets]
    gt = GroundTruth.load(args.gt, args.split or args.seen)
    protocols = PROTOCOLS if args.protocol == "both" else (args.protocol,)
    results = {}
    for path in args.results:
        detections = read_results(path, gt, masks=args.iou == "mask")
        for protocol in protocols:
            recall = OpenWorldRecall(gt, protocol, iou_type=args.iou, max_dets=max_dets, ks=ks)
            try:
                recall.update(*detections[:3], masks=detections.masks, box_format="xywh")
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            results[path, protocol] = recall.result()
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
        if args.per_category:
            rows = [
                [name, numbers["gts"], *(percent(numbers[f"AR@{k}"]) for k in ks)]
                for name, numbers in entry["per_category"].items()
            ]
            headers = ["category", "number", *(f"AR@{k}" for k in ks)]
            _print_table(f"Unseen categories, {titles[key]}", headers, rows)
        if args.bootstrap:
            names = [*(f"AR@{k}" for k in ks), "AUC"]
            rows = [
                [
                    group,
                    *(" to ".join(map(percent, entry["bootstrap"][group][name])) for name in names),
                ]
                for group in GROUPS
            ]
            _print_table(f"95 % confidence intervals, {titles[key]}", ["objects", *names], rows)


def _print_comparison(titles, results):
    for v, group in enumerate(GROUPS):
        rows = []
        for key, result in results.items():
            names = [f"AR@{k}" for k in result.ks]
            names += [f"AR{size}@{result.ks[-1]}" for size in "sml"] + ["AUC", "AP"]
            rows.append([titles[key], *(percent(result[group][name]) for name in names)])
        _print_table(f"{result.counts[v, 0].sum()} {group} objects", ["results", *names], rows)
    for key, result in results.items():
        print(f"\n{titles[key]}\n{result.summary()}")


def _print_table(title, headers, rows):
    table = tabulate(
        rows, headers, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
    )
    print(f"\n{title}\n{table}")


def _short_names(paths):
    """The files' names, or their paths where names repeat."""
    names = [os.path.basename(path) for path in paths]
    return dict(zip(paths, names if len(set(names)) == len(set(paths)) else paths))
