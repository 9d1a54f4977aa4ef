"""For each alert: series in which it fires after ``promtool.MINUTES``, and near ones in which it must not."""

from __future__ import annotations

from tests.servers.promtool import Case

REQUESTS = 'gen_ai_server_request_duration_seconds_count{gen_ai_request_model="smol"'
RATIO = 'anamorph_overhead_ratio{anamorph_tenant="acme",gen_ai_request_model="smol"'
VERSION = {"anamorph_tenant": "acme", "gen_ai_request_model": "smol"}
PAIRS = "anamorph_canary_pairs_total"
SEQUENCES = 'anamorph_engine_sequences_{}{{gen_ai_request_model="smol"}}'
KEYSVC = "anamorph_keysvc_"
DOOR = "anamorph_door_answer_duration_seconds_count"
BROKEN = 'anamorph_door_broken_total{error_type="timeout"}'
POOL = 'anamorph_pool_requests_total{anamorph_pool="p"'


def door(status: int, method: str = "POST") -> str:
    return f'{DOOR}{{http_request_method="{method}",http_response_status_code="{status}"}}'


def ratio(measure: str, statistic: str) -> str:
    return f'{RATIO},anamorph_measure="{measure}",anamorph_statistic="{statistic}"}}'


CASES = {
    "RequestErrors": Case(
        {REQUESTS + "}": "0+95x240", REQUESTS + ',error_type="unavailable"}': "0+5x240"},
        [
            {REQUESTS + "}": "0+995x240", REQUESTS + ',error_type="unavailable"}': "0+5x240"},
            {REQUESTS + "}": "0+50x240", REQUESTS + ',error_type="cancelled"}': "0+50x240"},
            {REQUESTS + "}": "0+50x240", REQUESTS + ',error_type="ClientDisconnect"}': "0+50x240"},
            {REQUESTS + "}": "5x240", REQUESTS + ',error_type="unavailable"}': "5x240"},
        ],
        {"gen_ai_request_model": "smol"},
    ),
    "DoorErrors": Case(
        # The operator reads usage meanwhile, all of it well.
        {door(200): "0+95x240", door(503): "0+5x240", door(200, "GET"): "0+900x240"},
        [
            # Wake-ups that end well, however slow; those beyond the bound are told to come back.
            {door(200): "0+1x240", door(429): "0+2x240"},
            {door(200): "0+995x240", door(503): "0+5x240"},
            {door(200): "0+50x240", door(404): "0+20x240", door(410): "0+20x240", door(401): "0+10x240"},
            # A replica that was killed and came back, shortly before and long ago.
            {door(200): "0+50x240", door(503): "0x194 0+20x2 40x50"},
            {door(200): "0+50x240", door(503): "0x100 0+20x3 60x140"},
            {door(200, "GET"): "0+1x240", door(503, "GET"): "0+1x240"},
        ],
    ),
    "RequestsWait": Case(
        {SEQUENCES.format("running"): "4x240", SEQUENCES.format("waiting"): "9x240"},
        [
            {SEQUENCES.format("running"): "4x240", SEQUENCES.format("waiting"): "8x240"},
            {SEQUENCES.format("running"): "4x240", SEQUENCES.format("waiting"): "0x190 9x50 0x1"},
            {SEQUENCES.format("running"): "0x240", SEQUENCES.format("waiting"): "0x240"},
        ],
        {"gen_ai_request_model": "smol"},
    ),
    "OverheadAboveBudget": Case(
        {ratio("tpot", "low"): "1.03x240", ratio("tpot", "median"): "1.05x240"},
        [
            # A wide interval around a high median is noise until it is narrow.
            {ratio("tpot", "low"): "0.99x240", ratio("tpot", "median"): "1.3x240"},
            {ratio("tpot", "high"): "1.3x240"},
            {ratio("tpot", "low"): "1.01x175 1.03x25 1.01x40"},
            {ratio("throughput", "high"): "1.01x240", ratio("throughput", "low"): "0.9x240"},
            {ratio("e2el", "low"): "1.03x240"},
        ],
        VERSION | {"anamorph_measure": "tpot", "anamorph_statistic": "low"},
    ),
    "OverheadChanged": Case(
        {'anamorph_overhead_drift{anamorph_measure="tpot"}': "0x190 1x50"},
        [{'anamorph_overhead_drift{anamorph_measure="tpot"}': "1x190 0x50"}],
        {"anamorph_measure": "tpot"},
    ),
    "CanarySilent": Case(
        {PAIRS: "0+1x100 100x140", PAIRS + '{error_type="unavailable"}': "0+1x240"},
        [{PAIRS: "0+1x240"}, {PAIRS + '{instance="a"}': "50x240", PAIRS + '{instance="b"}': "0+1x240"}],
    ),
    "DrainStuck": Case(
        {KEYSVC + "drain_overdue_seconds": "1000x240"}, [{KEYSVC + "drain_overdue_seconds": "800x240"}]
    ),
    "KeyTooOld": Case(
        {KEYSVC + "key_oldest_seconds": "7776001x240"}, [{KEYSVC + "key_oldest_seconds": "7775000x240"}]
    ),
    "SlotsThrash": Case(
        {POOL + ',anamorph_state="miss"}': "0+6x240", POOL + ',anamorph_state="hit"}': "0+4x240"},
        [{POOL + ',anamorph_state="miss"}': "0+4x240", POOL + ',anamorph_state="hit"}': "0+6x240"}],
        {"anamorph_pool": "p"},
    ),
}
