"""The network, losses, gradients, LARS, schedule and operators compute what the published release recorded."""

import json
import re

import numpy as np
import parity
import pytest
from conftest import ROOT


@pytest.fixture(scope="module", params=parity.NETWORKS)
def case(request, golden):
    """A recorded network with its weights, and what was recorded."""
    made = parity.Case(golden / request.param)
    made.reset()
    return made


def check(rows):
    """Every error is within its tolerance, and the table in the docs has every quantity."""
    rows = list(rows)
    assert rows and not [row for row in rows if not row.met]
    page = (ROOT / "docs" / "parity.md").read_text()
    assert not [row for row in rows if f"| {row.quantity} |" not in page or row.where not in page]


def test_every_variable_has_its_place_and_shape(case):
    assert {name: list(variable.shape) for name, variable in case.variables.items()} == dict(case.spec["variables"])
    assert list(case.variables) == [name for name, _ in case.spec["variables"]]  # in creation order
    assert len(case.variables) == len(case.model.variables)


def test_forward_in_inference_mode(case):
    case.reset()
    check(parity.forward_rows(case.name, case.model, case.io))


def test_forward_with_batch_norm_folded(case):
    """It gives the recorded numbers too, and those of the network with its batch norms up to rounding."""
    case.reset()
    folded = case.model.inference()(case.io["images"])
    whole = case.model(case.io["images"], training=False)
    assert len(folded.hiddens) == len(whole.hiddens)
    for k, hidden in enumerate(folded.hiddens):
        assert parity.error(hidden, case.io[f"eval/head_{k}"]) < 1e-4
        assert parity.error(hidden, whole.hiddens[k]) < 1e-5
    assert parity.error(folded.logits, whole.logits) < 1e-5


def test_losses_and_gradients(case):
    recorded = [name for name in case.io if name.startswith("grad_norm/")]
    assert len(recorded) == len(case.model.trainable_variables)
    check(parity.training_rows(case))


# Of the undetermined trajectory the first loss alone has a tolerance, and the test above compares it.
@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.slow if name in parity.UNDETERMINED else ()) for name in parity.NETWORKS],
    indirect=True,
)
def test_three_steps_of_lars(case):
    check(parity.step_rows(case))


def test_published_checkpoints(golden):
    check(parity.published_rows(golden))


def test_schedule(golden):
    check(parity.schedule_rows(golden))
    assert len(json.loads((golden / "schedule.json").read_text())) == 6


def test_operators_and_the_evaluation_crop(golden):
    rows = list(parity.augment_rows(golden))
    check(rows)
    of_inputs = {"photo_0", "photo_1", "eval_preprocess_96_nocrop_in"}
    recorded = set(np.load(golden / "augment.npz")) - of_inputs
    assert {row.quantity.replace(" ", "_") for row in rows} == recorded


def test_an_error_above_its_tolerance_is_told():
    assert not parity.Row("where", "what", 2e-4, 1e-4).met
    assert parity.Row("where", "what", 2e-4, None).met
    assert parity.error([1.0, -4.0], [1.0, -2.0]) == 1.0
    with pytest.raises(ValueError, match="shape"):
        parity.error([1.0], [1.0, 2.0])


def test_no_tolerance_is_missing_where_the_trajectory_is_determined():
    page = (ROOT / "docs" / "parity.md").read_text()
    assert parity.UNDETERMINED == ("r14_1x_sk1",) and "no tolerance is kept for them" in page
    assert re.findall(r"^<!-- (\w+) -->$", page, re.M) == ["networks", "spread", "schedule", "augmentation"]
