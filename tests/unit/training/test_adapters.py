import logging
import re
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from swifti2v.config import parse_config, to_dict
from swifti2v.errors import ConfigError, InputError, LoadingError
from swifti2v.models.lora.provenance import hash_base
from swifti2v.models.transformer import SegmentTransformer3DModel
from swifti2v.training.adapters import (
    BLOCK_TARGETS,
    AdapterConfig,
    adapter_state_dict,
    add_adapter,
    find_targets,
)
from tests.unit.models.weights.test_names import randomized

SIZES: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 8, "freq_dim": 16,
    "ffn_dim": 32, "num_layers": 2, "patch_size": (1, 2, 2), "out_channels": 4,
}  # fmt: skip
CONFIG = AdapterConfig(rank=4)


def plain() -> Any:
    torch.manual_seed(0)
    kind: Any = WanTransformer3DModel
    image = {"image_dim": 10, "added_kv_proj_dim": 24}
    return randomized(kind(in_channels=4, **SIZES, **image)).eval()


def segmented() -> Any:
    torch.manual_seed(0)
    return randomized(SegmentTransformer3DModel(in_channels=8, **SIZES)).eval()


MODELS = {"plain": plain, "segmented": segmented}


def forward(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    video = torch.randn(1, model.config["in_channels"], 3, 4, 4, generator=generator)
    text = torch.randn(1, 5, 8, generator=generator)
    video, text = video.to(model.dtype), text.to(model.dtype)
    if isinstance(model, SegmentTransformer3DModel):
        return model(video, torch.tensor([[0.0, 0.7, 0.7]]), text)
    image = torch.randn(1, 6, 10, generator=generator).to(model.dtype)
    return model(
        hidden_states=video,
        timestep=torch.tensor([500.0]),
        encoder_hidden_states=text,
        encoder_hidden_states_image=image,
    ).sample


@torch.no_grad()
def disturb(model: Any, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter_state_dict(model).values():
        tensor += torch.randn(tensor.shape, generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_defaults_put_a_pair_on_attention_and_feed_forward_of_every_block(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = MODELS[name]()
    with caplog.at_level(logging.INFO, "swifti2v"):
        names = add_adapter(model, CONFIG)
    expected = {
        f"blocks.{block}.{layer}.lora_{side}.default.weight"
        for block in (0, 1)
        for layer in [f"attn{a}.{x}" for a in (1, 2) for x in BLOCK_TARGETS[:4]]
        + list(BLOCK_TARGETS[4:])
        for side in "AB"
    }
    assert set(names) == expected
    assert set(names) == {n for n, p in model.named_parameters() if p.requires_grad}
    # rank 4 x (8 layers of 24 + 24 features and 2 of 24 + 32) x 2 blocks
    assert f"rank 4 on 20 layers of {type(model).__name__}: 3968 parameters" in caplog.text
    assert {n.replace(".default", "") for n in names} == adapter_state_dict(model).keys()


def test_image_layers_are_adapted_where_asked() -> None:
    names = add_adapter(plain(), AdapterConfig(rank=4, target_modules=("add_k_proj", "add_v_proj")))
    assert len(names) == 8
    assert all(re.search(r"attn2\.add_[kv]_proj\.lora_", name) for name in names)


def test_targets_are_patterns_for_the_ends_of_names() -> None:
    model = plain()
    assert find_targets(model, (r"blocks\.1\..*to_[qk]",)) == [
        f"blocks.1.attn{number}.to_{letter}" for number in (1, 2) for letter in "qk"
    ]
    assert find_targets(model, ("proj_out", "patch_embedding")) == ["patch_embedding", "proj_out"]
    with pytest.raises(ConfigError, match=r"'o_q', 'norm_q': no such layer in WanTransf.*proj_out"):
        add_adapter(model, AdapterConfig(target_modules=("to_q", "o_q", "norm_q")))
    assert not hasattr(model, "peft_config")
    with pytest.raises(ConfigError, match="'add_k_proj': no such layer in SegmentTransformer"):
        find_targets(segmented(), ("add_k_proj",))


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_adapter_is_float32_and_changes_nothing(
    name: str, dtype: torch.dtype, use_dora: bool
) -> None:
    model = MODELS[name]().to(dtype)
    before, weights_hash = forward(model), hash_base(model)
    add_adapter(model, AdapterConfig(rank=4, use_dora=use_dora))
    assert {tensor.dtype for tensor in adapter_state_dict(model).values()} == {torch.float32}
    assert hash_base(model) == weights_hash
    after = forward(model)
    assert after.dtype == before.dtype
    # DoRA divides by the norm it multiplies by: equal up to rounding of the output's dtype
    tolerance = {False: 0.0, True: 1e-5 if dtype == torch.float32 else 0.05}[use_dora]
    torch.testing.assert_close(after, before, atol=tolerance, rtol=tolerance)
    disturb(model)
    assert (forward(model) - before).abs().max() > 0.1
    assert hash_base(model) == weights_hash


def test_hash_tells_other_weights_apart() -> None:
    model = plain()
    first = hash_base(model)
    with torch.no_grad():
        model.proj_out.bias[0] += 1
    assert hash_base(model) != first


def test_the_seed_alone_decides_the_weights_and_global_random_state_is_left_alone() -> None:
    states = []
    for seed, outside in ((5, 0), (5, 1), (6, 0)):
        model = plain()
        torch.manual_seed(outside)
        state = torch.get_rng_state()
        add_adapter(model, AdapterConfig(rank=4, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        states.append(adapter_state_dict(model))
    torch.testing.assert_close(states[0], states[1], atol=0, rtol=0)
    down = "blocks.0.attn1.to_q.lora_A.weight"
    assert not torch.equal(states[0][down], states[2][down])
    limit = 24**-0.5  # uniform within 1 / sqrt(inputs), as PyTorch's linear layers
    assert 0.9 * limit < states[0][down].abs().max() <= limit
    low = plain().to(torch.bfloat16)
    add_adapter(low, AdapterConfig(rank=4, seed=5))
    torch.testing.assert_close(adapter_state_dict(low), states[0], atol=0, rtol=0)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training_moves_the_adapter_only_also_with_gradient_checkpointing(
    name: str, use_dora: bool
) -> None:
    model = MODELS[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    target = forward(model).detach() + 1
    names = add_adapter(model, AdapterConfig(rank=4, use_dora=use_dora))
    model.train()
    model.enable_gradient_checkpointing()
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam([parameters[key] for key in names], lr=0.02)
    losses = []
    for _ in range(12):
        loss = (forward(model) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameters[key].grad.abs().sum() > 0 for key in names)
    base = {key.replace(".base_layer.", "."): p for key, p in model.state_dict().items()}
    assert all(torch.equal(base[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_state_holds_all_of_an_adapter(use_dora: bool) -> None:
    config = AdapterConfig(rank=4, use_dora=use_dora)
    trained, fresh = segmented(), segmented()
    for model in (trained, fresh):
        add_adapter(model, config)
    disturb(trained)
    state = adapter_state_dict(trained)
    assert adapter_state_dict(fresh).keys() == state.keys()
    for key, tensor in adapter_state_dict(fresh).items():  # the model's own memory
        tensor.copy_(state[key])
    torch.testing.assert_close(forward(fresh), forward(trained), atol=0, rtol=0)


def test_models_without_weights_or_with_an_adapter_are_refused() -> None:
    model = segmented()
    with pytest.raises(InputError, match="has no adapter; call add_adapter"):
        adapter_state_dict(model)
    with pytest.raises(LoadingError, match="no weights yet"):
        add_adapter(segmented().to("meta"), CONFIG)
    add_adapter(model, CONFIG)
    with pytest.raises(InputError, match="has an adapter"):
        add_adapter(model, CONFIG)


def test_settings_read_strictly_and_alpha_is_the_rank_by_default() -> None:
    config = parse_config(AdapterConfig, {"rank": 8, "target_modules": ["to_q"]}, "here")
    assert config == AdapterConfig(rank=8, target_modules=("to_q",))
    assert parse_config(AdapterConfig, to_dict(config), "here") == config
    assert (config.resolved_alpha, AdapterConfig(alpha=0.5).resolved_alpha) == (8.0, 0.5)
    assert AdapterConfig().rank == AdapterConfig().resolved_alpha == 32
    for values, message in (
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ["to_("]}, r"'to_\(' is not a regular expression"),
        ({"ranks": 3}, "ranks: there is no such setting"),
    ):
        with pytest.raises(ConfigError, match=f"here: .*{message}"):
            parse_config(AdapterConfig, values, "here")


def test_alpha_scales_the_change() -> None:
    outputs = []
    for alpha in (4.0, 8.0):
        model = segmented()
        add_adapter(model, AdapterConfig(rank=4, alpha=alpha, target_modules=("proj_out",)))
        disturb(model)
        outputs.append(forward(model) - forward(segmented()))
    torch.testing.assert_close(outputs[1], 2 * outputs[0], atol=1e-5, rtol=1e-5)
