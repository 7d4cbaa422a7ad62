"""One training run: one seed, one folder."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from dsmoe.accounting import total_parameters
from dsmoe.checkpoint import save_pretrained
from dsmoe.config.run import RunConfig
from dsmoe.data.corpus import TokenCorpus
from dsmoe.data.loader import TrainLoader
from dsmoe.data.windows import PLACEMENT
from dsmoe.environment import describe
from dsmoe.errors import UserError
from dsmoe.files import write_json
from dsmoe.model import use_routing
from dsmoe.model.kernels import selected_kernel
from dsmoe.optim import build_optimizer, learning_rate_factor, loss_coefficient_factor
from dsmoe.trainer.checkpointer import Checkpointer
from dsmoe.trainer.compiled import CompiledModel, Uncompiled
from dsmoe.trainer.cost import sizes_and_cost
from dsmoe.trainer.distillation import Distiller
from dsmoe.trainer.first_thresholds import first_thresholds
from dsmoe.trainer.guard import Guard
from dsmoe.trainer.launch import count_micro_batches
from dsmoe.trainer.log import RunLog
from dsmoe.trainer.mask_phase import make_controller, missed_target
from dsmoe.trainer.matmul import choose_float32_matmul
from dsmoe.trainer.mi_control import make_mi_controller
from dsmoe.trainer.signals import StopSignals
from dsmoe.trainer.starting_point import first_model
from dsmoe.trainer.state import LoopState
from dsmoe.trainer.statistics import RunningMean, report
from dsmoe.trainer.step import Stepper, StepResult
from dsmoe.trainer.strategy import strategy
from dsmoe.trainer.validation import Validator


class TrainingRun:
    """A run from its first step (or its newest intact checkpoint) to `final/`."""

    def __init__(
        self, config: RunConfig, seed: int, folder: Path, accelerator: Accelerator, signals: StopSignals
    ) -> None:
        self.config, self.seed, self.folder, self.accelerator = config, seed, folder, accelerator
        self.corpus = TokenCorpus(config.data.path)
        self.loader = TrainLoader(
            self.corpus,
            sequence_length=config.data.sequence_length,
            seed=seed if config.data.order_seed is None else config.data.order_seed,
            weights=config.data.weights,
            isolate_documents=config.data.isolate_documents,
            unique_fraction=config.data.unique_fraction,
        )
        self.micro_batches = count_micro_batches(config.train, accelerator.num_processes)
        set_seed(seed)
        self.raw_model = first_model(config, self.corpus)
        self.validator = Validator(config, self.corpus, accelerator, self.raw_model)
        self.parallel = strategy(accelerator, config.train.sharding, config.train.precision)
        model, optimizer, self.raw_optimizer = self.parallel.prepare(
            self.raw_model, lambda model: build_optimizer(model, config.optim)
        )
        self.compiled = (
            CompiledModel(self.raw_model, accelerator.device.type) if config.train.compile else Uncompiled()
        )
        running = None
        if config.router_loss.mi_statistics == "running":
            running = RunningMean(config.router_loss.mi_running_decay)
        self.state = LoopState(
            make_controller(config.mask_phase, self.raw_model.config, config.total_steps), Guard(config.guard), running,
            make_mi_controller(config.router_loss, self.raw_model.config),
        )  # fmt: skip
        self.controller, self.mi_control = self.state.controller, self.state.mi_control
        self.stepper = Stepper(
            accelerator,
            model,
            optimizer,
            config.router_loss,
            config.optim.grad_clip,
            running,
            self.parallel,
            self.state.guard,
            Distiller(config.distillation, accelerator, self.raw_model, config.train.precision),
            self.mi_control,
        )
        self.log = RunLog(folder, accelerator)
        self.environment = {
            **describe(),
            "kernel": selected_kernel(accelerator.device.type),
            "float32_matmul": choose_float32_matmul(config.train.float32_matmul, accelerator.device.type),
            "num_processes": accelerator.num_processes,
            "corpus": self.corpus.fingerprint,
        }
        self.checkpointer = Checkpointer(
            config, seed, folder, accelerator, self.raw_model, self.raw_optimizer, self.parallel, self.state, self.log,
            self.environment, self.corpus.tokenizer_dir, signals,
        )  # fmt: skip

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state.step

    # --- the loop -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start afresh, or resume.

        Raises:
            UserError: there is something to resume, and it is damaged or of another run.
        """
        self.checkpointer.begin()
        self.accelerator.print(
            f"{self.config.name}: {total_parameters(self.raw_model.config):,}"
            f" parameters, {self.config.total_steps} steps of {self.config.tokens_per_step:,} tokens, "
            f"kernel {self.environment['kernel']}, {self.accelerator.num_processes} process(es); epochs: "
            + ", ".join(f"{name} {times:.2f}" for name, times in self._epochs().items())
        )

    def run(self) -> dict[str, Any]:
        """Train to the end, after `begin`; returns the summary that also stands in summary.json."""
        config, total = self.config, self.config.total_steps
        eval_every = max(1, config.train.eval_every_tokens // config.tokens_per_step)
        # a step of the mask phase would leave the compiler little to be wrong in
        if self.step < total and self.parallel.holds_all and not self.controller.active_at(self.step):
            self.compiled.check(self._batches()[0], self.accelerator)
        self._restart_clock()
        with tqdm(total=total, initial=self.step, disable=not self.accelerator.is_main_process, unit="step",
                  desc=f"{config.name} seed {self.seed}", dynamic_ncols=True, smoothing=0.1) as bar:  # fmt: skip
            while self.step < total:
                result = self._one_step(total)
                self.state.step += 1
                bar.update()
                if result.skipped:
                    self._skipped(result)
                elif self.step % config.train.log_every_steps == 0 or self.step == total:
                    self._log(result, bar)
                if config.train.eval_every_tokens and self.step % eval_every == 0 and self.step < total:
                    self._validate()
                self.checkpointer.after_step()
        return self._finish()

    def _one_step(self, total: int) -> StepResult:
        config = self.config
        factor = learning_rate_factor(self.step, total, config.optim)
        for group in self.raw_optimizer.param_groups:
            group["lr"] = config.optim.learning_rate * factor * group["lr_scale"]
        mi_factor = loss_coefficient_factor(self.step, total, config.router_loss)
        batches = self._batches()
        if self.controller.active_at(self.step) and self.raw_model.config.num_experts > 1:
            return self._masked_step(batches, mi_factor)
        result = self.stepper.step(batches, mi_factor)
        # without the loss nothing answers to the coefficient
        if self.mi_control is not None and result.skipped is None and mi_factor:
            self.mi_control.update(result.statistics["mlp"])
        return result

    def _masked_step(self, batches: list[dict[str, torch.Tensor]], mi_factor: float) -> StepResult:
        """A step of the mask phase."""
        controller, before = self.controller, self.controller.state()
        with self.compiled.as_written():
            controller.start(lambda shares: first_thresholds(self.stepper, batches, shares))
        routing = controller.routing(self.step, self.raw_model.config.num_experts)
        with self.compiled.moving_thresholds(), use_routing(self.raw_model, **routing):
            result = self.stepper.step(batches, mi_factor, masked=True)
            if result.skipped is None:
                self.state.masked.add(self.raw_model.config, result.statistics)
        if result.skipped is None:
            statistics = result.statistics["mlp"]
            share = float((statistics.load_LN.mean() / statistics.num_tokens).item())
            controller.update(share, self.step)
        else:
            controller.load(before)
        return result

    def _batches(self) -> list[dict[str, torch.Tensor]]:
        """This process's micro-batches of the present step; sample numbers depend on the step alone."""
        train, accelerator = self.config.train, self.accelerator
        first = self.config.data.first_sample + self.step * train.global_batch_size
        first += accelerator.process_index * train.micro_batch_size
        stride = train.micro_batch_size * accelerator.num_processes
        batches = []
        for index in range(self.micro_batches):
            batch = self.loader.batch(first + index * stride, train.micro_batch_size)
            batches.append({key: value.to(accelerator.device) for key, value in batch.items()})
        return batches

    # --- logging, validation, checkpoints -------------------------------------------------------------------

    def _restart_clock(self) -> None:
        """Speeds are measured from here on."""
        self.clock = (self.step, time.perf_counter())

    def _log(self, result: StepResult, bar: tqdm) -> None:
        step, since = self.clock
        rate = (self.step - step) * self.config.tokens_per_step / max(1e-9, time.perf_counter() - since)
        line = {
            "step": self.step,
            "tokens": self.step * self.config.tokens_per_step,
            "lm_loss": result.lm_loss,
            "learning_rate": self.raw_optimizer.param_groups[0]["lr"],
            "grad_norm": result.grad_norm,
            "tokens_per_second": round(rate, 1),
            "router": report(result.statistics),
        }
        shown = {"lm": f"{result.lm_loss:.3f}", "tok/s": f"{rate:,.0f}"}
        if self.controller.steps:
            line["mask_phase"] = self.controller.shown(self.step - 1)
        if self.mi_control is not None:
            line["mi_coefs"] = self.mi_control.coefs
        active = self.validator.active_experts(self.controller)
        if active is not None:
            line["active_experts"] = [round(value, 3) for value in active]
            shown["active"] = f"{sum(active) / len(active):.1f}/{self.raw_model.config.num_experts}"
        bar.set_postfix(shown)
        self.log.write(line)
        self._restart_clock()

    def _validate(self) -> dict[str, Any]:
        with self.compiled.as_written():
            found = self.validator.validate(self.controller)
        self.log.write({"step": self.step, "tokens": self.step * self.config.tokens_per_step, **found})
        self._restart_clock()
        return found

    def _skipped(self, result: StepResult) -> None:
        """Tell that the guard left a step out; raise UserError where there were too many."""
        guard = self.state.guard
        self.log.write(
            {"step": self.step, "tokens": self.step * self.config.tokens_per_step, "skipped": result.skipped,
             "skipped_total": guard.total, "skipped_consecutive": guard.consecutive}
        )  # fmt: skip
        exhausted = guard.exhausted()
        if exhausted is None:
            return
        # who continues has seen it: the row starts anew
        guard.consecutive = 0
        self.checkpointer.save()
        raise UserError(
            f"{self.folder}: {exhausted}, the last at step {self.step}: {result.skipped}; the last good weights "
            "are in the newest checkpoint: lower optim.learning_rate, look at the data, or allow more"
        )

    def _finish(self) -> dict[str, Any]:
        found = self._validate()
        active = found.get("active_experts_sparse")
        missed = active and missed_target(self.controller, active, self.raw_model.config.num_experts)
        if missed:
            self.accelerator.print(missed)
        measured = self.validator.measured
        with self.compiled.as_written():
            tested = self.validator.test(self.controller)
        summary: dict[str, Any] = {
            "name": self.config.name,
            "kind": self.raw_model.config.kind,
            "seed": self.seed,
            "tokens": self.config.total_steps * self.config.tokens_per_step,
            **found,
            **tested,
            "evaluation_windows": PLACEMENT,
            **self._cost(measured),
            "epochs": self._epochs(),
            "training_seconds": round(self.state.elapsed(), 1),
            "skipped_steps": self.state.guard.total,
            **self.controller.summary(),
            "mi_coefs": None if self.mi_control is None else self.mi_control.coefs,
            "config": dataclasses.asdict(self.config),
            "environment": self.environment,
        }
        weights = self.parallel.weights(self.raw_model)
        if self.accelerator.is_main_process:
            save_pretrained(
                self.raw_model,
                self.folder / "final",
                self.corpus.tokenizer_dir,
                overwrite=True,
                weights=weights,
            )
            write_json(self.folder / "summary.json", summary)
        self.accelerator.wait_for_everyone()
        self.accelerator.print(json.dumps({"final": str(self.folder / "final"), **found}))
        return summary

    def _epochs(self) -> dict[str, float]:
        """How often each source has been read, by its name."""
        first = self.config.data.first_sample
        last = first + self.config.total_steps * self.config.train.global_batch_size
        before, after = self.loader.epoch(first), self.loader.epoch(last)
        return {name: round(after[name] - before[name], 4) for name in after}

    def _cost(self, mean_active: dict[str, list[float]]) -> dict[str, Any]:
        stepper = self.stepper
        teacher = stepper.distiller.frozen if stepper.distiller is not None else None
        return sizes_and_cost(
            self.config,
            self.raw_model.config,
            mean_active,
            self.state.masked,
            gathers=stepper.needs_gathering(self.micro_batches),
            teacher=None if teacher is None else teacher.config,
        )
