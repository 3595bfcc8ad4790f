"""Hyperparameters of Double Rounding, and of its mixed-precision supernet."""

import dataclasses

from mpq_jax.methods import optim
from mpq_jax.methods.double_rounding import roulette
from mpq_jax.quantizers import double_rounding
from mpq_jax.quantizers.base import Quantizer

QUANTIZERS: dict[tuple[str, str], Quantizer] = {
    ("shared", "round"): double_rounding.QUANTIZER,
    ("shared", "floor"): double_rounding.FLOORED,
    ("unshared", "round"): double_rounding.UNSHARED,
}
PLAIN_RATE = "off"  # scales move by the scheduled rate, whatever the precision


@dataclasses.dataclass(frozen=True)
class Options:
    """Every element of the method; each can be switched off.

    Attributes:
        update: "sequential" updates weights and scales after each precision (as published);
            "joint" accumulates the gradients of all precisions and updates once (the ablation;
            needs scale_rate "off", since one update has no one precision).
        scales: "shared": one learned step size of a layer's weights serves all precisions, and
            integers alone are stored; "unshared": one for each ("Ours*"), floats are stored.
        switch: how lower precisions follow from the stored integers: "round", or "floor" (an
            arithmetic shift; the ablation).
        scale_rate: reading of adaptive learning-rate scaling, see `optim.alrs`; "off": without.
        distill_weight: share of the KL to the highest precision's logits in the loss of the lower
            precisions; 0: off.
        label_smoothing: in every cross-entropy.
        learning_rate, end_learning_rate: of Adam for the weights, cosine.
        scale_learning_rate: of the step sizes (lambda), cosine to 0.
        warmup: linear warm-up from zero, as a fraction of the run.
        weight_decay: of kernels, added to their gradients before Adam.
        scale_step_gradient: LSQ's gradient scale for step sizes.
        bn_banks: norms kept once per precision ("weights") or shared by all ("shared").
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

    def __post_init__(self):
        """Refuses invalid values and names the valid ones."""
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
        for name in ("distill_weight", "label_smoothing", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted a number from 0 to 1")
        if (self.scales, self.switch) not in QUANTIZERS:
            raise ValueError(
                f"scales is {self.scales!r} and switch is {self.switch!r}; wanted one of "
                f"{sorted(QUANTIZERS)}"
            )
        if self.update == "joint" and self.scale_rate != PLAIN_RATE:
            raise ValueError(
                f'update is "joint" and scale_rate is {self.scale_rate!r}: a joint update is of no '
                f'one precision; set scale_rate to "{PLAIN_RATE}"'
            )

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer that these options ask for."""
        return QUANTIZERS[self.scales, self.switch]


@dataclasses.dataclass(frozen=True)
class MixedOptions(Options):
    """Of the mixed-precision supernet, whose start is a multi-precision network.

    Attributes:
        bn_banks: "transition" keeps norms per (bits of the layer, bits of the layer before it);
            "weights" per bits of the layer; "shared" once.
        switch_probability: sigma, the probability at the end of the run that a layer leaves the
            base precision; it grows linearly from epoch to epoch. The paper gives no value.
        roulette: how a leaving layer's bits are drawn: "published", "smooth" or "uniform".
        trace_probes: random vectors of the estimate of the Hessian traces.
        trace_batch: images of one of its batches; it takes the calibration images.
    """

    bn_banks: str = "transition"
    switch_probability: float = 0.5
    roulette: str = "published"
    trace_probes: int = 16
    trace_batch: int = 128

    BN_BANKS = ("transition", "weights", "shared")

    def __post_init__(self):
        """Refuses invalid values and names the valid ones."""
        super().__post_init__()
        if self.roulette not in roulette.ROULETTE_RULES:
            raise ValueError(
                f"roulette is {self.roulette!r}; known: {sorted(roulette.ROULETTE_RULES)}"
            )
        if not 0 <= self.switch_probability <= 1:
            raise ValueError(
                f"switch_probability is {self.switch_probability}; wanted a number from 0 to 1"
            )
        if self.trace_probes < 2 or self.trace_batch < 1:
            raise ValueError(
                f"trace_probes is {self.trace_probes} and trace_batch {self.trace_batch}; wanted "
                "at least 2 probes and 1 image"
            )
