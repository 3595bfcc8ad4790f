"""The names that `import mpq_jax as mpq` offers."""

import ast
import pathlib
import subprocess
import sys

import pytest

import mpq_jax as mpq

HEAVY = (
    "onnx",
    "onnxruntime",
    "tensorflow_datasets",
    "grain",
    "sklearn",
    "jinja2",
    "matplotlib",
    "tensorboardX",
)
PROMISES = {
    "quantizers.lsq": ("fake_quant", "codes", "init_weight_step", "init_act_step"),
    "quantizers.double_rounding": ("fake_quant", "codes", "switch"),
    "quantizers.bit_planes": ("from_float", "weights", "hard_weights", "codes", "active_planes"),
    "costs": ("bitops", "model_bytes", "mean_bits"),
    "sensitivity": ("instability", "hessian_trace"),
    "Supernet": ("init", "sample", "select", "apply", "predict", "recalibrate", "score"),
    "export": ("save",),
}


@pytest.mark.parametrize("name", mpq.__all__)
def test_every_public_name_exists_and_is_documented(name):
    value = getattr(mpq, name)
    documented = isinstance(value, dict | tuple) or (value.__doc__ or "").strip()
    assert documented and name in dir(mpq)


def test_static_and_lazy_names_are_the_same():
    tree = ast.parse(pathlib.Path(mpq.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    static = {alias.name for node in block.body for alias in node.names}
    assert sorted(static) == sorted(mpq.__all__)


@pytest.mark.parametrize("place", PROMISES)
def test_promised_attributes_exist(place):
    holder = mpq
    for part in place.split("."):
        holder = getattr(holder, part)
    assert [name for name in PROMISES[place] if not callable(getattr(holder, name, None))] == []


def test_search_is_a_function_and_a_package():
    import mpq_jax.search.greedy

    assert callable(mpq.search) and mpq.search.greedy is mpq_jax.search.greedy


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        mpq.serach  # noqa: B018


@pytest.mark.slow
def test_public_names_import_no_optional_package():
    code = f"""
import sys, mpq_jax as mpq
for name in mpq.__all__: getattr(mpq, name)
print([name for name in {HEAVY} if name in sys.modules])
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert process.stdout.strip() == "[]"
