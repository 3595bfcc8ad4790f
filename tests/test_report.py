import re
import struct
import subprocess
import sys

import flax.linen as nn
import matplotlib
import pytest

from mpq_jax import report
from mpq_jax.layer_table import trace_layers
from mpq_jax.report import Row


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for index in range(6):
            x = nn.Conv(4, (1, 1), name=f"convolution{index}")(x)
        return nn.Dense(3, name="classifier")(x.mean((1, 2)))


TABLE = trace_layers(Net(), (4, 4, 1))
ROWS = [
    Row("float", "float", 0.9125, None),
    Row("uniform 4", "uniform", 0.87, 40.0),
    Row("uniform 2", "uniform", 0.55, 10.0),
    Row("budget A", "searched", 0.89, 39.0),
    Row("budget B", "searched", 0.71, 11.0),
]
CONFIGS = {"first budget": TABLE.uniform(4, 3), "second budget": TABLE.uniform(2, 6)}


def draw(kind, path):
    if kind == "frontier":
        report.plot_frontier(ROWS, cost_label="GBitOPs per image", path=path)
    else:
        report.plot_bits(TABLE, CONFIGS, path=path)


@pytest.mark.parametrize("kind", ["frontier", "bits"])
def test_plots_are_images_of_a_sane_size(tmp_path, kind):
    path = tmp_path / "plot.png"
    draw(kind, path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 600 <= width <= 3000 and 400 <= height <= 2000
    assert len(data) > 10_000  # a blank sheet of this size takes less


def texts(kind, tmp_path):
    path = tmp_path / "plot.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(kind, path)
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_the_plot_of_bits_names_every_layer_and_configuration(tmp_path):
    found = texts("bits", tmp_path)
    assert set(TABLE.names) <= set(found)
    assert set(CONFIGS) <= set(found)
    assert {"weights", "activations", "bits"} <= set(found)


def test_the_frontier_names_every_result_and_its_axes(tmp_path):
    found = texts("frontier", tmp_path)
    assert {row.name for row in ROWS[1:]} <= set(found)
    assert {"float 91.25 %", "GBitOPs per image", "searched", "uniform bits"} <= set(found)


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[1:3], ROWS[3:4]])
def test_the_frontier_does_with_part_of_the_results(tmp_path, rows):
    report.plot_frontier(rows, cost_label="bytes", path=tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_importing_the_library_leaves_the_users_plots_alone():
    code = (
        "import matplotlib; matplotlib.use('svg'); import mpq_jax.report; "
        "assert matplotlib.get_backend() == 'svg', matplotlib.get_backend()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
