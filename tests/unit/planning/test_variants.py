"""Plans from smaller files, of one part after the other, and within the host's memory."""

from dataclasses import replace
from functools import cache

import pytest

from swifti2v.config import GenerationConfig, parse_config
from swifti2v.errors import ConfigError
from swifti2v.models.loading.sources import FileSource, find_model
from swifti2v.models.runtime.roles import STAGE1
from swifti2v.models.weights.packed import FLOAT8_FORMATS
from swifti2v.planning.costs import ClipCosts
from swifti2v.planning.devices import DEVICES
from swifti2v.planning.keeping import Room, decide_keeping
from swifti2v.planning.plans import PLACEMENTS, Wish, estimate, make_plan
from swifti2v.planning.stored import find_costs
from swifti2v.planning.variants import FLOAT8, GGUF_BITS, find_packing, in_variant
from swifti2v.units import GB

HOST = 32 * GB
VARIANTS = ("fp8", "gguf-q4")


@cache
def costs(model: str, variant: str = "bf16") -> ClipCosts:
    index, _ = find_model(model)
    config = parse_config(GenerationConfig, index.settings, model)
    return in_variant(find_costs(model, config, "bfloat16"), index, variant)


@pytest.mark.parametrize("model", ["paper", "public", "vibe"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("card", "gigabytes"), [("rtx4090", 24), ("rtx3060", 12)])
def test_2k_from_small_files_fits_a_card_and_a_host_of_32_gb(
    model: str, variant: str, card: str, gigabytes: int
) -> None:
    plan = make_plan(costs(model, variant), DEVICES[card], "bfloat16", host_bytes=HOST)
    chosen = plan.require_fit()
    assert chosen.peak_device_bytes["peak"] <= gigabytes * GB
    assert 10 * GB < chosen.host_bytes <= HOST  # what waits in host memory is counted
    whole = make_plan(costs(model), DEVICES[card], "bfloat16", host_bytes=HOST)
    assert whole.chosen is None
    with pytest.raises(ConfigError, match=r"with 32\.0 GB of host memory.*take smaller files"):
        whole.require_fit()


def test_sizes_of_small_files_are_about_those_of_the_published_ones() -> None:
    published = {
        "fp8": {"text_encoder": 6.74e9, "stage1_transformer": 16.4e9, "stage2_transformer": 5.3e9},
        "gguf-q4": {"stage1_transformer": 11.3e9, "stage2_transformer": 3.43e9},
    }
    for variant, sizes in published.items():
        weights = costs("vibe", variant).count().weights
        for role, size in sizes.items():  # LoRAs stay beside them
            assert weights[role].num_bytes == pytest.approx(size, rel=0.08)


def test_one_part_after_the_other_takes_that_of_the_largest() -> None:
    work = costs("paper").count()
    sizes = {role: part.num_bytes for role, part in work.weights.items()}
    device = DEVICES["h200"]
    kept, staged = (
        estimate(work, device, "bfloat16", "resident", keeps=keeps).peak_device_bytes
        for keeps in (True, False)
    )
    for stage, others in (
        ("stage1", sizes.keys() - {*STAGE1}),
        ("text", sizes.keys() - {"text_encoder"}),
    ):
        unneeded = sum(sizes[role] for role in others)
        assert kept[stage] - staged[stage] == pytest.approx(unneeded, rel=1e-6)
    for placement in PLACEMENTS:
        kept_host, staged_host = (
            estimate(work, device, "bfloat16", placement, keeps=keeps).host_bytes
            for keeps in (True, False)
        )
        assert staged_host <= kept_host
    assert staged_host < 0.65 * kept_host


def test_a_wish_to_keep_the_models_needs_room_for_all_of_them() -> None:
    card = replace(DEVICES["h200"], memory_bytes=60 * GB)
    one, many = (
        make_plan(costs("paper"), card, "bfloat16", wish=Wish(keeps=keeps)).require_fit()
        for keeps in (False, True)
    )
    assert (one.placement, many.placement) == ("resident", "streamed")


def test_models_are_kept_where_there_is_room_and_the_reason_is_said() -> None:
    assert decide_keeping(10 * GB, Room("host", 16 * GB)).keeps
    lacking = decide_keeping(15 * GB, Room("host", 16 * GB))
    assert not lacking.keeps
    assert "15.0 GB of weights, and host memory of 16.0 GB" in lacking.why
    assert not decide_keeping(10 * GB, Room("device", 16 * GB)).keeps


@pytest.mark.parametrize("variant", ["bf16", *VARIANTS])
@pytest.mark.parametrize(("card", "gigabytes"), [("rtx4090", 24), ("rtx3060", 12)])
def test_one_model_for_both_stages_fits_whole(variant: str, card: str, gigabytes: int) -> None:
    plan = make_plan(costs("small", variant), DEVICES[card], "bfloat16", host_bytes=HOST)
    assert plan.require_fit().peak_device_bytes["peak"] <= gigabytes * GB
    two = make_plan(costs("public", variant), DEVICES[card], "bfloat16")
    assert plan.disk_bytes < 0.45 * two.disk_bytes
    assert plan.flops["total"] < two.flops["total"]


def test_work_of_the_public_preset_is_about_that_of_the_paper() -> None:
    published, public = (costs(name).count().flops for name in ("paper", "public"))
    assert public["total"] < 1.3 * published["total"]
    assert public["stage1"] == published["stage1"]
    # two steps of four, of a model without channels for the reference
    assert 0.49 < public["stage2"] / published["stage2"] <= 0.5


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(ConfigError, match="variant 'fp4' is unknown; there are bf16, fp8, gguf-q4"):
        costs("paper", "fp4")


def test_the_name_of_a_model_may_name_the_variant() -> None:
    index, _ = find_model("paper")
    config = parse_config(GenerationConfig, index.settings, "paper")
    named = find_costs("paper:fp8", config, "bfloat16")
    assert named.name == "paper:fp8"
    assert named.count() == costs("paper", "fp8").count()


def test_each_component_is_packed_as_its_own_file_says() -> None:
    """In variants of any name, and where the preset's own files are small."""
    index, _ = find_model("paper")
    config = parse_config(GenerationConfig, index.settings, "paper")
    whole = find_costs("paper", config, "bfloat16")
    row = FileSource(source="people/a.gguf", form="Q8_0")
    text, stage1 = index.components["text_encoder"], index.components["stage1_transformer"]
    own = replace(
        index,
        components=index.components
        | {
            "text_encoder": replace(text, variants={"q8": row}),
            "stage1_transformer": replace(stage1, form="Q4_K", variants={}),
        },
    )
    assert own.variants()[:2] == ["bf16", "q8"]
    sizes = {
        name: {r: w.num_bytes for r, w in in_variant(whole, own, name).count().weights.items()}
        for name in ("bf16", "q8")
    }
    before = {role: part.num_bytes for role, part in whole.count().weights.items()}
    assert sizes["bf16"]["text_encoder"] == before["text_encoder"]
    saved = whole.count().weights["text_encoder"].linear_bytes * (1 - 8.5 / 16)
    assert sizes["q8"]["text_encoder"] == pytest.approx(before["text_encoder"] - saved)
    for name in ("bf16", "q8"):
        assert sizes[name]["stage1_transformer"] < 0.35 * before["stage1_transformer"]
        assert sizes[name]["stage2_transformer"] == before["stage2_transformer"]
    assert in_variant(whole, own, "q8").name == "paper:q8"


def test_forms_are_those_that_files_are_kept_in() -> None:
    gguf = pytest.importorskip("gguf")
    assert {*FLOAT8} == {*FLOAT8_FORMATS}
    for form, bits in GGUF_BITS.items():
        kind = gguf.GGMLQuantizationType[form]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        assert bits == 8 * size / block
    with pytest.raises(ConfigError, match="form 'Q9' is unknown; use float8_e4m3fn"):
        find_packing("Q9")


def test_a_model_without_small_files_has_no_variants() -> None:
    index, _ = find_model("nano")
    assert index.variants() == ["bf16"]
    config = parse_config(GenerationConfig, index.settings, "nano")
    costs = find_costs("nano", config, "bfloat16")
    assert in_variant(costs, index, "bf16") is costs
