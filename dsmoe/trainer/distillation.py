"""Self-distillation: the sparse mode learns from the all-experts mode, of the same weights or of a frozen checkpoint.

Source of the loss: arXiv 1503.02531 (temperature 1); of distilling subnetworks from the whole model they are part of:
arXiv 1908.08962 and 1903.05134 ("in-place distillation").

Shapes: B sequences, S positions, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dsmoe.checkpoint.pretrained import load_pretrained
from dsmoe.config.routing import DENSE
from dsmoe.config.run import DistillationSettings
from dsmoe.errors import UserError
from dsmoe.model import DSMoEForCausalLM, model_inputs, set_routing, use_routing
from dsmoe.trainer.statistics import PARTS

_CHUNK_ENTRIES = 1 << 24  # float32 log-probabilities of a chunk stay below 64 MiB


def kl_divergence(student_BSV: Tensor, teacher_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum over the positions that have a label of KL(teacher || student), in nats.

    Args:
        student_BSV: logits, with gradients.
        teacher_BSV: logits.
        labels_BS: int64; -100 where there is no label.

    Returns:
        A float32 scalar.
    """
    labelled = (labels_BS != -100).flatten().nonzero()[:, 0]
    student, teacher = (logits.flatten(0, 1) for logits in (student_BSV, teacher_BSV))
    total = student.new_zeros((), dtype=torch.float32)
    for rows in labelled.split(max(1, _CHUNK_ENTRIES // student.shape[-1])):
        target = teacher[rows].float().log_softmax(-1)
        found = student[rows].float().log_softmax(-1)
        total = total + (target.exp() * (target - found)).sum()
    return total


class Distiller:
    """Gives the teacher's logits and the loss against them.

    Args:
        settings: coefficient and teacher.
        accelerator: of the run.
        model: the student, unwrapped; also the teacher where the settings name none.
        precision: of the run, "f32" or "bf16"; the teacher's too, whatever casts the student's forwards.

    Raises:
        UserError: a teacher with another vocabulary, or none there.
    """

    def __init__(
        self,
        settings: DistillationSettings,
        accelerator: Accelerator,
        model: DSMoEForCausalLM,
        precision: str = "f32",
    ) -> None:
        self.settings, self.accelerator, self.precision = settings, accelerator, precision
        self.frozen: DSMoEForCausalLM | None = None
        if settings.teacher and settings.coef:
            teacher, folder = load_pretrained(Path(settings.teacher), torch.float32)
            if teacher.config.vocab_size != model.config.vocab_size:
                raise UserError(
                    f"distillation.teacher {folder}: {teacher.config.vocab_size} vocabulary entries, the model has "
                    f"{model.config.vocab_size}"
                )
            if teacher.config.kind == "dsmoe":
                for part in PARTS:
                    set_routing(teacher, part, DENSE)
            self.frozen = teacher.to(accelerator.device).eval().requires_grad_(False)

    def wanted(self, model: Any) -> bool:
        """Whether there is anything to learn now: a model in all-experts mode is its own teacher's equal."""
        if not self.settings.coef:
            return False
        config = model.config
        return self.frozen is not None or not all(map(config.keeps_all, PARTS))

    def add(
        self, loss: Tensor, outputs: Any, model: Any, batch: dict[str, Tensor], num_labels: Tensor
    ) -> Tensor:
        """(1 - coef) * loss + coef * KL(teacher || student) per label.

        Args:
            loss: language-modelling loss of the micro-batch, divided by the global number of labels.
            outputs: of the student.
            model: the student, unwrapped.
            batch: the micro-batch.
            num_labels: labels of the global batch.
        """
        coef = self.settings.coef
        kl = kl_divergence(outputs.logits, self._teacher_logits(model, batch), batch["shift_labels"])
        return (1 - coef) * loss + coef * kl / num_labels

    @torch.no_grad()
    def _teacher_logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        device = self.accelerator.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            if self.frozen is not None:
                return self.frozen(**model_inputs(batch), use_cache=False).logits
            with use_routing(model, mlp=DENSE, attention=DENSE):
                return model(**model_inputs(batch), use_cache=False).logits
