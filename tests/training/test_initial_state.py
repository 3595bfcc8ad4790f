"""The run that training starts from: what its record must say."""

import json
from typing import Any

import pytest

from mpq_jax.configs import digits
from mpq_jax.configs.double_rounding import use as use_double_rounding
from mpq_jax.training import config_record
from mpq_jax.training.initial_state import check_start


@pytest.fixture
def config(tmp_path) -> Any:
    """Of the mixed supernet of Double Rounding, which starts from a run of all precisions."""
    config: Any = use_double_rounding(digits.get_config(), candidates=(8, 4, 2))
    config.method, config.init_from = "double_rounding_mixed", str(tmp_path)
    return config


def write_record(config, directory, **changes):
    record = json.loads(config_record.to_json(config)) | changes
    (directory / "config.json").write_text(json.dumps(record))


def test_a_run_of_the_right_kind_is_accepted_and_others_are_named(config, tmp_path):
    check_start(config)  # without a record, its variables tell the rest
    write_record(config, tmp_path, method="double_rounding")
    check_start(config)
    write_record(config, tmp_path, method="plain")
    check_start(config)
    write_record(config, tmp_path, method="csq")
    with pytest.raises(ValueError, match="a run of csq; wanted one of double_rounding, or a float"):
        check_start(config)


@pytest.mark.parametrize("missing", ["bits", "double_rounding"])
def test_a_record_that_lacks_what_must_match_is_refused(config, tmp_path, missing):
    write_record(config, tmp_path, method="double_rounding")
    record = json.loads((tmp_path / "config.json").read_text())
    del record[missing]
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"trained otherwise: config.{missing}.* was None, now"):
        check_start(config)


@pytest.mark.parametrize("text", ["", "true", "[]", "{}", "null", '{"method": "pl'])
def test_a_damaged_record_is_named(config, tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    message = "config.json (is damaged: the text is not JSON|is no config of a training run)"
    with pytest.raises(ValueError, match=message):
        check_start(config)


def test_the_path_is_read_as_a_user_writes_it(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").mkdir()
    write_record(config, tmp_path / "run", method="csq")
    for place in ("~/run", f"{tmp_path}/no/../run"):
        config.init_from = place
        with pytest.raises(ValueError, match=f"config.init_from is '{place}', a run of csq"):
            check_start(config)
