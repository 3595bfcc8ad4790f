"""Hyperparameters of Double Rounding, and of its mixed-precision supernet."""

import dataclasses

from mpq_jax.checks import ranges
from mpq_jax.methods import optim
from mpq_jax.methods.double_rounding import roulette
from mpq_jax.quantizers import double_rounding
from mpq_jax.quantizers.base import Quantizer

QUANTIZERS: dict[tuple[str, str], Quantizer] = {
    ("shared", "round"): double_rounding.QUANTIZER,
    ("shared", "floor"): double_rounding.FLOORED,
    ("unshared", "round"): double_rounding.UNSHARED,
}
PLAIN_RATE = "off"  # scales are updated at the scheduled rate at every precision


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyperparameters of all elements of the method; each element can be switched off.

    Attributes:
        update: "sequential" updates weights and scales after each precision (as published); "joint"
            accumulates the gradients of all precisions and updates once (ablation; needs
            scale_rate "off", because the update is not for a single precision).
        scales: "shared": one learned step size per weight tensor serves all precisions, and only
            integers are stored; "unshared": each precision has its own ("Ours*"), and floats are
            stored.
        switch: derivation of lower precisions from the stored integers: "round", or "floor"
            (arithmetic shift; ablation).
        scale_rate: variant of adaptive learning-rate scaling, see `optim.alrs`; "off": none.
        distill_weight: weight of the KL divergence to the highest precision's logits in the loss of
            the lower precisions, 0 to 1; 0: off.
        label_smoothing: label smoothing of every cross-entropy, 0 to 1.
        learning_rate: highest learning rate of Adam for the weights, followed by a cosine.
        end_learning_rate: learning rate of the weights at the end.
        scale_learning_rate: learning rate of the step sizes (lambda), a cosine to 0.
        warmup: length of the linear warm-up from zero, as a fraction of the run.
        weight_decay: weight decay of kernels, added to their gradients before Adam.
        scale_step_gradient: whether gradients of step sizes are scaled as in LSQ.
        bn_banks: norms kept separately for each precision ("weights") or shared by all ("shared").
    """

    update: str = "sequential"
    scales: str = "shared"
    switch: str = "round"
    scale_rate: str = "relative"
    distill_weight: float = 0.0
    label_smoothing: float = 0.0
    learning_rate: float = 5e-4
    end_learning_rate: float = 0.0
    scale_learning_rate: float = 5e-4
    warmup: float = 0.0
    weight_decay: float = 5e-5
    scale_step_gradient: bool = True
    bn_banks: str = "weights"

    BN_BANKS = ("weights", "shared")
    RANGES = {
        "distill_weight": ranges.FRACTION,
        "label_smoothing": ranges.FRACTION,
        "learning_rate": ranges.NOT_NEGATIVE,
        "end_learning_rate": ranges.NOT_NEGATIVE,
        "scale_learning_rate": ranges.NOT_NEGATIVE,
        "warmup": ranges.FRACTION,
        "weight_decay": ranges.NOT_NEGATIVE,
    }

    def __post_init__(self):
        """Raises ValueError, listing the valid values, for an invalid one."""
        choices = {
            "update": ("sequential", "joint"),
            "scales": ("shared", "unshared"),
            "switch": ("round", "floor"),
            "scale_rate": (*optim.ALRS_VARIANTS, PLAIN_RATE),
            "bn_banks": self.BN_BANKS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted one of {allowed}")
        ranges.check(vars(self), self.RANGES)
        if (self.scales, self.switch) not in QUANTIZERS:
            raise ValueError(
                f"scales is {self.scales!r} and switch is {self.switch!r}; wanted one of "
                f"{sorted(QUANTIZERS)}"
            )
        if self.update == "joint" and self.scale_rate != PLAIN_RATE:
            raise ValueError(
                f'update is "joint" and scale_rate is {self.scale_rate!r}, but a joint update is '
                f'not for a single precision; set scale_rate to "{PLAIN_RATE}"'
            )

    @property
    def quantizer(self) -> Quantizer:
        """Quantizer selected by the options."""
        return QUANTIZERS[self.scales, self.switch]


@dataclasses.dataclass(frozen=True)
class MixedOptions(Options):
    """Hyperparameters of the mixed-precision supernet, which starts from a multi-precision network.

    Attributes:
        bn_banks: norms kept separately for each pair of the bits of a layer and of the layer before
            it ("transition"), for the bits of the layer ("weights"), or shared by all ("shared").
        switch_probability: probability at the end of the run that a layer leaves the base precision
            (sigma); it grows linearly from epoch to epoch. The paper gives no value.
        roulette: rule by which the bits of such a layer are drawn, a key of
            `roulette.ROULETTE_RULES`.
        trace_probes: number of random vectors for the Hessian traces.
        trace_batch: number of images in a batch for the Hessian traces, of the calibration images.
    """

    bn_banks: str = "transition"
    switch_probability: float = 0.5
    roulette: str = "published"
    trace_probes: int = 16
    trace_batch: int = 128

    BN_BANKS = ("transition", "weights", "shared")
    RANGES = Options.RANGES | {
        "switch_probability": ranges.FRACTION,
        "trace_probes": ranges.Range(2, whole=True),
        "trace_batch": ranges.COUNT,
    }

    def __post_init__(self):
        """Raises ValueError, listing the valid values, for an invalid one."""
        super().__post_init__()
        if self.roulette not in roulette.ROULETTE_RULES:
            raise ValueError(
                f"roulette is {self.roulette!r}; known: {sorted(roulette.ROULETTE_RULES)}"
            )
