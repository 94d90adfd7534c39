"""vbench-lite: the real extractor classes with tiny random weights."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, ViTConfig, ViTModel

from swifti2v.errors import ConfigError, LoadingError, MediaError, ShapeError
from swifti2v.evaluation.vbench import backbones
from swifti2v.evaluation.vbench import frame_transforms as transforms
from swifti2v.evaluation.vbench.dimensions import LITE
from swifti2v.evaluation.vbench.lite import LiteVideo, load_measure, measure_all
from swifti2v.evaluation.vbench.suite import SuiteEntry, SuiteVideo
from swifti2v.media import open_writer
from tests.helpers.evaluation_clips import panning_clip, texture

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of extractors as ``--weights`` takes it."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**TINY, patch_size=16), add_pooling_layer=False).save_pretrained(
        folder / "dino-vitb16"
    )
    for name, patch in (("clip-vit-b-32", 32), ("clip-vit-l-14", 14)):
        config = CLIPVisionConfig(
            **TINY, patch_size=patch, projection_dim=768, hidden_act="quick_gelu"
        )
        CLIPVisionModelWithProjection(config).save_pretrained(folder / name)
    head = torch.nn.Linear(768, 1)
    torch.nn.init.constant_(head.bias, 5.0)
    torch.save(head.state_dict(), folder / backbones.HEAD)
    return folder


def make_video(
    folder: Path, name: str, clip: NDArray[np.uint8], photo: NDArray[np.uint8] | None = None
) -> LiteVideo:
    entry = SuiteEntry(prompt_en=name, dimension=LITE, image_type="other", image_name=f"{name}.png")
    item = LiteVideo(
        video=SuiteVideo(entry=entry, sample=0),
        path=folder / f"{name}-0.mp4",
        photo=folder / f"{name}.png",
    )
    height, width = clip.shape[1:3]
    with open_writer(item.path, height=height, width=width, fps=16, crf=0) as writer:
        writer.write(clip)
    Image.fromarray(clip[0] if photo is None else photo).save(item.photo)
    return item


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    still = np.repeat(texture(144, 256)[None], 5, axis=0)
    cut = np.concatenate([still[:2], np.zeros_like(still[:3])])
    return {
        "still": make_video(folder, "still", still),
        "cut": make_video(folder, "cut", cut),
        "other": make_video(folder, "other", still, np.zeros_like(still[0])),
    }


@pytest.mark.parametrize("dimension", ["subject_consistency", "background_consistency"])
def test_consistency_is_one_for_a_still_and_less_after_a_cut(weights, videos, dimension):
    measure = load_measure(dimension, weights, CPU)
    assert measure(videos["still"]).value == pytest.approx(1, abs=1e-3)
    assert measure(videos["cut"]).value < 0.995
    assert measure(videos["cut"]).num_frames == 5


def test_i2v_subject_tells_the_photo_from_another(weights, videos):
    measure = load_measure("i2v_subject", weights, CPU)
    same, other, cut = (measure(videos[name]).value for name in ("still", "other", "cut"))
    assert same == pytest.approx(1, abs=1e-2)
    assert other < same - 1e-3
    assert cut < same - 1e-3


def test_aesthetic_quality_is_the_heads_mean_over_ten(weights, videos):
    value = load_measure("aesthetic_quality", weights, CPU)(videos["still"]).value
    # The bias is 5; the embedding has length 1 and the head's random weights are below 1/sqrt(768).
    assert value == pytest.approx(0.5, abs=0.1)


def test_flickering_is_the_mean_difference(videos):
    measure = load_measure("temporal_flickering", None, CPU)
    assert measure(videos["still"]).value == pytest.approx(1, abs=1e-3)
    expected = 1 - texture(144, 256).mean() / 255 / 4
    assert measure(videos["cut"]).value == pytest.approx(expected, abs=5e-3)


def test_consistency_counts_frames_and_the_interval_prompts(tmp_path, weights, videos):
    long = make_video(tmp_path, "long", np.repeat(texture(64, 64)[None], 9, axis=0))
    measure = load_measure("subject_consistency", weights, CPU)
    seen: list[tuple[str, int]] = []
    result = measure_all(
        "subject_consistency", [videos["cut"], long], measure, lambda *done: seen.append(done)
    )
    cut = result.videos["cut-0.mp4"].value
    assert result.value == pytest.approx((4 * cut + 8 * result.videos["long-0.mp4"].value) / 12)
    assert result.interval.num_items == 2
    assert seen == [("cut-0.mp4", 1), ("long-0.mp4", 2)]
    with pytest.raises(MediaError, match="no video is for camera_motion"):
        measure_all("camera_motion", [long], measure)


def test_transforms_have_the_sizes_that_vbench_uses():
    frame = torch.rand(1, 3, 1408, 2560) * 255
    assert transforms.dino_frame(frame).shape == (1, 3, 224, 407)
    for transform in (transforms.dino_centre, transforms.clip_frame, transforms.dreamsim_frame):
        assert transform(frame).shape == (1, 3, 224, 224)
    photo = Image.fromarray(texture(90, 160))
    assert transforms.dino_photo(photo).shape == (1, 3, 224, 224)
    assert transforms.dreamsim_photo(photo).shape == (1, 3, 224, 224)


def test_only_consistency_lets_fine_detail_alias():
    frame = torch.zeros(1, 3, 224 * 4, 224 * 4)
    frame[..., ::2] = 255  # one column on, one off: filtered it is an even grey
    filtered = transforms.dreamsim_frame(frame)[..., 8:-8, 8:-8]
    assert float(filtered.max() - filtered.min()) < 0.02
    shifted = torch.zeros_like(frame)
    shifted[..., ::3] = 255
    aliased = transforms.dino_frame(shifted)
    assert float(aliased.max() - aliased.min()) > 0.5


def test_missing_or_wrong_weights_are_refused(tmp_path, weights):
    with pytest.raises(LoadingError, match=r"dino-vitb16 does not exist; put facebook/dino-vitb16"):
        load_measure("i2v_subject", tmp_path, CPU)
    (tmp_path / "dino-vitb16").mkdir()
    with pytest.raises(LoadingError, match=r"dino-vitb16 cannot be loaded"):
        load_measure("i2v_subject", tmp_path, CPU)
    (tmp_path / "clip-vit-l-14").symlink_to(weights / "clip-vit-l-14")
    with pytest.raises(LoadingError, match=r"linear.pth does not exist"):
        load_measure("aesthetic_quality", tmp_path, CPU)
    (tmp_path / backbones.HEAD).write_bytes(b"no weights")
    with pytest.raises(LoadingError, match="cannot be read as weights"):
        load_measure("aesthetic_quality", tmp_path, CPU)
    torch.save({"weight": torch.zeros(1, 5)}, tmp_path / backbones.HEAD)
    with pytest.raises(LoadingError, match=r"linear.pth does not fit"):
        load_measure("aesthetic_quality", tmp_path, CPU)


def import_or_skip(name: str) -> Any:
    """A library of the extra, or a skip where it is missing or built for another torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name}: {error}")


def test_dynamic_degree_runs_raft_on_every_second_frame(tmp_path):
    flow = import_or_skip("torchvision.models.optical_flow")
    torch.manual_seed(0)
    torch.save(flow.raft_large().state_dict(), tmp_path / backbones.RAFT)
    item = make_video(tmp_path, "pan", panning_clip(4, height=130, width=134))
    score = load_measure("dynamic_degree", tmp_path, CPU)(item)
    assert score.value in (0, 1)
    assert score.num_frames == 4
    estimate = backbones.load_raft(tmp_path, CPU)
    frame = torch.rand(1, 3, 130, 134) * 255
    assert estimate(frame, frame).shape == (2, 136, 136)
    with pytest.raises(ShapeError, match="sides of at least 128"):
        estimate(frame[..., :100, :], frame[..., :100, :])


def test_dreamsim_without_its_files_is_refused(tmp_path):
    import_or_skip("dreamsim")
    with pytest.raises(LoadingError, match="put DreamSim's files there"):
        load_measure("i2v_background", tmp_path, CPU)


def test_a_missing_library_names_the_extra(tmp_path):
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        with pytest.raises(ConfigError, match=r"dynamic_degree needs torchvision .*swifti2v\[eval"):
            load_measure("dynamic_degree", tmp_path, CPU)
