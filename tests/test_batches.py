"""Several training sets of `train_net.py`: which go together, how they are drawn, and jitter."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import NEEDS_DETECTRON2, ROOT, make_coco

from oln_d2.checks import InputError

pytestmark = NEEDS_DETECTRON2
RECIPE = ROOT / "configs/cpu/oln_box_R_18_FPN_GN.yaml"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(coco):
    """Makes a config that trains on "dogs" and "persons", two data sets of the same images."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from oln_d2.engine.datasets import register_own
    from oln_d2.model_zoo import load_config

    where = [str(coco / f"coco/{part}2017") for part in ("annotations/instances_train", "train")]
    rows = [[name, f"{where[0]}.json", where[1], seen] for name, seen in NAMES.items()]

    def make(*opts, recipe=RECIPE):
        own = ["DATASETS.OWN", rows, "DATASETS.TRAIN", ("dogs", "persons")]
        cfg = load_config(recipe, [*own, "DATASETS.TEST", (), "SOLVER.IMS_PER_BATCH", 2, *opts])
        register_own(cfg)
        return cfg

    yield make
    for name in NAMES:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


NAMES = {"dogs": "dog", "persons": "person", "again": "Dog "}
POSITIVES = "MODEL.OLN.OBJECTNESS_NEGATIVES", False


def records(sizes):
    return [
        {"width": width, "height": height, "image_id": i} for i, (width, height) in enumerate(sizes)
    ]


def drawn(cfg, number, sampler=None, sizes=((4, 3),) * 8):
    """The images of so many batches."""
    from oln_d2.engine.batches import build_loader

    loader = build_loader(cfg, records(sizes), lambda record: record, sampler)
    return [[r["image_id"] for r in batch] for batch in itertools.islice(loader, number)]


def test_weights(config):
    """A small set must be drawn as often as was asked for, each of its images as often."""
    from oln_d2.engine.trainer import Trainer

    cfg = config(*POSITIVES, "DATASETS.TRAIN_WEIGHTS", [1.0, 3.0], "SEED", 3)
    loader = Trainer.build_train_loader(cfg)
    indices = itertools.chain.from_iterable(itertools.islice(loader.batch_sampler, 1000))
    counts = Counter(index for index, _ in indices)
    assert len(counts) == 9  # 5 with dogs, 4 with persons
    assert sum(counts[i] for i in range(5)) / 2000 == pytest.approx(0.25, abs=0.03)
    assert max(counts[i] for i in range(5)) < 1.5 * min(counts[i] for i in range(5))
    first = list(itertools.islice(loader.batch_sampler, 10))
    loader.batch_sampler.start = 7
    assert list(itertools.islice(loader.batch_sampler, 3)) == first[7:]


def test_without_weights_an_epoch_has_each_image_once(config, monkeypatch):
    """Several processes must share the images, without one of them twice."""
    from detectron2.utils import comm

    cfg = config("SEED", 3, "SOLVER.IMS_PER_BATCH", 4)
    parts = []
    for rank in range(2):
        # As in the second of two processes, which need GPUs.
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        parts.append(drawn(cfg, 4))
    for first in range(0, 4, 2):
        epoch = sum((sum(part[first : first + 2], []) for part in parts), [])
        assert sorted(epoch) == list(range(8))


@pytest.mark.parametrize("grouped", [True, False])
def test_batches_of_one_aspect(config, grouped):
    """Wide and high images in one batch would be padded to squares, most of them empty."""
    cfg = config("DATALOADER.ASPECT_RATIO_GROUPING", grouped)
    sizes = [(4, 3), (3, 4)] * 8
    batches = drawn(cfg, 30, sizes=sizes)
    assert any(a % 2 != b % 2 for a, b in batches) is not grouped
    assert {index for batch in batches for index in batch} == set(range(16))


def test_augmentation_follows_from_seed_and_iteration(config):
    """Else a resumed run, or one with another number of workers, would see other images."""
    from oln_d2.engine.trainer import Trainer

    cfg = config("INPUT.SCALE_JITTER", [0.3, 1.5], "INPUT.MAX_SIZE_TRAIN", 100)
    runs = []
    for start, workers in (0, 0), (2, 2):
        cfg.DATALOADER.NUM_WORKERS = workers
        loader = Trainer.build_train_loader(cfg)
        loader.batch_sampler.start = start
        runs.append([x for batch in itertools.islice(loader, 6 - start) for x in batch])
    for a, b in zip(runs[0][4:], runs[1], strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)
    sizes = [max(x["image"].shape[1:]) for x in runs[0]]
    assert max(sizes) == 100 and 30 <= min(sizes) < 80
    for x in runs[0]:
        assert x["instances"].image_size == x["image"].shape[1:]
        assert x["instances"].gt_boxes.inside_box(x["instances"].image_size, 1).all()


@pytest.mark.parametrize(
    "opts, message",
    [
        (["DATASETS.TRAIN", ()], "DATASETS.TRAIN is empty; name one"),
        (["DATASETS.TRAIN_WEIGHTS", [1.0]], r"TRAIN_WEIGHTS is \[1.0\]; give .* which has 2"),
        (["DATASETS.TRAIN_WEIGHTS", [1.0, 0.0]], r"\[1.0, 0.0\]; give a number above 0"),
        (["DATASETS.TRAIN_WEIGHTS", ["1", "a"]], "give a number above 0"),
        (
            ["DATASETS.TRAIN_WEIGHTS", [1, 2], "DATALOADER.SAMPLER_TRAIN", "RandomSubsetSampler"],
            "not go with DATALOADER.SAMPLER_TRAIN RandomSubsetSampler; leave out one",
        ),
        (["DATASETS.TRAIN", ("dogs", "coco_2017_val")], "dogs and coco_2017_val have different c"),
        ([], "dogs and persons have different seen .*; set MODEL.OLN.OBJECTNESS_NEGATIVES False"),
        ([*POSITIVES, "MODEL.OLN.RPN_CLS_LOSS_WEIGHT", 1.0], "; set MODEL.OLN.RPN_CLS_LOSS_WEI"),
        ([*POSITIVES, "MODEL.OLN.BOX_CLS_LOSS_WEIGHT", 1.0], "; set MODEL.OLN.BOX_CLS_LOSS_WEI"),
    ],
)
def test_sets_that_do_not_go_together(config, opts, message):
    """What spoils a training without a word must be named before it starts, with the remedy."""
    from oln_d2.engine.datasets import check_training_sets

    with pytest.raises(InputError, match=message):
        check_training_sets(config(*opts))


def test_classes_that_are_known_late(config, coco):
    """Detectron2's own registration reads the classes with the data; also then they must agree."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    from oln_d2.engine.datasets import check_training_sets, load_training_sets

    where = [str(coco / f"coco/{part}2017") for part in ("annotations/instances_train", "train")]
    plain = ("plain", "plain again")
    try:
        for name in plain:
            register_coco_instances(name, {}, f"{where[0]}.json", where[1])
        cfg = config("DATASETS.TRAIN", plain, "MODEL.ROI_HEADS.NUM_CLASSES", 22)
        check_training_sets(cfg)
        assert len(load_training_sets(cfg)[0]) == 12
        MetadataCatalog.remove("plain again")
        cfg.DATASETS.TRAIN = ("dogs", "plain again")
        check_training_sets(cfg)
        with pytest.raises(InputError, match="dogs and plain again have different classes"):
            load_training_sets(cfg)
    finally:
        for name in plain:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.mark.parametrize("filtered", [True, False])
def test_nothing_to_train_on(config, coco, tmp_path, filtered):
    """A data set of crowds alone would train on background for days."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    from oln_d2.engine.datasets import load_training_sets

    content = json.loads((coco / "coco/annotations/instances_train2017.json").read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    (tmp_path / "crowds.json").write_text(json.dumps(content))
    where = str(tmp_path / "crowds.json"), str(coco / "coco/train2017")
    register_coco_instances("crowds", {}, *where)
    try:
        cfg = config("DATALOADER.FILTER_EMPTY_ANNOTATIONS", filtered, "DATASETS.TRAIN", ("crowds",))
        with pytest.raises(
            InputError, match="TRAIN: crowds holds no object to train on .crowds do"
        ):
            load_training_sets(cfg)
    finally:
        DatasetCatalog.remove("crowds")
        MetadataCatalog.remove("crowds")


def test_sets_that_go_together(config, caplog):
    """Those that annotate the same must train as the paper does; a classifier at one's own risk."""
    from oln_d2.engine.datasets import check_training_sets

    cfg = config("DATASETS.TRAIN", tuple(NAMES))
    for names in ("dogs", "again"), ("coco_2017_voc_train", "lvis_v1_voc_train"):
        cfg.DATASETS.TRAIN = names
        check_training_sets(cfg)
    check_training_sets(config(*POSITIVES, "DATASETS.TRAIN", tuple(NAMES)))
    assert not caplog.text
    reference = RECIPE.parent / "faster_rcnn_1_anchor_R_18_FPN_GN.yaml"
    check_training_sets(config("DATASETS.TRAIN", tuple(NAMES), recipe=reference))
    assert "taken for background in the other, as a detector that classifies has to" in caplog.text


@pytest.mark.parametrize(
    "opts, message",
    [
        (["INPUT.SCALE_JITTER", [2.0, 0.1]], "two ascending numbers above 0"),
        (["INPUT.SCALE_JITTER", [0.0, 1.0]], "two ascending numbers above 0"),
        (["INPUT.SCALE_JITTER", ["a", 1.0]], "two ascending numbers above 0"),
        (["INPUT.SCALE_JITTER", [0.1, 2.0], "INPUT.CROP.ENABLED", True], "CROP.ENABLED False"),
        (["INPUT.SCALE_JITTER", [0.1, 2.0], "MODEL.MASK_ON", True], "MASK_FORMAT bitmask"),
    ],
)
def test_bad_jitter(config, opts, message):
    """A wrong range must be named, not fail in a worker."""
    from oln_d2.engine.batches import build_training_mapper

    with pytest.raises(InputError, match=f"INPUT.SCALE_JITTER .*{message}"):
        build_training_mapper(config(*opts))


def test_jitter_of_a_long_image():
    """A strip of a scanner must not end the run by having no pixel left."""
    from oln_d2.engine.batches import ResizeScale

    for shape in (1000, 4, 3), (4, 1000, 3):
        image = np.zeros(shape, np.uint8)
        scaled = ResizeScale(0.1, 0.1, 100, 100).get_transform(image).apply_image(image)
        assert sorted(scaled.shape) == [1, 3, 10]


def test_jitter_of_masks(config):
    """Masks must be cropped as the image is, and boxes be those of what is left."""
    from oln_d2.engine.trainer import Trainer

    opts = ["INPUT.SCALE_JITTER", [2.0, 2.0], "INPUT.MAX_SIZE_TRAIN", 100, "MODEL.MASK_ON", True]
    opts += ["INPUT.MASK_FORMAT", "bitmask", "DATASETS.TRAIN", ("dogs",), "SEED", 3]
    opts += ["DATALOADER.NUM_WORKERS", 0]
    loader = Trainer.build_train_loader(config(*opts))
    found = [x for batch in itertools.islice(loader, 8) for x in batch if len(x["instances"])]
    assert found
    for x in found:
        (mask,), (box,) = x["instances"].gt_masks.tensor, x["instances"].gt_boxes.tensor.int()
        assert mask.shape == x["image"].shape[1:] == (100, 100)
        assert mask.sum() == (box[2] - box[0]) * (box[3] - box[1])  # of a rectangle
        assert x["image"][:, mask].float().mean() > x["image"][:, ~mask].float().mean()
