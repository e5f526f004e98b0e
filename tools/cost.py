"""What a run costs on named hardware, calculated: steps, hours, memory, traffic, and what drives them.

    python tools/cost.py
    python tools/cost.py --run=configs/pretrain_r50_1x_sk0.flags --hardware=a100 --devices=64 --share=0.2 --price=2

Nothing is measured here. The program counts the FLOPs, the bytes and the steps of the run from its flags, as
--mode=plan does; the hardware, and which share of its peak a training reaches, are assumptions in tools/hardware.json,
each with its source, and each can be given on the command line. The time of a step is that of its FLOPs and that of its
traffic, one after the other: an accelerator that does both at once is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import FIELDS, Config

RUNS = ("configs/pretrain_r50_1x_sk0.flags", "configs/pretrain_r152_3x_sk1.flags")
HARDWARE = ROOT / "tools" / "hardware.json"
DEVICES = 128  # as many as the paper had
FLOAT_BYTES = 4
# Numbers that synchronised batch norm adds up over the replicas, for each channel: sum and sum of squares in the
# forward pass, and two sums in the backward pass.
BN_FORWARD, BN_BACKWARD = 2, 2


class Hardware(NamedTuple):
    """A kind of device.

    Attributes:
      device: in words.
      peak_flops: FLOPs a second, at most.
      share: of the peak, which training reaches.
      memory: bytes.
      link: bytes a second that it sends to the others.
      price: of an hour; 0: not known.
    """

    device: str
    peak_flops: float
    share: float
    memory: float
    link: float
    price: float = 0.0


class Traffic(NamedTuple):
    """Bytes of a step that all replicas put together, by what they are. Each replica has as many in the end.

    Attributes:
      gradients: added up.
      batch_norm: sums, added up: of the encoder and head, and of the momentum encoder.
      embeddings: gathered: every view's z or key; without the memory their gradients are added up too.
    """

    gradients: int
    batch_norm: int
    embeddings_gathered: int
    embeddings_added: int

    def sent_by_each(self, replicas: int) -> float:
        """Bytes that each replica sends in a ring: a sum goes round twice, what is gathered once."""
        added = self.gradients + self.batch_norm + self.embeddings_added
        return (2 * added + self.embeddings_gathered) * (replicas - 1) / replicas


def traffic(trained: int, channels: int, batch: int, width: int, pretrains: bool, has_queue: bool) -> Traffic:
    """The traffic of a step.

    Args:
      trained: parameters that get a gradient.
      channels: channels of all synchronised batch norms, each layer's counted once.
      batch: images in a global batch.
      width: of z.
      pretrains: whether the loss compares views.
      has_queue: whether a momentum encoder makes the keys.
    """
    of_momentum = BN_FORWARD * channels if has_queue else 0
    views = 2 * batch * width if pretrains else 0
    values = (
        trained,
        (BN_FORWARD + BN_BACKWARD) * channels + of_momentum,
        views,
        0 if has_queue else views,
    )
    return Traffic(*(FLOAT_BYTES * value for value in values))


def estimate(planned: Mapping[str, Any], bytes_of_step: Traffic, hardware: Hardware, devices: int) -> dict[str, Any]:
    """What a run takes on so many devices.

    Args:
      planned: what `plan.plan` returned for so many replicas.
      bytes_of_step: its traffic.
      hardware, devices: what it runs on.
    """
    compute = planned["flops_per_step"] / devices / (hardware.share * hardware.peak_flops)
    sent = bytes_of_step.sent_by_each(devices)
    communication = sent / hardware.link if hardware.link else 0.0
    seconds = compute + communication
    hours = seconds * planned["train_steps"] / 3600
    found = {
        "steps": planned["train_steps"],
        "step_seconds": seconds,
        "compute_seconds": compute,
        "communication_seconds": communication,
        "sent_bytes_per_step": sent,
        "hours": hours,
        "device_hours": hours * devices,
        "memory_bytes_per_replica": planned["memory_bytes_per_replica"],
        "fits": planned["memory_bytes_per_replica"] <= hardware.memory,
    }
    if hardware.price:
        found["price"] = hours * devices * hardware.price
    return found


def config_of(flagfile: Path) -> Config:
    """The Config of a flagfile, whose lines are flags and comments."""
    flags = [line[2:].split("=", 1) for line in flagfile.read_text().splitlines() if line.startswith("--")]
    kinds: dict[str, Any] = {name: type(FIELDS[name].default) for name, _ in flags}
    values: dict[str, Any] = {
        name: value.lower() == "true" if kinds[name] is bool else kinds[name](value) for name, value in flags
    }
    return Config(**{**values, "mode": "plan"})


def counted(config: Config, devices: int) -> tuple[dict[str, Any], Traffic]:
    """What the run of `config` takes on so many replicas, whatever they are, and its traffic."""
    import plan
    import tasks
    from plan import footprint

    planned = plan.plan(config, devices, timing=False)
    network = tasks.skeleton(config, 0, config.image_size)
    channels = sum(v.shape[0] for v in network.variables if v.name == "moving_mean") if config.global_bn else 0
    trained = planned["encoder_parameters"] + planned["built_head_parameters"]
    trained -= sum(v.shape[0] for v in network.variables if v.name.startswith("moving_"))
    trained += planned.get("supervised_head_parameters", 0)
    pretrains = config.train_mode == "pretrain"
    found = traffic(
        trained, channels, config.train_batch_size, network.output_dim, pretrains, footprint.has_queue(config)
    )
    return planned, found


def rows(runs: Sequence[Path], hardware: Mapping[str, Hardware], devices: int) -> list[dict[str, Any]]:
    """The estimates of every run on each kind of hardware."""
    found = []
    for run in runs:
        planned, of_step = counted(config_of(run), devices)
        for name, kind in hardware.items():
            made = estimate(planned, of_step, kind, devices)
            found.append({"run": run.stem, "hardware": name, "devices": devices, **of_step._asdict(), **made})
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The estimates as a table in Markdown."""
    head = (
        "| run | devices | steps | s a step (FLOPs + traffic) | sent a step | memory a replica | hours | device hours |"
    )
    lines = [head, "| --- " * 8 + "|"]
    for row in found:
        memory = f"{row['memory_bytes_per_replica'] / 1e9:.1f} GB" + ("" if row["fits"] else ", does not fit")
        parts = f"{row['compute_seconds']:.2f} + {row['communication_seconds']:.2f}"
        sent = f"{row['sent_bytes_per_step'] / 1e6:,.0f} MB"
        cells = [row["run"], f"{row['devices']} {row['hardware']}", f"{row['steps']:,}", parts, sent, memory]
        hours = [f"{row['hours']:,.0f}", f"{row['device_hours']:,.0f}"]
        lines.append("| " + " | ".join([*cells, *hours]) + " |")
        if "price" in row:
            lines[-1] += f" {row['price']:,.0f} in all |"
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table, or its rows as JSON."""
    known = json.loads(HARDWARE.read_text())
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--run", action="append", help="a flagfile; may be given several times; else the paper's two")
    parser.add_argument("--hardware", action="append", choices=list(known), help="else all of tools/hardware.json")
    parser.add_argument("--devices", type=int, default=DEVICES, help=f"replicas, {DEVICES} if not given")
    for name in ("peak_flops", "share", "memory", "link", "price"):
        parser.add_argument(f"--{name}", type=float, help="in place of that of tools/hardware.json")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    changes = {name: value for name in Hardware._fields if (value := getattr(given, name, None)) is not None}
    chosen = {
        name: Hardware(**{key: known[name][key] for key in Hardware._fields if key in known[name]} | changes)
        for name in given.hardware or known
    }
    found = rows([Path(run) for run in given.run or [str(ROOT / run) for run in RUNS]], chosen, given.devices)
    if given.json:
        print(json.dumps(found))
        return
    print(table(found))
    for name in chosen:
        of = known[name]
        print(
            f"\n{name}: {of['device']}. Peak: {of['peak_source']}. Share {chosen[name].share:g}: {of['share_source']}."
        )
        print(f"Link: {of['link_source']}.")


if __name__ == "__main__":
    main()
