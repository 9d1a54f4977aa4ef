"""The guide's cluster with one tiny model on it, made once.

With ``ANAMORPH_TEST_KEEP`` naming a folder the walk's files are there, and another run goes on where the
set-up has ended.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.cluster import tiny
from tests.cluster.cluster import Cluster
from tests.cluster.conftest import PATIENCE_S, WALKED, Walk
from tests.cluster.conversation import MOST_TOKENS, QUESTION
from tests.cluster.guide import step

from anamorph.cli.smollm2 import fetch_smollm2

TENANT, NAMESPACE = "acme", "team-acme"
# Short, as each case waits until the old version has ended; graceSeconds is their sum.
_POLICY = {
    "clientCacheTtlSeconds": 10,
    "longestRequestSeconds": 10,
    "clockSkewSeconds": 1,
    "propagationSeconds": 4,
    "graceSeconds": 25,
}


def stand(cluster: Cluster, guide: Walk) -> str:
    """Bring the cluster to where its model is ready and a proxy asks it; the answer that is right."""
    base, done = guide.work / "tiny", guide.work / WALKED
    if not done.exists():
        tiny.make(base, fetch_smollm2(), QUESTION, MOST_TOKENS)
        guide.take_until("The base")
        guide.shell.run(pushing(step("The base").script, base), PATIENCE_S)
        shown = json.loads((guide.work / "base.json").read_text())
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps(model(shown)))
        ready = f"kubectl -n {NAMESPACE} wait encryptedmodel/smol --for=condition=Ready --timeout=20m"
        guide.shell.run(ready, PATIENCE_S)
        done.touch()
    else:
        for title in ("The cluster", "The first administrator"):
            guide.shell.run(again(title), PATIENCE_S)
    vault = "forward anamorph anamorph-vault 8200 &"
    guide.shell.run(f'{vault}\nexport BASE="{base}"\nrm -f "$WORK/proxy.port"', 60)
    guide.shell.run(again("The first answer"), PATIENCE_S)
    return tiny.answer(base, QUESTION, MOST_TOKENS).strip()


def again(title: str) -> str:
    """The blocks of a chapter that may be run again: those that set the shell up, not the cluster."""
    blocks = [one.text for one in step(title).blocks]
    return "\n".join(one for one in blocks if re.search(r"^forward |^export WORK", one, re.MULTILINE))


def pushing(script: str, base: Path) -> str:
    """The guide's chapter about the base, with another one.

    Raises:
        LookupError: it does not say where a base is and goes, as it did.
    """
    for pattern, text in (
        (r"^export BASE=.*$", f'export BASE="{base}"'),
        (r"s3://bases/[\w-]+", "s3://bases/tiny"),
    ):
        script, count = re.subn(pattern, text, script, flags=re.MULTILINE)
        if count != 1:
            raise LookupError(f"{count} times {pattern} in the guide's chapter about the base")
    return script


def model(base: dict[str, object]) -> dict[str, object]:
    """The object of the tiny model.

    Args:
        base: as ``anamorph base push`` shows it.
    """
    spec = {
        "tenant": TENANT,
        "base": {"uri": base["uri"], "digest": base["digest"]},
        "dtype": "float32",
        "vocabSize": base["vocab_size"],
        "contextLength": base["context_length"],
        "tokenizerDigest": base["tokenizer_digest"],
        "chatTemplateDigest": base["chat_template_digest"],
        "servingCluster": "main",
        "serving": {"maxConcurrent": 2},
        "rotationPolicy": _POLICY,
    }
    metadata = {"name": "smol", "namespace": NAMESPACE}
    return {
        "apiVersion": "anamorph.dev/v1alpha1",
        "kind": "EncryptedModel",
        "metadata": metadata,
        "spec": spec,
    }
