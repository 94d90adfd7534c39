from functools import cache
from itertools import pairwise

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.errors import ConfigError
from swifti2v.models.vae.causal_conv import History
from swifti2v.models.vae.frame_codec import FrameCodec, LayerGroup, frame_codec
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
from swifti2v.models.vae.tiles import Tile, count_tiles, plan_tiles
from tests.helpers.wan_vae import deep_vae

NAMES = ["wan21", "wan22"]
per_vae = pytest.mark.parametrize("name", NAMES)


@cache
def vae_of(name: str) -> AutoencoderKLWan:
    """All layers of the published model, few channels, double precision."""
    return deep_vae(name).double()


@cache
def codec_of(name: str, whole: int = 2) -> FrameCodec:
    return frame_codec(vae_of(name), whole=whole)


def decoder_part(name: str, whole: int) -> LayerGroup:
    part = codec_of(name, whole).decoder.parts[1]
    assert part.is_tiled
    return part


def encoder_part(name: str) -> LayerGroup:
    part = codec_of(name).encoder.parts[0]
    assert part.is_tiled
    return part


def latents_of(name: str, height: int, width: int, num_frames: int) -> Tensor:
    channels = vae_of(name).config["z_dim"]
    generator = torch.Generator().manual_seed(3)
    size = (1, channels, num_frames, height, width)
    return torch.randn(size, generator=generator, dtype=torch.float64)


@settings(deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 90),
    tile=st.integers(4, 50),
    name=st.sampled_from(NAMES),
    encodes=st.booleans(),
)
def test_tiles_cover_a_frame_once_and_are_about_equal(height, width, tile, name, encodes):
    part = encoder_part(name) if encodes else decoder_part(name, 2)
    tiles = plan_tiles((height, width), tile, part.layers, part.samples)
    covered = torch.zeros(height * part.samples, width * part.samples, dtype=torch.int)
    for each in tiles:
        covered[each.rows[-1], each.columns[-1]] += 1

    assert (covered == 1).all()
    assert len(tiles) == count_tiles(height, tile) * count_tiles(width, tile)
    for sides, length in (([t.rows for t in tiles], height), ([t.columns for t in tiles], width)):
        lengths = {side[-1].stop - side[-1].start for side in sides}
        assert max(lengths) <= min(tile, length) * part.samples
        assert max(lengths) - min(lengths) <= part.samples


@settings(deadline=None)
@given(width=st.integers(1, 90), tile=st.integers(4, 50), name=st.sampled_from(NAMES))
def test_each_window_has_what_the_next_one_is_computed_from(width, tile, name):
    for part in (encoder_part(name), decoder_part(name, 2)):
        for each in plan_tiles((4, width), tile, part.layers, part.samples):
            for layer, (before, after) in zip(part.layers, pairwise(each.columns), strict=True):
                assert before.start % layer.shrinks == 0
                grown = [edge * layer.grows / layer.shrinks for edge in (before.start, before.stop)]
                assert grown[0] <= after.start < after.stop <= grown[1]


@per_vae
@pytest.mark.parametrize(("whole", "halo"), [(2, 12), (4, 10)])
def test_the_halo_of_the_decoder(name, whole, halo):
    part = decoder_part(name, whole)
    left, middle, right = plan_tiles((4, 72), 24, part.layers, part.samples)

    assert left.columns[0] == slice(0, 24 * whole + halo)
    assert middle.columns[0] == slice(24 * whole - halo, 48 * whole + halo)
    assert right.columns[0] == slice(48 * whole - halo, 72 * whole)
    assert middle.rows[0] == slice(0, 4 * whole)


def run(part: LayerGroup, frames: list[Tensor], tile: Tile) -> list[Tensor]:
    history: History = [None] * 100
    return [part.run(x, tile, history, first=i == 0) for i, x in enumerate(frames)]


@torch.no_grad()
@per_vae
@pytest.mark.parametrize("whole", [2, 4])
def test_a_tile_of_the_decoder_is_exact_and_one_sample_less_is_not(name, whole):
    start, part = codec_of(name, whole).decoder.parts
    (all_of_it,) = plan_tiles((2, 16), None, start.layers, start.samples)
    hidden = run(start, list(torch.split(latents_of(name, 2, 16, 3), 1, dim=2)), all_of_it)
    (frame,) = plan_tiles((2, 16), None, part.layers, part.samples)
    expected = run(part, hidden, frame)
    for tile in plan_tiles((2, 16), 8, part.layers, part.samples):
        inner = tile.columns[0]
        less = slice(inner.start + (inner.start > 0), inner.stop - (inner.start == 0))
        narrow = tile._replace(columns=(less, *tile.columns[1:]))
        exact, wrong = run(part, hidden, tile), run(part, hidden, narrow)
        for whole_frame, good, bad in zip(expected, exact, wrong, strict=True):
            truth = whole_frame[..., tile.rows[-1], tile.columns[-1]]
            assert (good - truth).abs().max() < 1e-13
            assert (bad - truth).abs().max() > 1e-11


@torch.no_grad()
@per_vae
def test_a_tile_of_the_encoder_is_exact_and_needs_all_that_it_reads(name):
    part = encoder_part(name)
    patch, side = part.layers[0].shrinks, vae_of(name).config["scale_factor_spatial"]
    video = torch.randn(1, 3, 5, 2 * side, 24 * side, dtype=torch.float64)
    (frame,) = plan_tiles((2, 24), None, part.layers, part.samples)
    tiles = plan_tiles((2, 24), 8, part.layers, part.samples)
    expected = run(part, [video[:, :, :1], video[:, :, 1:]], frame)
    for tile in tiles:
        read, written = tile.columns[0], tile.columns[-1]
        exact = run(part, [video[:, :, :1], video[:, :, 1:]], tile)
        for whole_frame, good in zip(expected, exact, strict=True):
            assert (good - whole_frame[..., written]).abs().max() < 1e-12
        # Its outermost samples; pairs that are halved twice round the right end up by three.
        for start, stop in (
            (read.start, read.start + 2 * patch),
            (read.stop - 4 * patch, read.stop),
        ):
            if start > 0 and stop < 24 * side:
                other = video.clone()
                other[..., start:stop] += 1
                (changed, _) = run(part, [other[:, :, :1], other[:, :, 1:]], tile)
                assert (changed - exact[0]).abs().max() > 1e-9


@pytest.mark.slow
@per_vae
@pytest.mark.parametrize("offloads", [False, True], ids=["frame by frame", "tile by tile"])
def test_a_clip_in_tiles_is_the_clip_without(name, offloads):
    vae, tile = vae_of(name), 7
    latents = latents_of(name, 8, 14, 3)
    decoder = StreamingDecoder(vae, tile=tile, offloads_history=offloads)
    frames = [decoder.decode(piece) for piece in torch.split(latents, [2, 1], dim=2)]
    video = torch.cat(frames, dim=2)
    encoder = StreamingEncoder(vae, tile=tile, offloads_history=offloads)
    cells = [encoder.encode(piece) for piece in torch.split(video, [2, 7], dim=2)]

    # Results are float32: double precision that differs in the last bit may round to two neighbours.
    assert (video - StreamingDecoder(vae).decode(latents)).abs().max() <= 2**-23
    expected = StreamingEncoder(vae).encode(video)
    torch.testing.assert_close(torch.cat(cells, dim=2), expected, rtol=2**-22, atol=1e-9)


def test_layers_that_attend_to_large_frames_cannot_be_tiled():
    vae = AutoencoderKLWan(
        base_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1, z_dim=16, attn_scales=[0.5]
    )
    encoder = StreamingEncoder(vae, tile=4)
    with pytest.raises(ConfigError, match="tile is 4, but this VAE attends to whole frames"):
        encoder.encode(torch.zeros(1, 3, 1, 64, 64))

    assert StreamingEncoder(vae).encode(torch.zeros(1, 3, 1, 64, 64)).shape == (1, 16, 1, 8, 8)
