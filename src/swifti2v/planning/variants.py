"""Costs of a clip from smaller files, whose linear layers stay packed and are made whole one at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from swifti2v.errors import ConfigError
from swifti2v.models.loading.sources import ModelIndex
from swifti2v.planning.costs import ClipCosts, ClipWork, StageWork, Weights

WHOLE = "bf16"
"""Variant whose weights are not packed."""
PACKED = ("text_encoder", "stage1_transformer", "stage2_transformer")
"""Components of which there are smaller files."""
LORA_SHARE = 0.025
"""Memory of a LoRA that stays beside packed weights, as a share of them in bfloat16: that of rank 64 in
square layers 5,120 wide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """A way to pack linear layers."""

    bits: float
    """Bits of a weight in memory."""
    copies: float
    """Whole layers in bfloat16 that are held while one is made whole."""


VARIANTS = {
    "fp8": Variant(bits=8, copies=1),
    "gguf-q4": Variant(bits=5.5, copies=4),
}
"""Variants by name.

Source:
    Sizes of the files: Q4_K_M of Wan2.2-TI2V-5B has 3.43 GB for 5.0 billion weights, that of
    Wan2.1-I2V-14B 11.3 GB for 16.4 (QuantStack, city96). Copies: fp8 is cast once; GGUF's blocks
    are spread in float16 by way of several temporary tensors (an estimate).
"""


def in_variant(costs: ClipCosts, index: ModelIndex, name: str) -> ClipCosts:
    """Costs of a model from the files of a variant.

    Args:
        costs: Costs from files in bfloat16.
        index: The model, of which LoRAs are counted.
        name: ``bf16`` or a key of ``VARIANTS``.

    Raises:
        ConfigError: No such variant.
    """
    if name == WHOLE:
        return costs
    if name not in VARIANTS:
        raise ConfigError(f"variant {name!r} is unknown; use {', '.join((WHOLE, *VARIANTS))}")
    num_loras = {role: len(index.components[role].loras) for role in PACKED}
    return PackedCosts(costs, name, VARIANTS[name], num_loras)


class PackedCosts:
    """Costs of a clip with packed linear layers.

    Args:
        costs: Costs with whole ones.
        variant: Name of the variant.
        packing: The variant.
        num_loras: LoRAs by component, which stay beside packed weights.
    """

    def __init__(
        self, costs: ClipCosts, variant: str, packing: Variant, num_loras: Mapping[str, int]
    ) -> None:
        self._costs, self._packing, self._num_loras = costs, packing, num_loras
        self.name = f"{costs.name}:{variant}"

    @property
    def linear(self) -> Mapping[str, str]:
        """Kind of the linear layers by component."""
        return self._costs.linear

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of Stage II's latents."""
        return self._costs.cells

    def count(self, vae_tile: int | None = None, *, offloads_history: bool = False) -> ClipWork:
        """Work of the clip, see ``ClipCounter``."""
        work = self._costs.count(vae_tile, offloads_history=offloads_history)
        return replace(
            work,
            weights={
                role: self._pack(role, part) if role in PACKED else part
                for role, part in work.weights.items()
            },
            stages={name: self._unpack(stage, work) for name, stage in work.stages.items()},
        )

    def _pack(self, role: str, part: Weights) -> Weights:
        """A component whose linear layers are packed; its blocks shrink as all of it does."""
        saved = part.linear_bytes * (1 - self._packing.bits / 16)
        loras = self._num_loras[role] * LORA_SHARE * part.linear_bytes
        share = (part.num_bytes - saved + loras) / part.num_bytes
        return replace(
            part,
            num_bytes=share * part.num_bytes,
            streamed_bytes=share * part.streamed_bytes,
            pinned_bytes=share * part.pinned_bytes,
        )

    def _unpack(self, stage: StageWork, work: ClipWork) -> StageWork:
        """A stage that makes each linear layer whole in each pass: memory and traffic."""
        largest = moved = 0.0
        for role in {*stage.passes} & {*PACKED}:
            part = work.weights[role]
            largest = max(largest, part.largest_linear_bytes)
            written = 2 * self._packing.copies  # and read again
            moved += stage.passes[role] * part.linear_bytes * (self._packing.bits / 16 + written)
        count = replace(
            stage.count,
            peak_bytes=stage.count.peak_bytes + self._packing.copies * largest,
            other_bytes=stage.count.other_bytes + moved,
        )
        return replace(stage, count=count)
