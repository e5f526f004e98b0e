"""What a run costs, beside sums by hand and beside published times."""

import json

import pytest
from conftest import ROOT

import cost
import plan
from config import Config

KNOWN = json.loads(cost.HARDWARE.read_text())


def hardware(name, **changes):
    return cost.Hardware(**{key: KNOWN[name][key] for key in cost.Hardware._fields if key in KNOWN[name]} | changes)


def test_the_traffic_of_a_step_by_hand():
    """100 weights, 7 channels, 6 images with z of 5 numbers, 4 bytes each."""
    with_memory = cost.traffic(100, 7, 6, 5, pretrains=True, has_queue=True)
    assert with_memory == (400, 4 * (4 * 7 + 2 * 7), 4 * 2 * 6 * 5, 0)
    without = cost.traffic(100, 7, 6, 5, pretrains=True, has_queue=False)
    assert without == (400, 4 * 4 * 7, 240, 240)
    assert cost.traffic(100, 0, 6, 5, pretrains=False, has_queue=False) == (400, 0, 0, 0)
    # A ring of four: what is added goes round twice without one's own quarter, what is gathered once.
    assert without.sent_by_each(4) == 0.75 * (2 * (400 + 112 + 240) + 240)
    assert without.sent_by_each(1) == 0


def test_the_time_of_a_run_by_hand():
    planned = dict(flops_per_step=8e12, train_steps=3600, memory_bytes_per_replica=10e9)
    kind = cost.Hardware("some", peak_flops=10e12, share=0.2, memory=9e9, link=1e9, price=3.0)
    found = cost.estimate(planned, cost.Traffic(400_000_000, 0, 0, 0), kind, 2)
    assert (found["compute_seconds"], found["communication_seconds"]) == (2.0, 0.4)
    assert found["hours"] == pytest.approx(2.4) and found["device_hours"] == pytest.approx(4.8)
    assert found["price"] == pytest.approx(14.4) and not found["fits"]


@pytest.mark.parametrize(
    ("name", "devices", "config", "hours"),
    [
        # arXiv 2002.05709, section 2.2: "With 128 TPU v3 cores, it takes ~1.5 hours"
        ("tpu-v3", 128, dict(train_batch_size=4096, train_epochs=100, memory="none"), 1.5),
        # arXiv 2003.04297, table 3: 53 hours for 200 epochs
        ("v100", 8, dict(train_batch_size=256, train_epochs=200, memory="queue", global_bn=False), 53.0),
    ],
)
def test_the_share_of_the_peak_gives_the_published_time(name, devices, config, hours):
    config = Config(mode="plan", dataset="imagenet2012", lineareval_while_pretraining=False, **config)
    if config.memory == "queue":  # MoCo sends one view through each encoder and learns from it alone: half of ours
        hours *= 2
    planned = plan.plan(config, devices, timing=False)
    found = cost.estimate(planned, cost.Traffic(0, 0, 0, 0), hardware(name), devices)
    assert found["hours"] == pytest.approx(hours, rel=0.15)


def test_every_assumption_has_its_source():
    for name, known in KNOWN.items():
        assert {f"{what}_source" for what in ("peak", "share", "link")} <= set(known), name
        assert 0 < known["share"] < 1


def test_the_command_takes_other_assumptions(capsys):
    run = str(ROOT / "configs" / "pretrain_r50_1x_sk0.flags")
    flags = [f"--run={run}", "--hardware=a100", "--devices=64", "--share=0.3", "--price=2"]
    cost.main([*flags, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["run"] == "pretrain_r50_1x_sk0" and row["steps"] == 250_228
    planned, of_step = cost.counted(cost.config_of(ROOT / "configs" / "pretrain_r50_1x_sk0.flags"), 64)
    assert row["compute_seconds"] == pytest.approx(planned["flops_per_step"] / 64 / (0.3 * 156e12))
    assert row["price"] == pytest.approx(row["hours"] * 64 * 2)
    # ResNet-50 has 25.6 M weights with its ImageNet classifier; the head has 8.7 M with its batch norm.
    assert of_step.gradients == pytest.approx(4 * (25.6e6 + 8.7e6), rel=0.01)
    cost.main(flags)
    out = capsys.readouterr().out
    assert "| pretrain_r50_1x_sk0 | 64 a100 | 250,228 |" in out and "Share 0.3" in out
