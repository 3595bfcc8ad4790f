"""Times the search: seconds per scored configuration, a whole greedy descent, and how it scales.

    python -m benchmarks.search [--parts=scores,descent,layers,configs,devices] [--rounds=5]

"scores": one plain forward of the float model and of a subnet, then a set of configurations that
differ in one layer (a greedy move) by a loop over a jitted forward, `vmap`, `lax.map`
(`scoring.make_score`) and shared prefixes (`prefix_scoring.make_prefix_score`). All take turns
in one process; printed are medians per configuration and the median of the ratios to the subnet's
forward in the same round. "descent": the greedy search of the 4-bit level, from 5 bits, with and
without shared prefixes on the same images. The others: time against layers, configurations and
(virtual) devices. Weights are random: time does not depend on them, but the path of a descent does.
"""

import argparse
import functools
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax.models import make_model
from mpq_jax.parallel import mesh as sharding
from mpq_jax.program import network
from mpq_jax.quantizers import lsq
from mpq_jax.search import prefix_scoring, segments
from mpq_jax.search.greedy import greedy_search
from mpq_jax.search.problem import Budget, Constraint, seed_words
from mpq_jax.search.space import WEIGHTS, SearchSpace
from mpq_jax.supernet import costs, scoring
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.supernet.supernet import Supernet
from mpq_jax.training.metrics import CompileCounter

NETWORKS = {"resnet20": (32, 128), "resnet18": (64, 32)}  # pixels, batch
VMAPPED = ("resnet20",)  # of ResNet-18, one configuration takes minutes by vmap
DEPTHS = ("resnet20", "resnet32", "resnet56")
COUNTS = (1, 8, 32, 128)
DEVICES = (1, 2, 4, 8)


class Case:
    """A network with random weights, images, and what is scored."""

    def __init__(self, name: str, pixels: int, batch: int):
        self.shape = (pixels, pixels, 3)
        self.model = make_model(name, num_classes=10)
        self.table = trace_layers(self.model, self.shape, rules=bit_rules())
        self.net = Supernet(self.model, self.table, quantizer=lsq.QUANTIZER)
        self.space = SearchSpace(self.table)
        generator = np.random.default_rng(0)
        self.images = jnp.asarray(generator.normal(size=(batch, *self.shape)), jnp.float32)
        self.labels = jnp.asarray(generator.integers(0, 10, batch), jnp.int32)
        self.float = network.init_variables(self.model, jax.random.key(0), self.shape)
        self.state = jax.jit(self.net.init)(self.float, self.images)

    def neighbors(self) -> BitConfig:
        """Returns what the first greedy move compares: each layer's weights up and down."""
        variables = [v for v in self.space.variables if self.space.column(v) == WEIGHTS]
        return self.space.bits_of(self.space.neighbors(self.space.uniform(5), variables))

    def sampled(self, count: int) -> BitConfig:
        """Returns random configurations."""
        generator = np.random.default_rng(0)
        return self.space.bits_of(np.array([self.space.sample(generator) for _ in range(count)]))

    def segments(self) -> segments.Segments:
        return segments.find_segments(self.net, self.shape, train=True)

    def score(self) -> scoring.BatchScore:
        return scoring.make_score(self.net, self.state, metric="loss")

    def prefix_score(self) -> scoring.BatchScore:
        return prefix_scoring.make_prefix_score(
            self.net, self.state, self.segments(), metric="loss"
        )

    def loss(self, state, bits, images):
        out = self.net.forward(self.net.select(state, bits), images, train=True)
        return scoring.mean_loss(out.logits, self.labels, jnp.zeros(()))


def in_turn(works: dict, rounds: int) -> dict[str, np.ndarray]:
    """Returns the seconds of each piece of work in every round, after one that compiles."""
    seconds = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            started = time.perf_counter()
            jax.block_until_ready(work())
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return {name: np.array(values) for name, values in seconds.items()}


def print_scores(name: str, rounds: int) -> None:
    case = Case(name, *NETWORKS[name])
    configs, images, labels = case.neighbors(), case.images, case.labels
    count = len(configs.weights)
    forward = jax.jit(case.loss)
    vmapped = jax.jit(jax.vmap(case.loss, in_axes=(None, 0, None)))
    few = jax.tree.map(lambda bits: bits[:4], configs)
    plain = jax.jit(lambda x: network.forward(case.model, case.float, x, train=True)[0])
    by_map, by_prefix = case.score(), case.prefix_score()

    def loop():
        return [
            forward(case.state, jax.tree.map(lambda bits, i=i: bits[i], configs), images)
            for i in range(count)
        ]

    works = {
        "float forward": (lambda: plain(images), 1),
        "subnet forward": (
            lambda: forward(case.state, case.table.uniform(5, 5), images),
            1,
        ),
        "loop over jitted forward": (loop, count),
        "vmap, of 4": (lambda: vmapped(case.state, few, images), 4),
        "lax.map": (lambda: by_map(configs, images, labels), count),
        "shared prefixes": (lambda: by_prefix(configs, images, labels), count),
    }
    if name not in VMAPPED:
        del works["vmap, of 4"]
    seconds = in_turn({kind: work for kind, (work, _) in works.items()}, rounds)
    base = seconds["subnet forward"]
    print(f"\n{name}, {case.shape[0]} px, batch {len(images)}, {count} configurations\n")
    print("| scoring | s per configuration | of a subnet's forward |\n|---|---|---|")
    for kind, (_, size) in works.items():
        each = seconds[kind] / size
        print(f"| {kind} | {np.median(each):.4f} | {np.median(each / base):.2f} |")


def print_descents(rounds: int) -> None:
    case = Case("resnet20", *NETWORKS["resnet20"])
    cost = costs.cost_table(case.table, "bitops")
    most = costs.total(case.table, cost, case.table.uniform(4, 4))
    budget = Budget("4-bit level", (Constraint("bitops", cost, most),))
    batches = np.random.default_rng(1).normal(size=(64, *case.images.shape)).astype(np.float32)
    counts: dict[str, int] = {}
    paths: dict[str, list] = {}

    def descend(kind: str, score):
        draws = iter(batches)
        counts[kind], paths[kind] = 0, []

        @functools.lru_cache(maxsize=1)
        def drawn(words):
            return jnp.asarray(next(draws))

        def scored(configs, key):
            counts[kind] += len(configs.weights)
            return score(configs, drawn(seed_words(key)), case.labels)

        greedy_search(scored, case.space, [budget], jax.random.key(0), on_step=paths[kind].append)

    scores = {"lax.map": case.score(), "shared prefixes": case.prefix_score()}
    works = {kind: functools.partial(descend, kind, score) for kind, score in scores.items()}
    for score in scores.values():  # compiles
        score(case.neighbors(), case.images, case.labels)
    with CompileCounter() as counter:
        seconds = {kind: [] for kind in works}
        for _ in range(rounds):
            for kind, work in works.items():
                started = time.perf_counter()
                work()
                seconds[kind].append(time.perf_counter() - started)
    seconds = {kind: np.array(values) for kind, values in seconds.items()}
    slow, fast = seconds.values()
    print("\nA greedy descent of ResNet-20 to the 4-bit level\n")
    print("| scoring | moves | configurations | s | ratio |\n|---|---|---|---|---|")
    for kind, values in seconds.items():
        ratio = np.median(slow / values)
        print(
            f"| {kind} | {len(paths[kind])} | {counts[kind]} | {np.median(values):.1f} "
            f"| {ratio:.2f} |"
        )
    same = [step.change for step in paths["lax.map"]] == [
        step.change for step in paths["shared prefixes"]
    ]
    print(f"\nthe same moves: {same}; programs compiled meanwhile: {dict(counter.counts)}")


def print_layers(rounds: int) -> None:
    print("\n| network | layers | segments | lax.map, s | shared prefixes, s | ratio |")
    print("|---" * 6 + "|")
    for name in DEPTHS:
        case = Case(name, 32, 32)
        configs = case.neighbors()
        scores = {"map": case.score(), "prefix": case.prefix_score()}
        works = {
            kind: functools.partial(score, configs, case.images, case.labels)
            for kind, score in scores.items()
        }
        seconds = in_turn(works, rounds)
        parts = len(case.segments().parts)
        medians = {kind: float(np.median(values)) for kind, values in seconds.items()}
        ratio = float(np.median(seconds["map"] / seconds["prefix"]))
        print(
            f"| {name} | {len(case.table)} | {parts} | {medians['map']:.2f} "
            f"| {medians['prefix']:.2f} | {ratio:.2f} |"
        )


def print_counts(rounds: int) -> None:
    case = Case("resnet20", 32, 32)
    score = case.score()
    works = {
        str(count): functools.partial(score, case.sampled(count), case.images, case.labels)
        for count in COUNTS
    }
    with CompileCounter() as counter:
        seconds = in_turn(works, rounds)
    print("\n| random configurations | s | s per configuration |\n|---|---|---|")
    for count, values in seconds.items():
        print(f"| {count} | {np.median(values):.2f} | {np.median(values) / int(count):.4f} |")
    print(f"\ncompiled: score_configs x{counter.counts['score_configs']}")


def print_devices() -> None:
    print("\n| devices | s for 32 configurations | largest difference of a score |\n|---|---|---|")
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={max(DEVICES)}"
    }
    command = [sys.executable, "-m", "benchmarks.search", "--parts=on_devices"]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    print(done.stdout)


def print_on_devices(rounds: int) -> None:
    case = Case("resnet20", 32, 32)
    configs = case.sampled(32)
    works = {}
    for count in DEVICES:
        mesh = sharding.make_mesh(count)
        score = scoring.make_score(
            case.net, sharding.replicate(case.state, mesh), metric="loss", mesh=mesh
        )
        images, labels = sharding.replicate((case.images, case.labels), mesh)
        works[str(count)] = functools.partial(score, configs, images, labels)
    wanted = np.asarray(works["1"]())
    seconds = in_turn(works, rounds)
    for count, work in works.items():
        difference = np.abs(np.asarray(work()) - wanted).max()
        print(f"| {count} | {np.median(seconds[count]):.2f} | {difference:.1g} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default="scores,descent,layers,configs,devices")
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of the scores")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    parts = {
        "scores": lambda: [
            print_scores(name, arguments.rounds) for name in arguments.networks.split(",")
        ],
        "descent": lambda: print_descents(1),
        "layers": lambda: print_layers(min(3, arguments.rounds)),
        "configs": lambda: print_counts(min(3, arguments.rounds)),
        "devices": print_devices,
        "on_devices": lambda: print_on_devices(min(3, arguments.rounds)),
    }
    for part in arguments.parts.split(","):
        if part not in parts:
            parser.error(f"--parts names {part!r}; known: {', '.join(parts)}")
        parts[part]()


if __name__ == "__main__":
    main()
