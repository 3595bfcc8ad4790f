"""The flags that name a finished run, its bits, a file and a dataset; and what they stand for."""

import pathlib
from typing import Any

from absl import flags

from mpq_jax import data
from mpq_jax.cli import datasets
from mpq_jax.export import finished_run, formats
from mpq_jax.export.exported_model import ExportedModel
from mpq_jax.training import config_record, experiment
from mpq_jax.training.workdir import local_path

MODEL = "your own model, where its class is now: FILE.py:Class"
BITS = "bit file of a search, or uniform:N; none for a run that found its bits itself"


def define_network(values: flags.FlagValues) -> None:
    """Defines the flags that name a network of a run, and where its pieces are now."""
    flags.DEFINE_string("workdir", None, "workdir of the training run", flag_values=values)
    flags.DEFINE_string("bits", None, BITS, flag_values=values)
    known = ", ".join(formats.FORMATS)
    flags.DEFINE_string(
        "format", None, f"{known}; not given: by the ending of the file's name", flag_values=values
    )
    flags.DEFINE_string(
        "data_path",
        None,
        "new place of the file or folder of images trained on",
        flag_values=values,
    )
    flags.DEFINE_string("model", None, MODEL, flag_values=values)
    define_data_dir(values)


def define_data_dir(values: flags.FlagValues) -> None:
    """Defines the flag that says where TFDS's datasets are."""
    flags.DEFINE_string("data_dir", None, "where TFDS's dataset is prepared", flag_values=values)


def define_dataset(values: flags.FlagValues) -> None:
    """Defines the flags that name images to evaluate on."""
    flags.DEFINE_string(
        "dataset", None, f"dataset to evaluate on: {datasets.KNOWN}", flag_values=values
    )
    flags.DEFINE_string(
        "split",
        None,
        "TFDS's name of the test split; not given: as in training",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "image_size", None, "in pixels; not given: as in training", flag_values=values
    )
    flags.DEFINE_integer("batch_size", 256, "images in one batch", flag_values=values)


def read_network(given: Any) -> ExportedModel:
    """Reads the network that --workdir and --bits name."""
    if given.bits == "":
        raise ValueError(f"--bits is empty: {BITS}")
    if not given.workdir:
        raise ValueError("--workdir is not given: the workdir of the run that the network is of")
    return finished_run.load(
        given.workdir, given.bits, dataset=moved_data(given), model=given.model
    )


def find_network(given: Any, path: pathlib.Path, format_name: str) -> ExportedModel:
    """Reads the network that a file is of, by --workdir and --bits or where and what it is."""
    if not given.workdir:
        given.workdir = str(find_workdir(path))
    if given.bits is not None:
        return read_network(given)
    given.bits = formats.FORMATS[format_name].bits(path)
    if given.bits == "":
        raise ValueError(f"{path} does not say its bits; pass --bits")
    try:
        return read_network(given)
    except ValueError as error:
        raise ValueError(
            f"{path} does not fit the run in {given.workdir}, if it is of that run at all: {error}"
        ) from error


def find_workdir(path: pathlib.Path) -> pathlib.Path:
    """Returns the workdir that a file lies in; refuses a file that lies in none."""
    above = [folder for folder in path.resolve().parents if (folder / "checkpoints").is_dir()]
    if not above:
        raise ValueError(f"--workdir is not given, and {path} lies in no run; name its run")
    return above[0]


def moved_data(given: Any) -> dict[str, str]:
    """Returns the options of the run's dataset that say where it is now."""
    options = {"data_dir": given.data_dir, "path": given.data_path}
    return {name: value for name, value in options.items() if value}


def format_name(given: Any, path: pathlib.Path) -> str:
    """Returns the format of a file, as named or by the ending of its name."""
    name = given.format or formats.format_of(path)
    formats.check_name(name)
    return name


def read_dataset(given: Any, exported: ExportedModel) -> data.Dataset:
    """Loads the dataset that was named, or else the one of the run."""
    if not given.dataset:
        config = config_record.read(local_path(given.workdir))
        config["data"][config["data"]["name"]].update(moved_data(given))
        return experiment.load_dataset(config)
    return load_dataset(given, exported.provenance["config"]["data"])


def load_dataset(given: Any, trained_on: dict[str, Any]) -> data.Dataset:
    """Loads the dataset that was named; see `datasets.load`."""
    return datasets.load(
        given.dataset,
        trained_on,
        batch_size=given.batch_size,
        data_dir=given.data_dir or "",
        split=given.split,
        image_size=given.image_size,
    )
