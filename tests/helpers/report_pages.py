"""A made-up report and the page that is written of it."""

import html.parser
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mpq_jax.reporting.html import Candidate, Content, write_page
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import Rule, bit_rules, trace_layers

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


def candidate(name, bits, accuracy, validation=None):
    by_kind = {
        kind: costs.total(TABLE, costs.cost_table(TABLE, kind), bits)
        for kind in ("bitops", "bytes", "mean_bits")
    }
    group = "uniform" if name.startswith("uniform") else "searched"
    return Candidate(name, group, bits, accuracy, validation, by_kind)


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
