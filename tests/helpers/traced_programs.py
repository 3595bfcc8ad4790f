"""Traces small models into programs, for the tests of `mpq_jax.program`."""

import jax
import numpy as np

from mpq_jax.program.evaluate import evaluate
from mpq_jax.program.function import function
from mpq_jax.program.layers import find_layers, shapes_of, variable_shapes
from mpq_jax.program.network import as_network, batch_size
from mpq_jax.program.trace import trace


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def ones(*shape):
    return np.ones(shape, np.float32)


def trace_model(model, inputs, *, train=False, **options):
    """Traces a module or a function with its variables at the shapes of its inputs."""
    network = as_network(model)
    return trace(network, shapes_of(network, inputs), inputs, train=train, **options)


def trace_function(apply, variables, *inputs):
    """Traces `apply(variables, *inputs)`."""
    return trace_model(function(apply, variables), inputs)


def sites_of(apply, variables, *inputs):
    """Finds the products of `apply(variables, *inputs)`."""
    return trace_function(apply, variables, *inputs).sites


def layers_of(model, inputs):
    """Lists the layers of a model."""
    shapes = variable_shapes(shapes_of(as_network(model), inputs))
    return find_layers(trace_model(model, inputs), shapes, batch_size(inputs))


def run(program, variables, inputs, *, changes=None, arrays=None, records=None):
    """Evaluates a program; returns its results in their structure, and the records."""
    leaves = jax.tree.leaves((variables, inputs))
    changes, arrays, records = changes or {}, arrays or {}, records or {}
    results, found = evaluate(program.jaxpr, leaves, changes, arrays, records)
    return jax.tree.unflatten(program.out_tree, results), found
