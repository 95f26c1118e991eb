"""
Proposals on each image by a model that has not learnt from it: trained on the other images of the
same data set.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from oln_d2 import weights
from oln_d2.checks import InputError, needs
from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_image
from oln_d2.data.lookup import find_images
from oln_d2.files import StrPath, file_digest, make_folder, read_json, write_file
from oln_d2.loading import load
from oln_d2.model_zoo import get_config_file
from oln_d2.propose import propose_files

RECIPE = "standalone/cross_fit.yaml"
# A hash has 64 bits, whether a pixel is brighter than its left neighbour. Images are near
# duplicates if at most `NEAR` bits differ: then at least one of its 8 bytes is the same in both.
HASH = 9, 8  # pixels
NEAR = 7


def cross_fit(
    gt: StrPath,
    images: StrPath,
    output: StrPath,
    parts: int,
    recipe: Mapping[str, Any],
    *,
    device: str = "auto",
    top_k: int = 100,
    batch_size: int = 4,
    seed: int = 0,
) -> tuple[str, list[str]]:
    """
    Divide the images into parts, and for each part train on the others and propose on it. The same
    call goes on where it was stopped.

    Args:
        gt, images: annotations in COCO's format, and the folder of their images.
        output: a folder; `parts.json` says which images are in which part, `part_1/` and so on hold
            each model and what it proposes.
        parts: 2 or more. Images of one folder, where there are as many folders, and near duplicates
            share a part.
        recipe: arguments of :func:`oln_d2.standalone.train`, and the model's under "model"; empty:
            those of `RECIPE`. If it names no weights to start from, those of this package.
        device: see :func:`oln_d2.load`.
        top_k, batch_size: see :func:`propose_files`.
        seed: of the parts and the trainings.

    Returns:
        what differs where the proposals may, and the results files of the parts.

    Raises:
        InputError: files or arguments that cannot be used, too few images, or a folder of another
            data set, recipe or seed.
        ImportError: the extra `train` or `timm` is not installed.
    """
    with needs("cross-fit", "train"):
        import yaml

        from oln_d2.standalone import train

    if not recipe:
        recipe = yaml.safe_load(Path(get_config_file(RECIPE)).read_text(encoding="utf-8"))
    content = load_coco(gt)
    make_folder(output)
    key = json.dumps([file_digest(gt), parts, dict(recipe), seed], sort_keys=True, default=str)
    digest = hashlib.sha256(key.encode()).hexdigest()
    path = os.path.join(output, "parts.json")
    of_image = _parts(content, images, gt, parts, seed, path, digest)
    recipe = dict(recipe)
    if model := recipe.pop("model", None):
        recipe["config"] = model
    used = {annotation["category_id"] for annotation in content["annotations"]}
    names = [c["name"] for c in content["categories"] if c["id"] in used]
    if not recipe.keys() & {"weights", "weights_backbone"}:
        recipe = {**recipe, "weights": weights.find(".safetensors")}
    results = []
    for part in range(1, parts + 1):
        folder = os.path.join(output, f"part_{part}")
        make_folder(folder)
        files = {}
        for name, inside in (("train", False), ("held_out", True)):
            files[name] = os.path.join(folder, f"{name}.json")
            write_file(files[name], json.dumps(_only(content, of_image, part, inside)))
        model = os.path.join(folder, "model")
        final = os.path.join(model, "model_final.pth")
        if not os.path.exists(final):
            print(f"Part {part} of {parts}: training on the others")
            where = None if device == "auto" else device
            arguments = {"device": where, "seed": seed, **recipe}
            train(files["train"], images, names, model, resume=True, **arguments)
        proposals = os.path.join(folder, "proposals")
        proposer = load(final, device=device)
        propose_files(
            proposer,
            [os.fspath(images)],
            proposals,
            gt=files["held_out"],
            top_k=top_k,
            batch_size=batch_size,
        )
        results.append(os.path.join(proposals, "results.json"))
    return f"cross-fit {digest}", results


def _only(content, of_image, part, inside):
    """The images of a part, or of all others, with their annotations."""
    chosen = {image for image, own in of_image.items() if (own == part) == inside}
    return {
        "images": [image for image in content["images"] if image["id"] in chosen],
        "annotations": [a for a in content["annotations"] if a["image_id"] in chosen],
        "categories": content["categories"],
    }


def _parts(content, images, gt, parts, seed, path, digest):
    """The part, from 1, of each image by its id; read from `path` where an earlier run wrote it."""
    ids = [image["id"] for image in content["images"]]
    if len(ids) < 2 * parts:
        raise InputError(f"{gt}: {len(ids)} images are too few for {parts} parts; take fewer parts")
    if os.path.exists(path):
        known = read_json(path, dict)
        if known.get("digest") == digest:
            return {int(image): part for image, part in known["parts"].items()}
        raise InputError(
            f"{path}: is of other annotations, another recipe, seed or number of parts; choose "
            "another --output"
        )
    where = find_images(images, content["images"], gt)
    groups = group_images([where[image] for image in ids], parts)
    sizes = np.bincount(groups)
    order = np.random.default_rng(seed).permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]  # the largest first
    filled, chosen = np.zeros(parts, int), {}
    for group in order.tolist():
        chosen[group] = int(filled.argmin())
        filled[chosen[group]] += sizes[group]
    if filled.min() == 0:
        raise InputError(
            f"{gt}: the images belong together in {len(sizes)} groups (folders and near "
            f"duplicates), too few for {parts} parts; take fewer parts"
        )
    print(f"Parts of {', '.join(map(str, sorted(filled.tolist())))} images")
    of_image = {image: chosen[group] + 1 for image, group in zip(ids, groups.tolist())}
    write_file(path, json.dumps({"digest": digest, "parts": of_image}))
    return of_image


def group_images(paths: Sequence[StrPath], parts: int) -> NDArray[np.int64]:
    """
    Args:
        paths: N images.
        parts: that the groups are for.

    Returns:
        (N,), the number of the group of each, from 0: those of one folder, if there are at least
        `parts` folders; and near duplicates.

    Raises:
        InputError: an image cannot be read.
    """
    parent = list(range(len(paths)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(members):
        for i in members[1:]:
            parent[root(i)] = root(members[0])

    folders: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        folders.setdefault(os.path.dirname(path), []).append(i)
    if len(folders) >= parts:
        for members in folders.values():
            join(members)
    hashes = np.array([difference_hash(path) for path in tqdm(paths, "hashing", disable=None)])
    for byte in range(hashes.shape[1]):
        order = np.argsort(hashes[:, byte], kind="stable")
        for same in np.split(order, np.flatnonzero(np.diff(hashes[order, byte])) + 1):
            for place, i in enumerate(same[:-1].tolist()):
                rest = same[place + 1 :]
                bits = np.unpackbits(hashes[rest] ^ hashes[i], axis=1).sum(axis=1)
                join([i, *rest[bits <= NEAR].tolist()])
    roots = [root(i) for i in range(len(paths))]
    return np.unique(roots, return_inverse=True)[1]


def difference_hash(path: StrPath) -> NDArray[np.uint8]:
    """Shape (8,): bytes that differ little between images that look the same."""
    path = Path(path)
    image = open_image(path if path.is_file() else path.parent)
    small = np.asarray(image.convert("L").resize(HASH, Image.Resampling.BILINEAR), np.int16)
    return np.packbits((small[:, 1:] > small[:, :-1]).ravel())
