"""SavedModels that plain TensorFlow loads: every endpoint of the network, and signatures to serve."""

from __future__ import annotations

import os

import tensorflow as tf

import augment
import checkpoint
import model as model_lib
import run_folder
import sources
import tasks
from config import Config


class Exported(tf.Module):
    """`module(images, trainable)` on images [N, H, W, 3] float32 in [0, 1]: a dict of the network's activations.

    Keys, as in the published SavedModels: `initial_conv`, `initial_max_pool`, `block_group1` to `4`,
    `final_avg_pool`, `proj_head_input`, `proj_head_<k>` for every layer of the projection head, `proj_head_output`,
    and `logits_sup` where the network has a supervised head. With `trainable=True`, batch norm takes the batch's
    statistics, and gradients flow to `trainable_variables_list`.

    Signatures: `serving_default` (images -> probabilities, classes, embedding) and `serve_bytes` (encoded images of
    any size -> the same). Without a supervised head both give the embedding alone.
    """

    def __init__(self, model: model_lib.Model, image_size: int, class_names: list[str]) -> None:
        super().__init__(name="simclr")
        self.model = model
        self.trainable_variables_list = [variable.value for variable in model.trainable_variables]
        self.class_names = tf.Variable(class_names or [""], trainable=False, dtype=tf.string)
        self._image_size = image_size

    @tf.function(autograph=False)
    def __call__(self, images: tf.Tensor, trainable: bool) -> dict[str, tf.Tensor]:
        outputs = self.model(images, training=trainable)
        activations = {**outputs.endpoints, "proj_head_input": outputs.h, "proj_head_output": outputs.z}
        activations |= {f"proj_head_{k}": hidden for k, hidden in enumerate(outputs.hiddens) if k}
        if outputs.logits is not None:
            activations["logits_sup"] = outputs.logits
        return {name: tf.identity(value, name) for name, value in activations.items()}

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None, None, None, 3], tf.float32, name="images")])
    def serve(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        """The answer for images [N, H, W, 3] in [0, 1] of the network's size."""
        outputs = self.model(images, training=False)
        answer = {"embedding": outputs.h}  # [N, D]
        if outputs.logits is not None:
            answer["probabilities"] = tf.nn.softmax(outputs.logits)  # [N, classes]
            answer["classes"] = tf.gather(self.class_names, tf.argmax(outputs.logits, axis=1))  # [N] string
        return answer

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def serve_bytes(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        """The answer for encoded images [N] of any size, cropped and resized as in evaluation."""
        size = self._image_size

        def view(encoded: tf.Tensor) -> tf.Tensor:
            return augment.center_crop(sources.decode_image(encoded), size)

        images = tf.map_fn(view, image_bytes, fn_output_signature=tf.TensorSpec([size, size, 3], tf.float32))
        return self.serve(images)


def export(config: Config, weights: checkpoint.Weights) -> str:
    """Exports a network to <model_dir>/saved_model/<step>. Returns that folder. For the chief alone.

    The folder is there whole or not at all. Of the exports in the model_dir, this one stays and the newest others,
    `keep_hub_module_max` in all (0: every one).

    Args:
      config: its model_dir, image_size and keep_hub_module_max.
      weights: the network.

    Raises:
      UserError: where it cannot be written.
    """
    module = Exported(tasks.restore_network(weights), config.image_size, weights.classes)
    images = tf.TensorSpec([None, None, None, 3], tf.float32, name="images")
    module.__call__.get_concrete_function(images, trainable=True)
    module.__call__.get_concrete_function(images, trainable=False)
    base = os.path.join(config.model_dir, "saved_model")
    folder = os.path.join(base, str(weights.step))
    with run_folder.writing(f"--model_dir={config.model_dir}: {folder}"):
        _write(module, folder)
        _remove_surplus(base, weights.step, config.keep_hub_module_max)
    return folder


def _write(module: Exported, folder: str) -> None:
    """Writes the SavedModel beside `folder` first, and moves it there when it is whole."""
    unfinished = f"{folder}.unfinished"
    signatures = {"serving_default": module.serve, "serve_bytes": module.serve_bytes}
    try:
        _remove(unfinished)  # of an export that was killed
        tf.saved_model.save(module, unfinished, signatures)
        _remove(folder)
        tf.io.gfile.rename(unfinished, folder)
    except (OSError, tf.errors.OpError):
        _remove(unfinished)
        raise


def _remove(folder: str) -> None:
    if tf.io.gfile.exists(folder):
        tf.io.gfile.rmtree(folder)


def _remove_surplus(base: str, step: int, keep: int) -> None:
    """Leaves the export of `step` in `base`, and of the others the newest, `keep` in all; 0: all of them."""
    if not keep:
        return
    names = [name.rstrip("/") for name in tf.io.gfile.listdir(base)]
    others = sorted(int(name) for name in names if name.isdigit() and int(name) != step)
    for old in others[: max(0, len(others) - (keep - 1))]:
        _remove(os.path.join(base, str(old)))
