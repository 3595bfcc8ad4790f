"""Results as JSON and CSV."""

import csv
import pathlib
from collections.abc import Mapping

from mpq_jax.search.problem import Step
from mpq_jax.search.report import SearchReport
from mpq_jax.supernet.bits import BitConfig, to_json
from mpq_jax.supernet.layer_table import LayerTable


def file_name(budget: str) -> str:
    """Returns the name of a budget as part of a file's name."""
    return budget.replace(" ", "_")


def write_tables(report: SearchReport, directory: str | pathlib.Path) -> None:
    """Writes the results of a search without plots.

    `bits_BUDGET.json` has the bits found for a budget, `results.csv` all configurations with
    their accuracies and costs, and `path.csv` the steps of the search.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, one in report.searched.items():
        file = directory / f"bits_{file_name(name)}.json"
        file.write_text(to_json(one.bits, report.table.names))
    write_results(report, directory / "results.csv")
    with (directory / "path.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Step._fields)
        writer.writerows(report.steps)


def write_results(report: SearchReport, path: pathlib.Path) -> None:
    """Writes accuracies and costs of all configurations as CSV; no test accuracy is left empty."""
    kinds = list(report.configs[0].costs)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "group", "test_accuracy", "validation_accuracy", *kinds])
        if report.float_accuracy is not None:
            writer.writerow(["float", "float", report.float_accuracy])
        for one in report.configs:
            tested = None if one.test is None else one.test.accuracy
            accuracies = (tested, one.validation.accuracy)
            writer.writerow([one.name, one.group, *accuracies, *one.costs.values()])


def write_layer_bits(
    table: LayerTable,
    configs: Mapping[str, BitConfig],
    layouts: Mapping[str, str],
    path: pathlib.Path,
) -> None:
    """Writes the bits of a scheme as CSV: one line per layer, one column per way of counting.

    Args:
        table: the layers.
        configs: the bits of every layer, by the way they are counted.
        layouts: the bits that the integers of a layer consist of, by path.
        path: file to write.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "weights", "layout", *configs, "acts"])
        for index, layer in enumerate(table.layers):
            counted = [int(bits.weights[index]) for bits in configs.values()]
            acts = int(next(iter(configs.values())).acts[index])
            layout = layouts.get(layer.name, "")
            writer.writerow([layer.name, layer.params, layout, *counted, acts])
