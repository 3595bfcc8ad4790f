"""The command line: help, flags of each command, configs by name, errors of one sentence."""

import pathlib
import subprocess
import sys
from typing import Any

import pytest
from absl import flags
from helpers.programs import ROOT

from mpq_jax.cli import command_line, config_files, train
from mpq_jax.cli.command_line import Command
from mpq_jax.cli.main import COMMANDS, main

OWN = """
from mpq_jax.configs import default

def get_config(variant: str = ""):
    config = default.get_config()
    config.model.name = "nets.py:Net"
    {line}
    return default.finish(config, variant)
"""


def own_config(folder: pathlib.Path, line: str = "pass") -> pathlib.Path:
    """Writes a config of a user's own, with one more line."""
    path = folder / "mine.py"
    path.write_text(OWN.format(line=line))
    return path


def refusal(*argv: str) -> str:
    """Returns what a refused command line says, in one line."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    message = str(caught.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def train_arguments(*argv: str) -> Any:
    return command_line.parse("train", train.COMMAND, argv)


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_the_commands_are_listed(argv, capsys):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, summary in COMMANDS.items():
        assert f"  {name:10}{summary}" in lines


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_itself_on_one_page(name, capsys):
    assert main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: mpq {name} " in printed and f"\n  mpq {name} " in printed
    lines = printed.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 100


def test_commands_are_called_again_and_again_in_one_process(capsys):
    """Flags belong to one call: none is defined twice, and nothing is left in absl's own."""
    before = set(flags.FLAGS)
    for _ in range(2):
        assert train_arguments("--config=digits", "--workdir=a", "--config.seed=3").config.seed == 3
        assert main(["verify", "--help"]) == 0
    assert train_arguments("--config=digits", "--workdir=a").config.seed == 0
    assert set(flags.FLAGS) == before


def test_help_and_version_need_neither_jax_nor_a_device():
    code = (
        "import sys; from mpq_jax.cli.main import main; main(['--help']); print(list(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "'jax'" not in process.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "there is no command 'trian'; the commands are train, search, export, "),
        (
            ["train", "--workdir=a"],
            "--config is not given: a config file, or the name of a ",
        ),
        (["train", "--config", "digits"], "--workdir is not given: folder of this run's "),
        (
            ["train", "--config=digits", "--workdir=a", "digits"],
            "['digits'] are not flags",
        ),
        (["train", "--config=digits", "--wrkdir=a"], "flag 'wrkdir'. Did you mean: workdir"),
        (["train", "--config=digits", "--process_count=two"], "process_count=two"),
        (["train", "--config=digits", "--config.epochs=two"], "config.epochs=two"),
        (["train", "--config=digit"], "--config is 'digit', which is neither a file nor the name "),
        (["train", "--config=digits:flaot"], "the variant is 'flaot'; a config of rfquant has "),
        (
            ["train", "--config=digits", "--config.modle.name=a"],
            "no config.modle.name: 'modle'",
        ),
        (["train", "--config=digits", "--config.seed.a=1"], "no config.seed.a: 'a' is none of []"),
        (
            ["train", "--config=digits", "--config.accumulate=2"],
            "config.grad_accum_steps now",
        ),
        (
            ["train", "--config=digits", "--noconfig.new_head"],
            "called config.reinit_head now",
        ),
        (
            ["search", "--config=csq/digits", "--config.csq.harden=1"],
            "config.csq.binarize now",
        ),
        (["verify"], "FILE is missing; wanted mpq verify FILE [--flag=value ...]"),
        (["verify", "a", "b"], "['b'] are not flags; wanted mpq verify FILE"),
        (["verify", "a", "--stopped_status=1"], "flag 'stopped_status'"),  # is of another command
        (["export"], "--out is not given: the file to write"),
        (["latency", "--model=resnet8", "--input=8,8,1"], "--out is not given: the JSON file"),
    ],
)
def test_wrong_command_lines_are_refused_with_what_is_right(argv, message):
    assert message in refusal(*argv)


def test_config_values_take_the_types_of_the_defaults():
    config = train_arguments(
        "--config",
        "digits:float",
        "--workdir=a",
        "--config.epochs=3",
        "--config.bits.candidates=(4, 2)",
        "--config.search.budgets=(5e6,)",
        "--config.reinit_head",
        "--config.rfquant.learning_rate",
        "1",
        "--config.data.tfds.image_size=64",
        "--config.data.mean=(0.5,)",
        "--noconfig.search.finalists",
    ).config
    assert (config.method, config.epochs, config.bits.candidates) == ("plain", 3, (4, 2))
    assert config.search.budgets == (5e6,) and config.reinit_head is True
    assert config.rfquant.learning_rate == 1.0 and type(config.rfquant.learning_rate) is float
    assert config.data.tfds.image_size == 64 and config.data.mean == (0.5,)
    assert config.search.finalists is False


def test_every_shipped_config_has_a_name():
    names = set(config_files.shipped())
    files = {path for path in (ROOT / "configs").rglob("*.py") if path.name != "__init__.py"}
    assert names == {str(path.relative_to(ROOT / "configs").with_suffix("")) for path in files}
    assert {"digits", "csq/digits", "double_rounding/resnet50_imagenet"} <= names


def test_a_file_goes_before_a_shipped_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.load("digits").epochs == 60
    own_config(tmp_path, "config.epochs = 7").rename(tmp_path / "digits")
    assert "it is no Python file" in refusal("train", "--config=digits")
    (tmp_path / "digits").rename(tmp_path / "digits.py")
    assert config_files.load("digits.py").epochs == 7
    assert config_files.load("digits").epochs == 60


def test_a_config_of_ones_own_may_be_anywhere_and_its_model_beside_it(tmp_path):
    (tmp_path / "nets.py").write_text("")
    path = own_config(tmp_path, "config.epochs = 7")
    config = train_arguments(f"--config={path}:float", "--workdir=a").config
    assert (config.method, config.epochs) == ("plain", 7)
    assert config.model.name == f"{tmp_path.resolve()}/nets.py:Net"


def test_a_model_in_the_working_directory_goes_first(tmp_path, monkeypatch):
    own_config(tmp_path)
    (tmp_path / "nets.py").write_text("")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "nets.py").write_text("")
    monkeypatch.chdir(tmp_path / "here")
    config = train_arguments("--config=../mine.py", "--workdir=a").config
    assert config.model.name == f"{tmp_path.resolve()}/here/nets.py:Net"
    named = train_arguments("--config=digits", "--workdir=a", "--config.model.name=nets.py:Net")
    assert named.config.model.name == config.model.name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.accumulate = 2", "'accumulate', which is no key: it is called config.grad_accum_"),
        ("config.epoch = 2", "sets 'epoch', which is no key: perhaps 'epochs' is meant"),
        ("config.csq.ticket = 1", "'ticket', which is no key: it is called config.csq.freeze_"),
        ("config.keep_last = 2", "'keep_last', which is no key: the two newest checkpoints"),
        ("config.xyz = 2", "sets 'xyz', which is no key: configs/default.py lists all keys"),
        ("return 3", "get_config returned int; wanted ConfigDict"),
    ],
)
def test_configs_that_set_no_key_are_refused(tmp_path, line, message):
    path = own_config(tmp_path, line)
    said = refusal("train", f"--config={path}")
    assert str(path) in said and message in said


def test_files_without_a_config_are_refused(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("")
    assert "it has no function get_config(arg)" in refusal("train", f"--config={path}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  name: resnet8\n", "invalid syntax"),
        ("def get_config():\n    pass\n", "takes no variant, and 'flaot' is asked for"),
        ("def get_config(variant):\n    return {}[variant]\n", "has no variant 'flaot'"),
    ],
)
def test_files_that_make_no_such_config_are_refused(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    said = refusal("train", f"--config={path}:flaot")
    assert str(path) in said and message in said
    path = path.rename(tmp_path / "mine.yaml")
    assert f"{path}: it is no Python file" in refusal("train", f"--config={path}")


def test_options_of_a_model_need_not_be_preset_by_the_config():
    given = [f"--config.model.options.{one}" for one in ("depth=3", "name=lite", "sizes=(1, 2)")]
    later = ["--config.model.options.width=8", "--config.model.options.depth=4"]
    config = train_arguments("--config=digits", "--workdir=a", *given, *later).config
    wanted = {"width": 8, "depth": 4, "name": "lite", "sizes": (1, 2)}
    assert config.model.options.to_dict() == wanted
    said = refusal("train", "--config=digits", "--workdir=a", "--config.model.options.a.b=3")
    assert "there is no config.model.options.a.b" in said


def test_mistakes_in_a_config_file_keep_their_traceback(tmp_path):
    with pytest.raises(AttributeError, match="no_such_name"):
        main(["train", f"--config={own_config(tmp_path, 'default.no_such_name')}"])


def failing(error: Exception) -> Command:
    def fail(arguments):
        raise error

    return Command(summary="Fails.", example="mpq fail", define=lambda values: None, run=fail)


def test_errors_of_the_user_are_one_line_and_others_are_not_hidden():
    with pytest.raises(SystemExit) as caught:
        command_line.run("fail", failing(ValueError("epochs is 0")), [])
    assert caught.value.code == "error: epochs is 0"
    with pytest.raises(ZeroDivisionError):
        command_line.run("fail", failing(ZeroDivisionError()), [])
    with pytest.raises(ValueError, match="epochs is 0"):
        command_line.run("fail", failing(ValueError("epochs is 0"))._replace(user_errors=()), [])
