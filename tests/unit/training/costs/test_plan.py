"""Predictions of a training from configurations: those of the models that are then loaded."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from swifti2v import units
from swifti2v.cli.train import resolve_settings
from swifti2v.cli.training_plan import to_comments
from swifti2v.config import parse_config, read_yaml
from swifti2v.errors import LoadingError, ShapeError
from swifti2v.models.loading.components import load_components
from swifti2v.models.vae.streaming import StreamingEncoder, scale_factors
from swifti2v.planning.counting import count
from swifti2v.shapes import PixelShape
from swifti2v.training.adapters import add_adapter
from swifti2v.training.costs.feeding import FeedWishes, plan_feed
from swifti2v.training.engine.memory import ActivationSizes, count_parameters, predict_activations
from swifti2v.training.nano.config import NanoConfig, TextEncoderConfig
from swifti2v.training.nano.plan import plan_nano, plan_text_encoder
from swifti2v.training.nano.text_encoder import TextTask
from swifti2v.training.stages.config import Stage1FineTuning, Stage2FineTuning
from swifti2v.training.stages.fine_tuning import plan_stage
from swifti2v.training.vae.training import VaeTrainingConfig, make_vae, plan_vae
from swifti2v.training.windows import WindowConfig
from tests.helpers.tiny import tiny_vae

CONFIGS = Path(__file__).parents[4] / "src/swifti2v/configs"
CPU = torch.device("cpu")
GB = 1e9


def read(kind: Any, name: str, **changes: Any) -> Any:
    return parse_config(kind, {**read_yaml(CONFIGS / f"{name}.yaml"), **changes}, name)


def test_stage2_at_2k() -> None:
    plan = plan_stage(read(Stage2FineTuning, "stage2_2k"))
    assert plan.parameters == (5_000_377_536, 5_000_377_536)
    # 66 and 88 rows, 120 and 160 columns of latent cells, four to a token, anchor + 1 + 3 frames.
    assert [sample.tokens for sample in plan.samples] == [5 * 33 * 60, 5 * 44 * 80]
    assert [sample.phase for sample in plan.samples] == ["1080p", "2k"]
    assert plan.samples[1].flops == pytest.approx(3 * 270.98e12, rel=1e-3)
    alone, eight = plan.predict_memory(1), plan.predict_memory(8)
    states = (alone.weights, alone.gradients, alone.optimizer, alone.ema)
    assert [size / GB for size in states] == pytest.approx([20, 20, 40, 20], rel=1e-3)
    assert eight.weights == pytest.approx(alone.weights / 8)
    assert eight.gradients == 20_001_510_144 * (1 + 1 / 8)  # whole until the last micro-batch
    each = plan_stage(read(Stage2FineTuning, "stage2_2k", run={"gradient_sync": "micro_batch"}))
    assert each.predict_memory(8).gradients == alone.gradients / 8
    assert eight.checkpoint == pytest.approx((20 + 40 + 20) * GB / 8, rel=1e-3)
    # 64 samples in 8 micro-batches: 8 windows at a time on one rank, one on each of eight.
    assert alone.activations == pytest.approx(8 * eight.activations)
    size = ActivationSizes(width=3072, ffn_dim=14336, num_layers=30, num_attention_heads=24)
    window = predict_activations(size, 17_600)
    assert eight.activations == window.kept + window.recomputed
    assert plan.frozen_bytes["text_encoder"] / GB == pytest.approx(11.36, abs=0.01)
    assert [n for n in range(1, 20) if plan.fits(n)] == [1, 2, 4, 8]
    cached = plan_stage(read(Stage2FineTuning, "stage2_2k", cache={"directory": "data/cache"}))
    assert cached.frozen_bytes.keys() == {"stage2_vae"}


def test_a_lora_of_stage1() -> None:
    plan = plan_stage(read(Stage1FineTuning, "stage1_lora"))
    total, trained = plan.parameters
    assert total - trained == 16_394_878_784
    # In 40 blocks rank 32: two attentions of four 5120 x 5120, and 5120 x 13824 twice.
    assert trained == 40 * 32 * (8 * 2 * 5120 + 2 * (5120 + 13824))
    assert [sample.tokens for sample in plan.samples] == [21 * 22 * 40]
    assert plan.frozen_bytes.keys() == {"text_encoder", "stage1_vae", "image_encoder"}
    memory = plan.predict_memory(1)
    assert memory.weights == 2 * (total - trained) + 4 * trained
    assert memory.gradients == 4 * trained


@pytest.mark.parametrize("use_dora", [False, True])
def test_parameters_of_nano_are_those_that_are_loaded(use_dora: bool) -> None:
    parts = load_components("nano", torch.float32, CPU)[0]
    second = plan_stage(read(Stage2FineTuning, "nano_stage2"))
    assert second.parameters.total == count_parameters(parts.stage2_transformer).total
    adapter = {"rank": 3, "use_dora": use_dora}
    config = read(Stage1FineTuning, "nano_stage1", adapter=adapter)
    transformer = parts.stage1_transformer
    assert config.adapter is not None
    add_adapter(transformer, config.adapter)
    assert plan_stage(config).parameters == count_parameters(transformer)
    whole = plan_stage(read(Stage1FineTuning, "nano_stage1", adapter=None))
    assert whole.parameters.trainable == whole.parameters.total
    sizes = [(plan.part, plan.parameters.total) for plan in plan_nano(NanoConfig())]
    assert sizes[2] == ("stage2", second.parameters.total)
    assert sizes[1] == ("stage1", whole.parameters.total)


def test_a_vae_and_a_text_encoder(tmp_path: Path) -> None:
    config = read(VaeTrainingConfig, "nano_vae")
    vae = make_vae(config)
    plan = plan_vae(config)
    assert plan.parameters == count_parameters(vae)
    assert plan.size is None
    vae.save_pretrained(tmp_path / "vae")
    again = read(VaeTrainingConfig, "nano_vae", vae={}, model=str(tmp_path / "vae"))
    assert plan_vae(again).parameters == plan.parameters
    missing = read(VaeTrainingConfig, "nano_vae", model=str(tmp_path / "none"))
    with pytest.raises(LoadingError, match="sizes of vae are not known"):
        plan_vae(missing)
    text = read(TextEncoderConfig, "nano_text")
    assert plan_text_encoder(text).parameters == count_parameters(TextTask(text, CPU).model)


def test_the_longest_window_of_all_buckets_counts() -> None:
    rules = {"buckets": [[9, 128, 128], [33, 64, 64], [5, 128, 192]]}
    phases = [{"name": "a", "steps": 1, "data": {"rules": rules}}]
    windows = {"segment_sizes": [1, 3], "context_sizes": [0, 2]}
    config = read(Stage2FineTuning, "nano_stage2", phases=phases, crop=None,
                  objective={"windows": windows})  # fmt: skip
    # 16 pixels a token: 3 of 64 tokens, 1 + 2 + 3 of 16, 2 of 96.
    assert [sample.tokens for sample in plan_stage(config).samples] == [3 * 64]
    square = read(Stage2FineTuning, "nano_stage2", phases=phases, crop=64,
                  objective={"windows": windows})  # fmt: skip
    assert [sample.tokens for sample in plan_stage(square).samples] == [6 * 16]
    bad = [{"steps": 1, "data": {"rules": {"buckets": [[9, 72, 64]]}}}]
    with pytest.raises(ShapeError, match="height 72"):
        plan_stage(read(Stage2FineTuning, "nano_stage2", phases=bad, crop=None))


def machines() -> list[Any]:
    """Machines that the shipped configurations name: file, GPUs, memory of one, options."""
    found = []
    for kind, name in ((Stage2FineTuning, "stage2_2k"), (Stage1FineTuning, "stage1_lora")):
        text = (CONFIGS / f"{name}.yaml").read_text()
        for counts, size, options in re.findall(r"^#   ((?:\d+ x )+)(\d+) GB: (.+)$", text, re.M):
            num_ranks = math.prod(int(count) for count in counts.split(" x ")[:-1])
            sets = () if options == "as it stands" else options.split("--set ")[1:]
            found.append((kind, name, num_ranks, int(size), tuple(map(str.strip, sets))))
    return found


def test_the_shipped_configurations_name_three_machines_each() -> None:
    named = [(name, num_ranks, size) for _, name, num_ranks, size, _ in machines()]
    sizes = [(1, 141), (8, 80), (32, 80)]
    assert named == [(name, *own) for name in ("stage2_2k", "stage1_lora") for own in sizes]


@pytest.mark.parametrize(("kind", "name", "num_ranks", "size", "sets"), machines())
def test_a_shipped_configuration_fits_the_machine_it_names(
    kind: Any, name: str, num_ranks: int, size: int, sets: tuple[str, ...]
) -> None:
    config = resolve_settings(kind, Path(name), sets)
    plan = plan_stage(config)
    assert plan.fits(num_ranks)
    # A tenth for what is left out: gathered blocks, kernels, what the allocator wastes.
    assert plan.predict_device(num_ranks) < 0.9 * size * units.GB
    assert plan.predict_host(num_ranks).total < 120 * units.GB  # 8 of them on a machine of 1 TB
    if sets:  # they are needed
        bare = plan_stage(resolve_settings(kind, Path(name), ()))
        assert not bare.fits(num_ranks) or bare.predict_device(num_ranks) > 0.9 * size * units.GB


def test_feeding_2k_is_counted() -> None:
    plan = plan_stage(read(Stage2FineTuning, "stage2_2k"))
    feed = plan.samples[1].feed
    assert feed is not None
    # Windows end at latent frames 3, 6 ... 18 and 20, and all frames up to there are needed.
    ends = (3, 6, 9, 12, 15, 18, 20)
    assert feed.mean_frames == pytest.approx(sum(4 * end + 1 for end in ends) / 7)
    assert feed.most_frames == 81
    assert feed.host_bytes == 81 * 1408 * 2560 * 3
    step = 64 * (plan.samples[1].flops + feed.encode_flops)
    assert 52e15 < 64 * plan.samples[1].flops < 53e15
    assert step == pytest.approx(132e15, rel=0.01)
    assert feed.entry_bytes == 2 * 48 * 5 * 88 * 160 * 2
    assert feed.encode_bytes > 2 * 81 * 1408 * 2560 * 3 * 4
    cached = plan_stage(read(Stage2FineTuning, "stage2_2k", cache={"directory": "data/cache"}))
    own = cached.samples[1].feed
    assert own is not None
    assert (own.mean_frames, own.encode_flops, own.encode_bytes) == (0, 0, 0)
    assert own.entry_bytes == feed.entry_bytes
    assert cached.predict_device(8) == cached.predict_memory(8).total + sum(
        cached.frozen_bytes.values()
    )


def test_encoding_is_counted_as_a_step_does_it(tmp_path: Path) -> None:
    """The FLOP of a causal VAE that encodes clips and their references up to each window's end."""
    vae: Any = tiny_vae()
    vae.to("meta")
    scale = scale_factors(vae, patch=2)
    windows = WindowConfig(segment_sizes=(1, 2), context_sizes=(0,))
    feed = plan_feed(PixelShape(25, 32, 48), vae, scale, FeedWishes(windows=windows))

    def flops(num_frames: int) -> float:
        video = torch.empty(1, 3, num_frames, 32, 48, device="meta")
        with torch.inference_mode():
            return count(lambda: StreamingEncoder(vae).encode(video, final=True)).flops

    ends = [[1, 2, 3, 4, 5, 6], [2, 4, 6]]
    mean = sum(sum(flops(4 * end + 1) for end in own) / len(own) for own in ends) / 2
    assert feed.encode_flops == pytest.approx(2 * mean, rel=1e-6)


def test_the_prediction_is_printed_as_comments() -> None:
    plan = plan_stage(read(Stage2FineTuning, "stage2_2k"))
    lines = to_comments([plan], (8, 3)).splitlines()
    assert all(line.startswith("# ") for line in lines)
    assert lines[0] == "# stage2: 5,000,377,536 parameters, 5,000,377,536 trained"
    assert lines[4] == (
        "#   phase 2k, at most 5 latent frames of 81x1408x2560: 64 samples a step, 17,600 tokens "
        "each, 1,126,400 tokens a step, 131.4 PFLOP a step (79.4 PFLOP of them encoding)"
    )
    assert "48 frames a sample on average, 212 s a step, 590 hours in all" in lines[5]
    assert "latents in a cache would take 12.9 MB a sample" in lines[6]
    assert "  disk: a checkpoint 74.5 GB, 223.5 GB while one is written" in lines[-2]
    assert [line for line in lines if "ranks: GPU" in line] == [
        "#     8 ranks: GPU 69.5 GB; host 23.2 GB (loading 23.2 GB; then processes 2.8 GB, samples "
        "7.3 GB, checkpoint 9.3 GB)"
    ]
    assert [line for line in lines if "ranks:" in line and "GPU" not in line] == [
        "#     8 ranks: 37.8 GB (weights 2.3 GB, gradients 21.0 GB, optimizer 4.7 GB, average "
        "2.3 GB, activations 7.5 GB)"
    ]
    assert any("text_encoder 10.6 GB" in line for line in lines)
