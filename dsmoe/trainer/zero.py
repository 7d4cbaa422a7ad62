"""Shards by DeepSpeed: ZeRO-2 (gradients and moments) and ZeRO-3 (weights as well).

DeepSpeed is left with what it must do: partition, reduce, step. Learning rates and groups are those of this project's
AdamW (DeepSpeed swaps the groups' parameters for its flat partitions), micro-batches come with their weights already in
the loss, the guard sees loss and norm before the step. Clipping is DeepSpeed's, whose formula is torch's.

Impossible here, and refused: taking a step whose gradient isn't finite (`guard.enabled: false`; DeepSpeed would leave it
out without a word), a checkpoint whose parameters have taken different numbers of steps, offloading.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dsmoe.errors import UserError
from dsmoe.trainer.parallel import Replicated, Tensors, cast_forwards

STATES = ("exp_avg", "exp_avg_sq")


class Zero(Replicated):
    """Every process holds a part of gradients and moments (stage 2), and of the weights (stage 3).

    Args:
        accelerator: of the run, made with the plugin of `dsmoe.trainer.zero_setup`.
        precision: "f32" or "bf16" (autocast; weights stay float32).
    """

    holds_all = False

    def __init__(self, accelerator: Accelerator, precision: str = "f32") -> None:
        super().__init__(accelerator)
        self.precision = precision
        self.stage: int = accelerator.deepspeed_plugin.zero_stage
        self.engine: Any = None
        self.names: dict[str, Any] = {}

    def prepare(
        self, model: nn.Module, build: Callable[[nn.Module], torch.optim.Optimizer]
    ) -> tuple[Any, Any, Any]:
        """See `Replicated.prepare`."""
        if self.precision == "bf16":
            cast_forwards(model, self.accelerator.device)
        self.names = dict(model.named_parameters())
        whole = sum(parameter.numel() for parameter in self.names.values())
        optimizer = build(model)
        self.engine, _ = self.accelerator.prepare(model, optimizer)
        self._check_partitioned(whole)
        return self.engine, Steps(self.engine), optimizer

    def _check_partitioned(self, whole: int) -> None:
        """DeepSpeed with a setting amiss trains all the same, each process with all of it.

        Args:
            whole: elements of the model.
        """
        processes = self.accelerator.num_processes
        stage = getattr(self.engine, "zero_optimization_stage", lambda: None)()
        held = sum(flat.numel() for flat, _ in self._partitions())
        # partitions are padded: to a multiple of the processes by parameter (3), to some more by group (2)
        padding = len(self.names) + 64 * len(self._partitions())
        right = stage == self.stage and held <= whole / processes + padding
        if self.stage == 3:
            right &= all(
                parameter.ds_tensor.numel() <= -(-parameter.ds_numel // processes)
                for parameter in self.names.values()
            )
        if not right:
            raise RuntimeError(
                f"DeepSpeed was to shard {whole:,} parameters over {processes} processes at stage {self.stage}, but this "
                f"process holds {held:,} at stage {stage}"
            )

    def _partitions(self) -> list[tuple[Tensor, list[nn.Parameter]]]:
        """This process's flat partitions, which AdamW steps, each with the parameters that it holds parts of."""
        zero = self.engine.optimizer
        if self.stage == 3:
            return list(zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups))
        return list(zip(zero.single_partition_of_fp32_groups, zero.bit16_groups))

    # --- a step ---------------------------------------------------------------------------------------------

    def synchronised(self, model: Any, last: bool) -> AbstractContextManager:
        """Gradients are reduced at every micro-batch (they are partitioned), and complete at the last."""
        model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, model: Any, loss: Tensor) -> None:
        """See `Replicated.backward`; accelerate's would step as well."""
        model.backward(loss, scale_wrt_gas=False)

    def clip(self, model: Any, max_norm: float) -> Tensor:
        """The norm of the whole gradient, from the partitions; DeepSpeed clips when it steps."""
        norms = [
            torch.linalg.vector_norm(gradient.float()).double()
            for group in model.optimizer.averaged_gradients.values()
            for gradient in group
        ]
        squares = torch.stack(norms).square().sum()
        return self.accelerator.reduce(squares, reduction="sum").sqrt()

    # --- checkpoints ----------------------------------------------------------------------------------------

    def weights(self, model: nn.Module) -> Tensors | None:
        """Gathered in the main process, one by one; the others get {}. All must call it."""
        from deepspeed import zero

        whole: dict[int, Tensor] = {}
        state = model.state_dict(keep_vars=True)
        main = self.accelerator.is_main_process
        for value in {id(value): value for value in state.values()}.values():
            with zero.GatheredParameters([value]) if hasattr(value, "ds_id") else nullcontext():
                if main:
                    # a copy: the parameters of stage 2 are views of one flat tensor
                    whole[id(value)] = value.detach().to("cpu", copy=True)
        return {name: whole[id(value)] for name, value in state.items()} if main else {}

    def moments(self, optimizer: Any) -> Tensors:
        """Gathered in the main process; the others get {}."""
        from deepspeed.utils import safe_get_full_optimizer_state

        found: Tensors = {}
        names = {id(parameter): name for name, parameter in self.names.items()}
        for flat, parameters in self._partitions():
            state = optimizer.state.get(flat)
            if not state:  # no step was taken yet
                continue
            self._link(flat, parameters, state)
            for parameter in parameters:
                name = names[id(parameter)]
                gathered = {key: safe_get_full_optimizer_state(parameter, key) for key in STATES}
                if self.accelerator.is_main_process:
                    found[f"{name}.step"] = torch.as_tensor(state["step"]).detach().to("cpu", copy=True)
                    found.update({f"{name}.{key}": value.cpu() for key, value in gathered.items()})
        return found

    def load_weights(self, model: nn.Module, weights: Tensors) -> None:
        """See `Replicated.load_weights`; every process reads the whole file and keeps its part."""
        if self.stage == 3:
            self._load_gathered(model, weights)
        else:
            model.load_state_dict(weights)
        # the partitions that AdamW steps are copies
        self.engine.optimizer.refresh_fp32_params()

    def _load_gathered(self, model: nn.Module, weights: Tensors) -> None:
        from deepspeed import zero

        state = model.state_dict(keep_vars=True)
        for name in sorted(state.keys() | weights.keys()):
            shapes = [
                tuple(getattr(found[name], "ds_shape", found[name].shape)) if name in found else None
                for found in (state, weights)
            ]
            if shapes[0] != shapes[1]:
                raise RuntimeError(f"{name}: shape {shapes[1]} instead of {shapes[0]}")
        for name, value in state.items():
            with torch.no_grad(), zero.GatheredParameters([value], modifier_rank=0):
                if self.accelerator.is_main_process:
                    value.copy_(weights[name])

    def part(self, value: Tensor, like: Tensor) -> Tensor:
        """See `Replicated.part`: the whole until `restoring` ends."""
        return value

    @contextmanager
    def restoring(self, optimizer: Any) -> Iterator[Any]:
        """See `Replicated.restoring`: whole moments by whole parameter, put into the partitions at the end."""
        group = {"names": list(self.names), "params": list(self.names.values())}
        whole = SimpleNamespace(param_groups=[group], state={})
        yield whole
        for flat, parameters in self._partitions():
            steps = {float(whole.state[parameter].get("step", 0)) for parameter in parameters}
            if len(steps) > 1:
                raise UserError(
                    f"the checkpoint's parameters have taken different numbers of steps ({sorted(steps)}), and DeepSpeed "
                    "counts them together; go on with --train.sharding fsdp2 or none"
                )
            if steps != {0.0}:
                optimizer.state[flat] = {
                    "step": torch.tensor(steps.pop(), dtype=torch.float32, device=flat.device),
                    **{key: torch.zeros_like(flat) for key in STATES},
                }
                self._link(flat, parameters, optimizer.state[flat])
                for parameter in parameters:
                    self._fill(parameter, whole.state[parameter])

    def _link(self, flat: Tensor, parameters: list[nn.Parameter], state: Tensors) -> None:
        """Tell parameters where their moments lie: at stage 2 DeepSpeed 0.19 forgets all groups but the first."""
        if self.stage == 2:
            for mapping in (parameter._hp_mapping for parameter in parameters):  # type: ignore[attr-defined]
                if mapping is not None:  # a part of the parameter is in this process
                    mapping.set_optim_state_fragment(flat, state)

    def _fill(self, parameter: nn.Parameter, whole: Tensors) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for key in STATES:
            if self.stage == 2:
                safe_set_full_optimizer_state(parameter, whole[key], key)
            else:
                safe_set_local_optimizer_state(parameter, self._local(whole[key], parameter), key)

    def _local(self, whole: Tensor, parameter: Any) -> Tensor:
        """The part of a whole tensor that goes with this process's part of a parameter (the last is padded)."""
        size = parameter.ds_tensor.numel()
        mine = whole.flatten()[self.accelerator.process_index * size :][:size]
        return torch.nn.functional.pad(mine, (0, size - mine.numel()))


class Steps:
    """Steps of a DeepSpeed engine, in the place of an optimiser."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def step(self) -> None:
        """Clip and apply the gradient.

        Raises:
            UserError: DeepSpeed refused it.
        """
        self.engine.step()
        if not self.engine.was_step_applied():
            raise UserError(
                "DeepSpeed leaves out a step whose gradient is not finite, and guard.enabled false asks for it; switch "
                "the guard on, or use --train.sharding fsdp2 or none"
            )

    def zero_grad(self) -> None:
        """Forget the gradient; after a step there is none."""
        zero = self.engine.optimizer
        zero.zero_grad(set_to_none=True)
        if self.engine.zero_optimization_stage() == 3:
            zero.averaged_gradients = {}
            return
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None
            zero.all_grad_tensors[group] = None
