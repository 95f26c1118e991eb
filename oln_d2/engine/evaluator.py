"""Detectron2's evaluators: of open-world recall, and of AP on what is seen."""

import contextlib
import io
import logging
import os
from collections.abc import Sequence
from typing import Any

import detectron2.utils.comm as comm
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils.file_io import PathManager
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from oln_d2.boxes import to_xywh
from oln_d2.engine.datasets import class_ids
from oln_d2.evaluation.coco_results import write_results
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.open_world import DEFAULT_KS, DEFAULT_MAX_DETS, OpenWorldRecall
from oln_d2.evaluation.result import GROUPS, write_report
from oln_d2.files import StrPath, make_folder
from oln_d2.results import RLEMasks
from oln_d2.scores import SCORES

logger = logging.getLogger(__name__)


class SeenCOCOEvaluator(COCOEvaluator):
    """COCO's AP of a detector with classes, on the seen categories of a data set alone."""

    def __init__(self, dataset_name: str, output_dir: StrPath | None = None, **kwargs):
        """
        Args:
            dataset_name: registered with classes, see :func:`oln_d2.register_open_world_coco`.
            output_dir, kwargs: see :class:`COCOEvaluator`.
        """
        super().__init__(dataset_name, output_dir=output_dir, **kwargs)
        class_of = class_ids(self._metadata.json_file, self._metadata.seen_names)
        self._metadata.thing_dataset_id_to_contiguous_id = class_of
        content = self._coco_api.dataset
        for field, key in (("categories", "id"), ("annotations", "category_id")):
            content[field] = [entry for entry in content[field] if entry[key] in class_of]
        with contextlib.redirect_stdout(io.StringIO()):
            self._coco_api.createIndex()


class OpenWorldEvaluator(DatasetEvaluator):
    """
    Recall of unseen, seen and all objects, class-agnostic, for models that put out "instances"
    (`pred_boxes`, `scores`, and `pred_masks` where they have them) or "proposals"
    (`proposal_boxes`, `objectness_logits`).
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: StrPath | None = None,
        *,
        distributed: bool = True,
        protocols: Sequence[str] = ("xclass",),
        max_dets: int = DEFAULT_MAX_DETS,
        ks: Sequence[int] = DEFAULT_KS,
    ):
        """
        Args:
            dataset_name: a registered data set whose metadata has `json_file`, a COCO ground truth
                with all categories, and `seen_names`, the names of the seen ones.
            output_dir: where `coco_instances_results.json` (all detections in COCO's format, under
                category_id 1) and `open_world_results.json` (all metrics) are written, if given.
            distributed: collect the detections of all processes; results are then those of the
                whole data set on the main process and {} on the others. False: those of this
                process alone.
            protocols: any of "xclass" and "filtered", see `oln_d2.evaluation.open_world`.
            max_dets, ks: see :class:`OpenWorldRecall`.

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

    def reset(self) -> None:
        """Forget all detections."""
        self._detections = {}

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """
        Args:
            inputs: each with `image_id`.
            outputs: each with "instances" or "proposals" in the scale of the image.
        """
        for given, output in zip(inputs, outputs):
            boxes, scores, masks, qualities = read_output(output)
            # XYWH, as they are written, so that scoring the file gives exactly the same. A sampler
            # that pads the last batch shows an image twice.
            found = to_xywh(boxes), scores, masks, qualities
            self._detections.setdefault(given["image_id"], found)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Returns:
            task -> {metric: 0..100, NaN where nothing is to be found}. Tasks are box_unseen,
            box_seen, box_all, with masks also mask_unseen, ...; those of the protocol "filtered"
            end in _filtered.

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
            make_folder(self._output_dir)
            path = os.path.join(self._output_dir, "coco_instances_results.json")
            write_results(path, ((image, *detections[image]) for image in sorted(detections)))
            logger.info(f"Detections are in {path}")

        iou_types = ["box"]
        if any(m is not None for _, _, m, _ in detections.values()) and gt.has_masks:
            iou_types.append("mask")
        results, report = {}, []
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


def read_output(
    output: dict[str, Any],
) -> tuple[NDArray, NDArray, list[dict[str, Any]] | None, dict[str, NDArray]]:
    """
    Args:
        output: what a Detectron2 model returns for an image, with "instances" or "proposals".

    Returns:
        boxes (d, 4): XYXY, absolute pixels, float64.
        scores (d,): float64. Proposals are sorted by them, instances keep their order.
        masks: d masks as COCO RLE, or None.
        qualities: those of `SCORES` that the instances have, by field of a results file, (d,) each.
    """
    qualities = {}
    if "instances" in output:
        instances = output["instances"]
        boxes, scores = instances.pred_boxes.tensor, instances.scores
        masks = _encode(instances.pred_masks) if instances.has("pred_masks") else None
        scores = scores.cpu().double().numpy()
        for score in SCORES:
            if instances.has(score.attribute):
                qualities[score.field] = instances.get(score.attribute).cpu().numpy()
    else:
        proposals, masks = output["proposals"], None
        # Sorted by the logits: the sigmoid of different ones may be equal.
        logits = proposals.objectness_logits.cpu().double()
        logits, order = logits.sort(descending=True, stable=True)
        boxes = proposals.proposal_boxes.tensor.cpu()[order]
        scores = logits.sigmoid().numpy()
    return boxes.cpu().double().numpy(), scores, masks, qualities


def _encode(masks):
    """Masks (d, H, W), a bool tensor or `RLEMasks`, as a list of COCO RLE."""
    if isinstance(masks, RLEMasks):
        return masks.rles
    return [
        mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in masks.cpu().numpy()
    ]
