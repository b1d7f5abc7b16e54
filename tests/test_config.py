"""launch/config.py: defaults, the command line, and what is refused."""

from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from sparring.launch.config import TrainConfig, default_config, describe, parse_config


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
