"""The settings of what a run learns besides language modelling: router losses, the mask phase, distillation."""

import typing
from dataclasses import dataclass, field

from dsmoe.errors import UserError


@dataclass
class RouterLossSettings:
    """Coefficients of the router losses; each multiplies a sum over layers.

    Under `mi_control` the coefficient of the MLP routers' mutual information is steered to a wanted share of experts
    with N * p > `mi_control_threshold`, measured on the training batch: after every good step outside the mask phase it
    is multiplied by exp(gain * relative error of the share, clipped to -1..1), from `router_mi_loss_coef_mlp` on and
    within a hundredth and a hundred times that. In the mask phase, and while the schedule's factor is 0 (it has no
    effect then), it stays where it is.

    Args:
        router_mi_loss_coef_mlp: mutual information of the MLP routers (the paper's alpha).
        router_mi_loss_coef_attention: the same of the attention routers.
        mi_schedule: what both are multiplied with, by the two fractions below: "constant" (1), "ramp" (linear from 0
            to 1) or "decay" (linear from 1 to `mi_final_factor`).
        mi_ramp_start: share of the steps at which the ramp or the decay begins.
        mi_ramp_end: share of the steps at which it has ended.
        mi_final_factor: what "decay" ends at.
        mi_statistics: p(e) over the global batch of data-parallel processes and of accumulated micro-batches: "exact"
            (an extra forward without gradients when accumulating) or "running" (a running average over steps and
            micro-batches: cheap, approximate).
        mi_running_decay: decay of the running average per micro-batch.
        mi_control: "none" (the coefficient is fixed), "model" (steered, one for all layers, by their mean share) or
            "layer" (each layer has its own, all with the same target).
        mi_target_active: wanted share of experts above the threshold, between 0 and 1.
        mi_control_gain: relative change of the coefficient per step and unit of relative error.
        mi_control_threshold: on N * p (the paper's epsilon).
        load_balancing_coef: Switch load balancing of the MLP routers (attention routers have none); beside the mutual
            information it also keeps the routers of a DS-MoE from collapsing onto few experts early on.
        router_z_loss_coef: z-loss of all routers.
    """

    router_mi_loss_coef_mlp: float = 0.0
    router_mi_loss_coef_attention: float = 0.0
    mi_schedule: typing.Literal["constant", "ramp", "decay"] = "constant"
    mi_ramp_start: float = 0.0
    mi_ramp_end: float = 0.5
    mi_final_factor: float = 0.0
    mi_statistics: typing.Literal["exact", "running"] = "exact"
    mi_running_decay: float = 0.9
    mi_control: typing.Literal["none", "model", "layer"] = "none"
    mi_target_active: float = 0.33
    mi_control_gain: float = 0.02
    mi_control_threshold: float = 0.48
    load_balancing_coef: float = 0.0
    router_z_loss_coef: float = 0.0

    def check(self) -> None:
        """Raise UserError on values that can't work, naming the field."""
        if self.mi_schedule != "constant" and self.mi_ramp_start > self.mi_ramp_end:
            raise UserError(
                f"router_loss.mi_ramp_start is {self.mi_ramp_start} and mi_ramp_end {self.mi_ramp_end}; the start can't "
                "come after the end"
            )
        if self.mi_control == "none":
            return
        if not 0 < self.mi_target_active < 1:
            raise UserError(
                f"router_loss.mi_target_active is {self.mi_target_active}; it must be a share between 0 and 1"
            )
        for name in ("mi_control_gain", "mi_control_threshold", "router_mi_loss_coef_mlp"):
            value = getattr(self, name)
            if not value > 0:
                raise UserError(
                    f"router_loss.{name} is {value}; mi_control {self.mi_control!r} needs one above 0"
                )


@dataclass
class MaskPhaseSettings:
    """The last part of training with the sparse policy in the forward, so that the model learns to do without.

    The threshold (on N * p, one for all layers) is steered in closed loop to the wanted share of active experts. With
    one target it starts at 0.5, and takes some dozens of steps to get there: the run says at its end where it hasn't.

    Args:
        fraction: share of the steps at the end that run with the mask; 0: none.
        target_active: wanted mean share of active MLP experts.
        targets: instead of the one `target_active`, several shares (at least 1 / num_experts; 1: all experts), one drawn
            for each step, so that one model learns several budgets. Each has its own threshold, which starts where
            the first batch of the phase has that share, and its own loop. Sparse validation runs with the threshold of
            the target nearest to `target_active`.
        anneal: share of the phase's steps over which the wanted share falls from all experts to `target_active`, fast at
            first and ever slower: target + (1 - target) * (1 - x)^3 at the part x of that way (Zhu and Gupta 2017, arXiv
            1710.01878, eq. 1, on which weights are pruned); 0: it is `target_active` from the start.
        gain: relative change of the threshold per step and unit of relative error; with several targets that times
            their number, since each is drawn that much less often.
        policies: instead of a steered threshold, the routing policies of these sparse checkpoints (folders of
            `dsmoe sparsify`), one drawn for each step, so that one model learns several budgets.
        dense_stage: folder that keeps the checkpoint of the last dense step (one a seed), for runs that differ in nothing
            but `mask_phase`: the first writes it there, the others start from it and end as if they had trained
            those steps too; their seconds count them. Empty: none.
    """

    fraction: float = 0.0
    target_active: float = 0.33
    targets: list[float] = field(default_factory=list)
    anneal: float = 0.0
    gain: float = 0.1
    policies: list[str] = field(default_factory=list)
    dense_stage: str = ""

    def check(self) -> None:
        """Raise UserError on values that can't work, naming the field."""
        if not 0 <= self.fraction <= 1 or not 0 < self.target_active <= 1:
            raise UserError(
                f"mask_phase.fraction {self.fraction} and target_active {self.target_active} must "
                "be shares between 0 and 1"
            )
        for target in self.targets:
            if not 0 < target <= 1:
                raise UserError(
                    f"mask_phase.targets: {target} must be a share above 0 and at most 1 (1: all experts)"
                )
        if len(set(self.targets)) < len(self.targets):
            raise UserError(f"mask_phase.targets {self.targets}: a share stands there twice")
        if self.targets and self.policies:
            raise UserError(
                "mask_phase.targets and mask_phase.policies are two ways to train several budgets; give one of them"
            )
        if not 0 <= self.anneal <= 1:
            raise UserError(
                f"mask_phase.anneal is {self.anneal}; it must be a share of the phase, from 0 to 1"
            )
        if self.anneal and (self.targets or self.policies):
            raise UserError(
                f"mask_phase.anneal is {self.anneal}, and only one target_active can fall; leave out targets and policies"
            )
        for name in ("targets", "policies", "anneal"):
            if getattr(self, name) and not self.fraction:
                raise UserError(
                    f"mask_phase.{name} is {getattr(self, name)} and mask_phase.fraction 0, so there is no phase to have "
                    "them; set mask_phase.fraction"
                )
        if self.dense_stage and not 0 < self.fraction < 1:
            raise UserError(
                f"mask_phase.dense_stage is {self.dense_stage!r} and mask_phase.fraction {self.fraction:g}; a stage to "
                "share is what comes before a mask phase, so that fraction must be above 0 and below 1"
            )


@dataclass
class DistillationSettings:
    """While the forward is sparse, the model also learns from the all-experts mode.

    Args:
        coef: weight of KL(teacher || student); the language-modelling loss gets 1 - coef. 0: none.
        teacher: model folder of a frozen teacher, whole on each process (untested with `train.sharding`): a DS-MoE is run
            with all its experts, an SMoE with those that it was trained with; empty: the model itself.
    """

    coef: float = 0.0
    teacher: str = ""

    def check(self) -> None:
        """Raise UserError on values that can't work, naming the field."""
        if not 0 <= self.coef <= 1:
            raise UserError(f"distillation.coef is {self.coef}; it must be from 0 to 1")
        if self.teacher and not self.coef:
            raise UserError(
                f"distillation.teacher is {self.teacher!r} and distillation.coef 0, so nothing would be learned from it; "
                "set coef, or leave the teacher out"
            )
