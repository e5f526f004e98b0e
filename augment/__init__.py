"""The views of training and of evaluation: appendix B.1."""

from augment.crops import RandomCrop, canvas_side, center_crop, on_canvas, resize, shrink
from augment.operators import Operator
from augment.views import View, crop_and_flip, of_canvases, pretrain_view

__all__ = [
    "Operator",
    "RandomCrop",
    "View",
    "canvas_side",
    "center_crop",
    "crop_and_flip",
    "of_canvases",
    "on_canvas",
    "pretrain_view",
    "resize",
    "shrink",
]
