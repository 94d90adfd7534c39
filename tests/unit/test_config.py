import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swifti2v.config import (
    SHORTHANDS,
    GenerationConfig,
    SamplingConfig,
    expand_shorthands,
    merge,
    parse_config,
    parse_override,
    read_yaml,
    to_dict,
)
from swifti2v.errors import ConfigError
from swifti2v.models.loading.sources import find_model
from swifti2v.schedules import plan_sigmas

ROOT = Path(__file__).parents[2]


def test_a_config_survives_the_round_trip():
    config = GenerationConfig(height=384, width=640)
    assert parse_config(GenerationConfig, to_dict(config), "x") == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 640}, "run.yaml: widht"),
        ({"stage2": {"segment_sizes": 3}}, "run.yaml: stage2.segment_sizes"),
        ({"num_frames": "many"}, "run.yaml: num_frames"),
        ({"num_frames": 1}, "num_frames is 1; it must be at least 5"),
        ({"stage2": {"sampling": {"strength": 1.5}}}, "strength is 1.5"),
        ({"stage2": {"context_size": -1}}, "stage2.context_size is -1"),
        ({"stage2": {"temporal_positions": "relative"}}, "temporal_positions"),
        ({"stage1": {"downscale": 0}}, "stage1.downscale is 0"),
    ],
)
def test_bad_values_name_file_and_key(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(GenerationConfig, values, "run.yaml")


@pytest.mark.parametrize("field", ["num_inference_steps", "shift", "guidance_scale"])
def test_sampling_values_out_of_range_are_named(field):
    with pytest.raises(ConfigError, match=field):
        parse_config(SamplingConfig, {field: -1}, "x")


def test_overrides_nest_and_are_typed_as_yaml():
    assert parse_override("stage2.sampling.shift=3.5") == {"stage2": {"sampling": {"shift": 3.5}}}
    assert parse_override("negative_prompt=a=b") == {"negative_prompt": "a=b"}
    assert parse_override("stage2.vae_tile=null") == {"stage2": {"vae_tile": None}}


@pytest.mark.parametrize("text", ["", "a", "=3", "a..b=1", "a=[1"])
def test_malformed_overrides_are_refused(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_override(text)


nested = st.recursive(st.integers(), lambda leaf: st.dictionaries(st.sampled_from("abc"), leaf))
mappings = st.dictionaries(st.sampled_from("abc"), nested)


@given(mappings, mappings)
def test_merging_keeps_both_and_the_change_wins(base, changes):
    merged = merge(base, changes)
    assert merged.keys() == base.keys() | changes.keys()
    assert merge(merged, changes) == merged
    for key, value in changes.items():
        if not isinstance(value, dict):
            assert merged[key] == value


@pytest.mark.parametrize(
    ("content", "message"), [(None, "exists"), ("- a", "mapping"), ("a: [", "not YAML")]
)
def test_unreadable_yaml_is_refused(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_every_shipped_preset_and_its_settings_parse():
    presets = sorted((ROOT / "src/swifti2v/presets").glob("*.yaml"))
    assert presets
    for preset in presets:
        index, _ = find_model(preset.stem)
        parse_config(GenerationConfig, index.settings, str(preset))


def test_the_paper_preset_is_the_published_setting():
    index, _ = find_model("paper")
    config = parse_config(GenerationConfig, index.settings, "paper")
    assert (config.num_frames, config.height, config.width) == (81, 1408, 2560)
    assert (config.height // config.stage1.downscale, config.width // config.stage1.downscale) == (
        352,
        640,
    )
    assert (config.stage2.segment_size, config.stage2.context_size) == (3, 1)
    assert config.stage1.sampling.num_inference_steps == 4
    assert config.stage2.sampling.num_inference_steps == 4


def test_presets_of_wan_have_its_negative_prompt_and_leave_the_photo_whole():
    """``sample_neg_prompt`` of wan/configs/shared_config.py, of Wan 2.1 and 2.2 alike."""
    for name in ("paper", "public", "small", "vibe"):
        index, _ = find_model(name)
        config = parse_config(GenerationConfig, index.settings, name)
        digest = hashlib.sha256(config.negative_prompt.encode()).hexdigest()
        assert digest == "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
        assert "image_processor" not in index.components  # a repository's own crops the photo


def test_the_vibe_preset_spreads_fifty_steps_below_its_strength():
    config = parse_config(GenerationConfig, find_model("vibe")[0].settings, "vibe")
    sampling = config.stage2.sampling
    assert sampling.guidance_scale > 1
    sigmas = plan_sigmas(sampling.num_inference_steps, sampling.shift, sampling.strength)
    assert len(sigmas) == 51
    assert sigmas[0] == pytest.approx(0.921, abs=5e-4)


def test_the_public_preset_runs_the_last_two_levels_of_fastwan():
    """As FastVideo's own refinement does; without guidance, over the photo's carried detail."""
    index, _ = find_model("public")
    stage2 = parse_config(GenerationConfig, index.settings, "public").stage2
    assert stage2.sampling.plan_sigmas() == [0.757, 0.522, 0]
    assert (stage2.sampling.rule, stage2.sampling.guidance_scale) == ("renoise", 1)
    assert stage2.reference_detail == "carried"
    transformer = index.components["stage2_transformer"]
    assert [lora.path.split("/")[-1] for lora in transformer.loras] == [
        "Wan2_2_5B_FastWanFullAttn_lora_rank_128_bf16.safetensors"
    ]
    assert "Turbo" not in str(index)  # whose licence forbids commercial use
    paper = find_model("paper")[0].components
    assert index.components["stage1_transformer"] == paper["stage1_transformer"]


def test_the_small_preset_is_one_model_for_both_stages():
    """At the base's own size of 1280x704 first, on all levels of FastWan."""
    index, _ = find_model("small")
    config = parse_config(GenerationConfig, index.settings, "small")
    assert index.components["stage1_transformer"] == index.components["stage2_transformer"]
    assert index.components["stage1_vae"] == index.components["stage2_vae"]
    for variant in ("fp8", "gguf-q4"):
        own, _ = find_model(f"small:{variant}")
        assert own.twin("stage2_transformer") == "stage1_transformer"
        assert own.twin("stage2_vae") == "stage1_vae"
    assert (config.width // config.stage1.downscale, config.height // config.stage1.downscale) == (
        1280,
        704,
    )
    assert config.stage1.sampling.plan_sigmas() == [1, 0.757, 0.522, 0]
    assert (
        config.stage2
        == parse_config(GenerationConfig, find_model("public")[0].settings, "public").stage2
    )


def test_short_names_become_the_settings_they_change():
    asked = {"guidance_scale": 2, "strength": None, "num_frames": 33, "segment_size": 3}
    sampling = {"sampling": {"guidance_scale": 2}}
    assert expand_shorthands(asked) == {
        "stage1": sampling,
        "stage2": {**sampling, "segment_size": 3},
        "num_frames": 33,
    }
    everything = expand_shorthands(dict.fromkeys(SHORTHANDS, 1))
    parse_config(GenerationConfig, merge(to_dict(GenerationConfig()), everything), "test")
