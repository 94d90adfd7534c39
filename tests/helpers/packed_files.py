"""Tiny weights in the layouts of fp8 and GGUF files, and what they hold when they are unpacked."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KEPT = ("norm", "bias", "time_", "patch_embedding", "img_emb", "modulation", "text_embedding",
        "head", "shared", "token_emb", "pos_emb", "position_bias", "attention_bias")  # fmt: skip
"""Parts of names that programs leave in 16 bits."""


class Layout(NamedTuple):
    """A file's content, and the weights that it means."""

    tensors: State
    metadata: dict[str, str]
    meaning: State


def is_small(key: str, tensor: Tensor) -> bool:
    return key.endswith(".weight") and tensor.ndim == 2 and not any(k in key for k in KEPT)


def by_rows(weight: Tensor) -> Tensor:
    """``[out, 1]`` scales."""
    return weight.float().abs().amax(1, keepdim=True) / 448


def for_all(weight: Tensor) -> Tensor:
    return (weight.float().abs().amax() / 448).reshape(1)


def by_blocks(weight: Tensor) -> Tensor:
    """``[out, blocks, 1]`` scales of 16 columns each."""
    return weight.float().reshape(weight.shape[0], -1, 16).abs().amax(2, keepdim=True) / 448


def by_squares(weight: Tensor) -> Tensor:
    """``[out / 16, in / 16]``."""
    out, inside = weight.shape
    squares = weight.float().reshape(out // 16, 16, inside // 16, 16)
    return squares.abs().amax((1, 3)) / 448


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """One scale for each value."""
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(shape)
    grid = scale.reshape(scale.shape[0], -1)
    rows, columns = shape[0] // grid.shape[0], shape[1] // grid.shape[1]
    return grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def scaled(
    state: State,
    suffix: str,
    scale_of: Callable[[Tensor], Tensor] = for_all,
    dtype: torch.dtype = E4M3,
    *,
    shape: tuple[int, ...] | None = None,
    scale_dtype: torch.dtype = torch.float32,
) -> Layout:
    """8-bit weights with one kind of scales."""
    tensors: State = {}
    meaning: State = {}
    for key, tensor in state.items():
        if not is_small(key, tensor):
            meaning[key] = tensors[key] = tensor.to(torch.bfloat16)
            continue
        scale = scale_of(tensor).to(scale_dtype)
        wide = spread(scale.float(), tensor.shape)
        tensors[key] = (tensor.float() / wide).to(dtype)
        meaning[key] = tensors[key].float() * wide
        name = key.removesuffix(".weight") + suffix
        tensors[name] = scale if shape is None else scale.reshape(shape)
    return Layout(tensors, {}, meaning)


def plain(state: State, dtype: torch.dtype) -> Layout:
    """8-bit weights, cast only: norms and biases too, as in the "simple" files."""
    tensors = {k: t.to(dtype) if t.ndim >= 1 else t for k, t in state.items()}
    return Layout(tensors, {}, {k: t.float() for k, t in tensors.items()})


def half(state: State, dtype: torch.dtype) -> Layout:
    tensors = {k: t.to(dtype) for k, t in state.items()}
    return Layout(tensors, {}, {k: t.float() for k, t in tensors.items()})


def comfyui_old(state: State, dtype: torch.dtype = E4M3) -> Layout:
    found = scaled(state, ".scale_weight", dtype=dtype, shape=(), scale_dtype=torch.bfloat16)
    inputs = {
        k.replace(".scale_weight", ".scale_input"): torch.tensor(0.5)
        for k in found.tensors
        if k.endswith(".scale_weight")
    }
    marker = {"scaled_fp8": torch.empty(2, dtype=dtype)}
    prefix = "model.diffusion_model." if "patch_embedding.weight" in state else ""
    tensors = {f"{prefix}{k}": t for k, t in (found.tensors | inputs).items()}
    return found._replace(tensors=tensors | marker)


def comfyui_new(state: State) -> Layout:
    found = scaled(state, ".weight_scale", shape=())
    layers = [k.removesuffix(".weight_scale") for k in found.tensors if k.endswith("weight_scale")]
    note = {"format": "float8_e4m3fn"}
    text = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    notes = {f"{layer}.comfy_quant": text for layer in layers}
    header = {"format_version": "1.0", "layers": dict.fromkeys(layers, note)}
    inputs = {f"{layer}.input_scale": torch.tensor(1.0) for layer in layers}
    return found._replace(
        tensors=found.tensors | notes | inputs,
        metadata={"_quantization_metadata": json.dumps(header)},
    )


def musubi_blocks(state: State) -> Layout:
    """Two factors: of each block, and of the whole."""
    found = scaled(state, ".scale_weight", by_blocks)
    tensors = dict(found.tensors)
    for key in found.tensors:
        if key.endswith(".scale_weight"):
            tensors[key] = found.tensors[key] / 4
            tensors[f"{key}_tensor"] = torch.tensor(4.0)
    return found._replace(tensors=tensors)


SAFETENSORS: dict[str, Callable[[State], Layout]] = {
    "bf16": lambda state: half(state, torch.bfloat16),
    "fp16": lambda state: half(state, torch.float16),
    "fp8 e4m3": lambda state: plain(state, E4M3),
    "fp8 e5m2": lambda state: plain(state, E5M2),
    "ComfyUI old": comfyui_old,
    "ComfyUI old e5m2": lambda state: comfyui_old(state, E5M2),
    "ComfyUI new": comfyui_new,
    "musubi tensor": lambda state: scaled(state, ".scale_weight"),
    "musubi channel": lambda state: scaled(state, ".scale_weight", by_rows),
    "musubi block": musubi_blocks,
    "BFL": lambda state: scaled(state, ".weight_scale", lambda w: by_rows(w).flatten()),
    "scale_inv rows": lambda state: scaled(state, ".weight_scale_inv", by_rows),
    "scale_inv squares": lambda state: scaled(state, ".weight_scale_inv", by_squares),
}
"""Layouts of safetensors files by name, made from native names."""
PACKED = [name for name in SAFETENSORS if name not in ("bf16", "fp16")]


def write(layout: Layout, path: Path) -> Layout:
    """Save a safetensors file."""
    ready = {key: tensor.contiguous().clone() for key, tensor in layout.tensors.items()}
    save_file(ready, path, {"format": "pt", **layout.metadata})
    return layout


WRITABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS",
            "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # fmt: skip
FLOATS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
          "IQ4_NL": (0,), "IQ4_XS": (0,)}  # fmt: skip
"""Bytes at which blocks that gguf cannot make have their float16 factors."""


def blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, seed: int) -> np.ndarray:
    """Random blocks with small factors."""
    block_size, type_size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    count = int(np.prod(shape)) // block_size
    data = random.integers(0, 256, (count, type_size), dtype=np.uint8)
    for start in FLOATS[kind.name]:
        factors = random.uniform(1e-4, 4e-4, count).astype(np.float16)
        data[:, start : start + 2] = factors.view(np.uint8).reshape(count, 2)
    return data.reshape(*shape[:-1], -1)


def write_gguf(
    state: State,
    path: Path,
    kind: str,
    architecture: str | None = "wan",
    *,
    flat: bool = False,
    name: str = "tiny",
    keeps: Callable[[str, Tensor], bool] = is_small,
    describe: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> State:
    """Save a GGUF file; what cannot be in ``kind`` is in float16 or float32.

    Args:
        state: Under the names of the file.
        path: Where.
        kind: Type of the large weights.
        architecture: None leaves it out.
        flat: Write five dimensions as four, with the shape in the header.
        name: ``general.name``.
        keeps: Whether a weight is in ``kind``.
        describe: Writes further entries of the header.

    Returns:
        The weights that the file means, in float32.
    """
    writer = gguf.GGUFWriter(path, architecture or "x")
    writer.add_name(name)
    describe(writer)
    meaning: State = {}
    wanted = gguf.GGMLQuantizationType[kind]
    block_size = gguf.GGML_QUANT_SIZES[wanted][0]
    for seed, (key, tensor) in enumerate(state.items()):
        values = tensor.float().numpy()
        shape = values.shape
        if keeps(key, tensor) and shape[-1] % block_size == 0:
            data = blocks(shape, wanted, seed) if kind in FLOATS else gguf.quantize(values, wanted)
            writer.add_tensor(key, data, raw_dtype=wanted)
            meaning[key] = torch.from_numpy(gguf.dequantize(data, wanted).reshape(shape).copy())
            continue
        plain_values = values if values.ndim < 2 else values.astype(np.float16)
        meaning[key] = torch.from_numpy(plain_values.astype(np.float32))
        if flat and values.ndim > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{key}", list(shape))
            plain_values = plain_values.reshape(-1, *shape[3:])
        writer.add_tensor(key, plain_values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if architecture is None:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"general.architecture", b"general.architectura"))
    return meaning


def gguf_umt5(state: State) -> State:
    """llama.cpp's names of an encoder under transformers' names."""
    rules = [
        (r"^shared\.weight", "token_embd.weight"),
        (r"^encoder\.final_layer_norm", "enc.output_norm"),
        (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm", r"enc.blk.\1.attn_norm"),
        (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm", r"enc.blk.\1.ffn_norm"),
        (r"^encoder\.block\.(\d+)\..*SelfAttention\.([qkvo])\.", r"enc.blk.\1.attn_\2."),
        (r"^encoder\.block\.(\d+)\..*relative_attention_bias", r"enc.blk.\1.attn_rel_b"),
        (r"^encoder\.block\.(\d+)\..*wi_0", r"enc.blk.\1.ffn_gate"),
        (r"^encoder\.block\.(\d+)\..*wi_1", r"enc.blk.\1.ffn_up"),
        (r"^encoder\.block\.(\d+)\..*\.wo\.", r"enc.blk.\1.ffn_down."),
    ]
    renamed: State = {}
    for key, tensor in state.items():
        if key == "encoder.embed_tokens.weight":
            continue
        name = next((re.sub(p, r, key) for p, r in rules if re.search(p, key)), key)
        renamed[name] = tensor
    return renamed


def parameter_bytes(model: Any) -> int:
    return sum(tensor.nbytes for tensor in model.parameters())
