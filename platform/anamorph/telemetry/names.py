"""Names and buckets of what is measured.

Metric and attribute names follow OpenTelemetry's semantic conventions for
generative AI. They stand here as our own constants because the convention
package marks its ``gen_ai`` names as moved; buckets are the ones that the
conventions recommend. Durations are in seconds, usage in tokens.
"""

# ruff: noqa: S105  -- a name with "token" in it is no password here
from __future__ import annotations

from typing import Final

# Metrics of the side that computes tokens.
SERVER_TIME_TO_FIRST_TOKEN: Final = "gen_ai.server.time_to_first_token"
SERVER_TIME_PER_OUTPUT_TOKEN: Final = "gen_ai.server.time_per_output_token"
SERVER_REQUEST_DURATION: Final = "gen_ai.server.request.duration"
SERVER_TOKENS: Final = "anamorph.server.tokens"
SERVER_ACTIVE_REQUESTS: Final = "anamorph.server.active_requests"
SERVER_QUEUE_DURATION: Final = "anamorph.server.queue.duration"
DOOR_ANSWER_DURATION: Final = "anamorph.door.answer.duration"
DOOR_BROKEN: Final = "anamorph.door.broken"
ENGINE_COLD_START: Final = "anamorph.engine.cold_start"

# Metrics of the side that asks for them.
CLIENT_OPERATION_DURATION: Final = "gen_ai.client.operation.duration"
CLIENT_TOKEN_USAGE: Final = "gen_ai.client.token.usage"
CLIENT_TIME_TO_FIRST_CHUNK: Final = "gen_ai.client.operation.time_to_first_chunk"
CLIENT_TIME_PER_OUTPUT_CHUNK: Final = "gen_ai.client.operation.time_per_output_chunk"

# Metrics of a pool, whose members share an engine.
POOL_SWAP_DURATION: Final = "anamorph.pool.swap.duration"
POOL_SWAP_BYTES: Final = "anamorph.pool.swap.bytes"
POOL_REQUESTS: Final = "anamorph.pool.requests"
POOL_WAITING: Final = "anamorph.pool.waiting"
POOL_MEMBERS: Final = "anamorph.pool.members"
POOL_HOST_BYTES: Final = "anamorph.pool.host.bytes"

# Metrics of the canary: encrypted divided by plaintext, and what the canary itself does.
OVERHEAD_RATIO: Final = "anamorph.overhead.ratio"
OVERHEAD_LENGTH_RATIO: Final = "anamorph.overhead.length.ratio"
OVERHEAD_LATENCY: Final = "anamorph.overhead.latency"
OVERHEAD_PAIRS: Final = "anamorph.overhead.pairs"
OVERHEAD_DRIFT: Final = "anamorph.overhead.drift"
CANARY_PAIRS: Final = "anamorph.canary.pairs"
CANARY_SKIPPED: Final = "anamorph.canary.skipped"
CANARY_TOKENS: Final = "anamorph.canary.tokens"

# The operator's.
OPERATOR_CALLS: Final = "anamorph.operator.api.calls"

# Attributes; ``guard.ALLOWED`` decides what may leave the process.
OPERATION: Final = "gen_ai.operation.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
TOKEN_TYPE: Final = "gen_ai.token.type"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
ERROR_TYPE: Final = "error.type"
PROTECTION: Final = "anamorph.protection"
TENANT: Final = "anamorph.tenant"
KEY_ID: Final = "anamorph.key_id"
VERSION: Final = "anamorph.version"
STATE: Final = "anamorph.state"
POOL: Final = "anamorph.pool"
ACTION: Final = "anamorph.action"
MEASURE: Final = "anamorph.measure"
STATISTIC: Final = "anamorph.statistic"
LENGTH: Final = "anamorph.length"
REASON: Final = "anamorph.reason"
KIND: Final = "anamorph.kind"
PHASE: Final = "anamorph.phase"
PURPOSE: Final = "anamorph.purpose"
SOURCE: Final = "anamorph.source"
IDENTITY: Final = "anamorph.identity"
METHOD: Final = "http.request.method"
ROUTE: Final = "http.route"
STATUS_CODE: Final = "http.response.status_code"

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
_DURATION = tuple(0.01 * 2**step for step in range(14))  # 0.01 to 81.92
_COLD_START = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_TOKENS = tuple(4**step for step in range(14))  # 1 to 67,108,864

BUCKETS: Final[dict[str, tuple[float, ...]]] = {
    SERVER_TIME_TO_FIRST_TOKEN: _FIRST_TOKEN,
    SERVER_TIME_PER_OUTPUT_TOKEN: _PER_TOKEN,
    SERVER_REQUEST_DURATION: _DURATION,
    SERVER_QUEUE_DURATION: _FIRST_TOKEN,
    DOOR_ANSWER_DURATION: _DURATION,
    ENGINE_COLD_START: _COLD_START,
    POOL_SWAP_DURATION: _FIRST_TOKEN,
    CLIENT_OPERATION_DURATION: _DURATION,
    CLIENT_TIME_TO_FIRST_CHUNK: _FIRST_TOKEN,
    CLIENT_TIME_PER_OUTPUT_CHUNK: _PER_TOKEN,
    CLIENT_TOKEN_USAGE: _TOKENS,
}
