"""A causal history that waits in host memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from swifti2v.config import Stage2Config
from swifti2v.models.runtime.placement import is_streamed, place
from swifti2v.models.vae.causal_conv import History
from swifti2v.models.vae.frame_codec import fetch_history, store_history
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
from swifti2v.pipelines.transition import HybridReference, MotionReference
from tests.helpers.tiny import SIZE, tiny_pipeline, tiny_vae

CPU = torch.device("cpu")


@pytest.mark.parametrize("tile", [None, 4])
def test_it_changes_nothing(tile):
    generator = torch.Generator().manual_seed(0)
    vae, size = tiny_vae(), (1, 3, 9, 32, 56)
    video = torch.rand(size, generator=generator) * 2 - 1
    latents = torch.randn(1, 16, 3, 4, 7, generator=generator)
    kept, moved = (
        (
            StreamingEncoder(vae, tile=tile, offloads_history=offloads),
            StreamingDecoder(vae, tile=tile, offloads_history=offloads),
        )
        for offloads in (False, True)
    )

    for frames, cells in ((slice(0, 5), slice(0, 2)), (slice(5, None), slice(2, None))):
        assert torch.equal(*(encoder.encode(video[:, :, frames]) for encoder, _ in (kept, moved)))
        assert torch.equal(*(decoder.decode(latents[:, :, cells]) for _, decoder in (kept, moved)))


def test_it_survives_a_saved_state():
    vae, latents = tiny_vae(), torch.randn(1, 16, 4, 4, 7)
    whole = StreamingDecoder(vae).decode(latents)
    first = StreamingDecoder(vae, offloads_history=True)
    first.decode(latents[:, :, :2])

    second = StreamingDecoder(vae, offloads_history=True)
    second.load_state_dict(first.state_dict())

    assert torch.equal(second.decode(latents[:, :, 2:]), whole[:, :, 5:])


def test_the_layout_of_a_history_is_kept():
    entry = torch.randn(1, 4, 2, 3, 3).to(memory_format=torch.channels_last_3d)
    history: History = [None, entry.clone()]

    store_history(history)
    fetch_history(history, CPU)

    nothing, restored = history
    assert nothing is None
    assert restored is not None
    assert torch.equal(restored, entry)
    assert restored.stride() == entry.stride()


def test_the_offloaded_placement_makes_the_same_frames():
    photo = Image.new("RGB", (SIZE, SIZE), (200, 30, 90))
    expected = tiny_pipeline()(photo, "zoom", generator=1).frames
    pipe = tiny_pipeline()

    place(pipe.components, CPU, "offloaded")

    assert pipe.components.offloads_history
    assert is_streamed(pipe.components.stage2_transformer)
    assert (pipe(photo, "zoom", generator=1).frames == expected).all()
    resident = tiny_pipeline()
    place(resident.components, CPU, "resident")
    assert not resident.components.offloads_history


@pytest.mark.parametrize("tile", [None, 8])
def test_a_reference_encoded_in_larger_pieces_is_the_same(tile):
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (17, 16, 28, 3), dtype=np.uint8)
    photo = torch.rand(1, 3, 1, 64, 112) * 2 - 1
    kept, moved = (
        HybridReference(
            MotionReference(clip),
            photo,
            tiny_vae(),
            Stage2Config(vae_tile=tile),
            offloads_history=offloads,
        )
        for offloads in (False, True)
    )

    for frames in ((0,), (0, 1, 2), (0, 2, 3, 4)):
        assert torch.equal(kept.latents(frames), moved.latents(frames))
