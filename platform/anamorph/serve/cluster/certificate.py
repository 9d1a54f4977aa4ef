"""A pod's own certificate for Ray's traffic: ``python -m anamorph.serve.cluster.certificate CA OUT``.

Ray's processes know each other by addresses and verify them (``RAY_USE_TLS``), so a certificate that
is made before the pod has its address is good for none. The authority that signs is for nothing
else: whoever runs code in the cluster may read its key.
"""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from anamorph.errors import AnamorphError, SetupError

# Clocks of nodes differ.
_SKEW = timedelta(minutes=5)
_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
_Public = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
_ALWAYS = ("localhost", "127.0.0.1")


def main(arguments: Sequence[str], environment: dict[str, str], now: datetime) -> None:
    """Sign a certificate for this pod.

    Args:
        arguments: folder with ``tls.crt`` and ``tls.key`` of the authority; folder for ``tls.crt``,
            ``tls.key`` and ``ca.crt``.
        environment: ``POD_IP``, and ``FQ_RAY_IP``, the name by which the head is known.
        now: when it begins to be good; it ends with the authority's.

    Raises:
        SetupError: something of this is missing, or is not what it should be.
    """
    if len(arguments) != 2 or not environment.get("POD_IP"):
        raise SetupError("give the authority's folder and one for the certificate, and set POD_IP")
    authority, out = Path(arguments[0]), Path(arguments[1])
    certificate, key = _authority(authority)
    known_as = [*_ALWAYS, environment["POD_IP"], *filter(None, [environment.get("FQ_RAY_IP")])]
    own = ec.generate_private_key(ec.SECP256R1())
    signed = _signed(certificate, key, own, known_as, now)
    _write(out / "tls.key", _private(own))
    _write(out / "tls.crt", signed.public_bytes(serialization.Encoding.PEM))
    _write(out / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def _authority(folder: Path) -> tuple[x509.Certificate, _Key]:
    try:
        certificate = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
        key = serialization.load_pem_private_key((folder / "tls.key").read_bytes(), None)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    except (OSError, ValueError, TypeError, x509.ExtensionNotFound) as error:
        # Without its text, which may quote the key.
        raise SetupError(
            f"{folder} holds no authority ({type(error).__name__}): tls.crt and tls.key are needed"
        ) from None
    if not constraints.ca or not isinstance(key, _Key):
        raise SetupError(
            f"{folder} holds no authority: its certificate must say isCA: true, with an EC or RSA key"
        )
    return certificate, key


def _signed(
    authority: x509.Certificate,
    key: _Key,
    own: ec.EllipticCurvePrivateKey,
    known_as: Sequence[str],
    now: datetime,
) -> x509.Certificate:
    # By its address: a subject that is the authority's own would look like one that signed itself.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ray at {known_as[len(_ALWAYS)]}")])
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = (
        x509.CertificateBuilder(authority.subject, name, own.public_key(), x509.random_serial_number())
        .not_valid_before(max(now - _SKEW, authority.not_valid_before_utc))
        .not_valid_after(authority.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(both, critical=False)
        .add_extension(x509.SubjectAlternativeName([_known_as(one) for one in known_as]), critical=False)
        .add_extension(_identifier(authority, key.public_key()), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def _identifier(authority: x509.Certificate, key: _Public) -> x509.AuthorityKeyIdentifier:
    """As the authority calls its key, which need not be what we would make of it."""
    try:
        named = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(named)


def _known_as(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


if __name__ == "__main__":
    try:
        main(sys.argv[1:], dict(os.environ), datetime.now(UTC))
    except AnamorphError as problem:
        sys.exit(f"error: {problem}")
