"""`mpq latency`, called in this process; no times are looked at."""

import json
import re

import numpy as np
import pytest

from mpq_jax.cli.main import main
from mpq_jax.models import make_model
from mpq_jax.supernet import costs, latency
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import bit_rules

ARGUMENTS = {
    "model": "resnet8",
    "options": '{"width": 2}',
    "num_classes": "3",
    "input": "8,8,1",
    "bits": "8,4,2",
    "rounds": "1",
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(latency, "SAMPLE_SECONDS", 0.0)


def command(out, *flags, **changes):
    options = ARGUMENTS | changes | {"out": str(out)}
    main(["latency", *(f"--{name}={value}" for name, value in options.items()), *flags])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--pairs"]])
def test_the_file_is_what_a_search_reads(tmp_path, capsys, quick, flags):
    out = tmp_path / "latency.json"
    command(out, *flags)
    model = make_model("resnet8", num_classes=3, width=2)
    table = trace_layers(model, (8, 8, 1), rules=bit_rules((8, 4, 2)))
    seconds = costs.latency_table(table, out.read_text())
    allowed = costs.allowed_pairs(table)
    uniform = np.eye(3, dtype=bool) & allowed
    np.testing.assert_array_equal(np.isfinite(seconds), allowed if flags else uniform)
    assert seconds[np.isfinite(seconds)].min() > 0
    total = costs.total(table, seconds, table.uniform(4, 4))
    content = json.loads(out.read_text())
    assert list(content["layers"]) == list(table.names)
    wanted = [f"w{w}a{a}" for w in (8, 4, 2) for a in (8, 4, 2) if flags or w == a]
    assert all(list(layer) == wanted for layer in content["layers"].values())
    by_hand = sum(
        layer["w8a8" if name in ("stem_conv", "head") else "w4a4"]
        for name, layer in content["layers"].items()
    )
    assert total == pytest.approx(by_hand)
    measured_on = content["measured_on"]
    assert measured_on["backend"] == "cpu" and measured_on["input"] == "8,8,1"
    assert measured_on["operands"]["w8a8"] == ["int8"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in table.names)
    assert "of the median at worst" in printed and f"{len(table)} layers as int8" in printed
    assert "float32 is timed" not in printed


@pytest.mark.slow
def test_a_backend_without_integers_is_said(tmp_path, capsys, quick, monkeypatch):
    multiply = latency.multiply

    def refuse(call, kernel, x):
        if x.dtype != np.float32:
            raise NotImplementedError(x.dtype.name)
        return multiply(call, kernel, x)

    monkeypatch.setattr(latency, "multiply", refuse)
    command(tmp_path / "latency.json", bits="4")
    assert "cannot multiply some of these integers: float32 is timed" in capsys.readouterr().out


@pytest.mark.parametrize(("most", "is_written"), [("0.5", False), ("0.9", True)])
def test_times_that_are_noise_are_refused(tmp_path, monkeypatch, most, is_written):
    def measure(calls, pairs, *, rounds):
        return {
            pair: latency.Timing(1e-6, 0.8 if pair == (2, 2) else 0.1, "int8") for pair in pairs
        }

    monkeypatch.setattr(latency, "measure_layer", measure)
    out = tmp_path / "latency.json"
    if is_written:
        command(out, max_spread=most)
    else:
        with pytest.raises(SystemExit, match="of the times are noise: .* at w2a2 is 80% of its"):
            command(out, max_spread=most)
    assert out.exists() == is_written


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_spread": "-1"}, "--max_spread is -1.0; wanted a number, 0 or more"),
        ({"model": "resnet9"}, "'resnet9'; known models are .*resnet8"),
        ({"options": "{width: 2}"}, "wanted arguments of resnet8 as JSON"),
        ({"options": "[2]"}, "wanted arguments of resnet8 as JSON"),
        ({"options": '{"depth": 2}'}, r"'resnet8' takes no \['depth'\]; it takes .*'width'"),
        (
            {"options": '{"width": "two"}'},
            "'resnet8': width is 'two'; wanted an integer, 1 or more",
        ),
        ({"options": '{"a":' * 10**5}, "wanted arguments of resnet8 as JSON.*nested too deeply"),
        ({"num_classes": "0"}, "--num_classes is 0; wanted at least 1"),
        ({"batch": "0"}, "--batch is 0; wanted at least 1"),
        ({"rounds": "0"}, "--rounds is 0; wanted at least 1"),
        ({"input": "8,8"}, "--input is 8,8; wanted height,width,channels"),
        ({"input": "8,0,1"}, "--input is 8,0,1; wanted"),
        ({"input": "8x8x1"}, "--input is '8x8x1'; wanted integers"),
        ({"bits": "8,1"}, "--bits is 8,1; wanted different ones from 2 to 16"),
        ({"bits": "8,17"}, "--bits is 8,17; wanted"),
        ({"bits": "4,4"}, "--bits is 4,4; wanted different ones"),
        ({"bits": ""}, "--bits is ''; wanted integers"),
        ({"model": "vgg19_bn", "options": "{}"}, "the images are 8x8 pixels"),
    ],
)
def test_nonsense_is_refused_before_anything_is_measured(tmp_path, monkeypatch, wrong, message):
    monkeypatch.setattr(latency, "measure_layer", None)
    with pytest.raises(SystemExit) as error:
        command(tmp_path / "latency.json", **wrong)
    assert str(error.value).startswith("error: ")
    assert re.search(message, str(error.value))
    assert not list(tmp_path.iterdir())


def test_the_file_must_have_a_place(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "measure_layer", None)
    for out in (tmp_path, tmp_path / "missing" / "latency.json"):
        with pytest.raises(SystemExit, match="wanted a file in a directory that exists"):
            command(out)
