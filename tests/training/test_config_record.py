"""config.json: what is kept of a config, and which runs may go on under which config."""

import json
from typing import Any

import pytest

from mpq_jax.configs import digits
from mpq_jax.configs.csq import digits as csq_digits
from mpq_jax.training import config_record

OLD = {  # as the first version wrote it
    "method": "csq",
    "accumulate": 1,
    "keep_last": 2,
    "data": {"name": "digits", "digits": {}, "heldout_fraction": 0.2},
    "csq": {"ticket": 0.4, "target": 3.0},
}


@pytest.fixture
def config() -> Any:
    return digits.get_config()


def flat(config) -> set[str]:
    """The paths of all keys of a config."""
    return {
        f"{name}.{key}" if key else name
        for name, value in config.items()
        for key in ([""] if not hasattr(value, "keys") else ["", *flat(value)])
    }


def test_a_written_config_is_read_again_as_json(config, tmp_path):
    config_record.write(config, tmp_path)
    read = config_record.read(tmp_path)
    assert read.pop("version") == config_record.VERSION
    assert read == json.loads(config.to_json())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    config.seed = 3
    config_record.write(config, tmp_path)  # the first start's is kept
    assert config_record.read(tmp_path)["seed"] == 0


def test_every_old_name_says_the_new_one(config):
    known = flat(config)
    for old, new in config_record.RENAMED.items():
        if not new.startswith("search."):
            assert new in known, new
        assert old not in known
        assert config_record.explain(old) == f"it is called config.{new} now"
    assert config_record.explain("ticket") == "it is called config.csq.freeze_scheme now"
    assert config_record.explain("csq_uniform.harden") == (
        "the variant 'uniform' takes the options of config.csq"
    )
    assert config_record.explain("keep_last") and config_record.explain("epoch") is None


def test_a_run_of_an_older_version_is_refused_with_the_new_names(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    with pytest.raises(ValueError) as error:
        config_record.read(tmp_path)
    message = str(error.value)
    assert "config.json is of version 1, and this mpq_jax reads version 2" in message
    for pair in ("accumulate is config.grad_accum_steps", "csq.ticket is config.csq.freeze_scheme"):
        assert f"config.{pair} now" in message
    assert "config.data.heldout_fraction is config.data.validation_fraction now" in message
    assert "Go on with the mpq_jax that wrote it, or train anew in another --workdir" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff", "config.json is damaged: the text is not JSON"),
        (b"", "config.json is damaged: the text is not JSON"),
        (b"[]", "is no config of a training run"),
        (b"true", "is no config of a training run"),
        (b'{"architectures": ["ResNet"]}', "is no config of a training run"),
        (b'{"data": "digits", "version": 2}', "is no config of a training run"),
    ],
)
def test_files_of_other_programs_are_refused(tmp_path, text, message):
    (tmp_path / "config.json").write_bytes(text)
    for reader in (config_record.read, config_record.method_of):
        with pytest.raises(ValueError, match=message):
            reader(tmp_path)


def test_the_method_is_read_of_any_version(config, tmp_path):
    assert config_record.method_of(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    assert config_record.method_of(tmp_path) == "csq"


@pytest.mark.parametrize("model", [{}, [], "resnet8", None])
def test_a_record_without_a_model_is_refused(config, tmp_path, model):
    record = json.loads(config_record.to_json(config)) | {"model": model}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="config.json is no config of a training run of mpq_jax"):
        config_record.check_same_run(config, tmp_path)


def test_checkpoints_without_a_record_are_of_an_unknown_config(config, tmp_path):
    config_record.check_same_run(config, tmp_path)
    for name in ("checkpoints", "checkpoints/5.damaged", "checkpoints/6.orbax-checkpoint-tmp-0"):
        (tmp_path / name).mkdir()
        config_record.check_same_run(config, tmp_path)  # of a start that saved nothing
    (tmp_path / "checkpoints" / "4").mkdir()
    message = "holds checkpoints but no config.json, .*: bring config.json back, or take another"
    with pytest.raises(ValueError, match=message):
        config_record.check_same_run(config, tmp_path)
    config_record.write(config, tmp_path)
    config_record.check_same_run(config, tmp_path)


def test_a_workdir_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no run"):
        config_record.read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"log_every": 3, "save_every": 5, "device_count": 2, "search.strategy": "greedy"},
        {"data.reading.workers": 2, "data.reading.max_corrupt": 7},
        {"csq.target": 2.0, "double_rounding.update": "joint"},  # options of other methods
    ],
)
def test_a_run_goes_on_with_other_values_that_do_not_change_training(config, tmp_path, changes):
    config_record.write(config, tmp_path)
    config.update_from_flattened_dict(changes)
    config_record.check_same_run(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "config.seed was 0, now 3"),
        ({"rfquant.momentum": 0.5}, "config.rfquant was .*'momentum': 0.9.* now .*'momentum': 0.5"),
        ({"data.reading.min_area": 0.5}, "config.data was .*'min_area': 0.08"),
        ({"method": "plain"}, "config.method was 'rfquant', now 'plain'"),
    ],
)
def test_a_run_does_not_go_on_with_values_that_change_training(config, tmp_path, changes, message):
    config_record.write(config, tmp_path)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=f"holds a run of another config: {message}"):
        config_record.check_same_run(config, tmp_path)


def test_a_variant_does_not_go_on_with_other_options_of_its_method(tmp_path):
    config: Any = csq_digits.get_config("uniform")
    config_record.write(config, tmp_path)
    config.csq.target = 2.0  # decides on the planes of the baseline
    with pytest.raises(ValueError, match="config.csq was"):
        config_record.check_same_run(config, tmp_path)


def test_some_keys_may_be_freed(config, tmp_path):
    config_record.write(config, tmp_path)
    config.init_from = "moved"
    config_record.check_same_run(config, tmp_path, free_keys=("init_from",))
    with pytest.raises(ValueError, match="config.init_from was '', now 'moved'"):
        config_record.check_same_run(config, tmp_path)


def test_the_file_of_a_users_model_may_move_but_not_its_class(config, tmp_path):
    config.model.name = "/here/my_models.py:Net"
    config_record.write(config, tmp_path)
    config.model.name = "/there/my_models.py:Net"
    config_record.check_same_run(config, tmp_path)
    config.model.name = "/here/my_models.py:Other"
    with pytest.raises(ValueError, match=r"config.model was .*Net.* now .*Other"):
        config_record.check_same_run(config, tmp_path)


def test_what_leaves_the_machine_names_no_place_of_it(config, tmp_path):
    config.data.name, config.data.folder.path = "folder", "/private/images"
    config.init_from = "/private/run"
    config.model.name = "/private/my_models.py:Net"
    record = config_record.to_record(config)
    assert "private" not in json.dumps(record)
    assert record["model"]["name"] == "my_models.py:Net"
    assert record["data"] == {
        "name": "folder",
        "image_size": 224,
        "interpolation": "bilinear",
        "resize_factor": config.data.reading.resize_factor,
    }
    assert "rfquant" in record and not {"search", "csq", "init_from"} & set(record)
