"""For each alert: series in which it fires after ``promtool.MINUTES``, and near ones in which it must not."""

from __future__ import annotations

from tests.servers.promtool import Case

P = "anamorph_keysvc_"
KMS = P + 'call_duration_seconds_count{anamorph_kind="kms"'
ANSWERS = P + "request_duration_seconds_count"
ROUNDS = P + "worker_rounds_total"
UP = {P + 'sample_age_seconds{instance="a"}': "0x240"}

CASES = {
    "KeyServiceMissing": Case({}, [UP, {P + 'sample_age_seconds{instance="a"}': "0x240"}]),
    "KmsSealed": Case(
        {KMS + ',error_type="kms_sealed"}': "_x196 1+1x40"},
        [{KMS + ',error_type="kms_sealed"}': "0+1x60 60x180"}, {KMS + "}": "0+60x240"}],
    ),
    "KmsUnreachable": Case(
        {KMS + "}": "0+1x240", KMS + ',error_type="kms_unavailable"}': "0+2x240"},
        [{KMS + "}": "0+60x240", KMS + ',error_type="timeout"}': "0+1x240"}],
    ),
    "KmsDenied": Case(
        {KMS + ',error_type="kms_denied"}': "_x195 1x45"},
        [{KMS + ',error_type="kms_denied"}': "1x240"}, {KMS + ',error_type="kms_unavailable"}': "0+1x240"}],
    ),
    "CiphertextRefused": Case(
        {KMS + ',error_type="InvalidKey"}': "_x195 1x45"},
        [{KMS + ',error_type="KeyMismatch"}': "1x240"}],
    ),
    "KmsLoginFailing": Case(
        {
            P + 'kms_logins_total{anamorph_identity="issuer",error_type="failed"}': "0+1x240",
            P + 'kms_logins_total{anamorph_identity="issuer"}': "3x240",
            P + 'kms_logins_total{anamorph_identity="releaser"}': "0+1x240",
        },
        [
            {
                P + 'kms_logins_total{anamorph_identity="issuer",error_type="failed"}': "0+1x240",
                P + 'kms_logins_total{anamorph_identity="issuer"}': "0+1x240",
            },
            {P + 'kms_logins_total{anamorph_identity="issuer",error_type="failed"}': "3x240"},
        ],
        {"anamorph_identity": "issuer"},
    ),
    "ReleaseErrors": Case(
        {P + "release_failures_total": "0+2x240", P + "releases_total": "0+98x240"},
        [
            {P + "release_failures_total": "0+0x240", P + "releases_total": "0+98x240"},
            {P + "release_failures_total": "0x240", P + "releases_total": "0x240"},
        ],
    ),
    "ReleaseSlow": Case(
        {
            P + 'release_duration_seconds_bucket{le="0.25",anamorph_source="cached"}': "0+1x240",
            P + 'release_duration_seconds_bucket{le="0.5",anamorph_source="cached"}': "0+100x240",
            P + 'release_duration_seconds_bucket{le="+Inf",anamorph_source="cached"}': "0+100x240",
        },
        [
            {
                P + 'release_duration_seconds_bucket{le="0.02",anamorph_source="cached"}': "0+100x240",
                P + 'release_duration_seconds_bucket{le="0.25",anamorph_source="cached"}': "0+100x240",
                P + 'release_duration_seconds_bucket{le="+Inf",anamorph_source="cached"}': "0+100x240",
            }
        ],
        {"anamorph_source": "cached"},
    ),
    "DenialsSpike": Case(
        {P + "denials_total": "0+60x240", P + "releases_total": "0+60x240"},
        [
            {P + "denials_total": "0+60x240", P + "releases_total": "0+600x240"},
            {P + "denials_total": "0+1x240", P + "releases_total": "0x240"},
        ],
    ),
    "UnauthenticatedSpike": Case(
        {ANSWERS + '{http_response_status_code="401"}': "0+120x240"},
        [
            {ANSWERS + '{http_response_status_code="401"}': "0+10x240"},
            {ANSWERS + '{http_response_status_code="200"}': "0+900x240"},
        ],
    ),
    "KeyOverdue": Case({P + "key_overdue_seconds": "3700x240"}, [{P + "key_overdue_seconds": "3500x240"}]),
    "TokenBudgetSpent": Case(
        {P + "key_spent": "1x240"}, [{P + "key_spent": "0x180 1x60"}, {P + "key_spent": "0x240"}]
    ),
    "RotationStuck": Case(
        {
            P + 'rotation_age_seconds{anamorph_phase="pending"}': "1000x240",
            P + 'rotation_age_seconds{anamorph_phase="staged"}': "1000x240",
        },
        [
            {P + 'rotation_age_seconds{anamorph_phase="pending"}': "800x240"},
            {P + 'rotation_age_seconds{anamorph_phase="materializing"}': "14000x240"},
        ],
        {"anamorph_phase": "pending"},
    ),
    "WorkerStopped": Case(
        {
            ROUNDS + '{job="k",instance="a",anamorph_action="prepare"}': "7x240",
            ROUNDS + '{job="k",instance="a"}': "0x240",
            ROUNDS + '{job="k",instance="b",anamorph_action="prepare"}': "0+12x240",
        },
        [{ROUNDS + '{job="k",instance="b",anamorph_action="prepare"}': "0+12x240"}],
        {"job": "k", "instance": "a"},
    ),
    "WorkerFailing": Case(
        {
            ROUNDS + '{anamorph_action="prepare",error_type="KeyError"}': "0+12x240",
            ROUNDS + '{anamorph_action="shred"}': "0+12x240",
        },
        [
            {
                ROUNDS + '{anamorph_action="prepare",error_type="KeyError"}': "0+1x240",
                ROUNDS + '{anamorph_action="prepare"}': "0+12x240",
            }
        ],
        {"anamorph_action": "prepare"},
    ),
    "WorkerBehind": Case(
        {P + "operation_waiting_seconds": "130x240"}, [{P + "operation_waiting_seconds": "100x240"}]
    ),
    "WebhooksBehind": Case(
        {P + "delivery_waiting_seconds": "3700x240"}, [{P + "delivery_waiting_seconds": "600x240"}]
    ),
    "NoCheckpoint": Case(
        {P + "audit_uncovered_seconds": "7300x240"}, [{P + "audit_uncovered_seconds": "3600x240"}, UP]
    ),
    "AuditRefused": Case(
        {ROUNDS + '{anamorph_action="checkpoints",error_type="AuditRefused"}': "_x180 1x60"},
        [
            {ROUNDS + '{anamorph_action="checkpoints",error_type="AuditRefused"}': "1x240"},
            {ROUNDS + '{anamorph_action="checkpoints",error_type="checkpoints_unavailable"}': "0+1x240"},
        ],
    ),
    "DatabaseUnreachable": Case(
        {P + 'sample_age_seconds{instance="a"}': "0x180 60+60x60"}, [UP], {"instance": "a"}
    ),
    "DatabaseBusy": Case(
        {
            P + 'database_connections{instance="a"}': "16x240",
            P + 'database_connections_limit{instance="a"}': "16x240",
        },
        [
            {
                P + 'database_connections{instance="a"}': "8x240",
                P + 'database_connections_limit{instance="a"}': "16x240",
            }
        ],
        {"instance": "a"},
    ),
    "ServerErrors": Case(
        {
            ANSWERS + '{http_route="/v1",http_response_status_code="503"}': "0+5x240",
            P
            + 'request_duration_seconds_count{http_route="/v1",http_response_status_code="200"}': "0+95x240",
        },
        [
            {
                ANSWERS + '{http_route="/readyz",http_response_status_code="503"}': "0+5x240",
                ANSWERS + '{http_route="/v1",http_response_status_code="200"}': "0+95x240",
            }
        ],
    ),
}
