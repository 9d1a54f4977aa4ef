"""What a run of the canary found: as numbers, as JSON, as a table, as metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from opentelemetry.metrics import Meter
from rich.table import Table

from anamorph.canary.sample import Sample
from anamorph.canary.statistics import CONFIDENCE, RESAMPLES, Ratio, paired_ratio, summary
from anamorph.telemetry import clean, names

MEASURES = ("ttft", "tpot", "e2el", "throughput")
TITLES = {
    "ttft": "TTFT (ms)",
    "tpot": "TPOT (ms)",
    "e2el": "end to end (ms)",
    "throughput": "tokens/s",
}


@dataclass(frozen=True)
class OverheadReport:
    """Samples of both sides, pair by pair, and what follows from them.

    A ratio is encrypted over plaintext: above 1 means slower for times, faster for throughput.
    """

    model: str
    prompt_tokens: int
    output_tokens: int
    encrypted: tuple[Sample, ...]
    plaintext: tuple[Sample, ...]
    duration: float
    seed: int = 0

    @cached_property
    def ratios(self) -> dict[str, Ratio]:
        """Ratio and confidence interval of each of ``MEASURES``."""
        return {
            measure: paired_ratio(
                values(self.encrypted, measure), values(self.plaintext, measure), seed=self.seed
            )
            for measure in MEASURES
        }

    def to_dict(self) -> dict[str, Any]:
        """The report in the shape of ``vllm bench serve`` results, once per side, plus the ratios."""
        return {
            "benchmark": "overhead",
            "model_id": self.model,
            "pairs": len(self.encrypted),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "duration": self.duration,
            "encrypted": _side(self.encrypted, self.prompt_tokens),
            "plaintext": _side(self.plaintext, self.prompt_tokens),
            "ratios": {measure: asdict(ratio) for measure, ratio in self.ratios.items()},
            "confidence": CONFIDENCE,
            "bootstrap_resamples": RESAMPLES,
            "method": "pairs of independent random prompts, order drawn per pair, one request at a time",
        }

    def to_json(self) -> str:
        """``to_dict`` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def table(self) -> Table:
        """Medians of both sides and their ratio, to print with rich."""
        table = Table(title=f"Overhead of {self.model}: {len(self.encrypted)} pairs")
        for heading in ("", "plaintext", "encrypted", "ratio", f"{CONFIDENCE:.0%} interval"):
            table.add_column(heading, justify="right" if heading else "left")
        for measure in MEASURES:
            plain, encrypted = (median(side, measure) for side in (self.plaintext, self.encrypted))
            ratio = self.ratios[measure]
            interval = f"{ratio.low:.3f} – {ratio.high:.3f}"
            table.add_row(
                TITLES[measure], f"{plain:.2f}", f"{encrypted:.2f}", f"{ratio.median:.3f}", interval
            )
        return table

    def record(self, meter: Meter, *, tenant: str) -> None:
        """Set the ``anamorph.overhead.ratio`` gauges: median and both ends of the interval."""
        gauge = meter.create_gauge(
            names.OVERHEAD_RATIO, "1", "Encrypted over plaintext, measured by the canary"
        )
        for measure, ratio in self.ratios.items():
            for statistic, value in asdict(ratio).items():
                attributes = {
                    names.TENANT: tenant,
                    names.REQUEST_MODEL: self.model,
                    names.MEASURE: measure,
                    names.STATISTIC: statistic,
                }
                gauge.set(value, clean(attributes))


def values(samples: Sequence[Sample], measure: str) -> list[float]:
    """One measure of each sample, in seconds or tokens per second."""
    return [getattr(sample, measure) for sample in samples]


def median(samples: Sequence[Sample], measure: str) -> float:
    """Median as the table shows it: times in milliseconds, throughput in tokens per second."""
    found = sorted(values(samples, measure))
    middle = (found[(len(found) - 1) // 2] + found[len(found) // 2]) / 2
    return middle if measure == "throughput" else middle * 1000


def _side(samples: Sequence[Sample], prompt_tokens: int) -> dict[str, float]:
    tokens, seconds = sum(sample.tokens for sample in samples), sum(sample.e2el for sample in samples)
    return {
        "completed": len(samples),
        "total_input_tokens": prompt_tokens * len(samples),
        "total_output_tokens": tokens,
        "output_throughput": tokens / seconds,
        **summary(values(samples, "ttft"), "ttft"),
        **summary(values(samples, "tpot"), "tpot"),
        **summary(list(chain.from_iterable(sample.itl for sample in samples)), "itl"),
        **summary(values(samples, "e2el"), "e2el"),
    }
