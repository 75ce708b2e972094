"""The command: `lightning fit|validate|test -c config.yaml`, alias `tc-lightning` and `python -m tc_lightning`.

Besides Lightning's sub-commands there are those of `COMMANDS`, each with its own `--help`. Subclass mode of LightningCLI: a config
names its LightningModule and its data module by class path. Every checkpoint is written atomically, and `--ckpt_path last` goes on
from the newest checkpoint of the same name that loads.
"""

from __future__ import annotations

import errno
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from tc_lightning.errors import TokenCacheError
from tc_lightning.learn.checkpointing import newest_valid_checkpoint

# Sub-commands beside Lightning's: the function that takes their arguments, imported when it is asked for.
COMMANDS = {
    "plan": "export.plan:main",
    "report": "export.report.command:main",
    "ablate": "tc_lightning.runs.ablation.ablate:main",
    "import-router": "tc_lightning.runs.import_router:main",
}


_PATHS = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)  # something is where a file or folder of another kind has to be


class TokenCacheCLI(LightningCLI):
    """LightningCLI with resuming that looks for the newest valid checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Nothing is linked: a link's target set in YAML would be ignored without a word."""

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone: Lightning would let values stored in the checkpoint override YAML and flags."""

    def before_instantiate_classes(self) -> None:
        """Resolve `--ckpt_path last`."""
        config = self.config.get(self.config.get("subcommand") or "", {})
        if config.get("ckpt_path") != "last":
            return
        folders = _checkpoint_folders(config)
        config["ckpt_path"] = str(found) if (found := newest_valid_checkpoint(*folders)) else None
        nowhere = f"no checkpoint under {' or '.join(map(str, folders))} to resume from: starting afresh"
        print(f"resuming from {found}" if found else nowhere)


def _checkpoint_folders(config: Any) -> list[Path]:
    """Where runs of this configuration keep their checkpoints, below these folders: as `ModelCheckpoint` chooses them."""
    callbacks = [entry.get("init_args", {}) for entry in config["trainer"].get("callbacks") or []]
    own = [Path(arguments["dirpath"]) for arguments in callbacks if arguments.get("dirpath")]
    return own or [_run_root(config["trainer"])]


def _run_root(trainer: Any) -> Path:
    """The first logger's folder; without a logger every run has the same one."""
    logger, root = trainer.get("logger"), Path(trainer.get("default_root_dir") or ".")
    if logger is False or logger == []:
        return root / "checkpoints"
    first = logger[0] if isinstance(logger, list) else logger
    if not hasattr(first, "get"):  # Lightning's default logger
        return root / "lightning_logs"
    arguments = first.get("init_args", {})
    return Path(arguments.get("save_dir") or root) / (arguments.get("name") or "")


def main(args: list[str] | None = None) -> None:
    """Run the command line; an error meant for the user is printed as one paragraph, and the exit status is 2."""
    given = sys.argv[1:] if args is None else args
    # Ours to choose, nothing for the user to act on: the data sets are in memory, or mapped.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    try:
        if given and given[0] in COMMANDS:
            _command(given[0])(given[1:])
        else:
            _lightning(args)
    except Exception as error:
        if (told := _user_error(error)) is None:
            raise
        print(f"error: {told}", file=sys.stderr)
        raise SystemExit(2) from error
    if torch.distributed.is_initialized():  # gloo's threads, left to the end of the process, can abort it
        torch.distributed.destroy_process_group()


def _lightning(args: list[str] | None) -> None:
    TokenCacheCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"epilog": f"Further sub-commands, each with its own --help: {', '.join(COMMANDS)}."},
        trainer_defaults={"plugins": [{"class_path": "tc_lightning.learn.checkpointing.AtomicCheckpointIO"}]},
        args=args,
    )


def _command(name: str) -> Callable[[list[str]], None]:
    module, _, function = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(module), function)


def _user_error(error: BaseException | None) -> str | None:
    """What to tell the user, from anywhere in a chain of exceptions: jsonargparse wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, TokenCacheError):
            return str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, *_PATHS):
            where = error.filename or "a file of the run"
            if error.errno in _PATHS:
                return f"{where}: {error.strerror}. Name another path, or move away what is there; nothing else was touched."
            return f"{where}: {error.strerror}. Free space, or set another folder in the config; what was recorded is kept."
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    main()
