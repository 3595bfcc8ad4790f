"""A transformer through train.py and search.py: float, RFQuant, Double Rounding, searches."""

import csv
import json

import pytest
from helpers.programs import entries, run

TINY = (
    "--config.model.options.dim=32",
    "--config.model.options.depth=1",
    "--config.model.options.heads=2",
    "--config.model.options.dropout=0.0",
    "--config.data.augment.crop_padding=0",  # a third of the steps do without
)
SHORT = (
    *TINY,
    "--config.epochs=2",
    "--config.search.levels=(3,)",
    "--config.search.score_images=64",
    "--config.bits.candidates=(6, 4, 3)",
    "--config.search.rounds=1",
)
METHODS = {
    "rfquant": ("--config.rfquant.random_subnets=1",),
    "double_rounding": ("--config.method=double_rounding",),
}


@pytest.mark.slow
def test_a_transformer_is_trained_and_searched(tmp_path):
    how = {"cache": tmp_path / "cache"}
    floats, config = tmp_path / "float", "--config=configs/vit_digits.py"
    flags = (f"{config}:float", *TINY, "--config.epochs=100", f"--workdir={floats}")
    code, printed = run("train.py", *flags, output=tmp_path / "float.txt", **how)
    assert code == 0, printed
    assert entries(floats)[-1]["validation/float"] > 0.5  # chance is 0.1

    for name, own in METHODS.items():
        workdir, output = tmp_path / name, tmp_path / f"{name}.txt"
        flags = (config, *SHORT, *own, f"--config.init_from={floats}", f"--workdir={workdir}")
        code, printed = run("train.py", *flags, output=output, **how)
        assert code == 0, printed
        assert entries(workdir)[-1]["validation/w6a6"] > 0.4
        assert (workdir / "integers.safetensors").exists() == (name == "double_rounding")
        code, printed = run("search.py", *flags, output=output, **how)
        assert code == 0, printed
        with (workdir / "search" / "results.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) > 2
        (found,) = (workdir / "search").glob("bits_*.json")
        assert "block0/query" in json.loads(found.read_text())["layers"]
