import re
import struct
import subprocess
import sys

import flax.linen as nn
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from helpers.report_pages import made_report
from matplotlib.figure import Figure

from mpq_jax.reporting import plots
from mpq_jax.supernet.bits import BitConfig
from mpq_jax.supernet.layer_table import trace_layers
from mpq_jax.supernet.rules import FIRST_LAST_FLOAT, bit_rules


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        for index in range(6):
            x = nn.Conv(4, (1, 1), name=f"convolution{index}")(x)
        return nn.Dense(3, name="classifier")(x.mean((1, 2)))


TABLE = trace_layers(Net(), (4, 4, 1))
CONFIGS = {"first budget": TABLE.uniform(4, 3), "second budget": TABLE.uniform(2, 6)}


def scheme(*weights, acts=8):
    return BitConfig(jnp.array(weights, jnp.int32), jnp.full(len(weights), acts, jnp.int32))


# Of a scheme that grew: the first layer has 8 bits, the last is float, the rest have planes.
FLOAT_END = trace_layers(Net(), (4, 4, 1), rules=(FIRST_LAST_FLOAT[1], *bit_rules()))
SCHEME = {"integers": scheme(8, 5, 2, 0, 7, 3, 32), "planes": scheme(8, 3, 1, 0, 2, 2, 32)}
GROWN = TABLE.names[1:-1]
PLANES = np.array([[8, 6, 3], [8, 8, 2], [8, 1, 0], [8, 7, 5], [8, 4, 4]])  # [layers, epochs]


def curves_of(epochs=3):
    """What the plot of a training run takes: bits by layer, and panels of curves."""
    layers = {name: PLANES[i, :epochs].tolist() for i, name in enumerate(GROWN)}
    means = {"mean by layer": PLANES[:, :epochs].mean(axis=0), "mean by param": [7.0, 6.0, 5.0]}
    gates = {"undecided masks": [50.0, 25.0, 12.5], "undecided bits": [25.0, 12.5, 6.25]}
    cut = {
        label: {name: list(values)[:epochs] for name, values in curves.items()}
        for label, curves in {"planes": means, "% of gates": gates}.items()
    }
    return layers, cut


def draw(kind, path):
    if kind == "frontier":
        plots.plot_frontier(made_report(), path=path)
    elif kind == "bits":
        plots.plot_bits(TABLE, CONFIGS, path=path)
    elif kind == "scheme":
        plots.plot_weight_bits(FLOAT_END, SCHEME, path=path)
    else:
        plots.plot_bits_over_training(*curves_of(), label="planes", path=path)


@pytest.mark.parametrize("kind", ["frontier", "bits", "scheme", "growth"])
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


@pytest.mark.slow_but_first
@pytest.mark.parametrize("kind", ["frontier", "bits", "scheme", "growth"])
def test_the_ending_of_the_path_decides_and_equal_plots_are_equal_svgs(tmp_path, kind):
    paths = [tmp_path / "one.svg", tmp_path / "other.svg"]
    for path in paths:
        draw(kind, path)
    one, other = (path.read_bytes() for path in paths)
    assert one == other and b"<svg" in one and b"<dc:date>" not in one


def test_the_plot_of_bits_names_every_layer_and_configuration(tmp_path):
    found = texts("bits", tmp_path)
    assert set(TABLE.names) <= set(found)
    assert set(CONFIGS) <= set(found)
    assert {"weights", "activations", "bits"} <= set(found)


def test_the_frontier_names_every_result_and_its_axes(tmp_path):
    found = texts("frontier", tmp_path)
    assert {one.name for one in made_report().configs} <= set(found)
    assert {"float 93.75 %", "cost (kBitOPs)", "test accuracy (%)"} <= set(found)
    assert {"searched", "uniform bits"} <= set(found)


@pytest.mark.parametrize("configs", [(), made_report().configs[:1], made_report().configs[-1:]])
def test_the_frontier_does_with_part_of_the_results(tmp_path, configs):
    plots.plot_frontier(made_report(configs=configs), path=tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_without_test_images_the_frontier_is_one_of_validation_accuracies(figures, tmp_path):
    configs = tuple(one._replace(test=None) for one in made_report().configs)
    plots.plot_frontier(made_report(configs=configs), path=tmp_path / "plot.png")
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "validation accuracy (%)"
    assert set(axes.get_lines()[0].get_ydata()) == {75.0}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, which are not written."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **how: drawn.append(figure))
    return drawn


def test_the_plot_of_a_scheme_names_every_layer_and_way_of_counting(tmp_path):
    found = texts("scheme", tmp_path)
    assert set(FLOAT_END.names) <= set(found)
    assert {"integers", "planes", "bits of the weights"} <= set(found)


def test_the_plot_of_a_scheme_has_a_bar_for_each_number_of_bits(figures, tmp_path):
    draw("scheme", tmp_path / "plot.png")
    (axes,) = figures[0].axes
    solid = [bar for bar in axes.patches if bar.get_hatch() is None]
    (hatched,) = [bar for bar in axes.patches if bar.get_hatch()]
    heights = np.reshape([bar.get_height() for bar in solid], (2, len(FLOAT_END)))
    for counted, bits in zip(heights, SCHEME.values(), strict=True):
        np.testing.assert_array_equal(counted[:-1], bits.weights[:-1])
    assert heights[:, -1].tolist() == [0, 0]  # float
    center = hatched.get_x() + hatched.get_width() / 2
    assert round(center) == len(FLOAT_END) - 1 and hatched.get_height() == 8
    assert axes.get_yticks().tolist() == list(range(9))  # up to 8, not 32


def test_a_scheme_without_any_plane_is_drawn(tmp_path):
    nothing = scheme(0, 0, 0, 0, 0, 0, 32)
    plots.plot_weight_bits(FLOAT_END, {"planes": nothing}, path=tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_the_plot_of_a_training_run_names_its_layers_and_curves(tmp_path):
    found = texts("growth", tmp_path)
    assert set(found) & set(TABLE.names) == set(GROWN)
    assert {"planes", "mean by layer", "mean by param", "% of gates", "epoch"} <= set(found)
    assert {"undecided masks", "undecided bits"} <= set(found)


def curves(axes):
    """Returns the y values of every line by its label; the x values must be the epochs."""
    lines = axes.get_lines()
    for line in lines:
        assert line.get_xdata().tolist() == list(range(1, len(line.get_xdata()) + 1))
    return {line.get_label(): np.asarray(line.get_ydata()) for line in lines}


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_plot_of_a_training_run_shows_bits_and_curves_of_every_epoch(figures, tmp_path, epochs):
    given = curves_of(epochs)
    plots.plot_bits_over_training(*given, label="planes", path=tmp_path / "plot.png")
    layers, means, gates = figures[0].axes[:3]
    (image,) = layers.images
    np.testing.assert_array_equal(image.get_array(), PLANES[:, :epochs])
    assert list(image.get_extent()) == [0.5, epochs + 0.5, len(GROWN) - 0.5, -0.5]
    for axes, wanted in ((means, given[1]["planes"]), (gates, given[1]["% of gates"])):
        shown = curves(axes)
        assert list(shown) == list(wanted)
        for name, values in wanted.items():
            np.testing.assert_array_equal(shown[name], values)


def test_a_training_run_without_an_epoch_is_drawn(tmp_path):
    panels = {"planes": {"mean by layer": []}}
    plots.plot_bits_over_training({}, panels, label="planes", path=tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.slow
def test_importing_the_library_leaves_the_users_plots_alone():
    code = (
        "import matplotlib; matplotlib.use('svg'); import mpq_jax.reporting.plots; "
        "assert matplotlib.get_backend() == 'svg', matplotlib.get_backend()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
