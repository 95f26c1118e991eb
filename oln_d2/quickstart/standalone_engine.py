"""The quickstart's models on torch and torchvision alone."""

from oln_d2.quickstart.run import DETECTIONS
from oln_d2.quickstart.synthetic import KNOWN, SIZE
from oln_d2.standalone import train

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


def train_and_detect(model, data, folder, seed, epochs):
    """
    Args:
        model (str): "oln_box" or "faster_rcnn".
        data (Path): what `make_dataset` wrote.
        folder (Path): for the model; an interrupted training that it holds is resumed.
        seed (int)
        epochs (float)

    Returns:
        Path: the detections on the test images, a COCO results file.
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
