"""What the accuracy benchmarks share: Fashion-MNIST, a network that two CPU cores can train."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mpq_jax import data
from mpq_jax.methods import METHODS
from mpq_jax.methods.base import TrainingInfo
from mpq_jax.models import make_model
from mpq_jax.program import network
from mpq_jax.search.scoring import on_drawn_images
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules
from mpq_jax.tasks import evaluation

# Held out: two thirds of the training images, so that many runs fit a two-core machine.
VALIDATION, BATCH, CALIBRATION_BATCHES, RECALIBRATION_BATCHES = 2 / 3, 128, 8, 56


class Bench:
    """One seed's data and model: ResNet-8 of width 8 with a stem of stride 2."""

    def __init__(self, data_dir: str, seed: int, epochs: int):
        self.seed, self.epochs = seed, epochs
        self.dataset = data.load(
            "tfds",
            batch_size=BATCH,
            seed=seed,
            validation_fraction=VALIDATION,
            dataset="fashion_mnist",
            data_dir=data_dir,
        )
        self.model = make_model("resnet8", num_classes=10, width=8, stem_stride=2)
        self.run = TrainingInfo(
            epochs, self.dataset.steps_per_epoch, self.prepare, images=self.recalibration_images
        )

    def table(self, candidates, **rules):
        return trace_layers(
            self.model, self.dataset.image_shape, rules=bit_rules(candidates, **rules)
        )

    def normalize(self, images):
        return data.normalize(images, mean=self.dataset.mean, std=self.dataset.std)

    def prepare(self, batch, key):
        images = data.augment(key, batch["image"], padding=2, flip_probability=0.5)
        return self.normalize(images)

    def recalibration_images(self, count: int = RECALIBRATION_BATCHES):
        """Returns training images, augmented as in training: [batches, batch, ...]."""
        batches = self.dataset.train_batches(0)
        return jnp.stack([self.prepare(next(batches), jax.random.key(i)) for i in range(count)])

    def train(self, method, variables, on_step=lambda step, state, metrics: None):
        """Returns the trained variables and the metrics of the last step."""
        batches = self.dataset.train_batches(0)
        read = [next(batches) for _ in range(CALIBRATION_BATCHES)]
        images = self.normalize(np.concatenate([one["image"] for one in read]))
        labels = jnp.asarray(np.concatenate([one["label"] for one in read]))
        state, metrics = method.init(variables, images, labels), {}
        key = jax.random.key(self.seed)
        batches = self.dataset.train_batches(0)
        for step in range(self.run.steps):
            if step % self.run.steps_per_epoch == 0:
                state, _ = method.on_epoch(state, step // self.run.steps_per_epoch)
            state, metrics = method.train_step(state, next(batches), jax.random.fold_in(key, step))
            on_step(step, state, metrics)
        return method.variables(state), {name: float(value) for name, value in metrics.items()}

    def train_float(self):
        """Returns the variables of a float model and its test accuracy."""
        options = METHODS["plain"].options(weight_decay=5e-4)
        method = METHODS["plain"].make(self.model, self.table((8,)), options, self.run)
        fresh = network.init_variables(
            self.model, jax.random.key(self.seed), self.dataset.image_shape
        )
        variables, _ = self.train(method, fresh)
        evaluate = evaluation.make_evaluate(method.predict, self.normalize)
        return variables, evaluate(variables, None, self.dataset.eval_batches("test")).accuracy

    def evaluator(self, method):
        """Returns `accuracy(variables, bits, split)` with the norms' stored statistics."""
        evaluate = evaluation.make_evaluate(method.predict, self.normalize)

        def accuracy(variables, bits, split):
            return evaluate(variables, bits, self.dataset.eval_batches(split)).accuracy

        return accuracy

    def recalibrated(self, method, count: int = RECALIBRATION_BATCHES):
        """Returns `accuracy(variables, bits, split)` after recalibration on training images."""
        accuracy = self.evaluator(method)
        images = self.recalibration_images(count)

        def after(variables, bits, split):
            return accuracy(method.net.recalibrate(variables, bits, images), bits, split)

        return after

    def validation_batches(self, size: int):
        """Yields (images, labels) of random validation images without end."""
        validation = data.whole_split(self.dataset, "validation")
        images, labels = validation["image"], validation["label"]
        generator = np.random.default_rng(self.seed)
        while True:
            chosen = generator.choice(len(images), size, replace=False)
            yield self.normalize(images[chosen]), jnp.asarray(labels[chosen])

    def on_validation(self, score, size: int):
        """Returns `score(configs, key)`: on so many validation images, which the key draws."""
        validation = data.whole_split(self.dataset, "validation")
        images, labels = self.normalize(validation["image"]), jnp.asarray(validation["label"])
        return on_drawn_images(score, images, labels, size=size)


def read(out: pathlib.Path) -> list[dict]:
    """Returns the rows of all finished runs in a folder."""
    files = sorted(out.glob("results_*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def append(out: pathlib.Path, row: dict) -> None:
    """Adds the row of a finished run, and prints it."""
    with (out / f"results_{row['seed']}.jsonl").open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def cell(values) -> str:
    """Writes mean and standard deviation of accuracies in percent."""
    percent = np.array(values) * 100
    deviation = percent.std(ddof=1) if len(percent) > 1 else float("nan")
    return f"{percent.mean():.2f} ± {deviation:.2f}"
