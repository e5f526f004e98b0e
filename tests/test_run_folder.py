"""The folder of a run: what lives there is known, and JSON is written whole or not at all."""

import json

import pytest
import tensorflow as tf
import tiny

import run_folder
from errors import UserError


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return tiny.pretrained(tmp_path_factory)


def test_the_config_of_a_run_is_read_from_its_folder(pretrained, tmp_path):
    assert run_folder.read_config(pretrained)["resnet_depth"] == 10
    assert run_folder.read_config(str(tmp_path)) is None
    assert run_folder.read_config(str(tmp_path / "nowhere")) is None


def test_a_model_dir_that_is_a_file_or_holds_a_damaged_config_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run_folder.read_config(str(tmp_path / "file"))
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config.json cannot be read") as error:
        run_folder.read_config(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[1, 2]", '{"name": "of another program"}'])
def test_a_config_of_another_program_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"--model_dir={tmp_path}"):
        run_folder.read_config(str(tmp_path))


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    run_folder.write_json(str(path), {"top_1": 0.5})
    with pytest.raises(TypeError):
        run_folder.write_json(str(path), {"top_1": object()})
    assert json.loads(path.read_text()) == {"top_1": 0.5}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tf.io.gfile, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_folder.write_json(str(path), {"top_1": 0.9})
    assert json.loads(path.read_text()) == {"top_1": 0.5}
    monkeypatch.undo()
    run_folder.write_json(str(path), {"top_1": 0.9})
    assert json.loads(path.read_text()) == {"top_1": 0.9}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/run cannot be written"):
        run_folder.write_config(str(tmp_path / "file" / "run"), {})
