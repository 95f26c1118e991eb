"""Images: how they are found, which way up they are, what their files hold besides pixels."""

import json
import os
import zlib

import numpy as np
from PIL import Image

from real_files import Row

SMALL = (
    "--depth 10 --min-size 96 --max-size 128 --batch-size 2 --warmup 1 --workers 0 --scratch "
    "--epochs 1"
)
TRAIN = f"train --train-json ann.json --images images --seen mug {SMALL} --output out"
PROPOSE = "propose images --gt ann.json --weights {weights} --output out"
VISUALIZE = "visualize ann.json d.json --images images --seen mug --output out"
PLAIN = "propose images --weights {weights} --output out"


def picture(path, size=(128, 96), seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (12, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(size).save(path, **options)


def annotate(folder, names, size=(128, 96), field="file_name"):
    """ann.json of images with these names, and d.json, a detection an image."""
    images = [
        {"id": i, field: name, "width": size[0], "height": size[1]} for i, name in enumerate(names)
    ]
    boxes = [
        {"id": i + 1, "image_id": i, "category_id": 1, "bbox": [5, 5, 60, 50]}
        | {"area": 3000, "iscrowd": 0}
        for i in range(len(names))
    ]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "mug"}]}
    (folder / "ann.json").write_text(json.dumps(content))
    found = [{key: box[key] for key in ("image_id", "bbox")} | {"score": 0.5} for box in boxes]
    (folder / "d.json").write_text(json.dumps(found))


def named(names, paths=("p0.jpg", "p1.jpg"), field="file_name"):
    """Images at `paths` that the file names `names`."""

    def make(folder):
        for i, path in enumerate(paths):
            picture(folder / "images" / path, seed=i)
        annotate(folder, names, field=field)

    return make


def ids_are(*expected):
    def check(folder):
        entries = json.loads((folder / "out/results.json").read_text())
        assert {entry["image_id"] for entry in entries} == set(expected)

    return check


def names_are(*expected):
    def check(folder):
        images = json.loads((folder / "out/images.json").read_text())["images"]
        assert [image["file_name"] for image in images] == list(expected)

    return check


def everywhere(name, make, number=2):
    """The same files through each command that looks for images."""
    return [
        Row(f"{name}, train", make, TRAIN, (f"{number} images",)),
        Row(f"{name}, propose", make, PROPOSE, (f"{number} images",), check=ids_are(0, 1)),
        Row(f"{name}, visualize", make, VISUALIZE, (f"{number} pictures",)),
    ]


def refused(name, make, *says):
    """Refused by each of these commands."""
    return [
        Row(f"{name}, {line.split()[0]}", make, line, says, code=2) for line in (TRAIN, PROPOSE)
    ]


LVIS = ["http://images.cocodataset.org/val2017/p0.jpg", "http://x.org/train2017/p1.jpg"]
FOUND = [
    *everywhere("./", named(["./p0.jpg", "./p1.jpg"])),
    *everywhere("backslashes", named(["images\\p0.jpg", "..\\..\\p1.jpg"])),
    *everywhere("the folder is named, too", named(["images/p0.jpg", "data/images/p1.jpg"])),
    *everywhere("deeper", named(["p0.jpg", "b/p1.jpg"], ["a/p0.jpg", "a/b/p1.jpg"])),
    *everywhere("LVIS", named(LVIS, ["val2017/p0.jpg", "train2017/p1.jpg"], "coco_url")),
    *everywhere("another machine", named(["/home/me/p0.jpg", "C:\\Users\\me\\p1.jpg"])),
    *everywhere("buckets", named(["s3://bucket/a/p0.jpg", "https://a.org/p1.jpg?sig=1"])),
    *everywhere(
        "Label Studio",
        named(["/data/upload/1/ab12cd34-p0.jpg", "/data/local-files/?d=images/p1.jpg"]),
    ),
    *everywhere("without ending", named(["p0", "p1"])),
    *everywhere(
        "the same file names in folders",
        named(["s3://b/train/p.jpg", "s3://b/val/p.jpg"], ["train/p.jpg", "val/p.jpg"]),
    ),
    *refused("ambiguous", named(["p0.jpg"], ["a/p0.jpg", "b/p0.jpg"]), "images[0]", "might be"),
    *refused("twice", named(["p0.jpg", "p1.jpg", "p0.jpg"]), "images[2]: file_name p0.jpg occurs"),
    *refused("twice, written otherwise", named(["p0.jpg", "./p0.jpg"]), "images[1]", "images[0]"),
    Row(
        "another folder's image of the same name is not taken",
        named(["val/p0.jpg"], ["train/p0.jpg"]),
        TRAIN,
        ("1 of 1 images of ann.json are missing", "val/p0.jpg"),
        code=2,
    ),
    Row(
        "missing, said at once",
        named([f"p{i}.jpg" for i in range(20)]),
        TRAIN,
        ("18 of 20 images", "p2.jpg, p3.jpg, p4.jpg"),
        code=2,
        lacks=("p5.jpg",),
    ),
    Row(
        "not among the inputs",
        named(["p0.jpg", "p1.jpg", "p9.jpg"]),
        PROPOSE,
        ("1 image of ann.json not among the inputs", "p9.jpg"),
        check=ids_are(0, 1),
    ),
]


def turned(orientation, size, ending="jpg"):
    """Stored 128 x 96, with EXIF; annotated as of `size`."""

    def make(folder):
        for i in range(2):
            exif = Image.Exif()
            exif[0x0112] = orientation
            picture(folder / f"images/p{i}.{ending}", seed=i, exif=exif)
        annotate(folder, [f"p{i}.{ending}" for i in range(2)], size)

    return make


def sizes_are(width, height):
    def check(folder):
        images = json.loads((folder / "out/images.json").read_text())["images"]
        assert {(image["width"], image["height"]) for image in images} == {(width, height)}

    return check


NOTE = "EXIF turns this image, but its annotations in ann.json are of the unturned one"
STORED = ("2 images read as stored: EXIF would turn the picture",)
SIZES = [
    Row("EXIF, annotated raw, train", turned(6, (128, 96)), TRAIN, (NOTE,)),
    Row("EXIF, annotated upright, train", turned(6, (96, 128)), TRAIN, lacks=("EXIF",), says=()),
    *(
        Row(
            f"EXIF {orientation}, annotated raw, propose, {ending}",
            turned(orientation, (128, 96), ending),
            PROPOSE,
            STORED,
            check=sizes_are(128, 96),
        )
        for orientation, ending in ((6, "jpg"), (8, "png"), (5, "webp"), (7, "jpg"), (6, "tif"))
    ),
    Row(
        "EXIF, annotated upright, propose",
        turned(8, (96, 128)),
        PROPOSE,
        (),
        lacks=("stored",),
        check=sizes_are(96, 128),
    ),
    Row("EXIF, annotated raw, visualize", turned(6, (128, 96)), VISUALIZE, ("2 pictures",)),
    Row(
        "turned since, train",
        turned(1, (96, 128)),
        TRAIN,
        ("128 x 96 px, but ann.json says 96 x 128", "turned after it was annotated"),
        code=2,
    ),
    Row(
        "of another size, propose",
        turned(1, (640, 480)),
        PROPOSE,
        ("is 128 x 96 px, but ann.json says 640 x 480", "2 could not be read"),
        code=1,
    ),
]


def chunk(kind, data, crc=None):
    crc = zlib.crc32(kind + data) if crc is None else crc
    return len(data).to_bytes(4) + kind + data + crc.to_bytes(4)


def png_with(*chunks, behind=False):
    """A PNG with more chunks, before its pixels or behind them."""

    def make(folder):
        path = folder / "images/p0.png"
        picture(path)
        data = path.read_bytes()
        at = len(data) - 12 if behind else data.index(b"IDAT") - 4
        path.write_bytes(data[:at] + b"".join(chunks) + data[at:])

    return make


def jpeg_with(exif):
    def make(folder):
        picture(folder / "images/p0.jpg", exif=b"Exif\0\0" + exif)

    return make


TEXT = b"workflow\0\0" + zlib.compress(bytes(3_000_000))
TIFF = b"II*\0\x08\0\0\0"  # the header of EXIF
ORIENTATION = TIFF + b"\x01\0\x12\x01"  # with one entry of the tag, to come
AS_TEXT = ORIENTATION + b"\x02\0\x02\0\0\0" + b"6\0\0\0" + bytes(4)
HIGH = ORIENTATION + b"\x03\0\x01\0\0\0c\0\0\0" + bytes(4)
ONE = ("Proposals for 1 image",)
METADATA = [
    Row("long text", png_with(chunk(b"zTXt", TEXT)), PLAIN, ONE),
    Row("long text behind", png_with(chunk(b"zTXt", TEXT), behind=True), PLAIN, ONE),
    Row("long text, iTXt", png_with(chunk(b"iTXt", b"a\0\1\0\0\0" + TEXT[10:])), PLAIN, ONE),
    Row("much text", png_with(*[chunk(b"tEXt", b"a\0" + bytes(2**20))] * 70), PLAIN, ONE),
    Row("text with a wrong sum", png_with(chunk(b"tEXt", b"a\0b", crc=1)), PLAIN, ONE),
    Row("broken profile", png_with(chunk(b"iCCP", b"a\0\0" + TEXT[10:])), PLAIN, ONE),
    Row("EXIF as text", jpeg_with(AS_TEXT), PLAIN, ONE),
    Row("EXIF without an end", jpeg_with(ORIENTATION), PLAIN, ONE),
    Row("EXIF of zeros", jpeg_with(bytes(30)), PLAIN, ONE),
    Row("EXIF that points outside", jpeg_with(b"MM\0*\xff\xff\xff\xff"), PLAIN, ONE),
    Row("orientation 99", jpeg_with(HIGH), PLAIN, ONE),
]  # fmt: skip


def pages(folder):
    frames = [Image.new("RGB", (128, 96), color) for color in ("red", "green", "blue")]
    (folder / "images").mkdir()
    for ending in "tif", "gif", "webp", "png":
        path = folder / f"images/a.{ending}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
    # A gain map or a preview is no image of its own.
    frames[0].save(folder / "images/b.jpg", "MPO", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "images/c.tif")


def pages_with_ids(folder):
    pages(folder)
    annotate(folder, ["a.tif/000002.jpg", "a.gif"])


def pages_of_unknown_size(folder):
    pages_with_ids(folder)
    content = json.loads((folder / "ann.json").read_text())
    for image in content["images"]:
        image |= {"width": None, "height": None}
    (folder / "ann.json").write_text(json.dumps(content))


def images_are_there(folder):
    """Those that the page in `out` refers to."""
    text = (folder / "out/index_files/data.js").read_text()
    full = [image["full"] for image in json.loads(text.partition("images = ")[2].rstrip(";\n"))]
    assert len(full) == 2 and all((folder / "out" / path).exists() for path in full)


def pyramid(folder):
    (folder / "images").mkdir()
    small = Image.new("RGB", (64, 48))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    Image.new("RGB", (128, 96)).save(
        folder / "images/a.tif", save_all=True, append_images=[small], tiffinfo={}
    )


def numbered(ending):
    return [f"a.{ending}/{i:06d}.jpg" for i in range(3)]


def by_content(folder):
    """Videos and an image whose endings say little, and texts."""
    import av

    picture(folder / "images/p0.jpg")
    os.link(folder / "images/p0.jpg", folder / "images/without")
    for name, codec in ("a.ts", "mpeg2video"), ("b.wmv", "wmv2"):
        with av.open(str(folder / "images" / name), "w") as video:
            stream = video.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
            image = Image.open(folder / "images/p0.jpg")
            video.mux(stream.encode(av.VideoFrame.from_image(image)))
            video.mux(stream.encode())
    for name in "notes.nfo", "README", "labels.yaml", "data.json", "index.dat":
        (folder / "images" / name).write_text("hello world\n" * 20)


def photos_of_phones(folder):
    (folder / "images").mkdir()
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    for name in "a.heic", "b.jpg":
        (folder / "images" / name).write_bytes(head + bytes(99))
    picture(folder / "images/raw.tif")
    (folder / "images/raw.tif").rename(folder / "images/c.nef")
    (folder / "images/d.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid 0\n")
    picture(folder / "images/e.jpg")
    os.mkfifo(folder / "images/f.jpg")


CONTENT = [
    Row(
        "pages and frames",
        pages,
        PLAIN,
        (),
        check=names_are(
            *numbered("gif"), *numbered("png"), *numbered("tif"), *numbered("webp"), "b.jpg",
            "c.tif",
        ),
    ),
    Row(
        "pages and frames, one of 2",
        pages,
        f"{PLAIN} --every 2 --contact-sheet",
        (),
        check=names_are(
            *numbered("gif")[::2], *numbered("png")[::2], *numbered("tif"), *numbered("webp")[::2],
            "b.jpg", "c.tif",
        ),
    ),
    Row(
        "pages and frames by ids",
        pages_with_ids,
        PROPOSE,
        (),
        check=names_are("a.gif/000000.jpg", "a.tif/000002.jpg"),
    ),
    Row("pages and frames, visualize", pages_with_ids, VISUALIZE, ("2 pictures",)),
    Row(
        "pages of unknown size on a page",
        pages_of_unknown_size,
        f"{VISUALIZE} --html",
        ("2 pictures",),
        check=images_are_there,
    ),
    Row(
        "pages of unknown size, compare",
        pages_of_unknown_size,
        "compare ann.json d.json --images images --seen mug --output out",
        ("Open out/index.html",),
        check=images_are_there,
    ),
    Row("reduced copies", pyramid, PLAIN, (), check=names_are("a.tif")),
    Row(
        "endings that say little",
        by_content,
        PLAIN,
        (),
        check=names_are("a.ts/000000.jpg", "b.wmv/000000.jpg", "p0.jpg", "without"),
    ),
    Row(
        "photos that need more",
        photos_of_phones,
        PLAIN,
        ("a.heic: is HEIC", "b.jpg: is HEIC", "pillow-heif", "c.nef: is a camera's raw",
         "d.jpg: is Git LFS", "f.jpg: is a folder, a pipe", "Proposals for 1 image"),
    ),
]  # fmt: skip


def links(folder):
    picture(folder / "images/p0.jpg")
    picture(folder / "images/z/p1.jpg", seed=1)
    for name in "a", "b", "z/c":
        (folder / "images" / name).symlink_to(folder / "images")
    (folder / "images/0").symlink_to("z")


def long_names(folder):
    for i, name in enumerate(("n" * 250 + "0.png", "n" * 250 + "1.png", "é" * 125 + ".jpg")):
        picture(folder / "images" / name, seed=i)
    annotate(folder, [path.name for path in sorted((folder / "images").iterdir())])


def shortened(where, number):
    def check(folder):
        lines = (folder / where / "shortened.txt").read_text().splitlines()
        assert len(lines) == number
        assert all((folder / where / line.split("\t")[0]).exists() for line in lines)
        assert len(list((folder / where).glob("*.jpg"))) == 3

    return check


def listed(text):
    def make(folder):
        for i in range(3):
            picture(folder / f"images/p{i}.jpg", seed=i)
        (folder / "images/list.txt").write_text(text, encoding="utf-8-sig")

    return make


LIST = "propose images/list.txt --weights {weights} --output out"
INPUTS = [
    Row("links to the folder itself", links, PLAIN, (), check=names_are("p0.jpg", "z/p1.jpg")),
    Row("long names", long_names, f"{PLAIN} --draw", (), check=shortened("out/pictures", 2)),
    Row("list, from here", listed("images/p2.jpg\n\nimages/p0.jpg\n"), LIST, (),
        check=names_are("p2.jpg", "p0.jpg")),
    Row("list, from its folder", listed("p2.jpg\r\n./p1.jpg"), LIST, (),
        check=names_are("p2.jpg", "p1.jpg")),
    Row("list of a glob, from its folder", listed("p[02].jpg"), LIST, (),
        check=names_are("p0.jpg", "p2.jpg")),
    Row("list that names itself", listed("p2.jpg\n../images/list.txt"), LIST,
        ("images/../images/list.txt: is a list that names itself",), code=2),
    Row("list with @", listed("p2.jpg"), LIST.replace("images", "@images"), (),
        check=names_are("p2.jpg")),
    Row("list of what is not there", listed("p1.jpg\np7.jpg\np8.jpg"), LIST,
        ("2 of 3", "p7.jpg, p8.jpg"), code=2),
    Row("text", listed("Hello\nworld"), LIST, ("read as a list of paths",), code=2),
    *(
        Row(name, listed(""), f"propose {name} --weights {{weights}} --output out", (says,), code=2)
        for name, says in (
            ("https://example.com/a.jpg", "addresses are not read"),
            ("rtsp://camera/1", "addresses are not read"),
            ("0", "cameras, pipes and devices are not read"),
            ("/dev/null", "cameras, pipes and devices are not read"),
            ("-", "standard input is not read"),
        )
    ),
]  # fmt: skip
ROWS = FOUND + SIZES + METADATA + CONTENT + INPUTS
