"""Training of either stage on manifests of clips, from a loaded model to weights on disk."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from swifti2v.config import to_dict
from swifti2v.errors import InputError
from swifti2v.models.lora.provenance import hash_base, save_trained_lora
from swifti2v.training.adapters import adapter_state_dict, add_adapter
from swifti2v.training.cache.prompt_embeddings import REMEDY, CachedPrompts, embed_prompts
from swifti2v.training.costs.feeding import FeedWishes
from swifti2v.training.costs.plan import EmptyStage, TrainingPlan
from swifti2v.training.data.phases import find_clips
from swifti2v.training.data.record import require_same_clips
from swifti2v.training.engine.ranks import gather_weights
from swifti2v.training.engine.session import Session, save_trained, train_task
from swifti2v.training.engine.task import Task
from swifti2v.training.stages.batches import EncodePrompts
from swifti2v.training.stages.config import Stage1FineTuning, Stage2FineTuning
from swifti2v.training.stages.loading import load_for_training
from swifti2v.training.stages.recipes import Recipe, find_recipe


class FineTuning:
    """One training run of a stage.

    Raises:
        InputError: The cache is not there, or lacks prompts.
    """

    def __init__(self, config: Stage1FineTuning | Stage2FineTuning, session: Session) -> None:
        self.config, self.session, self.recipe = config, session, find_recipe(config)
        recipe, device = self.recipe, session.ranks.device
        own = f"{recipe.stage}_transformer"
        self.pipe = load_for_training(
            config.model,
            config.generation,
            recipe.stage,
            (own, *_frozen(recipe, config)),
            device,
            merges_own_loras=recipe.merges_own_loras,
        )
        cache = None if config.cache is None else Path(config.cache.directory)
        if cache is not None and not cache.is_dir():
            raise InputError(f"cache.directory {cache} does not exist; {REMEDY}")
        directory = cache or session.directory
        self.clips = find_clips(
            config.phases, config.num_procedural_clips, config.run, directory, session.ranks
        )
        encode_prompts: EncodePrompts = partial(embed_prompts, self.pipe.components)
        latents = None
        if config.cache is not None:
            encode_prompts = self._read_prompts(directory)
            if config.cache.latents:
                latents = recipe.open_latents(config, self.pipe, directory)
        self.transformer: nn.Module = getattr(self.pipe.components, own)
        if config.adapter is None:
            self.transformer.float().requires_grad_(True)
        else:
            self.base_hash = hash_base(self.transformer)
            add_adapter(self.transformer, config.adapter)
        sources = tuple(recipe.make_source(config, self.pipe, own, latents) for own in self.clips)
        self.task: Task[Any] = recipe.make_task(
            config, self.pipe, sources, encode_prompts, self._validate
        )

    def train(self) -> Path:
        """Train, then write the averaged weights.

        Returns:
            What was written: a transformer's directory, or a LoRA's file.

        Raises:
            InputError: The clips are not those that the run was begun on.
        """
        config, session = self.config, self.session
        require_same_clips(self.clips, session)
        train_task(self.task, config.run, config.phases, session)
        if config.adapter is None:
            return save_trained(self.recipe.kind, self.transformer, "transformer", session)
        path = session.directory / "lora.safetensors"
        state = gather_weights(adapter_state_dict(self.transformer))
        if session.ranks.is_first:
            save_trained_lora(
                state,
                path,
                alpha=config.adapter.resolved_alpha,
                base=config.model,
                base_hash=self.base_hash,
                settings=to_dict(config),
            )
        return path

    def _read_prompts(self, directory: Path) -> EncodePrompts:
        """Take all prompts from a cache, and free the text encoder's memory."""
        parts = self.pipe.components
        prompts = CachedPrompts(directory, parts)
        prompts.require_all(prompt for clips in self.clips for prompt in clips.prompts)
        nn.Module.to(parts.text_encoder, "meta")
        self.pipe.encoder.cache = prompts
        return lambda texts: prompts(texts).to(parts.device)

    def _validate(self, directory: Path) -> Mapping[str, float]:
        own = self.config.validation
        clips = self.clips[0].examples(own.num_clips)
        return self.recipe.validate(self.pipe, clips, directory, own.seed)


def fine_tune(config: Stage1FineTuning | Stage2FineTuning, session: Session) -> Path:
    """Train a stage of a model that is there; see ``FineTuning.train``."""
    return FineTuning(config, session).train()


def plan_stage(config: Stage1FineTuning | Stage2FineTuning) -> TrainingPlan:
    """Predict the training of a stage from the configurations of its components.

    Raises:
        LoadingError: A component's configuration is not on this machine, not known and cannot be
            downloaded.
        ShapeError: A bucket does not fit the model.
    """
    recipe = find_recipe(config)
    stage = EmptyStage(config.model, recipe.stage, _frozen(recipe, config))
    wishes = FeedWishes(
        crop=config.crop,
        windows=config.windows,
        pixel_bytes=recipe.pixel_bytes,
        reads_latents=config.cache is not None and config.cache.latents,
    )
    return stage.plan(recipe.stage, config.run, config.phases, config.adapter, wishes)


def _frozen(recipe: Recipe, config: Stage1FineTuning | Stage2FineTuning) -> tuple[str, ...]:
    """Components that are run beside the transformer: with a cache not the text encoder."""
    return tuple(r for r in recipe.frozen if config.cache is None or r != "text_encoder")
