"""The course of a training run, taken from its logged metrics."""

from collections.abc import Mapping, Sequence

from mpq_jax.methods.base import TrainingCurves

PLANES = "planes/"  # begins the names of metrics that count the planes of a layer
MEAN_PLANES = "mean_planes_by_layer"  # only logged at the end of an epoch


def training_curves(names: Sequence[str], entries: Sequence[Mapping[str, float]]) -> TrainingCurves:
    """Returns the planes of every layer, their means, and the share of undecided gates.

    Args:
        names: the layers in order; those without planes are left out.
        entries: logged metrics, in order.
    """
    epochs = [entry for entry in entries if MEAN_PLANES in entry]
    grown = [name for name in names if epochs and PLANES + name in epochs[0]]

    def curve(key: str, scale: float = 1.0) -> list[float]:
        return [scale * entry[key] for entry in epochs]

    return TrainingCurves(
        layers={name: curve(PLANES + name) for name in grown},
        label="planes",
        panels={
            "planes": {f"mean by {by}": curve(f"mean_planes_by_{by}") for by in ("layer", "param")},
            "% of gates": {
                f"undecided {kind}": curve(f"undecided_{kind}", 100) for kind in ("masks", "bits")
            },
        },
    )
