"""What the encoder can be: its depths, and the images for which it has a small stem.

This module imports nothing, so that the command line knows both without starting TensorFlow.
"""

from __future__ import annotations

BASIC = "basic"
BOTTLENECK = "bottleneck"

# Each depth of the ResNet: the kind of its blocks, and how many of them each of the four groups has
# (arXiv 1512.03385, Table 1; 10, 14 and 26 are shorter ones of the same kinds).
BLOCKS = {
    10: (BASIC, (1, 1, 1, 1)),
    14: (BOTTLENECK, (1, 1, 1, 1)),
    18: (BASIC, (2, 2, 2, 2)),
    26: (BOTTLENECK, (2, 2, 2, 2)),
    34: (BASIC, (3, 4, 6, 3)),
    50: (BOTTLENECK, (3, 4, 6, 3)),
    101: (BOTTLENECK, (3, 4, 23, 3)),
    152: (BOTTLENECK, (3, 8, 36, 3)),
    200: (BOTTLENECK, (3, 24, 36, 3)),
}

# Images of at most so many pixels, as CIFAR-10's, get the 3x3 stem without pooling. They are evaluated whole, where of
# larger images the centre is cropped.
SMALL_IMAGE_PIXELS = 32
