"""Fully sharded training (torch's FSDP2): each process keeps its part of every block.

A block's weights are gathered for the moment it runs and its gradients are added into the parts
again, so weights, gradients and both moments of the blocks of teacher and student take 1/P of the
memory in each of P processes; embedding, final norm and head stay whole, and so does the best state
on the CPU. What is trained is the same as without sharding. Every process loads the whole model
before it gives parts of it away.

Only for dense students: codes and masks would have to be cut along with their weights. All
processes must run the same blocks equally often, so a batch divides by the processes, the student
writes no rows, and each process measures all held-out rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from compressor.errors import RecipeError
from compressor.modeling.whole import Slot, WholeModel, whole_tensor
from compressor.recipe import DistillConfig


def check_sharding(config: DistillConfig, slots: list[Slot], processes: int) -> None:
    """Refuse what cannot be sharded.

    Raises:
        RecipeError: adapters, codes, masks, own rows, timed checkpoints or an uneven batch (RC17).
    """
    problems = {
        "train: lora": any(s.kind == "adapter" for s in slots),
        "a quantized or masked student": any(s.export or s.keep is not None for s in slots),
        "on_policy": config.on_policy is not None,
        "checkpoint_minutes": config.checkpoint_minutes is not None,
        f"a batch of {config.batch_size} rows in {processes} processes": config.batch_size
        % processes
        > 0,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise RecipeError(
                f"sharding: fsdp does not go with {problem}",
                code="RC17",
                where=config.where("sharding"),
                fix="use sharding: none, or change that",
            )


def shard(model: WholeModel, slots: list[Slot], processes: int) -> list[Slot]:
    """Share the blocks of a model among all processes; the slots with what is left here."""
    mesh = init_device_mesh(model.device.type, (processes,))
    homes: dict[int, tuple[nn.Module, str]] = {}
    for block in model.blocks:
        for module in block.module.modules():
            homes |= {id(p): (module, n) for n, p in module.named_parameters(recurse=False)}
        sharded = fully_shard(block.module, mesh=mesh)
        assert isinstance(sharded, FSDPModule)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        sharded.set_gradient_divide_factor(1.0)
    found = []
    for slot in slots:
        home = homes.get(id(slot.parameter))
        parameter = slot.parameter if home is None else home[0].get_parameter(home[1])
        found.append(replace(slot, parameter=parameter))
    return found


def is_sharded(tensor: Tensor) -> bool:
    """Whether only a part of it is here."""
    return isinstance(tensor, DTensor)


def shaped_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same in every process, cut as a parameter is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> float:
    """Scale all gradients together to a norm of at most `most`; the norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = torch.nn.utils.get_total_norm([g for g in gradients if not is_sharded(g)])
    shared = [g for g in gradients if is_sharded(g)]
    others = whole_tensor(torch.nn.utils.get_total_norm(shared)) if shared else torch.zeros(())
    norm = float(torch.linalg.vector_norm(torch.stack([parts.float(), others.to(parts.device)])))
    for gradient in gradients:
        gradient.mul_(min(1.0, most / (norm + 1e-6)))
    return norm
