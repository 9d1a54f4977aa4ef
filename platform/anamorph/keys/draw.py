"""From a subkey to numbers: the stream and what is drawn from it (docs/spec/keys.md, section 4).

Words, permutations, signs and uniforms are exact on every machine. Normals and
orthogonals pass through log, cos, sin and QR and agree to about 1e-12.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from anamorph.errors import InvalidKey
from anamorph.keys.derive import check_secret

# ChaCha20's block counter is 32 bits wide (RFC 8439), and a block is 8 words.
STREAM_WORDS = 2**32 * 8
WORD_BYTES = 8


class Stream:
    """The ChaCha20 keystream of one subkey, read from its beginning.

    Every draw takes the next words of the stream, so the order of draws is part
    of what they mean; a fresh ``Stream`` starts again.

    Raises:
        InvalidKey: ``subkey`` is not 32 bytes, or more words are drawn than the stream has.
    """

    def __init__(self, subkey: bytes) -> None:
        # cryptography takes counter and nonce together: 4 + 12 zero bytes.
        cipher = Cipher(ChaCha20(check_secret(subkey), bytes(16)), mode=None)
        self._encryptor = cipher.encryptor()
        self._left = STREAM_WORDS

    def words(self, n: int) -> npt.NDArray[np.uint64]:
        """The next ``n`` words: 8 keystream bytes each, little-endian. Shape (n,)."""
        if not 0 <= n <= self._left:
            raise InvalidKey(f"cannot draw {n} words: {self._left} are left in this stream")
        self._left -= n
        keystream = self._encryptor.update(bytes(n * WORD_BYTES))
        return np.frombuffer(keystream, dtype="<u8").astype(np.uint64, copy=False)

    def permutation(self, n: int) -> npt.NDArray[np.int64]:
        """A permutation of 0…n-1 from ``n`` words: ``permutation(n)[plain] == encrypted``. Shape (n,)."""
        return np.argsort(self.words(n), kind="stable").astype(np.int64, copy=False)

    def signs(self, n: int) -> npt.NDArray[np.float64]:
        """``n`` signs, -1.0 where a word's low bit is 1 and +1.0 where it is 0. Shape (n,)."""
        return 1.0 - 2.0 * (self.words(n) & np.uint64(1)).astype(np.float64)

    def uniforms(self, n: int) -> npt.NDArray[np.float64]:
        """``n`` multiples of 2^-53 in [0, 1): the top 53 bits of a word each. Shape (n,)."""
        return (self.words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normals(self, n: int) -> npt.NDArray[np.float64]:
        """``n`` standard normals by Box–Muller; takes an even number of words. Shape (n,)."""
        pairs = self.uniforms(n + n % 2).reshape(-1, 2)
        # 1 - u is exact and never 0, so the logarithm is finite.
        radius = np.sqrt(-2.0 * np.log(1.0 - pairs[:, 0]))
        angle = 2.0 * np.pi * pairs[:, 1]
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:n]

    def orthogonal(self, n: int) -> npt.NDArray[np.float64]:
        """A Haar-distributed orthogonal matrix: Q of the QR with diag(R) > 0 of n² normals. Shape (n, n)."""
        q, r = np.linalg.qr(self.normals(n * n).reshape(n, n))
        return q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
