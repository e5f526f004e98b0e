"""The benchmark of starts: folders of links with planted damage, the moment of the first step, a whole small run."""

import os

import pytest
import starts

import sources


def test_one_file_of_a_hundred_is_damaged_and_they_are_of_every_class_and_kind(tmp_path):
    folder = tmp_path / "images"
    bad = starts.make_folder(folder, 1200, damaged=True)
    assert len(bad) == len(set(bad)) == 12
    assert len({path.split("/")[0] for path in bad}) == starts.CLASSES
    found = sources.load("image_folder", "train", str(folder))
    assert found.examples == 1200 and len(found.classes) == starts.CLASSES
    numbers = [i for i, path in enumerate(found.names) if path in bad]
    unlabelled = found.without_labels_of_unreadable(range(1200))
    assert numbers == [i for i in range(1200) if unlabelled.labels[i] < 0]
    assert len({os.stat(folder / path).st_ino for path in bad}) == 4


def test_the_clock_stops_at_the_first_step(tmp_path, monkeypatch):
    program = tmp_path / "run.py"
    lines = ["'recipe'", "'pretrain: step 1 of 3, loss 1'", "'pretrain: step 3 of 3, loss 1'"]
    program.write_text("import time\n" + "time.sleep(0.2)\n".join(f"print({line}, flush=True)\n" for line in lines))
    monkeypatch.setattr(starts, "ROOT", tmp_path)
    took = starts.start([], tmp_path, tmp_path / "log")
    assert took.seconds >= 0.2 and took.processor >= 0
    assert (tmp_path / "log").read_text().count("\n") == 3
    program.write_text("raise SystemExit(2)")
    with pytest.raises(SystemExit, match="has failed: see"):
        starts.start([], tmp_path, tmp_path / "log")


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit):
        starts.main([f"--output={tmp_path}"])
    assert "is not empty" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert starts.main([f"--output={tmp_path / 'out'}", "--files=400,800"]) == 0
    said = capsys.readouterr().out
    assert "| 800, 1 % of them damaged | " in said
    assert "8 of them damaged: 4 steps in" in said and "8 named, 0 missing, 0 wrong" in said
    assert "two workers: the same of 3 batches; 0 damaged images in them" in said
