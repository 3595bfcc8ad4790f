"""The page of a report: what it holds, and that it is safe."""

import dataclasses
import math
import re

import numpy as np
import pytest
from helpers.report_pages import (
    COST,
    LAYERS,
    LIMIT,
    MIXED,
    TABLE,
    Page,
    evaluated,
    made_report,
    written,
)

from mpq_jax.reporting.html import layers, summary
from mpq_jax.search.cost_metrics import CostMetric
from mpq_jax.supernet import costs
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.left_float import LeftFloat


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(written(tmp_path_factory.mktemp("page"), made_report()))


def test_the_results_hold_the_given_numbers(page):
    (table,) = [table for table in page.tables if table[0][0] == "configuration"]
    rows = {row[0].removesuffix(" (searched)").removesuffix(" (uniform)"): row for row in table[1:]}
    by_cost = sorted(made_report().configs, key=lambda one: -one.costs["bitops"])
    assert list(rows) == ["float", *(one.name for one in by_cost)]
    assert rows["float"][1] == "93.75\u00a0%"
    for one in made_report().configs:
        row = rows[one.name]
        assert row[1] == f"{100 * one.accuracy:.2f}\u00a0%"
        assert row[2] == "75.00\u00a0%"
        shown = [float(text.replace(",", "")) for text in row[4:]]
        expected = [one.costs["bitops"] / 1e3, one.costs["bytes"], one.costs["mean_bits"]]
        np.testing.assert_allclose(shown, expected, rtol=2e-3)  # of the largest, four digits
    assert rows["A"][3] == "+2.75"


def test_bits_and_shares_of_every_layer_are_given(page):
    (table,) = [table for table in page.tables if any(row[0] == "share of cost" for row in table)]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["weights"] == ["8", "4", "2", "3", ""]  # the last kernel stays float
    assert rows["activations"] == ["", "4", "4", "2", "8"]  # the first input stays float
    counted = [
        layer.macs * weights * acts
        for layer, weights, acts in zip(
            TABLE.layers, MIXED.weights.tolist(), MIXED.acts.tolist(), strict=True
        )
    ]
    shown = [float(re.search(r"([\d.]+)\s%", text)[1]) for text in rows["share of cost"]]
    np.testing.assert_allclose(shown, 100 * np.array(counted) / sum(counted), atol=0.005)
    titles = [attrs.get("title", "") for _, attrs in page.elements]
    assert "convolution3, weights: 3 bits" in titles
    assert "convolution0, weights: 8 bits, no choice" in titles
    assert "classifier, weights: float, counted as 8 bits" in titles


def test_every_layer_is_listed_in_numbers(page):
    (table,) = [table for table in page.tables if table[0][0] == "layer"]
    for layer, row in zip(TABLE.layers, table[1:], strict=True):
        assert row[:2] == [layer.name, layer.kind]
        assert row[3:5] == [f"{layer.params:,}", f"{layer.macs:,}"]
    assert [row[5] for row in table[1:]] == ["8/float", "4/4", "2/4", "3/2", "float/8"]


def test_what_stays_float_is_listed_below_the_layers(page):
    lines = [text.strip() for text in page.texts]
    assert "What stays float" in lines
    channels = 4 * (LAYERS - 1) + 3
    assert f"{LAYERS} parameters (bias): {channels} values" in lines


def test_products_that_stay_float_are_listed_with_their_work(tmp_path):
    left = (LeftFloat("block<0>/product", "product", 1234, "nobody asked"),)
    table = dataclasses.replace(TABLE, left_float=left)
    text = written(tmp_path, made_report(table=table))
    assert "<li>product block&lt;0&gt;/product: 1,234 MACs; nobody asked</li>" in text
    nothing = written(tmp_path, made_report(table=dataclasses.replace(TABLE, left_float=())))
    assert "What stays float" not in nothing


def test_sensitivities_are_those_given_and_shaded_by_their_logarithm(page):
    (table,) = [table for table in page.tables if ["weights"] in table]
    numbers_of_bits = [f"{n} bits" for n in TABLE.candidates]
    assert [row[0] for row in table[1:]] == [
        *("weights", *numbers_of_bits),
        *("activations", *numbers_of_bits),
    ]
    given = 100 * made_report().sensitivity
    cells = {
        attrs["title"]: attrs["class"]
        for tag, attrs in page.elements
        if tag == "td" and re.search(r" at \d+ bits: ", attrs.get("title", ""))
    }
    assert len(cells) == np.isfinite(given).any(axis=0).sum() * LAYERS
    measured = []
    for title, shade in cells.items():
        name, tensor, n, rise = re.fullmatch(r"(.*), (.*) at (\d+) bits: (.*)", title).groups()
        index = TABLE.names.index(name), layers.TENSORS.index(tensor)
        value = given[*index, TABLE.candidates.index(int(n))]
        if math.isnan(value):
            assert (rise, shade) == ("not measured", "none")
            continue
        assert float(rise.removesuffix(" points")) == pytest.approx(value, rel=1e-3)
        measured.append((value, int(shade[1:])))
    ranks = [shade for _, shade in sorted(measured)]
    assert ranks == sorted(ranks) and ranks[-1] == layers.SHADES - 1
    largest = TABLE.names[np.unravel_index(np.nanargmax(given), given.shape)[0]]
    assert re.search(rf"Most sensitive: \w+ of {largest} at", page.text)


def test_headings_facts_and_origin_are_told(page):
    for told in (
        "Bits per layer: net on images",
        "5 layers, 3 with a choice of 4, 3, 2 bits",
        "at most a lot",
        f"Hypervolume of what was found: {made_report().hypervolume:.4g}",
        "50 configurations by their error",
        "3\u00a0min 12\u00a0s".replace("\u00a0", " "),
        "seed: 17",
        "0.10.2",
    ):
        assert told in page.text, told


def test_sizes_are_of_kernels_at_their_bits_and_float_ones_at_32():
    params = [layer.params for layer in TABLE.layers]
    size = (params[0] * 8 + params[1] * 4 + params[2] * 2 + params[3] * 3 + params[4] * 32) / 8
    assert summary.kernel_bytes(TABLE, MIXED) == size
    assert summary.smaller(TABLE, MIXED) == f"{4 * sum(params) / size:.1f}× smaller than float32"


HOSTILE = '<script>alert(\'1\')</script>&amp;"x" onload="y'


def test_everything_is_escaped(tmp_path, page):
    renamed = tuple(layer._replace(name=f"{HOSTILE}/{layer.name}") for layer in TABLE.layers)
    one = made_report()
    configs = [
        other._replace(name=HOSTILE) if other.group == "searched" else other
        for other in one.configs
    ]
    text = written(
        tmp_path,
        dataclasses.replace(
            one,
            table=dataclasses.replace(TABLE, layers=renamed),
            configs=tuple(configs),
            requests={HOSTILE: HOSTILE},
            limits={HOSTILE: LIMIT},
            metric=HOSTILE,
            timings={HOSTILE: 1.0},
            provenance={HOSTILE: HOSTILE},
            cost=one.cost._replace(unit=(1e3, HOSTILE)),
        ),
        title=HOSTILE,
        config=HOSTILE,
    )
    hostile = Page(text)
    names = [tag for tag, _ in page.elements]
    assert [tag for tag, _ in hostile.elements].count("script") == names.count("script") == 1
    assert not any("onload" in attrs for _, attrs in hostile.elements)
    assert HOSTILE in hostile.text


def test_nothing_is_loaded_from_outside(page):
    for tag, attrs in page.elements:
        assert not {"src", "href", "xlink:href", "srcset", "action"} & set(attrs), (tag, attrs)
        assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
    policies = [attrs for _, attrs in page.elements if "http-equiv" in attrs]
    assert policies[0]["content"].startswith("default-src 'none'")


def test_the_page_has_no_address_at_all(tmp_path):
    text = written(tmp_path, made_report())
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert "url(" not in text


def test_ids_cannot_collide_and_plots_have_names(page):
    assert not [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    plots = [attrs for tag, attrs in page.elements if tag == "svg" and "aria-hidden" not in attrs]
    assert plots and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots)
    heads = [attrs for tag, attrs in page.elements if tag == "th"]
    assert heads and all("scope" in attrs for attrs in heads)


def test_equal_reports_give_equal_bytes(tmp_path):
    assert written(tmp_path, made_report()) == written(tmp_path, made_report())


@pytest.mark.slow_but_first
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sensitivity": None}, "The sensitivity of single layers was not measured"),
        ({"sensitivity": np.full((LAYERS, 2, 4), np.nan)}, "was not measured"),
        ({"sensitivity": np.zeros((LAYERS, 2, 4))}, "How much the error rises"),
        ({"float_accuracy": None}, "The most accurate found, A, reaches"),
        ({"scored": np.zeros((0, 2))}, "Accuracy against cost"),
        ({"scored": np.array([[3e4, 0.5]])}, "1 configurations by their error"),
        ({"timings": {}, "provenance": {}, "requests": {}, "limits": {}}, "The run"),
        ({"metric": "kl"}, "thousandths of KL divergence"),
        ({"found": {}}, "No configuration was searched."),
        ({"configs": ()}, "No configuration was searched."),
        ({"configs": (evaluated("A", MIXED, 0.9),)}, "No uniform bits were tested to compare"),
    ],
)
def test_parts_may_be_missing(tmp_path, changed, told):
    text = Page(written(tmp_path, made_report(**changed))).text
    assert told in text
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_without_a_float_model_it_is_not_mentioned(tmp_path):
    text = Page(written(tmp_path, made_report(float_accuracy=None))).text
    assert "below float" not in text and "float network" not in text


def test_unknown_costs_are_called_unknown(tmp_path):
    one = made_report()
    unknown = [
        other._replace(costs=other.costs | {"bitops": math.inf})
        if other.name == "uniform 4/4"
        else other
        for other in one.configs
    ]
    cost = np.where(np.arange(LAYERS)[:, None, None] == 1, np.inf, COST)
    cost_metric = one.cost._replace(cost=cost)
    report = dataclasses.replace(one, configs=tuple(unknown), cost=cost_metric)
    text = Page(written(tmp_path, report)).text
    assert "unknown: not all of its costs are given" in text
    assert "uniform 4/4: 92.00" not in text  # it has no place in the plot


def test_without_test_images_all_accuracies_are_on_validation_images(tmp_path):
    configs = [one._replace(test=None) for one in made_report().configs]
    page = Page(written(tmp_path, made_report(configs=tuple(configs))))
    (table,) = [table for table in page.tables if table[0][0] == "configuration"]
    assert table[0][1:3] == ["validation accuracy", "against uniformpoints"]
    assert all(row[1] == "75.00\u00a0%" for row in table[2:])
    assert (
        "Accuracy is top-1 on the validation images" in page.text and "test images" not in page.text
    )


def test_a_wide_network_keeps_every_layer(tmp_path):
    names = [f"features/stage{n // 9}/residual_block{n}/expanded_convolution" for n in range(80)]
    many = tuple(TABLE.layers[1]._replace(name=name) for name in names)
    table = LayerTable(many)
    cost = costs.cost_table(table, "bitops")
    bits = table.uniform(3, 2)
    total = {"bitops": costs.total(table, cost, bits)}
    one = made_report(
        table=table,
        cost=CostMetric("bitops", cost, (1e3, "kBitOPs")),
        configs=(evaluated("A", MIXED, 0.9)._replace(bits=bits, costs=total),),
        limits={},
        sensitivity=np.full((80, 2, 3), 0.01),
    )
    page = Page(written(tmp_path, one))
    heads = [attrs["title"] for tag, attrs in page.elements if tag == "th" and "title" in attrs]
    assert [title.split(":")[0] for title in heads] == [*table.names, *table.names]
    short = [layers.short_name(name) for name in table.names]
    assert len(set(short)) == 80 and max(map(len, short)) <= layers.LONGEST_NAME
