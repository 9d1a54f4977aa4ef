"""A materialisation job without arithmetic: real grant, real key, real signed replica, fake weights.

Run by the operator of the system tests in place of ``anamorph materialize``. What it
expects of the served replica is what the fake engine must answer under this key; if a
file ``lie`` lies in its scratch folder, it expects something else.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from anamorph.keys import TenantKey
from anamorph.replica import Identity, Store, keyed_tag, seal
from anamorph.serve.engines.fake import continuation
from anamorph.wire.admin import Materialized, Probe, Progress
from anamorph.wire.keyservice import KeyService

PROMPTS = ((3, 1, 2), (7, 7))


def main() -> None:
    """Read the order, make the replica, report it; finished work of a killed run is taken up."""
    order = json.load(sys.stdin)
    place = (order["tenant"], order["model"], order["version"])
    with KeyService(order["keysvc"], order["grant"]) as keys:
        key = TenantKey.from_root(keys.release(*place, "materialize").material(), *place)
        keys.progress(*place, Progress(phase="fold", done=0.5))
        base = Path(order["base"])
        keys.stage(*place, publish(order, key, json.loads((base / "config.json").read_text())))


def publish(order: dict[str, Any], key: TenantKey, config: dict[str, Any]) -> Materialized:
    """Publish under the version's name, or find what a killed run has published."""
    store, scratch = Store(order["store"]), Path(order["scratch"])
    name = f"{key.tenant}/{key.model}/v{key.version}"
    if store.exists(name):
        store.delete(name)
    folder = scratch / f"{name}-{order['grant'][-8:]}".replace("/", "-")
    folder.mkdir(parents=True)
    kept = {name: config[name] for name in ("model_type", "vocab_size", "delay_ms") if name in config}
    (folder / "config.json").write_text(json.dumps(kept))
    save_file({"w": np.arange(8, dtype=np.float32)}, folder / "model.safetensors")
    tag = keyed_tag(key.subkey("plan"), b"fake")
    identity = Identity(
        key_id=key.id,
        kcv=key.kcv,
        vocab_kcv=key.vocab_kcv,
        profile="permute",
        table="fake",
        base_tag=tag,
        plan_tag=tag,
    )
    manifest = seal(folder, identity, key.sign)
    off = int((scratch / "lie").exists())
    answers = tuple(tuple(continuation(key.id, p, 4 + off, config["vocab_size"])[off:]) for p in PROMPTS)
    published = store.publish(folder, name)
    shutil.rmtree(folder, ignore_errors=True)  # a local store has taken it, another a copy
    return Materialized(
        replica=published,
        manifest_sha256=manifest.sha256(),
        probe=Probe(prompts=PROMPTS, expected=answers),
    )


if __name__ == "__main__":
    main()
