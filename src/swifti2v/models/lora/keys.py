"""Read the keys of a LoRA file: its format, the layers of its tensors, other kinds of files."""

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from torch import Tensor

from swifti2v.models.weights.names import drop_wrappers, shorten, wan_names

KOHYA_PREFIX = "lora_unet_"
PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "transformer.",
    "pipe.dit.",
    "module.",
    "model.",
)
NAME = r"(?:\.[^.]+)?"  # the adapter's, as "default"
KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    rf"(?P<down>lora[._](?:A|down){NAME}\.weight|lora_A)"
    rf"|(?P<up>lora[._](?:B|up){NAME}\.weight|lora_B)"
    rf"|(?P<up_bias>lora[._](?:B|up){NAME}\.bias)"
    r"|(?P<alpha>alpha|lora_alpha)|(?P<rank>lora_rank)"
    r"|(?P<diff>diff|diff_param)|(?P<diff_b>diff_b)|(?P<diff_m>diff_m))"
)
OTHER_KINDS = {  # how the keys of files end that are no plain LoRA
    rf"dora_scale|lora_magnitude_vector{NAME}(\.weight)?": "a DoRA",
    r"hada_[wt]\d(_[ab])?": "a LoHa",
    r"lokr_[wt]\d(_[ab])?": "a LoKr",
    rf"oft_(blocks|diag)|oft_[rRsS]{NAME}(\.weight)?": "an OFT adapter",
    rf"boft_[rRsS]{NAME}": "a BOFT adapter",
    r"[ab][12]\.weight": "a GLoRA",
    rf"on_input|ia3_l{NAME}": "an (IA)^3 adapter",
    rf"vera_lambda_[bd]{NAME}": "a VeRA adapter",
    r"lora_mid\.weight": "a LoCon of three factors",
    r"[wb]_norm": "a LyCORIS file that trains norms",
    r"reshape_weight": "a control LoRA, which enlarges layers",
    r"set_weight|set_param": "a file that adds layers of its own",
}
OTHER_KEY = re.compile(
    r"(?P<module>.+?)\.(?:" + "|".join(f"(?P<k{i}>{k})" for i, k in enumerate(OTHER_KINDS)) + ")"
)
WHOLE = re.compile(r"(.+\.)?(weight|bias|modulation|scale_shift_table)")
TEXT_ENCODER = re.compile(r"lora_te\d?_|text_encoder(_\d)?\.")


class LoraPart(NamedTuple):
    """One tensor of the file and the key it came under."""

    key: str
    tensor: Tensor


Layers = dict[str, dict[str, LoraPart]]
"""Layer to kind (``down``, ``up``, ``up_bias``, ``alpha``, ``rank``, ``diff``, ``diff_b`` or
``diff_m``) to tensor."""


def find_format(keys: Collection[str]) -> str:
    """Format of a LoRA by its keys: ``peft``, ``original``, ``diffsynth`` or ``kohya``."""
    plain = [drop_wrappers(key) for key in keys]
    if any(key.startswith(KOHYA_PREFIX) for key in plain):
        return "kohya"
    if any("diffusion_model." in key for key in plain):
        return "original"
    diffusers = re.compile(
        r"transformer\.|base_model\.|condition_embedder\.|proj_out\.|.*\.attn[12]\.|.*ffn\.net\."
    )
    return "peft" if any(diffusers.match(key) for key in plain) else "diffsynth"


def describe_other_kind(name: str, keys: Collection[str]) -> str | None:
    """Reason why a file is not a plain LoRA; None if it may be one.

    Args:
        name: Name of the file.
        keys: Keys of its tensors.
    """
    others = {key: other for key in keys if (other := _match_other_kind(strip_prefixes(key)))}
    if others:
        key, (_, kind) = next(iter(others.items()))
        return (
            f"{name} is {kind}, not a plain LoRA: {len(others)} of {len(keys)} keys, such as {key}; "
            "merge it with the program that made it, and give the merged weights"
        )
    plain = [strip_prefixes(key) for key in keys]
    if all(WHOLE.fullmatch(key) for key in plain) and not any(KEY.fullmatch(k) for k in plain):
        return (
            f"{name} is a checkpoint of whole weights, not a LoRA: it holds {shorten(keys, 1)}; "
            "name it in a preset, as weights of a transformer"
        )
    return None


def _match_other_kind(key: str) -> tuple[str, str] | None:
    """Module and kind of file, where a key without prefixes is of another one."""
    match = OTHER_KEY.fullmatch(key)
    if match is None:
        return None
    kind = next(kind for i, kind in enumerate(OTHER_KINDS.values()) if match[f"k{i}"])
    return match["module"], kind


def group_by_layer(
    tensors: Mapping[str, Tensor], names: Collection[str]
) -> tuple[Layers, dict[str, str]]:
    """Sort the tensors of a LoRA of any format by layer.

    Args:
        tensors: Tensors by key.
        names: Layers and bare parameters of the model, under diffusers names.

    Returns:
        The layers, and the reason for each key that has no place in them. A layer with a part of
        another kind of adapter has none at all.
    """
    places = _index_places(names)
    problems: dict[str, str] = {}
    layers: Layers = {}
    foreign: dict[str, str] = {}
    for key, tensor in tensors.items():
        plain = strip_prefixes(key)
        if other := _match_other_kind(plain):
            module, kind = other
            problems[key] = f"part of {kind}"
            foreign[places.get(module.replace(".", "_"), "")] = kind
            continue
        match = KEY.fullmatch(plain)
        if match is None:
            problems[key] = "not a known kind of LoRA key"
            continue
        kind = next(kind for kind, text in match.groupdict().items() if kind != "module" and text)
        module = match["module"] + (".modulation" if kind == "diff_m" else "")
        place = places.get(module.replace(".", "_"))
        if place is None:
            problems[key] = _explain_stranger(key)
        elif kind in ("alpha", "rank") and tensor.numel() != 1:
            problems[key] = f"{kind} is not one number"
        elif kind in layers.setdefault(place, {}):
            problems[key] = f"the same as {layers[place][kind].key}"
        else:
            layers[place][kind] = LoraPart(key, tensor)
    for place, kind in foreign.items():
        for part in layers.pop(place, {}).values():
            problems[part.key] = f"its layer is that of {kind}"
    return layers, problems


def _explain_stranger(key: str) -> str:
    is_text = TEXT_ENCODER.match(key)
    return "for a text encoder, which takes no LoRA" if is_text else "no such layer in the model"


def strip_prefixes(key: str) -> str:
    """A key without what trainers and other programs put before the layer's name."""
    key = drop_wrappers(key)
    if key.startswith(KOHYA_PREFIX):
        return key.removeprefix(KOHYA_PREFIX).removeprefix("_").removeprefix("orig_mod_")
    while prefix := next((p for p in PREFIXES if key.startswith(p)), None):
        key = key.removeprefix(prefix)
    return key


def _index_places(names: Collection[str]) -> dict[str, str]:
    """Map every name of a layer, with ``_`` for ``.`` as kohya writes it, to its own name."""
    blocks = [int(name.split(".")[1]) for name in names if re.match(r"blocks\.\d+\.", name)]
    original = {
        old: new for old, new in wan_names(max(blocks, default=-1) + 1).items() if new in names
    }
    return {old.replace(".", "_"): new for old, new in (original | {n: n for n in names}).items()}
