"""
OLN-Box and OLN-Mask from torchvision's detection parts. Same mathematics (`oln_d2.localization`)
and the same details as the Detectron2 components: equal weights give the same boxes, scores, masks
and losses. OLN-Mask is for inference only.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, ResNet50_Weights, detection, get_model
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock
from torchvision.ops import (
    FrozenBatchNorm2d,
    batched_nms,
    box_iou,
    clip_boxes_to_image,
    nms,
    roi_align,
)
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from oln_d2.errors import InputError
from oln_d2.localization import (
    aligned_iou,
    assign_anchors,
    decode_ltrb,
    fuse_scores,
    quality_loss,
    rpn_losses,
)
from oln_d2.masks import MASKS_AT_ONCE, MaskScoreHead, paste_masks

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
NORMS = {"FrozenBN": FrozenBatchNorm2d, "GN": partial(nn.GroupNorm, 32)}

# Score of an anchor: IoU limits of its sample, and its size. The sample is filled with negatives.
SCORE_IOU_THRESHOLDS = (0.1, 0.3)
SCORE_BATCH_SIZE = 256
BOX_LOSS_WEIGHT = 10.0  # of the first stage

DIVERGED = "training has diverged; lower the learning rate or lengthen its warm-up"


class Transform(GeneralizedRCNNTransform):
    """
    Resizes, normalises and batches images as Detectron2 does, so that a model sees the same pixels
    in both: images are taken as 8 bit and resized by Pillow's antialiased bilinear filter, before
    they are normalised. (torchvision's own transform normalises first and does not antialias.)

    Args:
        min_size (int or tuple[int]): length of the shorter side, in pixels; of several, training
            draws one for each image and inference takes the last.
        max_size (int): limit of the longer side, in pixels.
    """

    def __init__(self, min_size, max_size):
        super().__init__(min_size, max_size, MEAN, STD)
        if min(*self.min_size, max_size) < 1:
            raise InputError(
                f"min_size is {min_size} and max_size {max_size}; both have to be 1 pixel or more"
            )

    def normalize(self, image):
        return image  # torchvision calls this before the resize; too early

    def resize(self, image, target=None):
        pixels = self.resized_pixels(image)
        if target is not None:
            old, new = image.shape[-2:], pixels.shape[-2:]
            scale = target["boxes"].new_tensor([new[1] / old[1], new[0] / old[0]]).repeat(2)
            boxes = target["boxes"] * scale
            # Tiny boxes may lose their area by rounding. Those that never had any are an error.
            keep = _has_area(boxes) | ~_has_area(target["boxes"])
            target["boxes"] = boxes[keep]
            if "labels" in target:
                target["labels"] = target["labels"][keep]
        return super().normalize(pixels), target

    def resized_pixels(self, image):
        """
        Args:
            image (Tensor): shape (3, H, W), float, RGB, in [0, 1].

        Returns:
            Tensor: shape (3, H', W'), resized, whole numbers in [0, 255], not yet normalised.

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
        if self.training:
            return result
        for detections, old, new in zip(result, image_shapes, original_image_sizes):
            boxes = detections["boxes"]
            scale = boxes.new_tensor([new[1] / old[1], new[0] / old[0]]).repeat(2)
            detections["boxes"] = clip_boxes_to_image(boxes * scale, new)
            keep = _has_area(detections["boxes"])
            detections.update({key: value[keep] for key, value in detections.items()})
            if "masks" in detections:
                detections["masks"] = paste_masks(detections["masks"], detections["boxes"], *new)
        return result


def resized_shape(height, width, min_size, max_size):
    """Height and width after Detectron2's `ResizeShortestEdge`."""
    new = [float(min_size), float(min_size)]
    longer = 0 if height >= width else 1
    new[longer] = min_size / min(height, width) * max(height, width)
    if new[longer] > max_size:
        scale = max_size / new[longer]
        new = [side * scale for side in new]
    return max(int(new[0] + 0.5), 1), max(int(new[1] + 0.5), 1)


class SquareAnchors(detection.anchor_utils.AnchorGenerator):
    """
    One square anchor per cell of a feature map, the cell (i, j) having its centre at (j, i) x
    stride. torchvision's `AnchorGenerator` guesses the stride from sizes and rounds the anchors.

    Args:
        sizes (list[float]): side of the anchor on each of P2, P3, ..., in pixels.
    """

    def __init__(self, sizes):
        super().__init__(tuple((size,) for size in sizes), ((1.0,),) * len(sizes))

    def forward(self, image_list, feature_maps):
        """
        Returns:
            list[Tensor]: N times the same, shape (R, 4), row by row, level by level.
        """
        anchors = []
        for (size,), stride, features in zip(self.sizes, STRIDES, feature_maps):
            y, x = (stride * torch.arange(n, device=features.device) for n in features.shape[-2:])
            y, x = torch.meshgrid(y.float(), x.float(), indexing="ij")
            half = size / 2
            anchors.append(
                torch.stack([x - half, y - half, x + half, y + half], dim=-1).view(-1, 4)
            )
        return [torch.cat(anchors)] * len(image_list.image_sizes)


class OLNRPNHead(RPNHead):
    """
    torchvision's `RPNHead` whose hidden features are L2-normalised before the two predictions.
    """

    def forward(self, x):
        hidden = [F.normalize(self.conv(features), dim=1) for features in x]
        return [self.cls_logits(h) for h in hidden], [self.bbox_pred(h) for h in hidden]


class OLNRPN(detection.rpn.RegionProposalNetwork):
    """
    torchvision's `RegionProposalNetwork` that learns centerness and the distances to the sides of
    the box, with OLN's assignment and losses. A proposal is a box with its centerness.

    Args:
        nms_thresh (float, optional): IoU above which the weaker of two proposals of a level is
            dropped; None, as in the authors' code: no NMS.
        Others: see `RegionProposalNetwork`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.score_sampler = type(self.fg_bg_sampler)(SCORE_BATCH_SIZE, 1.0)
        self.box_iou_thresholds = (
            self.proposal_matcher.low_threshold,
            self.proposal_matcher.high_threshold,
        )

    def forward(self, images, features, targets=None):
        """
        Returns:
            list[dict[str, Tensor]]: for each image `boxes` and `centerness`, descending.
            dict[str, Tensor]: the losses `loss_rpn_obj` and `loss_rpn_loc`; {} in inference.
        """
        features = list(features.values())
        logits, ltrb = self.head(features)
        anchors = self.anchor_generator(images, features)[0]
        counts = [level[0].numel() for level in logits]
        logits = torch.cat([level.flatten(1) for level in logits], dim=1)
        ltrb = torch.cat([level.flatten(2).transpose(1, 2) for level in ltrb], dim=1)

        losses = {}
        if self.training:
            labels, gt_boxes = self.label_and_sample(anchors, targets, images.image_sizes)
            loss_score, loss_boxes, _ = rpn_losses(anchors, logits, ltrb, labels, gt_boxes)
            losses = {"loss_rpn_obj": loss_score, "loss_rpn_loc": BOX_LOSS_WEIGHT * loss_boxes}
        boxes = decode_ltrb(anchors, ltrb.detach().float())
        logits = logits.detach().float()
        return self.filter_proposals(boxes, logits, images.image_sizes, counts), losses

    @torch.no_grad()
    def label_and_sample(self, anchors, targets, image_sizes):
        """
        Returns:
            (Tensor, Tensor): `labels` and `gt_boxes` of :func:`oln_d2.localization.rpn_losses`.
        """
        samples = (
            (self.box_iou_thresholds, self.fg_bg_sampler),
            (SCORE_IOU_THRESHOLDS, self.score_sampler),
        )
        shape = 2, len(targets), len(anchors)
        labels = torch.full(shape, -1, dtype=torch.int8, device=anchors.device)
        gt_boxes = anchors.new_zeros(*shape, 4)
        for n, (target, (height, width)) in enumerate(zip(targets, image_sizes)):
            x1, y1, x2, y2 = anchors.unbind(dim=1)
            inside = ((x1 >= 0) & (y1 >= 0) & (x2 < width) & (y2 < height)).nonzero().squeeze(1)
            iou = box_iou(target["boxes"], anchors[inside])
            for sample, (thresholds, sampler) in enumerate(samples):
                matches, assigned = assign_anchors(iou, *thresholds)
                (positive,), (negative,) = sampler([assigned])
                positive, negative = positive.bool(), negative.bool()
                labels[sample, n, inside[positive]] = 1
                labels[sample, n, inside[negative]] = 0
                gt_boxes[sample, n, inside[positive]] = target["boxes"][matches[positive]]
        return labels, gt_boxes

    def filter_proposals(self, proposals, objectness, image_shapes, num_anchors_per_level):
        levels = [torch.full((n,), i) for i, n in enumerate(num_anchors_per_level)]
        levels = torch.cat(levels).to(proposals.device)
        best = self._get_top_n_idx(objectness, num_anchors_per_level)
        ret = []
        for boxes, logits, index, shape in zip(proposals, objectness, best, image_shapes):
            logits, order = logits[index].sort(descending=True, stable=True)
            boxes, level = boxes[index][order], levels[index][order]
            finite = boxes.isfinite().all(dim=1) & logits.isfinite()
            if self.training and not finite.all():
                raise FloatingPointError(
                    f"The RPN predicts NaN or infinite boxes or scores: {DIVERGED}"
                )
            boxes = clip_boxes_to_image(boxes, shape)
            keep = (finite & _has_area(boxes)).nonzero().squeeze(1)
            if self.nms_thresh is not None:
                keep = keep[batched_nms(boxes[keep], logits[keep], level[keep], self.nms_thresh)]
            keep = keep[: self.post_nms_top_n()]
            ret.append({"boxes": boxes[keep], "centerness": logits[keep].sigmoid()})
        return ret


class RoIAlign(nn.Module):
    """
    Features of each RoI from one of P2..P5, chosen by its size. As in Detectron2, unlike in
    torchvision's `MultiScaleRoIAlign`: aligned to pixel centres, and strides are not guessed from
    sizes.

    Args:
        size (int): P, side of an RoI's features.
    """

    def __init__(self, size):
        super().__init__()
        self.output_size = size, size

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
                sampling_ratio=0,
                aligned=True,
            )
            pooled = pooled.index_put((index,), at_level)
        return pooled


class OLNPredictor(nn.Module):
    """Two linear layers: one score and class-agnostic box deltas per RoI."""

    def __init__(self, in_channels):
        super().__init__()
        self.box_score = nn.Linear(in_channels, 1)
        self.bbox_pred = nn.Linear(in_channels, 4)
        for layer, std in ((self.box_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.box_score(x)[:, 0].float(), self.bbox_pred(x).float()


class OLNRoIHeads(detection.roi_heads.RoIHeads):
    """
    torchvision's `RoIHeads` that learn the IoU of an RoI instead of a class.

    Args:
        mask_score (MaskScoreHead, optional): beside the mask parts of `RoIHeads`.
        Others: see `RoIHeads`.
    """

    def __init__(self, *args, mask_score=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.mask_score = mask_score

    def forward(self, features, proposals, image_shapes, targets=None):
        """
        Args:
            proposals (list[dict[str, Tensor]]): for each image `boxes` and `centerness`.
            Others: see `RoIHeads`.

        Returns:
            list[dict[str, Tensor]]: for each image what :class:`OLNBox` says; [] in training.
            dict[str, Tensor]: `loss_box_score` and `loss_box_reg`; {} in inference.
        """
        boxes = [p["boxes"] for p in proposals]
        if self.training:
            targets = [
                {
                    "boxes": t["boxes"],
                    "labels": t["boxes"].new_ones(len(t["boxes"]), dtype=torch.int64),
                }
                for t in targets
            ]
            if self.has_mask():
                raise InputError("OLN-Mask is trained with train_net.py; here it only runs")
            boxes, matches, labels, deltas = self.select_training_samples(boxes, targets)
        pooled = self.box_roi_pool(list(features.values())[:4], boxes)
        scores, pred_deltas = self.box_predictor(self.box_head(pooled))
        if not self.training:
            counts = [b.shape[0] for b in boxes]  # a trace takes what len() returns for a constant
            refined = self.box_coder.decode_single(pred_deltas, torch.cat(boxes)).split(counts)
            per_image = zip(proposals, refined, scores.sigmoid().split(counts), image_shapes)
            results = [self._detections(*image) for image in per_image]
            if self.has_mask():
                levels = list(features.values())[:4]
                for n, detections in enumerate(results):
                    self._add_masks([level[n : n + 1] for level in levels], detections)
            kept = slice(self.detections_per_img)
            return [{name: v[kept] for name, v in result.items()} for result in results], {}

        positive = torch.cat(labels) > 0
        gt_boxes = torch.cat([t["boxes"][m[n > 0]] for t, m, n in zip(targets, matches, labels)])
        # Of the RoI as it came, not as the deltas refine it.
        iou = aligned_iou(torch.cat(boxes)[positive], gt_boxes)
        deltas = torch.cat(deltas)[positive]
        # Divided by all sampled RoIs, so that each positive has the same influence in every batch.
        num_rois = max(len(positive), 1)
        return [], {
            "loss_box_score": quality_loss(scores[positive], iou) / num_rois,
            "loss_box_reg": (pred_deltas[positive] - deltas).abs().sum() / num_rois,
        }

    def _detections(self, proposals, boxes, iou, image_shape):
        scores = fuse_scores(proposals["centerness"], iou)
        finite = boxes.isfinite().all(dim=1) & (scores > self.score_thresh)
        detections = {
            "boxes": clip_boxes_to_image(boxes, image_shape),
            "scores": scores,
            "objectness": proposals["centerness"],
            "box_scores": iou,
        }
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
        detections["masks"], detections["mask_scores"] = torch.cat(masks), torch.cat(scores)
        qualities = (detections[name] for name in ("objectness", "box_scores", "mask_scores"))
        detections["scores"] = fuse_scores(*qualities)
        order = detections["scores"].argsort(descending=True, stable=True)
        detections.update({name: value[order] for name, value in detections.items()})


def _has_area(boxes):
    return (boxes[:, 2:] > boxes[:, :2]).all(dim=1)


class OLNBox(detection.generalized_rcnn.GeneralizedRCNN):
    """
    OLN-Box, the open-world object detector. It finds objects of any category and gives each box one
    score, which tells how well the box fits; there are no labels.

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
        backbone (nn.Module): yields an ordered dict of feature maps of strides 4, 8, 16, ... and
            has `out_channels`, as torchvision's `BackboneWithFPN`.
        anchor_sizes (list[float]): side of the square anchor on each of P2, P3, ..., in pixels of
            the resized image. Default: 8 x stride.
        min_size (int or tuple[int]), max_size (int): limits of the shorter and the longer side of
            an image as the model sees it, in pixels. Of several min_size training draws one.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test (int): proposals of each level.
        rpn_nms_thresh (float, optional): IoU of the NMS of the proposals, None for none.
        ltrb_init (float): distances to the four sides that are predicted at the start of training,
            in widths and heights of the anchor. 0, as in the authors' code: boxes without area.
            Short schedules from scratch want 0.5, where the first boxes are the anchors.
        representation_size (int): width of the two layers of the second stage.
        box_batch_size_per_image (int): RoIs sampled per image in training.
        box_nms_thresh (float): IoU of the NMS of the detections.
        box_detections_per_img (int): at most so many detections of an image.
        mask_parts (dict[str, nn.Module], optional): the mask arguments of :class:`OLNRoIHeads`.
    """

    def __init__(
        self,
        backbone,
        *,
        anchor_sizes=(32, 64, 128, 256, 512),
        min_size=800,
        max_size=1333,
        rpn_pre_nms_top_n_train=2000,
        rpn_pre_nms_top_n_test=2000,
        rpn_nms_thresh=None,
        ltrb_init=0.0,
        representation_size=1024,
        box_batch_size_per_image=512,
        box_nms_thresh=0.7,
        box_detections_per_img=1500,
        mask_parts=None,
    ):
        channels = backbone.out_channels
        top_n = {"training": rpn_pre_nms_top_n_train, "testing": rpn_pre_nms_top_n_test}
        rpn_head = OLNRPNHead(channels, 1)
        nn.init.constant_(rpn_head.bbox_pred.bias, ltrb_init)
        rpn = OLNRPN(
            SquareAnchors(anchor_sizes),
            rpn_head,
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=top_n,
            post_nms_top_n={mode: n * len(anchor_sizes) for mode, n in top_n.items()},  # all
            nms_thresh=rpn_nms_thresh,
        )
        box_head = TwoMLPHead(channels * 7 * 7, representation_size)
        for layer in (box_head.fc6, box_head.fc7):  # as Detectron2 does
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        roi_heads = OLNRoIHeads(
            RoIAlign(7),
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
            **(mask_parts or {}),
        )
        super().__init__(backbone, rpn, roi_heads, Transform(min_size, max_size))


def _oln_mask(backbone, *, norm, mask_channels=256, representation_size=1024, **kwargs):
    """OLN-Mask, for inference."""
    norm_layer = NORMS[norm] if norm == "GN" else None
    channels = backbone.out_channels
    parts = {
        "mask_roi_pool": RoIAlign(14),
        "mask_head": MaskRCNNHeads(channels, [mask_channels] * 4, 1, norm_layer),
        "mask_predictor": MaskRCNNPredictor(mask_channels, mask_channels, num_classes=1),
        "mask_score": MaskScoreHead(
            channels, 14, [mask_channels] * 4, [representation_size] * 2, norm_layer
        ),
    }
    return OLNBox(backbone, representation_size=representation_size, mask_parts=parts, **kwargs)


def build_detector(
    architecture="oln_box",
    *,
    depth=50,
    norm="FrozenBN",
    fpn_channels=256,
    trainable_backbone_layers=3,
    weights_backbone=None,
    anchor_sizes=(32, 64, 128, 256, 512),
    **kwargs,
):
    """
    Args:
        architecture (str): "oln_box"; "oln_mask", for inference only; or "faster_rcnn":
            torchvision's, with the one class "object" and the same backbone and anchors, to compare
            with.
        depth (int): 18, 34, 50 or 101, of the ResNet; or 10, one of half the width for trying
            things out.
        norm (str): "FrozenBN", batch norm with frozen statistics, which needs pretrained weights;
            or "GN", group norm in the backbone and the FPN, which learns from scratch.
        fpn_channels (int): channels of the feature pyramid.
        trainable_backbone_layers (int): stages of the ResNet that learn, from the last backwards;
            5: all.
        weights_backbone (torchvision.models.WeightsEnum, optional): pretrained weights of the
            ResNet.
        anchor_sizes (list[float]): see :class:`OLNBox`; 4 for P2..P5 or 5 for P2..P6.
        kwargs: see :class:`OLNBox`; with "oln_mask" also mask_channels (int), of the mask head.
            With "faster_rcnn": min_size, max_size, representation_size, box_nms_thresh and
            box_detections_per_img as of :class:`OLNBox`, and torchvision's `FasterRCNN` arguments,
            whose meanings and defaults are its own.

    Returns:
        nn.Module: called as :class:`OLNBox` says. Its `config` is the dict of plain values that
        builds the same again, without pretrained weights: `build_detector(**model.config)`.

    Raises:
        InputError: a value that is not one of the above, or pretrained weights out of reach.
    """
    for name, value, allowed in (
        ("architecture", architecture, ("oln_box", "oln_mask", "faster_rcnn")),
        ("depth", depth, (10, 18, 34, 50, 101)),
        ("norm", norm, tuple(NORMS)),
        ("trainable_backbone_layers", trainable_backbone_layers, tuple(range(6))),
    ):
        if value not in allowed:
            raise InputError(f"{name} is {value!r}; use one of {', '.join(map(str, allowed))}")
    if len(anchor_sizes) not in (4, 5):
        raise InputError(
            f"anchor_sizes is {anchor_sizes}; give 4 sizes, for P2..P5, or 5, for P2..P6"
        )
    if depth == 10:
        if weights_backbone is not None:
            raise InputError(
                "there are no pretrained weights for depth 10; train it from scratch: --scratch on "
                'the command line, weights_backbone=None and norm="GN" in Python'
            )
        resnet = _small_resnet(NORMS[norm])
    else:
        try:
            resnet = get_model(f"resnet{depth}", weights=weights_backbone, norm_layer=NORMS[norm])
        except OSError as error:
            raise InputError(
                f"the ImageNet weights cannot be fetched ({error}); fetch them on another machine "
                f"into {torch.hub.get_dir()}/checkpoints, or train from scratch"
            ) from None
    stages = ["layer4", "layer3", "layer2", "layer1", "conv1", "bn1"]
    learning = stages[: trainable_backbone_layers if trainable_backbone_layers < 5 else None]
    for name, parameter in resnet.named_parameters():
        parameter.requires_grad_(name.split(".")[0] in learning)
    channels = {10: 32, 18: 64, 34: 64}.get(depth, 256)
    backbone = BackboneWithFPN(
        resnet,
        return_layers={f"layer{i + 1}": str(i) for i in range(4)},
        in_channels_list=[channels * 2**i for i in range(4)],
        out_channels=fpn_channels,
        norm_layer=NORMS[norm] if norm == "GN" else None,
    )
    if len(anchor_sizes) == 4:
        backbone.fpn.extra_blocks = None  # which makes P6
    if architecture == "oln_mask":
        model = _oln_mask(backbone, norm=norm, anchor_sizes=anchor_sizes, **kwargs)
    else:
        build = OLNBox if architecture == "oln_box" else _faster_rcnn
        model = build(backbone, anchor_sizes=anchor_sizes, **kwargs)
    model.config = {
        "architecture": architecture,
        "depth": depth,
        "norm": norm,
        "fpn_channels": fpn_channels,
        "trainable_backbone_layers": trainable_backbone_layers,
        "anchor_sizes": anchor_sizes,
        **kwargs,
    }
    return model


def _small_resnet(norm_layer, width=32):
    """A ResNet-10, one basic block a stage, of half the width, under the names of torchvision's."""
    layers = {
        "conv1": nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        "bn1": norm_layer(width),
        "relu": nn.ReLU(inplace=True),
        "maxpool": nn.MaxPool2d(3, stride=2, padding=1),
    }
    for i in range(4):
        channels, stride, shortcut = width * 2**i, 1, None
        if i > 0:
            stride = 2
            shortcut = nn.Conv2d(channels // 2, channels, 1, stride=2, bias=False)
            shortcut = nn.Sequential(shortcut, norm_layer(channels))
        block = BasicBlock(channels // stride, channels, stride, shortcut, norm_layer=norm_layer)
        layers[f"layer{i + 1}"] = nn.Sequential(block)
    resnet = nn.Sequential(OrderedDict(layers))
    for layer in resnet.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return resnet


def _faster_rcnn(
    backbone,
    *,
    anchor_sizes,
    min_size=800,
    max_size=1333,
    representation_size=1024,
    box_nms_thresh=0.7,
    box_detections_per_img=1500,
    **kwargs,
):
    """torchvision's Faster R-CNN with OLN's anchors, transform and number of detections."""
    model = detection.FasterRCNN(
        backbone,
        rpn_anchor_generator=SquareAnchors(anchor_sizes),
        rpn_head=RPNHead(backbone.out_channels, 1),
        rpn_post_nms_top_n_train=1000,
        rpn_post_nms_top_n_test=2000,
        box_head=TwoMLPHead(backbone.out_channels * 7 * 7, representation_size),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(representation_size, num_classes=2),
        box_score_thresh=0.0,
        box_nms_thresh=box_nms_thresh,
        box_detections_per_img=box_detections_per_img,
        **kwargs,
    )
    model.transform = Transform(min_size, max_size)
    return model


def oln_box_resnet50_fpn(
    *, checkpoint=None, weights_backbone=ResNet50_Weights.IMAGENET1K_V1, **kwargs
):
    """
    OLN-Box with a ResNet-50-FPN backbone, by default with the paper's settings: see :class:`OLNBox`
    for what goes in and what comes out.

    Example::

        >>> model = oln_box_resnet50_fpn(checkpoint="model_final.pth").eval()
        >>> predictions = model([torch.rand(3, 300, 400), torch.rand(3, 500, 400)])
        >>> predictions[0]["boxes"], predictions[0]["scores"]

    Args:
        checkpoint (str, optional): weights of the whole detector, trained by either runtime, see
            :func:`load_checkpoint`; weights of the backbone are then not fetched.
        weights_backbone (ResNet50_Weights, optional): pretrained weights of the ResNet; None: from
            scratch, which wants norm="GN".
        kwargs: see :func:`build_detector` and :class:`OLNBox`.
    """
    return _oln_box(50, checkpoint, weights_backbone, kwargs)


def oln_box_resnet18_fpn(
    *, checkpoint=None, weights_backbone=ResNet18_Weights.IMAGENET1K_V1, **kwargs
):
    """The same as :func:`oln_box_resnet50_fpn` with a ResNet-18, small enough for a CPU."""
    return _oln_box(18, checkpoint, weights_backbone, kwargs)


def oln_mask_resnet50_fpn(checkpoint, **kwargs):
    """
    OLN-Mask with a ResNet-50-FPN backbone, for inference; see :func:`oln_box_resnet50_fpn`. Trained
    with `train_net.py`.
    """
    return _oln_box(50, checkpoint, None, {"architecture": "oln_mask", **kwargs})


def _oln_box(depth, checkpoint, weights_backbone, kwargs):
    from oln_d2.standalone.checkpoint import load_checkpoint

    if checkpoint is not None:
        weights_backbone = None
    elif weights_backbone is None:
        kwargs = {"trainable_backbone_layers": 5, **kwargs}
    model = build_detector(depth=depth, weights_backbone=weights_backbone, **kwargs)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model
