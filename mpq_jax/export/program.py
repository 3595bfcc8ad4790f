"""One network as a traced program, for a batch of any size; what exports to graphs begin with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mpq_jax.export import exported_model as deployed_networks
from mpq_jax.export.exported_model import Deployed, LayerCodes
from mpq_jax.program import paths
from mpq_jax.quantizers.base import ActQuantizer
from mpq_jax.supernet import supernet

BATCH = "batch"  # name of the size that may vary
MARK = "mpq_jax_input:"  # begins the name of the place where a layer's input is quantized
TRIED = 8  # images with which it is tried whether a model computes each image alone
ROUNDING = 1e-3  # part of an image's largest logit that rounding may move one by


class InputCodes(NamedTuple):
    """How the input of a layer is quantized: codes of LSQ, `round(clip(x / step))`.

    Attributes:
        step: width of a code.
        bits: of the codes.
        signed: two's complement, or natural binary.
    """

    step: np.float32
    bits: int
    signed: bool


class Program(NamedTuple):
    """A network in evaluation mode as a jaxpr.

    Attributes:
        jaxpr: its last argument are the images, the others the model's variables.
        arguments: path and value of each variable, in the order of the arguments. Kernels are
            float here as well; `layers` has the integers.
        layers: by path of the layer.
        inputs: what the equations named `MARK` + index do.
        images: shape of the last argument; its first size may vary.
    """

    jaxpr: Any
    arguments: list[tuple[str, np.ndarray]]
    layers: dict[str, LayerCodes]
    inputs: list[InputCodes]
    images: tuple[Any, ...]


def trace(deployed: Deployed) -> Program:
    """Traces the network; where an input is quantized stands a mark instead of the arithmetic.

    Raises:
        ValueError: the network has no integers, see `deployed.codes`.
    """
    layers = deployed_networks.codes(deployed)
    chosen = jax.device_get(deployed_networks.selected(deployed))  # NumPy: the marks read values
    inputs: list[InputCodes] = []

    def mark(x, step_size, bits, *, signed, grad_scale):
        del grad_scale
        inputs.append(InputCodes(np.float32(step_size), int(bits), bool(signed)))
        return checkpoint_name(x, f"{MARK}{len(inputs) - 1}")

    acts = deployed.quantizer.acts
    quantizer = deployed.quantizer._replace(acts=ActQuantizer(mark, acts.codes, acts.init_step))

    def logits(variables: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        return forward(deployed, chosen, variables, images, quantizer=quantizer)

    variables = flat_variables(chosen)
    images = any_batch(deployed)
    call = for_any_batch(logits, variables, images)
    jaxpr = jax.make_jaxpr(call)(variables, images)
    return Program(
        jaxpr=jaxpr,
        arguments=sorted(variables.items()),
        layers={layer.name: layer for layer in layers},
        inputs=inputs,
        images=images.shape,
    )


def flat_variables(chosen: supernet.Subnet) -> dict[str, Any]:
    """Returns parameters and statistics of a subnet by path, `params/conv/kernel`."""
    return paths.flatten({"params": chosen.params, "batch_stats": chosen.batch_stats})


def forward(
    deployed: Deployed,
    chosen: supernet.Subnet,
    variables: dict[str, Any],
    images: jax.Array,
    *,
    quantizer: Any,
) -> jax.Array:
    """Returns the logits of a subnet with other variables, given as by `flat_variables`."""
    trees = {"params": {}, "batch_stats": {}} | paths.unflatten(variables)
    chosen = chosen._replace(params=trees["params"], batch_stats=trees["batch_stats"])
    return supernet.apply(
        deployed.model, deployed.table, chosen, images, train=False, quantizer=quantizer
    ).logits


def any_batch(deployed: Deployed) -> jax.ShapeDtypeStruct:
    """Returns images of which the number is left open."""
    (batch,) = jax.export.symbolic_shape(BATCH)
    return jax.ShapeDtypeStruct((batch, *deployed.image_shape), jnp.float32)


def for_any_batch(call: Callable, variables: Any, images: jax.ShapeDtypeStruct) -> Callable:
    """Returns `call(variables, images)` in a form that can be traced for any number of images.

    That is the call itself, unless the model needs the number (`len(x)`, `int(x.shape[0])`); then
    it is called with one image, mapped over the batch, which gives the same logits where a model
    computes each image alone.

    Raises:
        ValueError: the model needs the number and computes with several images at once.
    """
    try:
        jax.eval_shape(call, variables, images)
    except Exception as error:  # of many kinds, according to what the model does with the number
        alone = jax.vmap(lambda variables, image: call(variables, image[None])[0], (None, 0))
        try:
            jax.eval_shape(alone, variables, images)
        except Exception:
            raise error from None
        _check_alone(call, alone, variables, images)
        return alone
    return call


def _check_alone(
    call: Callable, alone: Callable, variables: Any, images: jax.ShapeDtypeStruct
) -> None:
    """Raises ValueError where images together give other logits than each of them alone.

    A few of them may, where rounding takes an input of a layer to another code.
    """
    drawn = jax.random.normal(jax.random.key(0), (TRIED, *images.shape[1:]), images.dtype)
    together, apart = (np.asarray(jax.jit(one)(variables, drawn)) for one in (call, alone))
    agree = together.shape == apart.shape
    if agree:
        scale = np.abs(np.where(np.isfinite(together), together, 0)).max(-1, keepdims=True)
        near = np.isclose(together, apart, rtol=0, atol=ROUNDING * scale, equal_nan=True)
        agree = 2 * near.all(-1).sum() >= len(drawn)
    if not agree:
        raise ValueError(
            "the model needs the number of images (as len(x) or int(x.shape[0])) and computes with "
            "several images at once, statistics of a batch for instance, so no program of any "
            "number of images is made of it: write -1 for the number (reshape), or compute each "
            "image alone"
        )
