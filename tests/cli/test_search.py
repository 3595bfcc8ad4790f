"""`mpq search` on a small supernet; once as a user runs it, in a process of its own."""

import csv
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.program_results import PNG, make_table, read_bits
from helpers.programs import (
    FLOAT,
    SUPERNET,
    call,
    refusal,
    run,
)

from mpq_jax.configs import digits
from mpq_jax.supernet import costs
from mpq_jax.training.workdir import LOCK


@pytest.fixture(scope="module")
def table():
    return make_table()


LEVELS = (4, 3)  # of SMOKE


class Searched(NamedTuple):
    """A finished search.

    Attributes:
        directory: its results.
        output: what was printed.
        bits: texts of its bit files, by name.
    """

    directory: Path
    output: str
    bits: dict[str, str]


def results(workdir: Path, output: str) -> Searched:
    files = sorted((workdir / "search").glob("bits_*.json"))
    return Searched(workdir / "search", output, {path.name: path.read_text() for path in files})


@pytest.fixture(scope="module")
def searched(shared) -> Searched:
    """A search by BitOPs."""
    output = call("search", *shared.smoke_flags, f"--workdir={shared.smoke}")
    return results(shared.smoke, output)


@pytest.fixture(scope="module")
def by_bytes(shared, tmp_path_factory) -> Searched:
    """A search by bytes, of the same supernet."""
    workdir = tmp_path_factory.mktemp("bytes") / "run"
    shutil.copytree(shared.smoke, workdir, ignore=shutil.ignore_patterns(LOCK))
    output = call(
        "search",
        *shared.smoke_flags,
        f"--workdir={workdir}",
        "--config.search.cost=bytes",
        "--config.search.levels=()",
        "--config.search.budgets=(2000.0, 1500.0)",
        "--config.search.strategy=tabu",
        "--config.search.rounds=1",
        "--config.search.max_accuracy_drop=20.0",
        "--config.search.limits.bitops=3e6",
    )
    return results(workdir, output)


def test_writes_bits_within_each_budget(searched, table):
    found = read_bits(searched.directory, table)
    assert set(found) == {f"bits_{level}-bit_level" for level in LEVELS}
    for level in LEVELS:
        cost = costs.bitops(table, found[f"bits_{level}-bit_level"])
        assert cost <= costs.bitops(table, table.uniform(level, level))


@pytest.mark.slow
def test_writes_bits_within_budgets_of_bytes(by_bytes, table):
    found = read_bits(by_bytes.directory, table)
    for budget in (2000, 1500):
        assert costs.model_bytes(table, found[f"bits_{budget / 1024:.4g}_KiB"]) <= budget
    assert "KiB" in by_bytes.output


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
    assert {row["phase"] for row in path} <= {"program", "exchange"} and len(path) > 2
    for plot in ("frontier", "bits"):
        assert (searched.directory / f"{plot}.png").read_bytes().startswith(PNG)
        assert "<svg" in (searched.directory / f"{plot}.svg").read_text()
    page = (searched.directory / "report.html").read_text()
    assert all(f"{level}-bit level" in page for level in LEVELS)


@pytest.mark.slow
def test_a_search_again_scores_nothing_anew(searched, shared, tmp_path):
    """In a process of its own, as a user runs it."""
    code, output = run(
        "search.py",
        *shared.smoke_flags,
        f"--workdir={shared.smoke}",
        "--config.device_count=1",
        output=tmp_path / "again.txt",
        devices=8,  # as here, so that what was compiled serves there
        cache=shared.cache,
    )
    assert code == 0, output
    first = re.search(r"(\d+) configurations scored", searched.output)
    assert int(first[1]) > 50
    assert f"0 configurations scored, {first[1]} known before" in output
    assert results(shared.smoke, output).bits == searched.bits


@pytest.mark.slow
def test_a_tolerance_finds_cheap_bits_that_are_good_enough(by_bytes, table):
    (bits,) = [
        bits
        for name, bits in read_bits(by_bytes.directory, table).items()
        if name.startswith("bits_within")
    ]
    table.check(bits)
    with (by_bytes.directory / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    lost = float(rows["uniform 6/6"]["validation_accuracy"]) - float(
        rows["within 20 points"]["validation_accuracy"]
    )
    assert lost <= 0.2 + 1e-9
    assert float(rows["within 20 points"]["bytes"]) < float(rows["uniform 6/6"]["bytes"])


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
    assert f"bits, tables, plots and report.html are in {searched.directory}" in searched.output


def test_configurations_never_recompile(searched):
    (line,) = re.findall("^compilations: (.*)$", searched.output, re.M)
    counts = dict(re.findall(r"(\w+) x(\d+)", line))
    assert counts["_recalibrate"] == counts["quantize_all"] == "1", line
    assert int(counts["run_segment"]) <= 3, line  # stem and first block; two blocks and the head
    assert counts.get("score_configs", "1") == "1", line


REFUSALS = {
    # name: (flags behind those of the run, the run's name, what must be said)
    "too small": (
        ["--config.search.budgets=(1.0,)"],
        "smoke",
        r"1e-06 MBitOPs: no configuration .* bitops cannot be met; .* range is \d+",
    ),
    "unit": (
        ["--config.search.cost=watts"],
        "smoke",
        r"cost is 'watts'; known: \('bitops', 'bytes', 'stored_bytes', 'act_bytes', 'mean_bits', ",
    ),
    "untrained": (
        ["--workdir={untrained}"],
        "smoke",
        "untrained holds no training run; run mpq train with the same flags first",
    ),
    "float": ([], "float", "'plain' has no bits: there is nothing to search; pass the workdir"),
    "other config": (
        ["--workdir={float_run}"],
        "supernet",
        "holds a run of another config: .*config.method was 'plain', now 'rfquant'",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_searched_is_refused_with_what_can(shared, tmp_path, name):
    more, run_name, message = REFUSALS[name]
    if run_name == "smoke":
        run_flags = (*shared.smoke_flags, f"--workdir={shared.smoke}")
    else:
        run_flags = {"float": FLOAT, "supernet": SUPERNET}[run_name]
        run_flags += (f"--workdir={shared.float_run if run_name == 'float' else tmp_path}",)
    places = {"untrained": tmp_path / "untrained", "float_run": shared.float_run}
    more = [flag.format(**places) for flag in more]
    assert re.search(message, refusal("search", *run_flags, *more))
