"""The search program as a user runs it, on a small supernet."""

import csv
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from test_train import FLOAT, SUPERNET, Programs, programs, run, run_all

import train
from configs import digits
from mpq_jax import bits as bit_configs
from mpq_jax import costs
from mpq_jax.layer_table import LayerTable

pytestmark = pytest.mark.xdist_group("programs")  # shares runs with test_train

LEVELS = (4, 3)  # of SMOKE
PNG = b"\x89PNG\r\n\x1a\n"


class Searched(NamedTuple):
    """One search by BitOPs and one by bytes, of the same supernet."""

    directory: Path
    output: str
    bytes_directory: Path
    bytes_output: str
    refused: dict[str, tuple[int, str]]


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Programs:
    return programs(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def searched(shared, tmp_path_factory) -> Searched:
    directory = tmp_path_factory.mktemp("searched")
    by_bytes, untrained = directory / "bytes", directory / "untrained"
    shutil.copytree(shared.smoke, by_bytes)
    smoke = ("search.py", *shared.smoke_flags)
    code, output = run(*smoke, f"--workdir={shared.smoke}", output=directory / "bitops.txt")
    assert code == 0, output
    refusals = {
        "too small": (*smoke, f"--workdir={shared.smoke}", "--config.search.budgets=(1.0,)"),
        "unit": (*smoke, f"--workdir={shared.smoke}", "--config.search.budget=watts"),
        "float": ("search.py", *FLOAT, f"--workdir={shared.float_run}"),
        "other config": ("search.py", *SUPERNET, f"--workdir={shared.float_run}"),
        "untrained": (*smoke, f"--workdir={untrained}"),
    }
    kilobytes = (*smoke, f"--workdir={by_bytes}", "--config.search.budget=bytes")
    kilobytes += ("--config.search.levels=()", "--config.search.budgets=(2000.0, 1500.0)")
    results = run_all(refusals | {"bytes": kilobytes}, directory, cache=shared.cache)
    bytes_code, bytes_output = results.pop("bytes")
    assert bytes_code == 0, bytes_output
    return Searched(shared.smoke / "search", output, by_bytes / "search", bytes_output, results)


@pytest.fixture(scope="module")
def table() -> LayerTable:
    config = digits.get_config()
    config.model.options.width = 4
    return train.build(config).table


def read_bits(directory: Path, table: LayerTable) -> dict[str, bit_configs.BitConfig]:
    return {
        path.stem: bit_configs.from_json(path.read_text(), table.names)
        for path in directory.glob("bits_*.json")
    }


def test_writes_bits_within_each_budget(searched, table):
    found = read_bits(searched.directory, table)
    assert set(found) == {f"bits_{level}-bit_level" for level in LEVELS}
    for level in LEVELS:
        cost = costs.bitops(table, found[f"bits_{level}-bit_level"])
        assert cost <= costs.bitops(table, table.uniform(level, level))


def test_writes_bits_within_budgets_of_bytes(searched, table):
    found = read_bits(searched.bytes_directory, table)
    for budget in (2000, 1500):
        assert costs.model_bytes(table, found[f"bits_{budget / 1024:.4g}_KiB"]) <= budget
    assert "KiB" in searched.bytes_output


def test_writes_tables_and_plots(searched, table):
    with (searched.directory / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    groups = {row["group"] for row in rows.values()}
    assert groups == {"float", "uniform", "searched"}
    assert [name for name, row in rows.items() if row["group"] == "uniform"] == [
        f"uniform {bits}/{bits}"
        for bits in table.candidates
        if bits in digits.get_config().bits.candidates
    ]
    for name, bits in read_bits(searched.directory, table).items():
        row = rows[name.removeprefix("bits_").replace("_", " ")]
        assert float(row["bitops"]) == costs.bitops(table, bits)
        assert 0 < float(row["test_accuracy"]) <= 1
    with (searched.directory / "path.csv").open() as file:
        path = list(csv.DictReader(file))
    assert {row["phase"] for row in path} <= {"weights", "acts"} and len(path) > 4
    for plot in ("frontier.png", "bits.png"):
        assert (searched.directory / plot).read_bytes().startswith(PNG)


def test_prints_float_uniform_and_searched_configurations(searched):
    shown = [line for line in searched.output.splitlines() if line.count("│") == 5 and "%" in line]
    names = [line.split("│")[1].strip() for line in shown]
    uniform = [f"uniform {bits}/{bits}" for bits in (6, 5, 4, 3, 2)]
    assert sorted(names) == sorted(["float", *uniform, "4-bit level", "3-bit level"])
    assert names[0] == "float"
    accuracy = {
        name: float(line.split("│")[4].strip(" %")) for name, line in zip(names, shown, strict=True)
    }
    assert accuracy["float"] > 85 and accuracy["uniform 6/6"] > 70
    assert f"bits, tables and plots are in {searched.directory}" in searched.output


def test_configurations_never_recompile(searched):
    (line,) = re.findall("^compilations: (.*)$", searched.output, re.M)
    counts = dict(re.findall(r"(\w+) x(\d+)", line))
    assert counts["score_configs"] == counts["recalibrate"] == "1", line


REFUSALS = {
    "too small": r"no configuration costs as little as \[1.0\]: the reachable range is \d+",
    "unit": r"config.search.budget is 'watts'; known: \['bitops', 'bytes'\]",
    "float": "was trained by 'plain', which has no bits to search; pass the workdir and config",
    "other config": "holds a run of another config: .*config.method was 'plain', now 'rfquant'",
    "untrained": "untrained holds no training run; run train.py with the same flags first",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_searched_is_refused_with_what_can(searched, name):
    code, output = searched.refused[name]
    assert code == 1, output
    assert "Traceback" not in output
    assert re.search(REFUSALS[name], output), output
