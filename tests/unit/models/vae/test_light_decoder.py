"""Light decoders against whole-clip references, from files as they are published."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import save_file
from torch.nn import functional as F

from swifti2v.errors import LoadingError, ShapeError
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.light_decoder import TinyDecoder, load_light_decoder
from swifti2v.models.vae.streaming import StreamingDecoder
from tests.helpers.hub import WAN21_VAE, WAN22_VAE
from tests.helpers.hub import make as make_model
from tests.unit.models.weights.test_names import original_vae

State = dict[str, torch.Tensor]
STRIDES = (1, 2, 2)


def conv(state: State, name: str, rows: int, columns: int, side: int, bias: bool = True) -> None:
    state[f"{name}.weight"] = torch.randn(rows, columns, side, side) * (columns * side**2) ** -0.5
    if bias:
        state[f"{name}.bias"] = torch.randn(rows) * 0.1


def output_layer(state: State, patch: int, width: int) -> None:
    """About as many values within [0, 1] as beyond."""
    conv(state, "decoder.22", 3 * patch**2, width, 3)
    state["decoder.22.weight"] *= 5
    state["decoder.22.bias"] += 0.5


def plain_file(z_dim: int, patch: int) -> State:
    """Names and layers of ``taew2_1.pth`` and ``taew2_2.pth`` with few channels."""
    torch.manual_seed(0)
    state: State = {}
    widths = (8, 4, 2, 2)
    conv(state, "decoder.1", widths[0], z_dim, 3)
    for level in range(3):
        width, first = widths[level], 3 + 6 * level
        for block in range(first, first + 3):
            conv(state, f"decoder.{block}.conv.0", width, 2 * width, 3)
            conv(state, f"decoder.{block}.conv.2", width, width, 3)
            conv(state, f"decoder.{block}.conv.4", width, width, 3)
        conv(state, f"decoder.{first + 4}.conv", width * STRIDES[level], width, 1, bias=False)
        conv(state, f"decoder.{first + 5}", widths[level + 1], width, 3, bias=False)
    output_layer(state, patch, widths[3])
    state["encoder.0.weight"] = torch.randn(4, 3 * patch**2, 3, 3)
    return state


def wide_file(z_dim: int, patch: int) -> State:
    """Names and layers of ``taew2_2_super.pth`` with few channels."""
    torch.manual_seed(0)
    state: State = {}
    widths = (8, 4, 2, 2)
    conv(state, "decoder.0", widths[0], z_dim, 1, bias=False)
    for level in range(3):
        width, following, first = widths[level], widths[level + 1], 1 + 7 * level
        for block in range(first, first + 3):
            conv(state, f"decoder.{block}.conv.0", 2 * width, 1, 7, bias=False)
            conv(state, f"decoder.{block}.conv.1", 4 * width, 2 * width, 1)
            conv(state, f"decoder.{block}.conv.3", width, 4 * width, 1, bias=False)
        conv(state, f"decoder.{first + 3}", 4 * following, width, 3)
        grown = following * STRIDES[level]
        conv(state, f"decoder.{first + 6}.conv", grown, following, 1, bias=False)
    output_layer(state, patch, widths[3])
    return state


def run_conv(state: State, name: str, x: torch.Tensor, groups: int = 1) -> torch.Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(
        x, weight, state.get(f"{name}.bias"), padding=weight.shape[-1] // 2, groups=groups
    )


def decode_whole(state: State, latents: torch.Tensor, patch: int) -> torch.Tensor:
    """All frames of a clip through one layer after the other, as the authors' parallel mode."""
    is_wide = "decoder.1.conv.0.weight" in state
    x = latents[0].transpose(0, 1)  # [T, C, h, w]
    x = (
        run_conv(state, "decoder.0", x)
        if is_wide
        else run_conv(state, "decoder.1", torch.tanh(x / 3) * 3).relu()
    )
    for level in range(3):
        first = 1 + 7 * level if is_wide else 3 + 6 * level
        for block in range(first, first + 3):
            name = f"decoder.{block}.conv"
            both = torch.cat([x, torch.cat([torch.zeros_like(x[:1]), x[:-1]])], dim=1)
            if is_wide:
                y = run_conv(state, f"{name}.0", both, groups=both.shape[1])
                x = x + run_conv(state, f"{name}.3", run_conv(state, f"{name}.1", y).relu())
            else:
                y = run_conv(state, f"{name}.0", both).relu()
                x = (
                    run_conv(state, f"{name}.4", run_conv(state, f"{name}.2", y).relu()) + x
                ).relu()
        if is_wide:
            x = F.pixel_shuffle(run_conv(state, f"decoder.{first + 3}", x).relu(), 2)
        else:
            x = F.interpolate(x, scale_factor=2)
        width = x.shape[1]
        x = run_conv(state, f"decoder.{first + (6 if is_wide else 4)}.conv", x)
        x = x.reshape(-1, width, *x.shape[2:])
        if not is_wide:
            x = run_conv(state, f"decoder.{first + 5}", x)
    x = run_conv(state, "decoder.22", x if is_wide else x.relu())
    return F.pixel_shuffle(x, patch)[3:].clamp(0, 1).transpose(0, 1)[None] * 2 - 1


FILES = {"plain": plain_file, "wide": wide_file}
VAES: dict[str, Any] = {"wan21": (WAN21_VAE, 16, 1), "wan22": (WAN22_VAE, 48, 2)}


def save(state: State, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", FILES)
@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_pieces_give_the_whole_clip_of_the_reference(name, layout, suffix, tmp_path):
    config, z_dim, patch = VAES[name]
    state = FILES[layout](z_dim, patch)
    decoder = load_light_decoder(
        save(state, tmp_path / f"tae{suffix}"), make_model(AutoencoderKLWan, **config)
    )
    assert isinstance(decoder.network, TinyDecoder)
    latents = torch.randn(1, z_dim, 5, 3, 2)
    expected = decode_whole(state, latents, patch)
    assert expected.shape == (1, 3, 17, 24 * patch, 16 * patch)
    assert expected.std() > 0.1  # not all of it clamped
    for sizes in ([5], [1, 4], [2, 1, 1, 1]):
        stream = decoder.start()
        pieces = [stream.decode(piece) for piece in torch.split(latents, sizes, dim=2)]
        video = torch.cat(pieces, dim=2)
        torch.testing.assert_close(video, expected, atol=1e-4, rtol=1e-3)


def light_vae(config: Any) -> AutoencoderKLWan:
    """A VAE whose decoder is narrower than that of the model."""
    vae: AutoencoderKLWan = make_model(AutoencoderKLWan, seed=3, **config | {"decoder_base_dim": 2})
    return vae


@pytest.mark.parametrize("has_encoder", [True, False])
@pytest.mark.parametrize("style", ["diffusers", "original"])
@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_a_pruned_wan_vae_decodes_as_itself(name, style, has_encoder, tmp_path):
    config, z_dim, _ = VAES[name]
    light = light_vae(config)
    state = {key: tensor.clone() for key, tensor in light.state_dict().items()}
    if style == "original":
        state = original_vae(state, is_residual=name == "wan22")
    if not has_encoder:
        state = {key: t for key, t in state.items() if not re.match(r"encoder|quant|conv1\.", key)}
    state["dynamic_feature_projection_heads.0.weight"] = torch.zeros(2)
    path = tmp_path / "lightvae.pth"
    torch.save({"gen_model": state}, path)

    decoder = load_light_decoder(path, make_model(AutoencoderKLWan, **config))

    latents = torch.randn(1, z_dim, 3, 4, 4)
    expected = StreamingDecoder(light).decode(latents)
    torch.testing.assert_close(decoder.start().decode(latents), expected)


def test_what_does_not_fit_is_refused(tmp_path):
    wan22 = make_model(AutoencoderKLWan, **WAN22_VAE)
    own = save(plain_file(48, 2), tmp_path / "taew2_2.pth")
    other = save(plain_file(16, 1), tmp_path / "taew2_1.pth")
    with pytest.raises(LoadingError, match="z_dim is 16, this model's 48"):
        load_light_decoder(other, wan22)
    with pytest.raises(LoadingError, match="z_dim is 48, this model's 16"):
        load_light_decoder(own, make_model(AutoencoderKLWan, **WAN21_VAE))
    with pytest.raises(LoadingError, match="scale_factor_spatial is 8, this model's 16"):
        load_light_decoder(save(plain_file(48, 1), tmp_path / "patch.pth"), wan22)
    with pytest.raises(LoadingError, match="leave it out"):
        load_light_decoder(own, BlockCodec())
    light = save(light_vae(WAN21_VAE).state_dict(), tmp_path / "light.pth")
    with pytest.raises(LoadingError, match="z_dim is 16, this model's 48"):
        load_light_decoder(light, wan22)
    with pytest.raises(LoadingError, match="not a Wan VAE"):
        load_light_decoder(save({"a": torch.zeros(1)}, tmp_path / "a.pth"), wan22)


def test_a_damaged_file_is_refused(tmp_path):
    vae = make_model(AutoencoderKLWan, **WAN22_VAE)
    for key, match in (
        ("decoder.7.conv.weight", "decoder.7.conv.weight"),
        ("decoder.10.conv.2.bias", "1 missing: decoder.10.conv.2.bias"),
    ):
        state = plain_file(48, 2)
        del state[key]
        with pytest.raises(LoadingError, match=match):
            load_light_decoder(save(state, tmp_path / "tae.pth"), vae)
    state = plain_file(48, 2) | {"decoder_extra": torch.zeros(1)}
    with pytest.raises(LoadingError, match="unknown keys decoder_extra"):
        load_light_decoder(save(state, tmp_path / "tae.pth"), vae)
    light = {key: t for key, t in light_vae(WAN22_VAE).state_dict().items() if "post" not in key}
    with pytest.raises(LoadingError, match=r"lacks post_quant_conv\.weight"):
        load_light_decoder(save(light, tmp_path / "light.pth"), vae)


def test_latents_of_another_vae_are_refused(tmp_path):
    path = save(plain_file(48, 2), tmp_path / "taew2_2.pth")
    stream = load_light_decoder(path, make_model(AutoencoderKLWan, **WAN22_VAE)).start()
    with pytest.raises(ShapeError, match=r"takes \[B, 48"):
        stream.decode(torch.zeros(1, 16, 1, 2, 2))
