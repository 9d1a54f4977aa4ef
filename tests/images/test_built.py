"""What the built images really hold, and that each starts as Kubernetes would start it.

``make images test-images``: ANAMORPH_TEST_IMAGES names the images, with ``{}`` where the role stands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.images import container, walk
from tests.images.conftest import IMAGES, ROOT
from tests.images.container import Container

import anamorph
import part

NAMES = os.environ.get("ANAMORPH_TEST_IMAGES", "")
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "ld", "make", "rustc", "cargo")
TOKENIZERS = ("tokenizer*.json", "vocab.json", "merges.txt", "*.tiktoken", "spiece.model", "*.gguf")
RAY = [("wget --version", 0, "GNU Wget"), ("bash -c 'ray --version'", 0, "2.60.0")]
COMMANDS = {
    "keysvc": [("anamorph-keysvc init --home /tmp/home", 0, "ready")],
    "operator": [("anamorph canary watch --help", 0, "--serve-url")],
    "materializer": [
        ("anamorph materialize", 2, "the order on standard input is malformed"),
        ("anamorph key rotate", 2, "No such command"),
    ],
    "compute": RAY,
    "compute-vllm": RAY,
    "client": [("anamorph proxy --help", 0, "--port"), ("anamorph --version", 0, anamorph.__version__)],
}
"""Of each image: a command, its exit status, and what it prints."""
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not NAMES, reason="needs built images: make images test-images"),
]


@pytest.fixture(scope="module", params=sorted(IMAGES))
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def image(name: str) -> Iterator[Container]:
    if os.geteuid() != 0 or not shutil.which("buildah"):
        pytest.fail("images are mounted by buildah, as root")
    if name == "compute-vllm" and not container.exists(NAMES.format(name)):
        pytest.skip("needs vLLM's image: make images IMAGES=compute-vllm")
    with container.opened(NAMES.format(name)) as opened:
        yield opened


def found(image: Container, *patterns: str) -> list[str]:
    """Files of the image's own, below what the base brings, by name."""
    place = image.root / "opt"
    return [str(path.relative_to(place)) for pattern in patterns for path in place.rglob(pattern)]


def test_our_packages_are_those_of_the_table(name: str, image: Container) -> None:
    """Every file of ours is one that the table names, and all of them are there, unchanged."""
    ours = {path for package in part.FOLDERS for path in (image.site / package).rglob("*") if path.is_file()}
    held = {
        path.relative_to(image.site).as_posix(): path.read_bytes() for path in ours if path.suffix != ".pyc"
    }
    wanted = {target.as_posix(): source.read_bytes() for source, target in part.files(IMAGES[name])}
    assert held.keys() == wanted.keys()
    assert held == wanted


def test_libraries_are_those_of_the_constraints(name: str, image: Container) -> None:
    """Each library has the version that the constraints say, and none is there that must not be."""
    files = [ROOT / f"constraints{suffix}.txt" for suffix in (("-vllm", "") if "vllm" in name else ("",))]
    lines = [line for file in reversed(files) for line in file.read_text().split() if "==" in line]
    wanted = dict(line.split("==") for line in lines) | {"anamorph": image.installed["anamorph"]}
    differing = {
        library: version
        for library, version in image.installed.items()
        if version.partition("+")[0] != wanted.get(library, "").partition("+")[0]
    }
    assert differing == {}
    assert image.installed.keys() & set(IMAGES[name].without) == set()
    assert [one for one in IMAGES[name].without if (image.site / one).exists()] == []


def test_it_is_nobody(image: Container) -> None:
    """The user is not root, and can change nothing that the image holds."""
    assert image.settings["User"] == container.USER
    entries = [path for path in (image.root / "opt").rglob("*") if not path.is_symlink()]
    states = [path.stat() for path in entries]
    assert entries
    assert {(state.st_uid, state.st_gid) for state in states} == {(0, 0)}
    assert not any(state.st_mode & stat.S_IWOTH for state in states)


def test_no_way_to_build_or_install(image: Container) -> None:
    """No compiler anywhere, no pip beside the libraries, no cache of it."""
    places = [image.root / place for place in ("bin", "usr/bin", "usr/local/bin")]
    programs = {path.name for place in places for path in place.iterdir()}
    assert set(COMPILERS) & programs == set()
    assert {"pip", "setuptools", "hatchling", "wheel"} & image.installed.keys() == set()
    assert [place for place in ("root/.cache", "tmp/.cache", "build") if (image.root / place).exists()] == []
    assert list((image.root / "tmp").iterdir()) == []


def test_no_tokenizer_and_no_weights(name: str, image: Container) -> None:
    """Nothing of any model is in an image, least of all what turns ids into text."""
    assert found(image, *WEIGHTS) == []
    assert IMAGES[name].zone != "compute" or found(image, *TOKENIZERS) == []


def test_labels(image: Container) -> None:
    """An image says what it is and of which commit."""
    labels = {key.rpartition(".")[2]: value for key, value in image.settings["Labels"].items()}
    assert labels["version"] == image.installed["anamorph"]
    assert labels["licenses"] == "Apache-2.0"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", labels["revision"])


def test_no_setting_is_a_secret(image: Container) -> None:
    """The environment of an image names paths and switches; nothing of who built it."""
    names = [setting.partition("=")[0] for setting in image.settings["Env"]]
    strange = r"KEY|TOKEN|SECRET|PASSWORD|PIP|PROXY|CERT"
    assert [name for name in names if re.search(strange, name, re.IGNORECASE)] == []


def test_entry_point_starts(image: Container) -> None:
    """With a root file system that cannot be written, as the image's own user."""
    started = image.run(*image.settings["Entrypoint"], *image.settings["Cmd"])
    assert started.returncode == 0, started.stderr
    assert "Usage:" in started.stdout


def test_root_cannot_be_written(image: Container) -> None:
    """What the other tests of this file start has a read-only root, and /tmp as its home."""
    script = "id -u; echo $HOME; touch /tmp/yes && echo yes; touch /opt/anamorph/no || echo refused"
    assert image.run("sh", "-c", script).stdout.split() == ["65532", "/tmp", "yes", "refused"]


def test_every_module_can_be_imported(name: str, image: Container) -> None:
    """In the image itself, what its modules need is there, and no more of ours is loaded than it holds."""
    code = Path(walk.__file__).read_text()
    site = f"/{image.site.relative_to(image.root)}"
    done = image.run("python", "-", site, stdin=code)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["version"] == image.installed["anamorph"]
    assert all(Path(file).is_relative_to(site) for file in answer["modules"].values())
    assert set(answer["loaded"]) & set(IMAGES[name].without) == set()


def test_commands(name: str, image: Container) -> None:
    """What the chart and KubeRay start; the key service's migrations are there and work."""
    for command, status, says in COMMANDS[name]:
        done = image.run("sh", "-c", command)
        assert (done.returncode, says in done.stdout + done.stderr) == (status, True), done.stderr
