"""Ground truth and results as tools write them: values, names, encodings, masks."""

import gzip
import json

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from real_files import Row

BOXES = ([4, 4, 20, 20], [40, 8, 30, 40])  # of a mug and of a kite


def make(gt=None, annotation=None, image=None, entry=None, raw=None, pictures=False):
    """
    Three images of 96 x 64 px with a mug and a kite each, in gt.json, and perfect results, d.json.

    Args:
        gt: function that changes the ground truth.
        annotation, image, entry: function from the index and an entry to what it becomes.
        raw: by file name a function from its text to its bytes.
        pictures: whether to write the images into the folder images.
    """

    def write(folder):
        images = [{"id": i, "file_name": f"p{i}.jpg", "width": 96, "height": 64} for i in (1, 2, 3)]
        annotations = [
            {"id": 2 * i + k, "image_id": i, "category_id": k, "bbox": box, "area": 400 * k}
            for i in (1, 2, 3)
            for k, box in enumerate(BOXES, 1)
        ]
        entries = [
            {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 0.9 - i / 10}
            for i, a in enumerate(annotations)
        ]
        if pictures:
            (folder / "images").mkdir()
            for i, known in enumerate(images):
                pixels = np.full((64, 96, 3), 60 * (i + 1), np.uint8)
                Image.fromarray(pixels).save(folder / "images" / known["file_name"])
        content = {
            "images": [image(*x) for x in enumerate(images)] if image else images,
            "annotations": [annotation(*x) for x in enumerate(annotations)]
            if annotation
            else annotations,
            "categories": [{"id": 1, "name": "mug"}, {"id": 2, "name": "kite"}],
        }
        if gt:
            gt(content)
        results = [entry(*x) for x in enumerate(entries)] if entry else entries
        results = [x for x in results if x is not None]
        for name, value in (("gt.json", content), ("d.json", results)):
            text = json.dumps(value)
            (folder / name).write_bytes((raw or {}).get(name, str.encode)(text))

    return write


def change(field, value):
    """Every entry has this value; None: lacks the field."""

    def changed(index, entry):
        new = value(entry) if callable(value) else value
        return {**entry, field: new} if new is not None else without(entry, field)

    return changed


def without(entry, *fields):
    return {key: value for key, value in entry.items() if key not in fields}


def mask_of(entry, form):
    """The box as a mask."""
    x, y, w, h = entry["bbox"]
    pixels = np.zeros((64, 96), np.uint8, order="F")
    pixels[y : y + h, x : x + w] = 1
    rle = mask_utils.encode(pixels)
    size = {"size": [64, 96]}
    if form == "polygon":
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    if form == "list":
        flat = pixels.T.ravel()
        counts = np.diff(np.flatnonzero(np.diff(flat, prepend=2, append=2))).tolist()
        return {**size, "counts": counts}
    return {**size, "counts": form(rle["counts"])}


def masks(form, *lacking):
    """Annotations or results with masks."""

    def changed(index, entry):
        return {**without(entry, *lacking), "segmentation": mask_of(entry, form)}

    return changed


def name_categories(*names):
    return lambda content: content.update(
        categories=[{"id": i, "name": name} for i, name in enumerate(names, 1)]
    )


def seen_file(name, text, write):
    def written(folder):
        write(folder)
        (folder / name).write_text(text)

    return written


EVALUATE = "evaluate gt.json d.json --seen mug --k 1,10"
MASKS = f"{EVALUATE} --iou mask"
PICTURES = "visualize gt.json d.json --images images --output out --seen mug"
TRAIN = (
    "train --train-json gt.json --images images --seen mug --output out --scratch --depth 10 "
    "--min-size 64 --max-size 96 --batch-size 3 --warmup 1 --workers 0 --epochs 1"
)
# Two objects an image: the first detection finds half of them, ten find all.
ALL = ("all                    6   50.00   100.00",)

ROWS = [
    # Values by truthiness or type.
    *(
        Row(f"iscrowd {value!r}", make(annotation=change("iscrowd", value)), EVALUATE, ALL)
        for value in ("0", False, 0.0, "0.0")
    ),
    Row(
        "iscrowd null",
        make(annotation=lambda i, a: {**a, "iscrowd": None}),
        EVALUATE,
        ALL,
        lacks=("Crowds",),
    ),
    *(
        Row(
            f"iscrowd {value!r}",
            make(annotation=change("iscrowd", lambda a, v=value: v if a["id"] == 3 else 0)),
            EVALUATE,
            ("all                    5", "Crowds, which are no objects to be found: 1."),
        )
        for value in ("1", True, 1.0)
    ),
    *(
        Row(
            f"iscrowd is nonsense, {line.split()[0]}",
            make(annotation=change("iscrowd", "yes"), pictures=True),
            line,
            ("gt.json: annotations[0]: iscrowd 'yes' is neither 0 nor 1; write 1 for a crowd",),
            code=2,
        )
        for line in (EVALUATE, PICTURES, TRAIN)
    ),
    *(
        Row(
            f"width -1, {line.split()[0]}",
            make(image=change("width", -1), pictures=True),
            line,
            ("gt.json: images[0]: width -1 is not a number of pixels; write the image's size",),
            code=2,
        )
        for line in (
            EVALUATE,
            PICTURES,
            TRAIN,
            "propose images --gt gt.json --weights {weights} --output out",
        )
    ),
    Row(
        "sizes and ids as floats and strings, trained on",
        make(
            image=lambda i, x: {**x, "id": float(x["id"]), "width": "96.0", "height": 64.0},
            annotation=lambda i, x: {**x, "image_id": str(x["image_id"]), "iscrowd": "0"},
            pictures=True,
        ),
        TRAIN,
        ("3 images, 1 iterations of 3",),
    ),
    Row(
        "sizes and ids as floats and strings, evaluated",
        make(
            image=lambda i, x: {**x, "id": str(x["id"]), "width": "96", "height": 64.0},
            annotation=lambda i, x: {**x, "image_id": float(x["image_id"]), "category_id": "1"},
        ),
        EVALUATE,
        ("seen                   6", "unseen                 0"),
    ),
    Row(
        "ids are names",
        make(image=change("id", lambda x: x["file_name"])),
        EVALUATE,
        ("gt.json: images[0]: id 'p1.jpg' is not an integer; number the images",),
        code=2,
    ),
    Row(
        "area is a list",
        make(annotation=change("area", [400])),
        EVALUATE,
        ("gt.json: annotations[0]: area [400] is not a finite number",),
        code=2,
    ),
    Row(
        "image is not an object",
        make(image=lambda i, x: x["file_name"]),
        EVALUATE,
        ("gt.json: images[0] is not an object",),
        code=2,
    ),
    # Results of some of the images, and of none.
    *(
        Row(
            f"results of {n} of 3 images",
            make(entry=lambda i, e, n=n: e if e["image_id"] <= n else None),
            EVALUATE,
            (f"Warning: {3 - n} of 3 images have no detection, so all their objects count as",),
        )
        for n in (0, 1, 2)
    ),
    Row("results of all images", make(), EVALUATE, ALL, lacks=("no detection",)),
    Row(
        "no results to draw",
        make(entry=lambda i, e: None, pictures=True),
        PICTURES,
        ("d.json: holds no detection, so there is nothing to draw",),
        code=2,
    ),
    # Names of images in results.
    *(
        Row(
            f"image_id {value(1)!r}, {line.split()[0]}",
            make(entry=change("image_id", lambda e, f=value: f(e["image_id"])), pictures=True),
            line,
            says,
        )
        for value in (str, float, "p{}".format, "p{}.jpg".format, "/data/images/p{}.jpg".format)
        for line, says in ((EVALUATE, ALL), (PICTURES, ("3 pictures written to out",)))
    ),
    Row(
        "image_id of no image",
        make(entry=change("image_id", "q1")),
        EVALUATE,
        (
            "d.json: entry 0: image_id 'q1' is neither id nor file name of an image of gt.json; "
            "write the image's id, a number",
        ),
        code=2,
    ),
    Row(
        "image_id of several images",
        make(
            image=lambda i, x: {**x, "file_name": f"{'ab'[i > 0]}/p{max(i, 1)}.jpg"},
            entry=change("image_id", "p1"),
        ),
        EVALUATE,
        ("d.json: entry 0: image_id 'p1' could be several images of gt.json",),
        code=2,
    ),
    *(
        Row(
            f"equal file names, {line.split()[0]}",
            make(
                gt=lambda content: content["images"].append({**content["images"][0], "id": 9}),
                pictures=True,
            ),
            line,
            ("gt.json: images[3]: file_name p1.jpg occurs twice",),
            code=2,
        )
        for line in (TRAIN, "propose images --gt gt.json --weights {weights} --output out")
    ),
    # Encodings.
    *(
        Row(
            f"{name} in {encoding or 'gzip'}",
            make(
                raw={
                    name: (lambda text, e=encoding: text.encode(e))
                    if encoding
                    else lambda text: gzip.compress(text.encode())
                }
            ),
            EVALUATE,
            ALL,
        )
        for name in ("gt.json", "d.json")
        for encoding in ("utf-8-sig", "utf-16", None)
    ),
    *(
        Row(
            f"{name}, cut gzip",
            make(raw={name: lambda text: gzip.compress(text.encode())[:-30]}),
            EVALUATE,
            (f"{name}: not complete", "again"),
            code=2,
        )
        for name in ("gt.json", "d.json")
    ),
    # Masks.
    *(
        Row(
            f"results with masks and no boxes, {name}, {line.split()[-1]}",
            make(annotation=masks("polygon"), entry=masks(form, "bbox")),
            line,
            ALL,
        )
        for name, form in (
            ("polygons", "polygon"),
            ("RLE of a list", "list"),
            ("RLE", bytes.decode),
            ("RLE through str(bytes)", str),
        )
        for line in (MASKS, EVALUATE)
    ),
    *(
        Row(
            f"ground truth with masks, {name}",
            make(annotation=masks(form), entry=masks(bytes.decode)),
            MASKS,
            ALL,
        )
        for name, form in (("RLE of a list", "list"), ("RLE through str(bytes)", str))
    ),
    Row(
        "masks without boxes are drawn",
        make(entry=masks(str, "bbox"), pictures=True),
        f"{PICTURES} --masks",
        ("3 pictures written to out",),
    ),
    *(
        Row(
            f"results without masks, {line.split()[0]}",
            make(annotation=masks("polygon"), pictures=True),
            line,
            ("d.json: entry 0: has no 'segmentation', so these results have no masks: leave out",),
            code=2,
        )
        for line in (MASKS, f"{PICTURES} --masks")
    ),
    Row(
        "results with neither",
        make(entry=lambda i, e: without(e, "bbox")),
        EVALUATE,
        ("d.json: entry 0: has neither 'bbox' nor 'segmentation'",),
        code=2,
    ),
    # No area.
    Row(
        "boxes without area",
        make(annotation=change("area", None)),
        EVALUATE,
        (*ALL, "Warning: 6 of 6 objects have no `area`: that of the mask is taken or, without"),
    ),
    Row(
        "area is null in some",
        make(annotation=lambda i, a: {**a, "area": None if i else 400}),
        EVALUATE,
        (*ALL, "Warning: 5 of 6 objects have no `area`"),
    ),
    Row(
        "masks without area",
        make(annotation=masks("polygon", "area")),
        EVALUATE,
        (*ALL, "Warning: 6 of 6 objects have no `area`"),
    ),
    # Names of categories.
    *(
        Row(
            f"category {name!r} as {seen!r}",
            make(gt=name_categories(name, "kite")),
            f'evaluate gt.json d.json --seen "{seen}" --k 1,10',
            ("seen                   3",),
        )
        for name, seen in (("mug ", "mug"), (" mug", "mug "), ("mug", " mug"), ("Mug", "mug"))
    ),
    Row(
        "a comma in the name",
        make(gt=name_categories("mug, blue", "kite")),
        'evaluate gt.json d.json --seen "mug, blue"',
        (
            "has no category named 'mug', 'blue'",
            "it has: 'kite', 'mug, blue'; names with a comma go into a text file, one a line",
        ),
        code=2,
    ),
    Row(
        "a comma in the name, from a file",
        seen_file("names.txt", "mug, blue\n", make(gt=name_categories("mug, blue", "kite"))),
        "evaluate gt.json d.json --seen names.txt --k 1,10",
        ("seen                   3",),
    ),
    *(
        Row(
            f"case does not say which, {line.split()[0]}",
            make(gt=name_categories("mug", "MUG"), pictures=True),
            line.replace("--seen mug", "--seen Mug"),
            ("gt.json: the category 'Mug' could be 'mug' or 'MUG'; write it as it is there",),
            code=2,
        )
        for line in (EVALUATE, PICTURES, TRAIN)
    ),
    # As Roboflow writes them: a root category without objects, ids from 0.
    Row(
        "a root category with id 0, annotation ids that repeat",
        make(
            gt=lambda content: content["categories"].insert(0, {"id": 0, "name": "kitchen"}),
            annotation=change("id", 1),
        ),
        EVALUATE,
        (*ALL, "unseen                 3", "seen                   3"),
    ),
    # What further tools of the field write.
    Row(
        "VGG Image Annotator: ids as text, a flat polygon",
        make(
            annotation=lambda i, a: {
                **a,
                "image_id": str(a["image_id"]),
                "segmentation": [4, 4, 24, 4, 24, 24],
            },
            image=lambda i, image: {**image, "id": str(image["id"])},
        ),
        EVALUATE,
        ALL,
    ),
    Row(
        "Datumaro: empty masks, attributes",
        make(
            annotation=lambda i, a: {
                **a,
                "segmentation": [],
                "attributes": {"occluded": False},
                "iscrowd": 0,
            }
        ),
        EVALUATE,
        ALL,
    ),
    Row(
        "Segment Anything: masks of one image without its id",
        make(entry=lambda i, e: {"bbox": e["bbox"], "predicted_iou": 0.9, "area": 9}),
        EVALUATE,
        ("entry 0: Object missing required field", "each entry needs image_id, bbox"),
        code=2,
    ),
    Row(
        "FiftyOne: a data set whose annotations have scores, as results",
        make(),
        "evaluate gt.json gt.json --seen mug",
        ("gt.json: does not hold a list", "the list 'annotations' alone"),
        code=2,
    ),
    Row(
        "labelme: a file of one image",
        make(
            raw={"gt.json": lambda text: b'{"version": "5", "shapes": [], "imagePath": "p1.jpg"}'}
        ),
        EVALUATE,
        ("not COCO ground truth", "convert other formats"),
        code=2,
    ),
]
