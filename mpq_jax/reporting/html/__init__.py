"""One self-contained HTML page about a search of bits: verdict, plots, layers, results, origin.

The page is the template `page.html.jinja`; the modules here compute what it is filled with.
Nothing is loaded and no script is needed, so the page opens from disk and prints.
"""

import math
import pathlib
from typing import Any

from mpq_jax import extras
from mpq_jax.reporting.html import charts, layers, numbers, verdict
from mpq_jax.reporting.html.content import Candidate, Content

__all__ = ["Candidate", "Content", "write_page"]
WIDE_PLOT, PLOT, SMALL_PLOT = (1080, 400), (720, 400), (360, 380)  # alone, beside another, narrow


def write_page(content: Content, path: pathlib.Path) -> None:
    """Writes the page as UTF-8; equal content gives equal bytes.

    Raises:
        ValueError: a candidate has no cost or no known group, or costs more than its limit.
    """
    content.check()
    with extras.needs("report", "writing report.html"):
        import jinja2
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": numbers.percent,
        "signed": numbers.signed,
        "duration": numbers.duration,
        "count": lambda number: numbers.quantity(number, numbers.COUNTS),
        "cost": lambda one: numbers.quantity(content.cost_of(one), [content.unit]),
        "size": lambda one: numbers.quantity(
            verdict.kernel_bytes(content.table, one.bits), numbers.UNITS["bytes"]
        ),
        "smaller": lambda one: verdict.smaller(content.table, one.bits),
        "against_float": verdict.against_float,
    }
    standings = verdict.compare(content)
    cloud = charts.cloud(content, *SMALL_PLOT)
    page = environment.get_template("page.html.jinja").render(
        content=content,
        metric=numbers.METRICS.get(content.metric, content.metric),
        kind=numbers.TITLES.get(content.budget, content.budget),
        verdict=verdict.verdict(content, standings),
        comparison=verdict.comparison(content, standings),
        standings=standings,
        uniform=content.ranked("uniform"),
        heldout=any(one.heldout is not None for one in content.candidates),
        frontiers=[
            charts.frontier(content, *size) for size in (PLOT if cloud else WIDE_PLOT, SMALL_PLOT)
        ],
        cloud=cloud,
        headings=layers.headings(content.table),
        bits=layers.bit_rows(content),
        legend=layers.bits_legend(content.table),
        sensitivity=layers.sensitivity(content),
        columns=cost_columns(content),
        order=sorted(
            range(len(content.candidates)),
            key=lambda index: -content.cost_of(content.candidates[index]),
        ),
        standing_of={one.candidate.name: one for one in standings},
    )
    path.write_text(page, encoding="utf-8")


def cost_columns(content: Content) -> list[dict[str, Any]]:
    """Returns a column for each kind of cost: its title, its unit, the text of every candidate."""
    kinds = dict.fromkeys(kind for one in content.candidates for kind in one.costs)
    return [_cost_column(content, kind) for kind in kinds]


def _cost_column(content: Content, kind: str) -> dict[str, Any]:
    values = [one.costs.get(kind) for one in content.candidates]
    top = max((value for value in values if value and math.isfinite(value)), default=1.0)
    size, unit = numbers.fitting(top, numbers.UNITS.get(kind, ((1, ""),)))
    if kind == content.budget:
        size, unit = content.unit
    decimals = numbers.digits(top / size)
    return {
        "title": numbers.TITLES.get(kind, kind),
        "unit": unit,
        "texts": [_scaled(value, size, decimals) for value in values],
        "sizes": values,
    }


def _scaled(value: numbers.Number | None, size: numbers.Number, decimals: int) -> str:
    if value is None:
        return "\u2013"
    return f"{value / size:,.{decimals}f}" if math.isfinite(value) else "unknown"
