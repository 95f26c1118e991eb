"""Detectron2's evaluator for open-world recall: a thin adapter on `OpenWorldRecall`."""

import logging
import os
from collections import OrderedDict

import numpy as np

from oln_d2.errors import require_detectron2

require_detectron2("OpenWorldEvaluator")

import detectron2.utils.comm as comm  # noqa: E402
from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.evaluation import DatasetEvaluator  # noqa: E402
from detectron2.utils.file_io import PathManager  # noqa: E402

from oln_d2.evaluation.coco_results import QUALITY_FIELDS, write_results  # noqa: E402
from oln_d2.evaluation.ground_truth import GroundTruth  # noqa: E402
from oln_d2.evaluation.open_world import DEFAULT_KS, OpenWorldRecall  # noqa: E402
from oln_d2.evaluation.result import GROUPS, write_report  # noqa: E402
from oln_d2.masks import RLEMasks  # noqa: E402

logger = logging.getLogger(__name__)


class OpenWorldEvaluator(DatasetEvaluator):
    """
    Recall of unseen, seen and all objects, class-agnostic, for models that put out "instances"
    (`pred_boxes`, `scores`, and `pred_masks` where they have them) or "proposals"
    (`proposal_boxes`, `objectness_logits`).
    """

    def __init__(
        self,
        dataset_name,
        output_dir=None,
        *,
        distributed=True,
        protocols=("xclass",),
        max_dets=1500,
        ks=DEFAULT_KS,
    ):
        """
        Args:
            dataset_name (str): a registered data set whose metadata has `json_file`, a COCO ground
                truth with all categories, and `seen_names`, the names of the seen ones.
            output_dir (str): where `coco_instances_results.json` (all detections in COCO's format,
                under category_id 1) and `open_world_results.json` (all metrics) are written, if
                given.
            distributed (bool): collect the detections of all processes; results are then those of
                the whole data set on the main process and {} on the others. False: of this process
                only.
            protocols (tuple[str]): of "xclass" and "filtered", see `oln_d2.evaluation.open_world`.
            max_dets (int), ks (list[int]): see :class:`OpenWorldRecall`.

        Raises:
            InputError: a setting, or ground truth, that cannot be used: now, not after inference.
        """
        metadata = MetadataCatalog.get(dataset_name)
        self._json_file = metadata.json_file
        self._output_dir = output_dir
        self._distributed = distributed
        self._protocols = tuple(protocols)
        self._settings = {"max_dets": max_dets, "ks": ks}
        if comm.is_main_process() or not distributed:
            self._gt = GroundTruth.load(
                PathManager.get_local_path(self._json_file), metadata.seen_names
            )
            for protocol in self._protocols:
                OpenWorldRecall(self._gt, protocol, **self._settings)
        self.reset()

    def reset(self):
        self._detections = {}

    def process(self, inputs, outputs):
        """
        Args:
            inputs (list[dict]): each with `image_id`.
            outputs (list[dict]): each with "instances" or "proposals" in the scale of the image.
        """
        for given, output in zip(inputs, outputs):
            boxes, scores, masks, qualities = read_output(output)
            # XYWH, as they are written, so that scoring the file gives exactly the same.
            boxes = np.hstack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
            # A sampler that pads the last batch shows an image twice.
            self._detections.setdefault(given["image_id"], (boxes, scores, masks, qualities))

    def evaluate(self):
        """
        Returns:
            OrderedDict: task -> {metric: 0..100, NaN where nothing is to be found}. Tasks are
            box_unseen, box_seen, box_all, with masks also mask_unseen, ...; those of the protocol
            "filtered" end in _filtered.

        Raises:
            RuntimeError: images of the data set had no outputs.
        """
        detections = self._detections
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(detections, dst=0)
            if not comm.is_main_process():
                return {}
            detections = {image: d for part in reversed(gathered) for image, d in part.items()}
        gt = self._gt
        missing = np.setdiff1d(gt.image_ids, list(detections))
        if len(missing):
            raise RuntimeError(
                f"{len(missing)} of the {len(gt.image_ids)} images of {self._json_file} had no "
                f"outputs, the first is image {missing[0]}; recall is defined on all images"
            )
        if self._output_dir:
            os.makedirs(self._output_dir, exist_ok=True)
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            write_results(path, ((image, *detections[image]) for image in sorted(detections)))
            logger.info(f"Detections are in {path}")

        iou_types = ["box"]
        if any(m is not None for _, _, m, _ in detections.values()) and gt.has_masks:
            iou_types.append("mask")
        results, report = OrderedDict(), []
        for iou_type in iou_types:
            for protocol in self._protocols:
                recall = OpenWorldRecall(gt, protocol, iou_type=iou_type, **self._settings)
                for image, (boxes, scores, masks, _) in detections.items():
                    recall.update(image, boxes, scores, masks=masks, box_format="xywh")
                result = recall.result()
                logger.info(f"Open-world recall on {self._json_file}:\n{result}")
                report.append(result.to_dict())
                for group in GROUPS:
                    task = f"{iou_type}_{group}" + ("_filtered" if protocol == "filtered" else "")
                    results[task] = {k: 100 * v for k, v in result[group].items()}
        if self._output_dir:
            write_report(os.path.join(self._output_dir, "open_world_results.json"), report)
        return results


def read_output(output):
    """
    Args:
        output (dict): of a Detectron2 model for one image, with "instances" or "proposals".

    Returns:
        boxes (ndarray): shape (d, 4), XYXY, absolute pixels.
        scores (ndarray): shape (d,). Proposals are sorted by them, instances as they come.
        masks (list[dict] or None): d masks as COCO RLE.
        qualities (dict[str, ndarray]): shape (d,), what the score is made of, as far as the
            instances tell: "objectness", "box_score" and "mask_score".
    """
    qualities = {}
    if "instances" in output:
        instances = output["instances"]
        boxes, scores = instances.pred_boxes.tensor, instances.scores
        masks = _encode(instances.pred_masks) if instances.has("pred_masks") else None
        scores = scores.cpu().double().numpy()
        for field, name in QUALITY_FIELDS.items():
            if instances.has(field):
                qualities[name] = instances.get(field).cpu().numpy()
    else:
        proposals, masks = output["proposals"], None
        # The sigmoid of different logits may be equal, so these are sorted before.
        logits, order = (
            proposals.objectness_logits.cpu().double().sort(descending=True, stable=True)
        )
        boxes = proposals.proposal_boxes.tensor.cpu()[order]
        scores = logits.sigmoid().numpy()
    return boxes.cpu().double().numpy(), scores, masks, qualities


def _encode(masks):
    """
    Args:
        masks (Tensor or RLEMasks): shape (d, H, W), bool.

    Returns:
        list[dict]: d masks as COCO RLE.
    """
    from pycocotools import mask as mask_utils

    if isinstance(masks, RLEMasks):
        return masks.rles
    return [
        mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks.cpu().numpy()
    ]
