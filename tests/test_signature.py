"""Whose an artefact is: signed by the owner of a key, and refused where it is not."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path

import pytest
from artefacts import rewrite_manifest
from test_commands import call, is_one_paragraph, make_run

from export.runtime.manifest import ArtefactError
from export.runtime.sampler import CachedSampler
from export.signature import SIGNATURE, fingerprint_of, require_private_key, sign_manifest, verify_signature
from tc_lightning.errors import TokenCacheError

pytest.importorskip("model_signing", reason="the extra [sign] is not installed")
serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")


def write_keys(folder: Path, name: str, curve: str = "SECP256R1", password: bytes | None = None) -> tuple[Path, Path]:
    """A private key and its public half."""
    key, pem = ec.generate_private_key(getattr(ec, curve)()), serialization.Encoding.PEM
    lock = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, lock))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def keys(tmp_path):
    return write_keys(tmp_path, "key")


@pytest.mark.parametrize("curve", ["SECP256R1", "SECP384R1", "SECP521R1"])
def test_a_signature_says_whose_it_is(copied, tmp_path, curve):
    private, public = write_keys(tmp_path, "key", curve)
    signed_by = sign_manifest(copied, private)
    assert signed_by == verify_signature(copied, public) == hashlib.sha256(public.read_bytes()).hexdigest()
    assert {path.name for path in copied.iterdir() if path.name.startswith((".", "manifest"))} == {"manifest.json", SIGNATURE}
    assert CachedSampler(copied).sample([0]).latents.shape == (1, 4, 8, 8)


def test_an_artefact_of_links_is_verified(copied, keys, tmp_path):
    """Hubs of models lay out files so."""
    sign_manifest(copied, keys[0])
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in copied.iterdir():
        (linked / path.name).symlink_to(path)
    assert verify_signature(linked, keys[1]) == fingerprint_of(keys[1])


def test_no_signature(copied, keys, tmp_path):
    with pytest.raises(ArtefactError, match=r"is not signed: it has no manifest\.json\.sig"):
        verify_signature(copied, keys[1])
    with pytest.raises(ArtefactError, match=r"does not exist, or holds no manifest\.json"):
        verify_signature(tmp_path / "nowhere", keys[1])


def test_a_changed_manifest(copied, keys):
    sign_manifest(copied, keys[0])
    rewrite_manifest(copied, plan_in_words="a better one")
    with pytest.raises(ArtefactError, match=r"manifest\.json was changed after it was signed"):
        verify_signature(copied, keys[1])


def test_the_signature_of_another(copied, keys, tmp_path):
    other, public = write_keys(tmp_path, "other")
    sign_manifest(copied, other)
    with pytest.raises(ArtefactError, match=rf"was signed by another: by the key {fingerprint_of(public)}, and .*key\.pub is"):
        verify_signature(copied, keys[1])
    text = (copied / SIGNATURE).read_text(encoding="utf-8")
    (copied / SIGNATURE).write_text(text.replace(fingerprint_of(public), fingerprint_of(keys[1])), encoding="utf-8")
    with pytest.raises(ArtefactError, match="is forged or damaged"):
        verify_signature(copied, keys[1])


def test_a_signature_of_what_was_not_signed(copied, keys):
    """A payload in which another manifest's digest is put, under the old signature."""
    sign_manifest(copied, keys[0])
    bundle = json.loads((copied / SIGNATURE).read_text(encoding="utf-8"))
    payload = base64.b64decode(bundle["dsseEnvelope"]["payload"])
    digest = hashlib.sha256((copied / "manifest.json").read_bytes()).hexdigest().encode()
    assert digest in payload
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(payload.replace(digest, b"0" * 64)).decode()
    (copied / SIGNATURE).write_text(json.dumps(bundle), encoding="utf-8")
    with pytest.raises(ArtefactError, match="is forged or damaged"):
        verify_signature(copied, keys[1])


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"verificationMaterial": {"publicKey": {"hint": 3}}}', '{"verificationMaterial": 1}']
)
def test_a_damaged_signature(copied, keys, text):
    (copied / SIGNATURE).write_text(text, encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"manifest\.json\.sig is damaged: it does not say by which key it is"):
        verify_signature(copied, keys[1])


def test_a_signature_cut_short(copied, keys):
    sign_manifest(copied, keys[0])
    bundle = json.loads((copied / SIGNATURE).read_text(encoding="utf-8"))
    del bundle["dsseEnvelope"]
    (copied / SIGNATURE).write_text(json.dumps(bundle), encoding="utf-8")
    with pytest.raises(ArtefactError, match="is forged or damaged"):
        verify_signature(copied, keys[1])


def test_keys_that_cannot_be_used(copied, keys, tmp_path):
    locked, _ = write_keys(tmp_path, "locked", password=b"secret")
    unusual, unusual_public = write_keys(tmp_path, "unusual", "SECP256K1")
    (tmp_path / "text.pem").write_text("no key", encoding="utf-8")
    for path in (locked, unusual, keys[1], tmp_path / "text.pem", tmp_path / "none.pem", tmp_path):
        with pytest.raises(TokenCacheError, match=r"is no private key that can be used .* without a password"):
            require_private_key(path)
    for path in (unusual_public, keys[0], tmp_path / "text.pem", tmp_path / "none.pem", tmp_path):
        with pytest.raises(TokenCacheError, match="is no public key that can be used"):
            verify_signature(copied, path)
    assert not (copied / SIGNATURE).exists()


def test_commands(keys, tmp_path):
    make_run(tmp_path)
    is_one_paragraph(call(tmp_path, "to_onnx.py", "--images", 1, "--sign", keys[1]), "is no private key")
    assert not (tmp_path / "artefacts").exists()
    done = call(tmp_path, "to_onnx.py", "--images", 1, "--sign", keys[0])
    assert (done.returncode, f"by the owner of the key {fingerprint_of(keys[1])}" in done.stdout) == (0, True), done.stderr
    done = call(tmp_path, "verify.py", "artefacts/tiny", "--images", 1, "--json", "--signature", keys[1])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["signed_by"] == fingerprint_of(keys[1])
    shutil.copy(tmp_path / "artefacts" / "tiny" / "plan.json", tmp_path / "artefacts" / "tiny" / SIGNATURE)
    is_one_paragraph(call(tmp_path, "verify.py", "artefacts/tiny", "--images", 1, "--signature", keys[1]), SIGNATURE, "is damaged")
