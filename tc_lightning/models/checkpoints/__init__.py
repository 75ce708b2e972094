"""Reading and writing teachers: the original release's `.pt`, `.safetensors`, and diffusers' `DiTTransformer2DModel` folders.

Nothing in a checkpoint is executed, nothing is guessed: every key, shape and value is checked, and a model comes out or a
`TeacherError`. One reader a format; diffusers itself is not needed.
"""

from tc_lightning.models.checkpoints.digest import config_json, teacher_digest
from tc_lightning.models.checkpoints.load import load_teacher
from tc_lightning.models.checkpoints.save import save_teacher
from tc_lightning.models.checkpoints.spec import ROOT, TeacherSpec

__all__ = ["ROOT", "TeacherSpec", "config_json", "load_teacher", "save_teacher", "teacher_digest"]
