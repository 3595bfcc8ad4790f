"""Results of a search as files: tables, plots and one HTML page."""

import pathlib

from mpq_jax.reporting.html import write_page
from mpq_jax.reporting.plots import plot_bits, plot_frontier
from mpq_jax.reporting.tables import write_tables
from mpq_jax.search.report import SearchReport

__all__ = ["plot_bits", "plot_frontier", "write_page", "write_report", "write_tables"]


def write_report(
    report: SearchReport,
    directory: str | pathlib.Path,
    *,
    title: str = "a search",
    config: str = "",
) -> None:
    """Writes all results of a search: bits, tables, plots and report.html.

    Args:
        report: the results.
        directory: folder to write into; created if need be.
        title: what was searched, for report.html: "resnet20 on cifar10".
        config: config of the run, for report.html.

    Raises:
        MissingExtraError: the extra `report` is not installed; the tables are written.
    """
    directory = pathlib.Path(directory)
    write_tables(report, directory)
    searched = {name: one.bits for name, one in report.searched.items()}
    for ending in ("png", "svg"):
        plot_frontier(report, path=directory / f"frontier.{ending}")
        if searched:
            plot_bits(report.table, searched, path=directory / f"bits.{ending}")
    write_page(report, directory / "report.html", title=title, config=config)
