"""transformers models: what cannot be forgotten, and names that no file can choose."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import tiny_models
import tolerance
import torch
import transformers
from refusals import raises
from transformers import AttentionInterface, AttentionMaskInterface

from sparring.cp import ContextParallel, huggingface

CP = Path(huggingface.__file__).parent


def attached(model, **options):
    """The model and its ContextParallel, in one process."""
    cp = ContextParallel(None, pattern="dense", block_size=16, **options)
    return cp.attach(model, whole_logits=True), cp


# -- features that are refused by name, beyond those of test_huggingface.py and test_functional.py ------


def gpt_oss():
    """Layers of full attention with sink logits."""
    sizes = dict(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=4)
    sizes |= dict(num_key_value_heads=1, intermediate_size=8, num_local_experts=2, num_experts_per_tok=1)
    config = transformers.GptOssConfig(**sizes, layer_types=["full_attention"] * 2)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    return transformers.GptOssForCausalLM(config)


def test_sink_logits_are_refused_by_name():
    with raises(NotImplementedError, "s_aux in GptOssAttention 0; supported is full causal"):
        model, cp = attached(gpt_oss())
        model(**cp.shard({"input_ids": torch.zeros(1, 16, dtype=torch.int64)}).inputs)


def test_four_dimensional_masks_are_refused_wherever_they_come():
    model, cp = attached(tiny_models.llama())
    mask = torch.ones(1, 1, 32, 32).tril()
    ids = torch.zeros(1, 32, dtype=torch.int64)
    with raises(NotImplementedError, "attention_mask with 4 dims; only padding masks [batch, length]"):
        cp.shard({"input_ids": ids, "attention_mask": mask})
    shard = cp.shard({"input_ids": ids})
    with raises(ValueError, "attention_mask must not be passed to an attached model; use cp.shard(batch | "):
        model(**shard.inputs, attention_mask=mask)


@pytest.mark.parametrize(
    "change,error,remedy",
    [
        ({"position_ids": None}, ValueError, "position_ids are missing..; call model(**cp.shard(batch)"),
        ({"sparring_shard": None}, ValueError, "without a shard; call model(**cp.shard(batch).inputs)"),
        ({"labels": torch.zeros(1, 32).long()}, ValueError, "; use cp.shard(batch | {'labels': labels})"),
    ],
)
def test_what_is_missing_is_named_with_the_line_that_mends_it(change, error, remedy):
    model, cp = attached(tiny_models.llama())
    inputs = cp.shard({"input_ids": torch.zeros(1, 32, dtype=torch.int64)}).inputs
    with raises(error, remedy):
        model(**inputs | change)


# -- padding ------------------------------------------------------------------------------------------

REAL = slice(9, 31)  # tokens of the padded row


def padded_batch(fill: int, mask: bool) -> dict:
    ids = torch.arange(40)[None] % tiny_models.VOCAB
    ids[:, : REAL.start], ids[:, REAL.stop :] = fill, fill
    batch = {"input_ids": ids, "position_ids": (torch.arange(40) - REAL.start).clamp(min=0)[None]}
    if mask:
        batch["attention_mask"] = torch.zeros_like(ids)
        batch["attention_mask"][:, REAL] = 1
        del batch["position_ids"]
    return batch


def logits(batch):
    model, cp = attached(tiny_models.llama())
    shard = cp.shard(batch)
    with torch.no_grad():
        return cp.unshard(model(**shard.inputs).logits, shard)


def test_padding_changes_what_tokens_see():
    """Masked, what stands in the padding has no influence, to the last bit; not masked, it has."""
    masked = [logits(padded_batch(fill, True))[:, REAL] for fill in (0, 7)]
    assert torch.equal(*masked)
    alone = logits({"input_ids": padded_batch(0, True)["input_ids"][:, REAL]})
    tolerance.check("fp32", "logits", masked[0], alone, 1e-5)
    documents = padded_batch(7, False)
    documents["document_ids"] = torch.zeros(1, 40, dtype=torch.int64)
    assert (logits(documents)[:, REAL] - alone).abs().max() > 1e-2


@pytest.mark.parametrize("lost", ["attention", "mask"])
def test_registries_cannot_be_half_filled(lost, monkeypatch):
    """A lost function is an error, or changes nothing: masks follow from the shard, not from transformers."""
    expected = logits(padded_batch(0, True))
    model, cp = attached(tiny_models.llama())
    registry = {"attention": AttentionInterface, "mask": AttentionMaskInterface}[lost]
    assert huggingface.NAME in registry()
    monkeypatch.delitem(registry._global_mapping, huggingface.NAME)
    shard = cp.shard(padded_batch(0, True))
    try:
        with torch.no_grad():
            actual = cp.unshard(model(**shard.inputs).logits, shard)
    except (KeyError, ValueError, RuntimeError) as error:
        assert huggingface.NAME in str(error) or "attention" in str(error)
    else:
        assert torch.equal(actual, expected)


# -- the name of the attention function ---------------------------------------------------------------


def test_the_name_calls_no_hub_and_no_flash_attention():
    """transformers loads code from the hub for names with "/", and expects packed inputs for "flash"."""
    assert huggingface.NAME.isidentifier()
    assert "flash" not in huggingface.NAME.lower() and "/" not in huggingface.NAME


def test_the_name_is_a_constant_of_the_source():
    """No parameter, file or configuration chooses what is registered."""
    tree = ast.parse((CP / "huggingface.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)]
    registered = [ast.unparse(n.args[0]) for n in calls if n.func.attr == "register"]
    assert registered == ["NAME", "NAME"]
    names = [ast.unparse(n.args[0]) for n in calls if n.func.attr == "set_attn_implementation"]
    assert sorted(names) == ["NAME", "self.implementation"]


def test_saved_models_do_not_bear_the_name(tmp_path):
    model, cp = attached(tiny_models.llama())
    model.save_pretrained(tmp_path)
    assert huggingface.NAME not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["evil/kernel", huggingface.NAME])
@pytest.mark.parametrize(
    "key", ["_attn_implementation", "_attn_implementation_internal", "attn_implementation"]
)
def test_a_name_in_a_checkpoint_runs_nothing(key, name, tmp_path):
    """CVE-2026-4372: such a name ran code from the hub. Ours in a file is a model that refuses to run."""
    attached(tiny_models.llama())  # registers the name
    tiny_models.llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: name}))
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    except (ValueError, ImportError, OSError) as error:
        assert name in str(error) or "kernels" in str(error)
        return
    if model.config._attn_implementation == huggingface.NAME:
        with raises(ValueError, "no shard reached LlamaAttention; call model(**cp.shard(batch).inputs)"):
            model(torch.zeros(1, 4, dtype=torch.int64))
    else:
        used = model.config._attn_implementation
        assert used == "sdpa" or (used == name and name not in AttentionInterface())  # nothing was loaded
