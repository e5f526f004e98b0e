"""Infers the architecture of a published network from the shapes of its weights."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from architecture import BASIC, BLOCKS, BOTTLENECK, SMALL_IMAGE_PIXELS
from published.names import CLASSIFIER_SCOPE

Shapes = dict[str, list[int]]

PAPER_SK_RATIO = 0.0625
USUAL_SE_RATIO = 0.25
USUAL_OUT_DIM = 128  # of the projection head
USUAL_HEAD_LAYERS = 3
LARGE_IMAGE_PIXELS = 224  # the image size of a network with the stem for large images

_CONVOLUTION = re.compile(r"base_model/conv2d(?:_([0-9]{1,9}))?/kernel")
_HEAD_LAYER = re.compile(r"head_contrastive/nl_([0-9]{1,9})/dense/kernel")
_LINEAR_HEAD = "head_contrastive/l_0/dense/kernel"
_CLASSIFIER = f"{CLASSIFIER_SCOPE}/kernel"


class Inferred(NamedTuple):
    """What the shapes of a published network say.

    Attributes:
      architecture: the fields of `Config` about encoder and head.
      task: the fields of `Config` with which `tasks.network` builds the whole network.
      classifier_layers: the head layers that are as wide as the classifier's input; 0 is h. In a whole head these are
        usually all layers but the last. A head that was cut ends with the layer that its classifier stands on.
    """

    architecture: dict[str, Any]
    task: dict[str, Any]
    classifier_layers: list[int]


class _Encoder(NamedTuple):
    resnet_depth: int
    width_multiplier: float
    sk_ratio: float
    se_ratio: float
    small_stem: bool
    output_width: int  # of h


class _Head(NamedTuple):
    """The layers of a projection head that the file holds.

    Attributes:
      mode: `none`, `linear` or `nonlinear`.
      layers: the number of layers.
      is_cut: whether the last of them is a middle layer of the head, because a model was fine-tuned from there.
      out_dim: the width of the last layer of a whole head; None where the head is cut or there is none.
    """

    mode: str
    layers: int
    is_cut: bool
    out_dim: int | None


def infer(shapes: Shapes) -> Inferred:
    """The network that has weights of these shapes.

    Where shapes contradict each other, the nearest architecture is returned; comparing all shapes then shows the
    difference.

    Args:
      shapes: the weights' shapes by TF1 name; `holds_encoder` must be true of them.
    """
    encoder = _infer_encoder(shapes)
    head = _infer_head(shapes)
    classifier_layers = _classifier_layers(shapes, encoder, head)
    num_proj_layers = USUAL_HEAD_LAYERS
    if head.mode == "nonlinear":
        num_proj_layers = head.layers
        if head.is_cut:  # at least one more layer was cut off
            num_proj_layers += 1
    architecture = dict(
        resnet_depth=encoder.resnet_depth,
        width_multiplier=encoder.width_multiplier,
        sk_ratio=encoder.sk_ratio,
        se_ratio=encoder.se_ratio,
        proj_head_mode=head.mode,
        proj_out_dim=head.out_dim or USUAL_OUT_DIM,
        num_proj_layers=num_proj_layers,
    )
    task = dict(
        image_size=SMALL_IMAGE_PIXELS if encoder.small_stem else LARGE_IMAGE_PIXELS,
        # Fine-tuning builds only those layers of the head that are below the classifier.
        train_mode="finetune" if head.is_cut else "pretrain",
        ft_proj_selector=min(classifier_layers, default=0),
        lineareval_while_pretraining=_CLASSIFIER in shapes,
    )
    return Inferred(architecture, task, classifier_layers)


def holds_encoder(shapes: Shapes) -> bool:
    """Whether any of the weights is a convolution of the encoder."""
    return bool(_convolutions(shapes))


def count_classes(shapes: Shapes) -> int:
    """The number of classes of the classifier; 0 where there is no classifier."""
    kernel = shapes.get(_CLASSIFIER, [])  # [width of its input, classes]
    return kernel[1] if len(kernel) == 2 else 0


def _convolutions(shapes: Shapes) -> dict[int, list[int]]:
    """The kernels [height, width, in, out] of the encoder's convolutions, by number."""
    kernels = {}
    for name, shape in shapes.items():
        match = _CONVOLUTION.fullmatch(name)
        if match and len(shape) == 4:
            kernels[int(match[1] or 0)] = shape
    return kernels


def _infer_encoder(shapes: Shapes) -> _Encoder:
    """Depth, width and kind of the encoder, from its convolutions. They are numbered in the order of their making.

    The stem's come first. Each group begins with its shortcut. A basic block holds two plain convolutions. A bottleneck
    holds a plain convolution; then the selective kernel's convolution, squeeze and mixing, or one plain convolution;
    then another plain one. Where there is squeeze-and-excitation, every block ends with its two.
    """
    kernels = _convolutions(shapes)

    def kernel(number: int) -> list[int]:
        """The kernel with this number; zeros where it is missing, which the comparison of all shapes will name."""
        return kernels.get(number, [0, 0, 0, 0])

    # ResNet-D's stem is three 3x3 convolutions.
    has_resnet_d = kernel(1)[0] == 3
    in_stem = 3 if has_resnet_d else 1
    small_stem = not has_resnet_d and kernel(0)[0] == 3
    width = kernel(in_stem - 1)[3]  # the stem's output
    if width == 0:  # that kernel is missing, but the first shortcut's input is as wide
        width = kernel(in_stem)[2]
    is_bottleneck = kernel(in_stem)[3] == 4 * width  # the first shortcut's output
    has_sk = is_bottleneck and kernel(in_stem + 2) == [3, 3, width, 2 * width]
    has_se = any(name.startswith("base_model/conv2d") and name.endswith("/bias") for name in shapes)

    per_block = 2
    if is_bottleneck:
        per_block = 5 if has_sk else 3
    if has_se:
        per_block += 2
    total = max(kernels) + 1
    shortcuts = 4  # one in each group
    blocks = (total - in_stem - shortcuts) / per_block
    kind = BOTTLENECK if is_bottleneck else BASIC
    distances = {}  # by depth of this kind: how far its number of blocks is from the one found
    for depth, (kind_of_depth, repeats) in BLOCKS.items():
        if kind_of_depth == kind:
            distances[depth] = abs(sum(repeats) - blocks)
    nearest = min(distances, key=lambda depth: distances[depth])

    # The ratios are read from the last block. It is the widest, so that rounding matters least there.
    last_width = 8 * width
    sk_ratio = 0.0
    se_ratio = 0.0
    if has_sk:
        # The block ends with squeeze, mixing and a last convolution; squeeze-and-excitation's two come after these.
        squeeze = kernel(total - 5 if has_se else total - 3)[3]
        is_usual = squeeze == max(int(last_width * PAPER_SK_RATIO), 32)
        sk_ratio = PAPER_SK_RATIO if is_usual else _share(squeeze, last_width)
    elif has_resnet_d:  # basic blocks have no selective kernel: every ratio above 0 gives this network
        sk_ratio = PAPER_SK_RATIO
    if has_se:
        squeeze = kernel(total - 2)[3]
        is_usual = squeeze == int(last_width * USUAL_SE_RATIO)
        se_ratio = USUAL_SE_RATIO if is_usual else _share(squeeze, last_width)
    output_width = 4 * last_width if is_bottleneck else last_width
    return _Encoder(nearest, width / 64, sk_ratio, se_ratio, small_stem, output_width)


def _share(squeeze: int, width: int) -> float:
    return squeeze / width if width else 0.0


def _infer_head(shapes: Shapes) -> _Head:
    """The projection head, from its dense layers."""
    if _LINEAR_HEAD in shapes:
        return _Head("linear", layers=1, is_cut=False, out_dim=_outputs(shapes[_LINEAR_HEAD]))
    matches = [_HEAD_LAYER.fullmatch(name) for name in shapes]
    numbers = [int(match[1]) for match in matches if match]
    if not numbers:
        return _Head("none", layers=0, is_cut=False, out_dim=None)
    last = max(numbers)
    layers = last + 1
    # The last layer of a whole head has no offset; every other layer has one.
    if f"head_contrastive/nl_{last}/batch_normalization/beta" in shapes:
        return _Head("nonlinear", layers, is_cut=True, out_dim=None)
    out_dim = _outputs(shapes[f"head_contrastive/nl_{last}/dense/kernel"])
    return _Head("nonlinear", layers, is_cut=False, out_dim=out_dim)


def _outputs(kernel: list[int]) -> int | None:
    """The width of a dense layer's output; None where `kernel` is not [in, out]."""
    return kernel[1] if len(kernel) == 2 else None


def _classifier_layers(shapes: Shapes, encoder: _Encoder, head: _Head) -> list[int]:
    """The head layers that the classifier can stand on, by their widths; 0 is h."""
    if head.is_cut:
        return [head.layers]
    classifier = shapes.get(_CLASSIFIER, [])
    if not classifier:
        return []
    widths = [encoder.output_width] * (head.layers + 1)  # of h and of every layer
    if head.layers:
        widths[-1] = head.out_dim or USUAL_OUT_DIM
    return [layer for layer, width in enumerate(widths) if width == classifier[0]]
