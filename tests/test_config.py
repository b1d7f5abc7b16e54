"""launch/config.py: defaults, the command line, and what is refused."""

import inspect
import json
import re
from dataclasses import FrozenInstanceError, asdict, fields, replace
from pathlib import Path

import pytest

from sparring.launch.config import TrainConfig, default_config, describe, parse_config
from sparring.launch.settings import read_settings, write_settings
from sparring.launch.start import Launcher


def test_defaults_of_both_machines_are_valid_and_describe_shows_every_setting():
    cpu, gpu = default_config(cuda=False), default_config(cuda=True)
    assert cpu.seq_len >= 8192 and cpu.dtype == "float32"
    assert gpu.seq_len > cpu.seq_len and gpu.dtype == "bfloat16"
    shown = describe(gpu)
    for name, value in asdict(gpu).items():
        assert any(line.split() == [name, str(value)] for line in shown.splitlines()), name


def test_config_is_frozen():
    with pytest.raises(FrozenInstanceError):
        TrainConfig().steps = 3


def test_command_line_sets_fields():
    config = parse_config("--seq-len 1024 --pattern dense --no-compare --data a.txt".split())
    assert (config.seq_len, config.pattern, config.compare) == (1024, "dense", False)
    assert config.data == "a.txt"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--no-such-setting", "1"], ["--no-such-setting"]),
        (["--steps", "many"], ["many"]),
        (["--heads", "5", "--kv-heads", "2"], ["heads=5", "kv_heads=2"]),
    ],
)
def test_bad_command_lines_exit_with_the_reason(arguments, shown, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_config(arguments)
    assert exit_.value.code == 2
    output = capsys.readouterr()
    for word in shown:
        assert word in output.err + output.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 6, "kv_heads": 4}, "heads=6 .*kv_heads=4"),
        ({"seq_len": 64}, "seq_len=64 .*block_size=128"),
        ({"warmup": 50, "steps": 50}, "warmup=50 .*steps=50"),
        ({"head_dim": 33}, "head_dim=33 .*2"),
        ({"steps": 0}, "steps=0 .*0"),
        ({"dp": -1}, "dp=-1 .*0"),
        ({"save_every": -1}, "save_every=-1 .*0"),
        ({"top_p": 1.5}, "top_p=1.5 .*1.0"),
        ({"max_density": 2.0}, "max_density=2.0 .*1.0"),
        ({"dtype": "int8"}, "dtype='int8' .*float32"),
        ({"device": "tpu"}, "device='tpu' .*cuda"),
        ({"pattern": "fog"}, "pattern='fog' .*vertical-slash"),
        ({"layout": "spiral"}, "spiral.*zigzag"),
        ({"exchange": "post"}, "'post' is unknown; use one of .*ring"),
    ],
)
def test_contradictions_are_refused_with_both_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


def test_checkpoints_are_due_every_so_often_and_at_the_end():
    config = TrainConfig(steps=7, warmup=0, save_every=3)
    assert [s for s in range(7) if config.saves_after(s)] == [2, 5, 6]
    assert not any(replace(config, save_every=0).saves_after(s) for s in range(7))


def test_differences_name_what_forbids_resuming():
    config = TrainConfig()
    assert config.differences(asdict(replace(config, out="elsewhere", log_every=5))) == []
    (difference,) = config.differences(asdict(replace(config, seq_len=1024)))
    assert difference == "seq_len: checkpoint 1024, now 8192"


# -- what is documented, and files --------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TrainConfig, Launcher])
def test_every_setting_has_a_comment_that_help_shows(kind):
    source = inspect.getsource(kind)
    for field in fields(kind):
        assert re.search(rf"^    {field.name}: .*  # \w.*\.?$", source, re.MULTILINE), field.name


def test_paths_hold_in_any_folder():
    config = TrainConfig(data="text", tokenizer="bytes", out="/runs/a").absolute()
    expected = {"data": str(Path.cwd() / "text"), "tokenizer": "bytes", "out": "/runs/a"}
    assert config == TrainConfig(**expected)


@pytest.mark.parametrize("name", ["settings.toml", "settings.json"])
def test_the_command_line_wins_over_a_file_and_a_file_over_defaults(name, tmp_path):
    path = tmp_path / name
    path.write_text(
        "steps = 7\nlr = 1\nwarmup = 2" if "toml" in name else '{"steps": 7, "lr": 1, "warmup": 2}'
    )
    config = parse_config(["--warmup", "3", "--config", str(path)])
    assert config == replace(parse_config([]), steps=7, lr=1.0, warmup=3)
    assert isinstance(config.lr, float)


def test_settings_that_a_run_wrote_are_read_again(tmp_path):
    config = TrainConfig(data="a.txt", steps=9, compare=False, top_p=0.5)
    write_settings(tmp_path / "config.json", config)
    assert parse_config(["--config", str(tmp_path / "config.json")]) == config
    assert json.loads((tmp_path / "config.json").read_text()) == asdict(config)


BAD_FILES = {
    "unknown.toml": ("step = 3", "unknown setting 'step'; did you mean 'steps'?"),
    "type.toml": ("steps = 3.5", "steps=3.5 is a float; it must be int"),
    "bool.json": ('{"steps": true}', "steps=True is a bool; it must be int"),
    "none.json": ('{"steps": null}', "steps=None is a NoneType; it must be int"),
    "word.json": ('{"data": 3}', "data=3 is a int; it must be str or NoneType"),
    "contrary.toml": ("heads = 5", "heads=5 is not divisible by kv_heads="),
    "list.json": ("[1]", "holds a list, not a table of settings"),
    "broken.json": ("{", "Expecting property name"),
    "broken.toml": ("steps 3", "after a key"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_refused_by_name_with_what_is_wrong(name, tmp_path, capsys):
    text, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{re.escape(message)}"):
        read_settings(path, TrainConfig())
    with pytest.raises(SystemExit) as end:
        parse_config(["--config", str(path)])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no.toml: cannot be read: No such file"):
        read_settings(tmp_path / "no.toml", TrainConfig())
