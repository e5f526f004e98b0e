"""From the shapes of a published network's weights, by their TF1 names, to its architecture."""

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
LARGE_IMAGE_PIXELS = 224  # what a network with the stem of large images is taken to have been trained at

_CONVOLUTION = re.compile(r"base_model/conv2d(?:_([0-9]{1,9}))?/kernel")
_HEAD_LAYER = re.compile(r"head_contrastive/nl_([0-9]{1,9})/dense/kernel")
_LINEAR_HEAD = "head_contrastive/l_0/dense/kernel"
_CLASSIFIER = f"{CLASSIFIER_SCOPE}/kernel"


class Inferred(NamedTuple):
    """What the shapes of a published network say.

    Attributes:
      architecture: the fields of `Config` about encoder and head.
      task: the fields of `Config` that make `tasks.network` build the whole of it.
      classifier_layers: the head layers that are as wide as the classifier's input; 0 is h. In a whole head these are
        mostly all but the last. A head that was cut ends where its classifier stands.
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
    """A projection head as far as it is there.

    Attributes:
      mode: `none`, `linear` or `nonlinear`.
      layers: how many there are.
      is_cut: whether it ends with a middle layer, because a model was fine-tuned from there.
      out_dim: the width of the last layer of a whole head; None where there is none.
    """

    mode: str
    layers: int
    is_cut: bool
    out_dim: int | None


def infer(shapes: Shapes) -> Inferred:
    """Reads a network off the shapes of its weights.

    What does not fit together gives the nearest architecture, whose shapes will then differ from these.

    Args:
      shapes: the weights' shapes by TF1 name, of which `holds_encoder` is true.
    """
    encoder = _infer_encoder(shapes)
    head = _infer_head(shapes)
    classifier_layers = _classifier_layers(shapes, encoder, head)
    num_proj_layers = USUAL_HEAD_LAYERS
    if head.mode == "nonlinear":
        num_proj_layers = head.layers + 1 if head.is_cut else head.layers  # one cut off at least
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
        # Fine-tuning builds no more of the head than the layers below the classifier.
        train_mode="finetune" if head.is_cut else "pretrain",
        ft_proj_selector=min(classifier_layers, default=0),
        lineareval_while_pretraining=_CLASSIFIER in shapes,
    )
    return Inferred(architecture, task, classifier_layers)


def holds_encoder(shapes: Shapes) -> bool:
    """Whether any of the weights is a convolution of the encoder."""
    return bool(_convolutions(shapes))


def count_classes(shapes: Shapes) -> int:
    """The classes that the classifier tells apart; 0 where there is none."""
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
    """Depth, width and kind of the encoder, from the convolutions, which are numbered in the order of their making.

    The stem's come first. A group begins with the convolution of its shortcut. In a block stand: the selective kernel's
    convolution, its squeeze and its mixing, or else a plain convolution; then squeeze and expansion of
    squeeze-and-excitation.
    """
    kernels = _convolutions(shapes)

    def kernel(number: int) -> list[int]:
        """A missing one will be named when all shapes are compared."""
        return kernels.get(number, [0, 0, 0, 0])

    has_resnet_d = kernel(1)[0] == 3  # whose stem is three 3x3 convolutions
    in_stem = 3 if has_resnet_d else 1
    small_stem = not has_resnet_d and kernel(0)[0] == 3
    width = kernel(in_stem - 1)[3] or kernel(in_stem)[2]  # the stem's output is the first shortcut's input
    is_bottleneck = kernel(in_stem)[3] == 4 * width  # the first shortcut's output
    has_sk = is_bottleneck and kernel(in_stem + 2) == [3, 3, width, 2 * width]
    has_se = any(name.startswith("base_model/conv2d") and name.endswith("/bias") for name in shapes)

    per_block = 2
    if is_bottleneck:
        per_block = 5 if has_sk else 3
    if has_se:
        per_block += 2
    total = max(kernels) + 1
    shortcuts = 4  # one a group
    blocks = (total - in_stem - shortcuts) / per_block
    kind = BOTTLENECK if is_bottleneck else BASIC
    depths = [depth for depth, (kind_of_depth, _) in BLOCKS.items() if kind_of_depth == kind]
    depth = min(depths, key=lambda depth: abs(sum(BLOCKS[depth][1]) - blocks))

    # The squeezes of the last block, which is the widest, tell their ratios best.
    last_width = 8 * width
    sk_ratio = se_ratio = 0.0
    if has_sk:
        # Squeeze, mixing and a last convolution stand at its end, before those of squeeze-and-excitation.
        squeeze = kernel(total - 5 if has_se else total - 3)[3]
        is_usual = squeeze == max(int(last_width * PAPER_SK_RATIO), 32)
        sk_ratio = PAPER_SK_RATIO if is_usual else _share(squeeze, last_width)
    elif has_resnet_d:  # basic blocks have no selective kernel: any ratio gives this network
        sk_ratio = PAPER_SK_RATIO
    if has_se:
        squeeze = kernel(total - 2)[3]
        is_usual = squeeze == int(last_width * USUAL_SE_RATIO)
        se_ratio = USUAL_SE_RATIO if is_usual else _share(squeeze, last_width)
    return _Encoder(depth, width / 64, sk_ratio, se_ratio, small_stem, (4 if is_bottleneck else 1) * last_width)


def _share(squeeze: int, width: int) -> float:
    return squeeze / width if width else 0.0


def _infer_head(shapes: Shapes) -> _Head:
    """The projection head, from its dense layers."""
    if _LINEAR_HEAD in shapes:
        mode, last, scope = "linear", 0, "head_contrastive/l_0"
    else:
        numbers = [int(match[1]) for name in shapes if (match := _HEAD_LAYER.fullmatch(name))]
        if not numbers:
            return _Head("none", layers=0, is_cut=False, out_dim=None)
        mode, last = "nonlinear", max(numbers)
        scope = f"head_contrastive/nl_{last}"
    # The last layer of a whole head has no offset; every other one has.
    is_cut = mode == "nonlinear" and f"{scope}/batch_normalization/beta" in shapes
    kernel = shapes[f"{scope}/dense/kernel"]  # [in, out]
    knows_width = not is_cut and len(kernel) == 2
    return _Head(mode, last + 1, is_cut, kernel[1] if knows_width else None)


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
