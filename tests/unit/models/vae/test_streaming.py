import copy
from dataclasses import fields, replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.errors import ConfigError, LoadingError, ShapeError
from swifti2v.models.loading.components import load_component
from swifti2v.models.loading.sources import ComponentSource
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.causal_conv import VaeLevers
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.models.vae.streaming import (
    StreamingDecoder,
    StreamingEncoder,
    denormalize_latents,
    normalize_latents,
    scale_factors,
)

NAMES = ["wan21", "wan22", "block", "block4"]
NUM_FRAMES = 13
NUM_LATENT_FRAMES = 4
# Latent cells of a test frame. At 2 x 2 the CPU takes another kernel for the 1x1x1 quant_conv over
# one frame than over several, and the last bit differs; from 3 x 5 on it does not.
HEIGHT, WIDTH = 4, 7

per_vae = pytest.mark.parametrize("name", NAMES)
CASES = [*((name, None) for name in NAMES), ("wan22", 4), ("block", 4)]
per_vae_and_tile = pytest.mark.parametrize(("name", "tile"), CASES)
few = settings(max_examples=5, deadline=None)


def wan(**changes: object) -> AutoencoderKLWan:
    torch.manual_seed(0)
    size = {"base_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    vae: AutoencoderKLWan = AutoencoderKLWan(**size, **changes).eval()
    return vae


@cache
def vae_of(name: str) -> VideoVAE:
    if name == "wan21":
        return wan(z_dim=16)
    generator = torch.Generator().manual_seed(1)
    if name == "wan22":
        return wan(
            z_dim=48,
            decoder_base_dim=6,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
            latents_mean=torch.randn(48, generator=generator).tolist(),
            latents_std=(torch.rand(48, generator=generator) + 0.5).tolist(),
        )
    side, size = (4, 192) if name == "block4" else (8, 768)
    mean, std = torch.randn(size, generator=generator), torch.rand(size, generator=generator) + 0.5
    return BlockCodec(mean.tolist(), std.tolist(), size, 4, side)  # type: ignore[no-any-return]


@cache
def video_of(name: str) -> Tensor:
    side = vae_of(name).config["scale_factor_spatial"]
    generator = torch.Generator().manual_seed(2)
    size = (1, 3, NUM_FRAMES, HEIGHT * side, WIDTH * side)
    return torch.rand(size, generator=generator) * 2 - 1


@cache
def latents_of(name: str) -> Tensor:
    size = (1, vae_of(name).config["z_dim"], NUM_LATENT_FRAMES, HEIGHT, WIDTH)
    return torch.randn(size, generator=torch.Generator().manual_seed(3))


@cache
def encoded(name: str, tile: int | None = None) -> Tensor:
    return StreamingEncoder(vae_of(name), tile=tile).encode(video_of(name), final=True)


@cache
def decoded(name: str, tile: int | None = None) -> Tensor:
    return StreamingDecoder(vae_of(name), tile=tile).decode(latents_of(name))


@st.composite
def pieces(draw: st.DrawFn, length: int) -> list[slice]:
    """Cuts of ``length`` frames into consecutive pieces."""
    cuts = draw(st.sets(st.integers(1, length - 1)))
    return [slice(*ends) for ends in pairwise([0, *sorted(cuts), length])]


@per_vae
def test_scale_factors_come_from_the_configuration(name):
    scale = scale_factors(vae_of(name), patch=2)

    assert scale == (4, {"wan22": 16, "block4": 4}.get(name, 8), 2)


@per_vae
def test_normalized_latents_have_the_configured_statistics_removed(name):
    vae = vae_of(name)
    latents = latents_of(name)
    own = denormalize_latents(vae, latents)
    channel = 5
    mean, std = (vae.config[key][channel] for key in ("latents_mean", "latents_std"))

    torch.testing.assert_close(own[:, channel], latents[:, channel] * std + mean)
    torch.testing.assert_close(normalize_latents(vae, own), latents, atol=1e-5, rtol=0)
    assert normalize_latents(vae, own.bfloat16()).dtype == torch.float32
    with pytest.raises(ShapeError, match=f"{own.shape[1]} means"):
        normalize_latents(vae, own[:, 1:])


NONE = VaeLevers(**dict.fromkeys((field.name for field in fields(VaeLevers)), False))
LEVERS = {
    "all": VaeLevers(),
    "none": NONE,
    **{field.name: replace(NONE, **{field.name: True}) for field in fields(VaeLevers)},
}


@cache
def reference_of(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents and video as diffusers' own encode and decode give them, in double precision."""
    vae: Any = copy.deepcopy(vae_of(name))
    vae = vae.to(dtype)
    with torch.no_grad():
        own = vae.encode(video_of(name).to(dtype)).latent_dist.mode()
        latents = denormalize_latents(vae, latents_of(name)).to(dtype)
        return normalize_latents(vae, own), vae.decode(latents).sample.float()


@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("name", ["wan21", "wan22"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.03)],
)
def test_whole_clip_is_that_of_diffusers(name, dtype, tolerance, lever):
    vae: Any = copy.deepcopy(vae_of(name))
    vae.to(dtype)
    latents, video = reference_of(name, torch.float64)
    results = (
        (StreamingEncoder(vae, levers=LEVERS[lever]).encode(video_of(name)), latents),
        (StreamingDecoder(vae, levers=LEVERS[lever]).decode(latents_of(name)), video),
    )

    for result, expected in results:
        assert (result - expected).norm() / expected.norm() < tolerance  # float32 results
    assert (video.abs() < 1).float().mean() > 0.9  # the clamp does not hide differences


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_in_16_bits_it_is_as_near_to_the_truth_as_diffusers(name):
    vae: Any = copy.deepcopy(vae_of(name))
    vae.bfloat16()
    ours = (
        StreamingEncoder(vae).encode(video_of(name)),
        StreamingDecoder(vae).decode(latents_of(name)),
    )
    truth, theirs = (reference_of(name, dtype) for dtype in (torch.float64, torch.bfloat16))
    for own, exact, other in zip(ours, truth, theirs, strict=True):
        assert (own - exact).norm() < 1.2 * (other - exact).norm()


def test_whole_clip_of_the_block_codec_is_its_closed_form():
    codec, video = vae_of("block"), video_of("block")
    own = torch.cat([codec.encode_frames(video[:, :, :1]), codec.encode_frames(video[:, :, 1:])], 2)

    torch.testing.assert_close(encoded("block"), normalize_latents(codec, own), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["block", "block4"])
def test_block_codec_loses_nothing(name):
    codec, video = vae_of(name), video_of(name)
    restored = StreamingDecoder(codec).decode(StreamingEncoder(codec).encode(video))

    torch.testing.assert_close(restored, video, atol=1e-5, rtol=0)


@per_vae_and_tile
@few
@given(cuts=pieces(NUM_FRAMES))
def test_latents_do_not_depend_on_how_the_clip_was_cut(name, tile, cuts):
    encoder = StreamingEncoder(vae_of(name), tile=tile)
    latents = [encoder.encode(video_of(name)[:, :, cut]) for cut in cuts]
    encoder.finish()

    assert torch.equal(torch.cat(latents, dim=2), encoded(name, tile))


@pytest.mark.slow
@per_vae_and_tile
@few
@given(cuts=pieces(NUM_LATENT_FRAMES))
def test_video_does_not_depend_on_how_the_latents_were_cut(name, tile, cuts):
    decoder = StreamingDecoder(vae_of(name), tile=tile)
    video = [decoder.decode(latents_of(name)[:, :, cut]) for cut in cuts]

    assert torch.equal(torch.cat(video, dim=2), decoded(name, tile))


@per_vae_and_tile
@pytest.mark.parametrize("place", [0, 1, 3, 7, 13])
def test_encoder_continues_from_a_saved_state(name, tile, place):
    video = video_of(name)
    encoder = StreamingEncoder(vae_of(name), tile=tile)
    before = encoder.encode(video[:, :, :place])
    saved = safetensors.torch.save(encoder.state_dict())
    other = StreamingEncoder(vae_of(name), tile=tile)
    other.load_state_dict(safetensors.torch.load(saved))
    after = other.encode(video[:, :, place:], final=True)

    assert torch.equal(torch.cat([before, after], dim=2), encoded(name, tile))


@per_vae_and_tile
@pytest.mark.parametrize("place", range(NUM_LATENT_FRAMES + 1))
def test_decoder_continues_from_a_saved_state(name, tile, place):
    latents = latents_of(name)
    decoder = StreamingDecoder(vae_of(name), tile=tile)
    before = decoder.decode(latents[:, :, :place])
    saved = safetensors.torch.save(decoder.state_dict())
    other = StreamingDecoder(vae_of(name), tile=tile)
    other.load_state_dict(safetensors.torch.load(saved))
    after = other.decode(latents[:, :, place:])

    assert torch.equal(torch.cat([before, after], dim=2), decoded(name, tile))


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_streams_share_a_vae_without_disturbing_each_other(name):
    vae, video, latents = vae_of(name), video_of(name), latents_of(name)
    encoder, mirrored, decoder = StreamingEncoder(vae), StreamingEncoder(vae), StreamingDecoder(vae)
    parts, frames = [], []
    for index, cut in enumerate([slice(0, 1), slice(1, 5), slice(5, 9), slice(9, 13)]):
        parts.append(encoder.encode(video[:, :, cut]))
        mirrored.encode(video[:, :, cut].flip(-1))
        frames.append(decoder.decode(latents[:, :, index : index + 1]))
        with torch.no_grad():
            vae.encode(video[:, :, :1])

    assert torch.equal(torch.cat(parts, dim=2), encoded(name))
    assert torch.equal(torch.cat(frames, dim=2), decoded(name))


@per_vae
def test_latent_frames_come_out_as_soon_as_they_are_complete(name):
    encoder = StreamingEncoder(vae_of(name))
    counts = [
        encoder.encode(video_of(name)[:, :, place : place + 1]).shape[2]
        for place in range(NUM_FRAMES)
    ]

    assert counts == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1]


@per_vae
def test_first_latent_frame_gives_one_frame_and_the_others_four(name):
    decoder = StreamingDecoder(vae_of(name))
    counts = [decoder.decode(latents_of(name)[:, :, :n]).shape[2] for n in (0, 1, 1, 0, 2)]

    assert counts == [0, 1, 4, 0, 8]


def test_reset_and_the_end_of_a_clip_start_another_of_any_size():
    video = video_of("wan21")
    encoder = StreamingEncoder(vae_of("wan21"))
    encoder.encode(video[:, :, :3, :24])
    encoder.reset()
    assert torch.equal(encoder.encode(video, final=True), encoded("wan21"))
    assert torch.equal(encoder.encode(video), encoded("wan21"))
    encoder.finish()
    assert torch.equal(encoder.encode(video), encoded("wan21"))
    decoder = StreamingDecoder(vae_of("wan21"))
    decoder.decode(latents_of("wan21")[..., :3])
    decoder.reset()
    assert torch.equal(decoder.decode(latents_of("wan21")), decoded("wan21"))


def test_frames_that_do_not_fill_a_latent_frame_are_refused_at_the_end_and_kept():
    video = video_of("wan21")
    encoder = StreamingEncoder(vae_of("wan21"))
    first = encoder.encode(video[:, :, :7])
    with pytest.raises(ShapeError, match=r"2 frames are left.*add 2 or leave out the last 2"):
        encoder.finish()
    with pytest.raises(ShapeError, match=r"3 frames are left.*add 1 or leave out the last 3"):
        encoder.encode(video[:, :, 7:8], final=True)
    rest = encoder.encode(video[:, :, 7:], final=True)

    assert torch.equal(torch.cat([first, rest], dim=2), encoded("wan21"))


@per_vae
def test_a_tile_that_covers_the_frame_changes_nothing(name):
    assert torch.equal(encoded(name, WIDTH), encoded(name))
    assert torch.equal(decoded(name, WIDTH + 5), decoded(name))


@per_vae
def test_frames_do_not_depend_on_tiles(name):
    torch.testing.assert_close(encoded(name, 4), encoded(name), atol=1e-5, rtol=0)
    torch.testing.assert_close(decoded(name, 4), decoded(name), atol=1e-5, rtol=0)


def test_results_are_float32_and_can_enter_a_training_graph():
    codec = BlockCodec().to(torch.bfloat16)
    latents = StreamingEncoder(codec).encode(video_of("block")[:, :, :5].double())
    video = StreamingDecoder(codec).decode(latents)
    assert latents.dtype == video.dtype == torch.float32

    weight = torch.ones(latents.shape[-1], requires_grad=True)
    (latents * weight).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None

    vae = wan(z_dim=16)
    encoder = StreamingEncoder(vae)
    encoder.encode(video_of("wan21")[:, :, :5])
    assert not any(tensor.requires_grad for tensor in encoder.state_dict().values())


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_encoder_and_decoder_have_number_types_of_their_own(name, tmp_path):
    torch.manual_seed(0)
    vae_of(name).save_pretrained(tmp_path / "vae")
    source = ComponentSource(source=str(tmp_path / "vae"), encode_dtype="float32")
    mixed = load_component("stage2_vae", source, tmp_path, torch.bfloat16, torch.device("cpu"))
    half: Any = copy.deepcopy(vae_of(name))
    half.bfloat16()

    assert torch.equal(StreamingEncoder(mixed).encode(video_of(name)), encoded(name))
    expected = StreamingDecoder(half).decode(latents_of(name))
    assert torch.equal(StreamingDecoder(mixed).decode(latents_of(name)), expected)
    assert not torch.equal(expected, decoded(name))


def test_number_types_are_refused_where_there_are_no_networks(tmp_path):
    BlockCodec().save_pretrained(tmp_path / "vae")
    source = ComponentSource(source=str(tmp_path / "vae"), decode_dtype="float16")
    with pytest.raises(LoadingError, match=r"given for a BlockCodec.*leave them out"):
        load_component("stage2_vae", source, tmp_path, torch.float32, torch.device("cpu"))


def test_works_in_inference_mode_and_out_of_it_within_one_clip():
    encoder, video = StreamingEncoder(vae_of("wan22")), video_of("wan22")
    with torch.inference_mode():
        first = encoder.encode(video[:, :, :6])
    rest = encoder.encode(video[:, :, 6:])

    assert torch.equal(torch.cat([first, rest], dim=2), encoded("wan22"))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 4, 5, 64, 64), r"\(1, 4, 5, 64, 64\); give \[B, 3, T, H, W\]"),
        ((3, 5, 64, 64), r"\(3, 5, 64, 64\); give"),
        ((1, 3, 5, 64, 72), "64 x 72 pixels do not fit.*multiples of 16"),
        ((1, 3, 5, 64, 80), r"\(1, 4, 5\) follows pieces of \(1, 4, 4\).*reset\(\)"),
        ((2, 3, 5, 64, 64), r"\(2, 4, 4\) follows pieces of \(1, 4, 4\)"),
    ],
)
def test_a_video_that_does_not_fit_is_refused(size, message):
    encoder = StreamingEncoder(vae_of("wan22"))
    encoder.encode(video_of("wan22")[:, :, :3, :64, :64])
    before = safetensors.torch.save(encoder.state_dict())
    with pytest.raises(ShapeError, match=message):
        encoder.encode(torch.zeros(size))

    assert safetensors.torch.save(encoder.state_dict()) == before


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 48, 1, 4, 4), r"\(1, 48, 1, 4, 4\); give \[B, 16, F, h, w\]"),
        ((16, 1, 4, 4), r"\(16, 1, 4, 4\); give"),
        ((1, 16, 1, 4, 5), r"\(1, 4, 5\) follows pieces of \(1, 4, 4\).*reset\(\)"),
    ],
)
def test_latents_that_do_not_fit_are_refused(size, message):
    decoder = StreamingDecoder(vae_of("wan21"))
    decoder.decode(torch.zeros(1, 16, 1, 4, 4))
    with pytest.raises(ShapeError, match=message):
        decoder.decode(torch.zeros(size))


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="tile is 3; it must be None or at least 4"):
        StreamingDecoder(vae_of("wan21"), tile=3)
    with pytest.raises(LoadingError, match=r"\(4, 8\) for time and space.*make \(4, 16\)"):
        StreamingEncoder(wan(in_channels=12, out_channels=12, patch_size=2))
    with pytest.raises(LoadingError, match="AutoencoderKL cannot be streamed"):
        StreamingEncoder(AutoencoderKL())  # type: ignore[arg-type, no-untyped-call]
