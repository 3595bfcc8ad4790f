"""Hyperparameters of CSQ and of its baseline with a fixed scheme."""

import dataclasses

from mpq_jax.checks import ranges
from mpq_jax.quantizers import batch_max, lsq, pact
from mpq_jax.quantizers.base import ActQuantizer
from mpq_jax.supernet.rules import FLOAT_BITS, MAX_BITS

ACT_QUANTIZERS: dict[str, ActQuantizer] = {
    "lsq": lsq.ACTS,
    "pact": pact.ACTS,
    "batch_max": batch_max.ACTS,
}
STARTS, AVERAGES, OPTIMIZERS = ("preserving", "literal"), ("layer", "param"), ("sgd", "adam")


@dataclasses.dataclass(frozen=True)
class SharedOptions:
    """Hyperparameters that CSQ and its baseline have in common.

    Attributes:
        binarize: time at which the bits are fixed as zeros and ones, as a fraction of the run;
            afterwards, only scales, norms, biases and kernels without bit planes are tuned. 1: at
            the end.
        temperature: final sharpness of all gates (T), to which it rises exponentially from 1, step
            by step.
        contiguous: whether the gate of a plane is multiplied by those of all more significant
            planes.
        start: "preserving" starts from the given weights; "literal" uses the bit values 0 and 1 as
            logits, as published, which scales the weights by 0.12.
        clip_rms: clipping threshold of the weights at the preserving start, as a multiple of their
            root mean square in a layer, so that outliers do not determine the scale; 0: the largest
            weight does.
        acts: quantizer of the layers' inputs: "lsq" (learned step size), "pact" (learned clipping)
            or "batch_max" (scaled by the largest input of the batch, as published for more than 3
            bits; cannot be exported).
        act_bits: bits of the inputs of all layers that no rule fixes; 32 leaves them float ("pact"
            then clips without rounding).
        learning_rate: learning rate of SGD with momentum for kernels without planes, norms and
            biases, a cosine to 0 over each phase; see `tuning_rate`.
        plane_learning_rate: learning rate of the bits.
        scale_learning_rate: learning rate of SGD for the scales of the planes; before a norm, the
            scales have no effect.
        step_learning_rate: learning rate of Adam for step sizes.
        plane_optimizer: optimizer of the bits: "sgd" (as published) or "adam". Masks always use
            SGD, because Adam gives all masks steps of the same size, so that planes do not
            differentiate.
        tuning_rate: factor of all learning rates after `binarize`.
        momentum: momentum of SGD.
        warmup: length of the linear warm-up from zero, as a fraction of the first phase.
        weight_decay: weight decay of kernels without bit planes; gates are never decayed.
        label_smoothing: label smoothing of the cross-entropy, 0 to 1.
    """

    binarize: float = 0.9
    temperature: float = 200.0
    contiguous: bool = False
    start: str = "preserving"
    clip_rms: float = 2.5
    acts: str = "lsq"
    act_bits: int = FLOAT_BITS
    learning_rate: float = 0.1
    plane_learning_rate: float = 10.0
    scale_learning_rate: float = 0.01
    step_learning_rate: float = 1e-3
    plane_optimizer: str = "sgd"
    tuning_rate: float = 0.1
    momentum: float = 0.9
    warmup: float = 0.0
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0

    RANGES = {
        "binarize": ranges.SHARE,
        "temperature": ranges.Range(1, above=True),
        "clip_rms": ranges.NOT_NEGATIVE,
        "act_bits": ranges.Range(2, FLOAT_BITS, whole=True),
        "learning_rate": ranges.NOT_NEGATIVE,
        "plane_learning_rate": ranges.NOT_NEGATIVE,
        "scale_learning_rate": ranges.NOT_NEGATIVE,
        "step_learning_rate": ranges.NOT_NEGATIVE,
        "tuning_rate": ranges.NOT_NEGATIVE,
        "momentum": ranges.BELOW_ONE,
        "warmup": ranges.FRACTION,
        "weight_decay": ranges.NOT_NEGATIVE,
        "label_smoothing": ranges.FRACTION,
    }

    def __post_init__(self):
        """Raises ValueError, listing the valid values, for an invalid one."""
        choices = {
            "start": STARTS,
            "acts": tuple(ACT_QUANTIZERS),
            "plane_optimizer": OPTIMIZERS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted one of {allowed}")
        if not (2 <= self.act_bits <= MAX_BITS or self.act_bits == FLOAT_BITS):
            raise ValueError(
                f"act_bits is {self.act_bits}; wanted 2 to {MAX_BITS}, or {FLOAT_BITS} for float"
            )
        ranges.check(vars(self), self.RANGES)

    @property
    def act_quantizer(self) -> ActQuantizer:
        """Quantizer of the layers' inputs."""
        return ACT_QUANTIZERS[self.acts]

    @property
    def float_acts(self) -> bool:
        """Whether the inputs of layers are neither rounded nor clipped."""
        return self.act_bits == FLOAT_BITS and self.acts != "pact"


@dataclasses.dataclass(frozen=True)
class Options(SharedOptions):
    """Hyperparameters of CSQ.

    Attributes:
        target: mean number of planes to reach, without the sign.
        average: weighting of the mean: "layer" counts every layer once (as published), "param"
            weights it by its number of weights, as storage does.
        least_planes: smallest number of planes of any layer in the frozen scheme; 0: layers may
            vanish, as published.
        budget_weight: weight of the budget-aware regularizer (lambda), with the error of the mean
            in bits. The published code measures it as a fraction of the bits, so its 0.01 is
            0.00125 here.
        budget_anneal: fraction of the time until `freeze_scheme` during which the budget falls
            linearly from all planes to the target, so that planes are dropped one by one. 0: at
            once, as published. A value near 1 is too late, because most gates are decided above
            temperature 10.
        mask_learning_rate: learning rate of the masks.
        mask_start: initial logit of all masks at the preserving start.
        freeze_scheme: time at which the scheme is frozen, as a fraction of the run: masks become
            zeros and ones, with the fewest changes that meet the budget.
        rewind: whether the temperature reaches its final value at `freeze_scheme`, and temperature
            and learning rates then repeat their schedules until `binarize`, as in the paper's
            ImageNet runs; otherwise there is one schedule until `binarize`.
        rewind_bits: whether, with `rewind`, the weights are re-quantized onto the remaining bit
            planes when the scheme is frozen; otherwise bits are kept.
    """

    target: float = 3.0
    average: str = "layer"
    least_planes: int = 1
    budget_weight: float = 0.03
    budget_anneal: float = 0.6
    mask_learning_rate: float = 0.3
    mask_start: float = 0.3
    freeze_scheme: float = 0.4
    rewind: bool = True
    rewind_bits: bool = True

    RANGES = SharedOptions.RANGES | {
        "target": ranges.NOT_NEGATIVE,
        "least_planes": ranges.COUNT_OR_NONE,
        "budget_weight": ranges.NOT_NEGATIVE,
        "budget_anneal": ranges.FRACTION,
        "mask_learning_rate": ranges.NOT_NEGATIVE,
        "mask_start": ranges.POSITIVE,
        "freeze_scheme": ranges.SHARE,
    }

    def __post_init__(self):
        """Raises ValueError, listing the valid values, for an invalid one."""
        super().__post_init__()
        if self.average not in AVERAGES:
            raise ValueError(f"average is {self.average!r}; wanted one of {AVERAGES}")
        if self.freeze_scheme > self.binarize:
            raise ValueError(
                f"freeze_scheme is {self.freeze_scheme} and binarize {self.binarize}; wanted "
                "fractions of the run, freeze_scheme not after binarize"
            )
        if self.rewind and self.freeze_scheme >= self.binarize:
            raise ValueError(
                f"rewind needs freeze_scheme before binarize; they are {self.freeze_scheme} and "
                f"{self.binarize}"
            )


@dataclasses.dataclass(frozen=True)
class UniformOptions(SharedOptions):
    """Hyperparameters of the baseline: the same training with the same planes in every layer.

    Attributes:
        planes: number of planes of every layer, without the sign; all are on during the whole run.
    """

    planes: int = 3

    RANGES = SharedOptions.RANGES | {"planes": ranges.Range(1, MAX_BITS - 1, whole=True)}
