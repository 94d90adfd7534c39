"""The statistics of nano's codec."""

import pytest
import torch

from swifti2v.errors import InputError
from swifti2v.media import frames_to_video, resize_video
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.streaming import StreamingEncoder
from swifti2v.training.channel_weights import weigh_channels
from swifti2v.training.nano.codec import fit_codec
from swifti2v.training.nano.material import make_procedural_material
from swifti2v.training.stages.latents import encode_window

MATERIAL = make_procedural_material(height=64, width=64, num_frames=17, num_clips=2, seed=0)


@pytest.fixture(scope="module")
def codec() -> BlockCodec:
    return fit_codec(MATERIAL.clips)


def test_codec_statistics_scale_the_material(codec: BlockCodec) -> None:
    mean = torch.tensor(codec.config["latents_mean"])
    assert mean.nonzero().flatten().tolist() == [0, 256, 512]
    latents = StreamingEncoder(codec).encode(torch.zeros(1, 3, 1, 64, 64))
    assert latents.isfinite().all()
    assert min(codec.config["latents_std"]) > 0
    weight = weigh_channels(codec, 8.0)
    torch.testing.assert_close(weight.mean(), torch.tensor(1.0))
    assert weight[0] == weight.max()  # brightness counts most


def test_a_window_is_encoded_as_the_streaming_encoder_does(codec: BlockCodec) -> None:
    video = torch.rand(1, 3, 9, 64, 64) * 2 - 1
    encoder = StreamingEncoder(codec)
    pieces = [video[:, :, :1], video[:, :, 1:5], video[:, :, 5:]]
    streamed = torch.cat([encoder.encode(piece) for piece in pieces], dim=2)
    assert torch.equal(encode_window(codec, video), streamed)


def test_statistics_of_small_cells_are_those_of_small_videos() -> None:
    codec = fit_codec(MATERIAL.clips, 4, 4)
    assert codec.config["z_dim"] == len(codec.config["latents_std"]) == 192
    mean = torch.tensor(codec.config["latents_mean"])
    assert mean.nonzero().flatten().tolist() == [0, 64, 128]
    small = resize_video(frames_to_video(MATERIAL.clips[0][1:9]), 16, 16, "area")
    latents = codec.encode_frames(small)
    scaled = (latents - mean[:, None, None, None])[:, 1:16] / torch.tensor(
        codec.config["latents_std"]
    )[1:16, None, None, None]
    assert 0.05 < scaled.std() < 1
    with pytest.raises(InputError, match="at least 5 frames"):
        fit_codec([MATERIAL.clips[0][:4]])
