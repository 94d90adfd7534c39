"""The counted work of the 2K system at its true size: a guard against silent growth."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from swifti2v.config import GenerationConfig, SamplingConfig, parse_config
from swifti2v.errors import ConfigError, LoadingError, ShapeError
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder
from swifti2v.pipelines.course import even_course
from swifti2v.planning.costs import STAGES, ClipWork, Count
from swifti2v.planning.counting import META, count
from swifti2v.planning.models import Models
from swifti2v.planning.streams import Tiling, count_decoder
from swifti2v.planning.work import ClipCounter
from tests.helpers.tiny import tiny_pipeline

TERA, GIGA, GIB = 1e12, 1e9, 2**30
TEXT, CLIP = 512, 257
"""Tokens of the prompt and of the photo."""


@cache
def paper() -> Models:
    return Models("paper", torch.bfloat16)


def traffic(cost: Count) -> float:
    return cost.kernel_bytes + cost.other_bytes


def config_of(height: int = 1408, width: int = 2560, num_frames: int = 81) -> GenerationConfig:
    config = parse_config(GenerationConfig, paper().index.settings, "paper")
    return replace(config, height=height, width=width, num_frames=num_frames)


@cache
def whole_clip() -> ClipWork:
    return ClipCounter(paper(), config_of()).count()


@cache
def small_clip(*, offloads: bool = False) -> ClipWork:
    counter = ClipCounter(
        paper(), config_of(height=384, width=640, num_frames=21), with_stage1=False
    )
    return counter.count(offloads_history=offloads)


def forward(tokens: int, dim: int, ffn: int, layers: int, levels: int = 1, image: int = 0) -> int:
    """FLOP of the blocks and conditions of a Wan transformer, in closed form."""
    linear = tokens * (6 * dim**2 + 2 * dim * ffn) + TEXT * 2 * dim**2 + image * 2 * dim**2
    attention = 2 * tokens * dim * (tokens + TEXT + image)
    conditions = TEXT * (4096 * dim + dim**2) + levels * (256 * dim + 7 * dim**2)
    conditions += image * (1280**2 + 1280 * dim)
    return 2 * (layers * (linear + attention) + conditions)


def ends(tokens: int, dim: int, in_channels: int, out_channels: int) -> int:
    """FLOP of patch embedding and output layer."""
    return 2 * tokens * dim * 4 * (in_channels + out_channels)


def left_out(given: int, tokens: int, dim: int, ffn: int, out_channels: int) -> int:
    """FLOP that the last block and the output layer do not spend on the tokens of given frames."""
    linear = given * (4 * dim**2 + 2 * dim * ffn + 4 * out_channels * dim)
    return 2 * (linear + 2 * given * dim * (tokens + TEXT))


def resnet(narrow: int, wide: int, places: int) -> int:
    shortcut = 0 if narrow == wide else narrow * wide
    return 2 * places * (27 * (narrow * wide + wide * wide) + shortcut)


def middle(dim: int, frames: int, cells: int) -> int:
    attention = 2 * frames * cells * 4 * dim**2 + 4 * frames * cells**2 * dim
    return 2 * resnet(dim, dim, frames * cells) + attention


def wan22_decode(frames: int, height: int, width: int) -> int:
    """FLOP of the Wan2.2 decoder for latents of that size, in closed form."""
    cells, later = height * width, frames - 1
    total = 2 * frames * cells * (48 * 48 + 27 * 48 * 1024) + middle(1024, frames, cells)
    sides = [(1024, 1024), (1024, 1024), (1024, 512), (512, 256)]
    for level, (narrow, wide) in enumerate(sides):
        time, area = 2 ** min(level, 2), 4**level * cells
        places = (1 + time * later) * area
        total += resnet(narrow, wide, places) + 2 * resnet(wide, wide, places)
        if level < 2:  # one frame becomes two
            total += 2 * 3 * wide * 2 * wide * time * later * area
        if level < 3:
            out = 1 + 2 ** min(level + 1, 2) * later
            total += 2 * 4 * wide**2 * out * 4 * area  # upsampling folded in: 4 of 9 products
    return total + 2 * 27 * 256 * 12 * (1 + 4 * later) * 64 * cells


def wan22_encode(frames: int, height: int, width: int) -> int:
    """FLOP of the Wan2.2 encoder for latents of that size, in closed form."""
    cells, later = height * width, frames - 1
    total = 2 * 27 * 12 * 160 * (1 + 4 * later) * 64 * cells
    sides = [(160, 160), (160, 320), (320, 640), (640, 640)]
    for level, (narrow, wide) in enumerate(sides):
        time, area = (4, 4, 2, 1)[level], 4 ** (3 - level) * cells
        places = (1 + time * later) * area
        total += resnet(narrow, wide, places) + resnet(wide, wide, places)
        if level < 3:
            total += 2 * 9 * wide**2 * places // 4
        if level in (1, 2):  # two frames become one
            total += 2 * 3 * wide**2 * (time // 2) * later * area // 4
    total += middle(640, frames, cells)
    return total + 2 * frames * cells * (27 * 640 * 96 + 96 * 96)


@pytest.mark.slow
def test_transformers_cost_what_the_closed_forms_say():
    stages = whole_clip().stages
    stage1 = forward(18480, 5120, 13824, 40, image=CLIP) + ends(18480, 5120, 36, 16)
    stage2 = sum(
        calls
        * (
            forward(tokens, 3072, 14336, 30, levels=2)
            + ends(tokens, 3072, 96, 48)
            - left_out(given * 3520, tokens, 3072, 14336, 48)
        )
        for calls, tokens, given in ((20, 17600, 2), (4, 14080, 1), (4, 14080, 2))
    )

    assert stages["stage2"].count.flops == stage2
    assert stages["stage1"].count.linear + stages["stage1"].count.attention == pytest.approx(
        4 * (stage1 - 2 * 18480 * 5120 * 4 * 36), rel=1e-3
    )  # the rest is the attention of the VAE
    text = 24 * (2 * TEXT * (4 * 4096**2 + 3 * 4096 * 10240) + 4 * TEXT**2 * 4096)
    assert stages["text"].count.flops == pytest.approx(text, rel=1e-3)


@pytest.mark.slow
def test_the_vae_costs_what_the_closed_forms_say():
    stages = whole_clip().stages

    assert stages["decode"].count.flops == wan22_decode(21, 88, 160)
    # Enlarging is a product of matrices here, rows first.
    enlarge = 80 * 3 * 2 * (352 * 640 * 2560 + 1408 * 352 * 2560)
    assert stages["reference"].count.flops == wan22_encode(21, 88, 160) + enlarge


def test_work_of_a_clip_at_true_size():
    expected = {
        "text": 4.84, "image": 92.4, "stage1": 3094.0, "reference": 1034.9, "stage2": 6923.6,
        "decode": 4996.4, "total": 16146,
    }  # fmt: skip

    assert {name: flops / TERA for name, flops in whole_clip().flops.items()} == pytest.approx(
        expected, rel=1e-3
    )


# Traffic may fall, but must not grow: 10^9 bytes at least (weights, inputs and outputs of products,
# attention and convolutions once) and 10^9 bytes that eager execution moves.
TRAFFIC = {
    "text": (12.3, 30.6), "image": (78.3, 292), "stage1": (1080, 5770), "reference": (509, 2030),
    "stage2": (2816, 15740), "decode": (1468, 5900),
}  # fmt: skip
# GB of activations at most, and of causal history kept until the end of the clip.
MEMORY = {
    "text": (0.12, 0), "image": (1.41, 0), "stage1": (2.18, 0), "reference": (10.7, 3.96),
    "stage2": (1.31, 0), "decode": (24.8, 11.99),
}  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_traffic_and_memory_do_not_grow(stage):
    cost = whole_clip().stages[stage].count

    least, eager = TRAFFIC[stage]
    assert 0.9 * least < cost.kernel_bytes / GIGA <= least * 1.005
    assert cost.kernel_bytes / GIGA < traffic(cost) / GIGA <= eager * 1.005
    peak, kept = MEMORY[stage]
    assert cost.peak_bytes / GIB <= peak * 1.02
    assert cost.kept_bytes / GIB <= kept


def test_weights_are_those_of_the_public_models():
    weights = whole_clip().weights
    gigabytes = {role: own.num_bytes / GIGA for role, own in weights.items()}

    assert gigabytes == pytest.approx(
        {
            "text_encoder": 11.36, "image_encoder": 1.26, "stage1_vae": 0.254,
            "stage1_transformer": 32.85, "stage2_vae": 1.41, "stage2_transformer": 10.02,
        },
        rel=3e-3,
    )  # fmt: skip
    for role, own in weights.items():
        assert own.stays == role.endswith("vae")
        if own.stays:
            assert own.streamed_bytes == own.pinned_bytes == 0
        else:
            assert own.streamed_bytes < own.num_bytes <= own.pinned_bytes < 1.1 * own.num_bytes
    assert weights["stage1_transformer"].streamed_bytes < 2.3 * GIGA  # two blocks and the ends


@pytest.mark.slow
def test_few_layers_stand_for_all_of_them():
    models, latents = paper(), torch.empty(1, 96, 5, 8, 8, device=META)
    sigma, text = torch.empty(1, 5, device=META), torch.empty(1, 16, 4096, device=META)

    def run(model: torch.nn.Module) -> torch.Tensor:
        output: torch.Tensor = model(latents.to(torch.bfloat16), sigma, text, num_given=2)
        return output

    whole = models.get("stage2_transformer")
    assert models.count_layers("stage2_transformer", run, least=2) == count(lambda: run(whole))


@pytest.mark.slow
@pytest.mark.parametrize(("segment_size", "num_frames"), [(1, 25), (3, 33), (None, 13)])
def test_few_frames_stand_for_all_of_them(segment_size, num_frames):
    plain = config_of(height=64, width=128, num_frames=num_frames)
    config = replace(plain, stage2=replace(plain.stage2, segment_size=segment_size))
    vae = paper().get("stage2_vae")

    work = ClipCounter(paper(), config, with_stage1=False).count()

    num_latent_frames = (num_frames - 1) // 4 + 1
    assert work.stages["decode"].count.flops == wan22_decode(num_latent_frames, 4, 8)
    frames = torch.empty(1, 3, num_frames, 64, 128, device=META)
    encode = count(lambda: StreamingEncoder(vae).encode(frames))
    assert work.stages["reference"].count.convolution == encode.convolution
    assert encode.flops == wan22_encode(num_latent_frames, 4, 8)


@pytest.mark.slow
@pytest.mark.parametrize("offloads", [False, True])
def test_few_pieces_in_tiles_stand_for_all_of_them(offloads):
    vae = paper().get("stage2_vae")
    latents = torch.empty(1, 48, 12, 12, 20, device=META)

    def decode() -> StreamingDecoder:
        decoder = StreamingDecoder(vae, tile=10, offloads_history=offloads)
        for piece in torch.split(latents, [4, 3, 3, 2], dim=2):
            decoder.decode(piece)
        return decoder

    real = count(decode)
    tiling = Tiling(tile=10, offloads_history=offloads)
    planned = count_decoder(vae, (12, 20), [4, 3, 3, 2], tiling).count

    assert planned.flops == real.flops
    assert traffic(planned) == pytest.approx(traffic(real), rel=0.02)
    assert planned.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)
    assert planned.kept_bytes == pytest.approx(real.kept_bytes, abs=1e4)
    assert planned.transfer_bytes == pytest.approx(real.transfer_bytes, rel=0.15)


@pytest.mark.slow
def test_tiles_cost_little_more_work_and_need_less_memory():
    vae, sizes = paper().get("stage2_vae"), [4, 3]
    whole, four = (
        count_decoder(vae, (88, 160), sizes, Tiling(tile=tile)).count for tile in (None, 80)
    )
    moved = count_decoder(vae, (88, 160), sizes, Tiling(tile=80, offloads_history=True)).count

    assert whole.flops < four.flops < 1.1 * whole.flops
    assert traffic(four) < 1.1 * traffic(whole)
    assert four.peak_bytes < 17 * GIB < 24 * GIB < whole.peak_bytes
    assert moved.peak_bytes < 8 * GIB
    assert (moved.flops, moved.kernel_bytes) == (four.flops, four.kernel_bytes)


@pytest.mark.slow
def test_offloading_frees_the_history_and_moves_it():
    kept, moved = small_clip(), small_clip(offloads=True)

    for stage in ("reference", "decode"):
        own, other = kept.stages[stage].count, moved.stages[stage].count
        assert own.kept_bytes > 1e8
        assert other.kept_bytes < 1e4
        assert other.flops == own.flops
        assert other.transfer_bytes > own.transfer_bytes + 2 * own.kept_bytes
    history = sum(kept.stages[stage].count.kept_bytes for stage in ("reference", "decode"))
    assert 0.8 * history < moved.host_bytes - kept.host_bytes < 2 * history


@pytest.mark.slow
def test_guidance_asks_every_model_twice():
    guided = SamplingConfig(guidance_scale=5)
    plain = config_of(height=64, width=128, num_frames=21)
    config = replace(plain, stage2=replace(plain.stage2, sampling=guided))

    once, twice = (
        ClipCounter(paper(), each, with_stage1=False).count().stages for each in (plain, config)
    )

    for stage in ("text", "stage2"):
        assert twice[stage].count.flops == 2 * once[stage].count.flops


def test_a_clip_in_pieces_is_counted_by_them(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    models = Models(tmp_path, torch.float32)
    plain = parse_config(GenerationConfig, models.index.settings, "tiny")
    prompts = ((9, "b"), (13, "c"))  # 9 frames, then 1 + 4 twice
    pieces = [replace(plain, num_frames=frames) for frames in (9, 5, 5)]
    whole = ClipCounter(models, replace(plain, later_prompts=prompts)).count().stages
    parts = [ClipCounter(models, config).count().stages for config in pieces]
    for stage in ("text", "stage1"):
        assert whole[stage].count.flops == sum(part[stage].count.flops for part in parts)
        for role, times in whole[stage].passes.items():
            assert times == sum(part[stage].passes[role] for part in parts)


@pytest.mark.slow
def test_moving_the_photo_counts_once_a_step_however_guided(tmp_path):
    tiny_pipeline(displaces=True).save_pretrained(tmp_path)
    models = Models(tmp_path, torch.float32)
    plain = parse_config(GenerationConfig, models.index.settings, "tiny")
    counter = ClipCounter(models, plain)
    pipeline = counter._stage1()
    photo = torch.empty(1, 3, 1, 16, 16, device=META)
    output, still = (torch.empty(1, n, 5, 2, 2, device=META) for n in (773, 768))

    def move() -> torch.Tensor:
        displacement = pipeline.read_displacement(output, even_course(17))
        return pipeline.add_to_moved(output, displacement, photo, still)

    once = count(move)
    assert once.flops > 0
    for num_steps, guidance_scale in ((1, 1.0), (3, 1.0), (3, 5.0)):
        sampling = replace(
            plain.stage1.sampling, num_inference_steps=num_steps, guidance_scale=guidance_scale
        )
        moving = replace(plain.stage1, sampling=sampling)
        with_it, without = (
            ClipCounter(models, replace(plain, stage1=stage1)).count().stages["stage1"].count
            for stage1 in (moving, replace(moving, motion="latents"))
        )
        assert with_it.flops - without.flops == num_steps * once.flops
        assert traffic(with_it) > traffic(without)


@pytest.mark.slow
def test_a_clip_of_the_user_needs_no_stage1():
    config = config_of(height=64, width=96, num_frames=21)  # too narrow for Stage I

    stages = ClipCounter(paper(), config, with_stage1=False).count().stages

    assert stages["stage1"].count.flops == stages["image"].count.flops == 0
    with pytest.raises(ShapeError, match="width 96 does not fit"):
        ClipCounter(paper(), config)


def test_unknown_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown model"):
        Models(tmp_path / "nowhere", torch.bfloat16)
    preset = tmp_path / "mine.yaml"
    roles = ("text_encoder", "tokenizer", "stage1_transformer", "stage1_vae",
             "stage2_transformer", "stage2_vae")  # fmt: skip
    lines = [f"  {role}: {{ source: ./missing }}" for role in roles]
    preset.write_text("components:\n" + "\n".join(lines) + "\n")
    with pytest.raises(LoadingError, match="missing"):
        Models(preset, torch.bfloat16)
