"""State of a clip on its way through a VAE: bounded, complete, and only for its own kind."""

from functools import cache
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swifti2v.errors import ConfigError, LoadingError, ShapeError
from swifti2v.models.vae.block_codec import BlockCodec
from swifti2v.models.vae.frame_codec import VideoVAE
from swifti2v.models.vae.state import MIN_TILE
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
from tests.helpers.tiny import tiny_vae
from tests.helpers.wan_vae import deep_vae

HEIGHT, WIDTH = 4, 7
"""Latent cells of a frame: with tiles of 4 there are two."""
NUM_LATENT_FRAMES = 4
CASES = [("wan21", None), ("wan21", 4), ("wan22", None), ("block", None)]
per_case = pytest.mark.parametrize(("name", "tile"), CASES)
per_kind = pytest.mark.parametrize("kind", [StreamingEncoder, StreamingDecoder])


@cache
def vae_of(name: str) -> VideoVAE:
    if name == "wan21":
        return tiny_vae()
    return deep_vae(name) if name == "wan22" else BlockCodec()


@cache
def pieces_of(kind: Any, name: str) -> tuple[Tensor, ...]:
    """A clip of 4 latent frames, a piece for each."""
    config = vae_of(name).config
    generator = torch.Generator().manual_seed(2)
    if kind is StreamingDecoder:
        size = (1, config["z_dim"], NUM_LATENT_FRAMES, HEIGHT, WIDTH)
        return torch.split(torch.randn(size, generator=generator), 1, dim=2)
    side = config["scale_factor_spatial"]
    size = (1, 3, 4 * NUM_LATENT_FRAMES - 3, HEIGHT * side, WIDTH * side)
    video = torch.rand(size, generator=generator) * 2 - 1
    return torch.split(video, [1, 4, 4, 4], dim=2)


def run(stream: Any, pieces: tuple[Tensor, ...]) -> Tensor:
    step = stream.encode if isinstance(stream, StreamingEncoder) else stream.decode
    return torch.cat([step(piece) for piece in pieces], dim=2)


@cache
def whole(kind: Any, name: str, tile: int | None) -> Tensor:
    return run(kind(vae_of(name), tile=tile), pieces_of(kind, name))


def num_elements(state: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


@pytest.mark.slow
@per_kind
@per_case
def test_a_state_of_any_place_continues_the_clip_bit_by_bit(kind, name, tile):
    pieces = pieces_of(kind, name)
    stream = kind(vae_of(name), tile=tile)
    for place in range(NUM_LATENT_FRAMES):
        other = kind(vae_of(name), tile=tile)
        other.load_state_dict(safetensors.torch.load(safetensors.torch.save(stream.state_dict())))
        rest = run(other, pieces[place:])
        assert torch.equal(rest, whole(kind, name, tile)[:, :, -rest.shape[2] :])
        run(stream, pieces[place : place + 1])


@per_kind
@per_case
def test_what_is_remembered_does_not_grow_with_the_clip(kind, name, tile):
    stream = kind(vae_of(name), tile=tile)
    pieces = pieces_of(kind, name)
    run(stream, pieces[:2])  # the second one fills the history
    held = [sum(entry.numel() for entry in stream.history())]
    saved = [num_elements(stream.state_dict())]
    for piece in pieces[2:]:
        run(stream, (piece,))
        held.append(sum(entry.numel() for entry in stream.history()))
        saved.append(num_elements(stream.state_dict()))
    assert len(set(held)) == len(set(saved)) == 1
    assert (held[0] == 0) == (name == "block")  # frames of the block codec stand alone


@per_kind
def test_a_stream_at_its_start_remembers_nothing_and_its_state_starts_a_clip(kind):
    stream = kind(vae_of("wan21"))
    assert stream.history() == []
    (progress,) = stream.state_dict()
    assert progress.endswith(".progress")
    other = kind(vae_of("wan21"))
    run(other, pieces_of(kind, "wan21")[:2])
    other.load_state_dict(stream.state_dict())
    assert torch.equal(run(other, pieces_of(kind, "wan21")), whole(kind, "wan21", None))


@per_kind
def test_a_reset_stream_takes_a_clip_of_another_size(kind):
    stream = kind(vae_of("wan21"))
    run(stream, tuple(piece[..., : piece.shape[-1] // WIDTH] for piece in pieces_of(kind, "wan21")))
    assert stream.history()
    stream.reset()
    assert stream.history() == []
    assert torch.equal(run(stream, pieces_of(kind, "wan21")), whole(kind, "wan21", None))


@per_kind
def test_a_piece_of_another_size_is_refused_and_nothing_is_taken_in(kind):
    stream = kind(vae_of("wan21"))
    pieces = pieces_of(kind, "wan21")
    run(stream, pieces[:2])
    for wrong in (pieces[2].repeat(2, 1, 1, 1, 1), pieces[2].repeat(1, 1, 1, 2, 1)):
        with pytest.raises(ShapeError, match=r"all pieces of a clip have one size; call reset\(\)"):
            run(stream, (wrong,))
    rest = run(stream, pieces[2:])
    assert torch.equal(rest, whole(kind, "wan21", None)[:, :, -rest.shape[2] :])


def test_encoder_and_decoder_share_a_file():
    kinds: tuple[Any, ...] = (StreamingEncoder, StreamingDecoder)
    states = []
    for kind in kinds:
        stream = kind(vae_of("wan21"))
        run(stream, pieces_of(kind, "wan21")[:2])
        states.append(stream.state_dict())
    assert not states[0].keys() & states[1].keys()
    for kind in kinds:
        other = kind(vae_of("wan21"))
        other.load_state_dict(states[0] | states[1])
        rest = run(other, pieces_of(kind, "wan21")[2:])
        assert torch.equal(rest, whole(kind, "wan21", None)[:, :, -rest.shape[2] :])


@per_kind
def test_a_state_is_a_copy_on_the_way_out_and_in(kind):
    pieces = pieces_of(kind, "wan21")
    stream, other = kind(vae_of("wan21")), kind(vae_of("wan21"))
    run(stream, pieces[:2])
    state = stream.state_dict()
    other.load_state_dict(state)
    for tensor in state.values():
        tensor.zero_()
    for each in (stream, other):
        rest = run(each, pieces[2:])
        assert torch.equal(rest, whole(kind, "wan21", None)[:, :, -rest.shape[2] :])


def test_frames_that_do_not_fill_a_latent_frame_are_part_of_the_state():
    video = torch.cat(pieces_of(StreamingEncoder, "wan21"), dim=2)
    encoder, other = StreamingEncoder(vae_of("wan21")), StreamingEncoder(vae_of("wan21"))
    encoder.encode(video[:, :, :7])  # 1 + 4 + 2
    other.load_state_dict(encoder.state_dict())
    rest = other.encode(video[:, :, 7:], final=True)
    assert torch.equal(rest, whole(StreamingEncoder, "wan21", None)[:, :, 2:])


def test_a_state_of_another_kind_vae_or_tile_is_refused_and_the_clip_kept():
    pieces = pieces_of(StreamingEncoder, "wan21")
    encoder = StreamingEncoder(vae_of("wan21"))
    run(encoder, pieces[:2])
    state = encoder.state_dict()
    with pytest.raises(LoadingError, match=r"no 'decoder\.progress'.*StreamingDecoder"):
        StreamingDecoder(vae_of("wan21")).load_state_dict(state)
    with pytest.raises(LoadingError, match=r"16 latent channels and tile None.* has 768 and None"):
        StreamingEncoder(vae_of("block")).load_state_dict(state)
    with pytest.raises(LoadingError, match=r"tile None.* has 16 and 4"):
        StreamingEncoder(vae_of("wan21"), tile=4).load_state_dict(state)
    for key in ("encoder.history.0.99", "encoder.history.99.0"):
        with pytest.raises(LoadingError, match=f"'{key}', which this VAE has no place for"):
            encoder.load_state_dict(state | {key: torch.zeros(1)})
    rest = run(encoder, pieces[2:])
    assert torch.equal(rest, whole(StreamingEncoder, "wan21", None)[:, :, 2:])


@settings(max_examples=20, deadline=None)
@given(tile=st.integers(-8, 2 * MIN_TILE))
def test_a_tile_below_the_smallest_is_refused(tile):
    if tile >= MIN_TILE:
        StreamingDecoder(vae_of("wan21"), tile=tile)
        return
    with pytest.raises(
        ConfigError, match=f"tile is {tile}; it must be None or at least {MIN_TILE}"
    ):
        StreamingDecoder(vae_of("wan21"), tile=tile)
