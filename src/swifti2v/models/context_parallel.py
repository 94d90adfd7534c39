"""One window over several processes: each has a band of rows of every frame.

Between the self-attentions a token needs no other, so each process computes its rows alone, with the
modulation of whole frames. In a self-attention the processes exchange tokens for heads (Ulysses): each
attends with a part of the heads over all tokens.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from swifti2v.errors import ConfigError, ShapeError


@contextmanager
def join_processes(number: int, device: torch.device) -> Iterator[bool]:
    """Take part in the processes that a launcher such as ``torchrun`` started.

    Args:
        number: How many there should be.
        device: Device of this process.

    Yields:
        Whether this process is the first, which writes files.

    Raises:
        ConfigError: The launcher started another number.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != number:
        raise ConfigError(
            f"{number} processes are to share a window, but {started} were started; start them with "
            f"torchrun --nproc-per-node {number}"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank() == 0
        dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def require_heads(transformer: Any, number: int) -> None:
    """Refuse a number of processes into which the attention heads do not divide.

    Args:
        transformer: Its configuration is read, not its weights.
        number: Processes.

    Raises:
        ConfigError: The heads do not divide.
    """
    heads = transformer.config["num_attention_heads"]
    if heads % number:
        raise ConfigError(f"{heads} attention heads do not divide into {number} processes")


def parallelize(transformer: nn.Module, number: int, device: torch.device) -> None:
    """Let a Wan transformer share its tokens with the other processes, from the next call on.

    Args:
        transformer: ``SegmentTransformer3DModel``, which is divided into bands of rows, or
            ``WanTransformer3DModel``, divided as diffusers divides it.
        number: Processes.
        device: Device of this process.

    Raises:
        ConfigError: The heads do not divide.

    Source:
        Ulysses (arXiv:2309.14509), as in diffusers' ``ContextParallelConfig``; its
        ``enable_parallelism`` asks for an accelerator, so what it does is done here.
    """
    model: Any = transformer
    require_heads(model, number)
    config = ContextParallelConfig(ulysses_degree=number)
    parallel = ParallelConfig(context_parallel_config=config)
    mesh = init_device_mesh(device.type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel.setup(dist.get_rank(), number, device, mesh=mesh)
    model._parallel_config = parallel
    for module in model.modules():
        processor: Any = getattr(module, "processor", None)
        if hasattr(processor, "_parallel_config"):
            processor._parallel_config = parallel
    apply_context_parallel(model, config, model._cp_plan)


@dataclass(frozen=True, slots=True)
class Bands:
    """Division of a window's rows; one band is the whole window."""

    number: int = 1
    index: int = 0
    """Band of this process."""
    group: Any = None

    @classmethod
    def of(cls, transformer: nn.Module) -> "Bands":
        """The division that ``parallelize`` made, or one band."""
        parallel: Any = getattr(transformer, "_parallel_config", None)
        if parallel is None:
            return cls()
        config = parallel.context_parallel_config
        mesh = config._ulysses_mesh
        return cls(config.ulysses_degree, mesh.get_local_rank(), mesh.get_group())

    def rows(self, number: int) -> range:
        """Rows of tokens that this process has of ``number``.

        Raises:
            ShapeError: They do not divide.
        """
        each, rest = divmod(number, self.number)
        if rest:
            raise ShapeError(
                f"{number} rows of tokens do not divide into {self.number} processes; choose another "
                "height or number of processes"
            )
        return range(self.index * each, (self.index + 1) * each)

    def take(self, latents: Tensor) -> Tensor:
        """The band ``[B, C, N, h / number, w]`` of latents."""
        return latents if self.number == 1 else latents.chunk(self.number, dim=3)[self.index]

    def gather(self, cells: Tensor) -> Tensor:
        """All bands ``[B, C, N, h, w]`` as one, on every process."""
        if self.number == 1:
            return cells
        gathered: Tensor = collectives.all_gather_tensor(cells.contiguous(), 3, self.group)
        return gathered
