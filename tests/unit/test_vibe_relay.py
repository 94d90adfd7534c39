"""The proof of ViBe's recipe at nano scale, with steps and clips as few as can be."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runs import vibe_relay
from swifti2v.errors import InputError
from swifti2v.training.engine.draws import Draw
from swifti2v.training.nano.models import NanoSize
from tests.helpers.command_line import save_clip, save_photo

DRAW = Draw(seed=3, step=5, batch_size=2, indices=(0, 1))


def test_crops_of_pictures_are_within_them_and_of_the_step_alone() -> None:
    ramp = (np.arange(40 * 50 * 3, dtype=np.uint16).reshape(40, 50, 3) % 251).astype(np.uint8)
    source = vibe_relay.PictureCrops([np.zeros((8, 8, 3), np.uint8), ramp], 16)
    first, again = source.load(DRAW), source.load(DRAW)
    assert first.video.shape == (2, 3, 1, 16, 16)
    assert torch.equal(first.video, again.video)
    assert not torch.equal(first.video, source.load(replace(DRAW, step=6)).video)
    levels = ((first.video + 1) * 127.5).round().byte().numpy()
    windows = np.lib.stride_tricks.sliding_window_view(ramp, (16, 16), (0, 1))
    for one in levels[:, :, 0]:
        assert any((windows == side).all(axis=(2, 3, 4)).any() for side in (one, one[..., ::-1]))
    with pytest.raises(InputError, match="none of 1 pictures is 16 px large"):
        vibe_relay.PictureCrops([np.zeros((8, 64, 3), np.uint8)], 16)


@pytest.mark.slow
def test_the_proof_runs_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "HELD_OUT": ("held_out",),
        "SEEDS": (0,),
        "SIZE": NanoSize(num_heads=2, num_layers=1),
        "NUM_FRAMES": 5,
        "READ_FRAMES": 5,
        "CROP": 64,
        "NUM_CROPS": 1,
        "VIDEO_STEPS": 1,
        "IMAGE_STEPS": 1,
        "BATCH": 2,
        "DOCUMENT": tmp_path / "vibe.md",
    }
    document = vibe_relay.DOCUMENT.read_text(encoding="utf-8")
    for name, value in changes.items():
        monkeypatch.setattr(vibe_relay, name, value)
    vibe_relay.DOCUMENT.write_text(document, encoding="utf-8")
    (tmp_path / "data").mkdir()
    for name in ("held_out", "trained"):
        save_clip(tmp_path / "data" / f"{name}.mkv", 5, 160, 96)
    save_photo(tmp_path / "data" / "photo.png", 160, 96)
    for _ in range(2):
        vibe_relay.main(tmp_path / "data", tmp_path / "out")
    rows = sorted(path.name for path in (tmp_path / "out" / "rows").iterdir())
    assert len(rows) == 12
    written = vibe_relay.DOCUMENT.read_text(encoding="utf-8")
    assert "| relay, HFATO, GCLF | 1 |" in written
    before, mark, _ = written.partition(vibe_relay.MARK)
    assert document.startswith(before + mark)
