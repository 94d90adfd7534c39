"""Text that a dry run of a training prints below the settings, as comments of the same YAML."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from swifti2v.units import format_bytes

if TYPE_CHECKING:
    from swifti2v.training.costs.plan import SamplePlan, TrainingPlan

LEFT_OUT = "blocks that FSDP gathers, kernels' workspace, what the allocator wastes"


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
        yield from _to_sample(sample, plan.run.batch_size)
    unknown = " (activations are not predicted)" if plan.size is None else ""
    yield f"  memory a rank, predicted{unknown}:"
    fitting = [number for number in num_ranks if plan.fits(number)]
    for number in fitting:
        yield f"    {_to_memory(plan, number)}"
    if plan.frozen_bytes:
        parts = ", ".join(
            f"{role} {format_bytes(size)}" for role, size in plan.frozen_bytes.items()
        )
        yield f"  beside it on each GPU, in bfloat16: {parts}"
    if plan.feeds:
        yield from _to_machine(plan, fitting)
    yield f"  left out: {LEFT_OUT}"


def _to_sample(sample: "SamplePlan", count: int) -> Iterator[str]:
    facts = [f"{count} samples a step"]
    if sample.tokens:
        facts.append(f"{sample.tokens:,} tokens each, {count * sample.tokens:,} tokens a step")
    feed = sample.feed
    if sample.flops:
        encoding = 0 if feed is None else feed.encode_flops
        own = f" ({_flops(count * encoding)} of them encoding)" if encoding else ""
        facts.append(f"{_flops(count * (sample.flops + encoding))} a step{own}")
    yield f"  phase {sample.phase}, at most {sample.what}: {', '.join(facts)}"
    if feed is None:
        return
    steps = sample.num_steps
    if feed.mean_frames:
        seconds = count * feed.cpu_seconds
        run = "" if steps is None else f", {steps * seconds / 3600:,.0f} hours in all"
        yield (
            f"    reading, of one core (H.264 of {feed.bucket.width}x{feed.bucket.height}; larger clips "
            f"take more): {feed.mean_frames:.0f} frames a sample on average, {seconds:,.0f} s a "
            f"step{run}"
        )
    run = (
        ""
        if steps is None
        else f", at most {format_bytes(steps * count * feed.entry_bytes)} in all"
    )
    verb = "would take" if feed.mean_frames else "take"
    yield f"    latents in a cache {verb} {format_bytes(feed.entry_bytes)} a sample{run}"


def _to_machine(plan: "TrainingPlan", num_ranks: Sequence[int]) -> Iterator[str]:
    yield "  GPU with the parts beside it, and host memory, a rank:"
    for number in num_ranks:
        host = plan.predict_host(number)
        yield (
            f"    {_count_ranks(number)}: GPU {format_bytes(plan.predict_device(number))}; host "
            f"{format_bytes(host.total)} (loading {format_bytes(host.loading)}; then processes "
            f"{format_bytes(host.processes)}, samples {format_bytes(host.samples)}, checkpoint "
            f"{format_bytes(host.checkpoint)})"
        )
    size, kept = plan.checkpoint_bytes, plan.run.num_checkpoints + 1
    yield f"  disk: a checkpoint {format_bytes(size)}, {format_bytes(kept * size)} while one is written"


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
    return f"{_count_ranks(num_ranks)}: {format_bytes(memory.total)} ({listed})"


def _count_ranks(number: int) -> str:
    return f"{number} {'rank' if number == 1 else 'ranks'}"


def _flops(flops: float) -> str:
    return f"{flops / 1e15:.1f} PFLOP" if flops >= 1e15 else f"{flops / 1e12:.3g} TFLOP"
