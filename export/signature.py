"""Whose an artefact is: a signature over its manifest, which names every file by digest. By OpenSSF's `model-signing`, with a key.

A manifest shows that an artefact is whole; whoever can change a file can change that too. A signature can be made by the owner of the
private key alone, and is checked with the public one, which has to come from elsewhere than the artefact.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from export.grid import replacing
from export.runtime.manifest import AGAIN, NAME, SIGNATURE, ArtefactError
from tc_lightning.errors import TokenCacheError, first_line

_MAKE = (
    "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one, and `openssl ec -in key.pem -pubout -out key.pub` its "
    "public half."
)


def require_private_key(key: Path) -> None:
    """Check a key before there is anything to sign.

    Raises:
        TokenCacheError: if it is no private key on an elliptic curve in PEM, or cannot be used without a password.
    """
    _signer(key)


def sign_manifest(folder: Path, key: Path) -> str:
    """Sign the manifest of an artefact, `manifest.json.sig` beside it, and say by which public key that can be checked.

    Args:
        folder: the artefact's.
        key: file of the private key.

    Returns:
        The public key's fingerprint (`fingerprint_of`).

    Raises:
        TokenCacheError: if the key cannot be used.
    """
    signer = _signer(key)
    with replacing(folder / SIGNATURE) as temporary:
        signer.sign((folder / NAME).resolve(), temporary)
    return _signed_by(folder / SIGNATURE)


def verify_signature(folder: Path, key: Path) -> str:
    """Check that the owner of a key signed the manifest of an artefact as it is.

    Args:
        folder: the artefact's; that its files are those of the manifest is the runtime's to check.
        key: file of the public key.

    Returns:
        The key's fingerprint.

    Raises:
        ArtefactError: if there is no signature, it is another's, forged or damaged, or the manifest has changed since.
        TokenCacheError: if the key cannot be used.
    """
    own, path = fingerprint_of(key), folder / SIGNATURE
    if not (folder / NAME).is_file():
        raise ArtefactError(f"the artefact {folder} does not exist, or holds no {NAME}. {AGAIN}")
    if not path.is_file():
        raise ArtefactError(
            f"the artefact {folder} is not signed: it has no {SIGNATURE}. `python export/to_onnx.py --sign KEY` signs one."
        )
    if (other := _signed_by(path)) != own:
        raise ArtefactError(
            f"the artefact {folder} was signed by another: by the key {other}, and {key} is {own}. Do not use it, unless you know "
            "that key."
        )
    library = _library()
    try:
        library.verifying.Config().use_elliptic_key_verifier(public_key=key).verify((folder / NAME).resolve(), path)
    except Exception as error:
        if str(error).startswith("Signature mismatch"):
            raise ArtefactError(
                f"{folder / NAME} was changed after it was signed: it is not what the owner of the key {own} has signed. Do not use it."
            ) from error
        raise ArtefactError(
            f"{path} is forged or damaged: the owner of the key {own} has not signed this ({first_line(error)}). Do not use it."
        ) from error
    return own


def fingerprint_of(key: Path) -> str:
    """sha256 of a public key in PEM: what `sha256sum key.pub` says of a file that openssl wrote.

    Raises:
        TokenCacheError: if the file holds no public key on an elliptic curve.
    """
    _library()
    from cryptography.hazmat.primitives import serialization

    try:
        public = serialization.load_pem_public_key(key.read_bytes())
        _library().verifying.Config().use_elliptic_key_verifier(public_key=key)  # which curves it takes, it knows itself
    except Exception as error:
        raise TokenCacheError(
            f"{key} is no public key that can be used ({first_line(error)}): a file in PEM was expected, of a key on the curve P-256, "
            f"P-384 or P-521. {_MAKE}"
        ) from error
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(public.public_bytes(serialization.Encoding.PEM, form)).hexdigest()


def _signed_by(path: Path) -> str:
    """Fingerprint of the key that a signature says it is by."""
    try:
        hint = json.loads(path.read_text(encoding="utf-8"))["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path} is damaged: it does not say by which key it is. {AGAIN}") from error
    if not isinstance(hint, str) or not hint.isalnum():
        raise ArtefactError(f"{path} is damaged: it does not say by which key it is. {AGAIN}")
    return hint


def _signer(key: Path) -> Any:
    library = _library()
    try:
        return library.signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:
        raise TokenCacheError(
            f"{key} is no private key that can be used ({first_line(error)}): a file in PEM was expected, without a password, of a "
            f"key on the curve P-256, P-384 or P-521. {_MAKE}"
        ) from error


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise TokenCacheError(f"signatures need model-signing ({first_line(error)}): `pip install -e '.[sign]'`.") from error
    return model_signing
