"""The Stage II transformer: a Wan transformer that sees one window of latent frames at a time."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import (
    WanTransformer3DModel,
    WanTransformerBlock,
)
from torch import Tensor
from torch.nn import functional as F

from swifti2v.errors import ShapeError
from swifti2v.models.attention import Rotary, attend_from
from swifti2v.models.context_parallel import Bands
from swifti2v.models.weights.packed import packed_layers, share_packed


class SegmentTransformerBlock(WanTransformerBlock):
    """A Wan block with a modulation for each frame instead of each token.

    Weights and names are those of diffusers' ``WanTransformerBlock``. Layers compute in the type of
    ``text``; the tokens may be of another one.
    """

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        text: Tensor,
        modulation: Tensor,
        index: Tensor,
        rotary: Rotary,
        num_given: int = 0,
    ) -> Tensor:
        """Attend within the window and to the prompt.

        Args:
            tokens: ``[B, L, D]``, ordered frame by frame.
            text: ``[B, T, D]``.
            modulation: ``[U, 6, D]`` for the distinct noise levels.
            index: ``[B, N]`` level of each frame.
            rotary: Cosines and sines, ``[1, L, 1, head_dim]`` each.
            num_given: Frames at the start of the window that are attended to and left out of the
                result.

        Returns:
            ``[B, L', D]``, the tokens of the other frames.
        """
        table = self.scale_shift_table.float() + modulation.float()  # [U, 6, D]
        shift, scale, *rest = _take(table, index).unsqueeze(3).unbind(2)  # [B, N, 1, D] each
        gate, ffn_shift, ffn_scale, ffn_gate = (level[:, num_given:] for level in rest)
        hidden = _modulate(self.norm1, tokens, shift, scale).type_as(text)
        first = tokens.shape[1] // index.shape[1] * num_given
        tokens = _add_gated(tokens[:, first:], attend_from(self.attn1, hidden, rotary, first), gate)
        hidden = self.norm2(tokens.float()).type_as(text)
        tokens = tokens + self.attn2(hidden, text, None, None)
        hidden = _modulate(self.norm3, tokens, ffn_shift, ffn_scale).type_as(text)
        return _add_gated(tokens, self.ffn(hidden), ffn_gate)


class SegmentTransformer3DModel(WanTransformer3DModel):
    """Wan transformer with a reference beside the latents and a noise level for every frame.

    Weights, names and configuration are those of diffusers' ``WanTransformer3DModel``; only the
    forward pass differs. The input has 2C channels: the window's latents and, behind them, the
    latents of the hybrid reference; or C channels, the latents alone. With the weights of a
    widened base model (``from_base``) and any reference, the output equals the base model's.

    Source:
        SwiftI2V, arXiv:2605.06356, section 3.1, equation 6 (channel concatenation); a noise level
        for each frame as in Wan2.2-TI2V, where clean frames are given timestep 0.
    """

    has_float32_residual = False
    """Whether the sum of the blocks' output is kept in float32, see ``models.residual``."""
    _cp_plan: dict[str, Any] = {}  # noqa: RUF012 - declared so in diffusers
    """Nothing for diffusers to divide: ``forward`` divides the rows, see ``context_parallel``."""
    _no_split_modules = ["SegmentTransformerBlock"]  # noqa: RUF012 - declared so in diffusers
    _repeated_blocks = ["SegmentTransformerBlock"]  # noqa: RUF012

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(  # noqa: PLR0913 - the configuration keys of WanTransformer3DModel
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        in_channels: int = 96,
        out_channels: int = 48,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 14336,
        num_layers: int = 30,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        rope_max_seq_len: int = 1024,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            rope_max_seq_len=rope_max_seq_len,
        )
        for block in self.blocks:
            block.__class__ = SegmentTransformerBlock  # new blocks would draw their weights again

    @classmethod
    def from_base(
        cls,
        base: WanTransformer3DModel,
        *,
        takes_reference: bool = True,
        shares_weights: bool = False,
    ) -> "SegmentTransformer3DModel":
        """Widen the patch embedding of a base model by a zero half for the reference.

        Args:
            base: A text-or-image-to-video Wan transformer with C input channels (48 for
                Wan2.2-TI2V-5B). It is not changed; layers with packed weights are shared with it.
            takes_reference: False leaves the patch embedding as it is: the model sees no
                reference, which then counts only as what its latents are noised from.
            shares_weights: True takes over the tensors of a base that nobody uses any more, instead
                of copying them.

        Returns:
            A model with 2C input channels (C without a reference) on the device and in the dtype
            of ``base``.
        """
        taken = inspect.signature(cls.__init__).parameters
        config = {key: value for key, value in base.config.items() if key in taken}
        if takes_reference:
            config["in_channels"] = 2 * base.config["in_channels"]
        with torch.device("meta"):
            model = cls(**config)
        share_packed(base, model)
        state = dict(base.state_dict())
        weight = state["patch_embedding.weight"]
        if takes_reference:
            state["patch_embedding.weight"] = torch.cat([weight, torch.zeros_like(weight)], dim=1)
        shared = tuple(f"{name}." for name, _ in packed_layers(base))
        if not shares_weights:
            state = {k: v if k.startswith(shared) else v.clone() for k, v in state.items()}
        model.load_state_dict(state, assign=True)
        model.rope = type(base.rope)(
            base.config["attention_head_dim"],
            base.config["patch_size"],
            base.config["rope_max_seq_len"],
        ).to(weight.device)
        model.train(base.training)
        widened: SegmentTransformer3DModel = model
        return widened

    def forward(
        self,
        hidden_states: Tensor,
        sigma: Tensor,
        encoder_hidden_states: Tensor,
        temporal_positions: Sequence[int] | None = None,
        num_given: int = 0,
    ) -> Tensor:
        """Predict one value for every cell of every frame of the window.

        Args:
            hidden_states: ``[B, 2C, N, h, w]``, latents of the window followed by the reference's;
                ``[B, C, N, h, w]`` for a model without a reference.
            sigma: ``[B, N]`` noise level of each frame in [0, 1]; 0 for clean frames.
            encoder_hidden_states: ``[B, L, text_dim]`` prompt embeddings.
            temporal_positions: N positions for the rotary embedding; ``0 .. N-1`` if not given.
            num_given: Frames at the start for which nobody reads a prediction: after the last
                attention nothing is computed for them. The others do not change.

        Returns:
            ``[B, C, N - num_given, h, w]``: what the weights were trained to predict, by default the
            velocity.

        Raises:
            ShapeError: ``sigma`` or ``temporal_positions`` do not count N frames, or the channels,
                height or width do not fit the model.
        """
        batch, _, frames, height, width = hidden_states.shape
        _, patch_rows, patch_columns = self.config["patch_size"]
        rows, columns = height // patch_rows, width // patch_columns
        positions = range(frames) if temporal_positions is None else temporal_positions
        self._require_fit(hidden_states, sigma, positions)
        if not 0 <= num_given < frames:
            raise ShapeError(f"{num_given} of {frames} frames are given; one at least is predicted")

        bands = Bands.of(self)
        hidden_states, seen = bands.take(hidden_states), bands.rows(rows)
        rotary = self._rotary_embedding(positions, seen, columns)
        tokens = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        embedding, modulation, index, text = self._conditions(sigma, encoder_hidden_states, tokens)
        if self.has_float32_residual:
            tokens = tokens.float()

        for number, block in enumerate(self.blocks, start=1):
            left_out = num_given if number == len(self.blocks) else 0
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                checkpoint: Any = self._gradient_checkpointing_func
                tokens = checkpoint(block, tokens, text, modulation, index, rotary, left_out)
            else:
                tokens = block(tokens, text, modulation, index, rotary, left_out)

        table = self.scale_shift_table.float() + embedding.float().unsqueeze(1)  # [U, 2, D]
        levels = _take(table, index[:, num_given:])
        shift, scale = levels.unsqueeze(3).unbind(2)  # [B, N', 1, D] each
        tokens = _modulate(self.norm_out, tokens, shift, scale).type_as(text)
        values = self.proj_out(tokens)
        sizes = (frames - num_given, len(seen), columns, patch_rows, patch_columns)
        values = values.view(batch, *sizes, -1)
        cells: Tensor = values.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return bands.gather(cells)

    def _require_fit(self, hidden_states: Tensor, sigma: Tensor, positions: Sequence[int]) -> None:
        batch, channels, frames, height, width = hidden_states.shape
        patch_frames, patch_rows, patch_columns = self.config["patch_size"]
        if channels != self.config["in_channels"]:
            raise ShapeError(
                f"{channels} input channels; the model takes {self.config['in_channels']}"
            )
        if patch_frames != 1 or height % patch_rows or width % patch_columns:
            raise ShapeError(
                f"latents {height}x{width} do not divide into {patch_rows}x{patch_columns} patches"
            )
        if tuple(sigma.shape) != (batch, frames) or len(positions) != frames:
            raise ShapeError(
                f"{frames} frames in the window, but sigma is {list(sigma.shape)} "
                f"and there are {len(positions)} temporal positions"
            )
        if max(positions) >= self.config["rope_max_seq_len"]:
            raise ShapeError(
                f"temporal position {max(positions)} is beyond the model's "
                f"{self.config['rope_max_seq_len']}; use renumbered positions"
            )

    def _conditions(
        self, sigma: Tensor, encoder_hidden_states: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embed the distinct noise levels once, and the prompt.

        Returns:
            Time embedding ``[U, D]`` and modulation ``[U, 6, D]`` of the U distinct levels, the
            level's index of each frame ``[B, N]``, and text tokens ``[B, L, D]``.
        """
        levels, index = torch.unique(sigma.float(), return_inverse=True)
        embedder = self.condition_embedder
        frequencies = embedder.timesteps_proj(levels * 1000)
        weight = next(iter(embedder.time_embedder.parameters()))
        embedding = embedder.time_embedder(frequencies.to(weight.dtype)).to(tokens.dtype)
        modulation = embedder.time_proj(embedder.act_fn(embedding)).unflatten(1, (6, -1))
        text = embedder.text_embedder(encoder_hidden_states.to(tokens.dtype))
        return embedding, modulation, index, text

    def _rotary_embedding(
        self, positions: Sequence[int], rows: range, columns: int
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[1, N * len(rows) * columns, 1, head_dim]`` for explicit positions."""
        rope: Any = self.rope
        sizes = [rope.t_dim, rope.h_dim, rope.w_dim]
        index = torch.as_tensor(list(positions), device=rope.freqs_cos.device)
        shape = (len(positions), len(rows), columns, -1)

        def spread(table: Tensor) -> Tensor:
            time, row, column = torch.split(table, sizes, dim=1)
            parts = (
                time[index][:, None, None].expand(shape),
                row[rows.start : rows.stop][None, :, None].expand(shape),
                column[:columns][None, None].expand(shape),
            )
            return torch.cat(parts, dim=-1).flatten(0, 2)[None, :, None]

        return spread(rope.freqs_cos), spread(rope.freqs_sin)


def _take(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``[B, N, k, D]`` of a table ``[U, k, D]``.

    The gradient of ``table[index]`` is a sum whose order depends on the threads.
    """
    rows: Tensor = torch.unflatten(F.embedding(index, table.flatten(1)), 2, table.shape[1:])
    return rows


def _modulate(norm: Any, tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise ``[B, L, D]`` and apply ``[B, N, 1, D]`` scale and shift, frame by frame; float32."""
    normed = norm(tokens.float()).unflatten(1, (shift.shape[1], -1))
    modulated: Tensor = (normed * (1 + scale) + shift).flatten(1, 2)
    return modulated


def _add_gated(tokens: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Add ``[B, L, D]`` weighted by a ``[B, N, 1, D]`` gate, frame by frame."""
    update = torch.unflatten(update.float(), 1, (gate.shape[1], -1)) * gate
    return (tokens.float() + update.flatten(1, 2)).type_as(tokens)
