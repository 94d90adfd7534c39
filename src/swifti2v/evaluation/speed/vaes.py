"""Video VAEs: a piece at a time beside diffusers' whole clip, in seconds and in peak memory."""

from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor

from swifti2v.evaluation.speed.models import Subject, distance, make_random
from swifti2v.evaluation.speed.rows import Row
from swifti2v.evaluation.speed.timing import Protocol, measure
from swifti2v.models.loading.architectures import KNOWN, Architecture
from swifti2v.models.vae.causal_conv import VaeLevers
from swifti2v.models.vae.state import MIN_TILE
from swifti2v.models.vae.streaming import StreamingDecoder, StreamingEncoder, scale_factors
from swifti2v.shapes import LatentShape, PixelShape

WAN22 = KNOWN["Wan-AI/Wan2.2-TI2V-5B-Diffusers"]["vae"]
NARROW = 4
"""Divides the width of the VAE that stands for a model without one, so that a CPU can run it."""


def narrow_vae() -> Architecture:
    """Wan2.2's VAE, with a part of its channels."""
    widths = {name: WAN22.config[name] // NARROW for name in ("base_dim", "decoder_base_dim")}
    return Architecture(WAN22.kind, {**WAN22.config, **widths})


def compare_vaes(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    """Stage II's VAE, or Wan2.2's at a quarter of its width where the model has no such network."""
    architecture = subject.architecture("stage2_vae")
    name = "Wan2.2 VAE"
    if not issubclass(architecture.kind, AutoencoderKLWan):
        architecture, name = narrow_vae(), f"Wan2.2 VAE, width 1/{NARROW}, random weights"
        vae = make_random(architecture, "stage2_vae", subject.dtype, subject.device)
    else:
        vae = subject.load("stage2_vae")
    config = subject.config
    pixels = PixelShape(config.num_frames, config.height, config.width)
    shape = LatentShape.from_pixel_shape(pixels, scale_factors(vae, 1), vae.config["z_dim"])
    size = f"{config.width}x{config.height}, {config.num_frames} frames"
    generator = torch.Generator(subject.device).manual_seed(0)
    latents = torch.randn(1, *shape, device=subject.device, generator=generator)
    yield from _compare_decoders(vae, latents, f"{name}, decode {size}", protocol)
    video = torch.rand(
        1, 3, config.num_frames, config.height, config.width, device=subject.device
    ).mul_(2).sub_(1)  # fmt: skip
    yield from _compare_encoders(vae, video, f"{name}, encode {size}", protocol)


def _compare_decoders(vae: Any, latents: Tensor, case: str, protocol: Protocol) -> Iterator[Row]:
    def whole() -> Tensor:
        mean, std = (
            torch.tensor(vae.config[name], device=latents.device)[:, None, None, None]
            for name in ("latents_mean", "latents_std")
        )
        video: Tensor = vae.decode((latents * std + mean).to(vae.dtype), return_dict=False)[0]
        return video.float()

    def pieces(**how: Any) -> Tensor:
        decoder = StreamingDecoder(vae, **how)
        for piece in torch.split(latents, 3, dim=2):
            last = decoder.decode(piece)  # a piece goes out before the next is made
        return last

    timing, expected = measure(whole, latents.device, protocol)
    yield Row(case=case, variant="diffusers, vae.decode", timing=timing)
    if latents.device.type == "cuda":
        vae.enable_tiling()
        timing, _ = measure(whole, latents.device, protocol)
        vae.disable_tiling()
        yield Row(case=case, variant="diffusers, its tiles", timing=timing)
    for name, how in _ways(latents).items():
        timing, last = measure(partial(pieces, **how), latents.device, protocol)
        note = f"differs by {distance(last, expected[:, :, -last.shape[2] :]):.1e}"
        yield Row(case=case, variant=f"swifti2v, {name}", timing=timing, note=note)


def _ways(latents: Tensor) -> dict[str, dict[str, Any]]:
    """Ways to decode: as the pipeline does, without each lever of this device, and in tiles."""
    elsewhere = "uses_onednn" if latents.is_cuda else "fuses_norm"
    levers = [field.name for field in fields(VaeLevers) if field.name != elsewhere]
    without = {f"without {name}": {"levers": VaeLevers(**{name: False})} for name in levers}
    tile = max(-(-max(latents.shape[3:]) // 2), MIN_TILE)
    return {
        "3 latent frames at a time": {},
        **without,
        f"tiles of {tile}": {"tile": tile},
        f"tiles of {tile}, history in host memory": {"tile": tile, "offloads_history": True},
    }


def _compare_encoders(vae: Any, video: Tensor, case: str, protocol: Protocol) -> Iterator[Row]:
    def whole() -> Tensor:
        latents: Tensor = vae.encode(video.to(vae.dtype)).latent_dist.mode()
        return latents

    def pieces() -> Tensor:
        encoder = StreamingEncoder(vae)
        time = vae.config["scale_factor_temporal"]
        parts = [video[:, :, :1], *torch.split(video[:, :, 1:], time, dim=2)]
        return torch.cat([encoder.encode(part) for part in parts], dim=2)

    timing, _ = measure(whole, video.device, protocol)
    yield Row(case=case, variant="diffusers, vae.encode", timing=timing)
    timing, _ = measure(pieces, video.device, protocol)
    yield Row(case=case, variant="swifti2v, a latent frame at a time", timing=timing)
