"""`mpq train` on a small supernet, in this process and in processes of their own."""

import re

import pytest
from helpers.program_results import assert_same_curve, run_two_processes
from helpers.programs import (
    EPOCH_STEPS,
    FLOAT,
    SUPERNET,
    call,
    entries,
    losses,
    refusal,
    run,
    stopped_after,
)

from mpq_jax.configs import digits
from mpq_jax.training import checkpoints, experiment


def test_float_training_learns_digits(shared):
    assert entries(shared.float_run)[-1]["validation/float"] > 0.9
    assert "validation: float 9" in shared.output("float")


def test_supernet_starts_from_the_float_run(shared):
    assert f"starting from the run in {shared.float_run}" in shared.output("smoke")
    first = {
        run: next(entry for entry in entries(run) if "validation/w6a6" in entry)
        for run in (shared.smoke, shared.supernet)
    }
    assert first[shared.smoke]["step"] == first[shared.supernet]["step"] == EPOCH_STEPS
    assert (
        first[shared.smoke]["validation/w6a6"]
        > 0.8
        > 0.2
        > first[shared.supernet]["validation/w6a6"]
    )


def test_bits_never_recompile(shared):
    events = [entry for entry in entries(shared.supernet) if "frozen_layers" in entry]
    assert [event["frozen_layers"] > 0 for event in events] == [True] * 2
    (line,) = re.findall("^compilations: (.*)$", shared.output("supernet"), re.M)
    counts = dict(re.findall(r"(\w+) x(\d+)", line))
    steps = ("_begin", "_max_subnet", "_random_subnet", "_finish", "evaluate_batch")
    steps += ("freeze_most_unstable",)
    assert {name: counts.get(name) for name in steps} == dict.fromkeys(steps, "1"), line


def test_layers_are_shown_with_what_they_cost_and_may_have(shared):
    (row,) = [
        line for line in shared.output("supernet").splitlines() if "stage1_block0/conv1" in line
    ]
    assert "4,608" in row and "288" in row and row.count("6 5 4 3 2") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, workdir, names",
    [
        (FLOAT, "float_run", ("loss",)),
        pytest.param(SUPERNET, "supernet", ("loss_max", "loss_subnets"), marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_like_one(shared, tmp_path, flags, workdir, names):
    alone = losses(entries(getattr(shared, workdir)))
    with stopped_after(5, tmp_path):
        printed = call("train", *flags, f"--workdir={tmp_path}", devices=8)
    assert "stopped by a signal after step" in printed
    assert_same_curve(losses(entries(tmp_path)), alone, names)


REFUSALS = {
    # name: (flags, what must be printed)
    "config key": (["--config.modle.name=resnet8"], "no config.modle.name: 'modle' is .*'model'"),
    "model option": (
        ["--config.model.options.depth=3"],
        r"takes no \['depth'\]; it takes .*'width'",
    ),
    "method": (["--config.method=foo"], r"config.method is 'foo'; .*'plain', 'rfquant'\]"),
    "method option": (["--config.rfquant.idm_features=foo"], "'foo'; wanted one of .*norm_output"),
    "batch size": (["--config.batch_size=63"], "63, not a multiple of 8 devices x 1"),
    "other config": (["--workdir={supernet}", "--config.seed=1"], "config.seed was 0, now 1"),
    "empty init": (["--config.init_from={empty}"], "empty.* holds no checkpoint"),
    "init of another model": (
        ["--config.init_from={float}", "--config.model.options.width=5"],
        "is of another model than config.model, .*these differ: .*norm1",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_is_refused_at_once_with_what_can(shared, tmp_path, name):
    flags, message = REFUSALS[name]
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "float": shared.float_run, "supernet": shared.supernet}
    flags = [f"--workdir={tmp_path / 'run'}", *(flag.format(**places) for flag in flags)]
    assert re.search(message, refusal("train", *SUPERNET, *flags))
    # So that the corrected command is not refused for belonging to another run.
    assert not list(tmp_path.glob("run/config.json")) and not list(tmp_path.glob("run/*.jsonl"))


def test_a_refusal_is_one_sentence_without_a_traceback(tmp_path):
    flags = (*SUPERNET, "--config.modle.name=resnet8", f"--workdir={tmp_path / 'run'}")
    code, output = run("train.py", *flags, output=tmp_path / "output")
    assert code == 1, output
    assert re.fullmatch("error: .*no config.modle.name: 'modle' is .*'model'.*", output.strip())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.name": "foo"}, "'foo'; known models are .*'resnet18'"),
        ({"data.name": "foo"}, "'foo'; known datasets.*'digits'"),
        ({"epochs": 0}, "config.epochs is 0; wanted an integer, 1 or more"),
        ({"batch_size": 4096}, "1150 training images .* fewer than one batch of 4096"),
        ({"bits.candidates": (33,)}, "33"),
        ({"rfquant.ema_decay": 2.0}, "config.rfquant.ema_decay is 2.0; wanted a number of at le"),
    ],
)
def test_impossible_values_are_refused_when_building(change, message):
    config = digits.get_config()
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        experiment.build(config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, workdir, names",
    [
        (FLOAT, "float_run", ("loss",)),
        pytest.param(SUPERNET, "supernet", ("loss_max", "loss_subnets"), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_like_one_and_stop_together(shared, tmp_path, flags, workdir, names):
    first, second = run_two_processes(flags, tmp_path / "run", stop_after=5)
    logged, alone = losses(entries(tmp_path / "run")), losses(entries(getattr(shared, workdir)))
    step, state = checkpoints.load_latest(tmp_path / "run" / "checkpoints")
    assert f"stopped by a signal after step {step}" in first
    assert "stopped by" not in second and "stage1_block0" not in second
    assert [entry["step"] for entry in logged] == list(range(1, step + 1))
    assert state["step"] == step
    assert_same_curve(logged, alone, names)
