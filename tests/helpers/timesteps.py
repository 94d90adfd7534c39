"""Timesteps that transformers are told, whoever calls them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def told() -> Iterator[list[float]]:
    """Timesteps where they are embedded, call by call; without those of given frames, which are 0."""
    seen: list[float] = []

    def look(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, Timesteps):
            (timesteps,) = args
            seen.extend(timesteps[timesteps > 0].tolist())

    hook = register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()
