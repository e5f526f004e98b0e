"""The views of training: a crop of each image, then operators on the batch of crops."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from augment.crops import RandomCrop
from augment.operators import (
    Operator,
    blur_kernel_size,
    clip,
    color_jitter,
    compose,
    grayscale,
    random_blur,
    random_flip,
    sometimes,
)

# From an image [H, W, 3], uint8 or float32 in [0, 1], and a stateless seed [2] to a crop [S, S, 3] float32.
Crop = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


@dataclasses.dataclass(frozen=True)
class View:
    """How one view of an image is made.

    The images of a batch may differ in size, so each is cropped alone (`begin`). What follows takes the crops of many
    images in one call (`finish`), which is several times as fast for small images (docs/performance.md).

    Attributes:
      crop: what is cropped of an image.
      operators: what is done to the crops.
    """

    crop: Crop
    operators: Sequence[Operator] = ()

    def begin(self, image: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The crop of an image, and the random numbers of the operators: all of the view that is random.

        Args:
          image: [H, W, 3], uint8 or float32 in [0, 1].
          seed: [2], stateless. A view takes two of them: this one, and that whose first number is one more.

        Returns:
          [S, S, 3] float32, not clipped yet, and [draws] float32 in [0, 1).
        """
        return self.crop(image, _next(seed)), tf.random.stateless_uniform([self.draws], seed)

    def begin_on_canvas(self, shape: tf.Tensor, seed: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """As `begin`, for an image on a canvas: the box of the crop in place of the crop itself.

        Args:
          shape: [3] int32, the image's H, W and 3.
          seed: as for `begin`.

        Returns:
          [4] int32, and [draws] float32 in [0, 1).
        """
        assert isinstance(self.crop, RandomCrop)
        return self.crop.box(shape, _next(seed)), tf.random.stateless_uniform([self.draws], seed)

    @functools.cached_property
    def of_canvas(self) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
        """The views of many images on canvases, as a function that XLA compiles.

        They are those of `begin` and `finish`, up to rounding. From canvases [B, C, C, 3] uint8, as from
        `crops.on_canvas`, and boxes [B, 4] and draws [B, draws], as `begin_on_canvas` gives them for each image, to
        [B, S, S, 3] float32.
        """

        def views(canvases: tf.Tensor, boxes: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
            assert isinstance(self.crop, RandomCrop)
            return self.finish(self.crop.of_canvas(canvases, boxes), draws)

        return tf.function(views, autograph=False, jit_compile=True)

    def finish(self, crops: tf.Tensor, draws: tf.Tensor, compiled: bool = False) -> tf.Tensor:
        """The views of many images.

        Args:
          crops, draws: [B, S, S, 3] and [B, draws], as `begin` gives them for each image.
          compiled: let XLA compile the operators that it can compile. It takes a second or more, once.

        Returns:
          [B, S, S, 3] float32.
        """
        for part in self._compiled_parts if compiled else [compose(self.operators)]:
            crops = part.apply(crops, draws[:, : part.draws])
            draws = draws[:, part.draws :]
        return crops

    def __call__(self, image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """The view of one image. `image` and `seed` are as for `begin`. Returns [S, S, 3] float32."""
        crop, draws = self.begin(image, seed)
        return self.finish(crop[None], draws[None])[0]

    def __str__(self) -> str:
        """The view in one line of text, for people to read.

        Example:
          str(crop_and_flip(32)) == "random_crop(size=32, min_area=0.08, max_aspect=1.33) | random_flip | clip"
        """
        return " | ".join([str(self.crop), *(operator.words for operator in self.operators)])

    @property
    def draws(self) -> int:
        """How many random numbers the operators need for each image."""
        return sum(operator.draws for operator in self.operators)

    @functools.cached_property
    def _compiled_parts(self) -> list[Operator]:
        """The operators in as few parts as possible, each compiled by XLA or not."""
        parts = []
        for is_static, group in itertools.groupby(self.operators, lambda operator: operator.is_static):
            part = compose(list(group))
            parts.append(part._replace(apply=_compiled(part)) if is_static else part)
        return parts


def _compiled(operator: Operator) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    """What `operator` makes of a batch, by XLA. A processor does best with one image after the other.

    An image takes only the branches that it needs, and stays in the cache from the first operator to the last.
    """

    def of_image(image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        return operator.apply(image[None], draws[None])[0]

    def of_batch(images: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        made = tf.TensorSpec(images.shape[1:], images.dtype)
        return tf.map_fn(lambda pair: of_image(*pair), (images, draws), fn_output_signature=made)

    return tf.function(of_batch, autograph=False, jit_compile=True)


def _next(seed: tf.Tensor) -> tf.Tensor:
    return seed + tf.constant([1, 0], seed.dtype)


def of_canvases(batch: Mapping[str, Any], views: Mapping[str, View]) -> dict[str, Any]:
    """A batch whose images are on canvases, with the views in their place.

    Args:
      batch: `canvas` [B, C, C, 3] uint8; for each view a pair, what `View.begin_on_canvas` gives for each image; and
        whatever else.
      views: by their keys in the batch.
    """
    rest = {name: values for name, values in batch.items() if name != "canvas"}
    return rest | {key: view.of_canvas(batch["canvas"], *batch[key]) for key, view in views.items()}


def crop_and_flip(
    size: int, min_area: float = 0.08, max_aspect: float = 4 / 3, flip: bool = True, more: Sequence[Operator] = ()
) -> View:
    """The view of fine-tuning, distillation and supervised training: [H, W, 3] -> [size, size, 3] float32 in [0, 1].

    Args:
      size, min_area, max_aspect: see `RandomCrop`.
      flip: mirror half of the views.
      more: further operators, applied at the end.
    """
    mirrored = [random_flip()] if flip else []
    return View(RandomCrop(size, min_area, max_aspect), [*mirrored, clip(), *more])


def pretrain_view(
    size: int,
    min_area: float = 0.08,
    max_aspect: float = 4 / 3,
    flip: bool = True,
    jitter: float = 1.0,
    gray: float = 0.2,
    blur: bool = True,
    more: Sequence[Operator] = (),
) -> View:
    """One view of pretraining: [H, W, 3] uint8 or float32 -> [size, size, 3] float32 in [0, 1].

    Args:
      size, min_area, max_aspect: see `RandomCrop`.
      flip: mirror half of the views.
      jitter: strength s of the colour jitter, which 80 % of the views get; 0: no view gets it.
      gray: share of the views that turn grey.
      blur: blur half of the views.
      more: further operators, applied before the blur.

    Example:
      view = pretrain_view(size=32, jitter=0.5, blur=False)
      image_of_view = view(image, tf.constant([0, 1]))  # [32, 32, 3]
    """
    done: list[Operator] = []
    if flip:
        done.append(random_flip())
    if jitter > 0:
        done.append(sometimes(0.8, color_jitter(jitter)))
    if gray > 0:
        done.append(sometimes(gray, grayscale()))
    done += [clip(), *more]
    if blur and blur_kernel_size(size) >= 2:  # A smaller kernel would change nothing: its radius is 0.
        done.append(sometimes(0.5, random_blur()))
    return View(RandomCrop(size, min_area, max_aspect), done)
