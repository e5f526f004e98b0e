"""What the encoder can be: its depths, and the images for which it has a small stem.

This module imports nothing, so that the command line knows these facts without starting TensorFlow.
"""

from __future__ import annotations

BASIC = "basic"
BOTTLENECK = "bottleneck"

# For each depth of the ResNet: the kind of its blocks, and the number of blocks in each of the four groups
# (arXiv 1512.03385, Table 1; the depths 10, 14 and 26 are shorter networks of the same kinds).
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

# Images of at most so many pixels, such as CIFAR-10's, get the 3x3 stem without pooling. They are evaluated whole;
# larger images are cropped to their centre.
SMALL_IMAGE_PIXELS = 32
