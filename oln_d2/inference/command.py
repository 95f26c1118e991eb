"""The command `python -m oln_d2 propose`."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_convert, nms
from tqdm import tqdm

from oln_d2.data.coco import load_coco
from oln_d2.errors import InputError, require_extra
from oln_d2.evaluation.coco_results import write_results
from oln_d2.files import write_whole
from oln_d2.inference.inputs import find_sources, read_frames
from oln_d2.inference.journal import Journal
from oln_d2.inference.models import load_model
from oln_d2.visualize import (
    QUALITY_NAMES,
    contact_sheet,
    draw_proposals,
    picture_path,
    save_picture,
)

TOLD = 3  # of the images that a message is about
WAITING = 4  # batches of images that wait for others of their size
ON_A_SHEET = 60


def propose(args):
    """
    Args:
        args: the command's arguments, see `oln_d2.cli`.

    Returns:
        int: 0, or 1 if no image could be read.

    Raises:
        InputError: arguments or files that cannot be used, before any work is lost.
    """
    _check(args)
    root, sources = find_sources(args.inputs, args.output)
    if any(source.is_video for source in sources):
        require_extra("av", "a video", "video")
    if args.format == "yolo":
        _check_labels(sources)
    image_ids = None
    if args.gt:
        image_ids, unknown = _image_ids(args.gt, sources)
        sources = [source for source in sources if source.name in image_ids]
    model = load_model(args.weights, args.config_file, args.device)
    settings = {"model": model.identity, "root": root}
    settings |= {name: getattr(args, name) for name in ("top_k", "score", "nms", "every")}
    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {args.output}: cannot be made ({error.strerror})") from None
    journal = Journal(os.path.join(args.output, "journal.jsonl"), settings)
    done, new, failures = _run(model, sources, journal, args)
    names = [name for own in done.values() for name in own]
    _write(names, image_ids, journal, args)
    if names and (args.draw or args.contact_sheet):
        _draw(done, journal, args)
    print(
        f"Proposals for {len(names)} images, {new} of them new, are in {args.output}; images are "
        f"named relative to {root}"
    )
    if args.top_k > model.max_detections:
        print(f"The model gives at most {model.max_detections} boxes an image, not {args.top_k}")
    if args.gt and unknown:
        print(f"{len(unknown)} are not in {args.gt} and were left out: {_some(unknown)}")
    with write_whole(os.path.join(args.output, "unreadable.txt")) as temporary:
        Path(temporary).write_text(
            "".join(f"{failure}\n" for failure in failures), encoding="utf-8"
        )
    if failures:
        print(f"{len(failures)} could not be read:", *failures, sep="\n  ")
    return int(not names)


def _check(args):
    for option in ("batch_size", "top_k", "every", "draw_top"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise InputError(f"--{option.replace('_', '-')} {value}: expected 1 or more")
    for option in ("score", "nms"):
        value = getattr(args, option)
        if value is not None and not 0 <= value <= 1:
            raise InputError(f"--{option} {value}: expected a number from 0 to 1")
    if os.path.exists(args.output) and not os.path.isdir(args.output):
        raise InputError(f"--output {args.output}: is a file; give a folder")
    if args.gt and args.format != "coco":
        raise InputError(f"--gt: only results of --format coco have image ids, not {args.format}")


def _check_labels(sources):
    """YOLO's text is named as the image, but for the ending: that has to tell them apart."""
    first = {}
    for source in sources:
        if first.setdefault(_label(source.name), source) is not source:
            other = first[_label(source.name)]
            raise InputError(
                f"--format yolo: {other.path} and {source.path} would have the same text file; "
                "rename one, or use --format csv"
            )


def _label(name):
    return os.path.splitext(name)[0] + ".txt"


def _image_ids(gt, sources):
    """
    Image ids of a COCO file by the sources' names: its file_name is the end of a path. And the
    paths of the sources that it does not have.
    """
    ids = {image.get("file_name"): image["id"] for image in load_coco(gt)["images"]}
    ret, first, unknown = {}, {}, []
    for source in sources:
        parts = source.path.split(os.sep)
        ends = ("/".join(parts[i:]) for i in range(len(parts)))  # the longest first
        known = next((end for end in ends if end in ids), None)
        if known is None:
            unknown.append(source.path)
            continue
        if first.setdefault(known, source) is not source:
            raise InputError(
                f"{first[known].path} and {source.path} would both be the image {known} of {gt}; "
                "leave one out"
            )
        ret[source.name] = ids[known]
    if not ret:
        raise InputError(
            f"{gt}: has no image of these file names: {_some(unknown)}; give the file of these "
            "images"
        )
    return ret, unknown


def _some(paths):
    more = f" and {len(paths) - TOLD} more" if len(paths) > TOLD else ""
    return ", ".join(paths[:TOLD]) + more


def _run(model, sources, journal, args):
    """
    Propose on all that is not in the journal.

    Returns:
        dict[Source, list[str]]: the names of the frames of each; none where it cannot be read.
        int: how many were not in the journal.
        list[str]: what went wrong.
    """
    done, failures, waiting, new = {}, [], {}, 0
    progress = tqdm(desc="proposing", unit="image", disable=None)
    if not any(source.is_video for source in sources):
        progress.total = len(sources)

    def finish(shape):
        nonlocal new
        batch = waiting.pop(shape)
        try:
            found = model([image for *_, image in batch])
        except torch.cuda.OutOfMemoryError:
            raise InputError(
                f"--batch-size {args.batch_size}: the GPU's memory is too small for it; what is "
                "done stays, go on with a smaller one"
            ) from None
        for (name, stamp, image), detections in zip(batch, found):
            picture = Path(_picture(args.output, name))
            picture.unlink(missing_ok=True)  # of the image as it was before
            entry = {"height": image.height, "width": image.width}
            journal.add(name, stamp, entry | _selected(detections, args))
        progress.update(len(batch))
        new += len(batch)

    for source in sources:
        stamp = _stamp(source.path)
        if journal.has(source.name, stamp):  # of a video: the names of its frames
            own = journal.read(source.name)["frames"] if source.is_video else [source.name]
            done[source] = own
            progress.update(len(own))
            continue
        own, broken = done.setdefault(source, []), False
        for name, image in read_frames(source, args.every):
            if isinstance(image, InputError):
                failures.append(str(image))
                broken = True
                progress.update()
                continue
            own.append(name)
            if journal.has(name, stamp):
                progress.update()
                continue
            shape = model.input_shape(image.height, image.width)
            waiting.setdefault(shape, []).append((name, stamp, image))
            if len(waiting[shape]) == args.batch_size:
                finish(shape)
            elif sum(map(len, waiting.values())) >= WAITING * args.batch_size:
                finish(max(waiting, key=lambda key: len(waiting[key])))
        if source.is_video and not broken:
            for shape in list(waiting):
                finish(shape)
            journal.add(source.name, stamp, {"frames": own})
    for shape in list(waiting):
        finish(shape)
    progress.close()
    return done, new, failures


def _stamp(path):
    """Differs where the file may; None of one that is not there, as a link may be."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def _selected(detections, args):
    """Those above the score, without overlapping ones, at most k, best first; as lists."""
    masks = detections.pop("masks", None)
    kept = np.argsort(-detections["scores"], kind="stable")
    kept = kept[detections["scores"][kept] > args.score]
    if args.nms is not None:
        boxes, scores = (
            torch.from_numpy(detections[name][kept]).float() for name in ("boxes", "scores")
        )
        kept = kept[nms(boxes, scores, args.nms).numpy()]
    kept = kept[: args.top_k]
    ret = {name: values[kept].tolist() for name, values in detections.items()}
    if masks is not None:
        ret["masks"] = [
            {"size": list(masks[i]["size"]), "counts": masks[i]["counts"].decode()} for i in kept
        ]
    return ret


def _load(journal, name):
    entry = journal.read(name)
    entry["boxes"] = torch.tensor(entry["boxes"], dtype=torch.double).reshape(-1, 4)
    for key in ("scores", *QUALITY_NAMES):
        if key in entry:
            entry[key] = np.array(entry[key], float)
    return entry


def _write(names, image_ids, journal, args):
    def entries():
        return ((name, _load(journal, name)) for name in names)

    if args.format == "coco":
        ids = image_ids or {name: i for i, name in enumerate(names, 1)}
        write_results(
            os.path.join(args.output, "results.json"),
            (
                (
                    ids[name],
                    box_convert(entry["boxes"], "xyxy", "xywh").numpy(),
                    entry["scores"],
                    entry.get("masks"),
                    {key: entry[key] for key in QUALITY_NAMES if key in entry},
                )
                for name, entry in entries()
            ),
        )
        images = [
            {"id": ids[name], "file_name": name, "height": e["height"], "width": e["width"]}
            for name, e in entries()
        ]
        categories = [{"id": 1, "name": "object"}]
        content = {"images": images, "annotations": [], "categories": categories}
        with write_whole(os.path.join(args.output, "images.json")) as temporary:
            Path(temporary).write_text(json.dumps(content), encoding="utf-8")
    elif args.format == "csv":
        path = os.path.join(args.output, "proposals.csv")
        with write_whole(path) as temporary, open(
            temporary, "w", newline="", encoding="utf-8"
        ) as f:
            writer = csv.writer(f)
            writer.writerow(["file_name", "x1", "y1", "x2", "y2", "score", *QUALITY_NAMES])
            for name, entry in entries():
                blank = [""] * len(entry["scores"])
                columns = (entry.get(key, blank) for key in ("scores", *QUALITY_NAMES))
                for box, *scores in zip(entry["boxes"].tolist(), *columns):
                    writer.writerow([name, *box, *scores])
    else:
        for name, entry in entries():
            size = torch.tensor([entry["width"], entry["height"]] * 2)
            boxes = box_convert(entry["boxes"] / size, "xyxy", "cxcywh").numpy()
            rows = np.hstack([boxes, entry["scores"][:, None]])
            path = os.path.join(args.output, "labels", _label(name))
            with write_whole(path) as temporary:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                lines = ["0 " + " ".join(f"{v:.6g}" for v in row) for row in rows.tolist()]
                Path(temporary).write_text("".join(f"{line}\n" for line in lines))


def _picture(output, name):
    return picture_path(os.path.join(output, "pictures"), name)


def _draw(done, journal, args):
    """Pictures of all images that have none yet, and sheets of all."""
    number = args.draw_top
    paths = {name: _picture(args.output, name) for own in done.values() for name in own}
    drawn = os.path.join(args.output, "pictures", "boxes.txt")  # how many there are on pictures
    if not os.path.exists(drawn) or Path(drawn).read_text() != str(number):
        for path in paths.values():
            Path(path).unlink(missing_ok=True)
        with write_whole(drawn) as temporary:
            os.makedirs(os.path.dirname(drawn), exist_ok=True)
            Path(temporary).write_text(str(number))
    for source, own in tqdm(done.items(), desc="drawing", unit="file", disable=None):
        missing = {name for name in own if not os.path.exists(paths[name])}
        for name, image in read_frames(source, args.every) if missing else ():
            if name not in missing:
                continue
            if isinstance(image, InputError):
                raise image  # it could be read when the run began
            entry = _load(journal, name)
            qualities = {key: entry[key][:number] for key in QUALITY_NAMES if key in entry}
            picture = draw_proposals(
                image,
                entry["boxes"][:number].numpy(),
                entry["scores"][:number],
                qualities,
                entry.get("masks", [])[:number],
            )
            save_picture(picture, paths[name])
    if args.contact_sheet:
        paths = list(paths.items())
        for number, begin in enumerate(range(0, len(paths), ON_A_SHEET), 1):
            names, files = zip(*paths[begin : begin + ON_A_SHEET])
            path = os.path.join(args.output, f"contact_sheet_{number:03d}.jpg")
            save_picture(contact_sheet(map(Image.open, files), names), path)
