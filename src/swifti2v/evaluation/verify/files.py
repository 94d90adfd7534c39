"""Checks of files: present and whole, every key there, LoRAs that fit, parts that belong together."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from swifti2v.errors import LoadingError
from swifti2v.evaluation.verify.findings import Finding, SkippedError, judge
from swifti2v.models.loading.availability import download_commands, find_missing
from swifti2v.models.loading.components import outline_component
from swifti2v.models.loading.sources import ComponentSource, LoraSource, ModelIndex

STAGES = ("stage1", "stage2")


def require_here(index: ModelIndex, root: Path, role: str) -> None:
    """Refuse a component that would have to be downloaded first.

    Raises:
        LoadingError: With the commands that download it, or the path that does not exist.
    """
    if missing := find_missing(index, root, [role]):
        commands = "; ".join(download_commands(missing))
        raise LoadingError(f"{role} is missing on this machine; get it with: {commands}")


class Outlines:
    """Components without memory, whose files were looked through; each is made once.

    Args:
        index: The model.
        root: Folder from which its relative paths start.
        dtype: Number type of the weights.
    """

    def __init__(self, index: ModelIndex, root: Path, dtype: torch.dtype) -> None:
        self.index, self.root, self._dtype = index, root, dtype
        self._made: dict[str, Any] = {}

    def make(self, role: str) -> Any:
        """A component without its LoRAs.

        Raises:
            LoadingError: A file is missing or damaged.
        """
        if role not in self._made:
            bare = _without_loras(self.index.components[role])
            only = replace(self.index, components={**self.index.components, role: bare})
            require_here(only, self.root, role)
            self._made[role], _ = outline_component(role, bare, self.root, self._dtype)
        return self._made[role]

    def need(self, *roles: str) -> None:
        """Go on only if the files of some components are whole.

        Raises:
            SkippedError: Naming those that are not.
        """
        if broken := [role for role in roles if role not in self._made]:
            raise SkippedError(f"needs {', '.join(broken)}, whose files are not whole")


def _without_loras(source: ComponentSource) -> ComponentSource:
    return replace(source, loras=())


def check_files(outlines: Outlines, role: str) -> Finding:
    """Whether the files of a component are there and whole, with every key in its shape."""
    model = outlines.make(role)
    values = {}
    if isinstance(model, torch.nn.Module):
        state = model.state_dict()
        values = {"keys": len(state), "weights": sum(tensor.numel() for tensor in state.values())}
    return judge(f"files of {role}", values, "every key of the architecture, in its shape", {})


def check_lora(outlines: Outlines, role: str, lora: LoraSource) -> Finding:
    """Count the keys of a LoRA that the component takes."""
    name, expected = f"LoRA {Path(lora.path).name} on {role}", "every key fits"
    outlines.need(role)
    bare = replace(outlines.index.components[role], loras=(replace(lora, allow_partial=True),))
    only = replace(outlines.index, components={**outlines.index.components, role: bare})
    require_here(only, outlines.root, role)
    try:
        _, (report,) = outline_component(role, bare, outlines.root, torch.float32)
    except LoadingError as error:
        if "keys match" not in str(error):
            raise
        matched = str(error).partition("): ")[2] if "): " in str(error) else str(error)
        counts = matched.partition(" keys match")[0].split()
        keys = {"keys": int(counts[-1])} if counts[-1].isdigit() else {}
        values: dict[str, Any] = {"matched": 0, **keys}
        cause = f"wrong LoRA: none of its keys fits, it is made for another model than {role}"
        return judge(name, values, expected, {cause: True})
    values = {"matched": report.applied, "keys": report.total, "format": report.format}
    cause = f"wrong LoRA: {report.total - report.applied} of its {report.total} keys have no place in {role}"
    return judge(name, values, expected, {cause: report.applied < report.total})


def check_match(outlines: Outlines, motion: str, extra: Mapping[str, int]) -> Finding:
    """Whether VAEs and transformers belong together, by the channels of their latents.

    Args:
        outlines: The components.
        motion: See ``Stage1Config.motion``.
        extra: Channels of Stage I's output besides the latents, by motion.
    """
    roles = [f"{stage}_{part}" for stage in STAGES for part in ("transformer", "vae")]
    outlines.need(*roles)
    parts = {role: outlines.make(role).config for role in roles}
    needed = {
        "stage1": parts["stage1_transformer"]["out_channels"] - extra[motion],
        "stage2": parts["stage2_transformer"]["out_channels"],
    }
    given = {stage: parts[f"{stage}_vae"]["z_dim"] for stage in STAGES}
    values = {
        f"{stage} {part} channels": numbers[stage]
        for stage in STAGES
        for part, numbers in (("VAE", given), ("transformer", needed))
    }
    wrong = [stage for stage in STAGES if needed[stage] != given[stage]]
    swapped = [s for s in wrong if given[s] == needed["stage2" if s == "stage1" else "stage1"]]
    others = {"stage1": "Stage II's", "stage2": "Stage I's"}
    causes = {
        "swapped VAEs: each stage has the other's": len(swapped) == len(STAGES),
        **{
            f"swapped VAEs: {stage}_vae is {others[stage]}, whose latents have {given[stage]} channels; "
            f"{stage}_transformer takes {needed[stage]}": True
            for stage in swapped
        },
        f"{', '.join(f'{stage}_vae' for stage in wrong)} and transformer belong to different models": bool(
            wrong
        ),
    }
    return judge("parts belong together", values, "a VAE's latents are its transformer's", causes)
