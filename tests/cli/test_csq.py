"""CSQ with both programs: the scheme that training finds, and the baseline with a uniform one."""

import csv
import re
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from helpers.program_results import (
    PNG,
    as_run,
    assert_same_curve,
    make_table,
    read_bits,
    run_two_processes,
)
from helpers.programs import (
    EPOCH_STEPS,
    PATIENCE,
    WIDTH,
    call,
    entries,
    last_arrays,
    losses,
    run,
    saved_steps,
    start,
    wait_for,
)

from mpq_jax.cli import main, search
from mpq_jax.configs.csq import digits as csq_digits
from mpq_jax.export.packed import network
from mpq_jax.supernet.layer_table import LayerTable
from mpq_jax.training import checkpoints

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table():
    return make_table()


CSQ = "--config=configs/csq/digits.py"
TARGET, MOST_PLANES = 3.0, 8
BY = ("layer", "param")  # what a mean of planes is over
TEMPERATURE = 50.0  # at the end of each rise
CSQ_EPOCHS, CSQ_STEPS = 5, 5 * EPOCH_STEPS
TICKET, HARDEN = 2 * EPOCH_STEPS, 4 * EPOCH_STEPS  # steps at which scheme and bits are fixed
GROWN = (
    CSQ,
    WIDTH,
    f"--config.epochs={CSQ_EPOCHS}",
    f"--config.csq.freeze_scheme={TICKET / CSQ_STEPS}",
    f"--config.csq.binarize={HARDEN / CSQ_STEPS}",
    "--config.csq.rewind=True",
    f"--config.csq.temperature={TEMPERATURE}",
    f"--config.csq.target={TARGET}",
    "--config.csq.budget_weight=0.1",  # masks must close within 34 steps, but not all of them
    "--config.csq.mask_start=1.0",
    "--config.csq.mask_learning_rate=1.0",
    "--config.csq.budget_anneal=0.0",
    "--config.csq.act_bits=4",
    "--config.log_every=1",
)
UNIFORM = (f"{CSQ}:uniform", WIDTH, "--config.epochs=1")


class Grown(NamedTuple):
    """A network whose scheme grew, and one with a uniform scheme, both from the float run.

    Attributes:
        workdir, output: of GROWN.
        flags: all flags of it but the workdir's.
        uniform, uniform_output: of UNIFORM.
    """

    workdir: Path
    output: str
    flags: tuple[str, ...]
    uniform: Path
    uniform_output: str

    @property
    def summaries(self) -> list[dict[str, float]]:
        """What was logged at the end of every epoch."""
        return summaries(self.workdir)


def summaries(workdir: Path) -> list[dict[str, float]]:
    return [entry for entry in entries(workdir) if "mean_planes_by_layer" in entry]


@pytest.fixture(scope="module")
def grown(shared, tmp_path_factory) -> Grown:
    directory = tmp_path_factory.mktemp("grown")
    start_from = f"--config.init_from={shared.float_run}"
    outputs = {
        name: call("train", *flags, start_from, f"--workdir={directory / name}")
        for name, flags in (("grown", GROWN), ("uniform", UNIFORM))
    }
    return Grown(
        directory / "grown",
        outputs["grown"],
        (*GROWN, start_from),
        directory / "uniform",
        outputs["uniform"],
    )


def planes_of(entry: dict[str, float]) -> dict[str, float]:
    """Picks the number of planes of every layer."""
    return {k.removeprefix("planes/"): v for k, v in entry.items() if k.startswith("planes/")}


def bits_of(directory: Path, table: LayerTable) -> dict[str, dict[str, int]]:
    """Returns the weight bits of the layers with a choice, by file and by layer."""
    return {
        name.removeprefix("bits_"): {
            layer.name: int(weights)
            for layer, weights in zip(table.layers, bits.weights, strict=True)
            if layer.searchable
        }
        for name, bits in read_bits(directory, table).items()
    }


def test_every_epoch_tells_how_the_scheme_grows(grown, table):
    sizes = {layer.name: layer.params for layer in table.layers if layer.searchable}
    names = {f"planes/{name}" for name in sizes} | {f"mean_planes_by_{by}" for by in BY}
    names |= {"step", "undecided_masks", "undecided_bits"}
    names |= {"validation/soft", "validation/hard", "validation/mean"}
    assert [entry["step"] for entry in grown.summaries] == list(
        range(EPOCH_STEPS, CSQ_STEPS + 1, EPOCH_STEPS)
    )
    for entry in grown.summaries:
        assert set(entry) == names
        planes = planes_of(entry)
        weights = {"layer": None, "param": [sizes[name] for name in planes]}
        for by in BY:
            mean = np.average(list(planes.values()), weights=weights[by])
            assert entry[f"mean_planes_by_{by}"] == pytest.approx(mean)
    assert grown.summaries[-1]["validation/hard"] > 0.7


def test_the_run_goes_through_all_phases_and_meets_its_budget(grown):
    logged = entries(grown.workdir)
    fixed_at = {"planes_switched_at_freeze": [TICKET + 1], "binarized": [HARDEN + 1]}
    for event, steps in fixed_at.items():
        assert [entry["step"] for entry in logged if event in entry] == steps
    temperatures = [entry["temperature"] for entry in losses(logged)]
    for rise in (temperatures[:TICKET], temperatures[TICKET:HARDEN]):
        assert rise[0] == 1 and np.all(np.diff(rise) > 0) and 0.8 * TEMPERATURE < rise[-1]
    assert temperatures[HARDEN:] == pytest.approx([TEMPERATURE] * (CSQ_STEPS - HARDEN))
    growing = [entry for entry in grown.summaries if entry["step"] <= TICKET]
    fixed = [entry for entry in grown.summaries if entry["step"] > TICKET]
    assert growing[0]["mean_planes_by_layer"] < MOST_PLANES and growing[0]["undecided_masks"] > 0
    for entry in fixed:
        assert abs(entry["mean_planes_by_layer"] - TARGET) < 0.1
        assert planes_of(entry) == planes_of(fixed[0])
    assert fixed[-1]["undecided_masks"] == 0


def test_csq_compiles_its_step_once(grown):
    for output in (grown.output, grown.uniform_output):
        (line,) = re.findall("^compilations: (.*)$", output, re.M)
        assert dict(re.findall(r"(\w+) x(\d+)", line))["_train_step"] == "1", line


def test_the_scheme_is_written_as_bits_table_and_plots(grown, table):
    directory = grown.workdir / "scheme"
    plots = ["growth.png", "scheme.png"]
    files = ["bits_integers.json", "bits_planes.json", "norms.safetensors", "scheme.csv"]
    assert sorted(path.name for path in directory.iterdir()) == sorted(files + plots)
    for plot in plots:
        assert (directory / plot).read_bytes().startswith(PNG)
    bits = bits_of(directory, table)
    assert bits["planes"] == planes_of(grown.summaries[-1])
    assert abs(np.mean(list(bits["planes"].values())) - TARGET) < 0.1
    with (directory / "scheme.csv").open() as file:
        rows = {row["layer"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(table.names)
    for name, row in rows.items():
        if name in bits["planes"]:
            assert (int(row["integers"]), int(row["planes"])) == (
                bits["integers"][name],
                bits["planes"][name],
            )
            layout, used = row["layout"], row["layout"].strip("0")
            assert len(layout) == MOST_PLANES and layout.count("1") == int(row["planes"])
            assert int(row["integers"]) <= len(used) + bool(used)  # and a sign
            assert row["acts"] == "4"
        else:
            assert (row["integers"], row["planes"], row["layout"]) == ("8", "8", "")


def printed_accuracy(output: str) -> dict[str, str]:
    """Returns the test accuracies that train.py printed."""
    return dict(re.findall(r"^test accuracy, (\w+): (\S+)$", output, re.M))


@pytest.mark.parametrize("name", ["grown", "uniform"])
def test_the_integers_are_as_accurate_as_the_hardened_network(grown, table, capsys, name):
    workdir, output = {
        "grown": (grown.workdir, grown.output),
        "uniform": (grown.uniform, grown.uniform_output),
    }[name]
    path = workdir / "integers.safetensors"
    packed = network.load(path)
    config = packed.file.provenance["config"]
    method = {"grown": "csq", "uniform": "csq_uniform"}[name]
    assert config["method"] == method
    assert "csq" in config and "rfquant" not in config
    stored = {layer.name: layer.max_bits for layer in packed.table.layers}
    bits = bits_of(workdir / "scheme", table)["integers"]
    assert {layer: stored[layer] for layer in bits} == bits
    main.main(["inspect", str(path), "--dataset=digits"])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "as stored" in line]
    accuracy = printed_accuracy(output)
    assert set(accuracy) == {"soft", "hard"}
    assert row.split("│")[4].strip() == accuracy["hard"]
    assert float(accuracy["hard"].rstrip("%")) > 60
    said = " ".join(output.split())  # lines with long paths may be broken
    assert f"{path}: {path.stat().st_size / 1024:.1f} KiB, of which integers" in said
    assert "every layer has its own bits" in said


def test_the_uniform_scheme_is_the_target_from_the_first_step_to_the_last(grown, table):
    (entry,) = summaries(grown.uniform)
    layers = [layer.name for layer in table.layers if layer.searchable]
    assert planes_of(entry) == dict.fromkeys(layers, 3.0)
    bits = bits_of(grown.uniform / "scheme", table)
    assert bits["planes"] == dict.fromkeys(layers, 3)
    assert all(2 <= own <= 4 for own in bits["integers"].values())  # with a sign
    with (grown.uniform / "scheme" / "scheme.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["layout"] for row in rows if row["layer"] in layers} == {"111"}


def test_csq_killed_around_the_freeze_ends_with_the_same_bits(shared, grown, tmp_path):
    """The newest checkpoint is usually from before the freezing, which then happens again."""
    workdir = tmp_path / "run"
    flags = (*grown.flags, f"--workdir={workdir}")
    process = start("train.py", *flags, output=tmp_path / "killed", cache=shared.cache)
    wait_for(lambda: any("planes_switched_at_freeze" in e for e in entries(workdir)), process)
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    assert saved_steps(workdir)[-1] < CSQ_STEPS
    code, output = run("train.py", *flags, output=tmp_path / "finished", cache=shared.cache)
    assert code == 0, output
    assert re.search(rf"going on from step \d+ in {workdir}", output), output
    assert last_arrays(workdir) == last_arrays(grown.workdir)
    logged, expected = entries(workdir), entries(grown.workdir)
    assert losses(logged) == losses(expected)
    assert summaries(workdir) == grown.summaries
    assert [sorted(entry) for entry in logged] == [sorted(entry) for entry in expected]
    for file in ("scheme.csv", "bits_integers.json"):
        again, first = (place / "scheme" / file for place in (workdir, grown.workdir))
        assert again.read_text() == first.read_text()
    again, first = (network.load(p / "integers.safetensors") for p in (workdir, grown.workdir))
    assert again.table == first.table
    jax.tree.map(np.testing.assert_array_equal, again.state, first.state)
    assert printed_accuracy(output) == printed_accuracy(grown.output)


def test_two_processes_grow_a_scheme_like_one(grown, tmp_path):
    """Through the freezing of the scheme, which every process meets by itself."""
    workdir = tmp_path / "run"
    first, second = run_two_processes(grown.flags, workdir, stop_after=TICKET + 3)
    logged, alone = losses(entries(workdir)), losses(entries(grown.workdir))
    assert "stopped by a signal after step" in first and "stopped by" not in second
    assert_same_curve(logged, alone, ("loss", "temperature"))
    freeze_scheme = [entry for entry in entries(workdir) if "planes_switched_at_freeze" in entry]
    assert [entry["step"] for entry in freeze_scheme] == [TICKET + 1]
    for entry in summaries(workdir)[TICKET // EPOCH_STEPS :]:
        assert abs(entry["mean_planes_by_layer"] - TARGET) < 0.1
    step, state = checkpoints.load_latest(workdir / "checkpoints")
    assert step > TICKET and state["fixed"] and not state["hard"]


def test_found_bits_leave_nothing_to_search(grown):
    config: Any = csq_digits.get_config()
    config.model.options.width = 4
    config.device_count = 1
    message = "^error: 'csq' found its bits itself: there is nothing to search; pass the workdir"
    with pytest.raises(SystemExit, match=message):
        search.search(as_run(config, grown.workdir))
    assert not (grown.workdir / "search").exists()
