"""The kernels that the 2K clip spends its time in, at its own sizes; on a CPU at small ones."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from swifti2v.errors import ConfigError
from swifti2v.evaluation.speed.models import Subject
from swifti2v.evaluation.speed.rows import Row
from swifti2v.evaluation.speed.timing import Protocol, measure
from swifti2v.models.runtime.speed import attention_order
from swifti2v.models.weights.quantization import FLOAT8, quantize_rows, require_float8

ATTENTION = ((24, 17600, 128), (24, 14080, 128), (40, 18480, 128))
"""Heads, tokens, width: Stage II's two windows and Stage I."""
MATRICES = ((17600, 3072, 3072), (17600, 3072, 14336), (18480, 5120, 5120), (18480, 5120, 13824))
"""Tokens, inputs, outputs."""
CONVOLUTIONS = ((1024, 1024, 352, 640), (512, 256, 704, 1280), (256, 256, 704, 1280))
"""Channels in and out, height and width of the decoder's frames, four at a time."""
SMALL = 16
"""Divides tokens and areas on a CPU."""


def time_kernels(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    """Attention by each back-end, matrix products in 16 and 8 bits, convolutions in both layouts."""
    for run in (_time_attention, _time_matrices, _time_convolutions):
        yield from run(subject, protocol)
        if subject.device.type == "cuda":
            torch.cuda.empty_cache()


def _row(
    case: str,
    variant: str,
    run: Callable[[], Tensor],
    flops: float,
    subject: Subject,
    protocol: Protocol,
) -> Row:
    timing, result = measure(run, subject.device, protocol)
    assert torch.isfinite(result.float().sum())
    return Row(case=case, variant=variant, timing=timing, flops=flops)


def _shrink(subject: Subject) -> int:
    return 1 if subject.device.type == "cuda" else SMALL


def _time_attention(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    is_gpu = subject.device.type == "cuda"
    for heads, tokens, width in ATTENTION:
        size = tokens // _shrink(subject)
        # As the models lay them out: heads behind tokens.
        query, key, value = (
            torch.randn(
                1, size, heads, width, dtype=subject.dtype, device=subject.device
            ).transpose(1, 2)
            for _ in range(3)
        )
        attend = partial(F.scaled_dot_product_attention, query, key, value)
        for name in ("flash", "cudnn", "efficient") if is_gpu else ("flash",):
            with attention_order(name, subject.device):
                yield _row(
                    f"attention {heads}x{size}x{width}",
                    name,
                    attend,
                    4 * size**2 * heads * width,
                    subject,
                    protocol,
                )


def _time_matrices(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    for tokens, inner, outer in MATRICES:
        size = tokens // _shrink(subject)
        case, flops = f"linear {size}x{inner}x{outer}", 2.0 * size * inner * outer
        hidden = torch.randn(size, inner, dtype=subject.dtype, device=subject.device)
        weight = torch.randn(outer, inner, dtype=subject.dtype, device=subject.device)
        plain = partial(F.linear, hidden, weight)
        yield _row(case, subject.kind, plain, flops, subject, protocol)
        try:
            require_float8(subject.device)
        except ConfigError:
            continue
        if subject.device.type != "cuda":
            continue  # computed there, but in no kernel of its own
        rows, scale = quantize_rows(hidden, FLOAT8)
        columns, column_scale = quantize_rows(weight, FLOAT8)
        product = partial(
            torch._scaled_mm,
            rows,
            columns.t(),
            scale_a=scale,
            scale_b=column_scale.t(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        yield _row(case, "float8, rows scaled", product, flops, subject, protocol)


def _time_convolutions(subject: Subject, protocol: Protocol) -> Iterator[Row]:
    shrink = _shrink(subject)
    for inputs, outputs, height, width in CONVOLUTIONS:
        height, width = height // shrink, width // shrink
        inputs, outputs = inputs // shrink, outputs // shrink
        case = f"conv3d {inputs}->{outputs}, 4x{height}x{width}"
        flops = 2.0 * 27 * inputs * outputs * 4 * height * width
        make = partial(torch.randn, dtype=subject.dtype, device=subject.device)
        frames, kernel = make(1, inputs, 6, height, width), make(outputs, inputs, 3, 3, 3)
        for layout, form in (
            ("NCDHW", torch.contiguous_format),
            ("NDHWC", torch.channels_last_3d),
        ):
            run = partial(
                F.conv3d,
                frames.contiguous(memory_format=form),
                kernel.contiguous(memory_format=form),
                padding=(0, 1, 1),
            )
            yield _row(case, layout, run, flops, subject, protocol)
