"""Folding: what is published, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anamorph.checkpoint import Checkpoint, FoldReport, fold
from anamorph.checkpoint.writer import DTYPES, PARTIAL, ShardWriter, lay_out
from anamorph.errors import (
    CheckpointError,
    MaterializationError,
    MissingTensor,
    ReplicaExists,
    UnknownTensor,
    UnsupportedOption,
    WrongShape,
)
from anamorph.keys import TenantKey
from anamorph.plan import Step

Make = Callable[..., Path]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def test_a_replica_is_configurations_and_safetensors(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """A replica holds no tokenizer, no template, nothing that was lying in the base's folder."""
    base = make_tiny("llama")
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "modeling_x.py"):
        (base / name).write_text("{}")
    fold(base, tmp_path / "replica", key)
    assert set(contents(tmp_path / "replica")) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_folding_is_deterministic(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """The same base, key and profile give the same bytes."""
    base = make_tiny("llama", dtype=torch.bfloat16)
    fold(base, tmp_path / "one", key)
    fold(base, tmp_path / "two", key)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_report_says_what_was_done(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """The report carries the plan, the base's digest, and how much was written."""
    base = make_tiny("llama", tie_word_embeddings=True)
    report = fold(base, tmp_path / "replica", key)
    stored = load_file(tmp_path / "replica" / "model.safetensors")
    assert report.plan.added == ("lm_head.weight",)
    assert report.base_digest == Checkpoint.open(base).digest()
    assert report.written == sum(tensor.nbytes for tensor in stored.values())


def test_the_digest_sees_every_byte_of_the_base(make_tiny: Make) -> None:
    """A changed configuration or weight is another base."""
    base = make_tiny("llama")
    digests = {Checkpoint.open(base).digest()}
    edit(base / "config.json", rms_norm_eps=1e-5)
    digests.add(Checkpoint.open(base).digest())
    rewrite(base, lambda tensors: tensors["model.norm.weight"].neg_())
    digests.add(Checkpoint.open(base).digest())
    assert len(digests) == 3


def test_a_tie_is_kept_or_untied(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """``permute`` keeps a tied head; ``rotate`` folds the last norm into it and stores it."""
    base = make_tiny("llama", tie_word_embeddings=True)
    for profile, tied in (("permute", True), ("rotate", False)):
        out = tmp_path / profile
        fold(base, out, key, profile)  # type: ignore[arg-type]
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied


def test_a_tied_head_stored_twice_must_be_the_embedding(
    make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """A copy of the embedding beside it is dropped; a head of its own under a tie is refused."""
    base = make_tiny("llama", tie_word_embeddings=True)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(base, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    fold(base, tmp_path / "replica", key, "permute")
    assert "lm_head.weight" not in load_file(tmp_path / "replica" / "model.safetensors")
    rewrite(base, lambda tensors: tensors.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(CheckpointError, match="lm_head"):
        fold(base, tmp_path / "other", key, "permute")


def test_recomputed_buffers_are_left_out(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """Frequencies that old checkpoints store, and that the class never reads, are not in a replica."""
    base, name = make_tiny("llama"), "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(base, lambda tensors: tensors.update({name: torch.ones(4)}))
    fold(base, tmp_path / "replica", key)
    assert name not in load_file(tmp_path / "replica" / "model.safetensors")


REFUSED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], type[Exception], str]] = {
    "unknown": (lambda t: t.update({"model.extra": torch.ones(1)}), UnknownTensor, "model.extra"),
    "missing": (lambda t: t.pop("model.norm.weight"), MissingTensor, "model.norm.weight"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.ones(31)}), WrongShape, "model.norm.weight"),
    "integer": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}),
        WrongShape,
        "I8",
    ),
    "quantised": (lambda t: t.update({"lm_head.qweight": torch.ones(1)}), UnknownTensor, "lm_head.qweight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_tensors_are_refused_by_name(
    case: str, make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """A tensor too many, too few, of another shape or another type is named, and nothing is written."""
    change, error, name = REFUSED[case]
    base = make_tiny("llama")
    rewrite(base, change)
    with pytest.raises(error, match=name):
        fold(base, tmp_path / "out" / "replica", key)
    assert not (tmp_path / "out").exists()


def test_special_ids_move(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """Every token id in both configurations is the encrypted one: ints, lists, lists of lists, biases."""
    base = make_tiny("llama")
    edit(base / "config.json", eos_token_id=[2, 5], unk_token_id=9)
    edit(
        base / "generation_config.json",
        eos_token_id=[2, 5],
        suppress_tokens=[7, 8],
        begin_suppress_tokens=[4],
        forced_bos_token_id=1,
        forced_eos_token_id=[2, 3],
        bad_words_ids=[[10, 11], [12]],
        decoder_start_token_id=6,
        sequence_bias=[[[13, 14], -2.5]],
        temperature=0.7,
    )
    fold(base, tmp_path / "replica", key)
    image = key.vocab_key().permutation(96).tolist()
    config = json.loads((tmp_path / "replica" / "config.json").read_text())
    generation = json.loads((tmp_path / "replica" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [image[2], image[5]]
    assert (config["bos_token_id"], config["unk_token_id"]) == (image[1], image[9])
    assert generation["suppress_tokens"] == [image[7], image[8]]
    assert generation["begin_suppress_tokens"] == [image[4]]
    assert (generation["forced_bos_token_id"], generation["decoder_start_token_id"]) == (image[1], image[6])
    assert generation["forced_eos_token_id"] == [image[2], image[3]]
    assert generation["bad_words_ids"] == [[image[10], image[11]], [image[12]]]
    assert generation["sequence_bias"] == [[[image[13], image[14]], -2.5]]
    assert generation["temperature"] == 0.7


@pytest.mark.parametrize(
    ("file", "option", "value"),
    [
        ("config.json", "eos_token_id", 96),
        ("config.json", "pad_token_id", -1),
        ("config.json", "bos_token_id", "1"),
        ("config.json", "eos_token_id", [1, 2.0]),
        ("generation_config.json", "suppress_tokens", [96]),
        ("generation_config.json", "bad_words_ids", [[True]]),
        ("generation_config.json", "sequence_bias", {"1": 2.0}),
        ("generation_config.json", "stop_strings", ["end"]),
        ("generation_config.json", "watermarking_config", {"bias": 1.0}),
        ("generation_config.json", "custom_generate", "code"),
    ],
)
def test_options_that_cannot_be_encrypted_are_refused_by_name(
    file: str, option: str, value: Any, make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """Ids outside the vocabulary, options about text and unknown options are never copied blindly."""
    base = make_tiny("llama")
    edit(base / file, **{option: value})
    with pytest.raises(UnsupportedOption, match=option):
        fold(base, tmp_path / "replica", key)


def test_nothing_names_the_base(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """Names, commits and code of the base are in no file of the replica."""
    base = make_tiny("llama")
    edit(
        base / "config.json",
        _name_or_path="acme/secret-base",
        _commit_hash="secret-base",
        auto_map={"AutoModel": "secret-base.Model"},
        custom_pipelines={"secret-base": {}},
        _attn_implementation="secret-base",
    )
    fold(base, tmp_path / "replica", key)
    assert all(b"secret-base" not in content for content in contents(tmp_path / "replica").values())


def test_an_existing_folder_is_never_touched(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """Even an empty folder or a dangling link in the replica's place refuses the fold."""
    base = make_tiny("llama")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "dangling"):
        with pytest.raises(ReplicaExists):
            fold(base, tmp_path / name, key)
    assert list((tmp_path / "empty").iterdir()) == []


def test_finish_sees_the_whole_and_is_published_with_it(
    make_tiny: Make, key: TenantKey, tmp_path: Path
) -> None:
    """What ``finish`` adds appears with the replica, and it finds every other file in place."""
    base, seen = make_tiny("llama"), []

    def finish(folder: Path, report: FoldReport) -> None:
        seen.extend(sorted(path.name for path in folder.iterdir()))
        (folder / "anamorph.json").write_text(report.plan.key_id)
        assert not (tmp_path / "replica").exists()

    fold(base, tmp_path / "replica", key, finish=finish)
    assert seen == ["config.json", "generation_config.json", "model.safetensors"]
    assert (tmp_path / "replica" / "anamorph.json").read_text() == key.id


def test_a_failing_finish_publishes_nothing(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """An exception before the rename leaves the parent folder as it was."""
    base, parent = make_tiny("llama"), tmp_path / "out"

    def finish(folder: Path, report: FoldReport) -> None:
        raise MaterializationError(f"{folder} {report.written}")

    with pytest.raises(MaterializationError):
        fold(base, parent / "replica", key, finish=finish)
    assert list(parent.iterdir()) == []


def test_progress_counts_bytes(make_tiny: Make, key: TenantKey, tmp_path: Path) -> None:
    """Progress starts at nothing, never goes back, and ends with every byte written."""
    seen: list[tuple[int, int]] = []
    report = fold(make_tiny("llama"), tmp_path / "r", key, progress=lambda *at: seen.append(at))
    assert seen[0] == (0, report.written)
    assert seen[-1] == (report.written, report.written)
    assert seen == sorted(seen)


def test_a_shard_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    """A shard with too few bytes never gets its name."""
    step = Step("x", "x", (), (4,), "F32")
    (shard,) = lay_out([step], 100)

    def write() -> None:
        with ShardWriter(tmp_path, shard) as writer:
            writer.write(torch.zeros(3))

    with pytest.raises(CheckpointError):
        write()
    assert [path.suffix for path in tmp_path.iterdir()] == [PARTIAL]


def test_mixed_types_stay_aligned(tmp_path: Path) -> None:
    """Tensors of different widths share a shard that the library reads back as written.

    Each begins at its own width, and what fills cache lines at one: engines compute on the mapped file.
    """
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "a": ((3,), "BF16"),
        "b": ((2,), "F64"),
        "c": ((), "F32"),
        "d": ((4, 8), "BF16"),
        "e": ((5, 8), "F64"),
    }
    written = {
        name: torch.rand(shape, dtype=torch.float64).to(DTYPES[dtype])
        for name, (shape, dtype) in shapes.items()
    }
    (shard,) = lay_out([Step(name, name, (), *shapes[name]) for name in shapes], 1000)
    with ShardWriter(tmp_path, shard) as writer:
        for step in shard.steps:
            writer.write(written[step.name])
    read = load_file(tmp_path / shard.name)
    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())
    content = (tmp_path / shard.name).read_bytes()
    assert len(content) == shard.size
    begin = 8 + int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8:begin]).items():
        if name != "__metadata__":
            size = written[name].nbytes
            assert (begin + entry["data_offsets"][0]) % (
                64 if size % 64 == 0 else written[name].itemsize
            ) == 0
