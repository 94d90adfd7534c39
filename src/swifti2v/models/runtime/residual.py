"""The residual stream of a Wan transformer in float32, whatever the number type of its weights.

The tokens are a sum of what all layers add. In 16 bits it is rounded after every addition; here the
sum is kept as it is, and only what enters a layer is rounded.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import (
    WanTransformer3DModel,
    WanTransformerBlock,
)
from torch import Tensor, nn

from swifti2v.models.attention import Rotary
from swifti2v.models.transformer import SegmentTransformer3DModel


def keep_residual(transformer: nn.Module) -> None:
    """Let the tokens of a transformer stay float32 from its first block to its last, in place.

    Before it is compiled or placed. Weights and their names stay as they are.

    Args:
        transformer: ``WanTransformer3DModel`` or ``SegmentTransformer3DModel``.

    Source:
        Wan 2.1 and 2.2, whose own code keeps the sum in float32 under autocast.
    """
    if isinstance(transformer, SegmentTransformer3DModel):
        transformer.has_float32_residual = True
        return
    assert isinstance(transformer, WanTransformer3DModel)
    model: Any = transformer
    model.patch_embedding.register_forward_hook(lambda _, __, tokens: tokens.float())
    for block in model.blocks:
        block.__class__ = Float32ResidualBlock
    model.proj_out.register_forward_pre_hook(lambda layer, args: (args[0].to(layer.weight.dtype),))


class Float32ResidualBlock(WanTransformerBlock):
    """diffusers' block over float32 tokens: the same steps, without rounding after each of them."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Rotary,
    ) -> Tensor:
        """Attend to all tokens and to the conditions.

        Args:
            hidden_states: ``[B, L, D]`` float32.
            encoder_hidden_states: ``[B, T, D]`` in the type that the layers compute in.
            temb: ``[B, 6, D]`` modulation of the clip's noise level.
            rotary_emb: Cosines and sines.

        Returns:
            ``[B, L, D]`` float32.
        """
        tokens, text = hidden_states, encoder_hidden_states
        table = self.scale_shift_table.float() + temb.float()
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = table.chunk(6, dim=1)
        hidden = torch.addcmul(shift, self.norm1(tokens), 1 + scale).type_as(text)
        tokens = torch.addcmul(tokens, self.attn1(hidden, None, None, rotary_emb).float(), gate)
        hidden = self.norm2(tokens).type_as(text)
        tokens = tokens + self.attn2(hidden, text, None, None)
        hidden = torch.addcmul(ffn_shift, self.norm3(tokens), 1 + ffn_scale).type_as(text)
        return torch.addcmul(tokens, self.ffn(hidden).float(), ffn_gate)
