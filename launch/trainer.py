"""transformers.Trainer under context parallelism: what it must do otherwise, as a mixin."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..cp import ContextParallel
from ..cp.batch import KNOWN
from ..cp.shard import KEYWORD

SUPPORTED = "supported is DDP with the loss of cp.loss; leave it out"
REFUSED = (
    "deepspeed", "fsdp", "parallelism_config", "fp16", "fp16_full_eval", "bf16_full_eval",
    "label_smoothing_factor", "neftune_noise_alpha",
)  # fmt: skip
REFUSED_FOR_DATA = ("split_batches", "dispatch_batches")  # of TrainingArguments.accelerator_config
REFUSED_OF_TRAINER = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")


class ContextParallelMixin:
    """Before Trainer, or a subclass of it, among the bases of a class; see `ContextParallelTrainer`.

    All ranks of a context-parallel group get the same batches, of which `cp.shard` takes each rank's part.
    Losses, in logs too, are means over all labels of an optimizer step or of an evaluation, whatever the
    number of ranks and micro-batches. Trainer's DDP averages gradients. Checkpoints are Trainer's.

    cp: made with grad_reduce="mean", all ranks of the job in its axes and data_axes. Give Trainer the model
        that `cp.attach` returned.

    ValueError: `cp`, the model or a setting does not fit. NotImplementedError: a setting is not supported.
    """

    def __init__(self, *args: Any, cp: ContextParallel, **kwargs: Any):
        self.cp = cp
        super().__init__(*args, **kwargs)
        check(self)
        self.model_accepts_loss_kwargs = True  # losses are not to be divided by the number of micro-batches
        self._signature_columns = list(KNOWN)  # columns that reach a batch: those that cp.shard reads

    # -- data -------------------------------------------------------------------------------------

    def get_cp_size(self) -> int:
        """Ranks that share a sequence, by which Trainer divides to count the rows of a step."""
        return self.cp.transport.size

    def get_train_dataloader(self) -> DataLoader:
        return deal_by_replica(super().get_train_dataloader(), self.cp)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """ValueError where replicas could get equally many rows only if some came twice."""
        loader = deal_by_replica(super().get_eval_dataloader(eval_dataset), self.cp)
        rows, together = len(loader.dataset), self.args.eval_batch_size * replicas(self.cp)
        if replicas(self.cp) > 1 and rows % together:
            raise ValueError(
                f"{rows} rows to evaluate do not divide into batches of {together} over all replicas; "
                f"leave out {rows % together}, or change per_device_eval_batch_size"
            )
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """Arguments of the model for each micro-batch of a step, and how many labels all ranks have."""
        batches = islice(epoch_iterator, num_batches)
        shards = [self.cp.shard(self._prepare_inputs(batch)) for batch in batches]
        return [shard.inputs for shard in shards], sum(shard.tokens for shard in shards)

    # -- loss -------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """inputs, num_items_in_batch: from `get_batch_samples`."""
        output = model(**inputs)
        loss = self.cp.loss(output, inputs[KEYWORD], tokens=num_items_in_batch or None)  # 0: no label at all
        return (loss, output) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean loss over all labels, not a mean of batches. NotImplementedError for predictions."""
        if description != "Evaluation":
            raise NotImplementedError(
                "predict: logits of whole sequences; supported is evaluate, of the loss"
            )
        self.callback_handler.eval_dataloader = dataloader
        self.model.eval()
        total, labels = 0.0, 0
        for batch in dataloader:
            (inputs,), count = self.get_batch_samples(iter([batch]), 1, self.args.device)
            with torch.no_grad(), self.accelerator.autocast():
                total += count * self.compute_loss(self.model, inputs).item()
            labels += count
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {f"{metric_key_prefix}_loss": total / max(1, labels)}
        return EvalLoopOutput(None, None, metrics, num_samples=len(dataloader.dataset))


class ContextParallelTrainer(ContextParallelMixin, Trainer):
    """`Trainer(..., cp=cp)`."""


def replicas(cp: ContextParallel) -> int:
    """Groups of ranks that share a sequence."""
    return cp.everyone.size // cp.transport.size


def deal_by_replica(loader: DataLoader, cp: ContextParallel) -> DataLoader:
    """The loader of accelerate, which deals batches to ranks, changed to deal them to groups of ranks."""
    if isinstance(loader.dataset, IterableDataset):
        raise NotImplementedError("an IterableDataset; supported are datasets with a length, read by row")
    if cp.everyone.size > 1:
        dealt = loader.batch_sampler
        own = getattr(getattr(dealt, "batch_sampler", None), "sampler", None)
        if not isinstance(dealt, BatchSamplerShard) or isinstance(own, DistributedSampler):
            raise NotImplementedError(
                f"{type(own or dealt).__name__}, a sampler that deals rows to ranks; leave that to Trainer"
            )
        dealt.num_processes, dealt.process_index = replicas(cp), cp.everyone.rank // cp.transport.size
        dealt.even_batches = dealt.even_batches and replicas(cp) > 1  # one replica repeats no row
    return loader


def check(trainer: Trainer) -> None:
    """Refuses settings under which a run would be wrong."""
    args, cp = trainer.args, trainer.cp
    settings = {name: getattr(args, name, None) for name in REFUSED}
    settings |= {name: getattr(args.accelerator_config, name, None) for name in REFUSED_FOR_DATA}
    settings |= {name: getattr(trainer, name, None) for name in REFUSED_OF_TRAINER}
    if getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        settings["train_sampling_strategy"] = "batch_rebalance"
    if found := [f"{name}={value!r}" for name, value in settings.items() if value]:
        raise NotImplementedError(f"{', '.join(found)} under context parallelism; {SUPPORTED}")
    if cp.model is None or all(module is not cp.model for module in trainer.model.modules()):
        raise ValueError("the model is not attached; give Trainer the one that cp.attach(model) returned")
    if args.n_gpu > 1:
        raise ValueError(f"one process has {args.n_gpu} GPUs; start one for each by torchrun")
    if cp.everyone.size != args.world_size:
        raise ValueError(
            f"cp knows {cp.everyone.size} ranks and the job has {args.world_size}, over which DDP averages; "
            "name all axes of the mesh in axes and data_axes"
        )
    if cp.grad_reduce != "mean":
        raise ValueError(
            f'grad_reduce is "{cp.grad_reduce}" and DDP averages; use ContextParallel(grad_reduce="mean")'
        )
    if args.world_size > 1 and args.ddp_find_unused_parameters is not False:
        raise ValueError(
            "ddp_find_unused_parameters must be False: cp.loss uses the head of the model after its forward; "
            "pass TrainingArguments(ddp_find_unused_parameters=False)"
        )
