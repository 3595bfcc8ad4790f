"""Hyperparameters of RFQuant. Durations are fractions of the run."""

import dataclasses
from typing import Any

from mpq_jax.checks import ranges
from mpq_jax.quantizers import lsq
from mpq_jax.quantizers.base import Quantizer

OPTIMIZERS = ("sgd", "adamw")
LOOPS = ("auto", "calls", "unrolled", "scan")
FEATURES = ("norm_output", "post_activation", "block_output", "published")
QUANTIZERS: dict[str, Quantizer] = {
    "least_error": lsq.QUANTIZER,
    "three_sigma": lsq.THREE_SIGMA,
}
EPOCHS = 150  # length of the published runs: k / EPOCHS is the published epoch k


@dataclasses.dataclass(frozen=True)
class Options:
    """Hyperparameters of all elements of the method; each element can be switched off.

    Attributes:
        random_subnets: number of randomly drawn subnets per step, in addition to the max subnet.
        subnet_loop: implementation of the loop over subnets: "calls" (one compiled function called
            repeatedly, least memory on CPU), "unrolled", "scan", or "auto" ("calls" on CPU,
            otherwise "scan").
        gradient: "sum" of the subnets' losses, as published, or their "mean" (except for the 2-bit
            term, since weight decay is not averaged).
        soft_label_weight: weight of the KL divergence to the max subnet in a random subnet's loss,
            0 to 1; 0: off.
        label_smoothing: label smoothing of every cross-entropy, 0 to 1.
        idm_weight: weight of information-distortion mitigation; 0: off.
        idm_features: features that distortion is measured on, see `terms.pick_features`.
        first_steps: rule of the weights' first step sizes: "least_error", which keeps a trained
            network intact (`lsq.init_weight_step_by_error`), or "three_sigma", as published.
        freeze_ratio_start: fraction of the layers that are frozen, which masks their lowest bits,
            at the first scheduler event; 0 for both ratios: off.
        freeze_ratio_end: fraction of the layers that are frozen at the last event.
        freeze_start: time before the first event.
        freeze_period: time between events, at least one epoch.
        freeze_late_from: time from which `freeze_late_period` applies.
        freeze_late_period: time between late events, at least one epoch.
        freeze_scores: bits over which instability is averaged: "common" (those that every layer may
            have, so that layers are comparable; if there are none, like "current") or "current"
            (those that are not frozen, as published).
        freeze_proportion: fraction of each half bin that counts as unstable.
        freeze_acts: whether the lowest activation bits of a frozen layer are masked too.
        qe_weight: final weight of the quantization-error loss; 0: off.
        qe_start: time at which that weight starts to grow.
        two_bit_weight: factor of the 2-bit term, (two_bit_decay - weight_decay) / 2 |w|^2 in the
            loss, which changes the weight decay inside the 2-bit range; 0: off.
        two_bit_decay: weight decay inside the 2-bit range.
        two_bit_count: "once" per step, however many subnets draw 2 bits, or "each" of them.
        clip_value: bound of every gradient element; 0: off.
        optimizer: optimizer of the parameters: "sgd", with Nesterov momentum, as published, or
            "adamw", for transformers.
        learning_rate: highest learning rate of the parameters, followed by a cosine.
        end_learning_rate: learning rate of the parameters at the end.
        warmup: length of the linear warm-up.
        warmup_learning_rate: learning rate at the start of the warm-up.
        rate_change: unit at which learning rates change, "step" or, as published, "epoch".
        momentum: momentum of SGD.
        weight_decay: weight decay of convolution kernels; "adamw" adds it to their updates, where
            the 2-bit term cannot cancel it.
        step_learning_rate: learning rate of Adam for step sizes, a cosine to 0.
        scale_step_gradient: whether gradients of step sizes are scaled as in LSQ.
        ema_decay: decay of the averaged copy that evaluation and search use; 0: off.
        ema_warmup: whether the average forgets faster at the beginning.
        norm_banks: whether norms are kept separately for each pair of weight and activation bits.
        unbiased_variance: whether running variances are unbiased, as in PyTorch.
    """

    random_subnets: int = 3
    subnet_loop: str = "auto"
    gradient: str = "sum"
    soft_label_weight: float = 0.5
    label_smoothing: float = 0.0
    idm_weight: float = 0.01
    idm_features: str = "norm_output"
    first_steps: str = "least_error"
    freeze_ratio_start: float = 0.5
    freeze_ratio_end: float = 0.2
    freeze_start: float = 5 / EPOCHS
    freeze_period: float = 2 / EPOCHS
    freeze_late_from: float = 0.72
    freeze_late_period: float = 15 / EPOCHS
    freeze_scores: str = "common"
    freeze_proportion: float = 0.25
    freeze_acts: bool = False
    qe_weight: float = 0.1
    qe_start: float = 40 / EPOCHS
    two_bit_weight: float = 1.0
    two_bit_decay: float = 0.0
    two_bit_count: str = "once"
    clip_value: float = 1.0
    optimizer: str = "sgd"
    learning_rate: float = 0.04
    end_learning_rate: float = 1e-5
    warmup: float = 5 / EPOCHS
    warmup_learning_rate: float = 1e-5
    rate_change: str = "step"
    momentum: float = 0.9
    weight_decay: float = 2.5e-5
    step_learning_rate: float = 1e-5
    scale_step_gradient: bool = False
    ema_decay: float = 0.9997
    ema_warmup: bool = True
    norm_banks: bool = True
    unbiased_variance: bool = False

    RANGES = {
        "random_subnets": ranges.COUNT_OR_NONE,
        "soft_label_weight": ranges.FRACTION,
        "label_smoothing": ranges.FRACTION,
        "idm_weight": ranges.NOT_NEGATIVE,
        "freeze_ratio_start": ranges.FRACTION,
        "freeze_ratio_end": ranges.FRACTION,
        "freeze_start": ranges.FRACTION,
        "freeze_period": ranges.FRACTION,
        "freeze_late_from": ranges.FRACTION,
        "freeze_late_period": ranges.FRACTION,
        "freeze_proportion": ranges.FRACTION,
        "qe_weight": ranges.NOT_NEGATIVE,
        "qe_start": ranges.FRACTION,
        "two_bit_weight": ranges.NOT_NEGATIVE,
        "two_bit_decay": ranges.NOT_NEGATIVE,
        "clip_value": ranges.NOT_NEGATIVE,
        "learning_rate": ranges.NOT_NEGATIVE,
        "end_learning_rate": ranges.NOT_NEGATIVE,
        "warmup": ranges.FRACTION,
        "warmup_learning_rate": ranges.NOT_NEGATIVE,
        "momentum": ranges.BELOW_ONE,
        "weight_decay": ranges.NOT_NEGATIVE,
        "step_learning_rate": ranges.NOT_NEGATIVE,
        "ema_decay": ranges.BELOW_ONE,
    }

    def __post_init__(self):
        """Raises ValueError, listing the valid values, for an invalid one."""
        choices = {
            "subnet_loop": LOOPS,
            "optimizer": OPTIMIZERS,
            "gradient": ("sum", "mean"),
            "idm_features": FEATURES,
            "first_steps": tuple(QUANTIZERS),
            "freeze_scores": ("common", "current"),
            "two_bit_count": ("once", "each"),
            "rate_change": ("step", "epoch"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted one of {allowed}")
        ranges.check(vars(self), self.RANGES)

    @property
    def quantizer(self) -> Quantizer:
        """Quantizer selected by the options."""
        return QUANTIZERS[self.first_steps]


def published(**changes: Any) -> Options:
    """Returns the options of the published code.

    At 150 epochs, every duration equals the published number of epochs. Differences from the
    defaults: learning rates are constant within an epoch, instability is averaged over the unfrozen
    bits, distortion is measured on the tensors that the published code has left, step sizes start
    by the three-sigma rule, the 2-bit term is added once per subnet, the average has no warm-up,
    running variances are unbiased, and frozen layers lose activation bits too (for ResNet-18; not
    in the published MobileNetV2 run).

    Args:
        **changes: options that replace the published ones.
    """
    literal = Options(
        rate_change="epoch",
        freeze_scores="current",
        idm_features="published",
        first_steps="three_sigma",
        two_bit_count="each",
        ema_warmup=False,
        freeze_acts=True,
        unbiased_variance=True,
    )
    return dataclasses.replace(literal, **changes)
