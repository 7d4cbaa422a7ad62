"""The configuration of a training run, as nested dataclasses that jsonargparse fills from YAML and command line."""

import dataclasses
import inspect
import typing
from dataclasses import dataclass, field
from typing import Any

from dsmoe.config.model import DSMoEConfig
from dsmoe.config.objective import DistillationSettings, MaskPhaseSettings, RouterLossSettings
from dsmoe.config.ranges import check_ranges
from dsmoe.config.routing import DENSE, Policy, check_policy
from dsmoe.errors import UserError


def _model_settings() -> Any:
    """A dataclass with exactly the fields that `DSMoEConfig` adds to transformers' own."""
    annotations = inspect.get_annotations(DSMoEConfig)
    fields = [(name, hint, field(default=getattr(DSMoEConfig, name))) for name, hint in annotations.items()]
    made = dataclasses.make_dataclass("ModelSettings", fields, namespace={"__doc__": DSMoEConfig.__doc__})
    made.__module__ = __name__
    return made


ModelSettings: Any = _model_settings()


@dataclass
class DataSettings:
    """The token folder (made by `dsmoe data prepare`) and how it is cut.

    Args:
        path: the folder.
        sequence_length: tokens of a sequence.
        weights: mixture weight of each source; null: those in the folder.
        isolate_documents: keep packed documents from attending to each other.
        order_seed: seed of the order of the text, one for all runs; null: the run's own seed, so that arms are still
            paired seed by seed, and a spread over seeds holds the order's too.
        first_sample: sample of that order to begin with: a run that continues another one skips what it has read.
        validation_split: which split validates: "validation" or "test".
        unique_fraction: share of the training text that is ever read; below 1 it comes in more epochs.
    """

    path: str = ""
    sequence_length: int = 256
    weights: dict[str, float] | None = None
    isolate_documents: bool = False
    order_seed: int | None = 0
    first_sample: int = 0
    validation_split: str = "validation"
    unique_fraction: float = 1.0


@dataclass
class OptimSettings:
    """AdamW and its learning-rate schedule.

    Args:
        learning_rate: peak learning rate.
        schedule: "cosine" or "wsd" (warm-up, stable, linear decay).
        warmup_fraction: share of the steps spent on linear warm-up.
        decay_fraction: share of the steps spent on decay ("wsd").
        min_lr_ratio: final learning rate as a share of the peak.
        weight_decay: of matrices; vectors get none.
        beta1: first moment.
        beta2: second moment.
        eps: epsilon.
        grad_clip: largest norm of the gradient; 0: no clipping.
        router_lr_scale: factor on the learning rate of routers.
    """

    learning_rate: float = 3e-3
    schedule: typing.Literal["cosine", "wsd"] = "cosine"
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    router_lr_scale: float = 1.0


@dataclass
class GuardSettings:
    """Steps that would do harm are skipped: no weight moves, the next step reads the next text.

    Args:
        enabled: skip steps whose loss or gradient is not finite, and spikes where those are asked for.
        spike_stds: how many standard deviations above its running mean a loss or a gradient norm is a spike; 0: never.
        spike_window: steps that the running mean and deviation reach back; spikes are judged after as many good steps.
        max_consecutive: training stops after so many skipped steps in a row; 0: never.
        max_total: training stops after so many skipped steps in all; 0: never.
    """

    enabled: bool = True
    spike_stds: float = 0.0
    spike_window: int = 200
    max_consecutive: int = 10
    max_total: int = 100


@dataclass
class TrainSettings:
    """The loop.

    Args:
        init_from: model folder (or folder of a finished run) whose weights the run starts from; the model is then that
            one, whatever `model` says.
        output_dir: folder of the run; with several seeds each gets a folder `seed-<n>` in it.
        seeds: one run per seed, one after the other, then a comparison.
        total_tokens: tokens to train on.
        global_batch_size: sequences per optimiser step over all processes.
        micro_batch_size: sequences per forward and process; the rest is accumulation.
        precision: "f32", or "bf16" (autocast; weights stay float32; many times slower on CPUs without instructions
            for it, where the run says so).
        float32_matmul: "auto" (oneDNN's fast mode on CPUs where a probe finds it accurate) or "strict".
        attention: implementation of the attention core, as transformers names it. "sdpa": torch's fused one; "eager":
            plain products, which keep all scores for the backward pass and are faster for short sequences on CPU,
            most of all with `compile`.
        compile: run the model through torch.compile, but for validation and, in steps of the mask phase, what routes;
            the first step takes longer.
        gradient_checkpointing: recompute layers in the backward.
        sharding: "none" (every process holds the whole model), "fsdp2" (weights, gradients and moments are sharded
            over the processes by torch's fully_shard), "zero2" (DeepSpeed shards gradients and moments) or "zero3"
            (weights too). A single process shards nothing. Checkpoints are the same files in every case.
        recompute_experts: recompute only the experts' pre-activations in the backward (dense mode): nearly all of the
            saving for a fifth more time in the MLPs.
        num_processes: how many processes must have come up; null: whatever was launched.
        num_threads: torch threads per process; 0: torch's default.
        eval_every_tokens: how often to validate; 0: only at the end.
        eval_tokens: tokens of a validation, in windows spread over the split.
        eval_policy: routing policy at which mean active MLP experts and the sparse validation loss are reported
            along the way (DS-MoE only).
        log_every_steps: how often a line goes into log.jsonl.
        save_every_minutes: how often to write a checkpoint.
        save_every_steps: the same in steps; 0: by time only.
        keep_last: intact checkpoints to keep.
        resume: continue from the newest intact checkpoint in output_dir where there is one.
        overwrite: replace a run that output_dir holds (without it and without resume, it is refused).
        trackers: trackers of accelerate besides log.jsonl, for example ["tensorboard"].
    """

    init_from: str = ""
    output_dir: str = "runs/pretrain"
    seeds: list[int] = field(default_factory=lambda: [0])
    total_tokens: int = 2_000_000
    global_batch_size: int = 32
    micro_batch_size: int = 32
    precision: typing.Literal["f32", "bf16"] = "f32"
    float32_matmul: typing.Literal["auto", "strict"] = "auto"
    attention: typing.Literal["sdpa", "eager"] = "sdpa"
    compile: bool = False
    gradient_checkpointing: bool = False
    recompute_experts: bool = False
    sharding: typing.Literal["none", "fsdp2", "zero2", "zero3"] = "none"
    num_processes: int | None = None
    num_threads: int = 0
    eval_every_tokens: int = 0
    eval_tokens: int = 100_000
    eval_policy: dict[str, Any] = field(default_factory=lambda: {"policy": "threshold", "threshold": 0.48})
    log_every_steps: int = 10
    save_every_minutes: float = 10.0
    save_every_steps: int = 0
    keep_last: int = 2
    resume: bool = False
    overwrite: bool = False
    trackers: list[str] = field(default_factory=list)


@dataclass
class RunConfig:
    """A whole run.

    Args:
        name: what to call it in logs and tables.
        model: the architecture.
        data: the text.
        optim: the optimiser.
        router_loss: the router losses.
        mask_phase: training with the sparse forward at the end.
        distillation: what sparse steps learn from the all-experts mode.
        guard: what becomes of steps that would do harm.
        train: the loop.
    """

    name: str = "run"
    model: ModelSettings = field(default_factory=ModelSettings)  # type: ignore[valid-type]
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    router_loss: RouterLossSettings = field(default_factory=RouterLossSettings)
    mask_phase: MaskPhaseSettings = field(default_factory=MaskPhaseSettings)
    distillation: DistillationSettings = field(default_factory=DistillationSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    train: TrainSettings = field(default_factory=TrainSettings)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step over all processes."""
        return self.train.global_batch_size * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run; a rest of tokens that fills no step is left out."""
        return self.train.total_tokens // self.tokens_per_step

    def model_config(self, **token_ids: int | None) -> DSMoEConfig:
        """The model's configuration, with special token ids added; raises UserError where it is impossible."""
        fields: dict[str, Any] = {**dataclasses.asdict(self.model), **token_ids}
        return DSMoEConfig(**fields)

    def check(self) -> None:
        """Raise UserError on values that can't work, naming the field."""
        check_ranges(self)
        if self.model.kind == "dsmoe":
            self.train.eval_policy = check_policy(
                self.train.eval_policy, self.model.num_experts, "train.eval_policy"
            )
        if not self.data.path:
            raise UserError("data.path is empty; give a token folder made by `dsmoe data prepare`")
        if self.optim.schedule == "wsd" and self.optim.warmup_fraction + self.optim.decay_fraction > 1:
            raise UserError(
                f"optim.warmup_fraction {self.optim.warmup_fraction} and decay_fraction {self.optim.decay_fraction} sum "
                "to more than 1, and schedule 'wsd' has both in one run"
            )
        if not self.train.seeds:
            raise UserError("train.seeds is empty; give at least one seed")
        for seed in self.train.seeds:
            # numpy takes no others
            if not 0 <= seed < 2**32 or self.train.seeds.count(seed) > 1:
                raise UserError(
                    f"train.seeds {self.train.seeds}: {seed} must be from 0 to 2**32 - 1 and stand there once"
                )
        if self.data.validation_split == "train":
            raise UserError(
                "data.validation_split is 'train', which is trained on; use 'validation' or 'test'"
            )
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise UserError(
                f"data.sequence_length {self.data.sequence_length} is above "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        if self.train.total_tokens < self.tokens_per_step:
            raise UserError(
                f"train.total_tokens {self.train.total_tokens} is below one step of {self.tokens_per_step} tokens "
                f"(train.global_batch_size {self.train.global_batch_size} sequences of {self.data.sequence_length})"
            )
        self.router_loss.check()
        self.mask_phase.check()
        self.distillation.check()
        self._check_kind()

    def _check_kind(self) -> None:
        """What the kind of model rules out."""
        kind = self.model.kind
        if kind != "dsmoe" and self.mask_phase.fraction:
            why = "which trains sparsely from the first step, by its own policies"
            raise UserError(
                f"mask_phase.fraction is {self.mask_phase.fraction} with model.kind {kind!r}, "
                f"{why if kind == 'smoe' else 'which has no experts to leave out'}; leave the mask phase out, or use "
                "kind 'dsmoe'"
            )
        for name, wanted in (
            ("mask_phase.fraction", self.mask_phase.fraction),
            ("router_loss.mi_control", self.router_loss.mi_control != "none"),
        ):
            if wanted and self.model.num_experts == 1:
                section, field_name = name.split(".")
                raise UserError(
                    f"{name} is {getattr(getattr(self, section), field_name)!r}, and the model has no MLP experts "
                    "(model.num_experts 1), so it would change nothing; leave it out"
                )
        for name in ("mlp_routing", "attention_routing"):
            policies = getattr(self.model, name)
            policies = policies if isinstance(policies, list) else [policies]
            if kind == "dsmoe" and any((policy or DENSE) != DENSE for policy in policies):
                raise UserError(
                    f"model.{name} with model.kind 'dsmoe': it trains with all its experts, and sparsely in the mask "
                    "phase only; leave the policy out, or use kind 'smoe'"
                )


__all__ = ["DataSettings", "DistillationSettings", "GuardSettings", "MaskPhaseSettings", "ModelSettings", "OptimSettings",
           "Policy", "RouterLossSettings", "RunConfig", "TrainSettings"]  # fmt: skip
