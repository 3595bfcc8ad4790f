"""Training methods as records of pure functions; `METHODS` lists them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mpq_jax.methods import csq, double_rounding, float_training, rfquant
from mpq_jax.methods.base import Method, MethodFamily

METHODS: dict[str, MethodFamily] = {
    "plain": float_training.FAMILY,
    "rfquant": rfquant.FAMILY,
    "double_rounding": double_rounding.FAMILY,
    "double_rounding_mixed": double_rounding.MIXED_FAMILY,
    "csq": csq.FAMILY,
    "csq_uniform": csq.UNIFORM_FAMILY,
}

__all__ = ["METHODS", "Method", "MethodFamily", "make_options", "own_options", "variants"]


def variants(method: str) -> dict[str, str]:
    """Lists the variants of a method: {name of the variant: key of `METHODS`}."""
    others = {name: family.variant for name, family in METHODS.items()}
    return {
        variant.name: name for name, variant in others.items() if variant and variant.of == method
    }


def own_options(method: str) -> dict[str, Any]:
    """Returns the defaults of a method's own options, without those derived from another method."""
    family = METHODS[method]
    derived: Mapping[str, Any] = {}
    if family.variant:
        derived = family.variant.derive(METHODS[family.variant.of].options())
    names = {field.name for field in dataclasses.fields(family.options)} - set(derived)
    defaults = dataclasses.asdict(family.options(**derived))
    return {name: value for name, value in defaults.items() if name in names}


def make_options(method: str, groups: Any) -> Any:
    """Makes the options of a method.

    Args:
        method: a key of `METHODS`.
        groups: option values by method, such as a config; at least those of this method and, for a
            variant, of the method from which it derives options.

    Raises:
        ValueError: a value is invalid.
    """
    family, own = METHODS[method], dict(groups.get(method, {}))
    if family.variant is None:
        return family.options(**own)
    base = make_options(family.variant.of, groups)
    return family.options(**(family.variant.derive(base) | own))
