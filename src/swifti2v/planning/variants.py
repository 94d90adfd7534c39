"""Costs of a clip from smaller files, whose linear layers stay packed and are made whole one at a time."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from swifti2v.errors import ConfigError
from swifti2v.models.loading.sources import WHOLE, ModelIndex
from swifti2v.planning.costs import ClipCosts, ClipWork, StageWork, Weights

PACKED = ("text_encoder", "stage1_transformer", "stage2_transformer")
"""Components that keep packed weights."""
LORA_SHARE = 0.025
"""Memory of a LoRA that stays beside packed weights, as a share of them in bfloat16: that of rank 64 in
square layers 5,120 wide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """A way to pack linear layers."""

    bits: float
    """Bits of a weight in memory."""
    copies: float
    """Whole layers in bfloat16 that are held while one is made whole."""


GGUF_BITS = {
    "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q4_0": 4.5, "Q4_1": 5.0,
    "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5, "IQ4_NL": 4.5, "IQ4_XS": 4.25,
}  # fmt: skip
"""Bits of a weight in the blocks of GGUF's types, scales included."""
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def find_packing(form: str) -> Packing:
    """Packing of a component by ``FileSource.form``.

    Raises:
        ConfigError: No such form.

    Source:
        Copies: fp8 is cast once; GGUF's blocks are spread in float16 by way of several temporary
        tensors (an estimate).
    """
    if form in FLOAT8:
        return Packing(bits=8, copies=1)
    if form in GGUF_BITS:
        return Packing(bits=GGUF_BITS[form], copies=4)
    known = ", ".join((*FLOAT8, *GGUF_BITS))
    raise ConfigError(f"form {form!r} is unknown; use {known}")


def in_variant(costs: ClipCosts, index: ModelIndex, name: str) -> ClipCosts:
    """Costs of a model from the files of a variant.

    Args:
        costs: Costs from whole weights in bfloat16.
        index: The model.
        name: One of ``index.variants()``.

    Raises:
        ConfigError: No such variant, or a form that is unknown.
    """
    components = index.in_variant(name).components
    packings = {r: find_packing(components[r].form) for r in PACKED if components[r].form}
    if not packings:
        return costs
    num_loras = {role: len(components[role].loras) for role in packings}
    label = costs.name if name == WHOLE else f"{costs.name}:{name}"
    return PackedCosts(costs, label, packings, num_loras)


class PackedCosts:
    """Costs of a clip with packed linear layers.

    Args:
        costs: Costs with whole ones.
        name: Name of the model and the variant.
        packings: Packing by component; the others are whole.
        num_loras: LoRAs by component, which stay beside packed weights.
    """

    def __init__(
        self,
        costs: ClipCosts,
        name: str,
        packings: Mapping[str, Packing],
        num_loras: Mapping[str, int],
    ) -> None:
        self._costs, self._packings, self._num_loras = costs, packings, num_loras
        self.name = name

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
                role: self._pack(role, part) if role in self._packings else part
                for role, part in work.weights.items()
            },
            stages={name: self._unpack(stage, work) for name, stage in work.stages.items()},
        )

    def _pack(self, role: str, part: Weights) -> Weights:
        """A component whose linear layers are packed; its blocks shrink as all of it does."""
        saved = part.linear_bytes * (1 - self._packings[role].bits / 16)
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
        most = moved = 0.0
        for role in {*stage.passes} & {*self._packings}:
            part, packing = work.weights[role], self._packings[role]
            most = max(most, packing.copies * part.largest_linear_bytes)
            written = 2 * packing.copies  # and read again
            moved += stage.passes[role] * part.linear_bytes * (packing.bits / 16 + written)
        count = replace(
            stage.count,
            peak_bytes=stage.count.peak_bytes + most,
            other_bytes=stage.count.other_bytes + moved,
        )
        return replace(stage, count=count)
