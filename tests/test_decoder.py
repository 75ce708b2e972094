"""decoder.onnx as it is written: the VAE's decoder, and the memory that is stated of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from pipelines import SD3_FACTORS, vae
from safetensors.torch import load_file, save_file

from export.compiler.decoder import read_decoder, write_decoder
from export.compiler.static_graph import live_bytes
from export.runtime.decoder import unscaled
from tc_lightning.models.checkpoints.pipeline import read_vae

SHAPES = {"Shape", "Gather", "Slice", "Concat", "Range", "Expand", "Squeeze", "Unsqueeze"}


@pytest.mark.parametrize(
    ("channels", "changes"),
    [
        (4, {}),
        (16, SD3_FACTORS),
        (16, SD3_FACTORS | {"mid_block_add_attention": False, "shift_factor": -0.5}),
        (4, {"block_out_channels": (8, 16, 16), "down_block_types": ("DownEncoderBlock2D",) * 3, "norm_num_groups": 2}),
    ],
)
def test_decoder_is_the_vae(tmp_path, channels, changes):
    """By the pipelines' own words: latents / scaling_factor + shift_factor, decoded; and no node computes a shape."""
    if len(changes.get("block_out_channels", ())) == 3:
        changes = changes | {"up_block_types": ("UpDecoderBlock2D",) * 3}
    theirs = vae(channels, **changes)
    theirs.save_pretrained(tmp_path / "vae")
    said = write_decoder(read_vae(tmp_path / "vae"), (channels, 8, 8), tmp_path, "cpu")
    assert said["parity"]["rel_l2"] < 1e-5
    latents = torch.randn(3, channels, 8, 8)
    with torch.no_grad():
        expected = theirs.decode(latents / theirs.config.scaling_factor + (theirs.config.shift_factor or 0.0)).sample.numpy()
    graph = onnx.load(tmp_path / "decoder.onnx")
    assert not SHAPES & set(Counter(node.op_type for node in graph.graph.node))
    assert said["pixels"] == list(expected.shape[1:])
    import onnxruntime as ort

    session = ort.InferenceSession(tmp_path / "decoder.onnx")
    made = session.run(None, {"latents": unscaled(said, latents.numpy())})[0]
    np.testing.assert_allclose(made, expected, atol=1e-5)


def test_older_names_of_attention(tmp_path):
    vae().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    older = {}
    for name, tensor in load_file(file).items():
        for new, old in names.items():
            name = name.replace(new, old)
        older[name] = tensor[..., None, None].contiguous() if ".query.weight" in name else tensor
    before = read_decoder(read_vae(tmp_path)).state_dict()
    save_file(older, file)
    after = read_decoder(read_vae(tmp_path)).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_memory_by_hand():
    """x [1, 2] -> a = x + w -> b, another view of a -> c = b * b -> y = c + a: a and c, and y, are held at once."""
    w = numpy_helper.from_array(np.zeros((1, 2), np.float32), "w")
    shape = numpy_helper.from_array(np.array([0, 1, 2]), "s")
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("Reshape", ["a", "s"], ["b"]),
        helper.make_node("Mul", ["b", "b"], ["c"]),
        helper.make_node("Add", ["c", "b"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value("x", 1, ["images", 2])], [value("y", 1, ["images", 1, 2])], [w, shape])
    assert live_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])) == 3 * 2 * 4
