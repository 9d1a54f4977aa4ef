"""Step 1: everything is started."""

from __future__ import annotations

from anamorph.cli.demo.stage import Stage
from anamorph.cli.machine.home import MODEL
from anamorph.cli.machine.progress import Steps
from anamorph.cli.machine.system import Plan, start
from anamorph.cli.machine.tenants import ServedModel
from anamorph.wire.admin import RotationPolicy
from anamorph.wire.keyservice import everything

# Short, so that a whole rotation fits into a demonstration. The grace is the least that
# covers every client: its cache, its longest request, clocks and propagation.
POLICY = RotationPolicy(
    client_cache_ttl_s=3,
    longest_request_s=20,
    clock_skew_s=1,
    propagation_s=2,
    grace_s=26,
    destroy_delay_s=60,
)


def start_everything(stage: Stage) -> None:
    """Start the system and show what is served."""
    with Steps(stage.console) as steps:
        steps.say("looking for SmolLM2-135M-Instruct")
        served = ServedModel(stage.folder, dtype=stage.dtype, policy=POLICY)
        start(stage.home, Plan(served), steps.say, steps.report)
    stage.console.print(f"  plaintext baseline   {stage.urls['serve']}/plaintext/{MODEL}/v0")
    with stage.platform() as keys:
        versions = list(everything(keys.all_versions))
    for version in versions:
        stage.console.print(f"  {version.tenant:<20} {version.endpoint}   key {version.key_id}")
    stage.check(len(versions) == 2, "two tenants, each with a key and a verified replica of its own")
