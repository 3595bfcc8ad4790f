"""What the page says of budgets and uniform bits."""

import dataclasses

import jax.numpy as jnp
import pytest
from helpers.report_pages import COST, MIXED, TABLE, UNIFORM, Page, made_report, written

from mpq_jax.reporting.html import summary
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig


def searched_budgets(*gains):
    """Several budgets, all with room for uniform 3/3, whose accuracy is 0.8725."""
    return {f"budget {n}": (MIXED, 0.8725 + gain / 100) for n, gain in enumerate(gains)}


@pytest.mark.parametrize(
    ("accuracy", "headline"),
    [
        (0.9, "2.75 points more accurate than uniform 3/3, within the same budget."),
        (0.8725, "As accurate as uniform 3/3, within the same budget."),
        (0.87252, "As accurate as uniform 3/3, within the same budget."),
        (0.87, "0.25 points less accurate than uniform 3/3, within the same budget."),
    ],
)
def test_the_summary_on_one_budget_is_true(tmp_path, accuracy, headline):
    one = made_report(mixed=accuracy)
    assert summary.summarize(one, summary.compare(one))[0] == headline
    assert f'class="headline">{headline}<' in written(tmp_path, one)


@pytest.mark.parametrize(
    ("gains", "sentences"),
    [
        ((2, 1), ["More accurate than uniform bits at all 2 budgets, by 1.00 to 2.00 points."]),
        ((2, 2), ["More accurate than uniform bits at all 2 budgets, by 2.00 points."]),
        (
            (2, 0, -1),
            [
                "More accurate than uniform bits at 1 of 3 budgets, by 2.00 points.",
                "As accurate as uniform bits: budget 1.",
                "Less accurate, by 1.00 points: budget 2.",
            ],
        ),
        ((0, 0), ["As accurate as uniform bits at all 2 budgets, not more."]),
        ((-1, -3), ["Less accurate than uniform bits at all 2 budgets, by 1.00 to 3.00 points."]),
        (
            (0, -3),
            [
                "Not more accurate than uniform bits at any of 2 budgets.",
                "As accurate as uniform bits: budget 0.",
                "Less accurate, by 3.00 points: budget 1.",
            ],
        ),
    ],
)
def test_the_summary_on_several_budgets_is_true(gains, sentences):
    one = made_report(found=searched_budgets(*gains))
    said = summary.summarize(one, summary.compare(one))
    assert said[:-1] == sentences
    best = max(range(len(gains)), key=lambda index: gains[index])
    assert said[-1].startswith(f"The most accurate found, budget {best}, reaches ")


def test_a_rival_is_the_largest_uniform_one_within_the_limit():
    # MIXED costs less than uniform 3/3 here: without a limit only uniform 2/2 costs no more.
    cheaper = MIXED._replace(acts=jnp.array([8, 3, 2, 2, 8], jnp.int32))
    costs_of = {name: costs.total(TABLE, COST, bits) for name, bits in UNIFORM.items()}
    assert costs_of["uniform 2/2"] < costs.total(TABLE, COST, cheaper) < costs_of["uniform 3/3"]
    found = {"A": (cheaper, 0.9)}
    limited = made_report(found=found, limits={"A": costs_of["uniform 3/3"]})
    (comparison,) = summary.compare(limited)
    assert comparison.rival.name == "uniform 3/3" and comparison.gain == pytest.approx(2.75)
    assert comparison.match.name == "uniform 4/4"  # 0.92, the cheapest that is not below 0.9
    more = costs_of["uniform 4/4"] / costs.total(TABLE, COST, cheaper) - 1
    assert comparison.extra == pytest.approx(more)
    unlimited = made_report(found=found, limits={})
    (comparison,) = summary.compare(unlimited)
    assert comparison.rival.name == "uniform 2/2"
    assert summary.summarize(unlimited, [comparison])[0].endswith("uniform 2/2, at no more cost.")


def test_the_match_is_the_cheapest_uniform_one_that_is_as_accurate():
    for accuracy, match in ((0.95, None), (0.9, "4/4"), (0.8725, "3/3"), (0.5, "2/2")):
        (comparison,) = summary.compare(made_report(mixed=accuracy))
        assert (comparison.match and comparison.match.name) == (match and f"uniform {match}")


@pytest.mark.parametrize(
    ("accuracy", "told"),
    [
        (0.95, "1.25 points above float"),
        (0.9375, "as accurate as float"),
        (0.93, "0.75 points below float"),
    ],
)
def test_the_distance_to_float_is_told(tmp_path, accuracy, told):
    text = Page(written(tmp_path, made_report(mixed=accuracy))).text
    assert text.count(told) == 2  # in the summary and on the card
    assert ("No uniform bits tested are as accurate." in text) == (accuracy > 0.92)


def test_uniform_bits_that_were_found_are_called_so(tmp_path):
    found = {"A": (UNIFORM["uniform 3/3"], 0.8725)}
    one = made_report(found=found, limits={"A": costs.total(TABLE, COST, UNIFORM["uniform 3/3"])})
    page = Page(written(tmp_path, one))
    assert "The search ended with the bits of uniform 3/3." in page.text
    assert "The same bits as uniform 3/3." in page.text


def test_a_budget_below_all_uniform_bits_has_no_rival(tmp_path):
    least = BitConfig(jnp.array([8, 2, 2, 2, 8], jnp.int32), jnp.array([8, 2, 2, 2, 8], jnp.int32))
    one = made_report(found={"A": (least, 0.5)}, limits={})
    without = [other for other in one.configs if other.name != "uniform 2/2"]
    page = Page(written(tmp_path, dataclasses.replace(one, configs=tuple(without))))
    assert "No uniform bits are as cheap" in page.text
