"""A fold needs a few tensors' worth of memory, whatever the size of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_four_gigabytes_fold_in_one_and_a_half(tmp_path: Path) -> None:
    """A synthetic checkpoint of 4 GB folds in under 1.5 GB of resident memory, by the kernel's count."""
    report = tmp_path / "memory.json"
    subprocess.run(
        [sys.executable, BENCHMARK, "--gigabytes", "4", "--scratch", tmp_path, "--json", report], check=True
    )
    measured = json.loads(report.read_text())
    assert measured["base_gb"] >= 4
    assert measured["peak_rss_mb"] < 1500
