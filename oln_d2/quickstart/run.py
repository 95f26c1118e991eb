"""Train OLN-Box and Faster R-CNN on the synthetic data, compare what they find, and show it."""

import json
import shutil
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from oln_d2.boxes import to_xyxy
from oln_d2.checks import (
    POSITIVE,
    POSITIVE_INT,
    SEED,
    InputError,
    check_limits,
    needs,
    one_of,
    require_detectron2,
)
from oln_d2.data.images import open_image
from oln_d2.drawing import Objects, choose, contact_sheet, draw_proposals, save_picture
from oln_d2.evaluation import (
    GroundTruth,
    OpenWorldRecall,
    OpenWorldResult,
    plot_results,
    read_results,
)
from oln_d2.files import StrPath, lock_folder, make_folder, read_json, write_file, write_whole
from oln_d2.quickstart.standalone_engine import DETECTIONS
from oln_d2.quickstart.synthetic import KNOWN, make_dataset

MODELS = {"oln_box": "OLN-Box", "faster_rcnn": "Faster R-CNN"}
KS = (10, 100)
SECONDS = 0.11  # to train on an image once and its share of all else, on 2 cores
NUM_PICTURES = 4  # the first images of the test set, not chosen by how they come out
TOP = 10  # boxes that are drawn

MEANING = """
The training images show {unannotated}. Faster R-CNN learns to separate objects from background, and
everything that is not annotated counts as background; OLN learns how well boxes fit the annotated
objects and is taught little about the rest. By the protocol "xclass", AR@k of the novel objects
looks at k detections of an image beside those of known objects. These are the numbers of one seed
and {num_test} images of shapes{designed}, no measure of how the two compare on photographs.
docs/quickstart_study.md has three seeds, and the control without novel objects in the training
images, in which neither model is clearly ahead.
"""


def quickstart(
    output: StrPath,
    *,
    engine: str = "auto",
    seed: int = 0,
    control: bool = False,
    images: int = 200,
    epochs: float = 5.0,
) -> dict[str, OpenWorldResult]:
    """
    Make the data, train and evaluate both models, print a table and write pictures. What `output`
    already holds of the same run is not done again. On the CPU, in one thread: so the same seed
    gives the same numbers, and other work on the machine slows it down less.

    Args:
        output: a folder.
        engine: "detectron2", "standalone", or "auto": Detectron2 if it is installed.
        seed: for the data and the training.
        control: no novel objects in the training images.
        images: in training; half as many, but at least 4, are tested on.
        epochs: how often each is seen.

    Returns:
        the result of each model, by its name.

    Raises:
        InputError: arguments that cannot be used, or `output` holds another run or cannot be
            written.
        ImportError: the engine is not installed.
        FloatingPointError: training has diverged.
    """
    check_limits(
        images=(images, POSITIVE_INT),
        epochs=(epochs, POSITIVE),
        seed=(seed, SEED),
        engine=(engine, one_of("auto", "detectron2", "standalone")),
    )
    engine, train = _choose_engine(engine)
    folder = Path(output).expanduser()
    settings = dict(engine=engine, seed=seed, control=control, images=images, epochs=epochs)
    _check_settings(folder, settings)
    with lock_folder(folder):
        write_file(folder / "quickstart.json", json.dumps(settings))
        return _run(folder, train, **settings)


def _run(folder, train, engine, seed, control, images, epochs):
    """What :func:`quickstart` does in a folder that is its own."""
    begin = time.time()
    minutes = max(round(len(MODELS) * SECONDS * images * epochs / 60), 1)
    print(
        f"Training two detectors with {engine}, about {minutes} min on 2 CPU cores; everything "
        f"goes to {folder}.",
        flush=True,
    )
    data = folder / "data"
    make_dataset(data, seed, images, max(images // 2, NUM_PICTURES), control)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ground_truth = GroundTruth.load(str(data / "test.json"), list(KNOWN))
    detections, results = {}, {}
    try:
        for model, name in MODELS.items():
            path = folder / model / "detections.json"
            if path.exists():
                print(f"{name}: trained before.")
            else:
                print(f"{name}:", flush=True)
                make_folder(path.parent)
                written = train(model, data, path.parent, seed, epochs)
                with write_whole(path) as temporary:
                    shutil.copyfile(written, temporary)
            detections[name] = read_results(path, ground_truth)
            recall = OpenWorldRecall(ground_truth, max_dets=DETECTIONS, ks=KS)
            recall.update(*detections[name][:3], box_format="xywh")
            results[name] = recall.result()
    finally:
        torch.set_num_threads(threads)

    pictures = folder / "proposals.png"
    _draw(pictures, data / "test", ground_truth, detections)
    curves = {"unseen": folder / "ar_novel.png", "seen": folder / "ar_known.png"}
    for group, path in curves.items():
        plot_results(str(path), results, group)
    print(describe(results, control))
    print(f"Top proposals of both on the same images: {pictures}")
    print(f"AR against the number of detections: {curves['unseen']}, {curves['seen']}")
    print(f"Models: {', '.join(str(folder / model / 'model_final.pth') for model in MODELS)}")
    print(f"This took {time.time() - begin:.0f} s. To compare both, and to see all images, try:")
    files = [str(folder / model / "detections.json") for model in MODELS]
    rest = f"--images {data / 'test'} --seen {','.join(KNOWN)} --output"
    gt = data / "test.json"
    print(f"  python -m oln_d2 compare {gt} {' '.join(files)} {rest} {folder / 'comparison'}")
    print(f"  python -m oln_d2 visualize {gt} {files[0]} --html {rest} {folder / 'pictures'}")
    return results


def _draw(path, image_root, ground_truth, detections):
    """
    A picture of the first images in columns, the detectors in rows, each with its best boxes, the
    objects, and how many novel objects these boxes find with an IoU of 0.5 or more.
    """
    pictures, titles = [], []
    for name, found in detections.items():
        for index in range(NUM_PICTURES):
            image_id = ground_truth.image_ids[index]
            own = np.flatnonzero(found.image_ids == image_id)
            top = own[choose(to_xyxy(found.boxes[own]), found.scores[own], TOP)]
            objects, boxes = Objects.of(ground_truth, index), to_xyxy(found.boxes[top])
            image = open_image(image_root / f"{image_id:06d}.png")
            pictures.append(draw_proposals(image, boxes, found.scores[top], objects=objects))
            novel = objects.found_by(boxes)[~objects.seen]
            titles.append(f"{name}: {novel.sum()} of {len(novel)} novel")
    save_picture(contact_sheet(pictures, titles, columns=NUM_PICTURES), path)


def describe(results: dict[str, OpenWorldResult], control: bool) -> str:
    """The table and what it means."""
    groups = {"novel": "unseen", "known": "seen"}
    rows = [
        {"AR in percent": name}
        | {f"{label} @{k}": f"{100 * r.ar(k, g):.1f}" for label, g in groups.items() for k in KS}
        for name, r in results.items()
    ]
    novel = {name: result.ar(KS[0]) for name, result in results.items()}
    more, less = sorted(novel, key=novel.get, reverse=True)
    found = f"Here {more} finds more of the novel objects with {KS[0]} detections than {less}."
    if novel[more] == novel[less]:
        found = f"Here both find as many of the novel objects with {KS[0]} detections."
    meaning = MEANING.format(
        unannotated=(
            "no novel objects"
            if control
            else "2 to 4 novel objects each, all with a bullseye and none of them annotated"
        ),
        num_test=len(next(iter(results.values())).ground_truth.image_ids),
        designed="" if control else " that were designed to bring out this difference",
    )
    table = tabulate(rows, headers="keys", stralign="right", disable_numparse=True)
    return "\n".join(["", table, "", textwrap.fill(found + meaning, 100), ""])


def _choose_engine(engine):
    """The engine's name and its function that trains."""
    if engine == "auto":
        try:
            require_detectron2("--engine detectron2")
            engine = "detectron2"
        except ImportError:
            engine = "standalone"
    if engine == "detectron2":
        with needs("--engine detectron2", "detectron2"):
            from oln_d2.quickstart.detectron2_engine import train_and_detect
    else:
        from oln_d2.quickstart.standalone_engine import train_and_detect
    return engine, train_and_detect


def _check_settings(folder, settings):
    """Makes the folder of a new run; raises InputError if it holds something else."""
    path = folder / "quickstart.json"
    make_folder(folder)
    if not path.exists():
        if any(entry.name != ".lock" for entry in folder.iterdir()):
            raise InputError(
                f"{folder}: is not empty and holds no quickstart; choose another --output"
            )
        return
    known = read_json(path, dict)
    for name, value in settings.items():
        if known.get(name) != value:
            raise InputError(
                f"{folder}: holds a quickstart with {name} {known.get(name)}, not {value}; choose "
                f"another --output, or the same --{name}"
            )
