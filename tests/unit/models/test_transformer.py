from typing import Any

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from swifti2v.errors import ShapeError
from swifti2v.models.transformer import SegmentTransformer3DModel

CONFIG = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 8, "out_channels": 8,
    "text_dim": 16, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip


@pytest.fixture
def base():
    torch.manual_seed(0)
    model: Any = diffusers.WanTransformer3DModel
    return model(**CONFIG).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return {
        "latents": torch.randn(2, 8, 4, 6, 8),
        "reference": torch.randn(2, 8, 4, 6, 8),
        "sigma": torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.9375, 0.9375, 0.3]]),
        "text": torch.randn(2, 5, 16),
    }


def run_base(base: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    timestep = (inputs["sigma"] * 1000)[:, :, None].expand(-1, -1, 12).flatten(1)  # 3 x 4 tokens
    output: torch.Tensor = base(inputs["latents"], timestep, inputs["text"], return_dict=False)[0]
    return output


@torch.no_grad()
def test_a_widened_base_equals_the_base_whatever_the_reference(base, inputs):
    model = SegmentTransformer3DModel.from_base(base)
    both = torch.cat([inputs["latents"], inputs["reference"]], dim=1)
    output = model(both, inputs["sigma"], inputs["text"])
    torch.testing.assert_close(output, run_base(base, inputs), atol=2e-6, rtol=1e-5)


@torch.no_grad()
def test_bfloat16_survives_widening(base, inputs):
    model = SegmentTransformer3DModel.from_base(base.to(torch.bfloat16))
    both = torch.cat([inputs["latents"], inputs["reference"]], dim=1).bfloat16()
    output = model(both, inputs["sigma"], inputs["text"].bfloat16())
    assert output.dtype == torch.bfloat16
    assert output.isfinite().all()


@torch.no_grad()
def test_positions_are_an_argument(base, inputs):
    model = SegmentTransformer3DModel.from_base(base)
    both = torch.cat([inputs["latents"], inputs["reference"]], dim=1)
    plain = model(both, inputs["sigma"], inputs["text"])
    renumbered = model(both, inputs["sigma"], inputs["text"], temporal_positions=[0, 1, 2, 3])
    shifted = model(both, inputs["sigma"], inputs["text"], temporal_positions=[7, 8, 9, 10])
    absolute = model(both, inputs["sigma"], inputs["text"], temporal_positions=[0, 7, 8, 9])
    assert torch.equal(plain, renumbered)
    torch.testing.assert_close(plain, shifted, atol=1e-5, rtol=1e-4)  # rotary: differences count
    assert (plain - absolute).abs().max() > 1e-4


@torch.no_grad()
def test_modulation_is_never_built_for_each_token(base, inputs):
    model = SegmentTransformer3DModel.from_base(base)
    batch, frames, tokens, width = 2, 4, 48, 48

    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        size = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            is_table = isinstance(result, torch.Tensor) and 6 in result.shape[:-1]
            if is_table and result.shape[-1] == width and result.ndim >= 3:
                self.size = max(self.size, result.numel())
            return result

    with Largest() as largest:  # type: ignore[no-untyped-call]
        both = torch.cat([inputs["latents"], inputs["reference"]], dim=1)
        model(both, inputs["sigma"], inputs["text"])
    assert largest.size == batch * frames * 6 * width  # one for each frame
    assert largest.size < batch * tokens * 6 * width


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(base, inputs, tmp_path):
    model = SegmentTransformer3DModel.from_base(base)
    model.save_pretrained(tmp_path)
    again = SegmentTransformer3DModel.from_pretrained(tmp_path)
    both = torch.cat([inputs["latents"], inputs["reference"]], dim=1)
    assert torch.equal(
        model(both, inputs["sigma"], inputs["text"]), again(both, inputs["sigma"], inputs["text"])
    )


def test_every_weight_takes_part_in_training(base, inputs):
    model = SegmentTransformer3DModel.from_base(base).train()
    model.enable_gradient_checkpointing()
    both = torch.cat([inputs["latents"], inputs["reference"]], dim=1)
    model(both, inputs["sigma"], inputs["text"]).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_no_gradient_is_a_sum_whose_order_depends_on_threads(base, inputs):
    """On a CPU ``table[index]`` adds up its gradient with as many threads as there are."""

    class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.names: set[str] = set()

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.names.add(func.name().partition(".")[0])
            return func(*args, **(kwargs or {}))

    model = SegmentTransformer3DModel.from_base(base).train()
    both = torch.cat([inputs["latents"], inputs["reference"]], dim=1)
    with Operations() as operations:
        model(both, inputs["sigma"], inputs["text"], num_given=1).square().mean().backward()
    adding = {f"aten::{name}" for name in ("index_put", "index_put_", "_index_put_impl_",
                                           "index_add", "index_add_", "scatter_add")}  # fmt: skip
    assert operations.names & adding == set()
    assert "aten::embedding_dense_backward" in operations.names


def test_checkpointing_gives_the_same_gradients(base, inputs):
    both = torch.cat([inputs["latents"], inputs["reference"]], dim=1)
    gradients = []
    for checkpointing in (False, True):
        model = SegmentTransformer3DModel.from_base(base).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(both, inputs["sigma"], inputs["text"]).square().mean().backward()
        gradients.append(model.patch_embedding.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(2, 7, 4, 6, 8)}, "15 input channels; the model takes 16"),
        ({"latents": torch.zeros(2, 8, 4, 5, 8), "reference": torch.zeros(2, 8, 4, 5, 8)}, "5x8"),
        ({"sigma": torch.zeros(2, 3)}, "4 frames in the window"),
    ],
)
def test_what_does_not_fit_is_refused(base, inputs, change, message):
    inputs = inputs | change
    model = SegmentTransformer3DModel.from_base(base)
    both = torch.cat([inputs["latents"], inputs["reference"]], dim=1)
    with pytest.raises(ShapeError, match=message):
        model(both, inputs["sigma"], inputs["text"])


def test_a_position_past_the_rotary_table_names_the_remedy(base, inputs):
    model = SegmentTransformer3DModel.from_base(base)
    both = torch.cat([inputs["latents"], inputs["reference"]], dim=1)
    with pytest.raises(ShapeError, match="renumbered"):
        model(both, inputs["sigma"], inputs["text"], temporal_positions=[0, 30, 31, 32])
