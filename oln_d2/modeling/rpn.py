"""
OLN-RPN: the first stage, which learns centerness and box sides instead of object or background.
"""

from functools import partial

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import batched_nms, cat
from detectron2.modeling.proposal_generator import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN,
    RPN_HEAD_REGISTRY,
)
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor, nn

from oln_d2.checks import InputError
from oln_d2.localization import (
    QUALITIES,
    anchors_inside,
    check_finite,
    convolve_at,
    decode_ltrb,
    encode_ltrb,
    label_and_sample,
    predict_scaled,
    rpn_losses,
    select_proposals,
)

"""
Shape shorthand in this module:

    N: number of images in the minibatch
    L: number of feature maps per image on which the RPN is run
    A: number of cell anchors (must be the same for all feature maps)
    Hi, Wi: height and width of the i-th feature map
    R: number of anchors of an image, the sum of Hi*Wi*A over the feature maps

Naming convention:

    objectness: the quality of the anchor (centerness or IoU) as the head predicts it,
        sigmoid(pred_objectness_logits); not a probability of being an object.

    deltas: the distances `ltrb` of oln_d2.localization, or with MODEL.OLN.RPN_BOX_CODING "delta"
        Detectron2's deltas.

    gt_labels: 1 positive, 0 negative, -1 not in the sample.
"""

DIVERGED = (
    "training has diverged; lower SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS; earlier "
    "checkpoints are good as MODEL.WEIGHTS"
)


class LTRBTransform:
    """
    `oln_d2.localization`'s box coding behind the interface of Detectron2's `Box2BoxTransform`.
    """

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        return encode_ltrb(src_boxes, target_boxes)

    def apply_deltas(self, deltas: Tensor, boxes: Tensor) -> Tensor:
        return decode_ltrb(boxes, deltas.float())  # float32: half precision moves sides by pixels


@RPN_HEAD_REGISTRY.register()
class OLNRPNHead(StandardRPNHead):
    """
    :class:`StandardRPNHead` whose hidden features are L2-normalised over the channels before the
    two predictions, as in the authors' code, or brought to another length.
    """

    @configurable
    def __init__(
        self,
        *,
        ltrb_init: float = 0.0,
        feature_norm: float = 1.0,
        classify: bool = False,
        **kwargs,
    ):
        """
        Args:
            ltrb_init: see MODEL.OLN.LTRB_INIT in `oln_d2.config`.
            feature_norm: likewise MODEL.OLN.RPN_FEATURE_NORM.
            classify: also predict object or background, see :class:`OLNRPN`.
            kwargs: arguments of :class:`StandardRPNHead`.
        """
        super().__init__(**kwargs)
        nn.init.constant_(self.anchor_deltas.bias, ltrb_init)
        self.feature_norm = feature_norm
        self.cls_logits = None
        if classify:
            predictor = self.objectness_logits
            self.cls_logits = nn.Conv2d(predictor.in_channels, predictor.out_channels, 1)
            nn.init.normal_(self.cls_logits.weight, std=0.01)
            nn.init.zeros_(self.cls_logits.bias)

    @classmethod
    def from_config(cls, cfg, input_shape):
        ret = super().from_config(cfg, input_shape)
        if cfg.MODEL.OLN.RPN_BOX_CODING == "ltrb":
            ret["ltrb_init"] = cfg.MODEL.OLN.LTRB_INIT
        ret["feature_norm"] = cfg.MODEL.OLN.RPN_FEATURE_NORM
        ret["classify"] = cfg.MODEL.OLN.RPN_CLS_LOSS_WEIGHT > 0
        return ret

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], ...]:
        """
        Args:
            features: L feature maps, each (N, C, Hi, Wi).

        Returns:
            of each feature map the objectness logits, (N, A, Hi, Wi); the distances left, top,
            right, bottom of each anchor, (N, A*4, Hi, Wi); and, only with a classifier in training,
            its logits, (N, A, Hi, Wi).
        """
        predictors = [self.objectness_logits, self.anchor_deltas]
        if self.cls_logits is not None and self.training:
            predictors.append(self.cls_logits)
        hidden = [self.conv(x) for x in features]
        # In float32: in half precision scores would tie, and sides of large anchors move.
        with torch.autocast(hidden[0].device.type, enabled=False):
            levels = [predict_scaled(x.float(), self.feature_norm, predictors) for x in hidden]
        return tuple(map(list, zip(*levels)))

    @property
    def predicts_at(self) -> bool:
        """Whether there is :meth:`at`: not with a classifier or several convolutions."""
        return self.cls_logits is None and isinstance(self.conv, nn.Conv2d)

    def at(self, features: list[Tensor], image: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """
        The predictions of some anchors, equal to those of :meth:`forward`, but for rounding: see
        :func:`convolve_at`.

        Args:
            features: L feature maps, each (N, C, Hi, Wi).
            image, anchor: S indices of images and of anchors, in [0, R).

        Returns:
            objectness logits, (S,); and the distances left, top, right, bottom, (S, 4).
        """
        per_location = self.objectness_logits.out_channels
        location, own = anchor // per_location, anchor % per_location
        hidden = convolve_at(self.conv.weight, self.conv.bias, features, image, location)
        hidden = self.conv.activation(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            logits, deltas = (
                found.flatten(1)
                for found in predict_scaled(
                    hidden.float()[..., None, None],
                    self.feature_norm,
                    [self.objectness_logits, self.anchor_deltas],
                )
            )
        each = torch.arange(len(own), device=own.device)
        return logits[each, own], deltas.unflatten(1, (per_location, 4))[each, own]


@PROPOSAL_GENERATOR_REGISTRY.register()
class OLNRPN(RPN):
    """
    OLN's proposal generator (OLN, sec. III-B). Differs from :class:`RPN`: the score learns the
    quality of the anchor with its own assignment and sample, the boxes learn by the IoU of the
    decoded box, and NMS is optional.
    """

    @configurable
    def __init__(
        self,
        *,
        objectness_target: str = "centerness",
        objectness_iou_thresholds: tuple[float, float] = (0.1, 0.3),
        objectness_batch_size_per_image: int = 256,
        objectness_negatives: bool = True,
        box_iou_thresholds: tuple[float, float] = (0.3, 0.7),
        nms: tuple[bool, bool] = (False, False),
        loss_weight: dict[str, float] | None = None,
        **kwargs,
    ):
        """
        Args:
            objectness_...: the keys of `oln_d2.config` with these names.
            box_iou_thresholds: as those of the objectness, for the sample of the box loss, whose
                negatives only count in the normaliser of both losses.
            nms: (train, test), whether proposals go through NMS.
            loss_weight: factors of "loss_rpn_obj", "loss_rpn_loc" and, for a head that also
                classifies anchors (an ablation; proposals do not look at it), "loss_rpn_cls".
                Default: the paper's 1, 10 and 0.
            kwargs: arguments of :class:`RPN`. `anchor_matcher`, `box_reg_loss_type` and
                `smooth_l1_beta` are not used.

        Raises:
            InputError: an objectness target that does not exist, or a sample without anchors.
        """
        paper = {"loss_rpn_obj": 1.0, "loss_rpn_loc": 10.0, "loss_rpn_cls": 0.0}
        super().__init__(loss_weight=loss_weight or paper, **kwargs)
        if objectness_target not in QUALITIES:
            raise InputError(
                f"MODEL.OLN.OBJECTNESS_TARGET is {objectness_target!r}; use one of "
                f"{list(QUALITIES)}"
            )
        if objectness_batch_size_per_image < 1:
            raise InputError(
                f"MODEL.OLN.OBJECTNESS_BATCH_SIZE_PER_IMAGE is {objectness_batch_size_per_image}; "
                "use 1 or more"
            )
        self.objectness_target = objectness_target
        self.objectness_iou_thresholds = objectness_iou_thresholds
        self.objectness_batch_size_per_image = objectness_batch_size_per_image
        self.objectness_negatives = objectness_negatives
        self.box_iou_thresholds = box_iou_thresholds
        self.nms = {True: nms[0], False: nms[1]}

    @classmethod
    def from_config(cls, cfg, input_shape):
        """
        Raises:
            InputError: IoU thresholds that are not two ascending numbers in [0, 1].
        """
        rpn, oln = cfg.MODEL.RPN, cfg.MODEL.OLN
        for key, limits in (
            ("MODEL.OLN.OBJECTNESS_IOU_THRESHOLDS", oln.OBJECTNESS_IOU_THRESHOLDS),
            ("MODEL.RPN.IOU_THRESHOLDS", rpn.IOU_THRESHOLDS),
        ):
            numbers = all(isinstance(limit, (int, float)) for limit in limits)
            if len(limits) != 2 or not numbers or not 0 <= limits[0] <= limits[1] <= 1:
                raise InputError(f"{key} is {limits}; use two ascending numbers in [0, 1]")
        ret = super().from_config(cfg, input_shape)
        if oln.RPN_BOX_CODING not in ("ltrb", "delta"):
            raise InputError(
                f"MODEL.OLN.RPN_BOX_CODING is {oln.RPN_BOX_CODING!r}; use 'ltrb' or 'delta'"
            )
        if oln.RPN_BOX_CODING == "ltrb":
            ret["box2box_transform"] = LTRBTransform()
        ret["loss_weight"] = {
            "loss_rpn_obj": rpn.LOSS_WEIGHT * oln.OBJECTNESS_LOSS_WEIGHT,
            "loss_rpn_loc": rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT,
            "loss_rpn_cls": rpn.LOSS_WEIGHT * oln.RPN_CLS_LOSS_WEIGHT,
        }
        for name in ("target", "iou_thresholds", "batch_size_per_image", "negatives"):
            ret[f"objectness_{name}"] = oln[f"OBJECTNESS_{name.upper()}"]
        ret["box_iou_thresholds"] = rpn.IOU_THRESHOLDS
        ret["nms"] = (oln.RPN_NMS_TRAIN, oln.RPN_NMS_TEST)
        return ret

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
        """
        Assign and sample twice, for the box loss and for the objectness loss.

        Args:
            anchors: those of each feature map.
            gt_instances: the objects of each image, with `gt_boxes`; may be empty. In all or none
                of them `gt_weights`, (G,), how much each object counts.

        Returns:
            of each image `gt_labels`, (2, R), of the box (0) and the objectness (1) sample; and the
            boxes of the assigned objects, (2, R, 4), undefined where the label is not 1; and with
            `gt_weights` those, (2, R), 1 where the label is not 1.
        """
        anchors = Boxes.cat(anchors).tensor
        samples = (
            (self.box_iou_thresholds, self.batch_size_per_image, self.positive_fraction),
            (self.objectness_iou_thresholds, self.objectness_batch_size_per_image, 1.0),
        )
        weights = None
        if gt_instances[0].has("gt_weights"):
            weights = [instances.gt_weights for instances in gt_instances]
        sizes = [instances.image_size for instances in gt_instances]
        labels, boxes, weights = label_and_sample(
            anchors,
            anchors_inside(anchors, sizes, self.anchor_boundary_thresh),
            [instances.gt_boxes.tensor for instances in gt_instances],
            samples,
            retry_if_cuda_oom,
            weights,
        )
        return list(labels), list(boxes), None if weights is None else list(weights)

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
        pred_cls_logits: list[Tensor] | None = None,
        gt_weights: list[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            anchors: L, each (Hi*Wi*A, 4).
            pred_objectness_logits: L, each (N, Hi*Wi*A).
            gt_labels, gt_boxes, gt_weights: see :meth:`label_and_sample_anchors`.
            pred_anchor_deltas: L, each (N, Hi*Wi*A, 4).
            pred_cls_logits: L, each (N, Hi*Wi*A).

        Returns:
            scalars `loss_rpn_obj` and `loss_rpn_loc`, with class logits also `loss_rpn_cls`.
        """
        anchors = Boxes.cat(anchors).tensor
        logits = cat(pred_objectness_logits, dim=1)
        deltas = cat(pred_anchor_deltas, dim=1)
        num_images, gt_labels = len(gt_labels), torch.stack(gt_labels, dim=1)
        loss_obj, loss_loc, targets = rpn_losses(
            anchors,
            logits,
            deltas,
            gt_labels,
            torch.stack(gt_boxes, dim=1),
            self.objectness_target,
            self.objectness_negatives,
            lambda anchors, deltas: self.box2box_transform.apply_deltas(deltas, anchors),
            None if gt_weights is None else torch.stack(gt_weights, dim=1),
        )

        storage = get_event_storage()
        box_labels, objectness_labels = gt_labels
        positive = objectness_labels == 1
        predicted = logits.detach().float().sigmoid()
        sums = (
            box_labels == 1,
            box_labels == 0,
            positive,
            targets * positive,
            predicted * positive,
        )
        # One transfer: each `.item()` makes a GPU wait.
        num_pos, num_neg, num_positive, target, predicted = torch.stack(
            [x.sum(dtype=torch.float32) for x in sums]
        ).tolist()
        storage.put_scalar("rpn/num_pos_anchors", num_pos / num_images)
        storage.put_scalar("rpn/num_neg_anchors", num_neg / num_images)
        storage.put_scalar("rpn/num_objectness_pos_anchors", num_positive / num_images)
        if num_positive > 0:
            name = self.objectness_target
            storage.put_scalar(f"rpn/{name}_target", target / num_positive)
            storage.put_scalar(f"rpn/{name}_pred", predicted / num_positive)

        losses = {"loss_rpn_obj": loss_obj, "loss_rpn_loc": loss_loc}
        if pred_cls_logits is not None:
            # As Detectron2's RPN: on the sample of the boxes, divided by its intended size.
            sampled = box_labels >= 0
            losses["loss_rpn_cls"] = F.binary_cross_entropy_with_logits(
                cat(pred_cls_logits, dim=1)[sampled].float(),
                box_labels[sampled].float(),
                reduction="sum",
            ) / (self.batch_size_per_image * num_images)
        return {name: loss * self.loss_weight[name] for name, loss in losses.items()}

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """
        See :meth:`RPN.forward`. In training it also logs the recall of the proposals.

        Raises:
            FloatingPointError: NaN or infinite predictions in training.
        """
        features = [features[f] for f in self.in_features]
        anchors = self.anchor_generator(features)
        # In training all predictions choose proposals, and the gradient comes by a few of them.
        few = self.training and getattr(self.rpn_head, "predicts_at", False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not few):
            objectness, deltas, *classes = self.rpn_head(features)
        # Per anchor instead of per channel: (N, A*k, Hi, Wi) -> (N, Hi*Wi*A, k), k = 1 dropped.
        objectness, *classes = (
            [x.permute(0, 2, 3, 1).flatten(1) for x in levels] for levels in (objectness, *classes)
        )
        deltas = [x.permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in deltas]
        losses = {}
        if self.training:
            gt_labels, gt_boxes, weights = self.label_and_sample_anchors(anchors, gt_instances)
            logits, coded = cat(objectness, dim=1), cat(deltas, dim=1)
            if few:
                boxes, scores = torch.stack(gt_labels, dim=1)
                sampled = ((boxes == 1) | (scores >= 0)).nonzero(as_tuple=True)
                own_logits, own_coded = self.rpn_head.at(features, *sampled)
                logits = logits.index_put(sampled, own_logits)
                coded = coded.index_put(sampled, own_coded)
            losses = self.losses(
                anchors, [logits], gt_labels, [coded], gt_boxes, *classes, gt_weights=weights
            )
            check_finite(coded, logits, losses, DIVERGED)
        proposals = self.predict_proposals(anchors, objectness, deltas, images.image_sizes)
        if self.training:
            _log_recall(proposals, gt_instances)
        return proposals, losses

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """
        Args:
            anchors, pred_objectness_logits, pred_anchor_deltas: as in :meth:`losses`.
            image_sizes: N sizes (height, width) before padding.

        Returns:
            N, each with `proposal_boxes`, clipped to the image, those without area dropped, and
            `objectness_logits`, descending. The best of each level are taken, with NMS those that
            it leaves, then the best of all levels.
        """
        boxes, logits, levels = [], [], []
        decoded = self._decode_proposals(anchors, pred_anchor_deltas)
        for i, (boxes_i, logits_i) in enumerate(zip(decoded, pred_objectness_logits)):
            top_k = min(self.pre_nms_topk[self.training], logits_i.shape[1])
            logits_i, indices = logits_i.topk(top_k, dim=1)
            boxes.append(boxes_i.gather(1, indices[..., None].expand(-1, -1, 4)))
            logits.append(logits_i)
            levels.append(torch.full_like(indices[0], i))
        boxes, logits, levels = cat(boxes, dim=1), cat(logits, dim=1).float(), cat(levels)
        nms = partial(batched_nms, iou_threshold=self.nms_thresh)
        proposals = []
        for boxes_i, logits_i, image_size in zip(boxes, logits, image_sizes):
            boxes_i, logits_i = select_proposals(
                boxes_i,
                logits_i,
                levels,
                image_size,
                self.post_nms_topk[self.training],
                min_side=self.min_box_size,
                nms=nms if self.nms[self.training] else None,
                copies_last=not self.training,
            )
            proposals.append(
                Instances(image_size, proposal_boxes=Boxes(boxes_i), objectness_logits=logits_i)
            )
        return proposals


@torch.no_grad()
def _log_recall(proposals, gt_instances):
    """Share of the objects of the batch that a proposal overlaps with IoU 0.5 or more."""
    found = []
    for proposals_i, gt_i in zip(proposals, gt_instances):
        if len(proposals_i) > 0:
            iou = retry_if_cuda_oom(pairwise_iou)(gt_i.gt_boxes, proposals_i.proposal_boxes)
            found.append((iou.max(dim=1).values >= 0.5).to(gt_i.gt_boxes.device))
    num_gt = sum(map(len, gt_instances))
    if num_gt > 0:
        num_found = torch.cat(found).sum().item() if found else 0
        get_event_storage().put_scalar("rpn/proposal_recall", num_found / num_gt)
