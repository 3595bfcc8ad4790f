"""Export to StableHLO: a program with integer kernels that runs wherever JAX does.

    pathlib.Path("net.stablehlo").write_bytes(to_stablehlo(exported))

The content is what `jax.export` serializes, so it runs without this library:

    import jax.export
    network = jax.export.deserialize(pathlib.Path("net.stablehlo").read_bytes())
    outputs = network.call(inputs)  # such as normalized images [any batch, height, width, channels]

Inputs and outputs are pytrees of arrays, as the model takes and returns them; a tuple of inputs
holds several arguments of the model.

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

from mpq_jax.checks import strict_json
from mpq_jax.export import checksum, exported_model, program, safetensors_file, signature
from mpq_jax.export.exported_model import ExportedModel, QuantizedLayer
from mpq_jax.supernet import bits as bit_configs

FORMAT, VERSION = "mpq_jax.stablehlo", 1
PLATFORMS = ("cpu", "cuda", "tpu")
INTEGER_TYPES = {4: jnp.int4, 8: jnp.int8, 16: jnp.int16}  # by bits


def to_stablehlo(exported: ExportedModel, *, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """Writes a network as a StableHLO program of its inputs, for any batch size.

    Args:
        exported: the network.
        platforms: platforms to run on, by JAX's names.

    Raises:
        ValueError: the network cannot be exported, see `exported_model.check`, or its inputs or
            outputs hold containers that JAX cannot write.
    """
    subnet = exported_model.select(exported)
    net, layers = exported.net, exported_model.quantized_layers(exported)
    integers = {layer.name: _stored(layer) for layer in layers if layer.integers is not None}

    def call(_: Any, batch: Any) -> Any:
        kernels = {
            layer.name: (
                _value(integers[layer.name], layer.step_size)
                if layer.name in integers
                else jnp.asarray(layer.kernel)
            )
            for layer in layers
        }
        whole = program.with_kernels(net, subnet, kernels)
        return net.forward(whole, batch, train=False).logits

    batch = program.any_batch(exported)
    any_batch = program.for_any_batch(call, (), batch)

    def forward(batch: Any) -> Any:
        return any_batch((), batch)

    with _without_paths():
        written = jax.export.export(jax.jit(forward), platforms=tuple(platforms))(batch)
        content = _serialized(written)
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


def open_file(path: pathlib.Path) -> Callable[[Any], Any]:
    """Opens a file; returns `run(inputs) -> outputs`, with the outputs as NumPy arrays."""
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
    (batch,), _ = network.in_tree.unflatten(network.in_avals)
    wanted = signature.to_json(batch)

    def run(batch: Any) -> Any:
        signature.check(wanted, batch)
        return jax.tree.map(np.asarray, call(batch))

    return run


def facts_of(path: pathlib.Path, content: bytes) -> dict[str, Any]:
    """Reads the facts behind the program of a file.

    Raises:
        ValueError: the file is damaged, of another kind or of another version.
    """
    has_checksum = checksum.check(path, content)
    try:
        facts = strict_json.parse(content[content.rindex(b"\n{") :])
    except ValueError:
        facts = {}
    if not has_checksum or facts.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no StableHLO program of mpq_jax, or was cut off: the line of facts at its "
            "end is missing. Write it or copy it again"
        )
    if facts.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {facts.get('version')} of the format; this library reads version "
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


def _serialized(written: jax.export.Exported) -> bytes:
    try:
        return bytes(written.serialize())
    except ValueError as error:
        if "unregistered type" not in str(error):
            raise
        raise ValueError(
            "the inputs or outputs of the model hold a container that JAX cannot write: use dicts, "
            "tuples and lists, or register its type by "
            "jax.export.register_namedtuple_serialization(TYPE, serialized_name=NAME) before the "
            f"file is written and before it is read. JAX says: {error}"
        ) from error


def _stored(layer: QuantizedLayer) -> jax.Array:
    assert layer.integers is not None
    room = min(bits for bits in INTEGER_TYPES if bits >= layer.bits)
    return jnp.asarray(layer.integers, jnp.int32).astype(INTEGER_TYPES[room])


def _value(stored: jax.Array, step_size: Any) -> jax.Array:
    """Computes the kernel; the barrier keeps compilers from folding it into a float constant."""
    return jax.lax.optimization_barrier(stored).astype(jnp.float32) * step_size
