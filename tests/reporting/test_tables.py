"""Results as JSON and CSV."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.report_pages import MIXED, TABLE, made_report

from mpq_jax.reporting import tables, write_report, write_tables
from mpq_jax.supernet.bits import BitConfig, from_json


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_bits_results_and_steps_are_written(tmp_path):
    report = made_report(found={"4-bit level": (MIXED, 0.9)})
    write_tables(report, tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    found = from_json((folder / "bits_4-bit_level.json").read_text(), TABLE.names)
    np.testing.assert_array_equal(found.weights, MIXED.weights)
    np.testing.assert_array_equal(found.acts, MIXED.acts)
    float_row, *rows = rows_of(folder / "results.csv")
    assert (float_row["name"], float_row["test_accuracy"]) == ("float", "0.9375")
    assert [row["name"] for row in rows] == [one.name for one in report.configs]
    for row, one in zip(rows, report.configs, strict=True):
        assert float(row["test_accuracy"]) == one.accuracy
        assert float(row["validation_accuracy"]) == 0.75
        assert {kind: float(row[kind]) for kind in one.costs} == one.costs
    (step,) = rows_of(folder / "path.csv")
    assert step == {
        "phase": "program", "change": "solution 1 of 8", "cost": "30000.0", "score": "0.25"
    }  # fmt: skip


def test_test_accuracies_that_are_not_known_are_left_empty(tmp_path):
    configs = tuple(one._replace(test=None) for one in made_report().configs)
    write_tables(made_report(configs=configs, float_accuracy=None), tmp_path)
    rows = rows_of(tmp_path / "results.csv")
    assert len(rows) == len(configs)
    assert all(row["test_accuracy"] == "" for row in rows)
    assert all(row["validation_accuracy"] == "0.75" for row in rows)


@pytest.mark.parametrize("found", [None, {}])
def test_a_report_is_written_without_a_workdir(tmp_path, found):
    write_report(made_report(found=found), tmp_path / "report", title="net on images")
    written = {path.name for path in (tmp_path / "report").iterdir()}
    wanted = {"results.csv", "path.csv", "frontier.png", "frontier.svg", "report.html"}
    assert written == wanted | ({"bits_A.json", "bits.png", "bits.svg"} if found is None else set())
    assert "net on images" in (tmp_path / "report" / "report.html").read_text()


def test_the_bits_of_a_scheme_are_written_line_by_line(tmp_path):
    def scheme(*weights):
        return BitConfig(jnp.array(weights, jnp.int32), jnp.full(len(weights), 8, jnp.int32))

    path = tmp_path / "scheme.csv"
    counted = {"integers": scheme(8, 5, 2, 0, 32), "planes": scheme(8, 3, 1, 0, 32)}
    layouts = {"convolution1": "1101", "convolution3": "0000"}
    tables.write_layer_bits(TABLE, counted, layouts, path)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["layer", "weights", "layout", "integers", "planes", "acts"],
        ["convolution0", "36", "", "8", "8", "8"],
        ["convolution1", "144", "1101", "5", "3", "8"],
        ["convolution2", "144", "", "2", "1", "8"],
        ["convolution3", "144", "0000", "0", "0", "8"],
        ["classifier", "12", "", "32", "32", "8"],
    ]
