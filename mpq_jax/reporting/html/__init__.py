"""One self-contained HTML page about a search: summary, plots, layers, results, origin.

The page is the template `page.html.jinja`; the modules here compute what it is filled with.
Nothing is loaded and no script is needed, so the page opens from disk and prints.
"""

import math
import pathlib
from typing import Any

from mpq_jax.checks import extras
from mpq_jax.reporting.html import charts, layers, numbers, summary
from mpq_jax.search.cost_metrics import UNITS, fitting_unit
from mpq_jax.search.readers import TEST
from mpq_jax.search.report import UNIFORM, SearchReport
from mpq_jax.supernet.left_float import describe

WIDE_PLOT, PLOT, SMALL_PLOT = (1080, 400), (720, 400), (360, 380)  # alone, beside another, narrow


def write_page(report: SearchReport, path: pathlib.Path, *, title: str, config: str = "") -> None:
    """Writes the page as UTF-8; equal reports give equal bytes.

    Args:
        report: the results.
        path: file to write.
        title: what was searched: "resnet20 on cifar10".
        config: config of the run, shown as it is.
    """
    with extras.needs("report", "writing report.html"):
        import jinja2
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= _filters(report)
    comparisons = summary.compare(report)
    cloud = charts.cloud(report, *SMALL_PLOT)
    page = environment.get_template("page.html.jinja").render(
        report=report,
        title=title,
        config=config,
        metric=numbers.METRICS.get(report.metric, report.metric),
        kind=numbers.TITLES[report.cost.kind],
        summary=summary.summarize(report, comparisons),
        compared_with=summary.compared_with(report, comparisons),
        comparisons=comparisons,
        uniform=report.ranked(UNIFORM),
        tested=report.split == TEST,
        frontiers=[
            charts.frontier(report, *size) for size in (PLOT if cloud else WIDE_PLOT, SMALL_PLOT)
        ],
        cloud=cloud,
        headings=layers.headings(report.table),
        bits=layers.bit_rows(report),
        left_float=describe(report.table.left_float or ()),
        legend=layers.bits_legend(report.table),
        sensitivity=layers.sensitivity(report),
        columns=cost_columns(report),
        order=sorted(
            range(len(report.configs)), key=lambda index: -report.cost_of(report.configs[index])
        ),
        comparison_of={one.config.name: one for one in comparisons},
    )
    path.write_text(page, encoding="utf-8")


def _filters(report: SearchReport) -> dict[str, Any]:
    """Returns the functions that write numbers in the template."""
    return {
        "percent": numbers.percent,
        "signed": numbers.signed,
        "duration": numbers.duration,
        "count": lambda number: numbers.quantity(number, numbers.COUNTS),
        "cost": lambda one: numbers.quantity(report.cost_of(one), [report.cost.unit]),
        "size": lambda one: numbers.quantity(
            summary.kernel_bytes(report.table, one.bits), UNITS["bytes"]
        ),
        "smaller": lambda one: summary.smaller(report.table, one.bits),
        "against_float": summary.against_float,
    }


def cost_columns(report: SearchReport) -> list[dict[str, Any]]:
    """Returns a column for each kind of cost: its title, unit, and the text of every row."""
    kinds = dict.fromkeys(kind for one in report.configs for kind in one.costs)
    return [_cost_column(report, kind) for kind in kinds]


def _cost_column(report: SearchReport, kind: str) -> dict[str, Any]:
    values = [one.costs[kind] for one in report.configs]
    top = max((value for value in values if value and math.isfinite(value)), default=1.0)
    size, unit = fitting_unit(top, UNITS[kind])
    if kind == report.cost.kind:
        size, unit = report.cost.unit
    decimals = numbers.digits(top / size)
    return {
        "title": numbers.TITLES[kind],
        "unit": unit,
        "texts": [_scaled(value, size, decimals) for value in values],
        "sizes": values,
    }


def _scaled(value: float, size: float, decimals: int) -> str:
    return f"{value / size:,.{decimals}f}" if math.isfinite(value) else "unknown"
