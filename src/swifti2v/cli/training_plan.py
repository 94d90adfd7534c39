"""Text that a dry run of a training prints below the settings, as comments of the same YAML."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from swifti2v.units import format_bytes

if TYPE_CHECKING:
    from swifti2v.training.costs.plan import TrainingPlan

LEFT_OUT = (
    "blocks that FSDP gathers, kernels' workspace, the VAE's activations, what the allocator wastes"
)


def to_comments(plans: "Sequence[TrainingPlan]", num_ranks: Sequence[int]) -> str:
    """Parameters, samples and memory of the parts; every line is a YAML comment.

    Numbers of ranks that a step's samples do not divide over are left out.
    """
    lines = [line for plan in plans for line in _to_lines(plan, num_ranks)]
    return "\n".join(f"# {line}" for line in lines)


def _to_lines(plan: "TrainingPlan", num_ranks: Sequence[int]) -> Iterator[str]:
    total, trained = plan.parameters
    yield f"{plan.part}: {total:,} parameters, {trained:,} trained"
    for sample in plan.samples:
        count = plan.run.batch_size
        facts = [f"{count} samples a step"]
        if sample.tokens:
            facts.append(f"{sample.tokens:,} tokens each, {count * sample.tokens:,} tokens a step")
        if sample.flops:
            facts.append(f"{_flops(count * sample.flops)} a step")
        yield f"  phase {sample.phase}, at most {sample.what}: {', '.join(facts)}"
    unknown = " (activations are not predicted)" if plan.size is None else ""
    yield f"  memory a rank, predicted{unknown}:"
    for number in num_ranks:
        if plan.fits(number):
            yield f"    {_to_memory(plan, number)}"
    if plan.frozen_bytes:
        parts = ", ".join(
            f"{role} {format_bytes(size)}" for role, size in plan.frozen_bytes.items()
        )
        yield f"  beside it on each GPU, in bfloat16: {parts}"
    yield f"  left out: {LEFT_OUT}"


def _to_memory(plan: "TrainingPlan", num_ranks: int) -> str:
    memory = plan.predict_memory(num_ranks)
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "average": memory.ema,
        **({} if plan.size is None else {"activations": memory.activations}),
    }
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    word = "rank" if num_ranks == 1 else "ranks"
    return f"{num_ranks} {word}: {format_bytes(memory.total)} ({listed})"


def _flops(flops: float) -> str:
    return f"{flops / 1e15:.1f} PFLOP" if flops >= 1e15 else f"{flops / 1e12:.3g} TFLOP"
