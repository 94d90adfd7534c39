import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from swifti2v.errors import LoadingError
from swifti2v.models.weights.files import load_weights, read_state_dict

State = dict[str, torch.Tensor]


def tiny_transformer(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 3,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    return WanTransformer3DModel(**config | changes).eval()


def tiny_umt5(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 20,
        "d_model": 8,
        "d_kv": 4,
        "d_ff": 12,
        "num_layers": 2,
        "num_heads": 2,
    }
    return randomized(UMT5EncoderModel(UMT5Config(**sizes)).train(False))


@torch.no_grad()
def randomized(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def assert_same_state(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "module.", "pipe.dit.", "model."]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt"])
@pytest.mark.parametrize("prefix", [*PREFIXES, "module.model."])
def test_each_file_type_reads_back_without_its_prefix(
    tmp_path: Path, suffix: str, prefix: str
) -> None:
    state = {"a.weight": torch.randn(2, 3), "b": torch.arange(3)}
    stored = {f"{prefix}{key}": tensor for key, tensor in state.items()}
    file = tmp_path / f"w{suffix}"
    save_file(stored, file) if suffix == ".safetensors" else torch.save(stored, file)
    assert_same_state(read_state_dict(file), state)
    assert_same_state(read_state_dict(str(tmp_path)), state)


def test_a_prefix_that_only_some_keys_have_stays(tmp_path: Path) -> None:
    state = {"model.a": torch.ones(1), "first_stage_model.b": torch.ones(1)}
    save_file(state, tmp_path / "w.safetensors")
    assert_same_state(read_state_dict(tmp_path / "w.safetensors"), state)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints_are_unwrapped(tmp_path: Path, wrapper: str, zipped: bool) -> None:
    state = {"a.weight": torch.randn(2, 3)}
    file = tmp_path / "w.pt"
    content = {"epoch": 3, wrapper: {"module": state, "note": "x"}}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert_same_state(read_state_dict(file), state)


@pytest.mark.parametrize(
    "name",
    [
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.ffn.0.weight",
        "_orig_mod.blocks.0.ffn.0.weight",
        "module._orig_mod.blocks.0._checkpoint_wrapped_module.ffn.0.weight",
    ],
)
def test_names_within_wrappers_of_pytorch_are_those_of_the_weights(
    tmp_path: Path, name: str
) -> None:
    tensor = torch.randn(2, 3)
    save_file({name: tensor}, tmp_path / "w.safetensors")
    assert_same_state(
        read_state_dict(tmp_path / "w.safetensors"), {"blocks.0.ffn.0.weight": tensor}
    )


def test_a_weight_that_is_there_with_and_without_a_wrapper_is_refused(tmp_path: Path) -> None:
    save_file({"_orig_mod.a": torch.ones(1), "a": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(LoadingError, match="with and without wrappers' names"):
        read_state_dict(tmp_path / "w.safetensors")


def test_averaged_weights_of_a_distilled_generator_come_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last, averaged, critic = ({"model.blocks.0.x": torch.full((2,), float(i))} for i in range(3))
    file = tmp_path / "model.pt"
    torch.save({"generator": last, "critic": critic, "step": 600}, file)
    assert_same_state(read_state_dict(file), {"blocks.0.x": torch.zeros(2)})
    assert caplog.text == ""
    torch.save({"generator": last, "critic": critic, "generator_ema": averaged}, file)
    assert_same_state(read_state_dict(file), {"blocks.0.x": torch.ones(2)})
    assert "generator_ema and generator; generator_ema is taken" in caplog.text


def write_shards(folder: Path, state: State, with_index: bool) -> list[Path]:
    total = len(state)
    names = {k: f"w-{i + 1:05d}-of-{total:05d}.safetensors" for i, k in enumerate(state)}
    for key, name in names.items():
        save_file({key: state[key]}, folder / name)
    if with_index:
        index = {"metadata": {}, "weight_map": names}
        (folder / "w.safetensors.index.json").write_text(json.dumps(index))
    return [folder / name for name in names.values()]


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_read_back_whole_or_not_at_all(tmp_path: Path, with_index: bool) -> None:
    state = {f"blocks.{i}.weight": torch.randn(2, 2) for i in range(3)}
    shards = write_shards(tmp_path, state, with_index)
    assert_same_state(read_state_dict(tmp_path), state)
    if with_index:
        assert_same_state(read_state_dict(tmp_path / "w.safetensors.index.json"), state)
    with pytest.raises(LoadingError, match="one of 3 shards"):
        read_state_dict(shards[0])
    shards[1].unlink()
    with pytest.raises(
        LoadingError, match="00002-of-00003" if with_index else "lacks shard 2 of 3"
    ):
        read_state_dict(tmp_path)


def test_ambiguous_or_false_folders_and_indexes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadingError, match="no weight files"):
        read_state_dict(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(LoadingError, match=r"one.safetensors, two.safetensors; name one"):
        read_state_dict(tmp_path)
    index = tmp_path / "w.safetensors.index.json"
    for text, message in (
        ("{", "is not an index of shards"),
        ("[]", "is not an index of shards"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "outside its folder"),
        ('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}', "repeats keys"),
    ):
        index.write_text(text)
        with pytest.raises(LoadingError, match=message):
            read_state_dict(tmp_path)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("whole")
    state = {"a.weight": torch.randn(40, 40), "b": torch.randn(5)}
    save_file(state, folder / "w.safetensors")
    torch.save(state, folder / "w.pth")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return sorted(folder.iterdir())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_refused_with_its_name(
    whole_files: list[Path], data: st.DataObject
) -> None:
    whole = data.draw(st.sampled_from(whole_files))
    content = whole.read_bytes()
    cut = whole.with_name(f"cut{whole.suffix}")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        with pytest.raises(LoadingError, match=rf"cut{whole.suffix}.*fetch it again"):
            read_state_dict(cut)
    finally:
        cut.unlink()


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_that_hold_more_than_tensors_are_refused_and_run_no_code(tmp_path: Path) -> None:
    file, trace = tmp_path / "w.pt", tmp_path / "trace"
    torch.save({"a": torch.ones(1), "b": Hostile(trace)}, file)
    with pytest.raises(LoadingError, match="Python code"):
        read_state_dict(file)
    assert not trace.exists()
    for content, message in (
        ({"a": torch.ones(1), "step": 3}, "not tensors: step"),
        ([torch.ones(1)], "list, not a dict"),
        ({}, "holds no tensors"),
    ):
        torch.save(content, file)
        with pytest.raises(LoadingError, match=message):
            read_state_dict(file)


def test_files_that_are_no_weights_are_refused_with_a_remedy(tmp_path: Path) -> None:
    for name, content, message in (
        ("zero.safetensors", b"", "empty: its download did not finish"),
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("page.safetensors", b"<!DOCTYPE html><html>not found</html>", "fetch it again"),
        ("model.gguf", b"GGUF", "damaged or cut short"),
        ("model.zip", b"PK", "not a weight file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LoadingError, match=message):
            read_state_dict(tmp_path / name)
    with pytest.raises(LoadingError, match=r"no weights at .*absent.pth"):
        read_state_dict(tmp_path / "absent.pth")


def test_a_state_that_does_not_fit_assigns_nothing_and_names_the_differences() -> None:
    model = tiny_transformer()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    good = tiny_transformer(seed=1).state_dict()
    less = {key: tensor for key, tensor in good.items() if key != "proj_out.bias"}
    for state, message in (
        (less, r"my file does not fit WanTransformer3DModel.*1 missing: proj_out.bias \(12,\)"),
        (good | {"extra": torch.ones(2)}, r"1 unexpected: extra \(2,\)"),
        (good | {"proj_out.bias": torch.ones(3)}, r"checkpoint \(3,\) .*model \(12,\)"),
        (good | {"proj_out.bias": torch.ones(12, dtype=torch.int8)}, r"torch.int8"),
        ({}, f"{len(before)} missing"),
    ):
        with pytest.raises(LoadingError, match=message):
            load_weights(model, state, source="my file")
        assert_same_state(model.state_dict(), before)


def test_weights_are_cast_to_the_dtype_of_the_model() -> None:
    model = tiny_transformer(seed=1)
    good = {key: tensor.half() for key, tensor in tiny_transformer().state_dict().items()}
    load_weights(model, good, source="test")
    assert_same_state(model.state_dict(), {key: tensor.float() for key, tensor in good.items()})


def test_a_model_without_memory_takes_the_tensors_themselves() -> None:
    state = tiny_transformer().bfloat16().state_dict()
    with init_empty_weights(include_buffers=False):
        model = tiny_transformer()
    load_weights(model, state, source="test")
    assert_same_state(model.state_dict(), state)
    assert not any(buffer.is_meta for buffer in model.buffers())
    with torch.device("meta"):
        hollow = tiny_transformer()
    with pytest.raises(LoadingError, match="buffers without memory"):
        load_weights(hollow, state, source="test")


@pytest.mark.parametrize("empty", [False, True])
def test_tied_weights_may_be_stored_once_under_either_name(empty: bool) -> None:
    state = tiny_umt5().state_dict()
    for left_out in ("shared.weight", "encoder.embed_tokens.weight"):
        with init_empty_weights(include_buffers=False) if empty else torch.no_grad():
            model = UMT5EncoderModel(tiny_umt5().config)
        once = {key: tensor for key, tensor in state.items() if key != left_out}
        load_weights(model, once, source="test")
        assert_same_state(model.state_dict(), state)
    with pytest.raises(LoadingError, match=r"2 missing: shared\.weight"):
        load_weights(
            tiny_umt5(),
            {
                key: tensor
                for key, tensor in state.items()
                if "embed" not in key and "shared" not in key
            },
            source="test",
        )
