"""Files that are damaged, half written, or of something else: each row another sentence."""

import json
import pickle

import numpy as np
import onnx
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from test_propose import SETTINGS
from test_standalone import standalone_model

from oln_d2.standalone import save_checkpoint
from oln_d2.weights import find
from real_files import Row
from real_files.hostile import PROPOSE, PROPOSE_GT, files, load_proposals, train_net
from real_files.json_files import EVALUATE, MASKS, TRAIN, change

RECIPES_COMPARED = "compare gt.json --images images --seen mug --output out"
COMPARE = "compare gt.json d.json --output out --seen mug --bootstrap 10"


def bad(name, line, says, code=2, detectron2=False, **kwargs):
    says = (says,) if isinstance(says, str) else says
    return Row(name, files(**kwargs), line, says, code, detectron2=detectron2)


def gt(**fields):
    """Ground truth with these fields; without those that are None."""

    def changed(content):
        for name, value in fields.items():
            if value is None:
                del content[name]
            else:
                content[name] = value

    return changed


def named(*names):
    return gt(categories=[{"id": i, "name": name} for i, name in enumerate(names, 1)])


# name, changes, what is said after "gt.json: "
ANNOTATIONS = [
    ("a list", {"raw": {"gt.json": lambda t: b"[]"}}, "holds a JSON list, not an object"),
    ("cut", {"raw": {"gt.json": lambda t: t[:90].encode()}}, "not complete, valid JSON ("),
    ("nested without end", {"raw": {"gt.json": lambda t: b"[" * 10**5}}, "maximum recursion depth"),
    ("no images", {"gt": gt(images=None)}, "field 'images' is missing or not a list"),
    ("no annotations", {"gt": gt(annotations=None)}, "field 'annotations' is missing or not a"),
    ("no categories", {"gt": gt(categories=None)}, "field 'categories' is missing or not a list"),
    ("images are empty", {"gt": gt(images=[])}, "field 'images' is empty; there is nothing"),
    ("categories are empty", {"gt": gt(categories=[])}, "field 'categories' is empty; there is"),
    ("annotation is a number", {"annotation": lambda i, a: 5}, "annotations[0] is not an object"),
    ("category is a text", {"gt": gt(categories=["mug"])}, "categories[0] is not an object"),
    ("category without name", {"gt": gt(categories=[{"id": 1}])},
     "categories[0], with id 1, has no 'name' that is a text; write one"),
    ("category of half a character", {"gt": named("mug", "\ud800")},
     "categories[1]: name '\\ud800' holds half a character; write it again as UTF-8"),
    ("category id is a text", {"gt": gt(categories=[{"id": "x", "name": "mug"}])},
     "categories[0]: id 'x' is not an integer; number the categories"),
    ("category twice", {"gt": gt(categories=[{"id": 1, "name": "mug"}] * 2)},
     "categories[1]: id 1 occurs twice; number the categories anew"),
    ("image twice", {"image": change("id", 1)}, "images[1]: id 1 occurs twice; number the images"),
    ("image id of 70 bits", {"image": lambda i, x: {**x, "id": 2**70 + i}},
     "images[0]: id 1180591620717411303424 has more than 64 bits"),
    ("image id is a fraction", {"image": change("id", 1.5)}, "images[0]: id 1.5 is not an integer"),
    ("width is a text", {"image": change("width", "wide")},
     "images[0]: width 'wide' is not a number of pixels; write the image's size"),
    ("height is infinite", {"image": change("height", float("inf"))},
     "images[0]: height inf is not a number of pixels"),
    ("bbox is missing", {"annotation": change("bbox", None)}, "bbox None is not four finite numbers"),
    ("bbox of three", {"annotation": change("bbox", [1, 2, 3])}, "bbox [1, 2, 3] is not four finite"),
    ("bbox is negative", {"annotation": change("bbox", [1, 2, -3, 4])}, "bbox [1, 2, -3, 4] is not"),
    ("bbox is NaN", {"annotation": change("bbox", [float("nan"), 2, 3, 4])}, "bbox [nan, 2, 3, 4]"),
    ("bbox has no square", {"annotation": change("bbox", [0, 0, 1e300, 1])}, "bbox [0, 0, 1e+300, 1]"),
    ("bbox of texts", {"annotation": change("bbox", ["a", 2, 3, 4])}, "bbox ['a', 2, 3, 4] is not"),
    ("of no image", {"annotation": change("image_id", 99)},
     "annotations[0]: image_id 99 is not in 'images'"),
    ("of no category", {"annotation": change("category_id", 9)},
     "annotations[0]: category_id 9 is not in 'categories'"),
    ("iscrowd is 2", {"annotation": change("iscrowd", 2)}, "iscrowd 2 is neither 0 nor 1; write 1"),
    ("area is a text", {"annotation": change("area", "9")}, "area '9' is not a finite number >= 0"),
    ("area is negative", {"annotation": change("area", -1)}, "area -1 is not a finite number >= 0"),
    ("area has 400 digits", {"annotation": change("area", 10**400)}, "is not a finite number >= 0; "
     "write the area in pixels, or leave it out and that of the mask or the box is taken"),
]  # fmt: skip


def boxes(box):
    """Results of ten times this box."""
    return json.dumps([{"image_id": 1, "bbox": box, "score": i / 10} for i in range(10)]).encode()


# name, raw text or changes, what is said after "d.json: "
RESULTS = [
    ("empty", b"", "is empty; write or fetch the results again"),
    ("an object", b"{}", "does not hold a list; expected a list of detections in COCO's results"),
    ("numbers", b"[1]", "entry 0: Expected 'object', got 'int'"),
    ("lists", b"[[]]", "entry 0: Expected 'object', got 'array'"),
    ("cut", b'[{"image_id":1,"bbox":[0,0,1,1],"score":1},{"im', "entry 1: not complete, valid JSON"),
    ("more behind", b'[{"image_id":1,"bbox":[0,0,1,1],"score":1}] x', "trailing characters"),
    ("nested without end", b'[{"image_id":1,"bbox":[0,0,1,1],"score":1,"x":' + b"[" * 10**5,
     "not complete, valid JSON in UTF-8 (maximum recursion depth"),
    ("Latin-1", '[{"image_id": "é"}]'.encode("latin1"), "not complete, valid JSON in UTF-8 ('utf-8'"),
    ("gzip of something else", b"\x1f\x8b\x08\0abc", "not complete, valid JSON in UTF-8 (Compressed"),
    ("score is NaN", b'[{"image_id":1,"bbox":[0,0,1,1],"score":NaN}]', "NaN is not a finite number"),
    ("score is infinite", b'[{"image_id":1,"bbox":[0,0,1,1],"score":-Infinity}]', "entry 0: Infinity is not"),
    ("score of 999 digits", b'[{"image_id":1,"bbox":[0,0,1,1],"score":1e999}]', "Number out of range"),
    ("score is a text", {"entry": change("score", "0.5")}, "entry 0: score: Expected 'float', got 'str'"),
    ("score is missing", {"entry": change("score", None)}, "missing required field 'score'; each"),
    ("bbox of three", {"entry": change("bbox", [0, 0, 1])}, "bbox [0.0, 0.0, 1.0] is not four numbers"),
    ("bbox is a text", {"entry": change("bbox", "0 0 1 1")}, "bbox: Expected 'array | null', got 'str'"),
    ("bbox is negative", {"entry": change("bbox", [0, 0, -1, 1])}, "has a negative size (read as XYWH)"),
    ("bbox has no square", {"entry": change("bbox", [0, 0, 1e200, 1])}, "is not finite, or too large"),
    ("of no image", {"entry": change("image_id", 77)}, "image_id 77 is not in gt.json; are the"),
    ("image id is a fraction", {"entry": change("image_id", 1.5)}, "image_id 1.5 is not an integer"),
    ("image id is null", {"entry": lambda i, e: {**e, "image_id": None}}, "int | float | str', got 'null'"),
    ("objectness is a text", {"entry": change("objectness", "x")}, "objectness: Expected 'float | null'"),
    ("corners", boxes([30, 20, 90, 60]), "they seem to be [x1, y1, x2, y2], write [x, y, width, height]"),
    ("fractions", boxes([0.1, 0.1, 0.5, 0.5]), "they seem to be fractions of the image size, write"),
]  # fmt: skip
SQUARE = [[4, 4, 24, 4, 24, 24]]
# name, the segmentation, what is said of it in the ground truth and in results
MASKS_OF = [
    ("empty", [], "'segmentation' (it is empty); without masks only boxes can be scored", "has no 'segmentation', so these"),
    ("a text", "mask", "has no size and counts that can be read", "has no size and counts that can"),
    ("texts", [["a"] * 6], "a polygon is not a list of numbers", "a polygon is not a list of numbers"),
    ("flat", [4, 4, 24, 4, 24, 24], "a polygon is not a list", "a polygon is not a list of"),
    ("counts are a number", {"size": [64, 96], "counts": 5}, "no size and counts", "no size and counts"),
    ("counts are too few", {"size": [64, 96], "counts": [5]}, "do not make up", "do not make up the"),
    ("counts are negative", {"size": [64, 96], "counts": [-5, 6149]}, "do not make", "do not make up"),
    ("counts are no digits", {"size": [64, 96], "counts": "\x01"}, "do not make", "do not make up"),
    ("counts are cut bytes", {"size": [64, 96], "counts": "b'abc"}, "no size and", "no size and counts"),
    ("of another size", {"size": [10, 10], "counts": "T3"}, "size [10, 10] is not the image's [64.0,",
     "mask of size [10, 10] on an image of size [64, 96] (height, width) in gt.json; write masks"),
]  # fmt: skip


def decision(**changes):
    """Decisions that a page of an audit saved, one of them with these changes."""
    entry = {"id": "1:4.0", "what": "accept", "image_id": 1, "category_id": None}
    entry |= {"bbox": [4, 4, 20, 20], "proposed": [4, 4, 20, 20], **changes}
    return {"decisions": [{name: value for name, value in entry.items() if value != "none"}]}


def listed(**changes):
    """The list of an audit with these changes."""
    settings = {"iou": 0.5, "copies": 0.5, "inside": 0.15}
    content = {"images": "images", "results": ["d.json"], "model": "m", "settings": settings}
    return {name: v for name, v in (content | changes).items() if v is not None}


LACKS = "decisions[0]: lacks one of id, image_id, what, bbox and proposed, or has something else"
DECISIONS = [
    ("a list", [], "has no list 'decisions'; give the file that the page of an audit saved"),
    ("a number", {"decisions": [1]}, LACKS),
    ("without id", decision(id="none"), LACKS),
    ("image is infinite", decision(image_id=float("inf")), LACKS),
    ("category is a list", decision(category_id=[1]), LACKS),
    ("box of texts", decision(bbox=["a"] * 4), LACKS),
    ("no such decision", decision(what="maybe"), "what is 'maybe'; it can be accept, reject, skip"),
    ("no such image", decision(image_id=77), "the image 77 is not in the annotations; give the file"),
    ("no such category", decision(category_id=9), "there is no category 9 in the annotations; give"),
    ("box without area", decision(bbox=[4, 4, 0, 9]), "[4.0, 4.0, 0.0, 9.0] is no box x, y, width"),
    ("box is NaN", decision(proposed=[4, 4, float("nan"), 9]), "[4.0, 4.0, nan, 9.0] is no box x, y"),
]  # fmt: skip
AS_WRITTEN = "out/candidates.json: is not as an audit wrote it; audit again, without merge"
LISTS = [
    ("a list", [], "out/candidates.json: holds a JSON list, not what is expected of this file, a dict"),
    ("half", "{", "out/candidates.json: not complete, valid JSON ("),
    ("without results", listed(results=None), AS_WRITTEN),
    ("results are none", listed(results=[]), AS_WRITTEN),
    ("settings are texts", listed(settings=dict.fromkeys(("iou", "copies", "inside"), "x")), AS_WRITTEN),
    ("other settings", listed(settings={"foo": 1}), AS_WRITTEN),
    ("results are gone", listed(results=["gone.json"]), "gone.json: no such file; give detections"),
    ("images are gone", listed(images="gone"), "gone: no such folder; the images of gt.json are"),
]  # fmt: skip
MERGE = "audit gt.json --output out --merge m.json"


RECIPE = {"train_json": "gt.json", "images": "images", "seen": "mug", "epochs": 1, "batch_size": 3}
RECIPE |= {"workers": 0, "depth": 10, "scratch": True, "min_size": 64, "max_size": 96}
# name, the text or changes of the recipe, what is said
RECIPES = [
    ("empty", "", "r.yaml: holds no options by name, such as `epochs: 8`"),
    ("tabs", "a:\n\t- b", "r.yaml: is no YAML (while scanning for the next token"),
    ("nested without end", "a: " + "[" * 9999, "r.yaml: is no YAML (maximum recursion depth"),
    ("unknown option", {"epoch": 3}, "r.yaml: epoch is no option of train; near it: epochs"),
    ("split and seen", {"split": "voc"}, "r.yaml: has split and seen; both are the seen categories"),
    ("model is a list", {"model": [1]}, "r.yaml: model holds no settings by name, such as `depth: 18`"),
    ("unknown setting", {"model": {"fpn_channel": 3}}, "fpn_channel is no setting of oln_box; near it: fpn_channels"),
    ("epochs are a text", {"epochs": "many"}, "r.yaml: epochs is 'many'; write a number"),
    ("batch_size is a fraction", {"batch_size": 2.5}, "r.yaml: batch_size is 2.5; write an integer"),
    ("scratch is a text", {"scratch": "of course"}, "r.yaml: scratch is 'of course'; write true or false"),
    ("images are numbers", {"images": [1]}, "r.yaml: images is [1]; write text"),
    ("loggers are a number", {"loggers": 5}, "r.yaml: loggers is 5; write text, or a list of that"),
    ("more_data is short", {"more_data": [["a", "b"]]}, "more_data: ['a', 'b'] is not [annotations, fol"),
    ("epochs are negative", {"epochs": -1}, "epochs is -1.0; it has to be a number above 0"),
    ("lr is NaN", {"lr": float("nan")}, "lr is nan; it has to be 0 or more"),
    ("schedule", {"schedule": "sine"}, "schedule is sine; it has to be one of step, cosine"),
    ("scale_jitter descends", {"scale_jitter": [2, 1]}, "scale_jitter is [2, 1]; it has to be two numb"),
    ("data_weights", {"data_weights": [1, 2]}, "data_weights are 2 for 1 data sets; give one for each"),
    ("batch in parts", {"accumulate": 2}, "batch_size is 3; it has to be a multiple of 2, the processes"),
    ("patience", {"patience": 1}, "evaluate_every and patience need val_json and val_images; give them"),
    ("val_json alone", {"val_json": "gt.json"}, "val_json and val_images go together; give both or"),
    ("loggers", {"loggers": ["paper"]}, "loggers is paper; it has to be one of csv, tensorboard, wandb"),
    ("pseudo_weight", {"pseudo_weight": 0}, "pseudo_weight is 0; it has to be a number above 0"),
    ("pseudo_weight of others", {"pseudo_weight": 0.5, "model": {"architecture": "faster_rcnn"}},
     "pseudo_weight is 0.5, but only OLN's losses look at it, not those of"),
    ("seed", {"seed": -1}, "seed is -1; it has to be 0 or more, below 2**64"),
    ("depth", {"depth": 11}, "depth is 11; it has to be one of 10, 18, 34, 50, 101"),
    ("min_size", {"min_size": 0}, "min_size is 0 and max_size 96; both have to be 1 pixel or more"),
    ("anchors are a number", {"model": {"anchor_sizes": 5}}, "anchor_sizes is 5; it has to be numbers"),
    ("three anchors", {"model": {"anchor_sizes": [1, 2, 3]}}, "anchor_sizes is (1, 2, 3); give 4, for"),
    ("width of the head", {"model": {"representation_size": -1}}, "representation_size is -1; it has to"),
    ("channels", {"model": {"fpn_channels": 31}}, "fpn_channels is 31; it has to be a multiple of 32"),
    ("threshold is a text", {"model": {"box_nms_thresh": "x"}}, "box_nms_thresh is x; it has to be 0 or"),
    ("black and white", {"model": {"pixel_std": [0, 0, 0]}}, "and pixel_std is (0, 0, 0); give three"),
    ("architecture", {"model": {"architecture": "yolo"}}, "architecture is yolo; it has to be one of oln"),
    ("OLN-Mask", {"model": {"architecture": "oln_mask"}}, "OLN-Mask is trained with train_net.py"),
    ("backbone", {"depth": None, "model": {"backbone": "resnet5"}}, "backbone is resnet5, which is no"),
    ("device", {"device": "toaster"}, "device toaster cannot be used ("),
    ("weights from scratch", {"weights": "a.pth"}, "--scratch starts from no weights; leave it out, or"),
    ("no data", {"train_json": None}, "--train-json is missing; give the training data"),
    ("no categories", {"seen": None}, "--split or --seen is missing; give the categories that are"),
    ("data are gone", {"train_json": "gone.json"}, "gone.json: no such file"),
]  # fmt: skip


def recipe(content):
    if isinstance(content, dict):
        content = yaml.safe_dump({n: v for n, v in (RECIPE | content).items() if v is not None})
    return {"r.yaml": content}


# name, text of a config of Detectron2, what is said after "c.yaml"
CONFIGS = [
    ("a list", "- a", "it holds no settings by name, such as `SOLVER: {MAX_ITER: 100}` ('list' object"),
    ("an unknown key", "MODEL: {FOO: 1}", "'Non-existent config key: MODEL.FOO'"),
    ("of another type", "SOLVER: {IMS_PER_BATCH: many}", "Type mismatch (<class 'int'> vs. <class 'str'>)"),
    ("its own base", "_BASE_: c.yaml", "it is nested too deeply, or its _BASE_ leads back to it"),
    ("base is gone", "_BASE_: gone.yaml", "No such file or directory: 'gone.yaml'"),
    ("base is a number", "_BASE_: [1]", "it holds no settings by name, such as `SOLVER: {MAX_ITER: 100}` "
     "('int'"),
    ("of the future", "VERSION: 99", "Cannot merge a v99 config into a v2 config"),
    ("not UTF-8", b"\x00\xff", "'utf-8' codec can't decode byte 0xff"),
]  # fmt: skip
# name, KEY VALUE pairs of `train_net.py`, what is said
SETTINGS_OF_DETECTRON2 = [
    ("architecture", "MODEL.META_ARCHITECTURE Foo", "No object named 'Foo' found in 'META_ARCH'"),
    ("depth", "MODEL.RESNETS.DEPTH 7", "the config describes no model (KeyError: 7); compare its MODEL"),
    ("batch", "SOLVER.IMS_PER_BATCH 0", "SOLVER.IMS_PER_BATCH is 0; it has to be 1 or more"),
    ("iterations", "SOLVER.MAX_ITER 0", "SOLVER.MAX_ITER is 0; it has to be 1 or more"),
    ("EMA", "SOLVER.EMA_DECAY 1.5", "SOLVER.EMA_DECAY is 1.5; use a number from 0 to below 1"),
    ("jitter", "INPUT.SCALE_JITTER [2,1]", "INPUT.SCALE_JITTER is [2, 1]; use two ascending numbers"),
    ("weights of data", "DATASETS.TRAIN_WEIGHTS [1,2]", "DATASETS.TRAIN_WEIGHTS is [1, 2]; give a number"),
    ("own row", "DATASETS.OWN \"[['a','b']]\"", "DATASETS.OWN: ['a', 'b'] is no row [name, annotations"),
    ("no such data", "DATASETS.TRAIN \"('nope',)\"", "no data set is registered as 'nope'; describe your"),
    ("no data", "DATASETS.TRAIN ()", "DATASETS.TRAIN is empty; name one data set or more"),
    ("masks", "MODEL.MASK_ON True", "MODEL.MASK_ON is True, but an annotation of it has no 'segmentation'"),
    ("target", "MODEL.OLN.OBJECTNESS_TARGET foo", "MODEL.OLN.OBJECTNESS_TARGET is 'foo'; use one of ['cent"),
    ("coding", "MODEL.OLN.RPN_BOX_CODING foo", "MODEL.OLN.RPN_BOX_CODING is 'foo'; use 'ltrb' or 'delta'"),
    ("precision", "SOLVER.AMP.DTYPE foo", "SOLVER.AMP.DTYPE is 'foo'; use bfloat16, float16 or float32"),
    ("pseudo_weight", "DATASETS.PSEUDO_WEIGHT 0.5 MODEL.PROPOSAL_GENERATOR.NAME RPN",
     "DATASETS.PSEUDO_WEIGHT is 0.5, but only OLN"),
    ("odd", "SEED", "Override list has odd length"),
    ("no file of proposals", "MODEL.LOAD_PROPOSALS True", "names 0 files for the 1 data sets of DATASETS"),
]  # fmt: skip
OF_THREE = {
    "ids": [1, 2, 3],
    "boxes": [np.zeros((2, 4))] * 3,
    "objectness_logits": [np.zeros(2)] * 3,
}
# name, what the file of proposals holds, or its bytes, what is said after "p.pkl: "
PROPOSALS = [
    ("a list", [1], "holds no dict of proposals; `oln-d2 propose --format detectron2` writes such a file"),
    ("without ids", {**OF_THREE, "ids": None}, "has no list 'ids' of the images; `oln-d2 propose"),
    ("fewer boxes", {**OF_THREE, "boxes": [1]}, "has 3 ids, 1 boxes and 3 objectness_logits, which have"),
    ("ids are a number", {**OF_THREE, "ids": np.array(5)}, "has no list 'ids' of the images; `oln-d2 propose"),
    ("mode is an array", {**OF_THREE, "bbox_mode": np.arange(2)}, "bbox_mode is [0 1], neither 0, XYXY"),
    ("mode", {**OF_THREE, "bbox_mode": 4}, "bbox_mode is 4, neither 0, XYXY, nor 1, XYWH"),
    ("an image less", {**OF_THREE, "ids": [1, 2, 9]}, "has no proposals for images/p3.jpg, image 3; propose"),
    ("shape", {**OF_THREE, "boxes": [np.zeros((2, 3))] * 3}, "entry 0: boxes and objectness_logits are not"),
    ("NaN", {**OF_THREE, "boxes": [np.full((2, 4), np.nan)] * 3}, "entry 0: a box or a logit is not finite"),
    ("400 digits", {**OF_THREE, "boxes": [[[10**400] * 4] * 2] * 3}, "entry 0: boxes and objectness_logits are"),
    ("beyond float32", {**OF_THREE, "boxes": [np.full((2, 4), 1e300)] * 3}, "entry 0: a box or a logit is not fin"),
    ("cut", pickle.dumps(OF_THREE)[:100], "is damaged or not complete; fetch or write it again"),
]  # fmt: skip


def checkpoint(**changes):
    """A checkpoint of a small OLN-Box whose settings, or content, has these changes."""

    def write(path):
        save_checkpoint(standalone_model(norm="GN", **SETTINGS), path)
        content = torch.load(path, weights_only=True)
        for name, value in changes.items():
            (content if name in content else content["config"])[name] = value
        torch.save(content, path)

    return write


def metadata(config):
    return lambda path: save_file({"a": torch.zeros(2)}, path, {"config": config})


SPARSE = {"backbone.fc.weight": torch.eye(3).to_sparse()}
# name, file, its content, what is said
CHECKPOINTS = [
    ("settings are a list", "m.pth", checkpoint(config=[1]), "does not say how its model is built"),
    ("an unknown setting", "m.pth", checkpoint(foo=1), "has settings that are not known here (foo is no"),
    ("a setting of another kind", "m.pth", checkpoint(anchor_sizes=5), "not known here (anchor_sizes is 5"),
    ("another depth", "m.pth", checkpoint(depth=10), "the checkpoint of another model: backbone.bottom_up"),
    ("sparse tensors", "m.pth", checkpoint(model=SPARSE), "holds no tensors, neither at the top nor under"),
    ("a tensor", "m.pth", lambda path: torch.save(torch.zeros(2), path), "holds a Tensor, not a checkpoint"),
    ("settings are broken", "m.safetensors", metadata('{"depth":'), "is damaged or not complete"),
    ("settings without end", "m.safetensors", metadata("[" * 9999), "is damaged or not complete; fetch"),
    ("settings of others", "m.safetensors", metadata('{"foo": 1}'), "not known here (foo is no setting of"),
]  # fmt: skip


def exported(settings):
    """The exported model of this package with these settings."""

    def write(path):
        model = onnx.load(find(".onnx"))
        settings_now = json.loads(model.metadata_props[0].value)
        del model.metadata_props[:]
        text = json.dumps(settings_now | settings) if isinstance(settings, dict) else settings
        if text is not None:
            onnx.helper.set_model_props(model, {"oln_d2": text})
        onnx.save(model, path)

    return write


EXPORTED = [
    ("without settings", exported(None), "does not say how images are to be resized; give a file that"),
    ("broken settings", exported("{"), "what it says of itself cannot be read (Expecting property name"),
    ("settings are a number", exported("5"), "what it says of itself cannot be read ('int' object is not"),
    ("of the future", exported({"format": 9}), "was written by a later version, in its format 9, and this"),
    ("negative size", exported({"min_size": -5}), "its graph or its settings are not those that `oln-d2"),
    ("text", "hello", "is no ONNX file that onnxruntime can run ([ONNXRuntimeError] : 7 : INVALID_PROTOBUF"),
]  # fmt: skip


def half(path):
    Image.effect_noise((96, 64), 90).save(path)
    path.write_bytes(path.read_bytes()[:900])


# name, the content of an image, what is said after "images/p1.jpg: "
IMAGES = [
    ("empty", b"", "is empty; fetch it again"),
    ("cut", half, "cannot be read as an image (image file is truncated"),
    ("text", "hello", "is no image in a format that can be read here; convert or fetch it again"),
    ("a web page", "<!doctype html>", "is text such as a web page, no image; fetch it again"),
    ("a video", b"\0\0\0\x18ftypisom" + bytes(99), "is a video, no image; propose reads it by an ending"),
    ("of another size", lambda path: Image.new("RGB", (50, 40)).save(path), "is 50 x 40 px, but gt.json"),
    ("values beyond", lambda path: Image.new("F", (96, 64), 7.0).save(path, "TIFF"),
     "has values from 7 to 7; expected 0 to 1"),
]  # fmt: skip
# name, the file of seen categories, what is said
SEEN = [
    ("empty", "", "'s.txt': names no category; expected at least one name"),
    ("not UTF-8", "mug\xe9".encode("latin1"), "s.txt: cannot be read as UTF-8 text ('utf-8' codec"),
    ("of other data", "dog\n", "no category named 'dog' (seen categories: 's.txt'); it has: 'kite', 'mug'"),
]  # fmt: skip
OTHER_SITUATIONS = [
    bad("nothing is annotated, evaluate", EVALUATE, "Warning: gt.json holds no object to be found.", 0,
        gt=gt(annotations=[])),
    bad("nothing is annotated, compare", COMPARE, "gt.json: holds no object to be found, so nothing", 2,
        gt=gt(annotations=[])),
    bad("nothing is annotated, train", TRAIN, "px or more a side has an annotation (crowds do not count)",
        gt=gt(annotations=[])),
    bad("nothing is annotated, audit", "audit gt.json --images images --weights {weights} --output out",
        "Nothing is annotated in gt.json, so all that is found is a candidate.", 0,
        gt=gt(annotations=[])),
    bad("one of two results, compare", COMPARE.replace("d.json", "d.json e.json"),
        ("Left out:", "e.json: is empty; write or fetch the results again"), 1, more={"e.json": ""}),
    bad("results twice, compare", COMPARE.replace("d.json", "d.json ./d.json"), "is given twice", 1),
    bad("results are gone", "evaluate gt.json gone.json --seen mug", "gone.json: no such file; give detec"),
    bad("results are a folder", "evaluate gt.json images --seen mug", "images: cannot be read (Is a dir"),
    bad("without file_name, audit", "audit gt.json --images images --weights {weights} --output out",
        "gt.json: images[0] has no 'file_name' that is a text; write its name",
        image=change("file_name", 5)),
    bad("file_name with NUL", PROPOSE_GT, "images[0]: file_name 'a\\x00b' is no name that a file can have",
        image=change("file_name", "a\0b")),
    bad("width is not known, train", TRAIN, "gt.json: images[0]: width is None; write the image's size",
        image=change("width", None)),
    bad("another folder, audit", "audit gt.json --images other --weights {weights} --output out",
        ("none of the 1 inputs (", "other/z.png) is an image of gt.json (p1.jpg, p2.jpg, p3.jpg); give"),
        more={"other/z.png": lambda path: Image.new("RGB", (96, 64)).save(path)}),
    bad("no folder, audit", "audit gt.json --weights {weights} --output out",
        "gt.json: the folder of its images is not given; name it (--images)"),
    bad("no audit before", MERGE, "out/candidates.json: no such file; audit first, without merge",
        more={"m.json": decision()}),
    bad("a journal of something else", PROPOSE_GT, "out/journal.jsonl: the line at byte 0 is broken; rem",
        more={"out/journal.jsonl": "[]\n"}),
    bad("a journal that is no text", PROPOSE_GT, "out/journal.jsonl: the line at byte 0 is broken",
        more={"out/journal.jsonl": b"\xff\xfe\n"}),
    bad("a recipe without images, compare", "compare gt.json r.yaml --seen mug --output out",
        "--images is missing; recipes have to propose on the images of GT", more=recipe({})),
    bad("a recipe's data without images, compare", f"{RECIPES_COMPARED} r.yaml --train-json gt.json",
        "train_json and train_images go together; give both or neither", more=recipe({})),
    bad("data for no recipe, compare", f"{COMPARE} --train-json gt.json",
        "--train-json, --train-images and --opts are for recipes; give one (.yaml)"),
    bad("two recipes of one name, compare", f"{RECIPES_COMPARED} r.yaml a/r.yaml",
        "a/r.yaml: the second recipe named r, for one folder; rename it",
        more={**recipe({}), "a/r.yaml": recipe({})["r.yaml"]}),
    bad("an unknown option of a recipe, compare", f"{RECIPES_COMPARED} r.yaml",
        "r.yaml: epoch is no option of train; near it: epochs", more=recipe({"epoch": 3})),
    bad("a recipe of no data, compare", f"{RECIPES_COMPARED} r.yaml",
        "r.yaml: lacks train_json; give --train-json and --train-images, which all recipes then",
        more=recipe({"train_json": None})),
    bad("a recipe that is not there, compare", f"{RECIPES_COMPARED} gone.yaml", "gone.yaml",
        detectron2=True),
    bad("settings of a run that are damaged, compare", f"{RECIPES_COMPARED} {{recipe}}",
        "seed_0/config.yaml: is damaged (", detectron2=True,
        more={"out/runs/recipe/seed_0/config.yaml": "["}),
    bad("a run of other settings, compare", f"{RECIPES_COMPARED} {{recipe}}",
        "seed_0: holds a run with another value of", detectron2=True,
        more={"out/runs/recipe/seed_0/config.yaml": "SEED: 9"}),
    bad("a quickstart of something else", "quickstart --engine standalone --output out",
        "out/quickstart.json: holds a JSON list, not what is expected of this file, a dict; fetch",
        more={"out/quickstart.json": "[]"}),
    bad("parts of something else", "audit gt.json --images images --cross-fit 2 --output out",
        "gt.json: 3 images are too few for 2 parts; take fewer parts"),
    bad("last checkpoint is no text", train_net().replace("{recipe}", "{recipe} --resume"),
        "out/last_checkpoint: is damaged or not complete; fetch or write it again; no other checkpoint",
        detectron2=True, more={"out/last_checkpoint": b"\xff\xfe\0"}),
    bad("last checkpoint is gone", train_net().replace("{recipe}", "{recipe} --resume"),
        "out/gone.pth: no such file; give a checkpoint, e.g. output/model_final.pth; no other",
        detectron2=True, more={"out/last_checkpoint": "gone.pth"}),
    bad("a mask of training", train_net("MODEL.MASK_ON True"),
        "the annotation with id 3 of p1.jpg has a 'segmentation' that is neither polygons",
        detectron2=True, annotation=change("segmentation", [[0, 0, 1e9, 0, 1e9, 1e9]])),
]  # fmt: skip
ROWS = [
    *(bad(f"annotations: {name}", EVALUATE, says, **changes) for name, changes, says in ANNOTATIONS),
    *(
        bad(
            f"results: {name}",
            EVALUATE,
            ("d.json: ", says),
            **changes if isinstance(changes, dict) else {"raw": {"d.json": lambda t, b=changes: b}},
        )
        for name, changes, says in RESULTS
    ),
    *(
        bad(f"mask of the ground truth: {name}", MASKS, ("error: gt.json: the annotation with", says),
            annotation=change("segmentation", mask), entry=change("segmentation", SQUARE))
        for name, mask, says, _ in MASKS_OF
    ),
    *(
        bad(f"mask of the results: {name}", MASKS, ("error: d.json: entry 0: ", says),
            annotation=change("segmentation", SQUARE), entry=change("segmentation", mask))
        for name, mask, _, says in MASKS_OF
    ),
    *(
        bad(f"decisions: {name}", MERGE, ("m.json: ", says),
            more={"m.json": content, "out/candidates.json": listed()})
        for name, content, says in DECISIONS
    ),
    *(
        bad(f"list of an audit: {name}", MERGE, says,
            more={"m.json": decision(), "out/candidates.json": content})
        for name, content, says in LISTS
    ),
    *(
        bad(f"recipe: {name}", "train --config r.yaml --output out", says, more=recipe(content))
        for name, content, says in RECIPES
    ),
    *(
        bad(f"config: {name}", PROPOSE + "{weights} --config-file c.yaml --device cpu",
            ("c.yaml, or a KEY VALUE pair: ", says), detectron2=True, more={"c.yaml": content})
        for name, content, says in CONFIGS
    ),
    *(
        bad(f"settings: {name}", train_net(pairs), says, detectron2=True)
        for name, pairs, says in SETTINGS_OF_DETECTRON2
    ),
    *(
        bad(f"proposals: {name}", train_net(load_proposals("TRAIN")), ("p.pkl: ", says),
            detectron2=True,
            more={"p.pkl": content if isinstance(content, bytes) else pickle.dumps(content)})
        for name, content, says in PROPOSALS
    ),
    *(
        bad(f"checkpoint: {name}", PROPOSE + file, (f"{file}: ", says), more={file: content})
        for name, file, content, says in CHECKPOINTS
    ),
    *(
        bad(f"exported: {name}", PROPOSE + "m.onnx", ("m.onnx: ", says), more={"m.onnx": content})
        for name, content, says in EXPORTED
    ),
    *(
        bad(f"image: {name}", PROPOSE_GT, ("images/p1.jpg: ", says, "1 could not be read"), 0,
            more={"images/p1.jpg": content})
        for name, content, says in IMAGES
    ),
    *(
        bad(f"seen categories: {name}", "evaluate gt.json d.json --seen s.txt", says,
            more={"s.txt": content})
        for name, content, says in SEEN
    ),
    *OTHER_SITUATIONS,
]  # fmt: skip
