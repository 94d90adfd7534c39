"""The feature extractors of the ``lite`` dimensions, from a local folder or from their publishers.

A local folder holds, for the dimensions that are measured:

::

    dino-vitb16/      facebook/dino-vitb16, transformers layout
    clip-vit-b-32/    openai/clip-vit-base-patch32, transformers layout
    clip-vit-l-14/    openai/clip-vit-large-patch14, transformers layout
    sa_0_4_vit_l_14_linear.pth    LAION's aesthetic head
    raft_large.pth    torchvision's raft_large, weights C_T_V1
    dreamsim/         what dreamsim keeps in its cache_dir (ensemble)
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swifti2v.errors import ConfigError, LoadingError, ShapeError

Embed: TypeAlias = Callable[[Tensor], Tensor]
"""``[B, 3, h, w]`` as its transform gives them to ``[B, D]``."""
EstimateFlow: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Two frames ``[1, 3, H, W]`` in 0 .. 255 to ``[2, H', W']`` in pixels, sides rounded up to 8."""

DINO = ("dino-vitb16", "facebook/dino-vitb16")
CLIP_B = ("clip-vit-b-32", "openai/clip-vit-base-patch32")
CLIP_L = ("clip-vit-l-14", "openai/clip-vit-large-patch14")
"""Folder below the local one, and Hub id."""
HEAD, HEAD_WIDTH = "sa_0_4_vit_l_14_linear.pth", 768
HEAD_URL = f"https://raw.githubusercontent.com/LAION-AI/aesthetic-predictor/main/{HEAD}"
RAFT, RAFT_UPDATES, RAFT_MIN_SIDE = "raft_large.pth", 20, 128
DREAMSIM = "dreamsim"


def load_dino(weights: Path | None, device: torch.device) -> Embed:
    """DINO ViT-B/16, the class token of the last layer; without a local folder the Hub is asked.

    Raises:
        LoadingError: It is not there or does not fit.
    """
    from transformers import ViTModel

    model = _load_pretrained(ViTModel, DINO, weights, add_pooling_layer=False).to(device)

    def embed(pixels: Tensor) -> Tensor:
        states: Tensor = model(pixels, interpolate_pos_encoding=True).last_hidden_state
        return states[:, 0]

    return embed


def load_clip(name: tuple[str, str], weights: Path | None, device: torch.device) -> Embed:
    """CLIP's image tower with its projection; arguments and errors as in ``load_dino``."""
    from transformers import CLIPVisionModelWithProjection

    model = _load_pretrained(CLIPVisionModelWithProjection, name, weights).to(device)

    def embed(pixels: Tensor) -> Tensor:
        embeds: Tensor = model(pixels).image_embeds
        return embeds

    return embed


def load_aesthetic_score(weights: Path | None, device: torch.device) -> Embed:
    """CLIP ViT-L/14 and LAION's linear head: ``[B, 3, h, w]`` to ``[B, 1]``, about 0 .. 10.

    Arguments and errors as in ``load_dino``.
    """
    embed = load_clip(CLIP_L, weights, device)
    if weights is None:
        state = _download(
            "LAION's aesthetic head",
            lambda: torch.hub.load_state_dict_from_url(
                HEAD_URL, map_location="cpu", weights_only=True
            ),
        )
    else:
        state = _read_state(weights / HEAD)
    head = _fill(nn.Linear(HEAD_WIDTH, 1), state, HEAD).to(device).eval()

    def score(pixels: Tensor) -> Tensor:
        result: Tensor = head(F.normalize(embed(pixels), dim=-1))
        return result

    return score


def load_dreamsim(weights: Path | None, device: torch.device) -> Embed:
    """DreamSim's ensemble; arguments and errors as in ``load_dino``.

    It fetches the code of DINO with ``torch.hub`` on first use, with a local folder too.
    """
    module = _import_extra("dreamsim", "i2v_background")
    folder = Path(torch.hub.get_dir()) / DREAMSIM if weights is None else weights / DREAMSIM
    if weights is not None and not folder.is_dir():
        raise LoadingError(f"{folder} does not exist; put DreamSim's files there (cache_dir)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    model, _ = _download(
        "DreamSim",
        lambda: module.dreamsim(pretrained=True, device=str(device), cache_dir=str(folder)),
    )
    embed: Embed = model.embed
    return embed


def load_raft(weights: Path | None, device: torch.device) -> EstimateFlow:
    """RAFT with the weights trained on Chairs and Things; arguments and errors as in ``load_dino``.

    Two frames at 2560x1408 take about 17 GB.
    """
    flow = _import_extra("torchvision.models.optical_flow", "dynamic_degree")
    if weights is None:
        model = _download("RAFT", lambda: flow.raft_large(weights="C_T_V1", progress=False))
    else:
        model = _fill(flow.raft_large(), _read_state(weights / RAFT), RAFT)
    return make_flow_estimator(model.to(device).eval())


def make_flow_estimator(raft: nn.Module) -> EstimateFlow:
    """A RAFT of torchvision as VBench runs it: 20 updates, sides padded to multiples of 8.

    The estimator raises ``ShapeError`` for sides below 128 pixels.
    """

    def estimate(first: Tensor, second: Tensor) -> Tensor:
        height, width = first.shape[-2:]
        if min(height, width) < RAFT_MIN_SIDE:
            raise ShapeError(
                f"a clip of {width}x{height} is too small for RAFT; sides of at least "
                f"{RAFT_MIN_SIDE} pixels are needed for dynamic_degree"
            )
        more_rows, more_columns = -height % 8, -width % 8
        padding = (
            more_columns // 2,
            more_columns - more_columns // 2,
            more_rows // 2,
            more_rows - more_rows // 2,
        )
        pair = [F.pad(frame, padding, mode="replicate") / 127.5 - 1 for frame in (first, second)]
        flow: Tensor = raft(*pair, num_flow_updates=RAFT_UPDATES)[-1][0]
        return flow

    return estimate


def _load_pretrained(
    kind: Any, name: tuple[str, str], weights: Path | None, **options: Any
) -> nn.Module:
    folder, hub_id = name
    source: str | Path = hub_id
    if weights is not None:
        source = weights / folder
        if not source.is_dir():
            raise LoadingError(f"{source} does not exist; put {hub_id} of the Hub there")
    model, report = _download(
        str(source),
        lambda: kind.from_pretrained(
            source, torch_dtype=torch.float32, output_loading_info=True, **options
        ),
    )
    if missing := sorted(report["missing_keys"]):
        raise LoadingError(f"{source} lacks {missing[0]} and {len(missing) - 1} more weights")
    result: nn.Module = model.eval()
    return result


def _download(name: str, load: Callable[[], Any]) -> Any:
    """Run a loader of another library; what goes wrong in it becomes one error."""
    try:
        return load()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LoadingError(
            f"{name} cannot be loaded ({reason}); without network put it into a folder and name "
            "that with --weights"
        ) from None


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise LoadingError(f"{path} does not exist; put it there, or leave out --weights")
    try:
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises nearly any type
        raise LoadingError(f"{path} cannot be read as weights ({type(error).__name__})") from None
    return state


def _fill(model: nn.Module, state: dict[str, Tensor], name: str) -> nn.Module:
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError) as error:
        raise LoadingError(f"{name} does not fit: {str(error).splitlines()[0]}") from None
    return model


def _import_extra(module: str, dimension: str) -> Any:
    """A module of the extra ``eval``.

    Raises:
        ConfigError: It is not installed, or not built for this torch.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{dimension} needs {package} ({str(error).splitlines()[0]}): pip install "
            "'swifti2v[eval]', with a torchvision that is built for the installed torch"
        ) from None
