"""Checkpoints that are something else, not whole, or as other tools write them."""

import argparse
import io
import pickle
import zipfile

import torch
from PIL import Image
from test_propose import SETTINGS
from test_standalone import standalone_model

from oln_d2.standalone import save_checkpoint
from real_files import Row

PROPOSE = "propose photo.png --output out --weights "
COMMANDS = {
    "propose": (PROPOSE + "{file}", False),
    "propose --config-file": (PROPOSE + "{file} --config-file {{recipe}}", True),
    "convert": ("convert {file} out.pth", False),
    "export": ("export {file} out.onnx", False),
}


def photo(folder):
    Image.new("RGB", (120, 90), "grey").save(folder / "photo.png")


def checkpoint(folder, name="whole.pth"):
    save_checkpoint(standalone_model(norm="GN", **SETTINGS), folder / name)
    return torch.load(folder / name, weights_only=True)


def raw(data, name="model.pth"):
    """Makes a file of these bytes."""

    def make(folder):
        photo(folder)
        (folder / name).write_bytes(data)

    return make


def saved(change, name="model.pth", write=torch.save):
    """Makes a file of what `change` makes of the content of a checkpoint."""

    def make(folder):
        photo(folder)
        write(change(checkpoint(folder)), folder / name)

    return make


def cut(share, **kwargs):
    def make(folder):
        photo(folder)
        torch.save(checkpoint(folder), folder / "model.pth", **kwargs)
        data = (folder / "model.pth").read_bytes()
        (folder / "model.pth").write_bytes(data[: int(len(data) * share)])

    return make


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/model.pth", b"")
    return file.getvalue()


def with_value(number):
    def change(content):
        next(t for n, t in content["model"].items() if n.endswith("fc1.weight"))[0, 0] = number
        return content

    return change


def prefixed(prefix, **more):
    def change(content):
        return {
            **content,
            "model": {**{prefix + n: t for n, t in content["model"].items()}, **more},
        }

    return change


def dump(content, path):
    with open(path, "wb") as f:
        pickle.dump(content, f)


def of_zoo(content):
    arrays = {name: tensor.numpy() for name, tensor in content["model"].items()}
    return {"model": arrays, "__author__": "Detectron2 Model Zoo"}


OTHER_FILES = {
    "web page": (b"<!DOCTYPE html><title>Google Drive - Quota exceeded", "is a web page"),
    "error page of a store": (b'\xef\xbb\xbf<?xml version="1.0"?><Error>', "is a web page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "empty": (b"", "model.pth: is empty; fetch"),
    "zeros": (bytes(5000), "nothing but zeros"),
    "photograph": (b"\xff\xd8\xff\xe0\0\x10JFIF" + bytes(99), "is an image, not a checkpoint"),
    "json": (b'{"message": "Not Found"}', "is text, not a checkpoint"),
    "gzip": (b"\x1f\x8b\x08\x00rest", "is an archive"),
    "zip": (zipped(), "is a zip archive; unpack it"),
    "cut safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"F32"', "is damaged"),
    "onnx": (b"\x08\x08\x12\x07pytorch", "is ONNX"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "is HDF5"),
}
# Those that are not whole, or hold code.
REFUSED = {
    "cut": (cut(0.5), "is not complete"),
    "cut at the end": (cut(0.999), "is not complete"),
    "cut, of old PyTorch": (cut(0.7, _use_new_zipfile_serialization=False), "is damaged"),
    "cut pickle": (raw(pickle.dumps({"model": list(range(9))})[:20]), "is damaged"),
    "settings as argparse has them": (
        saved(lambda c: {**c, "args": argparse.Namespace(lr=0.1)}),
        "holds argparse.Namespace; pickled code is not executed",
    ),
    "whole model": (saved(lambda c: torch.nn.Linear(2, 2)), "holds torch.nn.modules.linear.Linear"),
    "whole model, of old PyTorch": (
        saved(
            lambda c: torch.nn.Linear(2, 2),
            write=lambda *a: torch.save(*a, _use_new_zipfile_serialization=False),
        ),
        "holds torch.nn.modules.linear.Linear",
    ),
    "code in a pickle": (raw(b"cos\nsystem\n(S'echo Traceback'\ntR."), "holds os.system"),
    "NaN": (saved(with_value(float("nan"))), "fc1.weight holds NaN or infinite"),
    "infinite": (saved(with_value(float("inf"))), "fc1.weight holds NaN or infinite"),
    "infinite, of the zoo": (
        saved(lambda c: of_zoo(with_value(float("-inf"))(c)), write=dump),
        "fc1.weight holds NaN or infinite",
    ),
    "no tensors": (saved(lambda c: {"epoch": 3, "ema": {}}), "holds no tensors"),
}
READ = {
    "DistributedDataParallel": saved(prefixed("module.")),
    "torch.compile": saved(prefixed("module._orig_mod.")),
    "AveragedModel": saved(prefixed("module.", n_averaged=torch.tensor(3))),
    "EMA alone": saved(lambda c: {**c, "model": {}, "model_ema": c["model"]}),
    "EMA beside": saved(lambda c: {**c, "model_ema": {n: 0 * t for n, t in c["model"].items()}}),
    "state dict of Lightning's kind": saved(
        lambda c: {"config": c["config"], "state_dict": c["model"]}
    ),
}
BUILT = "does not say how its model is built; if Detectron2 trained it, give its --config-file"

ROWS = [
    *(
        Row(f"{name}, {command}", make, line.format(file="model.pth"), (says, "model.pth: "), 2,
            ("weights_only", "torch.load"), detectron2=detectron2)
        for name, (make, says) in {
            **{name: (raw(data), says) for name, (data, says) in OTHER_FILES.items()},
            **REFUSED,
        }.items()
        for command, (line, detectron2) in COMMANDS.items()
    ),
    *(
        Row(f"{name}, {command}", make, line.format(file="model.pth"), ("1 image",),
            detectron2=detectron2)
        for name, make in READ.items()
        for command, (line, detectron2) in list(COMMANDS.items())[:2]
    ),
    Row("of the zoo", saved(of_zoo, "model.pkl", dump),
        PROPOSE + "model.pkl --config-file {recipe}", ("1 image",), detectron2=True),
    Row("of the zoo, without its config", saved(of_zoo, "model.pkl", dump),
        PROPOSE + "model.pkl", ("model.pkl: " + BUILT,), 2),
    Row("bare state dict", saved(lambda c: c["model"]), "export model.pth out.onnx", (BUILT,), 2),
    Row("bare state dict with its config", saved(lambda c: c["model"]),
        "export model.pth out.onnx --config-file {recipe}", ("out.onnx is written",),
        detectron2=True),
    Row("names of another wrapper", saved(prefixed("student.")), PROPOSE + "model.pth",
        ("none of its names is one of the model's, they begin with student",), 2),
    Row("names of another wrapper, with its config", saved(prefixed("student.")),
        PROPOSE + "model.pth --config-file {recipe}", ("they begin with student",), 2,
        detectron2=True),
    Row("address without a config", photo, PROPOSE + "https://127.0.0.1:9/w.pth",
        ("is an address; fetch the file",), 2),
    Row("address out of reach", photo,
        PROPOSE + "http://127.0.0.1:9/w.pth --config-file {recipe}", ("cannot be fetched",), 2,
        detectron2=True),
    Row("web page as config", raw(b"<html>\n<body>", "page.yaml"),
        PROPOSE + "{weights} --config-file page.yaml", ("page.yaml",), 2, detectron2=True),
    Row("empty config", raw(b"", "empty.yaml"),
        PROPOSE + "{weights} --config-file empty.yaml", ("empty.yaml",), 2, detectron2=True),
    Row("export of another model", photo,
        "export {weights} out.onnx --config-file oln_mask_R_50_FPN.yaml",
        ("MODEL.MASK_ON is True; without Detectron2 it can only be False",), 2, detectron2=True),
]  # fmt: skip
