"""Trains what is compared: the user's own configuration, once with version 1's predictor and once with version 2's.

Every training seed has trajectories, initial weights and order of batches of its own. A run that is finished is not made again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI

from tc_lightning.errors import RunError
from tc_lightning.runs.ablation.variants import Learned
from tc_lightning.runs.folder import ABLATION, NAME, read_run
from tc_lightning.runs.loaded import LoadedRun, load_run

VERSIONS = ("v1", "v2")


@dataclasses.dataclass(frozen=True)
class Training:
    """How predictors are trained, where it differs from the configuration.

    Args:
        configs: YAML files of a distillation with recorded trajectories, later ones over earlier ones.
        train_images: trajectories to learn from; None for as many as the configuration says.
        steps_v1: optimiser steps of version 1's predictor; None for those of the configuration.
        steps_v2: optimiser steps of version 2's; None for those of the configuration.
        lr_v2: learning rate of version 2's predictor.
    """

    configs: tuple[str, ...]
    train_images: int | None = None
    steps_v1: int | None = None
    steps_v2: int | None = None
    lr_v2: float = 1e-3

    @functools.cached_property
    def digest(self) -> str:
        """Names the settings, those of the YAML files included, as they are when it is first asked for.

        Raises:
            RunError: if a file cannot be read.
        """
        given = dataclasses.asdict(self) | {"configs": [_settings(path) for path in self.configs]}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()

    def overlay(self, folder: Path, version: str, seed: int) -> dict[str, Any]:
        """What is laid over the configuration to train one predictor: the planning that would follow is left out."""
        model: dict[str, Any] = {"train_tokens": True, "content": None, "router": None, "purpose": ABLATION}
        model["policy"] = {"class_path": "tc_lightning.policies.fora.FORAPolicy", "init_args": {"target_speedup": None}}
        if version == "v2":  # the sensitivities are taken from version 1's run
            model |= {"content": {}, "lr": self.lr_v2, "sensitivity_samples": 1, "sensitivity_probes": 1}
        steps = self.steps_v1 if version == "v1" else self.steps_v2
        images = {} if self.train_images is None else {"num_train": self.train_images}
        logger = {"save_dir": str(folder), "name": "", "version": version}
        trainer = {
            "limit_val_batches": 0,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "callbacks": [],
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": logger},
        }
        return {
            "seed_everything": seed,
            "model": {"init_args": model},
            "data": {"init_args": {"root": str(folder / "trajectories"), "num_val": 2, "seed": seed} | images},
            "trainer": trainer | ({} if steps is None else {"max_steps": steps}),
        }


def train(training: Training, folder: Path, seed: int) -> tuple[LoadedRun, Learned]:
    """Train what one seed is missing, and load it all.

    Args:
        training: how.
        folder: of this seed.
        seed: of trajectories, initial weights and batches.

    Raises:
        TokenCacheError: whatever is wrong with configuration, teacher or trajectories.
    """
    v1, v2 = (_run(training, folder, version, seed) for version in VERSIONS)
    if v2.companions.selector is None:
        raise RunError(f"{v2.run.folder} holds no content predictor: delete the folder, and it is trained again.")
    return v1, Learned(v1.scores, v2.scores, v2.companions.selector)


def _settings(path: str) -> Any:
    """What a YAML file says, whatever its comments."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"cannot read {path}: {error}. Name the YAML of a distillation with -c.") from error


def _run(training: Training, folder: Path, version: str, seed: int) -> LoadedRun:
    if not (folder / version / NAME).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        overlay = folder / f"{version}.yaml"
        overlay.write_text(yaml.safe_dump(training.overlay(folder, version, seed)), encoding="utf-8")
        _fit([*training.configs, str(overlay)])
    return load_run(read_run(folder / version))


def _fit(configs: Sequence[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*args. parameter is intended to run from within Python.*")
        warnings.filterwarnings("ignore", ".*Discarding init_args.*")
        cli = LightningCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            run=False,
            args=[part for path in configs for part in ("-c", path)],
        )
        cli.trainer.fit(cli.model, cli.datamodule)
