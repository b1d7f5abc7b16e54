"""launch/nonfinite.py: a loss or a gradient that is not finite is traced to its tensor, layer and rank."""

from __future__ import annotations

import pool
import pytest
import torch
from test_launch_model import joined
from torch import nn

from sparring.launch.data import prepare_rows
from sparring.launch.nonfinite import find_nonfinite
from sparring.launch.trainee import assemble, build_pattern, train_step

SMALL = {"seq_len": 128, "block_size": 16, "steps": 4, "warmup": 0, "compare": False, "pattern": "dense"}
SMALL |= {"width": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp": 32, "save_every": 0}


class Spoil(torch.autograd.Function):
    """The same, but for one bad element of the output or of the gradient."""

    @staticmethod
    def forward(ctx, x, output, gradient):
        ctx.gradient = gradient
        x = x.clone()
        x.view(-1)[3:5] += output
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient.view(-1)[7] += ctx.gradient
        return gradient, None, None


def spoiled_step(options, name, output, gradient):
    """What one step says, of which the module `name` is bad on rank 1, and whether weights changed."""
    with joined(options) as (config, world):
        trainee = assemble(config, world, build_pattern(config), prepare_rows(config, chief=world.chief))
        if name == "weight":
            with torch.no_grad():
                trainee.model.model.norm.weight.to_local()[-1:] = output
        elif world.rank == 1:
            module = trainee.model.get_submodule(name)
            module.register_forward_hook(lambda module, given, x: Spoil.apply(x, output, gradient))
        before = [p.detach().to_local().clone() for p in trainee.model.parameters()]
        try:
            train_step(config, world, trainee, 2)
            said = ""
        except FloatingPointError as error:
            said = str(error)
        finally:
            trainee.data.close()
            trainee.cp.detach(trainee.model)
        after = [p.detach().to_local() for p in trainee.model.parameters()]
        same = all(x.nan_to_num().equal(y.nan_to_num()) for x, y in zip(before, after, strict=True))
        return said, same


NAN, INF = float("nan"), float("inf")
UP = "model.layers.1.mlp.up_proj"
CASES = {
    "output": (UP, NAN, 0.0, f"the loss of step 2 is nan: output of {UP} has NaN or infinite elements: "
               "2 on rank 1; try a lower --lr"),
    "infinite output": (UP, INF, 0.0, f": output of {UP} has NaN or infinite elements: 2 on rank 1;"),
    "gradient": (UP, 0.0, NAN, "the norm of the gradients of step 2 is nan: gradient of output of "
                 "model.layers.1.post_attention_layernorm has"),
    "weight": ("weight", NAN, 0.0, "weight model.norm.weight has NaN or infinite elements: 1 on rank 0, 1"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "checkpointing"), [*((case, "none") for case in CASES), ("output", "full"), ("gradient", "full")]
)
def test_a_bad_tensor_is_named_with_its_layer_and_rank(case, checkpointing, tmp_path):
    name, output, gradient, message = CASES[case]
    text = tmp_path / "text"
    text.write_text("so it goes " * 200)
    options = SMALL | {"data": str(text), "out": str(tmp_path), "checkpointing": checkpointing}
    results = pool.run(2, spoiled_step, options, name, output, gradient)
    assert results[0] == results[1]
    said, same = results[0]
    assert message in said and same


def test_a_step_that_is_finite_when_it_runs_again_says_so():
    model = nn.Sequential(nn.Linear(2, 2))
    assert "finite" in find_nonfinite(model, lambda: model(torch.ones(1, 2)).sum(), None)


def test_a_parameter_of_which_only_the_gradient_is_bad_is_named():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(2))

        def forward(self):
            return self.scale.sqrt().sum()  # 0 has an infinite slope

    model = Root()
    found = find_nonfinite(model, model, None)
    assert found == "gradient of scale has NaN or infinite elements: 2 on rank 0"
