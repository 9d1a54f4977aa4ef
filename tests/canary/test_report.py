from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from anamorph import telemetry
from anamorph.canary import OverheadReport, measure, paired_ratio, save_plot, terminal_plot

from .conftest import ENCRYPTED, PLAINTEXT, Zone


@pytest.fixture
def report(zone: Zone) -> OverheadReport:
    """Encrypted takes exactly twice as long."""
    with zone.client() as http:
        return measure(
            ENCRYPTED,
            PLAINTEXT,
            model="smol",
            vocab_size=1000,
            http=http,
            pairs=5,
            prompt_tokens=16,
            output_tokens=8,
            clock=zone.clock,
        )


def test_ratio_is_encrypted_over_plaintext(report: OverheadReport) -> None:
    """Twice the time is a ratio of 2 for every time, and of one half for throughput."""
    medians = {measure: ratio.median for measure, ratio in report.ratios.items()}
    assert medians == pytest.approx({"ttft": 2, "tpot": 2, "e2el": 2, "throughput": 0.5})


def test_interval_covers() -> None:
    """Over 100 experiments with a true ratio of 1.1, the 95 % interval holds it at least 90 % of the time."""
    rng = np.random.default_rng(11)
    hits = 0
    for seed in range(100):
        pace = rng.lognormal(0, 1, size=40)  # the machine's mood, common to both halves of a pair
        noise = rng.lognormal(0, 0.2, size=(2, 40))
        ratio = paired_ratio(list(1.1 * pace * noise[0]), list(pace * noise[1]), seed=seed)
        hits += ratio.low <= 1.1 <= ratio.high
    assert hits >= 90


def test_pairing_cancels_the_machine() -> None:
    """A machine that slows both halves of a pair down tenfold leaves the interval tight."""
    pace = np.geomspace(1, 10, 30)
    ratio = paired_ratio(list(1.05 * pace), list(pace), seed=0)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.05, 1.05, 1.05))


def test_interval_repeats() -> None:
    """The same samples give the same interval."""
    rng = np.random.default_rng(5)
    sides = [list(rng.lognormal(0, 0.3, size=20)) for _ in range(2)]
    assert paired_ratio(*sides, seed=1) == paired_ratio(*sides, seed=1)


def test_json_shape(report: OverheadReport) -> None:
    """The JSON reads like a result of `vllm bench serve`, once per side, with the ratios beside."""
    data = json.loads(report.to_json())
    for side in ("encrypted", "plaintext"):
        for name in ("ttft", "tpot", "itl", "e2el"):
            assert {f"{kind}_{name}_ms" for kind in ("mean", "median", "std", "p99")} <= data[side].keys()
        assert (data[side]["completed"], data[side]["total_output_tokens"]) == (5, 40)
    assert data["ratios"]["tpot"]["median"] == pytest.approx(2)
    assert data["plaintext"]["median_tpot_ms"] == pytest.approx(10)
    assert data["encrypted"]["output_throughput"] == pytest.approx(8 / 0.15)


def test_json_holds_no_ids(report: OverheadReport) -> None:
    """The report is numbers and names: no prompt, no token, no key id."""
    assert "acme" not in report.to_json()
    assert "token_ids" not in report.to_json()


def test_table(report: OverheadReport) -> None:
    """The table shows both medians, the ratio and its interval for each measure."""
    console = Console(width=100, record=True, file=None, quiet=False)
    with console.capture() as captured:
        console.print(report.table())
    (tpot,) = [line for line in captured.get().splitlines() if "TPOT" in line]
    assert [word for word in tpot.replace("│", " ").split() if word[0].isdigit()] == [
        "10.00",
        "20.00",
        "2.000",
        "2.000",
        "2.000",
    ]


def test_metrics(report: OverheadReport) -> None:
    """The ratio and both ends of its interval are gauges on the Prometheus page."""
    built = telemetry.build("canary")
    report.record(built.meter, tenant="acme")
    families = {family.name: family for family in text_string_to_metric_families(built.prometheus().decode())}
    samples = families["anamorph_overhead_ratio"].samples
    found = {(s.labels["anamorph_measure"], s.labels["anamorph_statistic"]): s.value for s in samples}
    assert len(found) == 12
    assert found["tpot", "median"] == pytest.approx(2)
    built.shutdown()


def test_png(report: OverheadReport, tmp_path: Path) -> None:
    """The plot is a PNG of a readable size, made without a display."""
    save_plot(report, tmp_path / "overhead.png")
    data = (tmp_path / "overhead.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert int.from_bytes(data[16:20], "big") >= 1000


def test_terminal_plot(report: OverheadReport) -> None:
    """The terminal plot names both sides and both times, in plain text no wider than asked."""
    text = terminal_plot(report, width=60)
    assert all(word in text for word in ("plaintext", "encrypted", "TTFT", "TPOT"))
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 60
