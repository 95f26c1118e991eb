"""`oln-d2 audit`: what annotations lack, reviewed and added."""

import copy
import json
import random
import shutil

import numpy as np
import pytest
from conftest import NEEDS_DETECTRON2, ROOT
from PIL import Image
from test_page import browser  # noqa: F401

import oln_d2
from oln_d2 import weights
from oln_d2.auditing import candidates, review
from oln_d2.auditing.candidates import Candidates, find_candidates
from oln_d2.auditing.cross_fit import group_images
from oln_d2.auditing.decisions import add_accepted, learn_ranks, read_decisions
from oln_d2.auditing.estimate import estimate, hide_from_training, places, sentences
from oln_d2.checks import InputError
from oln_d2.cli import main
from oln_d2.data.coco import check_coco
from oln_d2.evaluation.coco_results import convert_entries
from oln_d2.evaluation.ground_truth import GroundTruth

PHOTOS, GT = ROOT / "examples/photos", ROOT / "examples/photos.json"


def annotation(i, image, box, category=1, **more):
    area = box[2] * box[3]
    entry = {"id": i, "image_id": image, "category_id": category, "bbox": list(box), "area": area}
    return {**entry, "iscrowd": 0, **more}


def content_of(annotations, images=2, categories=("cat", "dog", "cup", "hat")):
    return check_coco(
        "gt.json",
        {
            "images": [
                {"id": i, "file_name": f"{i}.jpg", "width": 400, "height": 300}
                for i in range(1, images + 1)
            ],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
        },
    )


def detections_of(rows, content):
    """Of rows (image, box, score)."""
    entries = [{"image_id": i, "bbox": list(box), "score": score} for i, box, score in rows]
    return convert_entries(entries, GroundTruth(content, [], "gt.json"))


def find(rows, annotations, **options):
    content = content_of(annotations)
    by_image = {}
    for entry in content["annotations"]:
        by_image.setdefault(entry["image_id"], []).append(entry)
    return find_candidates(detections_of(rows, content), by_image, **options)


def test_what_annotations_explain():
    """Overlap explains; lying inside does not, it lowers the rank at most; a crowd explains all."""
    annotations = [
        annotation(1, 1, (0, 0, 200, 200)),
        annotation(2, 2, (0, 0, 200, 200), iscrowd=1),
    ]
    rows = [
        (1, (0, 0, 190, 200), 0.9),  # the object
        (1, (10, 10, 40, 40), 0.8),  # what it holds, or a part of it
        (1, (250, 100, 50, 50), 0.7),  # beside it
        (2, (10, 10, 40, 40), 0.9),  # in a crowd
        (2, (300, 200, 50, 50), 0.5),
    ]
    found = find(rows, annotations, inside=0.0)
    assert found.boxes[:, 0].tolist() == [10, 250, 300]
    assert found.inside.tolist() == [1, 0, 0]
    found = find(rows, annotations, inside=0.3)
    assert found.boxes[:, 0].tolist() == [250, 10, 300]
    np.testing.assert_allclose(found.ranks, [0.7, 0.8 * 0.7, 0.5])
    np.testing.assert_allclose(found.scores, [0.7, 0.8, 0.5])
    assert find(rows, annotations, iou=0.99).boxes[:, 2].max() == 190
    whole = find([(1, (0, 0, 400, 300), 0.9)], annotations)  # a group of things
    assert whole.around.tolist() == [1] and whole.inside.tolist() == [pytest.approx(1 / 3)]


def test_copies_count_once():
    rows = [(1, (10, 10, 50, 50), 0.5), (1, (12, 10, 50, 50), 0.6), (2, (10, 10, 50, 50), 0.4)]
    found = find(rows, [])
    assert found.boxes[:, 0].tolist() == [12, 10] and found.image_ids.tolist() == [1, 2]
    assert len(find(rows, [], copies=0.99).scores) == 3


def test_order_of_the_files_does_not_matter():
    """Also where scores are equal."""
    rng = np.random.default_rng(0)
    boxes = rng.uniform(5, 150, (60, 4)).round(1).tolist()
    rows = [(1 + i % 2, box, [0.5, 0.7][i % 3 == 0]) for i, box in enumerate(boxes)]
    annotations = [annotation(i, 1 + i % 2, box) for i, box in enumerate(boxes[:20])]
    expected = find(rows, annotations)
    assert 5 < len(expected.scores) < 60
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        random.Random(seed + 9).shuffle(annotations)
        for one, other in zip(expected, find(rows, annotations)):
            np.testing.assert_array_equal(one, other)


def test_nothing_to_find():
    assert len(find([], []).scores) == 0
    assert len(find([(1, (0, 0, 50, 50), 0.5)], [annotation(1, 1, (0, 0, 50, 50))]).scores) == 0


def test_estimate():
    """
    A detector that finds all cups and hats, and half of the rest: what is hidden must be found, and
    not be explained by itself, whatever the order of the files.
    """
    rng = np.random.default_rng(0)
    annotations, rows = [], []
    for image in range(1, 51):
        for category in range(1, 5):
            box = (80 * category - 70, float(rng.integers(10, 200)), 50, 50)
            annotations.append(annotation(len(annotations) + 1, image, box, category))
            if category > 2 or image % 2:
                rows.append((image, box, float(rng.uniform(0.5, 1))))
            rows.append((image, (box[0] + 5, 255, 40, 40), float(rng.uniform(0, 0.4))))
    content = content_of(annotations, 50)
    options = {"iou": 0.5, "copies": 0.5, "inside": 0.15}
    found = estimate(detections_of(rows, content), content, options)
    kinds = found["categories"]
    assert kinds.hidden == 200 and kinds.depths == [100, 200]
    assert kinds.by_category["hat"] == [1, 1] and kinds.by_category["cat"][1] == 0.5
    assert kinds.recall[1] == 0.75 and kinds.low[1] < 0.75 < kinds.high[1]
    assert kinds.precision[1] == 75 / 200  # of 100 hidden in each half, in two lists of 200
    assert kinds.by_size == {"all": kinds.recall, "medium": kinds.recall}
    assert 0.6 < found["at random"].recall[0] < 0.9 and 30 < found["at random"].hidden < 90
    text = sentences(found, "Note.")
    assert "Among the first 200 candidates we expect 75 % of the objects of categories" in text
    assert "At least 38 % of those first are such." in text and text.endswith("Note.")
    # All from 0.5 on are hidden objects; what is below 0.4 is none.
    assert kinds.by_score["0.5"] == [75, 1.0] and 0 < kinds.by_score["0.2"][1] < 1
    random.Random(1).shuffle(rows)
    shuffled = {**content, "annotations": random.Random(2).sample(annotations, len(annotations))}
    content = check_coco("gt.json", shuffled)
    assert estimate(detections_of(rows, content), content, options) == found
    one = content_of([a for a in annotations if a["category_id"] == 1], 50)
    assert list(estimate(detections_of(rows, one), one, options)) == ["at random"]
    assert estimate(detections_of(rows, content_of([], 50)), content_of([], 50), options) == {}


def test_a_candidate_shows_one_object():
    boxes = np.array([[0, 0, 100, 100], [0, 0, 100, 90.0]])
    zeros = np.zeros(2)
    found = Candidates(np.array([1, 1]), boxes, zeros, zeros, zeros, zeros)
    objects = [annotation(1, 1, (0, 0, 100, 95)), annotation(2, 1, (0, 0, 100, 80))]
    assert places(found, objects).tolist() == [0, 1]
    assert places(found.select([0]), objects).tolist() == [0, np.inf]
    assert places(found, [annotation(1, 2, (0, 0, 100, 95))]).tolist() == [np.inf]


def decision(key, what, box=(10, 10, 40, 40), image=1, category=None):
    entry = {"id": key, "image_id": image, "what": what, "category_id": category}
    return {**entry, "bbox": list(box), "proposed": list(box)}


def saved(path, *decisions):
    path.write_text(json.dumps({"audit": "0", "decisions": list(decisions)}))
    return path


def test_accepted_boxes_become_annotations(tmp_path):
    """Nothing that was there changes; a second merge of the same file adds nothing."""
    content = content_of([annotation(7, 1, (0, 0, 100, 100)), annotation(3, 2, (0, 0, 50, 50))])
    before = copy.deepcopy(content)
    first = saved(tmp_path / "a.json", decision("x", "accept"), decision("y", "reject"))
    second = saved(
        tmp_path / "b.json",
        decision("x", "accept", (11, 10, 40.5, 40), category=3),  # thought better of
        decision("z", "accept", (200, 50, 30, 20), image=2),
        decision("w", "skip", (1, 1, 9, 9)),
    )
    decisions = read_decisions([first, second], content)
    merged = add_accepted(content, decisions)
    assert content == before and merged["annotations"][:2] == before["annotations"]
    new = merged["annotations"][2:]
    assert [(a["id"], a["image_id"], a["category_id"], a["bbox"]) for a in new] == [
        (8, 1, 3, [11, 10, 40.5, 40]),
        (9, 2, 5, [200, 50, 30, 20]),
    ]
    assert all(a["source"] == "oln-d2 audit" and a["iscrowd"] == 0 for a in new)
    assert new[0]["area"] == 1620 and merged["categories"][4] == {"id": 5, "name": "object"}
    check_coco("merged.json", merged)
    again = add_accepted(check_coco("merged.json", merged), decisions)
    assert again["annotations"] == merged["annotations"]
    assert again["categories"] == merged["categories"]


def test_without_a_review(tmp_path):
    """Candidates above a score, and so many of an image, become marked annotations."""
    gt = tmp_path / "gt.json"
    gt.write_text(GT.read_text())
    done = oln_d2.audit(gt, PHOTOS, tmp_path / "out", accept_top=2, number=5)
    pseudo = json.loads((tmp_path / "out/pseudo.json").read_text())
    old = json.loads(GT.read_text())
    new = pseudo["annotations"][len(old["annotations"]) :]
    assert pseudo["annotations"][: len(old["annotations"])] == old["annotations"]
    assert sorted(a["image_id"] for a in new) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert {a["source"] for a in new} == {"oln-d2 audit, not reviewed"}
    assert pseudo["categories"][-1]["name"] == "object"
    check_coco("pseudo.json", pseudo)
    middle = sorted(a["score"] for a in new)[4] - 1e-5  # they are rounded
    done = oln_d2.audit(gt, PHOTOS, tmp_path / "out", accept_top=2, accept_above=middle)
    above = json.loads((tmp_path / "out/pseudo.json").read_text())["annotations"]
    assert done.pseudo and {a["score"] for a in above if "score" in a} == {
        a["score"] for a in new if a["score"] >= middle
    }


def test_export_for_a_team(tmp_path, capsys):
    """Who reviews elsewhere must see candidates and annotations, in the units of these tools."""
    command = ["audit", str(GT), "--images", str(PHOTOS), "--number", "3", "--output"]
    content = json.loads(GT.read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    for tool in ("labelstudio", "cvat"):
        assert main([*command, str(tmp_path), "--format", tool]) == 0
    listed = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    wanted = {c["image_id"] for c in listed}
    expected = {
        *(("object", *np.round(c["bbox"], 1), round(c["score"], 4)) for c in listed),
        *(
            (names[a["category_id"]], *a["bbox"], None)
            for a in content["annotations"]
            if a["image_id"] in wanted
        ),
    }
    sizes = {i["file_name"]: (i["width"], i["height"]) for i in content["images"]}
    found = set()
    for task in json.loads((tmp_path / "labelstudio.json").read_text()):
        width, height = sizes[task["data"]["image"].partition("?d=")[2]]
        for region in task["predictions"][0]["result"]:
            value, score = region["value"], region.get("score")
            box = [value[side] / 100 for side in ("x", "y", "width", "height")]
            box = np.round(np.multiply(box, [width, height, width, height]), 1)
            score = score and round(score, 4)
            found.add((*value["rectanglelabels"], *box, score))
    assert found == expected
    made = check_coco("cvat.json", json.loads((tmp_path / "cvat.json").read_text()))
    names = {c["id"]: c["name"] for c in made["categories"]}
    assert {i["id"] for i in made["images"]} == wanted
    assert expected == {
        (
            names[a["category_id"]],
            *np.round(a["bbox"], 1),
            "score" in a["attributes"] and round(a["attributes"]["score"], 4) or None,
        )
        for a in made["annotations"]
    }


@pytest.fixture
def pseudo(tmp_path):
    """The annotations of the examples, with others that nobody has looked at."""
    oln_d2.audit(GT, PHOTOS, tmp_path / "out", accept_top=2, number=5)
    return tmp_path / "out/pseudo.json"


def weight_of_each(pseudo):
    """Of each image by its name: the weights that boxes should have, by their sizes (W, H)."""
    content = json.loads(pseudo.read_text())
    kept = [a for a in content["annotations"] if a["category_id"] == 6 or "source" in a]
    assert {a["category_id"] == 6 for a in kept} == {True, False}
    return {
        image["file_name"]: {
            tuple(a["bbox"][2:]): 0.25 if "source" in a else 1.0
            for a in kept
            if a["image_id"] == image["id"]
        }
        for image in content["images"]
    }


def weights_as_expected(boxes, weights, expected):
    """Each box has the weight of the one of its size, which differ in the examples."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    assert len(sizes) == len(weights)
    for size, weight in zip(sizes.tolist(), weights.tolist()):
        assert weight == expected[min(expected, key=lambda e: abs(np.subtract(e, size)).sum())]


def test_training_weighs_what_was_not_reviewed(pseudo):
    """
    What nobody has looked at trains, whatever the seen categories, and each box must keep its own
    weight, also where another is left out.
    """
    from oln_d2.standalone.data import CocoImages, CocoSource, View

    source = CocoSource(pseudo, PHOTOS, ["person"])
    dataset = CocoImages([source], 4000, training=True, pseudo_weight=0.25)
    plain = CocoImages([source], 4000, training=True)
    assert dataset.digest() != plain.digest()  # a resume must not mix them up
    left_out = 0
    for index, expected in enumerate(weight_of_each(pseudo).values()):
        side = int(min(dataset.sizes[index]))
        for flip in (False, True):
            _, target = dataset[View(index, side, flip)]
            assert len(target["boxes"]) == len(expected)
            weights_as_expected(target["boxes"], target["weights"], expected)
        assert "weights" not in plain[View(index, side)][1]
        _, target = dataset[View(index, side, zoom=1.6)]
        # Those that are wholly in sight have 1.6 times their size.
        boxes, (width, height) = target["boxes"], dataset.sizes[index][::-1].tolist()
        inside = (boxes[:, 2] < width - 1) & (boxes[:, 3] < height - 1)
        left_out += len(expected) - len(boxes)
        weights_as_expected(boxes[inside] / 1.6, target["weights"][inside], expected)
    assert left_out > 0


@NEEDS_DETECTRON2
def test_train_net_weighs_what_was_not_reviewed(pseudo):
    """The same with Detectron2, where the objects are then of one class for any model."""
    from oln_d2.engine.batches import build_training_mapper
    from oln_d2.engine.datasets import check_training_sets, load_open_world_coco
    from oln_d2.model_zoo import load_config

    cfg = load_config("cpu/oln_box_R_18_FPN_GN.yaml", ["DATASETS.TRAIN", ("coco_2017_voc_train",)])
    records = load_open_world_coco(pseudo, PHOTOS, ["person"], training=True)
    cfg.DATASETS.PSEUDO_WEIGHT = 0.25
    cfg.INPUT.MIN_SIZE_TRAIN = (100,)
    mapper = build_training_mapper(cfg)
    for record, expected in zip(records, weight_of_each(pseudo).values()):
        # A box so thin that the resize leaves nothing of it, before all others.
        thin = {"bbox": [5, 5, 1e-9, 1e-9], "bbox_mode": 1, "category_id": 0, "iscrowd": 0}
        record["annotations"].insert(0, thin)
        instances = mapper(record)["instances"]
        scale = record["height"] / instances.image_size[0]
        assert len(instances) == len(expected) and not instances.gt_classes.any()
        weights_as_expected(instances.gt_boxes.tensor * scale, instances.gt_weights, expected)
    cfg.DATASETS.PSEUDO_WEIGHT = 1.0
    assert not build_training_mapper(cfg)(records[0])["instances"].has("gt_weights")
    for weight, message in ((0.0, "PSEUDO_WEIGHT"), (0.5, "only OLN's losses look at it")):
        cfg.DATASETS.PSEUDO_WEIGHT = weight
        cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
        with pytest.raises(InputError, match=message):
            check_training_sets(cfg)


BAD = {
    "[]": "has no list 'decisions'; give the file that the page of an audit saved",
    '{"decisions": [{"id": "x"}]}': r"decisions\[0\]: lacks one of id, image_id",
    json.dumps({"decisions": [decision("x", "maybe")]}): r"what is 'maybe'; it can be accept",
    json.dumps({"decisions": [decision("x", "accept", image=9)]}): "image 9 is not in the annot",
    json.dumps({"decisions": [decision("x", "accept", category=9)]}): "no category 9 in the annot",
    json.dumps({"decisions": [decision("x", "accept", (1, 1, 0, 5))]}): "no box x, y, width",
}


@pytest.mark.parametrize("text", BAD)
def test_decisions_that_cannot_be(text, tmp_path):
    path = tmp_path / "decisions.json"
    path.write_text(text)
    with pytest.raises(InputError, match=BAD[text]):
        read_decisions([path], content_of([]))


def test_rank_is_learnt():
    """Who rejects what lies in annotations must see less of it; few decisions rank nothing."""
    rng = np.random.default_rng(0)

    def some(number):
        sizes = rng.uniform(20, 90, (number, 4))
        inside = (rng.random(number) < 0.5).astype(float)
        score = rng.uniform(0.3, 0.6, number)
        zeros = np.zeros(number)
        return Candidates(zeros.astype(int), sizes, score, score, inside, zeros)

    judged, rest = some(60), some(40)
    ranks = learn_ranks(rest, judged, judged.inside == 0)
    assert ranks[rest.inside == 0].min() > 0.7 and ranks[rest.inside == 1].max() < 0.3
    few = judged.select(slice(12))
    assert learn_ranks(rest, few, few.inside == 0) is None


def test_command(tmp_path, capsys):
    """From a COCO file to candidates, and by decisions to a file that trains."""
    content = json.loads(GT.read_text())
    hidden = [a for a in content["annotations"] if a["image_id"] == 3]  # the coffee
    gt = tmp_path / "train.json"
    rest = [a for a in content["annotations"] if a["image_id"] != 3]
    gt.write_text(json.dumps({**content, "annotations": rest}))
    before = gt.read_text()
    out = tmp_path / "out"
    command = ["audit", str(gt), "--output", str(out)]
    assert main([*command, "--images", str(PHOTOS), "--number", "50", "--estimate"]) == 0
    shown = capsys.readouterr().out
    assert "the first 50 of them are listed" in shown and "Among the first" in shown
    assert {"categories", "at random"} == json.loads((out / "estimate.json").read_text()).keys()
    listed = json.loads((out / "candidates.json").read_text())["candidates"]
    assert len(listed) == 50 and listed == sorted(listed, key=lambda c: -c["rank"])
    assert {"index.html", "audit_files", "proposals"} < {path.name for path in out.iterdir()}
    goes_on = f"oln-d2 audit {gt} --merge decisions.json --output {out}"
    assert goes_on in (out / "index.html").read_text()
    first = [c for c in listed if c["image_id"] == 3][:3]
    assert any(_iou(c["bbox"], a["bbox"]) > 0.5 for c in first for a in hidden)

    top = listed[0]
    path = saved(
        tmp_path / "d.json", decision(top["id"], "accept", top["bbox"], top["image_id"], 1)
    )
    assert main([*command, "--merge", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "1 annotations were added" in shown and "accept 10 and reject 10 at least" in shown
    merged = json.loads((out / "merged.json").read_text())
    assert merged["annotations"][-1]["bbox"] == top["bbox"] and gt.read_text() == before
    again = json.loads((out / "candidates.json").read_text())["candidates"]
    assert all(
        c["image_id"] != top["image_id"] or _iou(c["bbox"], top["bbox"]) <= 0.5 for c in again
    )


def test_enough_decisions_rank_the_rest(tmp_path):
    """What was decided on goes from the list; the rest is ranked by it."""
    out = tmp_path / "out"
    done = oln_d2.audit(GT, PHOTOS, out)
    assert not done.learnt and done.merged is None and done.total == len(done.candidates.scores)
    listed = json.loads((out / "candidates.json").read_text())["candidates"]
    width = np.median([c["bbox"][2] for c in listed])
    chosen = listed[::2]
    decisions = [
        decision(c["id"], ["reject", "accept"][int(c["bbox"][2] > width)], c["bbox"], c["image_id"])
        for c in chosen
    ]
    path = saved(tmp_path / "d.json", *decisions)
    done = oln_d2.audit(GT, PHOTOS, out, merge=[path])
    assert done.learnt and done.added > 10
    assert str(done.total) in str(done) and done.summary[:-1] in str(done) and len(str(done)) < 500
    number, share = len(chosen), 100 * done.added / len(chosen)
    assert f"Of {number} candidates judged {share:.0f} % were accepted (95 %" in done.summary
    lower = [c["bbox"][2] > width for c in chosen[number // 2 :]]
    last = f"of the {len(lower)} that ranked last {100 * np.mean(lower):.0f} % ("
    assert last in done.summary
    rest = json.loads((out / "candidates.json").read_text())["candidates"]
    assert not {c["id"] for c in rest} & {c["id"] for c in chosen}
    widths = [c["bbox"][2] for c in rest]
    assert np.mean(widths[:10]) > 2 * np.mean(widths[-10:])


def test_rounds(tmp_path):
    """
    A merge goes on with what was proposed and how it was ranked; decisions of all rounds add up,
    and what was added is no category to choose, and nothing to be estimated by.
    """
    content = json.loads(GT.read_text())
    for entry in content["annotations"]:
        entry["source"] = "another tool"  # means nothing here
    gt = tmp_path / "gt.json"
    gt.write_text(json.dumps(content))
    out = tmp_path / "out"
    proposer = oln_d2.load(min_size=256)
    first = oln_d2.audit(gt, PHOTOS, out, proposer=proposer, top_k=60, iou=0.3, hide=True)
    data = (out / "audit_files/data.js").read_text()
    listed = json.loads((out / "candidates.json").read_text())["candidates"]
    rounds = [[decision(c["id"], "accept", c["bbox"], c["image_id"]) for c in listed[:3]]]
    rounds.append(
        [*rounds[0], decision(listed[9]["id"], "reject", listed[9]["bbox"], listed[9]["image_id"])]
    )
    for number, decisions in enumerate(rounds):
        path = saved(tmp_path / f"{number}.json", *decisions)
        done = oln_d2.audit(gt, output=out, merge=[path], hide=True)
        assert done.added == 3 and done.estimate == first.estimate
        merged = json.loads((out / "merged.json").read_text())
        assert len(merged["annotations"]) == len(content["annotations"]) + 3
        about = json.loads((out / "candidates.json").read_text())
        assert about["settings"]["iou"] == 0.3 and about["model"] == proposer.identity
    again = (out / "audit_files/data.js").read_text()
    for text in (data, again):  # the browser's decisions stay those of this audit
        assert text.count('"name": "object"') == 0
    assert data.split('"summary"')[0] == again.split('"summary"')[0]
    ids = {c["id"] for c in about["candidates"]}
    assert not ids & {d["id"] for d in rounds[1]} and done.total < first.total - 3
    with pytest.raises(InputError, match="give no model and no cross_fit"):
        oln_d2.audit(gt, output=out, merge=[path], cross_fit=2)
    with pytest.raises(InputError, match="audit first, without merge"):
        oln_d2.audit(gt, output=tmp_path / "other", merge=[path])
    merged = (out / "merged.json").read_text()
    with pytest.raises(InputError, match=f"is of an audit of {gt}; give that file"):
        oln_d2.audit(GT, output=out, merge=[path])
    assert (out / "merged.json").read_text() == merged


def test_summary_says_what_the_model_knows(tmp_path):
    """The model of the package was trained on people: an estimate by them is too good."""
    done = oln_d2.audit(GT, PHOTOS, tmp_path / "out", hide=True)
    assert "That is too much for other categories: the model of this package" in done.summary
    assert "such as airplane" in done.summary
    assert done.summary in (tmp_path / "out/audit_files/data.js").read_text()


def test_images_that_are_not_there(tmp_path):
    some = tmp_path / "some"
    some.mkdir()
    shutil.copy(PHOTOS / "coffee.jpg", some)
    done = oln_d2.audit(GT, some, tmp_path / "out")
    assert set(done.candidates.image_ids.tolist()) == {3}
    assert done.failures == [f"3 images not in {some}: airplane.jpg, astronaut.jpg, motorcycle.jpg"]


def test_annotations_are_never_overwritten(tmp_path):
    gt = tmp_path / "pseudo.json"
    gt.write_text(GT.read_text())
    with pytest.raises(InputError, match="pseudo.json"):
        oln_d2.audit(gt, PHOTOS, tmp_path, accept_top=1)
    assert gt.read_text() == GT.read_text()


def _iou(a, b):
    from pycocotools import mask

    return mask.iou(np.array([a], float), np.array([b], float), [0])[0, 0]


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for default in (candidates.IOU, candidates.COPIES, candidates.INSIDE):
        assert f"(default {default})" in shown
    assert f"(default {review.NUMBER})" in shown


def test_bad_input(tmp_path, capsys):
    def refused(*arguments):
        assert main(["audit", *map(str, arguments), "--output", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "photos.json: the folder of its images is not given; name it (--images)" in refused(GT)
    assert "inside is 2.0" in refused(GT, "--images", PHOTOS, "--inside", 2)
    assert "seed is -1" in refused(GT, "--images", PHOTOS, "--seed", -1)
    assert "top_k is 0" in refused(GT, "--images", PHOTOS, "--top-k", 0)
    assert "no such file" in refused(tmp_path / "none.json", "--images", PHOTOS)
    assert "none: no such file or folder" in refused(GT, "--images", tmp_path / "none")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def page(browser, tmp_path):  # noqa: F811
    """The page of an audit in a browser; an error there fails the test."""
    oln_d2.audit(GT, PHOTOS, tmp_path / "out", number=40)
    page = browser.new_page(viewport={"width": 1200, "height": 800}, accept_downloads=True)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((tmp_path / "out/index.html").as_uri())
    page.wait_for_function("[...pictures.values()].every((p) => p.complete)")
    yield page
    page.close()
    assert not problems


@pytest.mark.heavy
def test_review_by_keyboard(page, tmp_path):
    """One key each: 30 candidates are decided, kept over a reload, and merged."""
    state = page.locator("#state")
    assert state.inner_text() == "candidate 1 of 40 · 0 accepted, 0 rejected, 0 skipped"
    for key in ["a", "x", "Space"] * 9 + ["1", "0", "A"]:
        page.keyboard.press(key)
    assert state.inner_text() == "candidate 31 of 40 · 12 accepted, 9 rejected, 9 skipped"
    page.keyboard.down("Backspace")
    page.keyboard.down("Backspace")  # held: repeats undo no more
    page.keyboard.up("Backspace")
    assert state.inner_text() == "candidate 30 of 40 · 11 accepted, 9 rejected, 9 skipped"
    page.reload()
    assert state.inner_text() == "candidate 30 of 40 · 11 accepted, 9 rejected, 9 skipped"
    page.keyboard.press("ArrowLeft")
    assert state.inner_text().startswith("candidate 29 of 40 · 11 accepted")
    page.keyboard.press("ArrowRight")

    # Adjusted by the arrows: the left upper corner, then the right lower one.
    for key in ["e", "ArrowRight", "ArrowDown", "e", "ArrowRight", "e", "a"]:
        page.keyboard.press(key)
    page.locator("#filter").focus()
    page.keyboard.type("ax1")  # no keys in a text field
    assert state.inner_text().startswith("candidate 31 of 40 · 12 accepted, 9 rejected")
    page.locator("#filter").fill("helmet")
    page.keyboard.press("Enter")
    assert state.inner_text().startswith("candidate 32 of 40 · 13 accepted")
    assert page.locator("#help").is_hidden()
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()

    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "decisions.json")
    decisions = json.loads((tmp_path / "decisions.json").read_text())["decisions"]
    assert len(decisions) == 31
    moved = decisions[29]
    change = np.subtract(moved["bbox"], moved["proposed"])
    np.testing.assert_allclose(change, [1, 1, 0, -1], atol=1e-6)
    names = {c["id"]: c["name"] for c in json.loads(GT.read_text())["categories"]}
    assert names[decisions[30]["category_id"]] == "helmet"
    done = oln_d2.audit(GT, output=tmp_path / "out", merge=[tmp_path / "decisions.json"])
    assert done.added == 13 and not done.learnt

    # The new list: what was skipped is there, what was decided is not, and stays in the file.
    page.goto((tmp_path / "out/index.html").as_uri())
    for key in ["ArrowLeft", "Backspace", "x"]:
        page.keyboard.press(key)
    assert "13 accepted, 10 rejected" in state.inner_text()
    page.locator("#order").select_option("score")
    page.keyboard.press("x")
    assert "13 accepted, 11 rejected" in state.inner_text()
    with page.expect_download() as download:
        page.locator("#save").click()
    download.value.save_as(tmp_path / "decisions.json")
    assert len(json.loads((tmp_path / "decisions.json").read_text())["decisions"]) >= 32
    again = oln_d2.audit(GT, output=tmp_path / "out", merge=[tmp_path / "decisions.json"])
    assert again.added == 13 and again.learnt


@pytest.mark.heavy
def test_drag_and_hide(page):
    """A side follows the mouse; Shift hides the boxes as long as it is held."""
    before = page.evaluate("boxOf(current())")
    x, y, scale = page.evaluate(
        """() => {
      const canvas = document.getElementById("whole"), { scale, shift } = canvas.view;
      const at = canvas.getBoundingClientRect(), [x, y, w, h] = boxOf(current());
      return [at.x + shift[0] + x * scale, at.y + shift[1] + (y + h / 2) * scale, scale];
    }"""
    )
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 10 * scale, y)
    page.mouse.up()
    after = page.evaluate("boxOf(current())")
    np.testing.assert_allclose(np.subtract(after, before), [10, 0, -10, 0], atol=1)
    shown = page.locator("#whole").screenshot()
    page.keyboard.down("Shift")
    assert page.locator("#whole").screenshot() != shown
    page.keyboard.up("Shift")
    assert page.locator("#whole").screenshot() == shown


def write_images(folder, number, seed=0):
    """A bright square on noise in each, annotated."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    for i in range(1, number + 1):
        pixels = rng.integers(0, 90, (96, 128, 3))
        x, y = int(rng.integers(5, 60)), int(rng.integers(5, 40))
        pixels[y : y + 40, x : x + 40] = rng.integers(150, 255, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 128, "height": 96})
        annotations.append(annotation(i, i, (x, y, 40, 40)))
    categories = [{"id": 1, "name": "square"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def test_what_shares_a_part(tmp_path):
    """Near duplicates share one wherever they lie; folders do, if there are enough."""
    write_images(tmp_path / "a", 6)
    write_images(tmp_path / "b", 4, seed=1)
    write_images(tmp_path / "c", 4, seed=2)
    with Image.open(tmp_path / "a/3.png") as image:
        image.resize((120, 90)).save(tmp_path / "c/4.png")
    paths = sorted(map(str, tmp_path.rglob("*.png")))
    groups = group_images(paths, 3)
    names = [path[len(str(tmp_path)) + 1 :] for path in paths]
    of = dict(zip(names, groups.tolist()))
    assert {of[name] for name in names if name[0] != "b"} == {of["a/3.png"]}
    assert {of[name] for name in names if name[0] == "b"} == {of["b/1.png"]} != {of["a/3.png"]}
    many = group_images(paths, 4)
    assert len(set(many.tolist())) == 13  # fourteen images, and two of them are copies


def test_cross_fit(tmp_path, monkeypatch, capsys):
    """Each image is judged by a model trained on others, and the run goes on where it stopped."""
    pytest.importorskip("timm")
    from oln_d2.auditing import review

    content = write_images(tmp_path / "images", 8)
    gt = tmp_path / "gt.json"
    gt.write_text(json.dumps(content))
    recipe = tmp_path / "recipe.yaml"
    options = {"epochs": 0.5, "batch_size": 2, "lr": 0.001, "warmup": 0, "workers": 0}
    recipe.write_text(json.dumps({**options, "min_size": 96, "max_size": 128}))
    out = tmp_path / "out"
    command = ["audit", str(gt), "--images", str(tmp_path / "images"), "--output", str(out)]
    command += ["--cross-fit", "2", "--recipe", str(recipe)]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(review, "find_candidates", stop)
        assert main(command) == 130
    models = sorted(out.glob("cross_fit/part_*/model/model_final.pth"))
    assert len(models) == 2
    written = [path.stat().st_mtime_ns for path in models]
    assert main(command) == 0
    assert [path.stat().st_mtime_ns for path in models] == written
    held, trained = (
        [
            {image["id"] for image in json.loads(path.read_text())["images"]}
            for path in sorted(out.glob(f"cross_fit/part_*/{name}.json"))
        ]
        for name in ("held_out", "train")
    )
    assert held[0] | held[1] == set(range(1, 9)) and not held[0] & held[1]
    assert trained == held[::-1]
    listed = json.loads((out / "candidates.json").read_text())
    identity = listed["model"]
    for part, ids in zip((1, 2), held):
        results = json.loads((out / f"cross_fit/part_{part}/proposals/results.json").read_text())
        assert {entry["image_id"] for entry in results} == ids
    from oln_d2.standalone.checkpoint import read_checkpoint

    shipped, learnt = (
        read_checkpoint(path)["model"]["backbone.bottom_up.timm.conv_stem.weight"]
        for path in (weights.find(".safetensors"), models[0])
    )
    assert (shipped - learnt).abs().max() < 1e-6  # frozen
    first = listed["candidates"][0]
    accepted = decision(first["id"], "accept", first["bbox"], first["image_id"])
    path = saved(tmp_path / "d.json", accepted)
    done = oln_d2.audit(gt, output=out, merge=[path])  # as it was audited before
    assert done.added == 1 and not (out / "proposals").exists()
    recipe.write_text(json.dumps({**options, "min_size": 96, "max_size": 144}))
    assert main(command) == 2  # not with the models that are there
    assert "is of other annotations, another recipe, seed" in capsys.readouterr().err
    assert json.loads((out / "candidates.json").read_text())["model"] == identity


def test_cross_fit_estimate(tmp_path, capsys):
    """What the estimate asks for must be hidden from the training, too."""
    pytest.importorskip("timm")
    content = write_images(tmp_path / "images", 8)
    content["categories"].append({"id": 2, "name": "other"})
    for i, entry in enumerate(content["annotations"] * 2):  # smaller ones in them, of a second kind
        x, y = entry["bbox"][:2]
        if i >= 8:
            content["annotations"].append(annotation(i + 1, i - 7, (x, y, 15, 15), 2))
    gt = tmp_path / "gt.json"
    gt.write_text(json.dumps(content))
    recipe = tmp_path / "recipe.yaml"
    options = {"epochs": 0.5, "batch_size": 2, "lr": 0.001, "warmup": 0, "workers": 0}
    recipe.write_text(json.dumps({**options, "min_size": 96, "max_size": 128}))
    out = tmp_path / "out"
    command = ["audit", str(gt), "--images", str(tmp_path / "images"), "--output", str(out)]
    assert main([*command, "--cross-fit", "2", "--recipe", str(recipe), "--estimate"]) == 0
    hidden = hide_from_training(content)
    for part in ("part_1", "part_2"):
        shown, less = (
            {
                a["id"]
                for a in json.loads((out / folder / part / "train.json").read_text())["annotations"]
            }
            for folder in ("cross_fit", "cross_fit_less")
        )
        gone = {a["id"] for one in hidden.values() for a in one.objects}
        assert less == shown - gone and shown & gone
    measured = json.loads((out / "estimate.json").read_text())
    assert measured.keys() == hidden.keys() == {"categories", "at random"}
    for name, one in measured.items():
        assert one["hidden"] == len(hidden[name].objects) > 0
    (half,) = ({a["category_id"] for a in hidden["categories"].objects},)
    assert not half & {a["category_id"] for a in hidden["at random"].kept}
    assert "Among the first" in capsys.readouterr().out


def test_cross_fit_that_cannot_be(tmp_path, capsys):
    content = write_images(tmp_path / "images", 3)
    gt = tmp_path / "gt.json"
    gt.write_text(json.dumps(content))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train_json: x.json")

    def refused(*arguments):
        command = ["audit", gt, "--images", tmp_path / "images", "--output", tmp_path / "out"]
        assert main([*map(str, command), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "3 images are too few for 2 parts" in refused("--cross-fit", 2)
    assert "cross_fit is 1; it has to be 2 or more" in refused("--cross-fit", 1)
    assert "train_json has no use here" in refused("--cross-fit", 2, "--recipe", recipe)
    assert "--recipe is how --cross-fit trains" in refused("--recipe", recipe)
    assert "--tiles: of a model, and --cross-fit" in refused("--cross-fit", 2, "--tiles", 64)
    recipe.write_text("resume: true")
    assert "resume has no use here" in refused("--cross-fit", 2, "--recipe", recipe)
