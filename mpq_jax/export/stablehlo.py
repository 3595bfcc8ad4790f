"""Export to StableHLO: a program with integer kernels that runs wherever JAX does.

    pathlib.Path("net.stablehlo").write_bytes(to_stablehlo(deployed))

What it writes is what `jax.export` serializes, so it runs without this library:

    import jax.export
    network = jax.export.deserialize(pathlib.Path("net.stablehlo").read_bytes())
    logits = network.call(images)  # float32 [any batch, height, width, channels], normalized

Kernels are constants of 4, 8 or 16 bits, made into floats while the program runs; inputs of layers
are quantized as in training. JAX promises to read such files for six months after they were
written, and to run them on the platforms that they were written for alone. Behind the program
stands a line of JSON, which JAX does not read: what the file holds, and a checksum.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from mpq_jax.export import checksum, program
from mpq_jax.export import exported_model as deployed_networks
from mpq_jax.export.exported_model import Deployed, LayerCodes
from mpq_jax.supernet import bits as bit_configs

FORMAT = "mpq_jax.stablehlo"
VERSION = 1
PLATFORMS = ("cpu", "cuda", "tpu")
CODE_TYPES = {4: jnp.int4, 8: jnp.int8, 16: jnp.int16}  # by the bits that they have room for


def to_stablehlo(deployed: Deployed, *, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """Writes a network as a StableHLO program of normalized images.

    Args:
        deployed: the network.
        platforms: where it is to run, as JAX names them.

    Raises:
        ValueError: the network has no integers, see `deployed.codes`.
    """
    chosen = deployed_networks.selected(deployed)
    variables = program.flat_variables(chosen)
    codes = {
        f"params/{layer.name}/kernel": (_stored(layer), layer.step)
        for layer in deployed_networks.codes(deployed)
        if layer.codes is not None
    }
    floats = {name: value for name, value in variables.items() if name not in codes}

    def call(_: Any, images: jax.Array) -> jax.Array:
        values = {name: _value(stored, step) for name, (stored, step) in codes.items()}
        return program.forward(
            deployed, chosen, floats | values, images, quantizer=deployed.quantizer
        )

    images = program.any_batch(deployed)
    any_batch = program.for_any_batch(call, (), images)

    def logits(images: jax.Array) -> jax.Array:
        return any_batch((), images)

    with _without_paths():
        exported = jax.export.export(jax.jit(logits), platforms=tuple(platforms))(images)
        written = bytes(exported.serialize())
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "checksum": checksum.SEAL,
        "bits": bit_configs.to_json(deployed.bits, deployed.table.names),
        "mean": deployed.mean,
        "std": deployed.std,
        "provenance": deployed.provenance,
    }
    return checksum.sealed(written + b"\n" + json.dumps(facts).encode())


def facts_of(path: pathlib.Path, content: bytes) -> dict[str, Any]:
    """Returns what stands behind the program of a file.

    Raises:
        ValueError: the file is damaged, of another kind or of another version.
    """
    is_sealed = checksum.check(path, content)
    try:
        facts = json.loads(content[content.rindex(b"\n{") :])
    except ValueError:
        facts = {}
    if not is_sealed or facts.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no StableHLO program of mpq_jax, or was cut off: the line that should "
            "stand at its end is not there; copy or write it again"
        )
    if facts["version"] != VERSION:
        raise ValueError(
            f"{path} has version {facts['version']} of the format, this library reads version "
            f"{VERSION}; update mpq_jax"
        )
    return facts


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """Leaves the folders of source files, which would say where on a machine it was, out."""
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


def _stored(layer: LayerCodes) -> jax.Array:
    assert layer.codes is not None
    room = min(bits for bits in CODE_TYPES if bits >= layer.bits)
    return jnp.asarray(layer.codes, jnp.int32).astype(CODE_TYPES[room])


def _value(stored: jax.Array, step: Any) -> jax.Array:
    """Returns the kernel; behind the barrier no compiler makes a float constant of it."""
    return jax.lax.optimization_barrier(stored).astype(jnp.float32) * step
