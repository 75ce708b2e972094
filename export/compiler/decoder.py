"""decoder.onnx: the decoder half of a pipeline's VAE, written by torch's own exporter, with a proof of its own.

diffusers is needed here, and nowhere at run time. The graph takes latents as the VAE has them; scaling and shift are the runtime's
work, with the factors in the manifest.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from export.compiler.parity import ParityError, relative_l2
from export.compiler.static_graph import for_any_batch, live_bytes
from export.runtime.decoder import unscaled
from export.runtime.decoder_contract import DATA, IN, OUT
from export.runtime.layout import DECODER
from export.runtime.sessions import open_session, prepare, session_options
from tc_lightning.errors import TeacherError, TokenCacheError, first_line
from tc_lightning.models.checkpoints.diffusers_config import CONFIG, read_config
from tc_lightning.models.checkpoints.diffusers_weights import choose_weights, read_weights
from tc_lightning.models.checkpoints.pipeline import Vae
from tc_lightning.models.checkpoints.state import State, to_state
from tc_lightning.plan.signature import LATENTS, ModelSignature

OPSET = 20  # the last that the exporter writes
TOLERANCE = 1e-4  # relative L2 against torch, of the worst image
SEED, MANY_VALUES = 20240924, 1 << 15  # of the proof's latents; an image of more values is proved alone, and takes long enough
_KEPT = ("decoder.", "post_quant_conv.")
_OLDER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def require_decodable(vae: Vae, model: ModelSignature) -> None:
    """Check that a VAE is one of the model's latents.

    Raises:
        TeacherError: if it has other channels, or the model makes pixels.
    """
    if model.output != LATENTS:
        raise TeacherError(f"the model makes {model.output}, and needs no VAE: leave out {vae.folder} (--vae).")
    vae.require_channels(model.in_channels)


class VaeDecoder(nn.Module):
    """Latents [B, C, h, w] as the VAE has them -> pixels [B, 3, H, W], about [-1, 1].

    Args:
        first: a convolution before the decoder; None where there is none.
        decoder: the decoder.
    """

    def __init__(self, first: nn.Module | None, decoder: nn.Module) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = first, decoder

    def forward(self, z_BChw: Tensor) -> Tensor:
        """See the class."""
        return self.decoder(z_BChw if self.post_quant_conv is None else self.post_quant_conv(z_BChw))


def read_decoder(vae: Vae) -> VaeDecoder:
    """The decoder of a VAE's folder in torch, fp32, on the CPU; the encoder's weights are left alone.

    Raises:
        TokenCacheError: if diffusers is not installed.
        TeacherError: if the folder's weights are damaged or do not fit its configuration.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise TokenCacheError(
            f"the VAE in {vae.folder} is read with diffusers, which cannot be imported ({first_line(error)}): "
            "`pip install -e '.[pixels]'`, or export without pixels (--no-pixels)."
        ) from error
    config = {key: value for key, value in read_config(vae.folder / CONFIG).items() if not key.startswith("_")}
    try:
        with torch.device("meta"):
            whole: Any = AutoencoderKL(**config)
    except Exception as error:  # whatever a configuration makes it say
        raise TeacherError(f"{vae.folder / CONFIG} describes no AutoencoderKL: {first_line(error)}") from error
    module = VaeDecoder(whole.post_quant_conv, whole.decoder)
    file = choose_weights(vae.folder).file
    raw = {name: value for name, value in read_weights(file).items() if name.startswith(_KEPT)}
    state = _renamed(to_state(raw, file))
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise TeacherError(f"{file} does not fit its {CONFIG}: {' '.join(str(error).split())[:300]}") from error
    return module.eval().requires_grad_(False)


def write_decoder(vae: Vae, latent: tuple[int, int, int], folder: Path, provider: str) -> dict[str, Any]:
    """Write decoder.onnx and its weights, prove them, and return what the manifest says of them.

    Args:
        vae: where the decoder is, and its factors.
        latent: C, H, W of the model's latents.
        folder: of the artefact.
        provider: `cpu` or `cuda`, where the proof runs.

    Raises:
        TeacherError: if it cannot be read.
        ParityError: if the graph disagrees with torch.
        RuntimeUnavailableError: if the provider cannot be used.
    """
    module = read_decoder(vae)
    graph = for_any_batch(_traced(module, latent))
    onnx.save(graph, str(folder / f"{DECODER}.onnx"), save_as_external_data=True, location=DATA, size_threshold=1024)
    onnx.checker.check_model(str(folder / f"{DECODER}.onnx"))
    made = graph.graph.output[0].type.tensor_type.shape.dim
    said = {
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor,
        "pixels": [d.dim_value for d in made[1:]],
        "memory_bytes_per_image": live_bytes(graph),
    }
    return said | {"parity": _prove(module, said, latent, folder, provider)}


def open_decoder(folder: Path, provider: str) -> ort.InferenceSession:
    """A session of the decoder in a folder, as the runtime has it.

    Raises:
        RuntimeUnavailableError: if the provider cannot be used.
    """
    prepare(provider, None)
    return open_session(folder / f"{DECODER}.onnx", provider, session_options(provider, None, packed=True, profile=None))


def _renamed(state: State) -> State:
    """Names of attention as they are today; older files hold its matrices as convolutions of one pixel."""
    renamed: State = {}
    for name, tensor in state.items():
        for old, new in _OLDER.items():
            name = name.replace(old, new) if ".attentions." in name else name
        renamed[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
    return renamed


def _traced(module: nn.Module, latent: tuple[int, int, int]) -> onnx.ModelProto:
    """The graph at one image."""
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="tc-decoder-") as workshop:
        warnings.simplefilter("ignore")  # of what a trace takes for constant, which here is constant
        path = Path(workshop) / "traced.onnx"
        given = (torch.zeros(1, *latent),)
        torch.onnx.export(module, given, path, dynamo=False, opset_version=OPSET, input_names=[IN], output_names=[OUT])
        return onnx.load(path)


def _prove(module: nn.Module, said: dict[str, Any], latent: tuple[int, int, int], folder: Path, provider: str) -> dict[str, Any]:
    """Compare with torch on latents such as the model makes: of unit variance before they are scaled."""
    images = 1 if np.prod(latent) > MANY_VALUES else 2
    z = unscaled(said, np.random.default_rng(SEED).standard_normal((images, *latent), dtype=np.float32))
    session = open_decoder(folder, provider)
    with torch.no_grad():
        expected = module(torch.from_numpy(z)).numpy()
    actual = session.run([OUT], {IN: z})[0]
    worst = max(relative_l2(a, b) for a, b in zip(actual, expected, strict=True))
    if not worst <= TOLERANCE:
        raise ParityError(
            f"the decoder disagrees with the VAE in torch: relative L2 {worst:.2e}, above {TOLERANCE:g}. No manifest was written: "
            "report it with the VAE's config.json, or export without pixels (--no-pixels)."
        )
    return {"rel_l2": worst, "max_abs": float(np.abs(actual - expected).max()), "images": images, "provider": provider}
