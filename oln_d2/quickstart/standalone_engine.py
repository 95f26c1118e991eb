"""The quickstart's models on torch and torchvision alone."""

from pathlib import Path

from oln_d2.quickstart.synthetic import KNOWN, SIZE
from oln_d2.standalone import train

DETECTIONS = 300  # of an image
COMMON = {
    "depth": 10,
    "norm": "GN",
    "fpn_channels": 64,
    "trainable_backbone_layers": 5,
    "anchor_sizes": (32, 64, 128, 256),
    "min_size": SIZE,
    "max_size": SIZE,
    "rpn_pre_nms_top_n_train": 500,
    "rpn_pre_nms_top_n_test": 500,
    "representation_size": 256,
    "box_batch_size_per_image": 128,
    "box_detections_per_img": DETECTIONS,
}
CONFIGS = {
    "oln_box": {"architecture": "oln_box", **COMMON, "ltrb_init": 0.5},
    "faster_rcnn": {"architecture": "faster_rcnn", **COMMON},
}


def train_and_detect(model: str, data: Path, folder: Path, seed: int, epochs: float) -> Path:
    """
    Args:
        model: "oln_box" or "faster_rcnn".
        data: what `make_dataset` wrote.
        folder: for the model; an interrupted training that it holds is resumed.
        seed: for the weights and the training.
        epochs: how often each image is seen.

    Returns:
        the detections on the test images, a COCO results file.
    """
    train(
        str(data / "train.json"),
        str(data / "train"),
        list(KNOWN),
        str(folder),
        val_json=str(data / "test.json"),
        val_images=str(data / "test"),
        config=CONFIGS[model],
        epochs=epochs,
        batch_size=4,
        lr=0.02,
        warmup=50,
        device="cpu",
        workers=0,
        checkpoint_every=50,
        seed=seed,
        resume=True,
    )
    return folder / "coco_instances_results.json"
