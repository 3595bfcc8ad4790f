"""`config.json` of a workdir: whose run it is, and under which config the run may go on."""

import json
import pathlib
from typing import Any

import jax

from mpq_jax.checks import strict_json
from mpq_jax.methods import METHODS
from mpq_jax.models import user_models

FILE = "config.json"
VERSION = 2  # of the keys; 1 was not written down, and had the keys of RENAMED and REMOVED
SHOWN = 4  # renamed keys in an error message
RENAMED = {
    "accumulate": "grad_accum_steps",
    "new_head": "reinit_head",
    "data.heldout_fraction": "data.validation_fraction",
    "data.crop_padding": "data.augment.crop_padding",
    "data.flip_probability": "data.augment.flip_probability",
    "data.interpolation": "data.reading.interpolation",
    "data.min_area": "data.reading.min_area",
    "data.resize_factor": "data.reading.resize_factor",
    "data.reduced_decoding": "data.reading.reduced_decoding",
    "data.num_threads": "data.reading.num_threads",
    "data.workers": "data.reading.workers",
    "data.max_corrupt": "data.reading.max_corrupt",
    "double_rounding.norm_rows": "double_rounding.bn_banks",
    "double_rounding_mixed.norm_rows": "double_rounding_mixed.bn_banks",
    "csq.ticket": "csq.freeze_scheme",
    "csq.harden": "csq.binarize",
    "csq.tighten": "csq.budget_anneal",
    "csq.reach": "csq.clip_rms",
    "search.budget": "search.cost",
    "search.frontier": "search.pareto_points",
    "search.tolerance": "search.max_accuracy_drop",
    "search.batch_size": "search.score_images",
    "search.tenure": "search.tabu_tenure",
}
REMOVED = {
    "keep_last": "the two newest checkpoints are kept, and the best one",
    "keep_best": "the two newest checkpoints are kept, and the best one",
    "csq_uniform": "the variant 'uniform' takes the options of config.csq",
    "double_rounding_mixed": "the variant 'mixed' takes its options from config.double_rounding, "
    "but for those of its own",
}

# Values that do not change what is trained: a run may go on with others.
FREE_KEYS = ("search", "log_every", "save_every", "device_count", "fsdp")
FREE_READING_KEYS = ("num_threads", "workers", "max_corrupt")  # ditto, of config.data.reading
LOCAL_KEYS = ("path", "data_dir")  # options of datasets that are places on one machine
SHOWN_READING = ("interpolation", "resize_factor")  # the part of reading that evaluation needs

Config = Any  # nested mappings; an ml_collections.ConfigDict is none in the eyes of types


def explain(path: str) -> str | None:
    """Says what became of a key of an older version; None: it never was one.

    Args:
        path: path of the key, or its last part alone.
    """
    for old, new in RENAMED.items():
        if path in (old, old.rpartition(".")[2]):
            return f"it is called config.{new} now"
    parts = path.split(".")
    return next((reason for old, reason in REMOVED.items() if old in parts[:1]), None)


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the config of the run in a workdir.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the file is damaged, or of another version.
    """
    path = workdir / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir} holds no run: there is no {FILE} in it; give the workdir of a training run"
        )
    config = _load(path)
    version = config.get("version", 1)
    if version != VERSION:
        raise ValueError(
            f"{path} is of version {version}, and this mpq_jax reads version {VERSION}: keys have "
            f"other names{_changes(config)}. Go on with the mpq_jax that wrote it, or train anew "
            "in another --workdir"
        )
    return config


def method_of(workdir: pathlib.Path) -> str | None:
    """Returns the method of the run in a workdir, of any version; None: there is no config."""
    path = workdir / FILE
    return _load(path).get("method") if path.is_file() else None


def _load(path: pathlib.Path) -> dict[str, Any]:
    """Reads a config of any version; raises ValueError if it is damaged or is none."""
    try:
        config = strict_json.parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise ValueError(f"{path} is no config of a training run of mpq_jax")
    return config


def _changes(config: dict[str, Any]) -> str:
    """Names some keys of a config of the first version that have other names now."""
    groups = {name: group for name, group in config.items() if isinstance(group, dict)}
    held = set(config) | {f"{name}.{key}" for name, group in groups.items() for key in group}
    renamed = [f"config.{old} is config.{RENAMED[old]} now" for old in RENAMED if old in held]
    more = f" and {len(renamed) - SHOWN} more" if len(renamed) > SHOWN else ""
    return f" ({', '.join(renamed[:SHOWN])}{more})" if renamed else ""


def write(config: Config, workdir: pathlib.Path) -> None:
    """Notes whose workdir this is, at the first start of a run."""
    path = workdir / FILE
    if jax.process_index() == 0 and not path.exists():
        temporary = path.with_suffix(".partial")
        temporary.write_text(to_json(config))
        temporary.replace(path)  # at once: a killed run leaves all of it or nothing


def to_json(config: Config) -> str:
    """Writes the text of `config.json`."""
    return json.dumps({"version": VERSION} | as_json(config), indent=2) + "\n"


def as_json(config: Config) -> dict[str, Any]:
    """Returns a config as JSON keeps it: nested dicts, with lists in the place of tuples."""
    return json.loads(config.to_json() if hasattr(config, "to_json") else json.dumps(config))


def check_same_run(
    config: Config, workdir: pathlib.Path, *, free_keys: tuple[str, ...] = ()
) -> None:
    """Raises ValueError if the workdir belongs to a run of other values, or of unknown ones.

    Args:
        config: the config that is asked for.
        workdir: directory of the run, or of none yet.
        free_keys: keys that may differ, besides those that do not change what is trained.
    """
    if not (workdir / FILE).exists():
        if _holds_checkpoints(workdir):
            raise ValueError(
                f"{workdir} holds checkpoints but no {FILE}, so nothing tells which config they "
                f"were trained with: bring {FILE} back, or take another --workdir"
            )
        return
    theirs, ours = read(workdir), as_json(config)
    if not isinstance(theirs.get("model"), dict) or "name" not in theirs["model"]:
        raise ValueError(f"{workdir / FILE} is no config of a training run of mpq_jax")
    free = {"version", *FREE_KEYS, *free_keys, *_options_of_others(config["method"])}
    for record in (theirs, ours):
        for name in FREE_READING_KEYS:
            record["data"].get("reading", {}).pop(name, None)
        record["model"]["name"] = _place_free(record["model"]["name"])
    changed = [
        f"config.{key} was {theirs.get(key)!r}, now {ours.get(key)!r}"
        for key in sorted(ours | theirs)
        if key not in free and ours.get(key) != theirs.get(key)
    ]
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another config: {'; '.join(changed)}. Take another "
            "--workdir, or the old values to go on with it"
        )


def _holds_checkpoints(workdir: pathlib.Path) -> bool:
    """Tells whether a workdir holds a finished checkpoint."""
    directory = workdir / "checkpoints"
    return directory.is_dir() and any(path.name.isdecimal() for path in directory.iterdir())


def _options_of_others(method: str) -> set[str]:
    """Returns the groups of options that a method does not read."""
    variant = METHODS[method].variant
    return set(METHODS) - {method, variant.of if variant else method}


def _place_free(name: str) -> str:
    """Returns the name of a model without the folder of its file, which may have moved."""
    return name.rpartition("/")[2] if user_models.is_user_model(name) else name


def to_record(config: Config) -> dict[str, Any]:
    """Returns a config for the record of a file that leaves this machine.

    Places of files are left out, and so are the options of other methods and of the search.
    """
    kept = as_json(config)
    data = kept["data"]
    options = {name: value for name, value in data[data["name"]].items() if name not in LOCAL_KEYS}
    reading = {name: data["reading"][name] for name in SHOWN_READING}
    kept["data"] = {"name": data["name"]} | options | reading
    kept["model"]["name"] = _place_free(kept["model"]["name"])
    for name in {"version", "init_from", "search", *_options_of_others(kept["method"])}:
        kept.pop(name, None)
    return kept
