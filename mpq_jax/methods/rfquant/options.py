"""Hyperparameters of RFQuant. Durations are fractions of the run."""

import dataclasses
from typing import Any

OPTIMIZERS = ("sgd", "adamw")
LOOPS = ("auto", "calls", "unrolled", "scan")
FEATURES = ("norm_output", "post_activation", "block_output")
EPOCHS = 150  # of the published runs: k / EPOCHS gives the published epoch k at 150 epochs


@dataclasses.dataclass(frozen=True)
class Options:
    """Every element of the method; each can be switched off.

    Attributes:
        random_subnets: randomly drawn subnets per step, beside the max subnet.
        subnet_loop: how they are run: "calls" (one compiled function called again and again,
            least memory on a CPU), "unrolled", "scan", or "auto" ("calls" on a CPU, else "scan").
        gradient: "sum" over the subnets' losses as published, or their "mean" (but for the 2-bit
            term, as weight decay is not averaged).
        soft_label_weight: share of the KL to the max subnet in a random subnet's loss; 0: off.
        label_smoothing: in every cross-entropy.
        idm_weight: of information-distortion mitigation; 0: off.
        idm_features: where distortion is measured; see `terms.information_distortion`.
        freeze_ratio_start, freeze_ratio_end: share of the layers that lose their lowest bits at
            the first and the last scheduler event; both 0: off.
        freeze_start: no event before.
        freeze_period: time between events (at least an epoch) ...
        freeze_late_from, freeze_late_period: ... and from when on it is another.
        freeze_scores: bits that the instability is taken over: "common" (those that every layer
            may have, so that layers compare; if there are none, as "current") or "current" (as
            published: what is not frozen).
        freeze_proportion: part of each half bin that counts as unstable.
        freeze_acts: a frozen layer's lowest activation bits go too.
        qe_weight: final weight of the quantization-error loss; 0: off.
        qe_start: when it starts to grow.
        two_bit_weight: factor of the 2-bit term, which gives weights inside the 2-bit range
            another decay: (two_bit_decay - weight_decay) / 2 |w|^2 in the loss; 0: off.
        two_bit_decay: weight decay that they shall feel.
        two_bit_count: "once" a step however many subnets drew 2 bits, or "each" of them.
        clip_value: bound of every gradient element; 0: off.
        optimizer: of parameters: "sgd", with Nesterov momentum, as published, or "adamw", which
            transformers want.
        learning_rate, end_learning_rate: of parameters, cosine.
        warmup, warmup_learning_rate: linear warm-up.
        rate_change: "step" or, as published, "epoch": when learning rates change.
        momentum: of SGD.
        weight_decay: of convolution kernels; "adamw" adds it to their updates, where the 2-bit
            term cannot take it back.
        step_learning_rate: of Adam for the step sizes, cosine to 0.
        scale_step_gradient: LSQ's gradient scale for step sizes.
        ema_decay: of the averaged copy that evaluation and search use; 0: off.
        ema_warmup: let the average forget faster in the beginning.
        norm_banks: keep norms once per pair of (weight bits, activation bits).
    """

    random_subnets: int = 3
    subnet_loop: str = "auto"
    gradient: str = "sum"
    soft_label_weight: float = 0.5
    label_smoothing: float = 0.0
    idm_weight: float = 0.01
    idm_features: str = "norm_output"
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

    def __post_init__(self):
        """Refuses invalid values and names the valid ones."""
        choices = {
            "subnet_loop": LOOPS,
            "optimizer": OPTIMIZERS,
            "gradient": ("sum", "mean"),
            "idm_features": FEATURES,
            "freeze_scores": ("common", "current"),
            "two_bit_count": ("once", "each"),
            "rate_change": ("step", "epoch"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted one of {allowed}")
        fractions = ("soft_label_weight", "label_smoothing", "freeze_ratio_start", "ema_decay")
        fractions += ("freeze_ratio_end", "freeze_start", "freeze_period", "freeze_late_from")
        fractions += ("freeze_late_period", "freeze_proportion", "qe_start", "warmup", "momentum")
        for name in fractions:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted a number from 0 to 1")
        if self.random_subnets < 0:
            raise ValueError(f"random_subnets is {self.random_subnets}; wanted 0 or more")
        if self.clip_value < 0:
            raise ValueError(f"clip_value is {self.clip_value}; wanted a bound, or 0 for none")


def published(**changes: Any) -> Options:
    """Returns the options under which the published code runs, where it had a choice.

    At 150 epochs every duration equals the published number of epochs. These differ from the
    defaults: learning rates held during an epoch, instability over the unfrozen bits, distortion
    at the block outputs, the 2-bit term once per subnet, no warm-up of the average, and frozen
    layers losing activation bits as well (ResNet-18; not in the published MobileNetV2 run).
    """
    literal = Options(
        rate_change="epoch",
        freeze_scores="current",
        idm_features="block_output",
        two_bit_count="each",
        ema_warmup=False,
        freeze_acts=True,
    )
    return dataclasses.replace(literal, **changes)
