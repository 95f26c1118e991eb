"""
OLN-Box and OLN-Mask from torchvision's detection parts. Same mathematics (`oln_d2.localization`)
and the same details as the Detectron2 components: equal weights give the same boxes, scores, masks
and losses. OLN-Mask is for inference only.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, box_iou, clip_boxes_to_image, nms, roi_align
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from oln_d2.checks import InputError
from oln_d2.data.images import resized_shape
from oln_d2.localization import (
    aligned_iou,
    anchors_inside,
    check_finite,
    convolve_at,
    decode_ltrb,
    fuse_scores,
    has_area,
    label_and_sample,
    positives,
    predict_scaled,
    quality_entropy,
    quality_loss,
    rpn_losses,
    select_proposals,
)
from oln_d2.masks import MASKS_AT_ONCE, MaskScoreHead, paste_masks
from oln_d2.scores import BOX_SCORE, FUSED, MASK_SCORE, OBJECTNESS, SCORES

"""
Shape shorthand in this module:

    N: number of images in the minibatch
    R: number of anchors of an image, or of RoIs
    G: number of objects of an image

Boxes are XYXY in absolute pixels.
"""

STRIDES = (4, 8, 16, 32, 64)  # of P2..P6
MEAN = (123.675, 116.28, 103.53)  # ImageNet's, RGB, for pixels in [0, 255]
STD = (58.395, 57.12, 57.375)

# Score of an anchor: IoU limits of its sample, and its size. The sample is filled with negatives.
SCORE_IOU_THRESHOLDS = (0.1, 0.3)
SCORE_BATCH_SIZE = 256
BOX_LOSS_WEIGHT = 10.0  # of the first stage

DIVERGED = "training has diverged; lower the learning rate or lengthen its warm-up"


class FrozenNorm(FrozenBatchNorm2d):
    """torchvision's `FrozenBatchNorm2d` that keeps half precision, instead of making it float32."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        scale, shift = (value[:, None, None].to(x.dtype) for value in (scale, shift))
        return x * scale + shift


class Transform(GeneralizedRCNNTransform):
    """
    Resizes, normalises and batches images as Detectron2 does, so that a model sees the same pixels
    in both: images are taken as 8 bit and resized by Pillow's antialiased bilinear filter, before
    they are normalised. (torchvision's own transform normalises first and does not antialias.)

    Args:
        min_size: length of the shorter side, in pixels; of several, training draws one for each
            image and inference takes the last.
        max_size: limit of the longer side, in pixels.
        mean, std: of red, green and blue of the pixels, in [0, 255].
    """

    def __init__(
        self,
        min_size: int | Sequence[int],
        max_size: int,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
    ):
        super().__init__(min_size, max_size, mean, std)
        if not len(mean) == len(std) == 3 or min(std) <= 0:
            raise InputError(
                f"pixel_mean is {mean} and pixel_std is {std}; give three numbers each, those of "
                "pixel_std above 0"
            )
        if min(*self.min_size, max_size) < 1:
            raise InputError(
                f"min_size is {min_size} and max_size {max_size}; both have to be 1 pixel or more"
            )

    def normalize(self, image):
        return image  # torchvision calls this before the resize; too early

    def resize(self, image, target=None):
        """
        Resizes and normalises an image, see :meth:`resized_pixels`, and resizes the boxes of its
        target (`boxes`, shape (G, 4), and maybe `labels`, (G,)); those that lose their area go.
        """
        pixels = self.resized_pixels(image)
        if target is not None:
            old, new = image.shape[-2:], pixels.shape[-2:]
            scale = target["boxes"].new_tensor([new[1] / old[1], new[0] / old[0]]).repeat(2)
            boxes = target["boxes"] * scale
            # Tiny boxes may lose their area by rounding. Those that never had any are an error.
            keep = has_area(boxes) | ~has_area(target["boxes"])
            target["boxes"] = boxes[keep]
            if "labels" in target:
                target["labels"] = target["labels"][keep]
        return super().normalize(pixels), target

    def resized_pixels(self, image: Tensor) -> Tensor:
        """
        Args:
            image: shape (3, H, W), float, RGB, in [0, 1].

        Returns:
            shape (3, H', W'), resized, whole numbers in [0, 255], not yet normalised.

        Raises:
            InputError: not such an image.
        """
        if not image.is_floating_point() or image.shape[0] != 3:
            raise InputError(
                f"an image is a {image.dtype} tensor of shape {list(image.shape)}; it has to be "
                "float, RGB, (3, H, W), in [0, 1]"
            )
        pixels = (image.detach() * 255).round()
        if pixels.numel() == 0 or not (pixels.min() >= 0 and pixels.max() <= 255):
            raise InputError(
                "an image is empty or has values outside [0, 1]; divide 8 bit images by 255"
            )
        old = height, width = image.shape[-2:]
        sizes = self.min_size
        index = int(torch.randint(len(sizes), ())) if self.training and len(sizes) > 1 else -1
        new = resized_shape(height, width, sizes[index], self.max_size)
        if new != old:
            picture = to_pil_image(pixels.to(torch.uint8).cpu())
            picture = picture.resize(new[::-1], Image.Resampling.BILINEAR)
            pixels = pil_to_tensor(picture).to(image)
        return pixels

    def postprocess(self, result, image_shapes, original_image_sizes):
        """
        Scales the detections of each image, `boxes` (D, 4), maybe `masks` (D, M, M) within the
        boxes, and other tensors of length D, to the original image, where boxes without area are
        left out and masks become RLEMasks.
        """
        if self.training:
            return result
        for detections, old, new in zip(result, image_shapes, original_image_sizes):
            boxes = detections["boxes"]
            scale = boxes.new_tensor([new[1] / old[1], new[0] / old[0]]).repeat(2)
            detections["boxes"] = clip_boxes_to_image(boxes * scale, new)
            keep = has_area(detections["boxes"]).nonzero().squeeze(1)
            detections.update({key: value[keep] for key, value in detections.items()})
            if "masks" in detections:
                detections["masks"] = paste_masks(detections["masks"], detections["boxes"], *new)
        return result


class SquareAnchors(detection.anchor_utils.AnchorGenerator):
    """
    One square anchor per cell of a feature map, the cell (i, j) having its centre at (j, i) x
    stride. torchvision's `AnchorGenerator` guesses the stride from sizes and rounds the anchors.

    Args:
        sizes: side of the anchor on each of P2, P3, ..., in pixels.
    """

    def __init__(self, sizes: Sequence[float]):
        super().__init__(tuple((size,) for size in sizes), ((1.0,),) * len(sizes))

    def forward(self, image_list, feature_maps):
        """The same anchors (R, 4) for each image, level by level, row by row."""
        anchors = []
        for (size,), stride, features in zip(self.sizes, STRIDES, feature_maps):
            y, x = (stride * torch.arange(n, device=features.device) for n in features.shape[-2:])
            y, x = torch.meshgrid(y.float(), x.float(), indexing="ij")
            half = size / 2
            anchors.append(
                torch.stack([x - half, y - half, x + half, y + half], dim=-1).view(-1, 4)
            )
        return [torch.cat(anchors)] * len(image_list.image_sizes)


class FloatRPNHead(RPNHead):
    """
    torchvision's `RPNHead`, its two predictions in float32 whatever the features are. Its RPN gives
    proposals, and with them objects, the type of the predictions: in half precision that ties
    scores, moves sides by pixels, and takes thin objects their area.
    """

    def forward(self, x):
        hidden = [self.conv(features) for features in x]
        with torch.autocast(hidden[0].device.type, enabled=False):
            levels = [self._predict(h.float()) for h in hidden]
        return tuple(map(list, zip(*levels)))

    def _predict(self, hidden):
        return self.cls_logits(hidden), self.bbox_pred(hidden)


class StandaloneRPNHead(FloatRPNHead):
    """
    The same, hidden features L2-normalised before the two predictions. `feature_norm`: see
    :class:`OLNBox`.
    """

    def __init__(self, in_channels: int, num_anchors: int, feature_norm: float):
        super().__init__(in_channels, num_anchors)
        self.feature_norm = feature_norm

    def _predict(self, hidden):
        return predict_scaled(hidden, self.feature_norm, [self.cls_logits, self.bbox_pred])

    def at(self, features, image, anchor):
        """
        The predictions at some locations, equal to those of :meth:`forward`, but for rounding: see
        :func:`convolve_at`.

        Args:
            features (list[Tensor]): of each level, (N, C, Hi, Wi).
            image, anchor (Tensor): S indices of images and of their anchors.

        Returns:
            logits, (S,), and distances, (S, 4).
        """
        conv = self.conv[0][0]
        hidden = F.relu(convolve_at(conv.weight, conv.bias, features, image, anchor))
        with torch.autocast(hidden.device.type, enabled=False):
            predicted = self._predict(hidden.float()[..., None, None])
        return tuple(x.flatten(1) for x in predicted)


class StandaloneRPN(detection.rpn.RegionProposalNetwork):
    """
    torchvision's `RegionProposalNetwork` that learns centerness and the distances to the sides of
    the box, with OLN's assignment and losses. A proposal is a box with its centerness. Its argument
    `nms_thresh` may be None, as in the authors' code: no NMS. `negatives`, `boundary_thresh`: see
    :class:`OLNBox`.
    """

    def __init__(self, *args, negatives: bool = True, boundary_thresh: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.negatives, self.boundary_thresh = negatives, boundary_thresh
        self.exported = False  # a graph cannot branch on the number of proposals; it limits them
        limits = self.proposal_matcher.low_threshold, self.proposal_matcher.high_threshold
        sampler = self.fg_bg_sampler
        self.samples = (
            (limits, sampler.batch_size_per_image, sampler.positive_fraction),
            (SCORE_IOU_THRESHOLDS, SCORE_BATCH_SIZE, 1.0),
        )

    def forward(self, images, features, targets=None):
        """
        Args:
            images (ImageList): N.
            features (dict[str, Tensor]): of P2, P3, ..., each (N, C, Hi, Wi).
            targets (list[dict[str, Tensor]]): in training of each image `boxes`, shape (G, 4), in
                all or none also `weights`, shape (G,), how much each object counts.

        Returns:
            list[dict[str, Tensor]]: of each image `boxes`, shape (P, 4), and `objectness`, shape
                (P,), in [0, 1], descending.
            dict[str, Tensor]: the losses `loss_rpn_obj` and `loss_rpn_loc`; {} in inference.
        """
        features = list(features.values())
        # In training all predictions choose proposals, and the gradient comes by a few of them.
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.training):
            logits, ltrb = self.head(features)
        anchors = self.anchor_generator(images, features)[0]
        counts = [level[0].numel() for level in logits]
        logits = torch.cat([level.flatten(1) for level in logits], dim=1)
        ltrb = torch.cat([level.flatten(2).transpose(1, 2) for level in ltrb], dim=1)

        losses = {}
        if self.training:
            labels, gt_boxes, weights = self._label_and_sample(anchors, targets, images.image_sizes)
            sampled = ((labels[0] == 1) | (labels[1] >= 0)).nonzero(as_tuple=True)
            at_logits, at_ltrb = self.head.at(features, *sampled)
            loss_score, loss_boxes, _ = rpn_losses(
                anchors,
                logits.index_put(sampled, at_logits[:, 0]),
                ltrb.index_put(sampled, at_ltrb),
                labels,
                gt_boxes,
                negatives=self.negatives,
                weights=weights,
            )
            losses = {"loss_rpn_obj": loss_score, "loss_rpn_loc": BOX_LOSS_WEIGHT * loss_boxes}
        boxes = decode_ltrb(anchors, ltrb.detach().float())
        logits = logits.detach().float()
        if self.training:
            check_finite(boxes, logits, losses, DIVERGED)
        return self.filter_proposals(boxes, logits, images.image_sizes, counts), losses

    def _label_and_sample(self, anchors, targets, image_sizes):
        """`labels`, `gt_boxes` and `weights` of :func:`rpn_losses`."""
        weights = None
        if "weights" in targets[0]:
            weights = [target["weights"] for target in targets]
        inside = anchors_inside(anchors, image_sizes, self.boundary_thresh)
        gt_boxes = [target["boxes"] for target in targets]
        found = label_and_sample(anchors, inside, gt_boxes, self.samples, gt_weights=weights)
        return [None if of is None else of.transpose(0, 1) for of in found]

    def filter_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level):
        """The proposals of :meth:`forward`, of boxes (N, R, 4), not clipped, and logits (N, R)."""
        device = proposals.device
        levels = [torch.full((n,), i, device=device) for i, n in enumerate(num_anchors_per_level)]
        levels = torch.cat(levels)
        best = self._get_top_n_idx(objectness, num_anchors_per_level)
        top_n, iou = self.post_nms_top_n(), self.nms_thresh
        nms_by_level = None if iou is None else partial(_nms_by_level, iou_threshold=iou)
        ret = []
        for boxes, logits, i, shape in zip(proposals, objectness, best, image_shapes):
            boxes, logits = select_proposals(
                boxes[i],
                logits[i],
                levels[i],
                shape,
                top_n,
                nms=nms_by_level,
                copies_last=not (self.training or self.exported),
            )
            ret.append({"boxes": boxes, OBJECTNESS.attribute: logits.sigmoid()})
        return ret


def _nms_by_level(boxes, logits, levels, iou_threshold):
    """
    torchvision's `batched_nms` for descending logits; that one branches on their number, which an
    export does not know.
    """
    keep = []
    for level in range(len(STRIDES)):
        index = (levels == level).nonzero().squeeze(1)
        keep.append(index[nms(boxes[index], logits[index], iou_threshold)])
    return torch.cat(keep).sort().values


class RoIAlign(nn.Module):
    """
    Features of each RoI from one of P2..P5, chosen by its size. As in Detectron2, unlike in
    torchvision's `MultiScaleRoIAlign`: aligned to pixel centres, and strides are not guessed from
    sizes.

    Args:
        size: P, side of an RoI's features.
        sampling_ratio: see `box_sampling_ratio` of :class:`OLNBox`.
    """

    def __init__(self, size: int, sampling_ratio: int = 0):
        super().__init__()
        self.output_size = size, size
        self.sampling_ratio = sampling_ratio

    def forward(self, features, boxes):
        """
        Args:
            features (list[Tensor]): of P2..P5, each (N, C, Hi, Wi).
            boxes (list[Tensor]): the RoIs of each image, (R, 4).

        Returns:
            Tensor: shape (R, C, P, P), R combined over the images.
        """
        sides = torch.cat(boxes)[:, 2:] - torch.cat(boxes)[:, :2]
        # FPN, eq. 1: an RoI of 224 px is pooled from P4, which has index 2 here.
        level = torch.floor(4 + torch.log2(sides.prod(dim=1).sqrt() / 224 + 1e-8)) - 2
        level = level.clamp(0, len(features) - 1)
        image = torch.cat([torch.full_like(b[:, :1], n) for n, b in enumerate(boxes)])
        rois = torch.cat([image, torch.cat(boxes)], dim=1)
        # In float32: half precision moves RoIs by pixels.
        pooled = rois.new_zeros(rois.shape[0], features[0].shape[1], *self.output_size)
        for i, (feature, stride) in enumerate(zip(features, STRIDES)):
            index = (level == i).nonzero().squeeze(1)
            at_level = roi_align(
                feature.float(),
                rois[index],
                self.output_size,
                1 / stride,
                self.sampling_ratio,
                aligned=True,
            )
            pooled.index_put_((index,), at_level)  # in place: each copy is as large as all RoIs
        return pooled


class OLNPredictor(nn.Module):
    """Two linear layers: one score and class-agnostic box deltas per RoI."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.box_score = nn.Linear(in_channels, 1)
        self.bbox_pred = nn.Linear(in_channels, 4)
        for layer, std in ((self.box_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        """Features, (R, C), to logits of the scores, (R,), and box deltas, (R, 4)."""
        return self.box_score(x)[:, 0].float(), self.bbox_pred(x).float()


class StandaloneRoIHeads(detection.roi_heads.RoIHeads):
    """
    torchvision's `RoIHeads` that learn the IoU of an RoI, no class, and one of its mask.
    `score_negatives`, `fused`: see :class:`OLNBox`.
    """

    def __init__(
        self,
        *args,
        score_negatives: bool = False,
        fused: Sequence[str] = FUSED,
        mask_score: MaskScoreHead | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.score_negatives = score_negatives
        self.fused = fused
        self.mask_score = mask_score

    def forward(self, features, proposals, image_shapes, targets=None):
        """
        Args:
            features, targets: see :class:`StandaloneRPN`, which makes the proposals.
            image_shapes (list[tuple]): N heights and widths before padding.

        Returns:
            list[dict[str, Tensor]]: for each image what :class:`OLNBox` says, but as the model sees
                it, with `masks` within the boxes, shape (D, M, M); [] in training.
            dict[str, Tensor]: `loss_box_score` and `loss_box_reg`; {} in inference.
        """
        boxes = [p["boxes"] for p in proposals]
        if self.training:
            if self.has_mask():
                raise InputError("OLN-Mask is trained with train_net.py; here it only runs")
            gt_boxes = [target["boxes"] for target in targets]
            gt_weights = [target.get("weights") for target in targets]
            targets = [{"boxes": b, "labels": torch.ones_like(b[:, 0]).long()} for b in gt_boxes]
            boxes, matches, labels, deltas = self.select_training_samples(boxes, targets)
            num_rois = max(sum(map(len, boxes)), 1)
            if self.score_negatives:
                # As indices, found once: each choice by bools makes the CPU wait for the GPU.
                positive = (torch.cat(labels) > 0).nonzero().squeeze(1)
            else:  # negatives teach nothing, so nothing is computed for them
                own = positives([label > 0 for label in labels])
                boxes, matches, deltas = (
                    [value[index] for value, index in zip(values, own)]
                    for values in (boxes, matches, deltas)
                )
                positive = slice(None)
        levels = list(features.values())[:4]
        pooled = self.box_roi_pool(levels, boxes)
        scores, pred_deltas = self.box_predictor(self.box_head(pooled))
        if not self.training:
            counts = [b.shape[0] for b in boxes]  # a trace takes what len() returns for a constant
            refined = self.box_coder.decode_single(pred_deltas, torch.cat(boxes)).split(counts)
            per_image = zip(proposals, refined, scores.sigmoid().split(counts), image_shapes)
            results = [self._detections(*image) for image in per_image]
            if self.has_mask():
                for n, detections in enumerate(results):
                    self._add_masks([level[n : n + 1] for level in levels], detections)
            kept = slice(self.detections_per_img)
            return [{name: v[kept] for name, v in result.items()} for result in results], {}

        # An image without objects gets a row that is none: all its matches are 0.
        padded = [F.pad(gt, (0, 0, 0, 1)) for gt in gt_boxes]
        # Of the RoI as it came, not as the deltas refine it.
        weights = None
        if self.score_negatives:  # here torchvision matches negatives with the first object
            iou, matches = zip(*(box_iou(b, gt).max(dim=1) for b, gt in zip(boxes, padded)))
            iou = torch.cat(iou)
        else:
            matched = torch.cat([gt[match] for gt, match in zip(padded, matches)])[positive]
            iou = aligned_iou(torch.cat(boxes)[positive], matched)
        if gt_weights[0] is not None:
            padded = [F.pad(weights, (0, 1), value=1) for weights in gt_weights]
            weights = torch.cat([own[match] for own, match in zip(padded, matches)])
        if self.score_negatives:
            own = None if weights is None else weights.where(iou > 0, 1)
            loss_score = quality_entropy(scores, iou, own)
        else:
            own = None if weights is None else weights[positive]
            loss_score = quality_loss(scores[positive], iou, own)
        loss_deltas = (pred_deltas[positive] - torch.cat(deltas)[positive]).abs()
        if weights is not None:
            loss_deltas = loss_deltas * weights[positive, None]
        # Divided by all sampled RoIs, so that each positive has the same influence in every batch.
        return [], {
            "loss_box_score": loss_score / num_rois,
            "loss_box_reg": loss_deltas.sum() / num_rois,
        }

    def _detections(self, proposals, boxes, iou, image_shape):
        """What NMS leaves of the refined `boxes` (P, 4) of an image, with predicted `iou` (P,)."""
        qualities = {OBJECTNESS.field: proposals[OBJECTNESS.attribute], BOX_SCORE.field: iou}
        scores = fuse_scores(*(qualities[name] for name in self.fused))
        finite = boxes.isfinite().all(dim=1) & (scores > self.score_thresh)
        detections = {
            "boxes": clip_boxes_to_image(boxes, image_shape),
            "scores": scores,
            OBJECTNESS.attribute: proposals[OBJECTNESS.attribute],
            BOX_SCORE.attribute: iou,
        }
        finite = finite.nonzero().squeeze(1)
        detections = {name: value[finite] for name, value in detections.items()}
        keep = nms(detections["boxes"], detections["scores"], self.nms_thresh)
        return {name: value[keep] for name, value in detections.items()}

    def _add_masks(self, features, detections):
        """All that NMS leaves get a mask, whose score helps to decide which are kept."""
        masks, scores = [], []
        for boxes in detections["boxes"].split(MASKS_AT_ONCE):
            pooled = self.mask_roi_pool(features, [boxes])
            mask = self.mask_predictor(self.mask_head(pooled)).float().sigmoid()
            scores.append(self.mask_score(pooled, mask).float().sigmoid())
            masks.append(mask[:, 0])
        detections.update({"masks": torch.cat(masks), MASK_SCORE.attribute: torch.cat(scores)})
        detections["scores"] = fuse_scores(*(detections[score.attribute] for score in SCORES))
        order = detections["scores"].argsort(descending=True, stable=True)
        detections.update({name: value[order] for name, value in detections.items()})


class OLNBox(detection.generalized_rcnn.GeneralizedRCNN):
    """
    OLN-Box, the open-world object detector. It finds objects of any category and gives each box one
    score, how well it fits; there are no labels.

    In inference it expects a list of images, each a float tensor (3, H, W), RGB, in [0, 1], which
    may differ in size, and returns for each image a dict with

        - boxes (FloatTensor[D, 4]): XYXY in pixels of the image, descending by score
        - scores (FloatTensor[D]): in [0, 1], the geometric mean of the next two
        - objectness (FloatTensor[D]): centerness, as the first stage predicts it
        - box_scores (FloatTensor[D]): IoU of box and object, as the second stage predicts it

    OLN-Mask (`build_detector("oln_mask")`) adds, and makes `scores` of all three,

        - masks (RLEMasks): D masks, kept as COCO RLE, see :class:`oln_d2.masks.RLEMasks`
        - mask_scores (FloatTensor[D]): IoU of mask and object, as the mask head predicts it

    In training it also expects for each image a dict with

        - boxes (FloatTensor[G, 4]): XYXY of the annotated objects, x1 < x2, y1 < y2; G may be 0

    and returns a dict of the four losses: `loss_rpn_obj`, `loss_rpn_loc`, `loss_box_score`,
    `loss_box_reg`.

    Args:
        backbone: yields an ordered dict of feature maps of strides 4, 8, 16, ... and has
            `out_channels`, as torchvision's `BackboneWithFPN`.
        anchor_sizes: side of the square anchor on each of P2, P3, ..., in pixels of the resized
            image. Default: 8 x stride.
        min_size, max_size: limits of the shorter and the longer side of an image as the model sees
            it, in pixels. Of several min_size training draws one, inference takes the last.
        pixel_mean, pixel_std: of red, green and blue, in [0, 255], that the backbone was trained
            with. Default: ImageNet's.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test: proposals of each level.
        rpn_post_nms_top_n_test: proposals of an image in inference, of all levels; fewer take less
            time and find a little less; near copies of a better one are left out first. None, as in
            the authors' code: all.
        rpn_nms_thresh: IoU of the NMS of the proposals, None for none.
        rpn_boundary_thresh: anchors that reach beyond the image by more pixels do not train; -1:
            all train. 0, as in the authors' code, leaves large objects of small images few anchors.
        objectness_negatives: whether anchors on no annotated object teach the first score, with
            target 0, as in the authors' code. Without, and without `box_score_negatives`, an object
            that lacks its annotation is never taken for background.
        box_score_negatives: whether sampled RoIs on no object teach the second score, too: it then
            learns the IoU of every RoI with the object that it overlaps most, by cross-entropy
            instead of L1. Not so in the paper; ranks better where most of what the images show is
            annotated.
        ltrb_init: distances to the four sides that are predicted at the start of training, in
            widths and heights of the anchor. 0, as in the authors' code: boxes without area. Short
            schedules from scratch want 0.5, where the first boxes are the anchors.
        rpn_feature_norm: length that the first stage's hidden features of a location are brought to
            before it predicts from them. 1, as in the authors' code, is so small that the
            predictors take thousands of iterations to leave their start. With F, they learn as at
            F * F times the rate: short schedules want 4.
        scores: whose geometric mean is the score of a detection: "objectness", the first stage's,
            "box_score", the second's, or both, as in the paper. Not of OLN-Mask, which takes all.
        representation_size: width of the two layers of the second stage.
        box_sampling_ratio: along each side of a bin of an RoI so many points are averaged. 0, as in
            the authors' code: one for each location of the feature map that the bin spans, mostly
            2 to 4. 2, as in torchvision's detectors, takes less time, 1, as in the shipped model,
            less still.
        box_batch_size_per_image: RoIs sampled per image in training.
        box_nms_thresh: IoU of the NMS of the detections.
        box_detections_per_img: at most so many detections of an image.
        mask_parts: the mask arguments of :class:`StandaloneRoIHeads`, for OLN-Mask.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        pixel_mean: Sequence[float] = MEAN,
        pixel_std: Sequence[float] = STD,
        rpn_pre_nms_top_n_train: int = 2000,
        rpn_pre_nms_top_n_test: int = 2000,
        rpn_post_nms_top_n_test: int | None = None,
        rpn_nms_thresh: float | None = None,
        rpn_boundary_thresh: int = 0,
        objectness_negatives: bool = True,
        box_score_negatives: bool = False,
        ltrb_init: float = 0.0,
        rpn_feature_norm: float = 1.0,
        scores: Sequence[str] = FUSED,
        representation_size: int = 1024,
        box_sampling_ratio: int = 0,
        box_batch_size_per_image: int = 512,
        box_nms_thresh: float = 0.7,
        box_detections_per_img: int = 1500,
        mask_parts: dict[str, nn.Module] | None = None,
    ):
        channels = backbone.out_channels
        top_n = {"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test}
        kept = {mode: n * len(anchor_sizes) for mode, n in top_n.items()}  # all
        if rpn_post_nms_top_n_test is not None:
            kept["testing"] = rpn_post_nms_top_n_test
        rpn_head = StandaloneRPNHead(channels, 1, rpn_feature_norm)
        nn.init.constant_(rpn_head.bbox_pred.bias, ltrb_init)
        rpn = StandaloneRPN(
            SquareAnchors(anchor_sizes),
            rpn_head,
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=top_n,
            post_nms_top_n=kept,
            nms_thresh=rpn_nms_thresh,
            negatives=objectness_negatives,
            boundary_thresh=rpn_boundary_thresh,
        )
        box_head = TwoMLPHead(channels * 7 * 7, representation_size)
        for layer in (box_head.fc6, box_head.fc7):  # as Detectron2 does
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        roi_heads = StandaloneRoIHeads(
            RoIAlign(7, box_sampling_ratio),
            box_head,
            OLNPredictor(representation_size),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=box_batch_size_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
            score_thresh=0.0,
            nms_thresh=box_nms_thresh,
            detections_per_img=box_detections_per_img,
            score_negatives=box_score_negatives,
            fused=scores,
            **(mask_parts or {}),
        )
        transform = Transform(min_size, max_size, pixel_mean, pixel_std)
        super().__init__(backbone, rpn, roi_heads, transform)


def prepare(model: nn.Module, pixels: Sequence[Tensor]) -> ImageList:
    """
    Normalise and batch images that are resized already.

    Args:
        model: made by :func:`build_detector`.
        pixels: N images, each (3, H', W'), uint8, RGB; moved to the model's device.
    """
    transform, device = model.transform, next(model.parameters()).device
    # Once a batch: each makes a GPU wait.
    mean, std = (
        torch.tensor(values, device=device)[:, None, None]
        for values in (transform.image_mean, transform.image_std)
    )
    tensors = [(image.to(device).float() - mean) / std for image in pixels]
    batch = transform.batch_images(tensors, transform.size_divisible)
    return ImageList(batch, [(image.shape[1], image.shape[2]) for image in pixels])


def training_losses(
    model: nn.Module, pixels: Sequence[Tensor], targets: Sequence[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """
    The losses of :class:`OLNBox` in training, of images that are resized already.

    Args:
        model, pixels: see :func:`prepare`.
        targets: of each image `boxes`, shape (G, 4), in pixels of the resized image, all with an
            area, and `labels`, shape (G,), all 1.
    """
    images = prepare(model, pixels)
    features = model.backbone(images.tensors)
    proposals, rpn_losses = model.rpn(images, features, targets)
    _, roi_losses = model.roi_heads(features, proposals, images.image_sizes, targets)
    return {**roi_losses, **rpn_losses}


@torch.no_grad()
def detect(
    model: nn.Module, pixels: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Tensor]]:
    """
    Run a detector on images that are resized already, as its `transform` would.

    Args:
        model: made by :func:`build_detector`, in inference mode.
        pixels: N images, each (3, H', W'), uint8, RGB; moved to the model's device.
        sizes: N heights and widths of the images before, which the boxes and masks are for.

    Returns:
        N dicts, see :class:`OLNBox`.
    """
    images = prepare(model, pixels)
    features = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, features)
    found, _ = model.roi_heads(features, proposals, images.image_sizes)
    return model.transform.postprocess(found, images.image_sizes, sizes)
