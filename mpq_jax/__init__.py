"""Mixed bit-width quantization in JAX: train once, then search the bits of every layer.

    import mpq_jax as mpq

    table = mpq.trace_layers(model, (32, 32, 3), rules=mpq.bit_rules((6, 5, 4, 3, 2)))
    net = mpq.Supernet(model, table, quantizer=mpq.quantizers.lsq.QUANTIZER)
    state = net.init(variables, calibration_images)
    logits = net.apply(state, table.uniform(4, 4), images)
    found = mpq.search(net, state, images, labels, budgets=(5e6,))

Names are imported when they are first used, so the package itself imports nothing: the NumPy
reader of exported files works where JAX is not installed.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpq_jax import data, export, quantizers, reporting, search
    from mpq_jax.methods import METHODS
    from mpq_jax.methods.base import TrainingInfo
    from mpq_jax.models import MODELS, make_model
    from mpq_jax.models.pretrained import import_torch
    from mpq_jax.program.function import function
    from mpq_jax.program.network import init_variables
    from mpq_jax.search.problem import Budget, Constraint
    from mpq_jax.search.run import SearchOptions, SearchReport
    from mpq_jax.search.strategies import STRATEGIES
    from mpq_jax.supernet import costs, sensitivity
    from mpq_jax.supernet.bits import BitConfig, from_json, to_json
    from mpq_jax.supernet.layer_table import Layer, LayerTable, trace_layers
    from mpq_jax.supernet.rules import FIRST_LAST, FIRST_LAST_8BIT, Rule, bit_rules
    from mpq_jax.supernet.state import Subnet, SupernetState
    from mpq_jax.supernet.supernet import Supernet
    from mpq_jax.supernet.tied_layers import (
        tie_acts_to_weights,
        tie_matching,
        tie_shared_inputs,
    )

__all__ = [
    "FIRST_LAST",
    "FIRST_LAST_8BIT",
    "METHODS",
    "MODELS",
    "STRATEGIES",
    "BitConfig",
    "Budget",
    "Constraint",
    "Layer",
    "LayerTable",
    "Rule",
    "SearchOptions",
    "SearchReport",
    "Subnet",
    "Supernet",
    "SupernetState",
    "TrainingInfo",
    "bit_rules",
    "costs",
    "data",
    "export",
    "from_json",
    "function",
    "import_torch",
    "init_variables",
    "make_model",
    "quantizers",
    "reporting",
    "search",
    "sensitivity",
    "tie_acts_to_weights",
    "tie_matching",
    "tie_shared_inputs",
    "to_json",
    "trace_layers",
]

_HOMES = {  # module -> its public names
    "mpq_jax.methods": ("METHODS",),
    "mpq_jax.methods.base": ("TrainingInfo",),
    "mpq_jax.models": ("MODELS", "make_model"),
    "mpq_jax.models.pretrained": ("import_torch",),
    "mpq_jax.program.function": ("function",),
    "mpq_jax.program.network": ("init_variables",),
    "mpq_jax.search.problem": ("Budget", "Constraint"),
    "mpq_jax.search.run": ("SearchOptions", "SearchReport"),
    "mpq_jax.search.strategies": ("STRATEGIES",),
    "mpq_jax.supernet.bits": ("BitConfig", "from_json", "to_json"),
    "mpq_jax.supernet.layer_table": ("Layer", "LayerTable", "trace_layers"),
    "mpq_jax.supernet.rules": ("FIRST_LAST", "FIRST_LAST_8BIT", "Rule", "bit_rules"),
    "mpq_jax.supernet.state": ("Subnet", "SupernetState"),
    "mpq_jax.supernet.supernet": ("Supernet",),
    "mpq_jax.supernet.tied_layers": ("tie_acts_to_weights", "tie_matching", "tie_shared_inputs"),
}
_MODULES = {
    "costs": "mpq_jax.supernet.costs",
    "data": "mpq_jax.data",
    "export": "mpq_jax.export",
    "quantizers": "mpq_jax.quantizers",
    "reporting": "mpq_jax.reporting",
    "search": "mpq_jax.search",  # callable
    "sensitivity": "mpq_jax.supernet.sensitivity",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
