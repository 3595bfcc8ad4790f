"""The record of a training method: pure functions that a training loop calls."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Key

from mpq_jax.parallel.grad_accumulation import BatchPartition
from mpq_jax.program import linen
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.supernet.supernet import Supernet, SupernetState

PyTree = Any
Batch = dict[str, Array]  # "image" [batch, ...] as the data gives it, "label" int32 [batch]


class TrainingInfo(NamedTuple):
    """The length of a run, and how its batches are prepared.

    Attributes:
        epochs: passes over the training data.
        steps_per_epoch: batches of one pass.
        prepare: `(batch, key) -> float images`, augmentation and normalization, traceable.
        images: reads and prepares training images, [batches, batch, ...], for methods that
            re-estimate norm statistics; None: the statistics of training are kept.
        partition: division of every batch among devices and into micro-batches.
    """

    epochs: int
    steps_per_epoch: int
    prepare: Callable[[Batch, Key[Array, ""]], Array]
    images: Callable[[], Array] | None = None
    partition: BatchPartition = BatchPartition()

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch


class LearnedScheme(NamedTuple):
    """A network whose bits were learned in training.

    Attributes:
        net: the network; each layer has its learned bits as its only candidates.
        state: its state, an ordinary supernet's.
        bits: ways to count its bits, by name; "integers" are those of the table.
        layouts: the bits that the integers of a layer are made of, by path, for people to read.
    """

    net: Supernet
    state: SupernetState
    bits: dict[str, BitConfig]
    layouts: dict[str, str]


class Method(NamedTuple):
    """The functions of one method, made for one model and one run.

    Attributes:
        table: the layers as the method uses them; costs must use this table.
        init: `(start variables, normalized images, labels) -> state`; some methods need no
            labels. The state is a pytree of arrays with a field `step`; it holds all that a
            resumed run needs.
        train_step: `(state, batch, key) -> (state, metrics)`, compiled inside; it consumes the
            state it is given. Metrics are scalars.
        on_epoch: `(state, epoch) -> (state, events)`, called before the first step of each
            epoch; `events` are numbers worth logging, empty if nothing happened.
        eval_bits: configurations to evaluate during training, by name; None: the model has no
            bits. Methods that learn the bits have values of their own instead.
        variables: `state -> variables` for evaluation, search and export: the float model's
            `{"params", "batch_stats"}`, a `SupernetState`, or the argument of `scheme`.
        predict: `(variables, bits, normalized images) -> logits` in evaluation mode, traceable;
            bits as in `eval_bits`.
        net: the supernet that search and export use; None: the method has none.
        load_warm_start: `(checkpoint, float variables or their shapes) -> start variables`, taken
            from the checkpoint of another run; raises ValueError if they do not fit.
        summary: `state -> numbers` to log at the end of every epoch.
        scheme: `variables -> LearnedScheme`, for methods that learn the bits.
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
    summary: Callable[[PyTree], dict[str, float]] = lambda state: {}
    scheme: Callable[[PyTree], LearnedScheme] | None = None


class MakeMethod(Protocol):
    """Builds a method for one model and run."""

    def __call__(
        self, model: linen.Model, table: LayerTable, options: Any, run: TrainingInfo
    ) -> Method:
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
        warm_starts_from: name of the method whose network it may start from, besides a float
            model.
        must_match: options that must equal those of that method's run.
        variant: the method that it is a variant of; None: it stands alone.
    """

    options: type
    make: MakeMethod
    warm_starts_from: str | None = None
    must_match: tuple[str, ...] = ()
    variant: Variant | None = None
