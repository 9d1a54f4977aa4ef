"""A pod's own certificate: good for its address under its authority, and for nothing else."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from anamorph.errors import SetupError
from anamorph.serve.cluster.certificate import main

NOW = datetime.now(UTC)
POD = {"POD_IP": "127.0.0.2", "FQ_RAY_IP": "main-head-svc.compute.svc.cluster.local"}


def authority(
    folder: Path, *, ca: bool = True, called: str = "ray-authority", identifier: bytes | None = None
) -> Path:
    """An authority as cert-manager writes one, or with a name and a key identifier of its own."""
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, called)])
    known = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + timedelta(days=365))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier(identifier or known.digest), critical=False)
        .add_extension(
            x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True
        )
        .sign(key, hashes.SHA256())
    )
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "tls.crt").write_bytes(made.public_bytes(pem))
    (folder / "tls.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    return folder


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    main([str(authority(tmp_path / "ca")), str(out)], POD, NOW)
    return out


def handshake(server: Path, peers: Path, host: str) -> None:
    """Both sides show their certificate, and each verifies the other's.

    Raises:
        ssl.SSLError: one does not believe the other.
    """
    here, there = socket.socketpair()
    accepting = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(peers / "ca.crt"))
    accepting.load_cert_chain(server / "tls.crt", server / "tls.key")
    accepting.verify_mode = ssl.CERT_REQUIRED
    calling = ssl.create_default_context(cafile=str(peers / "ca.crt"))
    calling.load_cert_chain(peers / "tls.crt", peers / "tls.key")

    def accept() -> None:
        try:
            with accepting.wrap_socket(there, server_side=True) as tls:
                tls.recv(1)
        except (ssl.SSLError, OSError):
            there.close()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        with calling.wrap_socket(here, server_hostname=host) as tls:
            tls.send(b"x")
    finally:
        here.close()
        thread.join()


@pytest.mark.parametrize("host", ["127.0.0.2", "127.0.0.1", "localhost", POD["FQ_RAY_IP"]])
def test_a_pod_is_believed_at_its_own_addresses(pod: Path, host: str) -> None:
    handshake(pod, pod, host)


def test_an_authority_may_call_itself_and_its_key_as_it_likes(tmp_path: Path) -> None:
    """Helm's and Go's make another identifier of a key than ours; theirs counts, and "ray" is a fair name."""
    out = tmp_path / "out"
    out.mkdir()
    main([str(authority(tmp_path / "ca", called="ray", identifier=b"\x01" * 20)), str(out)], POD, NOW)
    handshake(out, out, POD["POD_IP"])


@pytest.mark.parametrize("host", ["127.0.0.3", "example.com"])
def test_a_pod_is_not_believed_at_anothers(pod: Path, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        handshake(pod, pod, host)


def test_a_certificate_of_another_authority_is_not_believed(pod: Path, tmp_path: Path) -> None:
    out = tmp_path / "foreign"
    out.mkdir()
    main([str(authority(tmp_path / "other")), str(out)], POD, NOW)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(out, pod, "127.0.0.2")


def test_its_key_is_its_own_and_the_authoritys_is_left_where_it_is(pod: Path, tmp_path: Path) -> None:
    assert sorted(file.name for file in pod.iterdir()) == ["ca.crt", "tls.crt", "tls.key"]
    assert (pod / "tls.key").stat().st_mode & 0o777 == 0o600
    assert (pod / "tls.key").read_bytes() != (tmp_path / "ca" / "tls.key").read_bytes()


def test_it_signs_no_others_and_ends_with_its_authority(pod: Path) -> None:
    made, issuer = (
        x509.load_pem_x509_certificate((pod / name).read_bytes()) for name in ("tls.crt", "ca.crt")
    )
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert made.not_valid_after_utc == issuer.not_valid_after_utc


def test_a_container_that_starts_again_makes_another(pod: Path, tmp_path: Path) -> None:
    before = (pod / "tls.key").read_bytes()
    main([str(tmp_path / "ca"), str(pod)], POD, NOW)
    assert (pod / "tls.key").read_bytes() != before
    handshake(pod, pod, "127.0.0.2")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [("no address", "POD_IP"), ("no key", "holds no authority"), ("no authority", "must say isCA")],
)
def test_what_is_missing_is_named(tmp_path: Path, spoil: str, why: str) -> None:
    folder = authority(tmp_path / "ca", ca=spoil != "no authority")
    if spoil == "no key":
        (folder / "tls.key").write_text("no key")
    environment = {} if spoil == "no address" else POD
    with pytest.raises(SetupError, match=why):
        main([str(folder), str(tmp_path)], environment, NOW)


def test_as_the_pod_runs_it(tmp_path: Path) -> None:
    """With nothing of Ray or torch: it must start at once."""
    folder = authority(tmp_path / "ca")
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "anamorph.serve.cluster.certificate",
        str(folder),
        str(tmp_path),
    ]
    done = subprocess.run(
        command,
        env={"POD_IP": "127.0.0.2", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        check=True,
    )
    assert (tmp_path / "tls.crt").is_file()
    assert not [
        line for line in done.stderr.splitlines() if line.rpartition(b"|")[2].strip() in {b"ray", b"torch"}
    ]
