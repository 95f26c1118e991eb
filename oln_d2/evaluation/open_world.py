"""
Class-agnostic recall of objects of seen and of unseen categories, on arrays.

The rule is pycocotools' (greedy matching in score order, crowds, area ranges), exactly, plus what
the two protocols add:

* "xclass", the OLN paper's: where unseen objects are searched, a detection that is matched at IoU
  .50 to an object of a seen category is taken out of the ranking, so it costs no budget.
* "filtered": objects of the categories that are not searched do not exist; no detection is free.

Three groups of ground truths are scored: "unseen", "seen" and "all". For "seen" and for "all"
nothing is taken out of the ranking: what the detector was trained on has to be found within the
budget, and AR of "all" is pycocotools' class-agnostic AR.

Shapes and names used below:
    I images, G ground truths (gts) of the data set, D detections, T IoU thresholds,
    V = 3 groups, A = 4 area ranges, P pairs of a detection and a gt whose IoU reaches a threshold.
    A detection's rank is its place, from 0, among the detections of its image that stay in the
    ranking.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_utils

from oln_d2.checks import InputError
from oln_d2.evaluation.ground_truth import GroundTruth
from oln_d2.evaluation.result import GROUPS, OpenWorldResult

PROTOCOLS = ("xclass", "filtered")
# Limits of the annotation's `area` in pixels, inclusive on both sides.
AREA_RANGES = {
    "all": (0, 1e10),
    "small": (0, 32**2),
    "medium": (32**2, 96**2),
    "large": (96**2, 1e10),
}
# Not np.arange: these are pycocotools' thresholds to the last bit.
IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10))
DEFAULT_KS = (1, 10, 20, 30, 50, 100, 300, 500, 1000, 1500)
DEFAULT_MAX_DETS = 1500
AP_DETS = 100  # COCO's AP looks at this many detections of an image
FREE_IOU = 0.5
LARGE = 1e150  # numbers above it have no squares
# How many detections are matched at once: bounds the memory used beyond the detections themselves.
BATCH = 2**19


class OpenWorldRecall:
    """
    Collects detections, in any order and any number of calls, and scores them.

        recall = OpenWorldRecall(GroundTruth.load("gt.json", seen="voc"))
        recall.update(image_ids, boxes, scores)
        print(recall.result())

    All images of the ground truth count, also those that get no detection.
    """

    def __init__(
        self,
        ground_truth: GroundTruth,
        protocol: str = "xclass",
        *,
        iou_type: str = "box",
        max_dets: int = DEFAULT_MAX_DETS,
        ks: Sequence[int] = DEFAULT_KS,
        iou_thresholds: Sequence[float] | NDArray[np.float64] = IOU_THRESHOLDS,
        with_ap: bool = True,
    ):
        """
        Args:
            ground_truth: the objects to be found.
            protocol: "xclass" or "filtered", see above.
            iou_type: "box" or "mask": what overlaps.
            max_dets: how many detections of an image take part, the highest scores first.
            ks: budgets to report, each in [1, max_dets].
            iou_thresholds: ascending, each in (0, 1]; recall is averaged over them.
            with_ap: also average precision, which all detections have to be kept for; else NaN.

        Raises:
            InputError: a setting out of its range.
        """
        if protocol not in PROTOCOLS:
            raise InputError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
        if iou_type not in ("box", "mask"):
            raise InputError(f"iou_type {iou_type!r} is neither 'box' nor 'mask'")
        if not ks or min(ks) < 1 or max(ks) > max_dets:
            raise InputError(
                f"k has to be between 1 and max_dets ({max_dets}), but ks is {list(ks)}"
            )
        thresholds = np.array(iou_thresholds, float)
        if not (
            len(thresholds) and np.all(np.diff(thresholds, prepend=0) > 0) and thresholds[-1] <= 1
        ):
            raise InputError(f"iou_thresholds {iou_thresholds} are not ascending numbers in (0, 1]")
        self.ground_truth = gt = ground_truth
        if iou_type == "mask":
            _ = gt.masks  # their mistakes would else be told as those of the detections
        self.protocol = protocol
        self.iou_type = iou_type
        self.max_dets = max_dets
        self.ks = tuple(sorted(set(ks)))
        self.iou_thresholds = thresholds
        # Detections are freed at IoU .50 whichever thresholds are reported.
        self._matched_at = np.unique(np.append(thresholds, FREE_IOU))
        # As in pycocotools: a threshold of 1 is reached by an IoU that is 1 but for rounding.
        self._least_iou = np.minimum(self._matched_at, 1 - 1e-10)

        ranges = np.array(list(AREA_RANGES.values()), float)
        in_range = (gt.areas >= ranges[:, :1]) & (gt.areas <= ranges[:, 1:])
        member = np.stack([~gt.seen, gt.seen, np.ones_like(gt.seen)])
        self._present = member if protocol == "filtered" else np.ones_like(member)
        self._counts = member[:, None] & in_range & ~gt.crowd  # V, A, G
        self._area_low, self._area_high = ranges[:, :1], ranges[:, 1:]
        x, y, w, h = gt.boxes.T
        self._gt_sides = np.stack([x, y, x + w, y + h, w * h])[:, :, None]

        # rank of the detection that found a gt, out of reach where none did
        shape = len(GROUPS), len(AREA_RANGES), len(self._matched_at), len(gt.areas)
        rank = np.int16 if max_dets <= np.iinfo(np.int16).max else np.int32
        self._found = np.full(shape, np.iinfo(rank).max, rank)
        self._is_shared = False  # with a result
        self._found_scores = np.full(len(gt.areas), -np.inf)
        # detections of each image, before the cut
        self._given = np.zeros(len(gt.image_ids), np.int32)
        self._freed = np.zeros_like(self._given)
        self._num_tied = 0
        self._with_ap = with_ap
        self._done = np.zeros(len(gt.image_ids), bool)
        self._pending, self._num_pending = [], 0
        self._batches = []

    def update(
        self,
        image_ids: Any,
        boxes: Any,
        scores: Any,
        *,
        masks: Sequence[Any] | None = None,
        box_format: str = "xyxy",
        first: int = 0,
    ) -> None:
        """
        Add all the detections of one or of many images. Arrays, lists or tensors are taken.

        Args:
            image_ids (D,): the image of each detection, or one id for all of them.
            boxes (D, 4): absolute pixels. Ignored if `iou_type` is "mask".
            scores (D,): higher is better; of equal scores the earlier detection goes first.
            masks: D masks as COCO RLE of the image's size. Ignored if `iou_type` is "box".
            box_format: "xyxy" or, as in results files, "xywh".
            first: the number of the first detection, by which errors count.

        Raises:
            InputError: unknown image, value that is not finite, negative size, wrong shape, or an
                image whose detections were added before. Nothing is added then.
        """
        gt = self.ground_truth
        if box_format not in ("xyxy", "xywh"):
            raise InputError(f"box_format {box_format!r} is neither 'xyxy' nor 'xywh'")
        scores, image_ids = _array(scores), _array(image_ids)
        if scores.ndim != 1:
            raise InputError(f"scores have shape {scores.shape}, not (D,)")
        if image_ids.shape not in ((), scores.shape):
            raise InputError(
                f"image_ids have shape {image_ids.shape}, not that of scores, {scores.shape}"
            )
        image = gt.index_images(np.broadcast_to(image_ids, scores.shape), first)
        _require_finite("score", scores, first)
        if self.iou_type == "mask":
            items: Any = masks
            if masks is None or len(masks) != len(scores):
                raise InputError(f"expected {len(scores)} masks, one for each score")
            try:
                sizes = np.array([mask["size"] for mask in masks], float).reshape(-1, 2)
            except (TypeError, LookupError, ValueError):
                raise InputError("masks are not COCO RLE, dicts with `size` and `counts`") from None
            other = np.flatnonzero((sizes != gt.image_sizes[image]).any(1))
            if len(other):
                raise InputError(
                    f"entry {first + other[0]}: mask of size {sizes[other[0]].tolist()} on an "
                    f"image of size {gt.image_sizes[image[other[0]]].tolist()} (height, width; "
                    f"nan: not given in {gt.source})"
                )
        else:
            items = _array(boxes)
            if items.size == 0:
                items = items.reshape(0, 4)
            if items.shape != (len(scores), 4):
                raise InputError(f"boxes have shape {items.shape}, not ({len(scores)}, 4)")
            _require_finite("box", items, first)
            negative = items[:, 2:] < (items[:, :2] if box_format == "xyxy" else 0)
            if negative.any():
                negative = np.flatnonzero(negative.any(1))
                raise InputError(
                    f"entry {first + negative[0]}: box {items[negative[0]].tolist()} has a "
                    f"negative size (read as {box_format.upper()})"
                )
        order = None
        bounds = _run_bounds(image)
        if np.any(np.diff(image[bounds[:-1]]) < 0):
            order = np.argsort(image, kind="stable")
            image = image[order]
            bounds = _run_bounds(image)
        twice = [i for i in image[bounds[:-1]] if self._done[i]]
        if twice:
            raise InputError(f"image {gt.image_ids[twice[0]]} has had its detections already")

        for begin, end in zip(bounds[:-1], bounds[1:]):
            index = slice(begin, end) if order is None else order[begin:end]
            i = image[begin]
            self._done[i] = True
            self._given[i] = end - begin
            score = scores[index].astype(float)
            top = _descending(score)[: self.max_dets]
            if self.iou_type == "mask":
                chosen = np.arange(len(scores))[index][top]
                ious, area = self._mask_ious(i, [items[j] for j in chosen])
            else:
                box = items[index][top].astype(float)
                if box_format == "xyxy":
                    box[:, 2:] -= box[:, :2]
                ious, area = self._box_ious(i, box)
            self._pending.append((i, score[top], area, *self._pairs(i, ious)))
            self._num_pending += len(top)
            if self._num_pending >= BATCH:
                self._match_pending()

    def merge(self, other: "OpenWorldRecall") -> None:
        """
        Add what another object with the same ground truth and settings has collected from other
        images. The result is the same to the last bit as if one object had collected everything.

        Raises:
            InputError: settings differ, or an image was given to both.
        """
        if self._settings() != other._settings():
            raise InputError(
                f"cannot merge different settings: {self._settings()} and {other._settings()}"
            )
        twice = np.flatnonzero(self._done & other._done)
        if len(twice):
            raise InputError(
                f"image {self.ground_truth.image_ids[twice[0]]} has its detections in both results"
            )
        other._match_pending()
        self._match_pending()
        self._own_found()
        np.minimum(self._found, other._found, out=self._found)
        np.maximum(self._found_scores, other._found_scores, out=self._found_scores)
        self._given += other._given
        self._freed += other._freed
        self._num_tied += other._num_tied
        self._done |= other._done
        self._batches += other._batches

    def _settings(self) -> tuple[Any, ...]:
        gt = self.ground_truth
        own = self.protocol, self.iou_type, self.max_dets, self.ks, tuple(self.iou_thresholds)
        return *own, self._with_ap, gt.source, len(gt.image_ids), len(gt.areas), gt.seen_names

    def result(self) -> OpenWorldResult:
        """
        Returns:
            recall of all that was collected so far: zeros where there are no detections, NaN where
            there is no gt to be found.
        """
        self._match_pending()
        found, precision = self._found, np.full(self._found.shape[:3], np.nan)
        if self._with_ap:
            precision = self._average_precision(AP_DETS)
        reported = np.isin(self._matched_at, self.iou_thresholds)
        if reported.all():
            self._is_shared = True
        else:
            found = found[:, :, reported]
        num_dets = np.minimum(self._given, self.max_dets).sum()
        return OpenWorldResult(
            ground_truth=self.ground_truth,
            protocol=self.protocol,
            iou_type=self.iou_type,
            max_dets=self.max_dets,
            ks=self.ks,
            iou_thresholds=self.iou_thresholds,
            counts=self._counts,
            found=found,
            precision=precision[:, :, reported],
            given=self._given.copy(),
            freed=self._freed.copy(),
            tied=self._num_tied / max(1, num_dets),
        )

    def found_scores(self) -> NDArray[np.float64]:
        """
        Returns:
            (G,): the score of the detection that finds each gt at IoU .50 where all objects are
            searched, -inf if none does.
        """
        self._match_pending()
        return self._found_scores.copy()

    def average_precision(self, k: int) -> NDArray[np.float64]:
        """
        Args:
            k: how many detections of an image take part, after removal.

        Returns:
            (V, A, T): class-agnostic COCO AP, NaN where there is no gt to be found.
        """
        self._match_pending()
        reported = np.isin(self._matched_at, self.iou_thresholds)
        return self._average_precision(k)[:, :, reported]

    def _average_precision(self, k):
        ranking = _Ranking(self._batches, k)
        num_gts = self._counts.sum(-1)
        precision = np.full(self._found.shape[:3], np.nan)
        for v, a in np.argwhere(num_gts):
            precision[v, a] = ranking.average_precision(v, a, num_gts[v, a], len(self._matched_at))
        return precision

    def _box_ious(self, image, box):
        """Box IoUs (g, d) of one image, to the last bit pycocotools', and areas (d,)."""
        gt = slice(self.ground_truth.starts[image], self.ground_truth.starts[image + 1])
        x, y, w, h = box.T.copy()
        area = w * h
        if gt.start == gt.stop:
            return np.zeros((0, len(box))), area
        gt_x, gt_y, gt_x2, gt_y2, gt_area = self._gt_sides[:, gt]
        inter = np.minimum(x + w, gt_x2)
        inter -= np.maximum(x, gt_x)
        np.maximum(inter, 0, out=inter)
        height = np.minimum(y + h, gt_y2)
        height -= np.maximum(y, gt_y)
        inter *= height  # below 0 where the height is: reaches no threshold either
        union = area + gt_area
        union -= inter
        crowd = self.ground_truth.crowd[gt]
        if crowd.any():
            union[crowd] = area
        # Boxes without area: NaN, or -inf where they are apart, reaches no threshold.
        with np.errstate(divide="ignore", invalid="ignore"):
            inter /= union
        return inter, area

    def _mask_ious(self, image, masks):
        """Mask IoUs (g, d) of one image and areas (d,)."""
        gt = slice(self.ground_truth.starts[image], self.ground_truth.starts[image + 1])
        # One by one: mask_utils.area fails on lists of more than 255 under NumPy 2.
        area = np.array([mask_utils.area(mask) for mask in masks], float)
        if gt.start == gt.stop:
            return np.zeros((0, len(masks))), area
        crowd = self.ground_truth.crowd[gt].tolist()
        return np.asarray(mask_utils.iou(masks, self.ground_truth.masks[gt], crowd)).T, area

    def _pairs(self, image, ious):
        """
        Args:
            ious (g, d): one image's; detections by descending score.

        Returns:
            gt (P,) in the data set, detection (P,) in the image, IoU (P,), ordered by gt, then
            detection; and (P,) how many of the gt's first candidates can matter to it.
        """
        candidate = ious >= self._least_iou[0]
        flat = np.flatnonzero(candidate)
        if not len(flat):
            return flat, flat, np.zeros(0), flat
        gt, det = np.divmod(flat, ious.shape[1])
        first = self.ground_truth.starts[image]
        # A gt goes to the first of its candidates that does not take another gt, and each gt that
        # shares a candidate with it takes only one of them away. A crowd takes any number.
        shared = candidate.astype(np.float32)
        shared = shared @ shared.T > 0
        limit = shared.sum(1)
        crowd = self.ground_truth.crowd[first : first + len(ious)]
        if crowd.any():
            limit[shared[:, crowd].any(1)] = ious.shape[1]
        return first + gt, det, ious.ravel()[flat], limit[gt]

    def _match_pending(self):
        """Match the detections that wait, all images, thresholds and gts of a group at once."""
        if not self._pending:
            return
        self._own_found()
        images, scores, areas, gts, dets, ious, limits = zip(*self._pending)
        self._pending, self._num_pending = [], 0
        counts = np.array([len(score) for score in scores])
        starts = np.cumsum(counts) - counts
        gt_id, iou, limit = map(np.concatenate, (gts, ious, limits))
        position = np.concatenate(dets) + np.repeat(starts, [len(det) for det in dets])
        area = np.concatenate(areas)
        in_range = (area >= self._area_low) & (area <= self._area_high)
        score = np.concatenate(scores)
        batch = _Batch(np.array(images), counts, starts, score, in_range)

        # From here on detections that are in a pair, and gts, are numbered within the batch.
        in_pair = np.zeros(len(area), bool)
        in_pair[position] = True
        det_at = np.flatnonzero(in_pair)
        det = (np.cumsum(in_pair) - 1)[position]
        image_start = starts[np.searchsorted(starts, det_at, side="right") - 1]
        gt_first = np.diff(gt_id, prepend=-1) != 0
        gt = np.cumsum(gt_first) - 1
        gt_id_of = gt_id[gt_first]
        num_gts, num_dets, num_ious = len(gt_id_of), len(det_at), len(self._matched_at)
        crowd = self.ground_truth.crowd[gt_id]
        free_iou = np.searchsorted(self._matched_at, FREE_IOU)

        # Rows: pairs at a threshold, by threshold, detection, preference: highest IoU, later gt.
        kept = np.zeros((num_ious, len(gt)), bool)
        reach = np.flatnonzero(~crowd)
        for t, least in enumerate(self._least_iou):
            reach = reach[iou[reach] >= least]
            begins = np.flatnonzero(np.diff(gt[reach], prepend=-1))
            place = np.arange(len(reach)) - np.repeat(begins, np.diff(begins, append=len(reach)))
            kept[t, reach[place < limit[reach]]] = True
        pairs = np.flatnonzero(kept.any(0))
        pairs = pairs[np.lexsort((-gt[pairs], -iou[pairs], det[pairs]))]
        row_t, row_pair = np.nonzero(kept[:, pairs])
        row_gt_id = gt_id[pairs][row_pair]
        row_gt = row_t * num_gts + gt[pairs][row_pair]
        row_det = row_t * num_dets + det[pairs][row_pair]

        sizes = num_ious * num_gts, num_ious * num_dets
        crowd_pairs = np.flatnonzero(crowd)
        crowd_pairs = crowd_pairs[np.lexsort((gt[crowd_pairs], iou[crowd_pairs], det[crowd_pairs]))]

        for v, group in enumerate(GROUPS):
            present = self._present[v]
            # Crowds take any number of detections, so each has one crowd that it would take.
            crowds = crowd_pairs[present[gt_id[crowd_pairs]]]
            crowds = crowds[np.diff(det[crowds], append=-1) != 0]
            crowd_iou, crowd_gt = np.zeros(num_dets), np.full(num_dets, -1)
            crowd_iou[det[crowds]], crowd_gt[det[crowds]] = iou[crowds], gt[crowds]
            other_iou, other_gt = crowd_iou[det[pairs]], crowd_gt[det[pairs]]
            prefers_crowd = (other_iou > iou[pairs]) | (
                (other_iou == iou[pairs]) & (other_gt > gt[pairs])
            )
            may_ignore = (present[gt_id[pairs]] & ~prefers_crowd)[row_pair]
            crowd_t, crowd_pair = np.nonzero(iou[crowds] >= self._least_iou[:, None])
            crowd_pair = crowds[crowd_pair]
            crowd_det = crowd_t * num_dets + det[crowd_pair]

            for a in range(len(AREA_RANGES)):
                # A detection takes an ignored gt only if it got no gt that counts, so the ignored
                # ones never change how those that count are matched.
                counts_row = self._counts[v, a, row_gt_id]
                hits = np.flatnonzero(counts_row)
                hits = hits[_match(row_gt[hits], row_det[hits], *sizes)]
                used = np.zeros(num_ious * num_dets, bool)
                used[row_det[hits]] = True
                rest = np.flatnonzero(may_ignore & ~counts_row & ~used[row_det])
                rest = rest[_match(row_gt[rest], row_det[rest], *sizes)]
                used[row_det[rest]] = True
                in_crowd = np.flatnonzero(~used[crowd_det])
                ignored = np.concatenate([row_det[rest], crowd_det[in_crowd]])
                removed = np.zeros(0, np.int64)
                if group == "unseen" and self.protocol == "xclass":
                    ignored_gt = np.concatenate([row_gt_id[rest], gt_id[crowd_pair[in_crowd]]])
                    at_free_iou = ignored // num_dets == free_iou
                    removed = ignored[at_free_iou & self.ground_truth.seen[ignored_gt]]
                    stays = np.ones(num_dets, bool)
                    stays[removed % num_dets] = False
                    removed = det_at[~stays]
                    hits = hits[stays[row_det[hits] % num_dets]]
                    ignored = ignored[stays[ignored % num_dets]]
                hit_t, hit_det = np.divmod(row_det[hits], num_dets)
                at = det_at[hit_det]
                before = np.searchsorted(removed, at)
                before -= np.searchsorted(removed, image_start[hit_det])
                self._found[v, a, hit_t, row_gt_id[hits]] = at - image_start[hit_det] - before
                if group == "all" and a == 0:
                    free = hit_t == free_iou
                    self._found_scores[row_gt_id[hits[free]]] = score[at[free]]
                ignored_t, ignored_det = np.divmod(ignored, num_dets)
                batch.add(v, a, removed, (hit_t, at), (ignored_t, det_at[ignored_det]))
        self._freed[batch.images] = batch.num_removed(GROUPS.index("unseen"), 0)
        self._num_tied += batch.num_tied()
        if self._with_ap:
            self._batches.append(batch)

    def _own_found(self):
        """Before it is written to: a result keeps what it was given."""
        if self._is_shared:
            self._found = self._found.copy()
            self._is_shared = False


def _match(gt, det, num_gts, num_dets):
    """
    Greedy matching, the same as taking the detections one after the other.

    Args:
        gt (R,), det (R,): pairs, ordered by detection (as they take their turns), those of one
            detection by preference.

    Returns:
        (M,): indices of the pairs that are matched.
    """
    head = np.empty(num_gts, np.int64)
    taken = np.zeros(num_gts, bool)
    used = np.zeros(num_dets, bool)
    rows = np.arange(len(gt))
    matched = [rows[:0]]
    while len(rows):
        g, d = gt[rows], det[rows]
        head[g[::-1]] = d[::-1]  # the last one written stays: each gt's first candidate
        # A detection is sure of the gt it prefers if none before it can take that gt.
        sure = (np.diff(d, prepend=-1) != 0) & (head[g] == d)
        matched.append(rows[sure])
        taken[g[sure]] = True
        used[d[sure]] = True
        rows = rows[~(taken[g] | used[d])]
    return np.concatenate(matched)


class _Batch:
    """Detections that were matched together: all that average precision needs of them."""

    def __init__(self, images, counts, starts, scores, in_range):
        """
        Args:
            images (n,), counts (n,), starts (n,): index in the data set, number and first position
                of the detections of each image.
            scores (D,), in_range (A, D): by image, then descending score.
        """
        self.images, self.counts, self.starts = images, counts, starts
        self.scores = scores
        self.in_range = np.packbits(in_range, axis=0)[0]  # (D,), a bit for each area range
        self.events = {}

    def add(self, v, a, removed, hits, ignored):
        """`removed`: positions; `hits`, `ignored`: threshold and position of matched detections."""
        pack = [np.asarray(removed, np.int32)]
        for t, at in (hits, ignored):
            pack += [t.astype(np.int8), at.astype(np.int32)]
        self.events[v, a] = pack

    def num_removed(self, v, a):
        """(n,): how many detections of each image left the ranking."""
        image = np.searchsorted(self.starts, self.events[v, a][0], side="right") - 1
        return np.bincount(image, minlength=len(self.images))

    def most_removed(self):
        """(n,): the largest of these numbers over groups and area ranges."""
        return np.max([self.num_removed(v, a) for v, a in self.events], axis=0)

    def num_tied(self):
        """How many detections have the same score as the one before them in the image."""
        same = np.diff(self.scores, prepend=np.nan) == 0
        same[self.starts] = False
        return np.count_nonzero(same)


class _Ranking:
    """
    All detections of all images in one ranking, as COCO's average precision has it: by descending
    score, ties by image id, then by order within the image.
    """

    def __init__(self, batches, k):
        """`k`: how many detections of an image are ranked, after removal."""
        self.k = k
        images = np.concatenate([np.zeros(0, int)] + [b.images for b in batches])
        # Those that can be among the k: a detection moves up by those that leave the ranking.
        most = [np.minimum(b.counts, k + b.most_removed()) for b in batches]
        counts = np.concatenate([np.zeros(0, int)] + most)
        order = np.argsort(images)
        self.counts = counts[order]
        self.starts = np.cumsum(self.counts) - self.counts
        start_of = np.empty_like(self.starts)
        start_of[order] = self.starts
        size = counts.sum()
        self.scores = np.empty(size)
        self.in_range = np.empty(size, np.uint8)
        self._batches, self._places = batches, []
        done = 0
        for b in batches:
            until = done + len(b.images)
            # Where each position of the batch is in the whole, -1 if it cannot be among the k.
            rank = np.arange(len(b.scores)) - np.repeat(b.starts, b.counts)
            ranked = rank < np.repeat(counts[done:until], b.counts)
            place = np.where(ranked, np.repeat(start_of[done:until], b.counts) + rank, -1)
            self.scores[place[ranked]] = b.scores[ranked]
            self.in_range[place[ranked]] = b.in_range[ranked]
            self._places.append(place.astype(np.int32))
            done = until
        self.order = np.argsort(-self.scores, kind="stable")
        self.place = np.empty(size, np.int32)
        self.place[self.order] = np.arange(size, dtype=np.int32)

    def _events(self, v, a):
        """As :meth:`_Batch.add` was given them, in places of the whole ranking."""
        parts: list[Any] = [[np.zeros(0, int)] * 5]
        for b, place in zip(self._batches, self._places):
            removed, hit_t, hits, ignored_t, ignored = b.events[v, a]
            removed, hits, ignored = place[removed], place[hits], place[ignored]
            parts.append(
                (
                    removed[removed >= 0],
                    hit_t[hits >= 0],
                    hits[hits >= 0],
                    ignored_t[ignored >= 0],
                    ignored[ignored >= 0],
                )
            )
        return tuple(map(np.concatenate, zip(*parts)))

    def average_precision(self, v, a, num_gts, num_thresholds):
        """(T,): COCO's AP, the mean of the precision at recalls 0, .01 ... 1."""
        removed, hit_t, hit_at, ignored_t, ignored_at = self._events(v, a)
        stays = np.ones(len(self.scores), bool)
        stays[removed] = False
        before = np.cumsum(stays, dtype=np.int32) - stays
        stays &= before - np.repeat(before[self.starts], self.counts) < self.k
        in_range = self.in_range & (128 >> a) > 0  # as packbits has it
        # How many detections of the ranking up to each place would count if none was matched.
        counted = np.cumsum((stays & in_range)[self.order], dtype=np.int32)
        result = np.zeros(num_thresholds)
        recalls = np.linspace(0, 1, 101)
        for t in range(num_thresholds):
            hits, ignored = hit_at[hit_t == t], ignored_at[ignored_t == t]
            hits, ignored = hits[stays[hits]], ignored[stays[ignored]]
            if not len(hits):
                continue
            place = np.sort(self.place[hits])
            # A matched detection counts whatever its own area, but not if the gt is ignored.
            more = np.sort(self.place[hits[~in_range[hits]]])
            less = np.sort(self.place[ignored[in_range[ignored]]])
            ranked = (
                counted[place]
                + np.searchsorted(more, place, side="right")
                - np.searchsorted(less, place, side="right")
            )
            true = np.arange(1, len(place) + 1)
            precision = true / (ranked + np.spacing(1))
            precision = np.maximum.accumulate(precision[::-1])[::-1]
            at = np.searchsorted(true / num_gts, recalls, side="left")
            result[t] = np.append(precision, 0.0)[at].mean()
        return result


def _array(values):
    """numpy array of what may be a tensor on any device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":  # which numpy does not have
            values = values.float()
        values = values.numpy()
    return np.asarray(values)


def _run_bounds(values):
    """(R + 1,): where the R runs of equal values begin, and the end of the last."""
    inner = np.flatnonzero(values[1:] != values[:-1]) + 1
    return np.concatenate([[0], inner, [len(values)]]) if len(values) else np.zeros(1, int)


def _descending(scores):
    """Indices that sort by descending score, equal ones in their order."""
    order = np.argsort(-scores)  # much faster than a stable sort
    ranked = scores[order]
    return np.argsort(-scores, kind="stable") if np.any(ranked[1:] == ranked[:-1]) else order


def _require_finite(name, values, first):
    if values.dtype.kind not in "fiub":
        raise InputError(f"{name}: expected numbers, not {values.dtype}")
    if -LARGE < values.min(initial=0) and values.max(initial=0) < LARGE:  # not so NaN
        return
    bad = np.flatnonzero(~(np.abs(values) < LARGE).reshape(len(values), -1).all(1))
    if len(bad):
        raise InputError(
            f"entry {first + bad[0]}: {name} {values[bad[0]].tolist()} is not finite, or too large"
        )
