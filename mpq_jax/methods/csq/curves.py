"""Curves of a training run, read from its logged metrics."""

from collections.abc import Mapping, Sequence

from mpq_jax.methods.base import TrainingCurves

PLANES = "planes/"  # prefix of the metrics that count the planes of a layer
MEAN_PLANES = "mean_planes_by_layer"  # logged at the end of each epoch only


def training_curves(
    names: Sequence[str], entries: Sequence[Mapping[str, float | int]]
) -> TrainingCurves:
    """Collects the planes of every layer, their means, and the fraction of undecided gates.

    Args:
        names: names of the layers in order; those without planes are left out.
        entries: logged metrics in order.
    """
    epochs = [entry for entry in entries if MEAN_PLANES in entry]
    with_planes = [name for name in names if epochs and PLANES + name in epochs[0]]

    def curve(key: str, scale: float = 1.0) -> list[float]:
        return [scale * entry[key] for entry in epochs]

    return TrainingCurves(
        layers={name: curve(PLANES + name) for name in with_planes},
        label="planes",
        panels={
            "planes": {f"mean by {by}": curve(f"mean_planes_by_{by}") for by in ("layer", "param")},
            "% of gates": {
                f"undecided {kind}": curve(f"undecided_{kind}", 100.0) for kind in ("masks", "bits")
            },
        },
    )
