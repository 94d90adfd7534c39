from collections.abc import Callable
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from swifti2v.config import GenerationConfig, parse_config
from swifti2v.errors import ConfigError
from swifti2v.models.loading.components import Components
from swifti2v.models.runtime.placement import is_streamed, place
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from tests.helpers.tiny import SETTINGS, SIZE, TRANSFORMER, tiny_components, tiny_pipeline

CPU = torch.device("cpu")
WAN_VAE: dict[str, Any] = {
    "base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
    "latents_mean": [0.1] * 4, "latents_std": [1.5] * 4,
}  # fmt: skip
NETWORKS = ("text_encoder", "image_encoder", "stage1_transformer", "stage1_vae",
            "stage2_transformer", "stage2_vae")  # fmt: skip
STREAMED = tuple(name for name in NETWORKS if not name.endswith("vae"))


def wan_pipeline(vae: dict[str, Any]) -> SwiftI2VPipeline:
    """Everything a real model has: CLIP, Wan VAEs and transformers of several blocks."""
    parts = tiny_components()
    torch.manual_seed(1)
    sizes = TRANSFORMER | {"num_layers": 3}
    wan: Any = diffusers.WanTransformer3DModel
    parts.stage1_transformer = wan(
        in_channels=12, out_channels=4, image_dim=8, added_kv_proj_dim=24, **sizes
    )
    parts.stage2_transformer = type(parts.stage2_transformer)(
        in_channels=8, out_channels=4, **sizes
    )
    autoencoder: Any = diffusers.AutoencoderKLWan
    parts.stage1_vae = autoencoder(**WAN_VAE)
    parts.stage2_vae = autoencoder(**WAN_VAE | vae)
    clip = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    parts.image_encoder = CLIPVisionModel(clip)
    parts.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8)
    for name in NETWORKS:
        getattr(parts, name).eval().requires_grad_(False)
    settings = SETTINGS | {"stage1": {"downscale": 2, "sampling": {"num_inference_steps": 2}}}
    return SwiftI2VPipeline(parts, parse_config(GenerationConfig, settings, "test"))


WAN22: dict[str, Any] = {
    "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12,
    "scale_factor_spatial": 16, "decoder_base_dim": 4,
}  # fmt: skip
MAKERS: dict[str, Callable[[], SwiftI2VPipeline]] = {
    "nano": tiny_pipeline,
    "wan21": lambda: wan_pipeline({}),
    "wan22": lambda: wan_pipeline(WAN22),
}


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Travel:
    """Makes travelling visible on one device: weights that are away are NaN.

    The hooks of diffusers run as they are; a group that they send away is overwritten, and one
    they fetch is put back, as a copy between two memories would do.
    """

    def __init__(self, parts: Components) -> None:
        self.bytes_here = self.most_bytes_here = 0
        self.streamed: dict[int, torch.nn.Parameter] = {}
        self.kept: dict[int, torch.Tensor] = {}
        groups: dict[int, Any] = {}
        for name in NETWORKS:
            for module in getattr(parts, name).modules() if getattr(parts, name) else ():
                hooks: Any = getattr(module, "_diffusers_hook", None)
                if hooks is not None and (hook := hooks.get_hook("group_offloading")) is not None:
                    groups[id(hook.group)] = hook.group
        for group in groups.values():
            self._watch(group)

    def _watch(self, group: Any) -> None:
        own = [p for module in group.modules for p in module.parameters()] + list(group.parameters)
        own = list({id(parameter): parameter for parameter in own}.values())
        size = sum(parameter.nbytes for parameter in own)
        fetch, send_away = group.onload_, group.offload_

        def onload() -> None:
            for parameter in own:
                parameter.data = self.kept.pop(id(parameter))
            fetch()
            self.bytes_here += size
            self.most_bytes_here = max(self.most_bytes_here, self.bytes_here)

        def offload(is_first: bool = False) -> None:
            send_away()
            for parameter in own:
                self.kept[id(parameter)] = parameter.data
                parameter.data = torch.full_like(parameter.data, float("nan"))
            self.bytes_here -= 0 if is_first else size

        group.onload_, group.offload_ = onload, offload
        self.streamed |= {id(parameter): parameter for parameter in own}
        offload(is_first=True)


@pytest.mark.parametrize("kind", MAKERS)
def test_streamed_weights_make_the_same_frames_and_are_there_only_when_used(kind, image):
    expected = MAKERS[kind]()(image, "zoom in", generator=3).frames
    pipe = MAKERS[kind]()
    parts = pipe.components
    weights = {id(p): p for name in STREAMED if (m := getattr(parts, name)) for p in m.parameters()}
    total = sum(parameter.nbytes for parameter in weights.values())
    place(parts, CPU, "streamed")
    travel = Travel(parts)
    assert travel.streamed.keys() == weights.keys()  # nothing but the VAEs lives on the device
    assert all(parameter.isnan().all() for parameter in weights.values())
    assert np.array_equal(pipe(image, "zoom in", generator=3).frames, expected)
    assert travel.bytes_here == 0
    assert 0 < travel.most_bytes_here < total / 2


def test_every_block_travels_by_itself():
    parts = wan_pipeline(WAN22).components
    place(parts, CPU, "streamed")
    image_encoder: Any = parts.image_encoder
    stacks: list[Any] = [
        parts.text_encoder.encoder.block,
        image_encoder.encoder.layers,
        parts.stage1_transformer.blocks,
        parts.stage2_transformer.blocks,
    ]
    for stack in stacks:
        groups = [block._diffusers_hook.get_hook("group_offloading").group for block in stack]
        assert [group.modules for group in groups] == [[block] for block in stack]
    assert not is_streamed(cast(nn.Module, parts.stage2_vae))


def test_resident_installs_nothing():
    parts = tiny_components()
    place(parts, CPU, "resident")
    assert not any(is_streamed(getattr(parts, name)) for name in NETWORKS if getattr(parts, name))


def test_a_model_of_both_stages_is_streamed_once_and_the_codec_stays():
    parts = tiny_components()
    assert parts.stage1_vae is parts.stage2_vae
    place(parts, CPU, "streamed")
    assert isinstance(parts.stage1_vae, BlockCodec)
    assert not is_streamed(parts.stage1_vae)
    assert is_streamed(parts.stage2_transformer)


def test_a_streamed_pipeline_is_loaded_and_saved_like_a_resident_one(image, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "first")
    resident = SwiftI2VPipeline.from_pretrained(tmp_path / "first", device="cpu")
    pipe = SwiftI2VPipeline.from_pretrained(tmp_path / "first", device="cpu", placement="streamed")
    assert is_streamed(pipe.components.stage2_transformer)
    assert not is_streamed(resident.components.stage2_transformer)
    pipe.save_pretrained(tmp_path / "second")
    again = SwiftI2VPipeline.from_pretrained(tmp_path / "second", device="cpu")
    first, second = (p(image, "pan left", generator=1).frames for p in (resident, again))
    assert np.array_equal(first, second)


def test_what_cannot_be_placed_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'disk' is unknown; use resident, streamed, offloaded"):
        place(tiny_components(), CPU, "disk")  # type: ignore[arg-type]
    missing: Any = "disk"
    with pytest.raises(ConfigError, match="placement 'disk'"):  # before it looks for the model
        SwiftI2VPipeline.from_pretrained(tmp_path / "none", placement=missing)
    parts = tiny_components()
    place(parts, CPU, "streamed")
    with pytest.raises(ConfigError, match="streamed already"):
        place(parts, CPU, "resident")
