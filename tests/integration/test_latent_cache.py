"""Trainings that read latents and embeddings from a cache: the same losses, and nothing stale."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from swifti2v.config import GenerationConfig, parse_config
from swifti2v.errors import ConfigError, InputError, MediaError
from swifti2v.media import open_writer, probe_clip
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.pipelines.two_stage import SwiftI2VPipeline
from swifti2v.training.engine.draws import Draw
from swifti2v.training.engine.precision import compute_in
from swifti2v.training.stages.batches import Stage1Latents, Stage2Latents
from swifti2v.training.stages.cache_making import CacheMaking
from swifti2v.training.stages.config import CacheConfig, Stage1FineTuning, Stage2FineTuning
from swifti2v.training.stages.fine_tuning import FineTuning
from tests.helpers.regression import alone_in
from tests.helpers.tiny import SETTINGS, TRANSFORMER, tiny_components, tiny_pipeline, tiny_vae
from tests.helpers.training_clips import save_damaged_clip

CPU = torch.device("cpu")
STEPS, BATCH = 2, 3


def save_noise(path: Path, num_frames: int, side: int, seed: int) -> None:
    """A camera that goes right over noise."""
    picture = np.random.default_rng(seed).integers(0, 256, (side, side + num_frames, 3), np.uint8)
    frames = np.stack([picture[:, number : number + side] for number in range(num_frames)])
    with open_writer(path, height=side, width=side, fps=16, codec="ffv1") as writer:
        writer.write(frames)


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Clips longer than their bucket, one of them with a reference."""
    rows: list[dict[str, str]] = []
    for seed, name in enumerate("abc"):
        save_noise(tmp_path / f"{name}.mkv", 13 + seed, 32, seed)
        rows.append({"video": f"{name}.mkv", "prompt": f"prompt {name}"})
    save_noise(tmp_path / "low.mkv", 14, 8, 9)
    rows[1]["reference"] = "low.mkv"
    path = tmp_path / "clips.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def causal_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Causal VAEs in both stages, and an image encoder."""
    vae = tiny_vae()
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    clip = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    stage1: Any = WanTransformer3DModel
    image = {"image_dim": 8, "added_kv_proj_dim": 24}
    parts = replace(
        tiny_components(),
        stage1_vae=vae,
        stage2_vae=vae,
        stage1_transformer=stage1(in_channels=36, out_channels=16, **image, **TRANSFORMER),
        stage2_transformer=SegmentTransformer3DModel(
            in_channels=32, out_channels=16, **TRANSFORMER
        ),
        image_encoder=CLIPVisionModel(clip),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=8),
    )
    path = tmp_path_factory.mktemp("causal")
    SwiftI2VPipeline(parts, parse_config(GenerationConfig, SETTINGS, "tests")).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def displacing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stage I that generates displacement; its clips are of unknown motion."""
    path = tmp_path_factory.mktemp("displacing")
    tiny_pipeline(displaces=True).save_pretrained(path)
    return path


def configure(stage: str, model: Path, clips: Path, **changes: Any) -> Any:
    kind: Any = Stage2FineTuning if stage == "stage2" else Stage1FineTuning
    data = {"manifests": [{"path": str(clips)}], "rules": {"buckets": [[9, 32, 32]]}}
    values: dict[str, Any] = {
        "model": str(model),
        "run": {"batch_size": BATCH, "precision": "float32"},
        "phases": [{"steps": STEPS, "data": data | changes.pop("data", {})}],
    }
    if stage == "stage2":
        values["objective"] = {"windows": {"segment_sizes": [1], "context_sizes": [0, 1]}}
    values["run"] |= changes.pop("run", {})
    return parse_config(kind, {**values, **changes}, "tests")


def make(config: Any, directory: Path, **options: Any) -> Any:
    making = CacheMaking(config, directory, CPU, **options)
    return making.run(making.plan())


def reading(config: Any, directory: Path, *, latents: bool = True) -> Any:
    return replace(config, cache=CacheConfig(directory=str(directory), latents=latents))


def losses(config: Any, directory: Path) -> list[Tensor]:
    """Draws of all steps, in two micro-batches each."""
    torch.manual_seed(0)
    task = FineTuning(config, alone_in(directory)).task
    found = []
    for step in range(STEPS):
        for indices in ((0, 1), (2,)):
            draw = Draw(seed=config.run.seed, step=step, batch_size=BATCH, indices=indices)
            batch = task.load_batch(draw)
            is_cached = isinstance(batch, Stage1Latents | Stage2Latents)
            assert is_cached == (config.cache is not None and config.cache.latents)
            with torch.no_grad(), compute_in(config.run.precision, CPU):
                found.append(task.loss(batch, draw))
    return found


def assert_same(config: Any, tmp_path: Path, cache: Path) -> None:
    expected = losses(config, tmp_path / "run")
    found = losses(reading(config, cache), tmp_path / "cached-run")
    assert all(map(torch.equal, found, expected))
    assert len(expected) == 2 * STEPS
    assert len({float(loss[0]) for loss in expected}) == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind", "changes"),
    [
        ("stage1", "codec", {}),
        ("stage1", "causal", {"run": {"precision": "bfloat16"}}),
        ("stage1", "displacing", {}),
        ("stage2", "codec", {"run": {"precision": "bfloat16"}, "crop": 16}),
        ("stage2", "causal", {}),
        ("stage2", "causal", {"data": {"num_pieces": 2}}),
        ("stage2", "causal", {"generation": {"stage2": {"reference_detail": "carried"}}}),
    ],
)
def test_cached_losses_are_equal_bit_by_bit(
    stage, kind, changes, model, causal_model, displacing_model, clips, tmp_path
):
    models = {"codec": model, "causal": causal_model, "displacing": displacing_model}
    config = configure(stage, models[kind], clips, **changes)
    report = make(config, tmp_path / "cache")
    assert (report.prompts_made, report.unreadable) == (4, 0)  # with the negative one
    assert 0 < report.entries_made <= STEPS * BATCH
    assert_same(config, tmp_path, tmp_path / "cache")
    again = make(config, tmp_path / "cache")
    assert (again.prompts_made, again.entries_made) == (0, 0)
    assert again.entries_kept == report.entries_made


@pytest.mark.slow
def test_training_sees_the_reference_that_sampling_will(model, clips, tmp_path):
    found = []
    for detail in ("none", "carried"):
        generation = {"stage2": {"reference_detail": detail}}
        config = configure("stage2", model, clips, generation=generation)
        found.append(losses(config, tmp_path / "run"))
    assert not any(map(torch.equal, *found))


@pytest.mark.slow
def test_prompts_alone_may_be_cached(model, clips, tmp_path):
    config = configure("stage2", model, clips)
    expected = losses(config, tmp_path / "run")
    prompts_only = reading(config, tmp_path / "cache", latents=False)
    report = make(prompts_only, tmp_path / "cache")
    assert (report.prompts_made, report.entries_made) == (4, 0)
    assert not (tmp_path / "cache" / "stage2").exists()
    assert all(map(torch.equal, losses(prompts_only, tmp_path / "run"), expected))
    with pytest.raises(InputError, match=r"does not hold \w\.mkv .* latent frames 0, "):
        losses(reading(config, tmp_path / "cache"), tmp_path / "run")


def test_a_run_with_a_cache_holds_no_text_encoder(model, clips, tmp_path):
    config = configure("stage2", model, clips)
    make(config, tmp_path / "cache")
    tuning = FineTuning(reading(config, tmp_path / "cache"), alone_in(tmp_path / "run"))
    assert tuning.pipe.components.text_encoder.device.type == "meta"
    assert tuning.pipe.components.stage2_vae.device.type == "cpu"  # validation decodes
    (tmp_path / "validation").mkdir()
    assert "psnr" in tuning.task.validate(tmp_path / "validation")


def test_only_the_windows_that_steps_ask_for_are_kept(model, clips, tmp_path):
    config = configure("stage2", model, clips)
    plan = CacheMaking(config, tmp_path / "cache", CPU).plan()
    asked = {window for job in plan.jobs for window in job.windows}
    assert asked <= {(0, 1), (0, 2), (0, 1, 2)}
    assert len(plan.jobs) <= plan.num_entries <= STEPS * BATCH
    making = CacheMaking(config, tmp_path / "cache", CPU)
    making.run(making.plan(max_steps=1))
    small = sum(path.stat().st_size for path in (tmp_path / "cache/stage2").glob("*.safetensors"))
    making.run(plan)
    size = sum(path.stat().st_size for path in (tmp_path / "cache/stage2").glob("*.safetensors"))
    assert small < size
    assert plan.num_bytes < size < plan.num_bytes + 2000 * plan.num_entries


@pytest.mark.slow
def test_shards_make_together_what_one_run_makes(model, clips, tmp_path):
    config = configure("stage2", model, clips)
    whole = CacheMaking(config, tmp_path / "whole", CPU).plan()
    parts = [CacheMaking(config, tmp_path / "cache", CPU, (i, 2)).plan() for i in (1, 2)]
    assert sum(len(part.jobs) for part in parts) == len(whole.jobs)
    assert {job for part in parts for job in part.jobs} == set(whole.jobs)
    assert sorted(text for part in parts for text in part.prompts) == sorted(whole.prompts)
    for index in (1, 2):
        make(config, tmp_path / "cache", shard=(index, 2))
    assert_same(config, tmp_path, tmp_path / "cache")


@pytest.mark.slow
def test_a_changed_clip_is_refused_and_made_again_alone(model, clips, tmp_path):
    config = configure("stage2", model, clips)
    report = make(config, tmp_path / "cache")
    save_noise(clips.with_name("b.mkv"), 14, 32, 77)
    stale = r"entry of b\.mkv \(bucket 9x32x32 .* is stale \(source is .* now\); run `swifti2v data"
    with pytest.raises(InputError, match=stale):
        losses(reading(config, tmp_path / "cache"), tmp_path / "cached-run")
    again = make(config, tmp_path / "cache")
    assert 0 < again.entries_made < report.entries_made
    assert again.entries_kept == report.entries_made - again.entries_made
    assert_same(config, tmp_path, tmp_path / "cache")
    save_noise(clips.with_name("low.mkv"), 14, 8, 78)
    with pytest.raises(InputError, match="is stale \\(reference is"):
        losses(reading(config, tmp_path / "cache"), tmp_path / "cached-run")


@pytest.mark.slow
def test_latents_of_a_photo_that_clip_saw_in_another_way_are_refused(causal_model, clips, tmp_path):
    config = configure("stage1", causal_model, clips)
    make(config, tmp_path / "cache")
    path = tmp_path / "cache/stage1/fingerprint.json"
    values = json.loads(path.read_text())
    assert values["image_encoder"]["picture"] == "whole, bicubic"
    values["image_encoder"] = values["image_encoder"]["weights"]  # as before the photo was whole
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match="image_encoder is"):
        losses(reading(config, tmp_path / "cache"), tmp_path / "run")


def test_other_models_settings_and_sizes_are_refused(model, causal_model, clips, tmp_path):
    config = configure("stage2", model, clips)
    make(config, tmp_path / "cache")

    def refuse(match: str, **changes: Any) -> None:
        other = configure("stage2", changes.pop("model", model), clips, **changes)
        with pytest.raises(InputError, match=match):
            losses(reading(other, tmp_path / "cache"), tmp_path / "cached-run")

    refuse(r"made with other settings: vae is '\w+' there and '\w+' now", model=causal_model)
    refuse("crop is None there and 16 now", crop=16)
    carried = {"stage2": {"reference_detail": "carried"}}
    refuse("reference_detail is 'none' there and 'carried' now", generation=carried)
    rules = {"rules": {"buckets": [[5, 16, 16]]}}
    refuse(r"does not hold \w\.mkv \(bucket 5x16x16 .*; run `swifti2v data cache`", data=rules)
    with pytest.raises(InputError, match="none does not exist; run `swifti2v data cache`"):
        losses(reading(config, tmp_path / "none"), tmp_path / "cached-run")
    with pytest.raises(InputError, match="downscale is 4 there and 2 now"):
        make(configure("stage2", model, clips, generation={"stage1": {"downscale": 2}}),
             tmp_path / "cache")  # fmt: skip


@pytest.mark.slow
def test_clips_damaged_in_their_midst_are_counted_as_without_a_cache(model, clips, tmp_path):
    path = save_damaged_clip(clips.with_name("a.mkv"), 13, 32, 32)
    assert probe_clip(path).num_frames == 13
    with pytest.raises(MediaError, match=r"a\.mkv"):
        make(configure("stage2", model, clips), tmp_path / "stopped")
    config = configure("stage2", model, clips, run={"bad_samples": "skip"})
    report = make(config, tmp_path / "cache")
    assert report.unreadable > 0
    assert_same(config, tmp_path, tmp_path / "cache")
    replaced = []
    for own in (config, reading(config, tmp_path / "cache")):
        task = FineTuning(own, alone_in(tmp_path / "run")).task
        draws = [Draw(seed=0, step=s, batch_size=BATCH, indices=(0, 1, 2)) for s in range(STEPS)]
        batches = [task.load_batch(draw) for draw in draws]
        assert not any("a.mkv" in batch.ids for batch in batches)
        replaced.append([batch.num_replaced for batch in batches])
    assert replaced[0] == replaced[1]
    assert sum(replaced[0]) > 0


def test_few_pieces_bound_the_cache(model, clips, tmp_path):
    config = configure("stage2", model, clips, data={"num_pieces": 1})
    longer = replace(config, phases=(replace(config.phases[0], steps=40),))
    plan = CacheMaking(longer, tmp_path / "cache", CPU).plan()
    assert len(plan.jobs) == 3  # one of each clip
    assert plan.num_entries == 3  # whole, whatever the windows
    assert plan.num_bytes == 3 * 2 * (768 * 3 * 4 * 4) * 4  # clip and reference in float32
    make(config, tmp_path / "cache")
    assert_same(config, tmp_path, tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"data\.num_pieces is 0"):
        configure("stage2", model, clips, data={"num_pieces": 0})


def test_a_phase_limited_by_minutes_cannot_be_planned(model, clips, tmp_path):
    config = configure("stage2", model, clips)
    timed = replace(config, phases=(replace(config.phases[0], steps=None, minutes=1.0),))
    with pytest.raises(ConfigError, match="phase main is limited by minutes"):
        CacheMaking(timed, tmp_path / "cache", CPU).plan()
