"""A made-up report and the page that is written of it."""

import html.parser
import re

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mpq_jax.reporting import write_page
from mpq_jax.search.cost_metrics import CostMetric
from mpq_jax.search.problem import Step
from mpq_jax.search.report import EvaluatedConfig, SearchReport
from mpq_jax.supernet import costs
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import Rule, bit_rules
from mpq_jax.supernet.state import SupernetState, TrainableParams
from mpq_jax.tasks.evaluation import Score

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


NO_STATE = SupernetState(TrainableParams({}, None, None), {}, jnp.zeros(LAYERS, bool))


def evaluated(name, bits, accuracy):
    by_kind = {
        kind: costs.total(TABLE, costs.cost_table(TABLE, kind), bits)
        for kind in ("bitops", "bytes", "mean_bits")
    }
    return EvaluatedConfig(
        name=name,
        group="uniform" if name.startswith("uniform") else "searched",
        bits=bits,
        costs=by_kind,
        validation=Score(0.75, 0.5, 100),
        test=Score(accuracy, 0.5, 100),
        state=NO_STATE,
    )


UNIFORM = {f"uniform {n}/{n}": TABLE.uniform(n, n) for n in (4, 3, 2)}
LIMIT = costs.total(TABLE, COST, MIXED) + 1.0


def made_report(*, mixed=0.9, three=0.8725, found=None, **changed):
    accuracies = {"uniform 4/4": 0.92, "uniform 3/3": three, "uniform 2/2": 0.61}
    searched = {"A": (MIXED, mixed)} if found is None else found
    generator = np.random.default_rng(0)
    increases = generator.lognormal(-4.0, 1.5, (LAYERS, 2, len(TABLE.candidates)))
    fields = {
        "table": TABLE,
        "cost": CostMetric("bitops", COST, (1e3, "kBitOPs")),
        "configs": (
            *(evaluated(name, UNIFORM[name], value) for name, value in accuracies.items()),
            *(evaluated(name, bits, value) for name, (bits, value) in searched.items()),
        ),
        "float_accuracy": 0.9375,
        "requests": {"A": "at most a lot"},
        "limits": dict.fromkeys(searched, LIMIT),
        "sensitivity": np.where(TABLE.mask, increases, np.nan),
        "traces": None,
        "notes": (),
        "metric": "error",
        "steps": (Step("program", "solution 1 of 8", 3e4, 0.25),),
        "scored": generator.uniform((2e4, 0.1), (9e4, 0.6), (50, 2)),
        "new_scores": 50,
        "known_scores": 0,
        "timings": {"search": 192.0, "tests": 3.5},
        "provenance": {"jax": "0.10.2"},
    }
    return SearchReport(**(fields | changed))


def written(tmp_path, report, *, title="net on images", config="seed: 17\n"):
    path = tmp_path / "report.html"
    write_page(report, path, title=title, config=config)
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
