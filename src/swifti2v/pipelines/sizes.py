"""Sizes that both stages can hold."""

import math

from swifti2v.config import GenerationConfig
from swifti2v.shapes import ScaleFactors


def side_multiple(
    stage1: ScaleFactors | None, stage2: ScaleFactors, config: GenerationConfig
) -> int:
    """Pixels that height and width must be multiples of, see ``SwiftI2VPipeline.require_fit``.

    Args:
        stage1: Scale factors of Stage I; None where it does not run.
        stage2: Scale factors of Stage II.
        config: Settings.
    """
    attention = config.stage2.attention
    pool = (attention.pool or 1) if attention.kind == "gclf" else 1
    return math.lcm(stage2.side * pool, stage1.side * config.stage1.downscale if stage1 else 1)
