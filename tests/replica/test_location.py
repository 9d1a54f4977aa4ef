"""Where a base may come from: the operator's allow-list, with links followed first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from anamorph.errors import BaseRefused, SetupError
from anamorph.replica.location import allowed_base, local_path, remote_path
from anamorph.wire.hub import HubReference
from anamorph.wire.objects import ObjectReference


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")
    return folder


def test_a_base_under_a_prefix_is_allowed(allowed: Path) -> None:
    """By path and by file URL; the prefix itself may be the base."""
    base = allowed / "base"
    assert allowed_base(str(base), [str(allowed)]) == base
    assert allowed_base(f"file://{base}", ["/nowhere", str(allowed)]) == base
    assert allowed_base(str(base), [str(base)]) == base


@pytest.mark.parametrize("prefixes", [[], ["/nowhere"]])
def test_no_matching_prefix_allows_nothing(allowed: Path, prefixes: list[str]) -> None:
    """An empty list is not "everything"."""
    with pytest.raises(BaseRefused):
        allowed_base(str(allowed / "base"), prefixes)


def test_a_prefix_ends_at_a_folder(allowed: Path, tmp_path: Path) -> None:
    """``/models`` does not allow ``/models-of-others``."""
    other = tmp_path / "models-of-others"
    other.mkdir()
    with pytest.raises(BaseRefused):
        allowed_base(str(other), [str(allowed)])


def test_dots_do_not_climb_out(allowed: Path, tmp_path: Path) -> None:
    """A path with ``..`` is refused, wherever it leads."""
    (tmp_path / "other").mkdir()
    for path in (f"{allowed}/../other", f"{allowed}/base/../base"):
        with pytest.raises(BaseRefused):
            allowed_base(path, [str(allowed)])


def test_a_linked_folder_counts_where_it_leads(allowed: Path, tmp_path: Path) -> None:
    """A link inside the prefix to a folder outside is outside."""
    (tmp_path / "other").mkdir()
    (allowed / "link").symlink_to(tmp_path / "other")
    with pytest.raises(BaseRefused):
        allowed_base(str(allowed / "link"), [str(allowed)])


def test_a_linked_file_counts_where_it_leads(allowed: Path, tmp_path: Path) -> None:
    """Shards that are links, as hub caches have them, must stay under the prefix too."""
    (allowed / "blob").write_bytes(b"weights")
    (allowed / "base" / "inside.safetensors").symlink_to(allowed / "blob")
    assert allowed_base(str(allowed / "base"), [str(allowed)])
    (tmp_path / "secret").write_bytes(b"")
    (allowed / "base" / "outside.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(BaseRefused):
        allowed_base(str(allowed / "base"), [str(allowed)])


@pytest.mark.parametrize("base", ["memory://base", "/nowhere/at/all"])
def test_what_is_no_folder_here_is_refused(base: str) -> None:
    """A missing folder and an object store are no bases."""
    with pytest.raises(BaseRefused):
        allowed_base(base, ["/"])


@pytest.mark.parametrize(
    ("base", "prefix"),
    [
        ("hf://HuggingFaceTB/SmolLM2-135M", "hf://HuggingFaceTB/"),
        ("hf://HuggingFaceTB/SmolLM2-135M@v1.0", "hf://HuggingFaceTB"),
        ("hf://HuggingFaceTB/SmolLM2-135M", "hf://HuggingFaceTB/SmolLM2-135M"),
        ("hf://HuggingFaceTB/SmolLM2-135M@v1.0", "hf://HuggingFaceTB/SmolLM2-135M@v1.0"),
    ],
)
def test_a_base_on_the_hub_goes_by_organisation_or_reference(base: str, prefix: str) -> None:
    """An organisation allows all its repositories, a reference itself; nothing is fetched to find out."""
    assert allowed_base(base, ["/nowhere", prefix]) == HubReference.parse(base)


@pytest.mark.parametrize(
    ("base", "prefix"),
    [
        ("hf://HuggingFaceTB-evil/SmolLM2", "hf://HuggingFaceTB"),
        ("hf://evil/HuggingFaceTB", "hf://HuggingFaceTB/"),
        ("hf://HuggingFaceTB/SmolLM2@other", "hf://HuggingFaceTB/SmolLM2"),
        ("hf://HuggingFaceTB/SmolLM2-long", "hf://HuggingFaceTB/SmolLM2"),
        ("hf://HuggingFaceTB/../evil/SmolLM2", "hf://HuggingFaceTB/"),
        ("hf://HuggingFaceTB/SmolLM2@refs/pr/1", "hf://HuggingFaceTB/"),
        ("HuggingFaceTB/SmolLM2", "hf://HuggingFaceTB/"),
        ("hf://HuggingFaceTB/SmolLM2", "hf://"),
        ("hf://HuggingFaceTB/SmolLM2", "/"),
        ("/", "hf://HuggingFaceTB/"),
    ],
)
def test_any_other_base_on_the_hub_is_refused(base: str, prefix: str) -> None:
    """Neither a longer name, another revision, dots nor a stranger's proposal passes."""
    with pytest.raises(BaseRefused):
        allowed_base(base, [prefix])


@pytest.mark.parametrize(
    ("base", "prefix"),
    [
        ("s3://models/llama/8b", "s3://models/llama/"),
        ("s3://models/llama/8b/", "s3://models/llama"),
        ("s3://models/llama/8b", "s3://models/llama/8b"),
        ("s3://models/llama/8b", "s3://models"),
        ("s3://models", "s3://models/"),
        ("gs://models/run=7/_step@100", "gs://models/run=7"),
    ],
)
def test_a_base_in_an_object_store_goes_by_whole_names(base: str, prefix: str) -> None:
    """A prefix is a bucket or a folder, and allows itself and what lies in it."""
    found = allowed_base(base, ["/nowhere", "hf://models/", prefix])
    assert found == ObjectReference.parse(base)
    assert str(found) == base.rstrip("/")


@pytest.mark.parametrize(
    ("base", "prefix"),
    [
        ("s3://b/models2", "s3://b/models"),
        ("s3://b/models2/x", "s3://b/models/"),
        ("s3://b2/models", "s3://b"),
        ("s3://b/x", "s3://b/x/y"),
        ("gs://b/models", "s3://b/models"),
        ("s3://b/models", "s3://"),
        ("s3://b/models", "/"),
        ("s3://b/models", "hf://b/"),
        ("/", "s3://b"),
        ("S3://b/models", "s3://b"),
        *(
            (f"s3://b/{path}", "s3://b")
            for path in ("../c", "models/../x", "./x", "a//b", "a/*", "a?versionId=1", "a b")
        ),
        *((f"s3://b/{path}", "s3://b") for path in ("a#b", "a\n", "x\u00e9", ".hidden", "a%2e%2e", "/x")),
        ("s3://[b/x", "s3://b"),
        ("s3://", "s3://"),
    ],
)
def test_any_other_base_in_an_object_store_is_refused(base: str, prefix: str) -> None:
    """Neither a longer name, another bucket or store, dots, patterns nor options pass."""
    with pytest.raises(BaseRefused):
        allowed_base(base, [prefix])


def test_credentials_in_a_base_are_refused_and_not_repeated() -> None:
    """The reason of a failure is kept by the key service: it must hold no password."""
    with pytest.raises(BaseRefused) as caught:
        allowed_base("s3://user:hunter2@bucket/models", ["s3://bucket"])
    assert "hunter2" not in str(caught.value)


def test_an_unknown_scheme_is_an_error_of_the_setup() -> None:
    """The message lists what would be right."""
    with pytest.raises(SetupError, match="file, gs, memory, s3"):
        local_path("ftp://host/x")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store whose file system is not installed says what to install."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SetupError, match="pip install gcsfs"):
        remote_path("gs://bucket/replicas")
