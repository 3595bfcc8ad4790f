"""What a training method is: a record of pure functions that a training loop calls."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
from jaxtyping import Array, Key

from mpq_jax.parallel.grad_accumulation import Parts
from mpq_jax.quantizers.base import Quantizer
from mpq_jax.supernet import supernet
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable

PyTree = Any
Batch = dict[str, Array]  # "image" [batch, ...] as the data gives it, "label" int32 [batch]


class Run(NamedTuple):
    """How long the method is going to train, and how a batch is made ready.

    Attributes:
        epochs: passes over the training data.
        steps_per_epoch: batches of one pass.
        prepare: `(batch, key) -> float images`, augmentation and normalisation, traceable.
        images: reads training images and prepares them, [batches, batch, ...], for methods that
            estimate norm statistics anew; None: they are left as training has them.
        parts: how every batch is divided among devices, and into micro-batches.
    """

    epochs: int
    steps_per_epoch: int
    prepare: Callable[[Batch, Key[Array, ""]], Array]
    images: Callable[[], Array] | None = None
    parts: Parts = Parts()

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.epochs * self.steps_per_epoch


class Found(NamedTuple):
    """A network whose bits training found itself.

    Attributes:
        table: its layers, each with the bits that it got as its only candidates.
        variables: an ordinary supernet with these bits.
        quantizer: of kernels and inputs.
        bits: how its bits may be counted, by name; "integers" are those of the table.
        layouts: which bits the integers of a layer are made of, by path, for people to read.
    """

    table: LayerTable
    variables: supernet.Variables
    quantizer: Quantizer
    bits: dict[str, BitConfig]
    layouts: dict[str, str]


class Method(NamedTuple):
    """The functions of one method, made for one model and one run.

    Attributes:
        table: the layers as the method uses them; search and costs must use this table.
        init: `(start variables, normalised images, labels) -> state`. Some methods do without
            labels. The state is a pytree of arrays with a field `step`; it holds all that a
            resumed run needs.
        train_step: `(state, batch, key) -> (state, metrics)`, compiled inside; it consumes the
            state it is given. Metrics are scalars.
        on_epoch: `(state, epoch) -> (state, events)`, called before the first step of each
            epoch; `events` are numbers worth logging, empty if nothing happened.
        eval_bits: names and configurations worth evaluating while training; None: the model
            has no bits. Methods that find bits themselves have something of their own instead.
        variables: `state -> variables`, what evaluation, search and export act on: the float
            model's `{"params", "batch_stats"}`, `supernet.Variables`, or what `found` takes.
        predict: `(variables, bits, normalised images) -> logits` in evaluation mode, traceable;
            bits as in `eval_bits`.
        quantizer: of kernels and inputs; None: the model has no bits.
        read: `(checkpoint, float variables or their shapes) -> start variables`: what `init` takes
            out of the checkpoint of another run; raises ValueError if it does not fit.
        summary: `state -> numbers` worth logging at the end of every epoch.
        found: `variables -> Found`, of methods that find the bits while they train.
    """

    table: LayerTable
    init: Callable[..., PyTree]
    train_step: Callable[[PyTree, Batch, Key[Array, ""]], tuple[PyTree, dict[str, Array]]]
    on_epoch: Callable[[PyTree, int], tuple[PyTree, dict[str, float]]]
    eval_bits: dict[str, Any]
    variables: Callable[[PyTree], PyTree]
    predict: Callable[[PyTree, Any, Array], Array]
    quantizer: Quantizer | None
    read: Callable[[dict[str, Any], PyTree], PyTree]
    summary: Callable[[PyTree], dict[str, float]] = lambda state: {}
    found: Callable[[PyTree], Found] | None = None


class MakeMethod(Protocol):
    """Builds a method for one model and run."""

    def __call__(self, model: nn.Module, table: LayerTable, options: Any, run: Run) -> Method:
        """Builds the method; `options` are those of its family."""
        ...


class Variant(NamedTuple):
    """A method's place as a variant of another one, whose options it takes over.

    Attributes:
        of: name of the other method.
        name: name that chooses the variant, as in `--config=digits:NAME`.
        derive: `options of the other method -> values of this method's options`; the options that
            it leaves out are this method's own.
    """

    of: str
    name: str
    derive: Callable[[Any], dict[str, Any]]


class MethodFamily(NamedTuple):
    """A method before its model is known.

    Attributes:
        options: frozen dataclass of all hyperparameters, checked on construction.
        make: builds the method.
        successor_of: name of the method whose network it may start from, beside a float model.
        inherited: options that must be those of that method's run, as its numbers mean nothing
            under others.
        variant: the method that it is a variant of; None: it stands alone.
    """

    options: type
    make: MakeMethod
    successor_of: str | None = None
    inherited: tuple[str, ...] = ()
    variant: Variant | None = None
