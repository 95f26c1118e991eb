"""
What the first stage of a trained detector finds alone, as a results file:

    python tools/first_stage.py model_final.pth instances_val.json val/ out.json

of OLN-Box (OLN-RPN, ranked by centerness) or class-agnostic Faster R-CNN (RPN), trained by `oln-d2
train`: the best 1000 boxes of an image, NMS at 0.7.
"""

import argparse
import os

import torch
from torchvision.ops import nms
from tqdm import tqdm

from oln_d2.boxes import to_xywh
from oln_d2.data.coco import load_coco
from oln_d2.data.images import open_image
from oln_d2.evaluation.coco_results import write_results
from oln_d2.standalone.models import prepare
from oln_d2.standalone.proposer import StandaloneProposer

MOST = 1000
NMS = 0.7


@torch.inference_mode()
def find(proposer, photo):
    """Boxes (D, 4), XYWH in pixels of the photograph, and scores (D,) that rank them."""
    model = proposer.model
    ((_, pixels),) = proposer.prepare(photo).parts
    images = prepare(model, [torch.from_numpy(pixels.transpose(2, 0, 1).copy())])
    (found,), _ = model.rpn(images, model.backbone(images.tensors))
    if isinstance(found, dict):
        boxes, scores = found["boxes"], found["objectness"]
    else:  # torchvision's, in the order of scores that it does not give
        boxes, scores = found, torch.linspace(1, 0, len(found) + 1)[:-1]
    kept = nms(boxes, scores, NMS)[:MOST]
    height, width = pixels.shape[:2]
    scale = torch.tensor([photo.width / width, photo.height / height] * 2)
    return to_xywh((boxes[kept] * scale).double().numpy()), scores[kept].double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("weights", "gt", "images", "output"):
        parser.add_argument(name)
    args = parser.parse_args()
    proposer = StandaloneProposer(args.weights, "cpu")
    kept = proposer.model.rpn._post_nms_top_n
    kept["testing"] = max(kept["testing"], MOST)
    rows = []
    for entry in tqdm(load_coco(args.gt)["images"], unit="image"):
        photo = open_image(os.path.join(args.images, entry["file_name"]))
        rows.append((entry["id"], *find(proposer, photo), None, {}))
    write_results(args.output, rows)


if __name__ == "__main__":
    main()
