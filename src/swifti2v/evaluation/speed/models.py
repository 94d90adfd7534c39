"""Measured models: trained or random weights, one component at a time, and diffusers' class."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor, nn

from swifti2v.config import GenerationConfig
from swifti2v.errors import ConfigError
from swifti2v.jobs.layers import Layer, resolve_config
from swifti2v.models.loading.architectures import Architecture, find_architecture
from swifti2v.models.loading.components import float32_parts, load_component
from swifti2v.models.loading.sources import find_model
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.planning.measurement import free_bytes
from swifti2v.units import format_bytes

STD = 0.02
"""Standard deviation of random weights; with zeros a GPU would draw less power and run faster."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A model and its settings for a measurement."""

    name: str
    """See ``SwiftI2VPipeline.from_pretrained``."""
    device: torch.device
    dtype: torch.dtype
    config: GenerationConfig
    is_random: bool = False
    """Whether weights are drawn instead of read."""

    @classmethod
    def make(
        cls,
        name: str,
        device: torch.device,
        dtype: torch.dtype,
        layers: Sequence[Layer],
        *,
        is_random: bool = False,
    ) -> "Subject":
        """A model with its own settings, some changed."""
        config = resolve_config(name, layers)
        return cls(name=name, device=device, dtype=dtype, config=config, is_random=is_random)

    @property
    def kind(self) -> str:
        """Name of the number type."""
        return str(self.dtype).removeprefix("torch.")

    def architecture(self, role: str) -> Architecture:
        """Architecture of a component."""
        index, root = find_model(self.name)
        return find_architecture(role, index.components[role], root)

    def load(
        self, role: str, dtype: torch.dtype | None = None, home: torch.device | None = None
    ) -> Any:
        """Load a component by itself, in eval mode; type and home are the subject's if not given.

        Raises:
            ConfigError: Random weights would not fit into the free memory.
        """
        index, root = find_model(self.name)
        dtype = dtype or self.dtype
        if self.is_random:
            return make_random(self.architecture(role), role, dtype, self.device, home)
        return load_component(role, index.components[role], root, dtype, home or self.device)


def in_both_types(subject: Subject) -> list[Subject]:
    """The subject; on a CPU in float32 also in bfloat16, for which some CPUs have units."""
    if subject.device.type == "cpu" and subject.dtype == torch.float32:
        return [subject, replace(subject, dtype=torch.bfloat16)]
    return [subject]


def make_random(
    architecture: Architecture,
    role: str,
    dtype: torch.dtype,
    device: torch.device,
    home: torch.device | None = None,
) -> Any:
    """A model with normal weights and norms of 1, the same whenever they are drawn.

    ``device`` draws the weights, one tensor at a time; ``home`` gets them.

    Raises:
        ConfigError: They do not fit into the free memory of ``home``.
    """
    home = home or device
    with init_empty_weights(include_buffers=False):
        model = architecture.make(role)
    keep = float32_parts(model, dtype)
    kinds = {
        name: torch.float32 if keep & set(name.split(".")) else dtype
        for name, _ in model.named_parameters()
    }
    needed = sum(p.numel() * kinds[name].itemsize for name, p in model.named_parameters())
    if needed > (free := free_bytes(home)):
        raise ConfigError(
            f"random weights of {role} take {format_bytes(needed)}, and {format_bytes(free)} are free "
            f"on {home.type}; choose a smaller model, or other stages"
        )
    generator = torch.Generator(device).manual_seed(0)
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if id(parameter) not in parameters:
            value = torch.empty(parameter.shape, device=device)  # the same in every number type
            value = value.normal_(std=STD, generator=generator).to(kinds.get(name, dtype))
            if "norm" in name and not name.endswith("bias"):
                value.fill_(1)
            parameters[id(parameter)] = nn.Parameter(value.to(home), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, parameters[id(parameter)])
    return model.to(home).eval()


class TokenTimestepTransformer(WanTransformer3DModel):
    """Stage II as diffusers' class computes it: a timestep, and so a modulation, for every token.

    Takes what ``SegmentTransformer3DModel`` takes, for ``Stage2Pipeline`` to run it.
    """

    @classmethod
    def from_segment_transformer(
        cls, model: SegmentTransformer3DModel
    ) -> "TokenTimestepTransformer":
        """Make a transformer that shares the weights."""
        with torch.device("meta"):
            transformer = cls(**{k: v for k, v in model.config.items() if not k.startswith("_")})
        transformer.load_state_dict(model.state_dict(), assign=True)
        transformer.rope = model.rope
        result: TokenTimestepTransformer = transformer.eval()
        return result

    def forward(
        self,
        hidden_states: Tensor,
        sigma: Tensor,
        encoder_hidden_states: Tensor,
        temporal_positions: Sequence[int] | None = None,
        num_given: int = 0,
    ) -> Tensor:
        """See ``SegmentTransformer3DModel``; what is left out of the result is computed, too.

        Raises:
            ConfigError: Positions other than 0, 1, ..., which diffusers' class does not know.
        """
        frames, height, width = hidden_states.shape[2:]
        if temporal_positions is not None and list(temporal_positions) != list(range(frames)):
            raise ConfigError("diffusers' transformer only takes renumbered temporal positions")
        _, rows, columns = self.config["patch_size"]
        num_tokens = (height // rows) * (width // columns)
        timestep = (sigma * 1000)[:, :, None].expand(-1, -1, num_tokens).flatten(1)
        output: Tensor = super().forward(
            hidden_states, timestep, encoder_hidden_states, return_dict=False
        )[0]
        return output[:, :, num_given:]


def distance(result: Tensor, reference: Tensor) -> float:
    """Length of the difference, as a part of the length of ``reference``."""
    expected = reference.double()
    return float((result.double() - expected).norm() / expected.norm())
