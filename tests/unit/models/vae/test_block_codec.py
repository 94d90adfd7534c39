import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.errors import LoadingError
from swifti2v.models.vae import block_codec as codec_module
from swifti2v.models.vae.block_codec import (
    BlockCodec,
    cosine_basis,
    count_channels,
    lapping,
    side_transform,
)
from swifti2v.training.nano.codec import mean_channels

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


@per_side
def test_lapping_is_orthonormal_mixes_across_the_border_and_leaves_constants(side):
    matrix = lapping(side)

    torch.testing.assert_close(matrix @ matrix.T, torch.eye(side), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix @ torch.ones(side), torch.ones(side), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix.flip(0, 1), matrix, atol=1e-6, rtol=0)  # either way alike
    assert matrix[: side // 2, side // 2 :].abs().max() > 0.1


@per_side
@pytest.mark.parametrize("cells", [1, 2, 3, 5])
def test_a_whole_row_is_transformed_orthonormally(side, cells):
    matrix = side_transform(cells * side, side, torch.device("cpu"))

    torch.testing.assert_close(matrix @ matrix.T, torch.eye(cells * side), atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    num_frames=st.sampled_from([1, 4, 12]),
    side=st.sampled_from([4, 8]),
    cells=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_nothing_is_lost(seed, num_frames, side, cells):
    video = random_video(seed, num_frames, cells[0] * side, cells[1] * side)

    torch.testing.assert_close(round_trip(video, side), video, atol=1e-5, rtol=0)


@per_side
@pytest.mark.parametrize("cells", [(1, 1), (3, 4)])
def test_constants_stay_constants(side, cells):
    colour = torch.tensor([0.7, -0.2, 0.4])[None, :, None, None, None]
    codec = make_codec(side)
    latents = codec.encode_frames(colour.expand(-1, -1, 4, cells[0] * side, cells[1] * side))
    means = latents[:, list(mean_channels(codec.config["z_dim"]))]

    torch.testing.assert_close(means, means[..., :1, :1].expand_as(means), atol=1e-5, rtol=0)
    # A mean is the sum over the cell's 4 n^2 values, divided by its root.
    torch.testing.assert_close(
        means[0, 0, 0, 0, 0], luma(colour).squeeze() * side * 2, atol=1e-5, rtol=0
    )
    assert latents.abs().sum() - means.abs().sum() < 1e-2


@per_side
def test_an_error_in_one_cell_fades_out_over_its_borders(side):
    codec = make_codec(side)
    latents = torch.zeros(1, codec.config["z_dim"], 1, 5, 5)
    latents[0, 0, 0, 2, 2] = 1  # brightness
    error = codec.decode_frames(latents, first=True)[0, 0, 0]
    row = error[5 * side // 2]
    steps = row.diff().abs()

    middle = slice(2 * side - side // 2, 3 * side + side // 2)
    assert row[: middle.start].abs().max() < 1e-6
    assert row[middle.stop :].abs().max() < 1e-6
    assert row[middle].abs().min() > 0  # half a cell further on either side
    # A step at the borders as elsewhere; without lapping it would be as high as the error, alone.
    at_borders = steps[side - 1 :: side].max()
    inside = steps.reshape(-1)[[k for k in range(len(steps)) if (k + 1) % side]].max()
    assert at_borders < {4: 1.5, 8: 1.2}[side] * inside
    assert at_borders < {4: 0.5, 8: 0.25}[side] * row.max()


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

    assert first.shape == (2, 12 * side**2, 1, 16 // side, 24 // side)
    torch.testing.assert_close(others, first.expand(-1, -1, 2, -1, -1), atol=1e-6, rtol=0)


@per_side
def test_channels_are_time_row_column_frequencies_of_luma_then_chroma(side):
    codec = make_codec(side)
    for time, row, column in [(0, 0, 0), (3, 0, 2), (1, side - 1, side - 3)]:
        latents = torch.zeros(1, 12 * side**2, 1, 1, 1)  # one cell: nothing is lapped
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
    assert chroma[4 * side**2] < 0


@per_side
def test_cells_depend_on_no_more_than_half_of_their_neighbours(side):
    video = random_video(7, 4, 3 * side, 5 * side)
    codec = make_codec(side)
    whole = codec.encode_frames(video)[..., 1, 2]
    near = torch.zeros_like(video)
    rows = slice(side // 2, 2 * side + side // 2)
    columns = slice(side + side // 2, 3 * side + side // 2)
    near[..., rows, columns] = video[..., rows, columns]

    torch.testing.assert_close(codec.encode_frames(near)[..., 1, 2], whole)
    assert not torch.allclose(codec.encode_frames(video[..., side : 2 * side, :])[..., 0, 2], whole)


def test_a_frame_that_stands_alone_is_the_mean_of_its_four():
    latents = torch.randn(1, 768, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    four = BlockCodec().decode_frames(latents, first=False)

    assert four.shape == (1, 3, 4, 16, 24)
    one = BlockCodec().decode_frames(latents, first=True)
    torch.testing.assert_close(one, four.mean(dim=2, keepdim=True))


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
    assert config["z_dim"] == {4: 192, 8: 768}[side]


def test_first_use_in_inference_mode_leaves_training_possible():
    codec_module._constants.cache_clear()
    codec_module.side_transform.cache_clear()
    video = random_video(9, 4).requires_grad_()
    with torch.inference_mode():
        BlockCodec().encode_frames(video)
    BlockCodec().encode_frames(video).square().sum().backward()

    assert video.grad is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z_dim": 16}, "16, 4, 8"),
        ({"z_dim": 384}, "384, 4, 8"),  # of an older codec, whose chroma was halved
        ({"scale_factor_spatial": 16}, "768, 4, 16"),
        ({"scale_factor_spatial": 4}, "768, 4, 4"),
        ({"z_dim": 192}, "192, 4, 8"),
        ({"z_dim": 192, "scale_factor_spatial": 4, "latents_std": [1.0] * 768}, "give 192 of each"),
        ({"latents_mean": [0.0] * 16}, "latents_mean has 16"),
        ({"latents_std": [0.0] * 768}, "smallest of latents_std is 0.0"),
    ],
)
def test_configuration_of_another_codec_is_refused(change, message):
    with pytest.raises(LoadingError, match=message):
        BlockCodec(**change)
