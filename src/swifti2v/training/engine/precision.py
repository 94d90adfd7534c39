"""Number types in which a training computes."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@contextmanager
def compute_in(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast to a precision, a key of ``DTYPES``; ``float32`` changes nothing."""
    dtype = DTYPES[precision]
    with (
        warnings.catch_warnings(),
        # Without its cache, which would hold a copy of all weights until the block ends.
        torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False),
    ):
        # RMSNorm keeps its weights in float32; that it is not fused is known.
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        # Wan's transformers return a view, which no loss changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        yield
