import dataclasses
import html.parser
import math
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from mpq_jax.reporting.html import Candidate, Content, charts, layers, numbers, verdict, write_page
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable, Rule, bit_rules, trace_layers

LAYERS = 5


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for index in range(LAYERS - 1):
            x = nn.Conv(4, (3, 3), name=f"convolution{index}")(x)
        return nn.Dense(3, name="classifier")(x.mean((1, 2)))


RULES = bit_rules((4, 3, 2), first=(Rule(pattern="classifier", float_weights=True),))
TABLE = trace_layers(Net(), (4, 4, 1), rules=RULES)
COST = costs.cost_table(TABLE, "bitops")
MIXED = BitConfig(jnp.array([8, 4, 2, 3, 8], jnp.int32), jnp.array([8, 4, 4, 2, 8], jnp.int32))


def candidate(name, bits, accuracy, heldout=None):
    by_kind = {
        kind: costs.total(TABLE, costs.cost_table(TABLE, kind), bits)
        for kind in ("bitops", "bytes", "mean_bits")
    }
    group = "uniform" if name.startswith("uniform") else "searched"
    return Candidate(name, group, bits, accuracy, heldout, by_kind)


UNIFORM = {f"uniform {n}/{n}": TABLE.uniform(n, n) for n in (4, 3, 2)}
LIMIT = costs.total(TABLE, COST, MIXED) + 1.0


def content(*, mixed=0.9, three=0.8725, found=None, **changed):
    accuracies = {"uniform 4/4": 0.92, "uniform 3/3": three, "uniform 2/2": 0.61}
    searched = {"A": (MIXED, mixed)} if found is None else found
    generator = np.random.default_rng(0)
    rises = generator.lognormal(-4.0, 1.5, (LAYERS, 2, len(TABLE.candidates)))
    fields = {
        "title": "net on images",
        "table": TABLE,
        "budget": "bitops",
        "cost": COST,
        "unit": (1e3, "kBitOPs"),
        "candidates": [
            *(candidate(name, UNIFORM[name], value) for name, value in accuracies.items()),
            *(candidate(name, bits, value, 0.75) for name, (bits, value) in searched.items()),
        ],
        "float_accuracy": 0.9375,
        "chosen": {"A": "at most a lot"},
        "limits": dict.fromkeys(searched, LIMIT),
        "sensitivity": np.where(TABLE.mask, rises, np.nan),
        "metric": "error",
        "scored": generator.uniform((2e4, 0.1), (9e4, 0.6), (50, 2)),
        "hypervolume": 0.8125,
        "config": "seed: 17\n",
        "timings": {"search": 192.0, "tests": 3.5},
        "provenance": {"jax": "0.10.2"},
    }
    return Content(**(fields | changed))


def written(tmp_path, one):
    path = tmp_path / "report.html"
    write_page(one, path)
    return path.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Elements with their attributes and texts, and the tables; refuses what does not nest."""

    EMPTY = ("meta", "br", "path", "rect", "circle")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.tables, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "meta" or tag == "br":
            return
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> within {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if {"script", "style"}.intersection(self.open):
            return
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(written(tmp_path_factory.mktemp("page"), content()))


def test_the_results_hold_the_given_numbers(page):
    (table,) = [table for table in page.tables if table[0][0] == "configuration"]
    rows = {row[0].removesuffix(" (searched)").removesuffix(" (uniform)"): row for row in table[1:]}
    by_cost = sorted(content().candidates, key=lambda one: -one.costs["bitops"])
    assert list(rows) == ["float", *(one.name for one in by_cost)]
    assert rows["float"][1] == "93.75\u00a0%"
    for one in content().candidates:
        row = rows[one.name]
        assert row[1] == f"{100 * one.accuracy:.2f}\u00a0%"
        assert row[2] == ("75.00\u00a0%" if one.name == "A" else "")
        shown = [float(text.replace(",", "")) for text in row[4:]]
        expected = [one.costs["bitops"] / 1e3, one.costs["bytes"], one.costs["mean_bits"]]
        np.testing.assert_allclose(shown, expected, rtol=2e-3)  # of the largest, four digits
    assert rows["A"][3] == "+2.75"


def test_bits_and_shares_of_every_layer_are_given(page):
    (table,) = [table for table in page.tables if any(row[0] == "share of cost" for row in table)]
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["weights"] == ["8", "4", "2", "3", ""]  # the last kernel stays float
    assert rows["activations"] == ["", "4", "4", "2", "8"]  # the first input stays float
    billed = [
        layer.macs * weights * acts
        for layer, weights, acts in zip(
            TABLE.layers, MIXED.weights.tolist(), MIXED.acts.tolist(), strict=True
        )
    ]
    shown = [float(re.search(r"([\d.]+)\s%", text)[1]) for text in rows["share of cost"]]
    np.testing.assert_allclose(shown, 100 * np.array(billed) / sum(billed), atol=0.005)
    titles = [attrs.get("title", "") for _, attrs in page.elements]
    assert "convolution3, weights: 3 bits" in titles
    assert "convolution0, weights: 8 bits, no choice" in titles
    assert "classifier, weights: float, billed at 8 bits" in titles


def test_every_layer_is_listed_in_numbers(page):
    (table,) = [table for table in page.tables if table[0][0] == "layer"]
    for layer, row in zip(TABLE.layers, table[1:], strict=True):
        assert row[:2] == [layer.name, layer.kind]
        assert row[3:5] == [f"{layer.params:,}", f"{layer.macs:,}"]
    assert [row[5] for row in table[1:]] == ["8/float", "4/4", "2/4", "3/2", "float/8"]


def test_sensitivities_are_those_given_and_shaded_by_their_logarithm(page):
    (table,) = [table for table in page.tables if ["weights"] in table]
    numbers_of_bits = [f"{n} bits" for n in TABLE.candidates]
    assert [row[0] for row in table[1:]] == [
        *("weights", *numbers_of_bits),
        *("activations", *numbers_of_bits),
    ]
    given = 100 * content().sensitivity
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
        "Hypervolume of what was found: 0.8125",
        "50 configurations by their error",
        "3\u00a0min 12\u00a0s".replace("\u00a0", " "),
        "seed: 17",
        "0.10.2",
    ):
        assert told in page.text, told


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
def test_the_verdict_on_one_budget_is_true(tmp_path, accuracy, headline):
    one = content(mixed=accuracy)
    assert verdict.verdict(one, verdict.compare(one))[0] == headline
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
def test_the_verdict_on_several_budgets_is_true(gains, sentences):
    one = content(found=searched_budgets(*gains))
    said = verdict.verdict(one, verdict.compare(one))
    assert said[:-1] == sentences
    best = max(range(len(gains)), key=lambda index: gains[index])
    assert said[-1].startswith(f"The most accurate found, budget {best}, reaches ")


def test_a_rival_is_the_largest_uniform_one_within_the_limit():
    # MIXED costs less than uniform 3/3 here: without a limit only uniform 2/2 costs no more.
    cheaper = MIXED._replace(acts=jnp.array([8, 3, 2, 2, 8], jnp.int32))
    costs_of = {name: costs.total(TABLE, COST, bits) for name, bits in UNIFORM.items()}
    assert costs_of["uniform 2/2"] < costs.total(TABLE, COST, cheaper) < costs_of["uniform 3/3"]
    found = {"A": (cheaper, 0.9)}
    limited = content(found=found, limits={"A": costs_of["uniform 3/3"]})
    (standing,) = verdict.compare(limited)
    assert standing.rival.name == "uniform 3/3" and standing.gain == pytest.approx(2.75)
    assert standing.match.name == "uniform 4/4"  # 0.92, the cheapest that is not below 0.9
    more = costs_of["uniform 4/4"] / costs.total(TABLE, COST, cheaper) - 1
    assert standing.extra == pytest.approx(more)
    unlimited = content(found=found, limits={})
    (standing,) = verdict.compare(unlimited)
    assert standing.rival.name == "uniform 2/2"
    assert verdict.verdict(unlimited, [standing])[0].endswith("uniform 2/2, at no more cost.")


def test_the_match_is_the_cheapest_uniform_one_that_is_as_accurate():
    for accuracy, match in ((0.95, None), (0.9, "4/4"), (0.8725, "3/3"), (0.5, "2/2")):
        (standing,) = verdict.compare(content(mixed=accuracy))
        assert (standing.match and standing.match.name) == (match and f"uniform {match}")


@pytest.mark.parametrize(
    ("accuracy", "told"),
    [
        (0.95, "1.25 points above float"),
        (0.9375, "as accurate as float"),
        (0.93, "0.75 points below float"),
    ],
)
def test_the_distance_to_float_is_told(tmp_path, accuracy, told):
    text = Page(written(tmp_path, content(mixed=accuracy))).text
    assert text.count(told) == 2  # in the verdict and on the card
    assert ("No uniform bits tested are as accurate." in text) == (accuracy > 0.92)


def test_uniform_bits_that_were_found_are_called_so(tmp_path):
    found = {"A": (UNIFORM["uniform 3/3"], 0.8725)}
    one = content(found=found, limits={"A": costs.total(TABLE, COST, UNIFORM["uniform 3/3"])})
    page = Page(written(tmp_path, one))
    assert "The search ended with the bits of uniform 3/3." in page.text
    assert "The same bits as uniform 3/3." in page.text


def test_a_budget_below_all_uniform_bits_has_no_rival(tmp_path):
    least = BitConfig(jnp.array([8, 2, 2, 2, 8], jnp.int32), jnp.array([8, 2, 2, 2, 8], jnp.int32))
    one = content(found={"A": (least, 0.5)}, limits={})
    without = [other for other in one.candidates if other.name != "uniform 2/2"]
    page = Page(written(tmp_path, one._replace(candidates=without)))
    assert "No uniform bits are as cheap" in page.text


def test_sizes_are_of_kernels_at_their_bits_and_float_ones_at_32():
    params = [layer.params for layer in TABLE.layers]
    size = (params[0] * 8 + params[1] * 4 + params[2] * 2 + params[3] * 3 + params[4] * 32) / 8
    assert verdict.kernel_bytes(TABLE, MIXED) == size
    assert verdict.smaller(TABLE, MIXED) == f"{4 * sum(params) / size:.1f}× smaller than float32"


HOSTILE = '<script>alert(\'1\')</script>&amp;"x" onload="y'


def test_everything_is_escaped(tmp_path, page):
    renamed = tuple(layer._replace(name=f"{HOSTILE}/{layer.name}") for layer in TABLE.layers)
    one = content()
    candidates = [
        other._replace(name=HOSTILE) if other.group == "searched" else other
        for other in one.candidates
    ]
    text = written(
        tmp_path,
        one._replace(
            title=HOSTILE,
            table=dataclasses.replace(TABLE, layers=renamed),
            candidates=candidates,
            chosen={HOSTILE: HOSTILE},
            limits={HOSTILE: LIMIT},
            metric=HOSTILE,
            config=HOSTILE,
            timings={HOSTILE: 1.0},
            provenance={HOSTILE: HOSTILE},
            unit=(1e3, HOSTILE),
        ),
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
    text = written(tmp_path, content())
    assert "http:" not in text and "https:" not in text and "@import" not in text
    assert "url(" not in text


def test_ids_cannot_collide_and_plots_have_names(page):
    assert not [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    plots = [attrs for tag, attrs in page.elements if tag == "svg" and "aria-hidden" not in attrs]
    assert plots and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots)
    heads = [attrs for tag, attrs in page.elements if tag == "th"]
    assert heads and all("scope" in attrs for attrs in heads)


def test_equal_content_gives_equal_bytes(tmp_path):
    assert written(tmp_path, content()) == written(tmp_path, content())


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"sensitivity": None}, "The sensitivity of single layers was not measured"),
        ({"sensitivity": np.full((LAYERS, 2, 4), np.nan)}, "was not measured"),
        ({"sensitivity": np.zeros((LAYERS, 2, 4))}, "How much the error rises"),
        ({"float_accuracy": None}, "The most accurate found, A, reaches"),
        ({"scored": np.zeros((0, 2))}, "Accuracy against cost"),
        ({"scored": np.array([[3e4, 0.5]])}, "1 configurations by their error"),
        ({"hypervolume": None}, "Accuracy against cost"),
        ({"config": "", "timings": {}, "provenance": {}, "chosen": {}, "limits": {}}, "The run"),
        ({"metric": "kl", "unit": (1, "mean bits")}, "thousandths of KL divergence"),
        ({"found": {}}, "No configuration was searched."),
        ({"candidates": []}, "No configuration was searched."),
        ({"candidates": [candidate("A", MIXED, 0.9)]}, "No uniform bits were tested to compare"),
    ],
)
def test_parts_may_be_missing(tmp_path, changed, told):
    text = Page(written(tmp_path, content(**changed))).text
    assert told in text
    assert not re.search(r"\b(nan|inf|None)\b", text)


def test_without_a_float_model_it_is_not_mentioned(tmp_path):
    text = Page(written(tmp_path, content(float_accuracy=None))).text
    assert "below float" not in text and "float network" not in text


def test_unknown_costs_are_called_unknown(tmp_path):
    one = content()
    unknown = [
        other._replace(costs=other.costs | {"bitops": math.inf})
        if other.name == "uniform 4/4"
        else other
        for other in one.candidates
    ]
    cost = np.where(np.arange(LAYERS)[:, None, None] == 1, np.inf, COST)
    text = Page(written(tmp_path, one._replace(candidates=unknown, cost=cost))).text
    assert "unknown: not all of its costs are given" in text
    assert "uniform 4/4: 92.00" not in text  # it has no place in the plot


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"budget": "latency"}, "none of the budget's kind, 'latency'"),
        ({"limits": {"A": LIMIT / 2}}, "more than its limit"),
        ({"candidates": [candidate("A", MIXED, 0.9)._replace(group="found")]}, "is 'found'"),
    ],
)
def test_content_that_contradicts_itself_is_refused(tmp_path, changed, wrong):
    with pytest.raises(ValueError, match=re.escape(wrong)):
        write_page(content(**changed), tmp_path / "report.html")


def test_a_wide_network_keeps_every_layer(tmp_path):
    names = [f"features/stage{n // 9}/residual_block{n}/expanded_convolution" for n in range(80)]
    many = tuple(TABLE.layers[1]._replace(name=name) for name in names)
    table = LayerTable(many)
    cost = costs.cost_table(table, "bitops")
    bits = table.uniform(3, 2)
    total = {"bitops": costs.total(table, cost, bits)}
    one = content()._replace(
        table=table,
        cost=cost,
        candidates=[Candidate("A", "searched", bits, 0.9, None, total)],
        limits={},
        sensitivity=np.full((80, 2, 3), 0.01),
    )
    page = Page(written(tmp_path, one))
    heads = [attrs["title"] for tag, attrs in page.elements if tag == "th" and "title" in attrs]
    assert [title.split(":")[0] for title in heads] == [*table.names, *table.names]
    short = [layers.short_name(name) for name in table.names]
    assert len(set(short)) == 80 and max(map(len, short)) <= layers.LONGEST_NAME


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7.27, "7.270"), (1234.5, "1,234"), (0.001234, "0.001234"), (-3.5, "\u22123.500")],
)
def test_numbers_have_four_digits(value, text):
    assert numbers.plain(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.42, "0.42 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (192, "3 min 12 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_readable(seconds, text):
    assert numbers.duration(seconds).replace("\u00a0", " ") == text


def test_quantities_take_the_largest_unit_that_they_reach():
    shown = [numbers.quantity(size, numbers.UNITS["bytes"]) for size in (512, 1536, 3 * 2**20)]
    assert shown == ["512\u00a0B", "1.500\u00a0KiB", "3.000\u00a0MiB"]
    assert numbers.quantity(2.5e-3, numbers.UNITS["latency"]) == "2.500\u00a0ms"
    assert numbers.quantity(math.inf, numbers.UNITS["latency"]) == "unknown"


@pytest.mark.parametrize(("low", "high"), [(3.58, 27.17), (1.0, 1000.0), (97.7, 99.5), (7.0, 7.0)])
def test_a_scale_has_a_few_round_ticks_at_their_true_places(low, high):
    scale = charts.fitting([low, high], 50.0, 450.0)
    ticks = scale.ticks(8)
    assert 2 <= len(ticks) <= 9
    for place, text in ticks:
        value = float(text)
        share = (value - scale.low) / (scale.high - scale.low)
        if scale.logarithmic:
            share = math.log(value / scale.low) / math.log(scale.high / scale.low)
        assert place == pytest.approx(50 + 400 * share, abs=0.06)
    assert scale.logarithmic == (high / low >= charts.LOG_FROM)


def test_points_of_the_frontier_are_at_their_places():
    one = content(three=0.7, mixed=0.8)  # nothing lies below the plot
    plot = charts.frontier(one, 720, 400)
    across, up = (
        (np.array([float(text) for _, text in ticks]), np.array([place for place, _ in ticks]))
        for ticks in plot["ticks"]
    )
    height = np.polynomial.Polynomial.fit(*up, 1)
    place = np.polynomial.Polynomial.fit(*across, 1)
    for point, other in zip(plot["points"], one.candidates, strict=True):
        assert not point["below"]
        assert point["title"].startswith(f"{other.name}: {100 * other.accuracy:.2f}")
        assert point["y"] == pytest.approx(height(100 * other.accuracy), abs=0.2)
        assert point["x"] == pytest.approx(place(other.costs["bitops"] / 1e3), abs=0.2)


def test_what_collapsed_is_marked_at_the_edge_with_its_value():
    assert charts.lowest_shown([92.0, 91.5, 91.0, 90.0, 10.0]) == 90.0
    assert charts.lowest_shown([92.0, 91.5, 91.0, 90.0, 88.0]) == 88.0
    assert charts.lowest_shown([92.0, 10.0]) == 10.0
    plot = charts.frontier(content(three=0.9), 720, 400)
    (below,) = [point for point in plot["points"] if point["below"]]
    assert below["label"] == "2/2: 61.00\u00a0%"
    assert all(point["y"] < below["y"] for point in plot["points"] if point is not below)


def test_labels_stay_inside_and_apart():
    found = {f"a longer name {n}": (MIXED, 0.9 + n / 1000) for n in range(4)}
    for width, height in ((720, 400), (360, 380)):
        plot = charts.frontier(content(found=found, limits={}), width, height)
        boxes = []
        for point in plot["points"]:
            x, y, anchor = point["label_at"]
            length = charts.LETTER * len(point["label"])
            left = x - length * {"start": 0, "middle": 0.5, "end": 1}[anchor]
            boxes.append((left, y - charts.ABOVE, left + length, y + charts.BELOW))
            assert 0 <= left and left + length <= width and 0 < y < height
        if width == 720:
            for first in range(len(boxes)):
                for second in range(first):
                    assert charts._overlap(boxes[first], boxes[second]) < 60


def test_the_cloud_has_a_dot_for_every_place_and_a_line_below_them():
    scored = np.array([[2e4, 0.5], [3e4, 0.6], [4e4, 0.3], [4e4, 0.3], [np.nan, 0.1], [5e4, 0.4]])
    plot = charts.cloud(content(scored=scored), 360, 380)
    assert plot["count"] == 5 and plot["dots"].count("h0") == 4
    dots = re.findall(r"M([\d.]+ [\d.]+)h0", plot["dots"])
    corners = re.findall(r"[ML]([\d.]+) ([\d.]+)", plot["best"])
    (first, high), (second, still), (second_again, low), (_, last) = corners
    assert f"{first} {high}" in dots and f"{second} {low}" in dots  # 0.5 at 2e4, 0.3 at 4e4
    assert (second, high, low) == (second_again, still, last) and float(high) < float(low)
