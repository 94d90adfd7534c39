import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from swifti2v.errors import LoadingError
from swifti2v.models import codec as codec_module
from swifti2v.models.codec import BlockCodec, cosine_basis, count_channels

LUMA = torch.tensor([0.2126, 0.7152, 0.0722])  # ITU-R BT.709


per_side = pytest.mark.parametrize("side", [4, 8])


def make_codec(side: int) -> BlockCodec:
    codec: BlockCodec = BlockCodec(z_dim=count_channels(side), scale_factor_spatial=side)
    return codec


def random_video(seed: int, num_frames: int, height: int = 16, width: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, num_frames, height, width, generator=generator) * 2 - 1


def luma(video: Tensor) -> Tensor:
    plane: Tensor = (LUMA[:, None, None, None] * video).sum(dim=1)
    return plane


def round_trip(video: Tensor, side: int = 8) -> Tensor:
    codec = make_codec(side)
    restored: Tensor = codec.decode_frames(codec.encode_frames(video), first=video.shape[2] == 1)
    return restored


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_basis_is_orthonormal_and_starts_with_the_mean(size):
    basis = cosine_basis(size)

    torch.testing.assert_close(basis @ basis.T, torch.eye(size), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis[0], torch.full((size,), size**-0.5))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    num_frames=st.sampled_from([1, 4, 12]),
    side=st.sampled_from([4, 8]),
)
def test_round_trip_keeps_luma(seed, num_frames, side):
    video = random_video(seed, num_frames)

    torch.testing.assert_close(luma(round_trip(video, side)), luma(video), atol=1e-5, rtol=0)


@per_side
@pytest.mark.parametrize("num_frames", [1, 8])
def test_round_trip_keeps_all_of_a_video_with_chroma_in_squares_of_two(num_frames, side):
    small = random_video(3, num_frames, 8, 8)
    video = small.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)

    torch.testing.assert_close(round_trip(video, side), video, atol=1e-5, rtol=0)


@per_side
def test_round_trip_loses_exactly_what_chroma_subsampling_loses(side):
    video = random_video(4, 4)
    grey = luma(video)[:, None]
    colour = video - grey  # averaging 2x2 pixels commutes with the linear change of colour space
    halved = F.avg_pool3d(colour, (1, 2, 2))
    expected = grey + halved.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)

    torch.testing.assert_close(round_trip(video, side), expected, atol=1e-5, rtol=0)


def test_smooth_colour_survives_at_high_quality():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 96), indexing="ij")
    video = torch.stack([x, y, torch.sin(3 * x * y)])[None, :, None].expand(-1, -1, 4, -1, -1)
    error = (round_trip(video) - video).square().mean()

    # Range 2. One step of 8-bit video is 48 dB; averaging such a ramp over 2x2 pixels costs less.
    assert 10 * torch.log10(4 / error) > 40


@per_side
def test_transform_keeps_energy_of_luma(side):
    video = luma(random_video(5, 4))[:, None].expand(-1, 3, -1, -1, -1)
    latents = make_codec(side).encode_frames(video)

    torch.testing.assert_close(latents.square().sum(), video[:, 0].square().sum())
    assert latents[:, 4 * side**2 :].abs().max() < 1e-5


@per_side
def test_a_still_clip_has_equal_latent_frames(side):
    codec = make_codec(side)
    frame = random_video(6, 1)
    first = codec.encode_frames(frame)
    others = codec.encode_frames(frame.expand(-1, -1, 8, -1, -1))

    assert first.shape == (2, 6 * side**2, 1, 16 // side, 24 // side)
    torch.testing.assert_close(others, first.expand(-1, -1, 2, -1, -1), atol=1e-6, rtol=0)


@per_side
def test_channels_are_time_row_column_frequencies_of_luma_then_chroma(side):
    codec = make_codec(side)
    for time, row, column in [(0, 0, 0), (3, 0, 2), (1, side - 1, side - 3)]:
        latents = torch.zeros(1, 6 * side**2, 1, 1, 1)
        latents[0, (time * side + row) * side + column] = 1
        wave = torch.einsum(
            "t,y,x->tyx", cosine_basis(4)[time], cosine_basis(side)[row], cosine_basis(side)[column]
        )

        video = codec.decode_frames(latents, first=False)

        torch.testing.assert_close(video, wave.expand(1, 3, -1, -1, -1), atol=1e-6, rtol=0)

    colour = torch.zeros(1, 3, 4, side, side)
    colour[:, 2] = 1  # blue is the strongest in Cb, which comes before Cr
    chroma = codec.encode_frames(colour)[0, 4 * side**2 :, 0, 0, 0]
    assert int(chroma.argmax()) == 0
    assert chroma[side**2] < 0


@per_side
def test_cells_do_not_depend_on_their_neighbours(side):
    video = random_video(7, 4)
    codec = make_codec(side)
    corner = codec.encode_frames(video[..., :side, side : 2 * side])

    torch.testing.assert_close(codec.encode_frames(video)[..., :1, 1:2], corner)


@per_side
def test_saved_codec_loads_with_its_statistics(tmp_path, side):
    channels = count_channels(side)
    mean, std = [0.25] * channels, [2.0 + k for k in range(channels)]
    codec = BlockCodec(
        latents_mean=mean, latents_std=std, z_dim=channels, scale_factor_spatial=side
    )
    codec.save_pretrained(tmp_path)
    loaded = BlockCodec.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    video = random_video(8, 4)

    assert loaded.dtype == torch.bfloat16
    assert list(loaded.config["latents_mean"]) == mean
    assert list(loaded.config["latents_std"]) == std
    assert loaded.config["scale_factor_spatial"] == side
    assert torch.equal(loaded.encode_frames(video), codec.encode_frames(video))


@per_side
def test_without_statistics_the_configuration_tells_zeros_and_ones(side):
    config = make_codec(side).config

    assert list(config["latents_mean"]) == [0.0] * config["z_dim"]
    assert list(config["latents_std"]) == [1.0] * config["z_dim"]
    assert config["z_dim"] == {4: 96, 8: 384}[side]


def test_first_use_in_inference_mode_leaves_training_possible():
    codec_module._constants.cache_clear()
    video = random_video(9, 4).requires_grad_()
    with torch.inference_mode():
        BlockCodec().encode_frames(video)
    BlockCodec().encode_frames(video).square().sum().backward()

    assert video.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_dim": 16}, "16, 4, 8"),
        ({"scale_factor_spatial": 16}, "384, 4, 16"),
        ({"scale_factor_spatial": 4}, "384, 4, 4"),
        ({"z_dim": 96}, "96, 4, 8"),
        ({"z_dim": 96, "scale_factor_spatial": 4, "latents_std": [1.0] * 384}, "give 96 of each"),
        ({"latents_mean": [0.0] * 16}, "latents_mean has 16"),
        ({"latents_std": [0.0] * 384}, "smallest of latents_std is 0.0"),
    ],
)
def test_configuration_of_another_codec_is_refused(change, message):
    with pytest.raises(LoadingError, match=message):
        BlockCodec(**change)
