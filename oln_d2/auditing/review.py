"""Audits a data set: proposes on its images, and writes what its annotations may lack."""

import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils

from oln_d2 import weights
from oln_d2.auditing.candidates import COPIES, INSIDE, IOU, Candidates, find_candidates
from oln_d2.auditing.cross_fit import cross_fit as propose_crosswise
from oln_d2.auditing.decisions import (
    add_accepted,
    add_candidates,
    learn_ranks,
    read_decisions,
)
from oln_d2.auditing.estimate import (
    Found,
    estimate,
    estimate_trained,
    hide_from_training,
    judged_sentence,
    sentences,
)
from oln_d2.checks import FRACTION, POSITIVE_INT, SEED, InputError, Limit, check_limits, one_of
from oln_d2.data.coco import check_coco, load_coco
from oln_d2.data.images import open_annotated
from oln_d2.data.lookup import find_images, image_name, image_size, plural, some
from oln_d2.evaluation.coco_results import join_detections, read_results
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.files import (
    StrPath,
    check_folder,
    check_links,
    check_output,
    file_digest,
    make_folder,
    read_json,
    write_file,
)
from oln_d2.loading import load
from oln_d2.pages.page import full_size, templates
from oln_d2.propose import Proposer, propose_files
from oln_d2.propose.inputs import find_sources
from oln_d2.propose.writers import cvat_content, labelstudio_task

FILES = "audit_files"
SETTINGS = {"iou", "copies", "inside"}  # of `find_candidates`
NUMBER = 1000  # candidates that are listed
EXPORTS = "labelstudio", "cvat"


class Audit(NamedTuple):
    """What :func:`audit` found and wrote."""

    candidates: Candidates  # those that are listed
    total: int  # how many there are
    listed: str  # `candidates.json`
    page: str
    merged: str | None  # the annotations with what was accepted
    added: int  # how many annotations that are
    pseudo: str | None  # the annotations with what was accepted without a review
    learnt: bool  # whether decisions rank the rest
    estimate: dict[str, Found]  # how much of what is missing the list contains
    summary: str  # the same in words, and what decisions say about the rest
    failures: list[str]  # why an image was left out, a sentence each

    def __repr__(self) -> str:
        number = len(self.candidates.scores)
        text = f"{self.total} candidates, the first {number} of them in {self.listed}"
        return f"<Audit: {text}. {self.summary}".rstrip(". ") + ">"


def audit(
    gt: StrPath,
    images: StrPath | None = None,
    output: StrPath = "output/audit",
    *,
    proposer: Proposer | None = None,
    cross_fit: int | None = None,
    recipe: Mapping[str, Any] | None = None,
    device: str = "auto",
    merge: Sequence[StrPath] = (),
    accept_above: float | None = None,
    accept_top: int | None = None,
    export: str | None = None,
    number: int = NUMBER,
    top_k: int = 100,
    iou: float | None = None,
    copies: float | None = None,
    inside: float | None = None,
    hide: bool = False,
    seed: int = 0,
    batch_size: int = 4,
) -> Audit:
    """
    Find objects that the annotations of a data set lack: proposals that no annotation explains,
    ranked, on a page to review them in a browser.

    Args:
        gt: annotations in COCO's format; never changed.
        images: the folder of the images; with `merge`, by default that of the audit before.
        output: a folder. It gets `candidates.json`, the page `index.html`, and in `proposals/` what
            was proposed: the same call goes on there.
        proposer: of :func:`oln_d2.load`; by default the model of this package.
        cross_fit: parts, 2 or more: instead of that, models trained on all other parts propose on
            each, see :func:`oln_d2.auditing.cross_fit.cross_fit`.
        recipe: how they are trained; by default as `configs/standalone/cross_fit.yaml` says.
        device: of the model, and of training, see :func:`oln_d2.load`.
        merge: files of decisions that the page saved. The audit in `output` goes on with what it
            proposed: what was accepted is added to a copy of the annotations, `merged.json`; what
            was decided is not listed again; and if that is enough, at least 10 accepted and 10
            rejected, it ranks the rest.
        accept_above, accept_top: also write `pseudo.json`, the annotations with all candidates of
            at least this score, in [0, 1], and at most so many of an image, without a review.
        export: "labelstudio" or "cvat": also write `labelstudio.json` or `cvat.json`, the images
            with listed candidates, with these, as `object` and with their scores, and with their
            annotations, for a team that reviews there.
        number: how many candidates are listed, the first ones.
        top_k: proposals of an image.
        iou, copies, inside: see :func:`oln_d2.auditing.candidates.find_candidates`; by default its
            own or, with `merge`, those of the audit before.
        hide: also estimate how much of what is missing the list contains, see
            :func:`oln_d2.auditing.estimate.estimate`; written to `estimate.json`. With `cross_fit`
            it trains as many models again, without what is hidden.
        seed: of what is hidden, and of `cross_fit`.
        batch_size: images at once.

    Raises:
        InputError: files or arguments that cannot be used, before any work is lost.
    """
    several = Limit(lambda n: n >= 2, "2 or more")
    check_limits(
        cross_fit=(cross_fit, several),
        accept_above=(accept_above, FRACTION),
        accept_top=(accept_top, POSITIVE_INT),
        export=(export, one_of(*EXPORTS)),
        number=(number, POSITIVE_INT),
        top_k=(top_k, POSITIVE_INT),
        iou=(iou, FRACTION),
        copies=(copies, FRACTION),
        inside=(inside, FRACTION),
        seed=(seed, SEED),
        batch_size=(batch_size, POSITIVE_INT),
    )
    if proposer is not None and cross_fit is not None:
        raise InputError("a model and cross_fit exclude each other; give one")
    output = os.fspath(output)
    listed = os.path.join(output, "candidates.json")
    original = load_coco(gt)
    decisions = read_decisions(merge, original)
    before: dict[str, Any] = {}
    if merge:
        if not os.path.isfile(listed):
            raise InputError(
                f"{listed}: no such file; audit first, without merge, or give --output"
            )
        if proposer is not None or cross_fit is not None:
            raise InputError(
                "with merge, the proposals are those of the audit before; give no model and no "
                "cross_fit"
            )
        before = _read_list(listed)
        if _differ(gt, before.get("gt", "")):
            raise InputError(
                f"{listed}: is of an audit of {before['gt']}; give that file, or the folder of the "
                f"audit of {gt} (--output)"
            )
    images = images or before.get("images")
    if images is None:
        raise InputError(f"{gt}: the folder of its images is not given; name it (--images)")
    settings = {"iou": IOU, "copies": COPIES, "inside": INSIDE, **before.get("settings", {})}
    given = {"iou": iou, "copies": copies, "inside": inside}
    settings.update({name: value for name, value in given.items() if value is not None})
    if not merge:
        find_sources([os.fspath(images)])  # that there are any; before anything is written
    check_folder(output, "audit")
    make_folder(output)
    check_links(output)
    for name in ("candidates", "merged", "pseudo", "estimate", "less", *EXPORTS):
        check_output(os.path.join(output, f"{name}.json"), [gt, *merge])
    failures: list[str] = []
    results_less: list[str] = []  # of models that what is hidden was hidden from
    if merge:
        results, identity = before["results"], before["model"]
    elif cross_fit:
        crosswise = partial(
            propose_crosswise,
            images=images,
            parts=cross_fit,
            recipe=recipe or {},
            device=device,
            top_k=top_k,
            batch_size=batch_size,
            seed=seed,
        )
        identity, results = crosswise(gt, output=os.path.join(output, "cross_fit"))
        if hide and (hidden := hide_from_training(original, seed)):
            less = os.path.join(output, "less.json")
            kept = next(iter(hidden.values())).kept
            write_file(less, json.dumps({**original, "annotations": kept}))
            print("The same without what is hidden, for the estimate")
            _, results_less = crosswise(less, output=os.path.join(output, "cross_fit_less"))
    else:
        proposer = proposer or load(device=device)
        folder = os.path.join(output, "proposals")
        done = propose_files(
            proposer, [os.fspath(images)], folder, gt=gt, top_k=top_k, batch_size=batch_size
        )
        results, identity = [os.path.join(folder, "results.json")], proposer.identity
        failures += done.failures
        if done.absent:
            failures.append(
                f"{plural(len(done.absent), 'image')} not in {images}: {some(done.absent)}"
            )
    ground_truth = GroundTruth(original, [], gt)
    detections = join_detections([read_results(file, ground_truth) for file in results])

    content, merged = original, None
    if decisions:
        content = check_coco(gt, add_accepted(original, decisions))
        merged = os.path.join(output, "merged.json")
        write_file(merged, json.dumps(content))
    found = find_candidates(detections, _by_image(content), **settings)
    learnt, accepted = False, np.zeros(0, bool)
    if decisions:
        found, learnt, accepted = _apply(
            found, decisions, detections, _by_image(original), settings
        )
    measured: dict[str, Found] = {}
    if hide and results_less:
        without = join_detections([read_results(file, ground_truth) for file in results_less])
        measured = estimate_trained(without, original, settings, seed)
    elif hide:
        measured = estimate(detections, original, settings, seed)
    note = _note(original, identity, bool(results_less), recipe) if measured else ""
    summary = sentences(measured, note)
    if len(accepted):
        summary = f"{judged_sentence(accepted)} {summary}".strip()
    if not original["annotations"]:
        nothing = f"Nothing is annotated in {gt}, so all that is found is a candidate."
        summary = f"{nothing} {summary}".strip()
    if hide:
        parts = {name: one._asdict() for name, one in measured.items()}
        write_file(os.path.join(output, "estimate.json"), json.dumps(parts, indent=1))
    pseudo = None
    if accept_above is not None or accept_top is not None:
        pseudo = os.path.join(output, "pseudo.json")
        chosen = _best(found, accept_above or 0.0, accept_top or len(found.scores))
        write_file(pseudo, json.dumps(add_candidates(content, chosen)))
    total = len(found.scores)
    found = found.select(slice(number))
    # Decisions that a browser holds are about these annotations and proposals.
    key = json.dumps([os.path.realpath(gt), identity, original["categories"]])
    about = {
        "id": hashlib.sha256(key.encode()).hexdigest()[:12],
        "summary": summary,
        "categories": _by_frequency(original),
    }
    written = _write_page(output, found, content, images, gt, about, failures)
    found = found.select(written)
    about = {
        "gt": os.fspath(gt),
        "images": os.path.abspath(images),
        "model": identity,
        "results": [os.path.abspath(file) for file in results],
        "settings": settings,
        "total": total,
    }
    _write_list(listed, found, content, about)
    if export is not None:
        _export(output, export, content, found, identity)
    added = len(content["annotations"]) - len(original["annotations"])
    page = os.path.join(output, "index.html")
    return Audit(
        found, total, listed, page, merged, added, pseudo, learnt, measured, summary, failures
    )


def _differ(gt, before):
    """Whether annotations are others than those before, as far as these are still there."""
    return os.path.isfile(before) and file_digest(before) != file_digest(gt)


def _by_image(content):
    annotations: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        annotations.setdefault(annotation["image_id"], []).append(annotation)
    return annotations


def _by_frequency(content):
    numbers = Counter(a["category_id"] for a in content["annotations"])
    order = sorted(content["categories"], key=lambda c: (-numbers[c["id"]], c["id"]))
    return [{"id": c["id"], "name": c["name"]} for c in order]


def _best(found, score, number):
    """Those of at least a score, and at most so many of an image."""
    seen: Counter[int] = Counter()
    index = []
    for i, image in enumerate(found.image_ids.tolist()):
        if found.scores[i] >= score and seen[image] < number:
            seen[image] += 1
            index.append(i)
    return found.select(index)


def _note(content, identity, hidden_from_training, recipe):
    """Where the model was trained on what is hidden."""
    if identity.startswith("cross-fit"):
        if not hidden_from_training:  # of an audit before, whose models are there
            return (
                "That is too much for categories that nobody annotated: the models were trained on "
                "these categories in other images."
            )
        if recipe and recipe.keys() & {"weights", "weights_backbone"}:
            return ""
    elif identity not in weights.card()["sha256"].values():
        return ""
    known = set(weights.card()["trained"]["categories"])
    names = {category["name"] for category in content["categories"]} & known
    if not names:
        return ""
    return (
        f"That is too much for other categories: the model of this package was trained on "
        f"{len(names)} of these {len(content['categories'])}, such as {min(names)}."
    )


def _apply(found, decisions, detections, annotations, settings):
    """
    The candidates that are left, ranked by what was decided on others, and whether they are; and
    these decisions, (J,), whether they accept, in the order of the list. `annotations`: without
    what was accepted, as they were when it was judged.
    """
    decided: dict[int, list[tuple[float, ...]]] = {}
    for decision in decisions:
        if decision.what != "skip":
            decided.setdefault(decision.image_id, []).append(decision.proposed)
    keep = np.ones(len(found.scores), bool)
    for i, image in enumerate(found.image_ids.tolist()):
        if own := decided.get(image):
            overlap = mask_utils.iou(found.boxes[i : i + 1], np.array(own), [0] * len(own))
            keep[i] = overlap.max() <= settings["copies"]
    found = found.select(keep)
    theirs = np.isin(detections.image_ids, list(decided))
    judged = find_candidates(detections.select(np.flatnonzero(theirs)), annotations, **settings)
    place = {key: i for i, key in enumerate(_ids(judged))}
    judging = [d for d in decisions if d.what != "skip" and d.id in place]
    judging.sort(key=lambda d: place[d.id])
    accepted = np.array([d.what == "accept" for d in judging], bool)
    likely = learn_ranks(found, judged.select([place[d.id] for d in judging]), accepted)
    if likely is None:
        return found, False, accepted
    found = found._replace(ranks=likely)
    return found.select(np.argsort(-likely, kind="stable")), True, accepted


def _ids(candidates):
    """A name for each, the same for the same proposal wherever it ranks."""
    return [
        f"{image}:" + ",".join(f"{value:.1f}" for value in box)
        for image, box in zip(candidates.image_ids.tolist(), candidates.boxes.tolist())
    ]


def _read_list(path):
    """What :func:`_write_list` wrote about an audit."""
    before = read_json(path, dict)
    try:
        files, settings = before["results"], before["settings"]
        texts = [before.get("gt", ""), before["images"], before["model"], *files]
        check_limits(**{name: (settings.get(name), FRACTION) for name in SETTINGS})
        fits = files and all(isinstance(text, str) for text in texts) and set(settings) <= SETTINGS
    except (AttributeError, LookupError, TypeError, InputError):
        fits = False
    if not fits:
        raise InputError(f"{path}: is not as an audit wrote it; audit again, without merge")
    return before


def _write_list(path, found, content, about):
    names = {image["id"]: image.get("file_name") for image in content["images"]}
    rows = zip(_ids(found), *(values.tolist() for values in found))
    listed = [
        {
            "id": key,
            "image_id": image,
            "file_name": names[image],
            "bbox": [round(value, 2) for value in box],
            "score": round(score, 5),
            "rank": round(rank, 5),
            "inside": round(inside, 3),
            "around": round(around, 3),
        }
        for key, image, box, score, rank, inside, around in rows
    ]
    write_file(path, json.dumps({**about, "candidates": listed}))


def _export(output, tool, content, found, model):
    """The images with candidates for another tool, see :func:`audit`."""
    with_found = add_candidates(content, found)
    of_image = _by_image(with_found)
    wanted = set(found.image_ids.tolist())
    images = [image for image in content["images"] if image["id"] in wanted]
    names = {category["id"]: category["name"] for category in with_found["categories"]}
    if tool == "cvat":
        annotations = [a for image in images for a in of_image[image["id"]]]
        made: Any = cvat_content(images, annotations, with_found["categories"])
    else:
        made = []
        for image in images:
            rows = [
                (names[a["category_id"]], a["bbox"], a.get("score")) for a in of_image[image["id"]]
            ]
            score = max(s for _, _, s in rows if s is not None)
            made.append(labelstudio_task(image, rows, model, score))
    write_file(os.path.join(output, f"{tool}.json"), json.dumps(made))


def _write_page(output, found, content, images, gt, about, failures):
    """Write the page; return the indices of the candidates whose images can be shown."""
    folder = os.path.join(output, FILES)
    make_folder(folder)
    entries = {image["id"]: image for image in content["images"]}
    wanted = [entries[i] for i in dict.fromkeys(found.image_ids.tolist())]
    where = find_images(images, wanted, gt, all_of_them=False)
    names = {category["id"]: category["name"] for category in content["categories"]}
    annotations: dict[int, list[list[Any]]] = {entry["id"]: [] for entry in wanted}
    for a in content["annotations"]:
        if a["image_id"] in annotations:
            annotations[a["image_id"]].append([*a["bbox"], names[a["category_id"]]])
    shown: dict[int, int] = {}
    pictures = []
    for entry in wanted:
        try:
            if entry["id"] not in where:
                raise InputError(f"{image_name(entry)}: is not among the images in {images}")
            path = where[entry["id"]]
            image, as_stored = open_annotated(path, image_size(entry), gt)
            stem = f"{FILES}/{len(pictures) + 1:06d}"
            file = full_size(image, None if as_stored else path, stem, output)
        except InputError as error:
            failures.append(str(error))
            continue
        shown[entry["id"]] = len(pictures)
        pictures.append(
            {
                "id": entry["id"],
                "name": os.path.relpath(path, images),
                "file": file,
                "width": image.width,
                "height": image.height,
                "annotations": annotations[entry["id"]],
            }
        )
    index = [i for i, image in enumerate(found.image_ids.tolist()) if image in shown]
    found = found.select(index)
    data = {
        **about,
        "images": pictures,
        "candidates": [
            {
                "id": key,
                "image": shown[image],
                "bbox": [round(value, 2) for value in box],
                "score": round(score, 4),
                "inside": round(inside, 3),
            }
            for key, image, box, score, _, inside, _ in zip(
                _ids(found), *(values.tolist() for values in found)
            )
        ],
    }
    write_file(os.path.join(folder, "data.js"), f"const audit = {json.dumps(data)};\n")
    html, script = (
        Path(__file__).with_name(f"review.{ending}").read_text(encoding="utf-8")
        for ending in ("html", "js")
    )
    write_file(os.path.join(folder, "review.js"), script)
    command = ["oln-d2", "audit", gt, "--merge", "decisions.json", "--output", output]
    page = templates().from_string(html).render(command=shlex.join(map(str, command)))
    write_file(os.path.join(output, "index.html"), page)
    return index
