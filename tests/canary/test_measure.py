from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from anamorph.canary import OverheadReport, measure, random_ids
from anamorph.errors import StreamInterrupted

from .conftest import ENCRYPTED, PLAINTEXT, Zone


def run(zone: Zone, **changes: Any) -> OverheadReport:
    options: dict[str, Any] = {
        "model": "smol",
        "vocab_size": 1000,
        "pairs": 6,
        "prompt_tokens": 16,
        "output_tokens": 8,
        "warmup": 1,
        "rng": np.random.default_rng(7),
    }
    with zone.client() as http:
        return measure(ENCRYPTED, PLAINTEXT, http=http, clock=zone.clock, **(options | changes))


def prompts(zone: Zone, side: str) -> list[tuple[int, ...]]:
    return [tuple(body["prompt"]) for seen, body in zone.requests if seen == side]  # type: ignore[arg-type]


def test_never_one_prompt_to_both(zone: Zone) -> None:
    """No prompt goes to both sides, not even where the vocabulary is so small that it would by chance."""
    run(zone, vocab_size=2, prompt_tokens=1, pairs=30)
    pairs = list(zip(prompts(zone, "encrypted"), prompts(zone, "plaintext"), strict=True))
    assert len(pairs) == 31
    assert [pair for pair in pairs if pair[0] == pair[1]] == []


def test_prompts_are_fresh(zone: Zone) -> None:
    """Every request has a prompt of its own, of equal length, so that no prefix cache helps one side."""
    run(zone, rng=None)
    seen = prompts(zone, "encrypted") + prompts(zone, "plaintext")
    assert len(set(seen)) == 14
    assert {len(prompt) for prompt in seen} == {16}


def test_runs_differ_without_a_seed(zone: Zone) -> None:
    """Prompts come from fresh entropy unless the caller seeds them: nobody can predict a run."""
    run(zone, rng=None)
    first, zone.requests = prompts(zone, "encrypted"), []
    run(zone, rng=None)
    assert set(first).isdisjoint(prompts(zone, "encrypted"))


def test_ids_are_uniform() -> None:
    """Ids cover the whole vocabulary evenly: chi-square over 50 ids stays below its 99.99 % bound."""
    ids = random_ids(np.random.default_rng(3), 50, 50_000)
    counts = np.bincount(ids, minlength=50)
    assert len(counts) == 50
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 93


def test_interleaved_in_drawn_order(zone: Zone) -> None:
    """Requests of a pair run back to back, and which side goes first varies."""
    run(zone, pairs=30)
    sides = [side for side, _ in zone.requests]
    pairs = [tuple(sides[at : at + 2]) for at in range(0, len(sides), 2)]
    assert set(pairs) == {("encrypted", "plaintext"), ("plaintext", "encrypted")}


def test_same_work_on_both_sides(zone: Zone) -> None:
    """Both sides get one fixed output length, greedy, streamed, with end-of-text ignored."""
    run(zone)
    asked = [{name: value for name, value in body.items() if name != "prompt"} for _, body in zone.requests]
    assert asked == [{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "stream": True}] * 14


def test_times(zone: Zone) -> None:
    """TTFT, TPOT, latency and throughput are what the endpoint's clock says, warm-up left out."""
    report = run(zone)
    assert len(report.encrypted) == 6
    assert {round(sample.ttft, 9) for sample in report.encrypted} == {0.01}
    assert {round(sample.tpot, 9) for sample in report.plaintext} == {0.01}
    assert report.plaintext[0].e2el == pytest.approx(0.005 + 7 * 0.01)
    assert report.plaintext[0].throughput == pytest.approx(8 / 0.075)


def test_tpot_of_chunks(zone: Zone) -> None:
    """Chunks of several tokens count by tokens: three per chunk at 10 ms each are 30 ms apart."""
    zone.per_chunk = 3
    sample = run(zone, output_tokens=7).plaintext[0]
    assert sample.tokens == 7
    assert sample.tpot == pytest.approx(0.06 / 6)
    assert sample.itl == pytest.approx((0.03, 0.03))


@pytest.mark.parametrize(("short_by", "per_chunk"), [(1, 1), (0, 8)])
def test_incomparable_answers(zone: Zone, short_by: int, per_chunk: int) -> None:
    """An answer of another length, or one that is not streamed, ends the run instead of entering it."""
    zone.short_by, zone.per_chunk = short_by, per_chunk
    with pytest.raises(StreamInterrupted):
        run(zone)


@pytest.mark.parametrize(
    "change", [{"pairs": 1}, {"output_tokens": 1}, {"prompt_tokens": 0}, {"vocab_size": 1}]
)
def test_too_small(zone: Zone, change: dict[str, int]) -> None:
    """Sizes from which nothing could be said are refused before a request is sent."""
    with pytest.raises(ValueError, match="at least"):
        run(zone, **change)
    assert zone.requests == []


def test_targets_swapped(zone: Zone) -> None:
    """The two targets cannot be mixed up: one has a key id, the other has none."""
    with zone.client() as http, pytest.raises(ValueError, match="key id"):
        measure(PLAINTEXT, ENCRYPTED, model="smol", vocab_size=10, http=http)


def test_progress(zone: Zone) -> None:
    """Progress is told after every pair, warm-up included."""
    told: list[tuple[int, int]] = []
    run(zone, progress=lambda done, total: told.append((done, total)))
    assert told == [(number, 7) for number in range(1, 8)]


def test_token_stays_hidden() -> None:
    """A target shows where it points, not the token it uses."""
    assert "token'" not in repr(ENCRYPTED)
