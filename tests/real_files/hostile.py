"""Files whose code would write `marker`, and those that lead elsewhere or make memory short."""

import json
import os
import pickle
import struct
import zlib

import numpy as np
import torch
from PIL import Image

from real_files import Row
from real_files.json_files import EVALUATE, PICTURES, TRAIN, change, make

AUDIT = "audit gt.json --images images --weights {weights} --output out"
COMPARE = "compare gt.json d.json --images images --output out --seen mug --bootstrap 10"
PROPOSE = "propose images --output out --weights "
PROPOSE_GT = "propose images --gt gt.json --weights {weights} --output out"
CODE = ("holds posix.system; pickled code is not executed",)
TAG = ("holds code, !!python/object/apply:os.system, which is not executed",)
YAML = "!!python/object/apply:os.system ['touch marker']"


class Code:
    """Writes the marker where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch marker",)


def train_net(*words):
    """
    A line of `train_net.py` for the files of `json_files`, with these words; data sets are
    registered for the whole process, so each row has its own {name}.
    """
    return " ".join(
        (
            "train_net --config-file {recipe} MODEL.DEVICE cpu OUTPUT_DIR out MODEL.WEIGHTS ''",
            "SEED 1 DATALOADER.NUM_WORKERS 0 SOLVER.IMS_PER_BATCH 1 SOLVER.MAX_ITER 1",
            "DATASETS.OWN \"[['{name}','gt.json','images','mug'],",
            "['{name}_t','gt.json','images','mug']]\"",
            "DATASETS.TRAIN \"('{name}',)\" DATASETS.TEST ()",
            *words,
        )
    )


def load_proposals(part):
    return (
        "MODEL.LOAD_PROPOSALS True MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals "
        f"DATASETS.PROPOSAL_FILES_{part} \"('p.pkl',)\""
    )


def files(**kwargs):
    """The usual files; more of them by name, as bytes, text, JSON, or functions of the path."""
    more = kwargs.pop("more", {})

    def written(folder):
        make(pictures=True, **kwargs)(folder)
        for name, content in more.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))

    return written


def no_marker(folder):
    assert not (folder / "marker").exists()


def refused(name, make, line, says=CODE, detectron2=False):
    return Row(name, make, line, says, 2, check=no_marker, detectron2=detectron2)


def saved(content, **kwargs):
    return lambda path: torch.save(content, path, **kwargs)


class Pointers:
    """A dtype of objects that says its bytes are no pointers; numpy's own would follow them."""

    def __reduce__(self):
        fields = {"f": (np.dtype("O"), 0)}
        return np.dtype, ("V8", False, True), (3, "|", None, ("f",), fields, 8, 1, 0)


PLAIN = {"backbone.fc.weight": torch.zeros(2, 2)}
ZOO = pickle.dumps({"model": {"a.b": Code()}, "__author__": "Detectron2 Model Zoo"})
PICKLES = {
    "m.pkl": ZOO,
    "zip.pth": saved({"model": PLAIN, "iteration": Code()}),
    "m.pyth": pickle.dumps({"model_state": {"a.b": Code()}}),
    "m.pth": pickle.dumps({"state_dict": {"a.b": Code()}}, protocol=5),
    "m.safetensors": ZOO,
    "old.pth": saved({"model": PLAIN, "trainer": Code()}, _use_new_zipfile_serialization=False),
}
PRETRAINED = TRAIN.replace(" --scratch", "")
WITH_DETECTRON2 = (
    PROPOSE + "FILE --config-file {recipe}",
    train_net("MODEL.WEIGHTS FILE"),
)
WITHOUT = (
    "convert FILE o.pth",
    "convert FILE o.pth --backbone tf_efficientnet_lite0",
    "export FILE o.onnx",
    f"{PRETRAINED} --weights FILE",
    f"{PRETRAINED.replace('10', '18')} --weights-backbone FILE",
    "audit gt.json --images images --weights FILE --output out",
)


def with_code(file, line, detectron2=False):
    name = f"code in {file}, {line.split()[0]}, {line.partition(' FILE')[0].split()[-1]}"
    make = files(more={file: PICKLES[file]})
    return refused(name, make, line.replace("FILE", file), CODE, detectron2)


CHECKPOINTS = [
    *(with_code(file, PROPOSE + "FILE") for file in PICKLES),
    *(with_code(f, line, True) for f in list(PICKLES)[:3] for line in WITH_DETECTRON2),
    *(with_code(file, line) for file in list(PICKLES)[:2] for line in WITHOUT),
    refused(
        "code in the checkpoint of a run",
        files(more={"out/checkpoint.pth": PICKLES["zip.pth"]}),
        f"{TRAIN} --resume",
    ),
    *(
        refused(
            f"code in the last checkpoint, {name}",
            files(more={name: PICKLES[kind], "out/last_checkpoint": named}),
            train_net().replace("{recipe}", "{recipe} --resume"),
            detectron2=True,
        )
        for name, kind, named in (
            ("out/model_0000001.pth", "zip.pth", "model_0000001.pth"),
            ("out/a.pkl", "m.pkl", "a.pkl"),
            ("b.pkl", "m.pkl", "../b.pkl"),
        )
    ),
    refused(
        "code in weights to evaluate",
        files(more={"m.pkl": ZOO}),
        train_net("MODEL.WEIGHTS m.pkl DATASETS.TEST \"('{name}_t',)\"").replace(
            "{recipe}", "{recipe} --eval-only"
        ),
        detectron2=True,
    ),
    refused(
        "pointers in an array of numpy",
        files(more={"m.pkl": pickle.dumps({"model": Pointers()})}),
        PROPOSE + "m.pkl",
        ("m.pkl: holds numpy.dtype; pickled code is not executed",),
    ),
]
PROPOSALS = [
    refused(
        f"code in proposals, {part}",
        files(
            more={
                "p.pkl": pickle.dumps({"ids": [1], "boxes": [Code()]}),
                "good.pkl": pickle.dumps(
                    {
                        "ids": [1, 2, 3],
                        "boxes": [np.zeros((0, 4))] * 3,
                        "objectness_logits": [np.zeros(0)] * 3,
                    }
                ),
            }
        ),
        line,
        detectron2=True,
    )
    for part, line in (
        ("train", train_net(load_proposals("TRAIN"))),
        (
            "test",
            train_net(
                load_proposals("TRAIN").replace("p.pkl", "good.pkl"),
                f"DATASETS.TEST \"('{{name}}_t',)\" {load_proposals('TEST')}",
            ),
        ),
    )
]
OTHERS = [
    *(
        refused(
            f"code instead of JSON, {line.split()[0]}",
            files(more={name: pickle.dumps([Code()]) for name in ("d.json", "m.json")}),
            line,
            (says,),
        )
        for line, says in (
            (EVALUATE, "d.json: does not hold a list"),
            (COMPARE, "d.json: does not hold a list"),
            (PICTURES, "d.json: does not hold a list"),
            ("audit gt.json --merge m.json --output out", "m.json: not complete, valid JSON"),
        )
    ),
    *(
        refused(
            f"code in a config, {line.split()[0]}, {name}",
            files(more={"c.yaml": f"MODEL: {YAML}\n", "d.yaml": "_BASE_: c.yaml\n"}),
            line.replace("FILE", name),
            TAG,
            detectron2=True,
        )
        for name in ("c.yaml", "d.yaml")
        for line in (
            PROPOSE + "{weights} --config-file FILE --device cpu",
            "convert gt.json o.pth --config-file FILE",
            "export gt.json o.onnx --config-file FILE",
            "compare gt.json FILE --images images --seen mug --output out",
            "train_net --config-file FILE OUTPUT_DIR out",
        )
    ),
    *(
        refused(
            f"code in a recipe, {line.split()[0]}",
            files(more={"c.yaml": f"epochs: {YAML}\n"}),
            line,
            ("c.yaml: is no YAML (could not determine a constructor for the tag",),
        )
        for line in (
            "train --config c.yaml --output out",
            "audit gt.json --images images --cross-fit 2 --recipe c.yaml --output out",
        )
    ),
]


def secret(name):
    """An image beside the folder of the images, which the first entry names."""

    def written(folder):
        files(image=lambda i, x: x if i else {**x, "file_name": name.format(folder)})(folder)
        (folder / "images/p1.jpg").rename(folder / "secret.jpg")

    return written


def not_shown(folder):
    """No picture in the output has the secret's grey."""
    for path in (folder / "out").rglob("*.jpg"):
        with Image.open(path) as image:
            near = abs(np.asarray(image.convert("L")).astype(int) - 60) < 5
        assert near.mean() < 0.1, path


def below_its_folder(folder):
    files(image=lambda i, x: {**x, "file_name": f"{folder}/images/{x['file_name']}"})(folder)


LEFT_OUT = ("secret.jpg: is not among the images",)
NAMES = [
    row
    for name in ("../secret.jpg", "{}/secret.jpg", "a/../../secret.jpg")
    for row in (
        Row(f"{name}, train", secret(name), TRAIN, ("1 of 3 images", "missing", "secret.jpg"), 2),
        Row(f"{name}, visualize", secret(name), f"{PICTURES} --html", LEFT_OUT, check=not_shown),
        Row(f"{name}, compare", secret(name), COMPARE, LEFT_OUT, 1),
        Row(f"{name}, audit", secret(name), AUDIT, ("image not in images",), check=not_shown),
        Row(f"{name}, propose", secret(name), PROPOSE_GT, ("not among the inputs",)),
    )
] + [Row("an absolute name in the folder", below_its_folder, PICTURES, ("3 pictures written",))]


def link(path, target="elsewhere/victim", **kwargs):
    """The usual files, and at `path` a link to a file, or a folder, of somebody else."""

    def written(folder):
        files(**kwargs)(folder)
        (folder / "elsewhere/victim.d").mkdir(parents=True)
        (folder / "elsewhere/victim").write_text("mine")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).symlink_to(folder / target)

    return written


def not_touched(folder):
    assert (folder / "elsewhere/victim").read_text() == "mine"
    assert sorted(os.listdir(folder / "elsewhere")) == ["victim", "victim.d"]
    assert not os.listdir(folder / "elsewhere/victim.d")


def link_within(folder):
    files()(folder)
    (folder / "out/real").mkdir(parents=True)
    (folder / "out/pictures").symlink_to("real")
    (folder / "linked").symlink_to("out")


QUICKSTART = "quickstart --engine standalone --images 1 --epochs 0.1 --output out"
LINKS = [
    *(
        Row(
            f"link {path} out of the folder, {line.split()[0]}",
            link(path, target),
            line,
            (f"{path}: is a link that leads out of the folder",),
            2,
            check=not_touched,
            detectron2=line.startswith("train_net"),
        )
        for path, target, line in (
            ("out/unreadable.txt", "elsewhere/victim", PROPOSE_GT),
            ("out/.lock", "elsewhere/victim", PROPOSE_GT),
            ("out/journal.jsonl", "elsewhere/new", PROPOSE_GT),
            ("out/p1.jpg", "elsewhere/victim", PICTURES),
            ("out/index_files", "elsewhere/victim.d", f"{PICTURES} --html"),
            ("out/index.html", "elsewhere/victim", COMPARE),
            ("out/merged.json", "elsewhere/victim", AUDIT),
            ("out/proposals", "elsewhere/victim.d", AUDIT),
            ("out/csv", "elsewhere/victim.d", TRAIN),
            ("out/log.txt", "elsewhere/victim", train_net()),
        )
    ),
    Row(
        "links within the folder",
        link_within,
        f"{PROPOSE_GT.replace('output out', 'output linked')} --draw",
        ("Proposals for 3 images",),
    ),
]


def png(width, height):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def tiff_with_a_large_page(path):
    Image.new("L", (64, 48)).save(path, save_all=True, append_images=[Image.new("L", (77, 55))])
    data = path.read_bytes()
    for tag, side in ((256, 77), (257, 55), (278, 55)):
        for kind in (3, 4):
            entry = struct.pack("<HHII", tag, kind, 1, side)
            data = data.replace(entry, struct.pack("<HHII", tag, 4, 1, 50_000))
    path.write_bytes(data)


POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 64\n%%EndComments\n(marker) (w) file\n"
TOO_LARGE = "has more than 179 million pixels; scale it down or cut it"
ONE_LEFT_OUT = "1 could not be read"


def with_mask(where, mask):
    """Masks of the ground truth ("annotation") and results ("entry"), `mask` in one of them."""
    changes = {"annotation": [[4, 4, 24, 4, 24, 24]], "entry": [[4, 4, 24, 4, 24, 24]], where: mask}
    return files(**{name: change("segmentation", value) for name, value in changes.items()})


BOMBS = [
    *(
        Row(f"{name}, {line.split()[0]}", files(more={file: content}), line, says, code,
            check=no_marker)
        for name, file, content, what in (
            ("PNG of 50,000 x 50,000", "images/p1.jpg", png(50_000, 50_000), TOO_LARGE),
            ("PostScript", "images/p1.jpg", POSTSCRIPT, "is PostScript, a program that would have"),
        )
        for line, says, code in (
            (PROPOSE_GT, (f"images/p1.jpg: {what}", ONE_LEFT_OUT), 0),
            (PICTURES, (f"images/p1.jpg: {what}", "1 image could not be drawn"), 0),
            (AUDIT, (f"images/p1.jpg: {what}", "Left out:"), 0),
            (TRAIN, (f"images/p1.jpg: {what}",), 2),
        )
    ),
    Row("TIFF with a page of 50,000 x 50,000", files(more={"images/a.tif": tiff_with_a_large_page}),
        PROPOSE + "{weights}", (f"images/a.tif: {TOO_LARGE}", ONE_LEFT_OUT)),
    Row("PostScript, train_net", files(more={f"images/p{i}.jpg": POSTSCRIPT for i in (1, 2, 3)}),
        train_net(), ("jpg: is PostScript",), 2, check=no_marker, detectron2=True),
    *(
        Row(f"an image of 10,000,000 pixels a side, {line.split()[0]}",
            files(image=change("width", 10_000_000)), line,
            ("gt.json: images[0]: width 10000000 is more than 1000000 pixels; write the image's",),
            2)
        for line in (EVALUATE, PICTURES, COMPARE, AUDIT, PROPOSE_GT, TRAIN)
    ),
    Row("an image that is too large for blank ground",
        files(image=lambda i, x: {**x, "width": 900_000, "height": 900_000}),
        COMPARE.replace("--images images ", ""),
        ("p1.jpg: is 900000 x 900000 px in gt.json, too large to be shown without its photograph",),
        1),
    *(
        Row(f"{name}, {where}", with_mask(where, mask), f"{EVALUATE} --iou mask", (says,), 2)
        for name, mask, says in (
            ("beyond pycocotools' integers", [[0, 0, 1e9, 0, 1e9, 1e9]], "longer than its image"),
            ("a polygon of too many pixels", [[0, 0, 90, 60] * 9_999], "longer than its image"),
            ("RLE without an end", {"size": [64, 96], "counts": "0`h9"}, "counts do not make up"),
        )
        for where in ("annotation", "entry")
    ),
]  # fmt: skip
ROWS = CHECKPOINTS + PROPOSALS + OTHERS + NAMES + LINKS + BOMBS
