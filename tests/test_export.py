"""launch/export.py: what a run learned, as transformers and peft load it."""

import json

import machine
import pytest
import torch
from tiny_models import build
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from sparring.launch import train as job
from sparring.launch.checkpoint import CheckpointError
from sparring.launch.cli import main
from sparring.launch.config import TrainConfig
from sparring.launch.export import export
from sparring.launch.model import build_model

IDS = torch.arange(40)[None] % 29
DRAWN = {"width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 32}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A function: a run with these settings; its weights at the end, by name."""
    kept, assemble = [], job.assemble
    monkeypatch.setattr(job, "assemble", lambda *args: kept.append(assemble(*args)) or kept[-1])
    (tmp_path / "text").write_text("".join(f"line {i} of {i * i}\n" for i in range(300)))

    def train(**settings):
        small = {"seq_len": 64, "block_size": 32, "steps": 2, "warmup": 0, "pattern": "dense"}
        paths = {"data": str(tmp_path / "text"), "out": str(tmp_path / "run")}
        job.run(TrainConfig(device="cpu", compare=False, **small | paths | settings))
        return {name: p.to_local().detach() for name, p in kept[-1].model.named_parameters()}

    return train


@pytest.fixture
def folder(tmp_path):
    """A model of random weights over bytes, as transformers saves it."""
    model = build(Qwen2ForCausalLM, Qwen2Config, vocab_size=260, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def whole(folder, weights):
    """The model of a folder with these weights."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.load_state_dict(weights, strict=False)
    return model


LEAN = pytest.param({"checkpointing": "full", "mlp_tiles": 2}, id="lean", marks=pytest.mark.full)


@pytest.mark.parametrize("lean", [pytest.param({}, id=""), LEAN])
def test_a_trained_folder_is_exported_with_its_logits(trained, folder, tmp_path, lean, capsys):
    weights = trained(model=str(folder), tokenizer="bytes", **lean)
    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'out'}\n")
    found, expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), whole(folder, weights)
    assert torch.equal(found, logits(expected))
    assert not torch.equal(found, logits(AutoModelForCausalLM.from_pretrained(folder)))  # it has learned
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.full)])
def test_a_model_drawn_by_seed_is_exported_in_the_dtype_of_the_run(trained, tmp_path, dtype):
    weights = trained(dtype=dtype, **DRAWN)
    export(tmp_path / "run", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    model = build_model(TrainConfig(seq_len=64, block_size=32, **DRAWN))
    model.load_state_dict(weights, strict=False)
    assert found.dtype == getattr(torch, dtype)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(found.dtype)
    assert torch.equal(logits(found), logits(model))


@machine.needs("peft")
def test_adapters_are_exported_for_peft_or_merged(trained, folder, tmp_path):
    """Both are W + (alpha / rank) B A, which rounds differently when it is added up first."""
    from peft import PeftModel

    weights = trained(model=str(folder), tokenizer="bytes", lora_rank=2, lora_alpha=8.0, lr=0.05)
    export(tmp_path / "run", tmp_path / "adapters")
    export(tmp_path / "run", tmp_path / "merged", merge=True)
    with pytest.raises(ValueError, match="holds files; give a new folder"):
        export(tmp_path / "run", tmp_path / "merged")

    model, before = AutoModelForCausalLM.from_pretrained(folder), logits(whole(folder, {}))
    for name, parameter in model.named_parameters():
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A.default.weight" in weights:
            a, b = (weights[f"{stem}.lora_{x}.default.weight"] for x in "AB")
            parameter.data += 8 / 2 * b @ a
    expected = logits(model)
    largest = expected.abs().max()
    assert (expected - before).abs().max() > 1e-3 * largest  # they have learned
    beside = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapters")
    for found in (beside, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")):
        assert (logits(found) - expected).abs().max() <= 1e-5 * largest
    assert json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_the_tokenizer_of_a_run_goes_along(trained, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[UNK]", "line", "of", *map(str, range(200))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    trained(tokenizer=str(tmp_path / "words"), **DRAWN)
    export(tmp_path / "run", tmp_path / "out")
    found = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert found("line 7 of 49")["input_ids"] == [1, 10, 2, 52]


def test_what_cannot_be_exported_is_told(trained, tmp_path):
    with pytest.raises(SystemExit, match="latest: cannot be read: no complete checkpoint here"):
        main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    trained(**DRAWN)
    with pytest.raises(SystemExit, match="trained all weights .*; leave out --merge"):
        main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--merge"])
    shard = tmp_path / "run" / "checkpoints" / "step-000002" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match="shard-00000.safetensors: damaged"):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
