"""Which combination of devices, chunks and recomputed blocks fits a run into a memory, and what it costs in time."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import plan.footprint as footprint
from config import Config
from errors import UserError

# What may be changed to take less memory, besides chunks and replicas, without changing what is learnt: flags and their
# values, each combination tried with every number of chunks. Another precision has its place here.
HALF = {"mixed_precision": "bfloat16"}
SAVINGS: tuple[dict[str, Any], ...] = ({}, {"remat": True}, HALF, {**HALF, "remat": True})
# Tried where nothing fits with the blocks of the loss that are chosen otherwise.
LEAST_LOSS_BLOCK = 8
# Replicas are doubled as often as that.
DOUBLINGS = 10
MOST_ROWS = 12
BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bytes_of(text: str) -> int:
    """The bytes that a text such as `16G`, `500M` or `15.5GiB` means.

    Raises:
      UserError: where it means none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kMGT]?)B?|([KMGT])iB)", text)
    size = 0
    if found:
        number, decimal, binary = found.groups()
        size = int(float(number) * (BINARY_BYTES[binary] if binary else BYTES[decimal]))
    if not size:
        raise UserError(f"--device_memory={text}: give a size such as 16G, 500M or 15.5GiB")
    return size


def fits(
    config: Config, replicas: int, device_bytes: int, classes: int, network: footprint.Counts,
    teacher: footprint.Counts | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The combinations that fit, the best first: those with the fewest replicas, and of them those with the least work.

    For each number of replicas there is a row for each of `SAVINGS`, with the fewest chunks that fit. More replicas are
    tried until a run needs no saving there.

    Args:
      config: the run. Its own chunks, `remat`, `loss_block` and `mixed_precision` do not matter.
      replicas: the least number of devices.
      device_bytes: the memory of each.
      classes, network, teacher: as for `footprint.memory_parts`.

    Returns:
      Of each combination `replicas`, `flags` (what is not the default, by name), `memory_bytes_per_replica` and
      `forward_passes`: the work for a view, in forward passes of the network, where a backward pass counts as two.
    """
    plain = dataclasses.replace(config, grad_accumulation=1, remat=False, loss_block=0, mixed_precision="float32")
    rows: list[dict[str, Any]] = []
    for _ in range(DOUBLINGS):
        if plain.train_batch_size % replicas:
            break
        found = []
        for saving in SAVINGS:
            for loss_block in (0, LEAST_LOSS_BLOCK if plain.train_mode == "pretrain" else 0):
                changed = dataclasses.replace(plain, **saving, loss_block=loss_block)
                row = _fewest_chunks(changed, replicas, device_bytes, classes, network, teacher)
                if row:
                    found.append(row)
                    break
        found.sort(key=lambda row: row["forward_passes"])
        rows += found
        if any(not row["flags"] for row in found):
            break
        replicas *= 2
    return rows[:MOST_ROWS]


def _fewest_chunks(
    config: Config, replicas: int, device_bytes: int, classes: int, network: footprint.Counts,
    teacher: footprint.Counts | None,
) -> dict[str, Any] | None:  # fmt: skip
    """The row of `config` with the fewest chunks that fit; None where not even chunks of one image do."""
    share = config.train_batch_size // replicas
    for chunks in footprint.divisors(share):
        changed = dataclasses.replace(config, grad_accumulation=chunks)
        needed = sum(footprint.memory_parts(changed, replicas, classes, network, teacher).values())
        if needed <= device_bytes:
            names = ("grad_accumulation", "loss_block", *{name: None for saving in SAVINGS for name in saving})
            defaults = {field.name: field.default for field in dataclasses.fields(Config)}
            flags = {name: getattr(changed, name) for name in names if getattr(changed, name) != defaults[name]}
            flops = footprint.flops_per_view(changed, classes, network, teacher)
            passes = flops / network.forward(footprint.outputs_of(changed, classes))
            return {
                "replicas": replicas,
                "flags": flags,
                "memory_bytes_per_replica": needed,
                "forward_passes": round(passes, 2),
            }
    return None


def table(rows: list[dict[str, Any]], device_bytes: int) -> str:
    """What `fits` returned, for people to read: the time of each is in steps of the first row's number of replicas."""
    memory = footprint.in_short(device_bytes, "B")
    if not rows:
        return f"nothing fits into {memory} a device: lower --image_size, --width_multiplier or --resnet_depth"
    shown = [("devices", "flags", "memory of each", "forward passes a view", "time of a step")]
    first = rows[0]
    for row in rows:
        flags = " ".join(f"--{name}={value}" for name, value in row["flags"].items())
        time = row["forward_passes"] / first["forward_passes"] * first["replicas"] / row["replicas"]
        needed = footprint.in_short(row["memory_bytes_per_replica"], "B")
        shown.append((str(row["replicas"]), flags or "none needed", needed, str(row["forward_passes"]), f"{time:.2f}"))
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join(
        [f"fits into {memory} a device, the best first (a backward pass counts as two forward ones):", *lines]
    )
