"""Export to StableHLO: a program with integer kernels that runs wherever JAX does.

    pathlib.Path("net.stablehlo").write_bytes(to_stablehlo(exported))

The content is what `jax.export` serializes, so it runs without this library:

    import jax.export
    network = jax.export.deserialize(pathlib.Path("net.stablehlo").read_bytes())
    logits = network.call(images)  # float32 [any batch, height, width, channels], normalized

Kernels are constants of 4, 8 or 16 bits, converted to floats while the program runs; inputs of
layers are quantized as in training. JAX promises to read such files for six months after they were
written, and to run them on the platforms that they were written for. Behind the program stands a
line of JSON, which JAX does not read: facts about the network, and a checksum.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from mpq_jax.export import checksum, exported_model, program, safetensors_file
from mpq_jax.export.exported_model import ExportedModel, QuantizedLayer
from mpq_jax.supernet import bits as bit_configs

FORMAT, VERSION = "mpq_jax.stablehlo", 1
PLATFORMS = ("cpu", "cuda", "tpu")
INTEGER_TYPES = {4: jnp.int4, 8: jnp.int8, 16: jnp.int16}  # by bits


def to_stablehlo(exported: ExportedModel, *, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """Writes a network as a StableHLO program of normalized images.

    Args:
        exported: the network.
        platforms: platforms to run on, by JAX's names.

    Raises:
        ValueError: the network cannot be exported, see `exported_model.check`.
    """
    subnet = exported_model.select(exported)
    net, layers = exported.net, exported_model.quantized_layers(exported)
    integers = {layer.name: _stored(layer) for layer in layers if layer.integers is not None}

    def call(_: Any, images: jax.Array) -> jax.Array:
        kernels = {
            layer.name: (
                _value(integers[layer.name], layer.step_size)
                if layer.name in integers
                else jnp.asarray(layer.kernel)
            )
            for layer in layers
        }
        whole = program.with_kernels(net, subnet, kernels)
        return net.forward(whole, images, train=False).logits

    images = program.any_batch(exported)
    any_batch = program.for_any_batch(call, (), images)

    def logits(images: jax.Array) -> jax.Array:
        return any_batch((), images)

    with _without_paths():
        serialized = jax.export.export(jax.jit(logits), platforms=tuple(platforms))(images)
        content = bytes(serialized.serialize())
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": checksum.PLACEHOLDER,
        "bits": bit_configs.to_json(exported_model.config_of(exported), exported.table.names),
        "mean": exported.mean,
        "std": exported.std,
        "layouts": exported.layouts,
        "provenance": exported.provenance,
    }
    return checksum.with_checksum(content + b"\n" + json.dumps(facts).encode())


def write(path: pathlib.Path, exported: ExportedModel) -> None:
    """Writes a network as a file; it appears at once or not at all."""
    safetensors_file.write_whole(path, to_stablehlo(exported))


def open_file(path: pathlib.Path) -> Callable[[np.ndarray], np.ndarray]:
    """Opens a file; returns `run(normalized images) -> logits`."""
    content = path.read_bytes()
    facts_of(path, content)
    try:
        network = jax.export.deserialize(bytearray(content))
        network.mlir_module()
    except Exception as error:  # of many kinds, according to the damage
        raise ValueError(
            f"{path} is no program that JAX {jax.__version__} can read; it may be written by a "
            f"JAX that is too old or too new: {error}"
        ) from error
    call = jax.jit(network.call)
    return lambda images: np.asarray(call(images))


def facts_of(path: pathlib.Path, content: bytes) -> dict[str, Any]:
    """Reads the facts behind the program of a file.

    Raises:
        ValueError: the file is damaged, of another kind or of another version.
    """
    has_checksum = checksum.check(path, content)
    try:
        facts = json.loads(content[content.rindex(b"\n{") :])
    except ValueError:
        facts = {}
    if not has_checksum or facts.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no StableHLO program of mpq_jax, or was cut off: the line of facts at its "
            "end is missing. Write it or copy it again"
        )
    if facts["version"] != VERSION:
        raise ValueError(
            f"{path} has version {facts['version']} of the format; this library reads version "
            f"{VERSION}. Write it anew by `mpq export`, or update mpq_jax for a newer version"
        )
    return facts


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """Leaves out the folders of source files, which would tell about the writing machine."""
    settings = {
        "jax_hlo_source_file_canonicalization_regex": ".*/",
        "jax_include_full_tracebacks_in_locations": False,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _stored(layer: QuantizedLayer) -> jax.Array:
    assert layer.integers is not None
    room = min(bits for bits in INTEGER_TYPES if bits >= layer.bits)
    return jnp.asarray(layer.integers, jnp.int32).astype(INTEGER_TYPES[room])


def _value(stored: jax.Array, step_size: Any) -> jax.Array:
    """Computes the kernel; the barrier keeps compilers from folding it into a float constant."""
    return jax.lax.optimization_barrier(stored).astype(jnp.float32) * step_size
