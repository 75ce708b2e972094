"""What a `config.json` of diffusers says, and what a reader makes of it: every field is understood, or refused by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tc_lightning.errors import TeacherError
from tc_lightning.models.checkpoints.state import fits, parse_json
from tc_lightning.models.network import Network

CONFIG, CLASS = "config.json", "_class_name"


class ReadNetwork(NamedTuple):
    """A frozen network in eval mode, fp32, on the CPU, and what was chosen, stripped or left out on the way, in words."""

    model: Network
    notes: list[str]


# Reads a transformer, given its folder, or the one of its weights files (or indices) that is meant, and what its config.json holds
# (`diffusers_weights.read_state` takes either). It raises a TeacherError if something is missing, damaged or contradictory, or the
# configuration is none that our network can have.
Reader = Callable[[Path, dict[str, Any]], ReadNetwork]


@dataclasses.dataclass(frozen=True)
class ConfigFields:
    """The fields of a class's configuration.

    Args:
        read: those that are read, and diffusers' defaults for them; values have the defaults' types.
        fixed: those that have to be as they are here, or absent.
        free: those whose value does not matter, or is looked at elsewhere.
        model: what it is a configuration of, for messages.
    """

    read: Mapping[str, Any]
    fixed: Mapping[str, Any]
    free: Sequence[str]
    model: str

    def of(self, raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """The values of `read`.

        Args:
            raw: what the file holds; names that begin with an underscore are diffusers' own notes.
            path: the file, for messages.

        Raises:
            TeacherError: naming a field that is not known, is not as it has to be, or is of another type.
        """
        for key, value in self.fixed.items():
            if raw.get(key, value) != value:
                raise TeacherError(f"{path}: {key} is {raw[key]!r}; of a {self.model}, {value!r} alone is supported.")
        known = {*self.read, *self.fixed, *self.free}
        if unknown := [f"{key} ({value!r})" for key, value in raw.items() if key not in known and not key.startswith("_")]:
            raise TeacherError(
                f"{path}: this version does not know what {', '.join(unknown)} means for a {self.model}, and does not guess: "
                "remove it if it says nothing, or update tc-lightning."
            )
        values = {key: raw.get(key, default) for key, default in self.read.items()}
        for key, value in values.items():
            if not fits(value, self.read[key]):
                expected = {bool: "true or false", str: "a word"}.get(type(self.read[key]), "a number")
                raise TeacherError(f"{path}: {key} is {value!r}; {expected} was expected.")
        return values


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file of diffusers.

    Raises:
        TeacherError: if it cannot be read, or is no JSON object.
    """
    try:
        return parse_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise TeacherError(f"{path} cannot be read ({error}).") from error
