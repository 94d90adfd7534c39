"""The processes of a training: who they are, how a model is divided over them, what they agree on.

One engine serves one device, many on a machine and many machines: FSDP2 (``fully_shard``) over a
device mesh, with distributed checkpoints. It was chosen over accelerate because it reshards a
checkpoint when the number of ranks changes, keeps parameters' names, and runs on CPUs with gloo,
where the tests run it. A mesh whose shard dimension is 1 is plain data parallelism (DDP), one whose
replicate dimension is larger than 1 is HSDP.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from swifti2v.errors import ConfigError, StorageError

FILES_TIMEOUT = timedelta(days=1)
"""Time that a rank waits for files of another one: they may be many, or far away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Place of this process among those of a training."""

    rank: int
    """Index of this process, from 0."""
    world_size: int
    """Number of processes."""
    device: torch.device
    """Device of this process."""
    mesh: DeviceMesh | None
    """``[replicate, shard]``; None for a single process without a launcher."""
    host: dist.ProcessGroup | None = None
    """The same processes over gloo, for what is done beside the devices; None for one process."""

    @classmethod
    def alone(cls, device: torch.device) -> "Ranks":
        """One process without a launcher."""
        return cls(rank=0, world_size=1, device=device, mesh=None)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a scalar over all ranks."""
        if self.mesh is None:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.mesh is not None:
            dist.barrier()

    def wait_for_files(self) -> None:
        """Until all ranks are here; unlike ``wait`` this may take hours."""
        if self.host is not None:
            dist.barrier(self.host)


@contextmanager
def join_ranks(
    device: torch.device, num_replicas: int = 1, timeout_minutes: float = 30.0
) -> Iterator[Ranks]:
    """Take part in the training that a launcher (``torchrun``, ``accelerate launch``) started.

    Without a launcher this process is alone.

    Args:
        device: ``cpu`` or ``cuda``; a launcher's local rank chooses the GPU.
        num_replicas: Copies of the model; each is divided over the other ranks. 1 is FSDP2, the
            number of ranks is plain data parallelism.
        timeout_minutes: Time that a rank waits for another one in a step before all stop.

    Yields:
        The ranks; the process group ends with the block.

    Raises:
        ConfigError: The number of ranks is not a multiple of ``num_replicas``.
    """
    if "WORLD_SIZE" not in os.environ:
        if num_replicas != 1:
            raise ConfigError(
                f"num_replicas is {num_replicas} but this is one process; start it with torchrun"
            )
        yield Ranks.alone(device)
        return
    world_size = int(os.environ["WORLD_SIZE"])
    if num_replicas < 1 or world_size % num_replicas:
        raise ConfigError(
            f"num_replicas is {num_replicas}; it must divide the {world_size} ranks evenly"
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    try:
        mesh = init_device_mesh(
            device.type,
            (num_replicas, world_size // num_replicas),
            mesh_dim_names=("replicate", "shard"),
        )
        for group in mesh.get_all_groups():  # they were made with the backend's own
            _set_pg_timeout(timeout, group)
        yield Ranks(
            rank=dist.get_rank(),
            world_size=world_size,
            device=device,
            mesh=mesh,
            host=dist.new_group(backend="gloo", timeout=FILES_TIMEOUT),
        )
        dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()


def divide_model(model: nn.Module, ranks: Ranks) -> None:
    """Divide a model's weights over the ranks, in place; a single process keeps them whole.

    Weights and inputs keep their dtype, as ``compute_in`` decides what is computed in bfloat16: a
    policy of FSDP would round norms, modulation tables, noise levels and rotary tables, too.
    """
    if ranks.mesh is None:
        return
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    shard: Any = fully_shard
    names = set(getattr(model, "_repeated_blocks", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in names:
            shard(module, mesh=ranks.mesh, mp_policy=policy)
    # Unlike its default for the outermost module: after a validation the weights are shards again.
    shard(model, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True)


def gather_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU; all ranks take part, and all get them."""
    whole = {}
    for name, value in weights.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        whole[name] = full.detach().cpu().contiguous()
    return whole


def save_model(kind: type[nn.Module], model: Any, directory: Path, ranks: Ranks) -> None:
    """Write a model that may be divided over the ranks as ``kind.from_pretrained`` reads it.

    ``kind`` is the model's own class: dividing it gave it another. All ranks take part.

    Raises:
        StorageError: The files cannot be written.
    """
    state = gather_weights(model.state_dict())
    if not ranks.is_first:
        return
    make: Any = getattr(kind, "from_config", kind)
    with torch.device("meta"):
        whole: Any = make(model.config)
    whole.load_state_dict(state, assign=True)
    try:
        whole.save_pretrained(directory)
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"{directory} cannot be written ({error}); free space and call again with --resume: "
            "the last checkpoint holds the weights"
        ) from None
