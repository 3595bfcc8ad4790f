"""The arrays of a supernet, of one of its subnets, and of a call."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int

PyTree = Any


class TrainableParams(NamedTuple):
    """Parameters that the optimizer updates.

    Attributes:
        params: the model's parameters; leaves of a banked norm have leading row axes
            (`table.bank_axes`), each in the order of `table.bank_bits`.
        weight_step_sizes: float32 [layers, choices], step size of each kernel at each candidate;
            quantizers with one step size for all bits use the column of the most bits.
        act_step_sizes: float32 [layers, choices], step size of each layer's input.
    """

    params: PyTree
    weight_step_sizes: Any
    act_step_sizes: Any


class SupernetState(NamedTuple):
    """All arrays of a supernet.

    Attributes:
        trainable: parameters and step sizes.
        batch_stats: the model's BatchNorm statistics, with row axes like the parameters.
        signed: bool [layers], whether the codes of a layer's input are signed.
    """

    trainable: TrainableParams
    batch_stats: PyTree
    signed: Bool[Array, " layers"]


class Subnet(NamedTuple):
    """One subnet: plain variables of the model, and the quantizers of its layers' inputs.

    Attributes:
        params: parameters as the model expects them, kernels quantized.
        batch_stats: statistics as the model expects them.
        act_step_sizes: float32 [layers].
        act_bits: int32 [layers].
        signed: bool [layers].
        computed: kernels that the model computes from several parameters, by layer; they take the
            place of what it computes.
        second: "step_size", float32 [layers], "bits", int32 [layers], and "signed", bool [layers],
            of the second operands of products; empty if the table has no products.
    """

    params: PyTree
    batch_stats: PyTree
    act_step_sizes: Float[Array, " layers"]
    act_bits: Int[Array, " layers"]
    signed: Bool[Array, " layers"]
    computed: dict[str, Array]
    second: dict[str, Array]


class Output(NamedTuple):
    """Result of `Supernet.forward`.

    Attributes:
        logits: outputs of the model, as it returns them; floats in float32.
        batch_stats: the model's statistics after the call (unchanged in evaluation mode).
        features: outputs of the norm after every layer with a choice (of the layer itself where
            it has no norm), and of the module around that norm, by path.
        records: arrays that hooks recorded during the call, by path and name.
    """

    logits: Any
    batch_stats: PyTree
    features: dict[str, Array]
    records: dict[str, Array]
