"""What is written: nothing that is there is lost, and what cannot be written is said before."""

import json
import os
import stat

import numpy as np
from PIL import Image

from oln_d2.files import lock_folder

from . import Row

GT = {
    "images": [{"id": i, "file_name": f"{i}.jpg", "height": 60, "width": 80} for i in (1, 2)],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 30], "area": 900},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [9, 9, 30, 30], "area": 900},
    ],
    "categories": [{"id": 1, "name": "mug"}, {"id": 2, "name": "kite"}],
}
FOUND = [{"image_id": i, "category_id": 1, "bbox": [5, 5, 30, 30], "score": 0.5} for i in (1, 2)]
EVALUATE = "evaluate gt.json d.json --seen mug --k 1"
VISUALIZE = "visualize gt.json d.json --images photos --seen mug"
PROPOSE = "propose photos --weights {weights} --device cpu"
LONG = "n" * 252 + ".json"
locks = []  # held until the tests end


def files(folder):
    (folder / "gt.json").write_text(json.dumps(GT))
    (folder / "d.json").write_text(json.dumps(FOUND))
    (folder / "photos").mkdir()
    for i in (1, 2):
        pixels = np.random.RandomState(i).randint(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"photos/{i}.jpg")


def beside(*names):
    """The usual files, and those of a user by these names."""

    def make(folder):
        files(folder)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("mine")

    return make


def stay(*names):
    def check(folder):
        assert [(folder / name).read_text() for name in names] == ["mine"] * len(names)
        assert not [name for _, _, own in os.walk(folder) for name in own if name[:2] == ".0"]

    return check


def linked(folder):
    files(folder)
    (folder / "disk").mkdir()
    (folder / "disk/scores.json").write_text("old")
    (folder / "scores.json").symlink_to("disk/scores.json")


def is_written_through(folder):
    assert (folder / "scores.json").is_symlink()
    assert "results" in json.loads((folder / "disk/scores.json").read_text())


def is_no_file(folder):
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def locked(folder):
    files(folder)
    (folder / "out").mkdir()
    locks.append(lock_folder(folder / "out"))


def annotated_in_place(folder):
    files(folder)
    (folder / "out").mkdir()
    (folder / "gt.json").rename(folder / "out/images.json")


def left_by_a_dead_process(folder):
    files(folder)
    (folder / "out").mkdir()
    (folder / "out/.lock").write_text("oln-d2 propose (process 1 on elsewhere, since 2020-01-01)")


def with_a_new_file(folder):
    files(folder)
    (folder / "new").touch()


def has_usual_mode(folder):
    assert (folder / "scores.json").stat().st_mode == (folder / "new").stat().st_mode


def photos_are_whole(folder):
    for path in (folder / "photos").iterdir():
        with Image.open(path) as image:
            assert image.size == (80, 60)


ROWS = [
    Row(
        "a file by the name of a temporary one: JSON",
        beside("scores.tmp.json"),
        f"{EVALUATE} --json scores.json",
        ("unseen",),
        check=stay("scores.tmp.json"),
    ),
    Row(
        "a file by the name of a temporary one: plot",
        beside("ar.tmp.png"),
        f"{EVALUATE} --plot ar.png",
        ("unseen",),
        check=stay("ar.tmp.png"),
    ),
    Row(
        "a file by the name of a temporary one: pictures",
        beside("out/1.tmp.jpg", "out/index.tmp.html"),
        f"{VISUALIZE} --html --output out",
        ("2 pictures written to out",),
        check=stay("out/1.tmp.jpg", "out/index.tmp.html"),
    ),
    Row(
        "a file by the name of a temporary one: proposals",
        beside("out/results.tmp.json", "out/images.tmp.json"),
        f"{PROPOSE} --output out",
        ("Proposals for 2 images",),
        check=stay("out/results.tmp.json", "out/images.tmp.json"),
    ),
    Row(
        "the mode of a new file",
        with_a_new_file,
        f"{EVALUATE} --json scores.json",
        ("unseen",),
        check=has_usual_mode,
    ),
    Row(
        "a link to another disk",
        linked,
        f"{EVALUATE} --json scores.json",
        ("unseen",),
        check=is_written_through,
    ),
    Row(
        "a device",
        files,
        f"{EVALUATE} --json /dev/null",
        ("unseen",),
        check=is_no_file,
    ),
    Row(
        "evaluate: the output is an input",
        files,
        f"{EVALUATE} --json ./photos/../d.json",
        ("d.json: is one of the files to be read; write to another",),
        code=2,
    ),
    Row(
        "convert: the output is an input",
        files,
        "convert gt.json gt.json",
        ("gt.json: is one of the files to be read",),
        code=2,
    ),
    Row(
        "export: the output is an input",
        lambda folder: (folder / "a.onnx").write_text("mine"),
        "export a.onnx a.onnx",
        ("a.onnx: is one of the files to be read",),
        code=2,
        check=stay("a.onnx"),
    ),
    Row(
        "propose: results of something else",
        beside("out/results.json"),
        f"{PROPOSE} --output out",
        ("out/results.json: is there, but no journal.jsonl", "choose another --output"),
        code=2,
        check=stay("out/results.json"),
    ),
    Row(
        "propose: labels of something else",
        beside("out/labels/1.txt"),
        f"{PROPOSE} --format yolo --output out",
        ("out/labels: is there, but no journal.jsonl",),
        code=2,
        check=stay("out/labels/1.txt"),
    ),
    Row(
        "propose: the output is an input",
        annotated_in_place,
        f"{PROPOSE} --gt out/images.json --output out",
        ("out/images.json: is ",),
        code=2,
        check=lambda folder: json.loads((folder / "out/images.json").read_text())["annotations"][1],
    ),
    Row(
        "propose: into the folder of the photos",
        files,
        f"{PROPOSE} --output photos",
        ("there is no image or video outside of photos",),
        code=2,
        check=photos_are_whole,
    ),
    Row(
        "propose: a folder in use",
        locked,
        f"{PROPOSE} --output out",
        ("out: is in use by", f"(process {os.getpid()} on ", "since 20", "wait for it"),
        code=2,
    ),
    Row(
        "quickstart: a folder in use",
        lambda folder: (
            locked(folder),
            (folder / "out/quickstart.json").write_text(
                '{"engine": "standalone", "seed": 0, "control": false, "images": 4, "epochs": 1.0}'
            ),
        ),
        "quickstart --engine standalone --images 4 --epochs 1 --output out",
        ("out: is in use by", "wait for it"),
        code=2,
    ),
    Row(
        "the lock of a dead process",
        left_by_a_dead_process,
        f"{PROPOSE} --output out",
        ("Proposals for 2 images",),
    ),
    *(
        Row(
            f"{line.split()[0]}: a folder {what}",
            beside("file"),
            f"{line} --output {path}",
            (f"{path}: ", says),
            code=2,
        )
        for line in (VISUALIZE, PROPOSE, "quickstart --engine standalone")
        for what, path, says in (
            ("that is a file", "file", "is a file; give a folder"),
            ("below a file", "file/out", "cannot be made (Not a directory); choose another"),
            ("that cannot be made", "/proc/out", "cannot be made"),
            ("that cannot be written to", "/proc", "cannot be written to"),
        )
        if not (line.startswith("quickstart") and path == "/proc")  # it is not empty
    ),
    *(
        Row(
            f"evaluate: {what}",
            beside("file"),
            f"{EVALUATE} --{option}",
            (says,),
            code=2,
            lacks=("unseen",),
        )
        for what, option, says in (
            ("JSON in no folder", "json no/a.json", "no/a.json: is a folder, or its folder"),
            ("a plot in a file", "plot file/a.png", "file/a.png: is a folder, or its folder"),
            ("JSON where none can be", "json /proc/a.json", "/proc/a.json: cannot be written"),
            ("a name that is too long", f"json {LONG}", "cannot be written (File name too long)"),
        )
    ),
    Row(
        "visualize: the output is an input",
        files,
        f"{VISUALIZE} --output photos",
        ("photos: ", "would replace", "choose another"),
        code=2,
        check=photos_are_whole,
    ),
    Row(
        "visualize: a folder in use",
        locked,
        f"{VISUALIZE} --output out",
        ("out: is in use by", "wait for it"),
        code=2,
    ),
]
