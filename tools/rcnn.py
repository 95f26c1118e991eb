"""
R-CNN as it was (Girshick et al., 2014), trained and tested on some images:

    python tools/rcnn.py train.json train/ val.json val/ output/ --split voc \\
        --backbone tf_efficientnet_lite0 --weights efficientnet-lite0-57934424.pth

Selective search proposes; each box, with some of what is around it, is warped to a square and goes
through a CNN with ImageNet weights; one linear SVM a class, trained on hard negatives, scores it;
a ridge regression a class moves it; greedy NMS of each class removes what overlaps. Unlike the
paper, the CNN is not fine-tuned, and is one of timm.

OUTPUT gets `features/`, a file an image, which the same command again finds there; `test.json`, the
ground truth of the images that were tested; and `results.json`, with categories, for `oln-d2
evaluate` and `compare`. It prints AP of the classes and class-agnostic AR. It needs the extras
`timm` and `classic`, and scikit-learn.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

import oln_d2
from oln_d2.boxes import nms, to_xywh, to_xyxy
from oln_d2.checks import POSITIVE_INT, InputError, check_limits, needs
from oln_d2.commands.arguments import add_seen
from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_annotated
from oln_d2.data.lookup import find_images, image_size
from oln_d2.data.splits import seen_names, split_category_ids
from oln_d2.files import file_digest, make_folder, read_json, write_file, write_whole
from oln_d2.propose.classic import find_boxes
from oln_d2.standalone.timm_features import TimmFeatures

MARGIN = 16 / 195  # of a box, on each side of it: 16 of the paper's 227 pixels
NORM = 20.0  # of features, on average: what C and LAMBDA are for
NEGATIVE, NEAR, OVERLAP = 0.3, 0.6, 0.3  # IoU: of negatives, of what is regressed, of NMS
C, POSITIVE_WEIGHT, BIAS = 1e-3, 2.0, 10.0  # of the SVMs
HARD, EASY = -1.0, -1.2  # scores above which a negative is taken, and below which it goes again
NEW = 2000  # negatives after which an SVM is trained again
LAMBDA = 1000.0  # of the ridge regressions
TOP_K = 1500  # boxes of an image in the results file
AT_ONCE = 64  # boxes in the CNN


class Data:
    """
    Some images of a COCO file, drawn at random, and their objects of the classes `names`: by image
    id the `boxes`, XYXY, the `classes`, by place in `names`, and whether they are `crowds`.
    """

    def __init__(self, json_file, folder, names, number, only_with_objects):
        content = load_coco(json_file)
        self.json_file = json_file
        self.category_ids = [
            split_category_ids(content["categories"], [name], json_file)[0][0] for name in names
        ]
        place = {category: i for i, category in enumerate(self.category_ids)}
        objects = {}
        for a in content["annotations"]:
            if a["category_id"] in place and min(a["bbox"][2:]) >= 1:
                row = *a["bbox"], place[a["category_id"]], a.get("iscrowd", 0)
                objects.setdefault(a["image_id"], []).append(row)
        images = [x for x in content["images"] if not only_with_objects or x["id"] in objects]
        random.Random(0).shuffle(images)
        self.images = images[:number]
        self.paths = find_images(folder, self.images, json_file)
        rows = {
            image["id"]: np.array(objects.get(image["id"], []), float).reshape(-1, 6)
            for image in self.images
        }
        self.boxes = {key: to_xyxy(row[:, :4]) for key, row in rows.items()}
        self.classes = {key: row[:, 4].astype(int) for key, row in rows.items()}
        self.crowds = {key: row[:, 5] > 0 for key, row in rows.items()}
        # Of all categories.
        self.ground_truth = {
            "images": self.images,
            "annotations": [a for a in content["annotations"] if a["image_id"] in rows],
            "categories": content["categories"],
        }


class Features:
    """
    What the CNN says of boxes, in files.

    Args:
        folder: where they are.
        crop: the side of a warped box, a multiple of 32 pixels.
        number: proposals of an image at most.
    """

    def __init__(self, folder, net, crop, number):
        self.folder, self.crop, self.number = folder, crop, number
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.net = net.eval().to(self.device)
        self.mean, self.std = (
            torch.tensor(x, device=self.device).view(3, 1, 1)
            for x in (net.pixel_mean, net.pixel_std)
        )

    def make(self, data, what):
        """Makes the files that are not there yet."""
        for image in tqdm(data.images, what, unit="image", disable=None):
            path = self._path(data, image["id"])
            if os.path.isfile(path):
                continue
            picture, _ = open_annotated(data.paths[image["id"]], image_size(image), data.json_file)
            proposals, _ = find_boxes("selective_search", np.asarray(picture))
            sides = proposals[:, 2:] - proposals[:, :2]
            proposals = proposals[(sides >= 1).all(axis=1)][: self.number]
            found = self._describe(picture, np.vstack([proposals, data.boxes[image["id"]]]))
            with write_whole(path) as temporary:
                np.savez(temporary, proposals=proposals, features=found)

    def read(self, data, image_id):
        """Proposals, (D, 4), their features, (D, F), and those of the image's objects, (G, F)."""
        with np.load(self._path(data, image_id)) as file:
            proposals, found = file["proposals"], file["features"].astype(np.float32)
        return proposals, found[: len(proposals)], found[len(proposals) :]

    def _path(self, data, image_id):
        # Two files may have the same ids.
        return os.path.join(self.folder, f"{os.path.basename(data.json_file)}_{image_id}.npz")

    @torch.inference_mode()
    def _describe(self, picture, boxes):
        edge = math.ceil(MARGIN * max(picture.size)) + 1
        mean = tuple(int(x) for x in np.asarray(picture).mean((0, 1)))
        padded = ImageOps.expand(picture, edge, mean)
        margins = MARGIN * (boxes[:, 2:] - boxes[:, :2])
        around = np.hstack([boxes[:, :2] - margins, boxes[:, 2:] + margins]) + edge
        found = []
        for begin in range(0, len(boxes), AT_ONCE):
            warped = [
                padded.resize((self.crop, self.crop), Image.Resampling.BILINEAR, tuple(box))
                for box in around[begin : begin + AT_ONCE].clip(0, [*padded.size, *padded.size])
            ]
            pixels = torch.from_numpy(np.stack([np.asarray(x) for x in warped]))
            pixels = pixels.to(self.device).permute(0, 3, 1, 2)
            maps = self.net((pixels - self.mean) / self.std)["3"]
            found.append(F.adaptive_avg_pool2d(maps, 2).flatten(1).half().cpu().numpy())
        return np.concatenate(found)


def overlaps(boxes, objects):
    """IoU, (D, G); of XYXY."""
    if not len(boxes) or not len(objects):
        return np.zeros((len(boxes), len(objects)))
    return mask_utils.iou(to_xywh(boxes), to_xywh(objects), [0] * len(objects))


class RCNN:
    """An SVM and a regression for each class; `scale` brings features to the norm `NORM`."""

    def __init__(self, features, data, number):
        first = [features.read(data, image["id"])[1] for image in data.images[:50]]
        self.scale = NORM / np.linalg.norm(np.concatenate(first), axis=1).mean()
        self.svms = {}  # by class: weights (F,) and bias
        self.regressions = {}  # by class: of features the shift of a box, (D, 4)
        positives = [[] for _ in range(number)]
        pairs = [[] for _ in range(number)]
        for image in tqdm(data.images, "positives", unit="image", disable=None):
            key = image["id"]
            proposals, found, own = features.read(data, key)
            whole = ~data.crowds[key]
            objects, classes = data.boxes[key][whole], data.classes[key][whole]
            for place, row in zip(classes, own[whole]):
                positives[place].append(row * self.scale)
            iou = overlaps(proposals, objects)
            for place in set(classes):
                of_class = np.where(classes == place, iou, 0)
                near, best = of_class.max(axis=1) > NEAR, of_class.argmax(axis=1)
                shifts = encode(proposals[near], objects[best[near]])
                pairs[place].append((found[near] * self.scale, shifts))
        self.positives = {i: np.stack(rows) for i, rows in enumerate(positives) if rows}
        self._train_svms(features, data)
        self._train_regressions(pairs)

    def _train_svms(self, features, data):
        width = next(iter(self.positives.values())).shape[1]
        negatives = {i: np.zeros((0, width), np.float32) for i in self.positives}
        new = {i: [] for i in self.positives}
        for n, image in enumerate(tqdm(data.images, "hard negatives", unit="image", disable=None)):
            proposals, found, _ = features.read(data, image["id"])
            found = found * self.scale
            iou = overlaps(proposals, data.boxes[image["id"]])
            for i in self.positives:
                of_class = iou[:, data.classes[image["id"]] == i].max(axis=1, initial=0)
                hard = of_class < NEGATIVE
                if i in self.svms:
                    hard &= self._score(i, found) > HARD
                new[i].append(found[hard])
                is_last = n == len(data.images) - 1
                if n == 0 or is_last or sum(map(len, new[i])) >= NEW:
                    rows = np.concatenate([negatives[i], *new[i]])
                    if len(rows):
                        self.svms[i] = fit_svm(self.positives[i], rows)
                        rows = rows[self._score(i, rows) >= EASY]
                    negatives[i], new[i] = rows, []

    def _score(self, i, found):
        weights, bias = self.svms[i]
        return found @ weights + bias

    def _train_regressions(self, pairs):
        from sklearn.linear_model import Ridge

        for i, own in enumerate(tqdm(pairs, "regressions", unit="class", disable=None)):
            if sum(len(shifts) for _, shifts in own):
                found, shifts = (np.concatenate(x) for x in zip(*own))
                self.regressions[i] = Ridge(alpha=LAMBDA).fit(found, shifts).predict

    def detect(self, proposals, found, size):
        """Boxes (D, 4), XYXY in an image of (width, height), scores in (0, 1), classes (D,)."""
        found = found * self.scale
        rows = []
        for i in self.svms if len(proposals) else ():
            shifts = self.regressions[i](found) if i in self.regressions else np.zeros((1, 4))
            boxes = decode(proposals, shifts).clip(0, [*size, *size])
            scores = self._score(i, found)
            order = np.argsort(-scores, kind="stable")
            order = order[(boxes[order, 2:] - boxes[order, :2] > 0).all(axis=1)]
            order = order[nms(boxes[order], OVERLAP)]
            rows.append(np.column_stack([boxes[order], scores[order], np.full(len(order), i)]))
        rows = np.concatenate([np.zeros((0, 6)), *rows])
        rows = rows[np.argsort(-rows[:, 4], kind="stable")][:TOP_K]
        return rows[:, :4], 1 / (1 + np.exp(-rows[:, 4])), rows[:, 5].astype(int)


def fit_svm(positives, negatives):
    """Weights (F,) and bias."""
    from sklearn.svm import LinearSVC

    labels = np.repeat([1, -1], [len(positives), len(negatives)])
    svm = LinearSVC(
        C=C,
        loss="hinge",
        class_weight={1: POSITIVE_WEIGHT},
        intercept_scaling=BIAS,
        random_state=0,
        max_iter=10_000,
    ).fit(np.concatenate([positives, negatives]), labels)
    return svm.coef_[0].astype(np.float32), float(svm.intercept_[0])


def encode(boxes, objects):
    """Shifts of the centre, in sides of the box, and logarithms of how much the sides grow."""
    sides, own = boxes[:, 2:] - boxes[:, :2], objects[:, 2:] - objects[:, :2]
    centres, theirs = boxes[:, :2] + sides / 2, objects[:, :2] + own / 2
    return np.hstack([(theirs - centres) / sides, np.log(own / sides)])


def decode(boxes, shifts):
    """The inverse of :func:`encode`; sides grow and shrink tenfold at most."""
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = boxes[:, :2] + sides / 2 + shifts[:, :2] * sides
    sides = sides * np.exp(shifts[:, 2:].clip(-math.log(10), math.log(10)))
    return np.hstack([centres - sides / 2, centres + sides / 2])


def class_ap(ground_truth, results, data, names):
    """Lines of AP and AP50 of all classes and of each, in percent; COCO's, 100 boxes an image."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(ground_truth)
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.params.catIds = data.category_ids
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"][..., 0, -1]  # IoU, recall, category
    precision = np.where(precision < 0, np.nan, precision)
    of_class = {"all classes": precision}
    order = evaluator.params.catIds
    of_class |= {n: precision[..., [order.index(c)]] for n, c in zip(names, data.category_ids)}
    return [
        f"{name}: AP {100 * np.nanmean(p):.1f}, AP50 {100 * np.nanmean(p[0]):.1f}"
        for name, p in of_class.items()
        if not np.isnan(p).all()
    ]


def run(args) -> None:
    check_limits(train=(args.train, POSITIVE_INT), test=(args.test, POSITIVE_INT))
    check_limits(boxes=(args.boxes, POSITIVE_INT), crop=(args.crop, POSITIVE_INT))
    if args.crop % 32:
        raise InputError(f"--crop is {args.crop}; it has to be a multiple of 32")
    with needs("tools/rcnn.py", "classic"):
        from cv2 import ximgproc  # noqa: F401
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise InputError(
            "tools/rcnn.py needs scikit-learn: python -m pip install scikit-learn"
        ) from None
    seen = args.split or args.seen
    names = list(seen_names(seen))
    train = Data(args.train_json, args.train_images, names, args.train, only_with_objects=True)
    test = Data(args.test_json, args.test_images, names, args.test, only_with_objects=False)
    if not train.images:
        raise InputError(f"{args.train_json}: has no object of {', '.join(names)}")
    net = TimmFeatures(args.backbone, weights=args.weights)

    folder = os.path.join(args.output, "features")
    make_folder(folder)
    known = os.path.join(folder, "settings.json")
    weights = args.weights if args.weights == "DEFAULT" else file_digest(args.weights)
    settings = {"backbone": args.backbone, "weights": weights, "crop": args.crop}
    settings |= {"boxes": args.boxes, "classes": names}
    if os.path.isfile(known) and read_json(known) != settings:
        raise InputError(f"{folder}: is of other settings; choose another output or remove it")
    write_file(known, json.dumps(settings))
    features = Features(folder, net, args.crop, args.boxes)
    features.make(train, "features to train")
    features.make(test, "features to test")

    model = RCNN(features, train, len(names))
    if missing := [name for i, name in enumerate(names) if i not in model.svms]:
        print(f"No object to train on, so that none will be found: {', '.join(missing)}")
    entries = []
    for image in tqdm(test.images, "detecting", unit="image", disable=None):
        proposals, found, _ = features.read(test, image["id"])
        size = image["width"], image["height"]
        boxes, scores, classes = model.detect(proposals, found, size)
        for box, score, i in zip(to_xywh(boxes).tolist(), scores.tolist(), classes):
            entry = {"image_id": image["id"], "category_id": test.category_ids[i]}
            entries.append({**entry, "bbox": box, "score": score})
    results, ground_truth = (os.path.join(args.output, f"{x}.json") for x in ("results", "test"))
    write_file(ground_truth, json.dumps(test.ground_truth))
    write_file(results, json.dumps(entries))
    print(*class_ap(ground_truth, results, test, names), sep="\n")
    print(oln_d2.evaluate(ground_truth, results, seen=seen))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("train_json", "train_images", "test_json", "test_images", "output"):
        parser.add_argument(name)
    add_seen(parser, required=True)
    for name, default, text in (
        ("train", 500, "images to train on, of those with an object of the classes"),
        ("test", 200, "images to test on"),
        ("boxes", 2000, "of selective search, an image"),
        ("crop", 224, "pixels, the side of a warped box"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="a model of timm")
    parser.add_argument("--weights", default="DEFAULT", help="its file; DEFAULT: timm fetches them")
    try:
        run(parser.parse_args())
    except (InputError, ImportError) as error:
        sys.exit(f"rcnn.py: {error}")


if __name__ == "__main__":
    main()
