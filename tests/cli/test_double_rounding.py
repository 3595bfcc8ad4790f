"""Double Rounding with both programs: integers, mixed-precision supernet, integer programming."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers.program_results import as_run, read_bits
from helpers.programs import (
    EPOCH_STEPS,
    WIDTH,
    call,
    entries,
)

from mpq_jax import data
from mpq_jax.cli import search, train
from mpq_jax.configs.double_rounding import digits as double_rounding_digits
from mpq_jax.export.packed import network
from mpq_jax.search import objectives
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.tasks.evaluation import make_evaluate
from mpq_jax.training import experiment

pytestmark = pytest.mark.slow

PRECISIONS = (8, 6, 4, 2)
ROUNDING = "--config=configs/double_rounding/digits.py"
MULTI = (f"{ROUNDING}:smoke", WIDTH)
MIXED = (
    f"{ROUNDING}:mixed",
    WIDTH,
    "--config.epochs=1",
    "--config.calibration_batches=1",
    "--config.double_rounding_mixed.trace_probes=2",
)
PROGRAMME = (
    *MIXED,
    "--config.search.trace_images=64",
    "--config.search.trace_probes=2",
    "--config.search.solutions=2",
    "--config.search.recalibration_images=64",
    "--config.search.levels=()",
)
MOST_BYTES = 2500  # of kernels; uniform 4 bits take 3,088 and uniform 2 bits 1,936
MOST_SECONDS = 0.2


class Rounded(NamedTuple):
    """A multi-precision network, the supernet that starts from it, and two searches of that.

    Attributes:
        multi, mixed: their workdirs.
        multi_output, mixed_output: what was printed.
        table: layers of the supernet.
        by_bits: results of the search with a budget of mean bits, and what it printed.
        by_latency: with a budget of seconds and a limit on bytes, and what it printed.
        latency: file of the measured latencies.
    """

    multi: Path
    multi_output: str
    mixed: Path
    mixed_output: str
    table: LayerTable
    by_bits: tuple[Path, str]
    by_latency: tuple[Path, str]
    latency: Path


def mixed_config(start_from: Path) -> Any:
    """The config of MIXED, for this process."""
    config = double_rounding_digits.get_config("mixed")
    config.model.options.width = 4
    config.epochs = config.calibration_batches = 1
    config.double_rounding_mixed.trace_probes = 2
    config.init_from = str(start_from)
    config.device_count = 1
    return config


def write_latencies(path: Path, table: LayerTable) -> None:
    """Writes seconds that grow with the bits; 8 bits are missing in one layer."""
    layers = {
        layer.name: {str(b): 1e-6 * layer.macs * b for b in layer.weight_candidates}
        for layer in table.layers
        if layer.searchable
    }
    del layers["stage0_block0/conv1"]["8"]
    content = {"format": "mpq_jax.latency", "version": 1, "unit": "seconds", "layers": layers}
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def rounded(shared, tmp_path_factory) -> Rounded:
    directory = tmp_path_factory.mktemp("rounded")
    multi, mixed, copy = (directory / name for name in ("multi", "mixed", "copy"))

    def train_from(start_from: Path, workdir: Path, flags: tuple[str, ...]) -> str:
        return call("train", *flags, f"--config.init_from={start_from}", f"--workdir={workdir}")

    multi_output = train_from(shared.float_run, multi, MULTI)
    mixed_output = train_from(multi, mixed, MIXED)
    shutil.copytree(mixed, copy)
    table = experiment.build(mixed_config(multi)).table
    latency = directory / "latency.json"
    write_latencies(latency, table)
    flags = (*PROGRAMME, f"--config.init_from={multi}")
    by_bits = call("search", *flags, f"--workdir={mixed}", "--config.search.budgets=(5.0, 3.0)")
    by_latency = call(
        "search",
        *flags,
        f"--workdir={copy}",
        "--config.search.cost=latency",
        f"--config.search.latency={latency}",
        f"--config.search.budgets=({MOST_SECONDS}, 100.0)",
        f"--config.search.limits.bytes={MOST_BYTES}",
    )
    return Rounded(
        multi,
        multi_output,
        mixed,
        mixed_output,
        table,
        (mixed / "search", by_bits),
        (copy / "search", by_latency),
        latency,
    )


@pytest.mark.parametrize("name", ["multi", "mixed"])
def test_train_writes_the_network_as_integers(rounded, name):
    """Its accuracy is that of the last evaluation; so it is normalized as in training."""
    path = getattr(rounded, name) / "integers.safetensors"
    packed = network.load(path)
    assert packed.precisions == PRECISIONS
    assert packed.table.bn_banks == {"multi": "weights", "mixed": "transition"}[name]
    dataset = data.load("digits", batch_size=64, seed=0, validation_fraction=0.2)
    mean, std = packed.file.mean, packed.file.std
    evaluate = make_evaluate(
        lambda selected, _, images: packed.forward(selected, images),
        lambda images: data.normalize(images, mean=mean, std=std),
    )
    logged = entries(getattr(rounded, name))[-1]
    one_image = 1 / dataset.sizes["validation"]
    for bits in PRECISIONS:
        score = evaluate(packed.switch(bits), None, dataset.eval_batches("validation"))
        # Compiled with other optimizations: an image on the edge of two classes may change sides.
        assert abs(score.accuracy - logged[f"validation/w{bits}a{bits}"]) < 1.5 * one_image
    config = packed.file.provenance["config"]
    method = {"multi": "double_rounding", "mixed": "double_rounding_mixed"}[name]
    assert config["method"] == method and config["epochs"] == 1


def test_train_says_what_the_integers_take_and_run_at(rounded):
    path = rounded.multi / "integers.safetensors"
    (line,) = [line for line in rounded.multi_output.splitlines() if str(path) in line]
    size = path.stat().st_size / 1024
    assert f": {size:.1f} KiB, of which integers 4.5 and floats" in line
    assert "it runs at 8 6 4 2 bits" in line
    assert f"starting from the run in {rounded.multi}, step {EPOCH_STEPS}" in rounded.mixed_output


def test_double_rounding_compiles_each_step_once(rounded):
    for output, more in ((rounded.multi_output, ()), (rounded.mixed_output, ("_probe",))):
        (line,) = re.findall("^compilations: (.*)$", output, re.M)
        counts = dict(re.findall(r"(\w+) x(\d+)", line))
        names = ("_gradient", "_move", "evaluate_batch", *more)
        assert {name: counts.get(name, "1") for name in names} == dict.fromkeys(names, "1"), line


def test_starting_from_the_multi_precision_network_keeps_what_it_learned(rounded):
    """One epoch on, the supernet is no worse at 8 bits than a network of one epoch."""
    logged = [entries(workdir)[-1]["validation/w8a8"] for workdir in (rounded.multi, rounded.mixed)]
    assert min(logged) > 0.5 and logged[1] > logged[0] - 0.1


def test_the_program_finds_bits_of_the_wanted_mean(rounded):
    directory, output = rounded.by_bits
    found = read_bits(directory, rounded.table)
    assert set(found) == {"bits_5_mean_bits", "bits_3_mean_bits"}
    for name, most in (("bits_5_mean_bits", 5.0), ("bits_3_mean_bits", 3.0)):
        weights, acts = (np.asarray(bits)[rounded.table.searchable] for bits in found[name])
        assert np.mean(weights) <= most and np.array_equal(weights, acts)
        rounded.table.check(found[name])
    assert "searched 2 budgets in " in output and "Hessian traces: stem_conv " in output
    with (directory / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert {row["group"] for row in rows.values()} == {"uniform", "searched"}
    assert float(rows["uniform 6/6"]["mean_bits"]) == 6
    (line,) = re.findall("^compilations: (.*)$", output, re.M)
    assert not re.search(r"(recalibrate|_probe|weight_errors) x([2-9]|1\d)", line), line


def test_the_program_keeps_latency_and_a_further_limit(rounded):
    """Nothing that is chosen on validation images may be beyond the limit either."""
    directory, output = rounded.by_latency
    seconds = costs.latency_table(rounded.table, rounded.latency.read_text())
    found = read_bits(directory, rounded.table)
    assert len(found) == 2 and "ms" in output
    with (directory / "results.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert float(rows["uniform 8/8"]["latency"]) == np.inf  # it was not measured
    for name, bits in found.items():
        assert costs.model_bytes(rounded.table, bits) <= MOST_BYTES
        cost = costs.total(rounded.table, seconds, bits)
        assert float(rows[name.removeprefix("bits_").replace("_", " ")]["latency"]) == cost
    tight = found["bits_200_ms"]
    assert costs.total(rounded.table, seconds, tight) <= MOST_SECONDS


SEARCH_OF_MIXED_REFUSALS = {
    "strategy": ({"strategy": "brute"}, r"strategy is 'brute'; known: \('greedy', 'tabu', "),
    "cost": ({"cost": "watts"}, r"cost is 'watts'; known: \('bitops', 'bytes', "),
    "objective": ({"objective": "best"}, r"'best'; known: \('measured', 'hawq', 'paper'\)"),
    "metric": ({"metric": "f1"}, r"metric is 'f1'; known: \('error', 'loss', 'kl'\)"),
    "norms": ({"norms": "layer"}, r"'layer'; known: \('batch', 'recalibrated', 'stored'\)"),
    "drop": (
        {"max_accuracy_drop": -1.0},
        "max_accuracy_drop is -1.0; wanted a number from 0 to 100",
    ),
    "untied": ({"tied": False}, "know only weights and would give every input its fewest"),
    "no budget": ({"levels": (), "budgets": ()}, "there is no budget to search for; give "),
    "tied bits": ({"levels": (5,)}, r"levels has \[5\]; the layers choose among \(8, 6, 4, 2\)"),
    "no latencies": ({"cost": "latency"}, "latency needs a table of latencies"),
    "latency file": ({"limits.latency": 1.0, "latency": "nowhere.json"}, "nowhere.json"),
    "low budget": (
        {"levels": (), "budgets": (1.5,)},
        "mean_bits cannot be met; .* should be -inf to 1.5 bits and the reachable range is 2 to 8",
    ),
    "low limit": (
        {"limits.bytes": 1000.0},
        "limit on bytes cannot be met; .*limit on bytes should be -inf to 1000 bytes and the "
        "reachable range is 1936 to 5392",
    ),
}


@pytest.mark.parametrize("name", SEARCH_OF_MIXED_REFUSALS)
def test_impossible_searches_are_refused_before_any_long_work(rounded, monkeypatch, name):
    changes, message = SEARCH_OF_MIXED_REFUSALS[name]
    config = mixed_config(rounded.multi)
    config.search.update_from_flattened_dict(changes)

    def too_long(*args, **kwargs):
        raise AssertionError("this would take long")

    monkeypatch.setattr(objectives, "hessian_objective", too_long)
    monkeypatch.setattr(Supernet, "recalibrate", too_long)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        search.search(as_run(config, rounded.mixed))


@pytest.mark.parametrize(
    ("changes", "start_from", "message"),
    [
        ({"model.options.width": 5}, "float_run", "is of another model than config.model"),
        ({"model.options.width": 5}, "multi", "is of another model than config.model"),
        ({"bits.candidates": (8, 4)}, "multi", r"config.bits was .*8, 6, 4, 2.*, now .*8, 4"),
        (
            {"bits.first_last": "4bit"},
            "multi",
            r"'4bit'; wanted one of \['8bit', 'float', 'same'\]",
        ),
    ],
)
def test_supernets_do_not_start_from_other_networks(
    shared, rounded, tmp_path, changes, start_from, message
):
    place = shared.float_run if start_from == "float_run" else rounded.multi
    config = mixed_config(place)
    config.update_from_flattened_dict(changes)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        train.train(as_run(config, tmp_path))
    assert not (tmp_path / "config.json").exists()
