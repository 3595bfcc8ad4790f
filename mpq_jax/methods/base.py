"""The record of a training method: pure functions called by the training loop."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Key

from mpq_jax.parallel.grad_accumulation import BatchPartition
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.state import SupernetState
from mpq_jax.supernet.supernet import Supernet

PyTree = Any
Batch = dict[str, PyTree]  # "image" [batch, ...] as read from the dataset, "label" int32 [batch]


class TrainingInfo(NamedTuple):
    """Length of a run, and preparation of its batches.

    Attributes:
        epochs: number of passes over the training data.
        steps_per_epoch: number of batches in one pass.
        prepare: `(batch, key) -> float images`: augmentation and normalization, traceable.
        images: function that reads and prepares training images, [batches, batch, ...], for
            methods that recalibrate norm statistics; None: they keep those of training.
        partition: division of every batch among devices and into micro-batches.
    """

    epochs: int
    steps_per_epoch: int
    prepare: Callable[[Batch, Key[Array, ""]], Array]
    images: Callable[[], Array] | None = None
    partition: BatchPartition = BatchPartition()

    @property
    def steps(self) -> int:
        """Number of optimizer steps in the run."""
        return self.epochs * self.steps_per_epoch


class LearnedScheme(NamedTuple):
    """A network whose bits were learned in training.

    Attributes:
        net: supernet in which the learned bits of each layer are its only candidates.
        state: state of that supernet.
        bits: configurations by the way of counting bits; "integers" are those of the table.
        layouts: readable description of the bits in each layer's integers, by path.
    """

    net: Supernet
    state: SupernetState
    bits: dict[str, BitConfig]
    layouts: dict[str, str]


class TrainingCurves(NamedTuple):
    """Curves of a training run that learned bits.

    Attributes:
        layers: bits of each layer by epoch, by its path.
        label: unit of these bits, such as "planes".
        panels: further curves by epoch: {label of the axis: {label of the curve: values}}.
    """

    layers: dict[str, list[float]]
    label: str
    panels: dict[str, dict[str, list[float]]]


class Method(NamedTuple):
    """The functions of one method, for one model and one run.

    Attributes:
        table: layers as the method uses them; costs must use this table.
        init: `(initial variables, normalized images, labels) -> state`; some methods need no
            labels. The state is a pytree of arrays with a field `step`; it holds everything that a
            resumed run needs.
        train_step: `(state, batch, key) -> (state, metrics)`, already compiled; the state passed in
            is donated. Metrics are scalars.
        on_epoch: `(state, epoch) -> (state, events)`, called before the first step of each epoch;
            `events` are numbers to log, empty if nothing happened.
        eval_bits: configurations to evaluate during training, by name; None as a configuration: a
            float model. Methods that learn the bits have values of their own.
        variables: `state -> variables` for evaluation, search and export: the float model's
            `{"params", "batch_stats"}`, a `SupernetState`, or the argument of `scheme`.
        predict: `(variables, bits, normalized images) -> logits` in evaluation mode, traceable;
            bits as in `eval_bits`.
        net: supernet for search and export; None: the method has none.
        load_warm_start: `(checkpoint, float variables or their shapes) -> initial variables`, read
            from the checkpoint of another run; raises ValueError if they do not fit.
        layers_at_floor: `state -> names` of the layers with a step size that has shrunk to
            nothing, see `supernet.layers_at_floor`.
        summary: `state -> numbers` to log at the end of every epoch.
        scheme: `variables -> LearnedScheme` for methods that learn the bits; None for others.
        curves: `logged metrics -> TrainingCurves` for methods that learn the bits; None for others.
    """

    table: LayerTable
    init: Callable[..., PyTree]
    train_step: Callable[[PyTree, Batch, Key[Array, ""]], tuple[PyTree, dict[str, Array]]]
    on_epoch: Callable[[PyTree, int], tuple[PyTree, dict[str, float]]]
    eval_bits: dict[str, Any]
    variables: Callable[[PyTree], PyTree]
    predict: Callable[[PyTree, Any, Array], Array]
    net: Supernet | None
    load_warm_start: Callable[[dict[str, Any], PyTree], PyTree]
    layers_at_floor: Callable[[PyTree], list[str]] = lambda state: []
    summary: Callable[[PyTree], dict[str, float]] = lambda state: {}
    scheme: Callable[[PyTree], LearnedScheme] | None = None
    curves: Callable[[list[dict[str, Any]]], TrainingCurves] | None = None


class MakeMethod(Protocol):
    """Builds a method for one model and run."""

    def __call__(self, model: Any, table: LayerTable, options: Any, run: TrainingInfo) -> Method:
        """Builds the method; `options` are those of its family."""
        ...


class Variant(NamedTuple):
    """Declares a method to be a variant of another one, from which it derives options.

    Attributes:
        of: key of the other method in `METHODS`.
        name: name of the variant, as in `--config=digits:NAME`.
        derive: `options of the other method -> values of this method's options`; the options that
            it leaves out are this method's own.
    """

    of: str
    name: str
    derive: Callable[[Any], dict[str, Any]]


class MethodFamily(NamedTuple):
    """A method before its model is known.

    Attributes:
        options: frozen dataclass of all hyperparameters, checked on construction; its `RANGES` are
            those of its numbers.
        make: function that builds the method.
        warm_starts_from: name of a method whose networks are a valid start, in addition to float
            models; None: there is none.
        must_match: names of options that must equal those of that method's run.
        variant: relation to the method of which this is a variant; None: it is not a variant.
    """

    options: Any
    make: MakeMethod
    warm_starts_from: str | None = None
    must_match: tuple[str, ...] = ()
    variant: Variant | None = None
