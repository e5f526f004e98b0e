"""The benchmark of suggested labels: on clusters of unequal size they are worth more than random ones."""

import csv

import numpy as np
import pytest
import suggest
import tiny
from test_suggestion import blobs


def test_suggested_labels_are_better_than_random_ones_on_clusters_of_unequal_size(tmp_path):
    features, labels = blobs([300, 60, 40, 30])
    test_features, test_labels = blobs([20, 20, 20, 20], seed=1)
    found = suggest.trials(features, labels, test_features, test_labels, [4, 12], [0, 1, 2])
    assert len(found) == 2 * 2 * 3
    assert all(trial.classes == 4 for trial in found if trial.way == "suggested")
    mean = {way: np.mean([trial.top_1 for trial in found if trial.way == way]) for way in suggest.WAYS}
    assert mean["suggested"] > mean["random"] + 0.1
    lines = suggest.table(found, 4).splitlines()
    assert lines[2].startswith("| 4 | ") and lines[2].endswith(" and 4.0 of 4 |") and len(lines) == 4
    again = suggest.trials(features, labels, test_features, test_labels, [4, 12], [0, 1, 2])
    assert all((one.chosen == other.chosen).all() for one, other in zip(found, again, strict=True))
    names = [f"={i}" for i in range(len(labels))]
    suggest.write_choice(tmp_path / "a.csv", found[0], names, labels, ["a", "b", "c", "d"])
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [f"./={i}" for i in found[0].chosen]
    assert {row["label"] for row in rows} == {"a", "b", "c", "d"}


@pytest.mark.slow
def test_the_command(tmp_path, tmp_path_factory, capsys):
    run = tiny.pretrained(tmp_path_factory)
    flags = [f"--pretrained={run}", "--dataset=digits", "--eval_split=test[:50]", f"--output={tmp_path}"]
    assert suggest.main([*flags, "--train_split=train[:200]", "--counts=5", "--seeds=0"]) == 0
    assert "| 5 | " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "suggested_5_0.csv", "random_5_0.csv"}
    assert suggest.main([*flags, "--train_split=no"]) == 2
