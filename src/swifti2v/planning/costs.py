"""Costs of a clip as numbers, without PyTorch, so that planning starts at once."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

CountedStage = Literal["text", "image", "stage1", "reference", "stage2", "decode"]
STAGES: tuple[CountedStage, ...] = get_args(CountedStage)


@dataclass(frozen=True, kw_only=True, slots=True)
class Count:
    """Cost of a computation; a multiply-add counts as two FLOP."""

    linear: float = 0
    """FLOP of matrix products, those of attention left out."""
    attention: float = 0
    """FLOP of scaled dot-product attention, as one kernel."""
    convolution: float = 0
    """FLOP of convolutions."""
    kernel_bytes: float = 0
    """Inputs, weights and outputs of those three, once for each call: the least traffic."""
    other_bytes: float = 0
    """Inputs and outputs of all other operations, one kernel each, as eager execution moves them."""
    peak_bytes: float = 0
    """Most memory held at one time by tensors made within the computation, without weights."""
    kept_bytes: float = 0
    """Part of that memory that is still held at the end."""
    transfer_bytes: float = 0
    """Bytes copied between host and device."""

    @property
    def flops(self) -> float:
        """All arithmetic that is counted: elementwise operations are not."""
        return self.linear + self.attention + self.convolution

    def __add__(self, other: "Count") -> "Count":
        """One computation after the other; what the first kept is not added to the second's peak."""
        return self._combine(other, lambda a, b: a + b, max)

    def __sub__(self, other: "Count") -> "Count":
        """The part of the work that ``other`` does not do; memory is this computation's."""
        return self._combine(other, lambda a, b: a - b, lambda a, _: a)

    def __mul__(self, times: float) -> "Count":
        """Repeat the work ``times`` times, one after the other."""
        return self._combine(self, lambda a, _: a * times, lambda a, _: a)

    def _combine(
        self,
        other: "Count",
        work: Callable[[float, float], float],
        memory: Callable[[float, float], float],
    ) -> "Count":
        return Count(
            linear=work(self.linear, other.linear),
            attention=work(self.attention, other.attention),
            convolution=work(self.convolution, other.convolution),
            kernel_bytes=work(self.kernel_bytes, other.kernel_bytes),
            other_bytes=work(self.other_bytes, other.other_bytes),
            transfer_bytes=work(self.transfer_bytes, other.transfer_bytes),
            peak_bytes=memory(self.peak_bytes, other.peak_bytes),
            kept_bytes=memory(self.kept_bytes, other.kept_bytes),
        )


def extrapolate(first: Count, second: Count, times: float) -> Count:
    """Cost of ``first`` and ``times`` more of what ``second`` has in addition, memory included.

    Exact where each further layer does the same, as a stack of equal blocks.
    """
    names = Count.__slots__
    values = {
        name: getattr(first, name) + times * (getattr(second, name) - getattr(first, name))
        for name in names
    }
    return Count(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Memory of a component's weights."""

    num_bytes: float
    """Bytes of all weights."""
    stays: bool
    """Whether they are on the device in every placement."""
    streamed_bytes: float
    """Most bytes on the device at one time when streamed: one block computes, one is
    fetched. 0 if they stay there."""
    pinned_bytes: float
    """Host memory they take when streamed, see ``swifti2v.models.runtime.pinning``. 0 if they stay on the
    device."""
    linear_bytes: float = 0
    """Part of all weights in linear layers, which smaller files keep packed."""
    largest_linear_bytes: float = 0
    """The largest of those layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageWork:
    """One stage of a clip."""

    count: Count
    """All its work; ``kept_bytes`` is the causal history that stays until the clip is done."""
    passes: dict[str, int]
    """Number of passes through each component, from its first weight to its last."""
    is_float8: bool = False
    """Whether its matrix products are of 8-bit floating point numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipWork:
    """A whole clip, independent of any machine."""

    stages: dict[CountedStage, StageWork]
    weights: dict[str, Weights]
    """Weights by component."""
    vae_tile: int | None
    """Longest side of Stage II's VAE tiles in latent cells."""
    offloads_history: bool
    """Whether the causal history waits in host memory."""
    host_bytes: float
    """Clips and latents in host memory, and the history if it waits there."""
    search_seconds: float = 0
    """Seconds of one host core to search the motion that carries the photo's detail."""
    num_segments: int = 1
    """Segments of the clip; the motion of the first one's frames is waited for."""
    shared: dict[str, str] = field(default_factory=dict)
    """Component by the one whose weights serve for both, see ``ModelIndex.twin``."""

    def loaded(self, roles: Iterable[str]) -> dict[str, Weights]:
        """Weights of some components, those of twins once; of others than are there none."""
        names = dict.fromkeys(self.shared.get(role, role) for role in roles)
        return {name: self.weights[name] for name in names if name in self.weights}

    @property
    def flops(self) -> dict[str, float]:
        """FLOP by stage, and ``total``."""
        by_stage: dict[str, float] = {name: self.stages[name].count.flops for name in STAGES}
        return {**by_stage, "total": sum(by_stage.values())}


class ClipCosts(Protocol):
    """Costs of a clip as a plan needs them."""

    @property
    def name(self) -> str:
        """Name of the model."""

    @property
    def linear(self) -> Mapping[str, str]:
        """Kind of the linear layers by component, see ``SpeedConfig``."""

    @property
    def cells(self) -> tuple[int, int]:
        """Height and width of Stage II's latents."""

    def count(self, vae_tile: int | None = None, *, offloads_history: bool = False) -> ClipWork:
        """Work of the clip, see ``swifti2v.planning.work.ClipCounter``."""
