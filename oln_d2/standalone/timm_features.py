"""Models of timm as backbones, for both runtimes."""

import difflib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from oln_d2.checks import InputError, needs
from oln_d2.files import StrPath
from oln_d2.standalone.checkpoint import read_checkpoint

STRIDES = (4, 8, 16, 32)


class TimmFeatures(nn.Module):
    """
    A model of timm without its classifier: called with images, (N, 3, H, W), of sides that are
    multiples of 32, it returns the feature maps of strides 4, 8, 16 and 32 in a dict, "0" to "3".

    Args:
        name: timm's, of a model with these strides; `timm.list_models()` lists names.
        norm: "FrozenBN": statistics, scale and shift of batch norms stay as they are; or "BN": they
            learn. Other norms always learn.
        freeze_at: as Detectron2's MODEL.BACKBONE.FREEZE_AT: 0: all learns; 1: the stem, all before
            the stage of stride 4, is frozen; 2 to 5: also the first of the four stages, and so on.
        weights: "DEFAULT": pretrained ones that timm fetches. Or a file: a state dict of the whole
            classifier under timm's names, or under others if all its tensors are, in order and
            shape, those of timm's. None: random ones.

    Attributes:
        channels: of the four maps.
        pixel_mean, pixel_std: of red, green and blue, in [0, 255], that timm trained it with.

    Raises:
        InputError: no model of timm, one without these strides, or weights that cannot be used.
        ImportError: timm is missing.
    """

    def __init__(
        self, name: str, norm: str = "FrozenBN", freeze_at: int = 0, weights: StrPath | None = None
    ):
        super().__init__()
        self.timm = _create(name)
        for module in self.timm.modules():
            if type(module).__name__ == "Conv2dSame":
                module.__class__ = _SameOfMultiples
            elif type(module) is nn.Conv2d and module.groups > 1:
                module.__class__ = _Grouped
        if weights is not None:
            _load(self.timm, name, weights)
        info = self.timm.feature_info
        last = {reduction: i for i, reduction in enumerate(info.reduction())}
        if not last.keys() >= set(STRIDES):
            raise _unfit(name, f"its strides are {', '.join(map(str, last))}")
        self.indices = [last[stride] for stride in STRIDES]
        self.channels = [info.channels()[i] for i in self.indices]
        try:
            with torch.no_grad():
                features = self.timm.eval()(torch.zeros(1, 3, 64, 96))
        except Exception as error:  # takes squares only, for instance
            reason = f"of an image of 64 x 96 pixels it says: {_first_line(error)}"
            raise _unfit(name, reason) from None
        shapes = [tuple(features[i].shape) for i in self.indices]
        if shapes != [(1, c, 64 // s, 96 // s) for c, s in zip(self.channels, STRIDES)]:
            raise _unfit(name, f"its features of 64 x 96 pixels are {shapes}")
        config = self.timm.pretrained_cfg
        self.pixel_mean, self.pixel_std = (
            tuple(round(255 * x, 3) for x in config[key]) for key in ("mean", "std")
        )

        stages = _stages([info.module_name()[i] for i in self.indices], self.timm)
        self.frozen = [
            module
            for path, module in self.timm.named_modules()
            if (norm == "FrozenBN" and isinstance(module, _BatchNorm))
            or (path in stages and stages[path] < freeze_at)
        ]
        for module in self.frozen:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "TimmFeatures":
        """What is frozen stays in inference mode."""
        super().train(mode)
        for module in self.frozen:
            module.training = False
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.timm(images)
        return {str(i): features[index] for i, index in enumerate(self.indices)}


class _Grouped(nn.Conv2d):
    """
    In float32 where autocast would take bfloat16 on a CPU: there, with channels last, depthwise
    convolutions take three times as long in that.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        half = x.dtype != weight.dtype  # autocast is at work
        if self.groups == 1 or x.device.type != "cpu" or not half:
            return super()._conv_forward(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return super()._conv_forward(x.float(), weight, bias)


class _SameOfMultiples(_Grouped):
    """
    timm's `Conv2dSame`, which works out its padding for each size in a way that torch.export cannot
    follow; where sides are multiples of the stride, as here, it is always the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, stride, dilation in zip(self.kernel_size, self.stride, self.dilation):
            total = max((size - 1) * dilation + 1 - stride, 0)
            pads = [total // 2, total - total // 2, *pads]  # the last side first
        return self._conv_forward(F.pad(x, pads), self.weight, self.bias)


def _create(name):
    with needs(f"the backbone {name}", "timm"):
        import timm
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), cutoff=0.5)
        raise InputError(
            f"backbone is {name}, which is no model of timm; near it: "
            f"{', '.join(near) or 'tf_efficientnet_lite0'}"
        )
    try:
        return timm.create_model(name, features_only=True)
    except Exception as error:  # timm raises all kinds
        raise _unfit(name, _first_line(error)) from None


def _unfit(name, reason):
    return InputError(
        f"backbone is {name}, which gives no features of strides 4, 8, 16 and 32 ({reason}); take "
        "another, such as tf_efficientnet_lite0"
    )


def _first_line(error):
    return " ".join(str(error).split()).partition(". ")[0][:200]


def _load(net, name, weights):
    """Load pretrained weights of the classifier `name` into `net`, its features."""
    import timm

    if weights == "DEFAULT":
        try:
            found = timm.create_model(name, pretrained=True).state_dict()
        except Exception as error:  # the hub raises all kinds
            raise InputError(
                f"the pretrained weights of {name} cannot be fetched ({_first_line(error)}); give "
                "a file of them instead of DEFAULT, or train from scratch with norm BN"
            ) from None
    else:
        found = _without_counters(read_checkpoint(weights)["model"])
        wanted = _without_counters(timm.create_model(name).state_dict())
        shapes = [[tensor.shape for tensor in d.values()] for d in (found, wanted)]
        if wanted.keys().isdisjoint(found) and shapes[0] == shapes[1]:
            found = dict(zip(wanted, found.values()))
    load_features(net, found, weights, f"timm's {name}")


def load_features(net: nn.Module, found: dict[str, Tensor], path: StrPath, whole: str) -> None:
    """
    Load weights of a classifier into the part of it that makes features.

    Args:
        net: that part; changed in place.
        found: the parameters of the classifier.
        path, whole: what errors call the file and the classifier.

    Raises:
        InputError: a parameter is missing or has another shape.
    """
    found = {_flat(name): tensor for name, tensor in found.items()}
    own = net.state_dict()
    for name, tensor in _without_counters(own).items():
        if _flat(name) not in found or found[_flat(name)].shape != tensor.shape:
            raise InputError(
                f"{path}: does not hold the weights of {whole}: {name} is missing or not of shape "
                f"{list(tensor.shape)}; give a state dict of this model"
            )
    net.load_state_dict({name: found.get(_flat(name), tensor) for name, tensor in own.items()})


def _without_counters(tensors):
    return {n: tensor for n, tensor in tensors.items() if not n.endswith("num_batches_tracked")}


def _flat(name):
    """The same for a name in a classifier and in its features, where timm has "_" for some dots."""
    return name.removeprefix("model.").replace("_", ".")


def _stages(ends, net):
    """
    The stage of each module of `net` that has parameters or buffers of its own: 0, the stem; 1 to
    4, which end with the modules `ends`. What follows the end of a stage belongs to the next one.
    """
    ends = [_flat(end) + "." for end in ends]
    stages, stage, at_end = {}, 0, False
    for path, module in net.named_modules():
        if not (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            continue
        flat = _flat(path) + "."
        inside = next((i for i, end in enumerate(ends, 1) if flat.startswith(end)), None)
        if inside:
            stage, at_end = inside, True
        elif at_end:
            stage, at_end = stage + 1, False
        stages[path] = min(stage, 4)
    return stages
