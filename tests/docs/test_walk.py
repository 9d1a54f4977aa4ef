"""The walk through the Kubernetes guide: what can be known of it without a cluster.

`make test-cluster` runs it on one. Here: shell syntax, commands and their options, objects, values.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import ValidationError
from tests.cluster.guide import FROM_ELSEWHERE, PAGE, Block, blocks, step, walk
from tests.cluster.shell import ScriptFailed, shell
from tests.servers.find import binary

from anamorph.cli.main import COMMANDS, load
from anamorph_keysvc.main import cli as keysvc_cli
from anamorph_operator.kubernetes.resources.definition import KINDS

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "anamorph"
Object = dict[str, Any]

DIGEST = f"sha256:{'0' * 64}"
ANSWERS = {
    "$(base uri)": "s3://bases/smol",
    "$(base digest)": DIGEST,
    "$(base vocab_size)": "49152",
    "$(base tokenizer_digest)": DIGEST,
    "$(base chat_template_digest)": DIGEST,
    "$tenant": "acme",
    "$REGISTRY": "registry.example.com/x",
    "$TAG": "0.1.0",
}
"""What the shell puts into the objects of the guide."""


def everything() -> list[Block]:
    """Blocks with commands, those of other chapters included."""
    return [one for one in blocks(PAGE.read_text()) if one.language in {"sh", "text"}]


def commands(text: str) -> Iterator[list[str]]:
    """Simple commands of a script, word by word; of a here-document nothing, of loops what they run."""
    text = re.sub(r"<<'?END'?(?P<rest>[^\n]*)\n.*?\nEND$", r"\g<rest>", text, flags=re.DOTALL | re.MULTILINE)
    lexer = shlex.shlex(
        text.replace("\\\n", " ").replace("\n", " ;\n"), posix=True, punctuation_chars="();<>|&"
    )
    lexer.whitespace_split, lexer.commenters = True, "#"
    found: list[str] = []
    for word in lexer:
        if set(word) <= set("();|&"):
            yield found
            found = []
        else:
            found.append(word)
    yield found


def calls(program: str) -> list[list[str]]:
    """Arguments of every call of a program, on the whole page."""
    found = []
    for block in everything():
        for words in commands(block.text):
            while words and (
                re.match(r"[A-Z0-9_]+=", words[0]) or words[0] in {"do", "then", "while", "until", "!"}
            ):
                words = words[1:]
            if words and words[0] == program:
                found.append(words[1:])
    return found


def without_redirections(words: list[str]) -> list[str]:
    cut = next((at for at, word in enumerate(words) if set(word) <= set("<>")), len(words))
    words = words[:cut]
    return words[:-1] if cut and words and words[-1] in {"1", "2"} else words


USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""What a command's parser raises; Typer has a copy of click's."""


def parse(command: Any, name: str, words: list[str]) -> None:
    """Hold the words against a command's own parser, which knows its options and counts its arguments.

    Raises:
        USAGE_ERROR: it would refuse them.
    """
    with command.make_context(name, list(words)) as context:
        if hasattr(command, "commands"):
            # Not invoked: a group leaves the rest to the command that it names.
            _, child, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            parse(child, child.name, rest)


def test_the_walk_is_numbered() -> None:
    """From an empty cluster to its end, each chapter with something to run."""
    titles = [one.title for one in walk()]
    assert titles[0] == "The cluster"
    assert titles[-1] == "Uninstall"
    assert {FROM_ELSEWHERE, "Encrypted models", "The first answer", "Rotate", "Revoke", "Delete"} < set(
        titles
    )
    assert all(one.script.strip() for one in walk())


def test_blocks_and_steps() -> None:
    """Only ``sh`` of numbered chapters is run, however the chapters lie."""
    page = "# T\n## 1. A\n```sh\na\n```\n```text\nb\n```\n### more\n```sh\nc\n```\n## Later\n```sh\nd\n```\n"
    [only] = walk(page)
    assert (only.number, only.title, only.script) == (1, "A", "a\n\nc\n")
    assert [one.line for one in blocks(page)] == [4, 7, 11, 15]


@pytest.mark.parametrize("page", ["## 1. A\n```sh\na\n```\n## 3. B\n```sh\nb\n```\n", "## 1. A\n```sh\na\n"])
def test_a_broken_page_is_refused(page: str) -> None:
    """A chapter that was taken out, a fence that was forgotten."""
    with pytest.raises(ValueError, match=r"numbered|does not end"):
        walk(page)


def test_a_step_that_is_not_there() -> None:
    """A test that names a chapter finds out when it is called otherwise."""
    with pytest.raises(LookupError, match="Uninstall"):
        step("Unknown")


@pytest.mark.parametrize("block", everything(), ids=lambda one: str(one.line))
def test_shell_can_read_it(block: Block) -> None:
    """Every block of the page has bash's syntax."""
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", calls("anamorph"), ids=" ".join)
def test_anamorph_knows_the_command(words: list[str]) -> None:
    """Command, options and number of arguments are those that there are."""
    name, *rest = without_redirections(words)
    assert name in COMMANDS
    parse(load(name), name, [sample(word) for word in rest])


@pytest.mark.real
@pytest.mark.parametrize("program", ["kubectl", "helm"])
def test_options_of_other_programs_exist(program: str) -> None:
    """Each subcommand is one, and knows each option that it is given, as its own help says."""
    for call in calls(program):
        words = call[: call.index("--")] if "--" in call else call
        options = [word.partition("=")[0] for word in words if re.match(r"-{1,2}[a-z]", word)]
        known = help_of(program, subcommand(words))
        assert [one for one in options if one not in known] == [], words


NESTED = ("create secret generic", "create namespace", "rollout status", "rollout restart", "get values")


def subcommand(words: list[str]) -> tuple[str, ...]:
    """Its name: one word, or as many as a nested one has."""
    plain = words[2:] if words[0] == "-n" else words
    nested = (tuple(name.split()) for name in NESTED)
    return next((name for name in nested if tuple(plain[: len(name)]) == name), (plain[0],))


@cache
def help_of(program: str, name: tuple[str, ...]) -> set[str]:
    """Options that a subcommand has, those of all subcommands included."""
    path = str(binary(program))
    shown = [subprocess.run([path, *name, "--help"], capture_output=True, text=True, check=True).stdout]
    assert f"{program} {' '.join(name)}" in shown[0], f"{program} has no {' '.join(name)}"
    if program == "kubectl":
        shown.append(subprocess.run([path, "options"], capture_output=True, text=True, check=True).stdout)
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", "\n".join(shown)))


def test_commands_in_text_exist() -> None:
    """Those that a sentence names in code, without their arguments."""
    text = re.sub(r"^```.*?^```$", "", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    named = [one.split() for one in re.findall(r"`(anamorph(?:-keysvc)? [^`]+)`", text)]
    assert len(named) > 5
    for program, *words in named:
        command: Any = load(words.pop(0)) if program == "anamorph" else typer.main.get_command(keysvc_cli)
        while words and hasattr(command, "commands"):
            name = words.pop(0)
            assert name in command.commands, (program, name)
            command = command.commands[name]


def test_a_command_that_is_not_there_is_noticed() -> None:
    """So that the tests above say something."""
    assert {words[0] for words in calls("anamorph")} == {"tenant", "base", "proxy", "key", "audit-log"}
    assert len(calls("kubectl")) > 40
    assert len(calls("helm")) > 10
    for words in (["rotate", "acme", "smol", "--hurry"], ["turn", "acme"], ["rotate", "acme"]):
        with pytest.raises(USAGE_ERROR):
            parse(load("key"), "key", words)


def sample(word: str) -> str:
    """A word as the shell would hand it on."""
    word = re.sub(r"^\$WORK\b", "/tmp", word)
    for asked, answer in ANSWERS.items():
        word = word.replace(asked, answer)
    return re.sub(r"\$[A-Z_]+\b", sys.executable, word)


def objects(block: Block) -> list[Object]:
    """Objects and values in a block's here-documents, as the shell would write them."""
    found = re.findall(r"<<END\n(.*?)\nEND$", block.text, re.DOTALL | re.MULTILINE)
    texts = []
    for text in found:
        for asked, answer in ANSWERS.items():
            text = text.replace(asked, answer)
        assert "$" not in text, text
        texts.append(yaml.safe_load(text))
    return texts


ALL = [(block, one) for block in everything() for one in objects(block)]


def test_objects_are_what_the_operator_reads() -> None:
    """Every custom resource of the page is valid, and there is one."""
    models = {kind.name: kind.spec for kind in KINDS}
    ours = [one for _, one in ALL if one.get("apiVersion") == "anamorph.dev/v1alpha1"]
    assert [one["kind"] for one in ours] == ["EncryptedModel"]
    for one in ours:
        models[one["kind"]].model_validate(one["spec"])
        with pytest.raises(ValidationError):
            models[one["kind"]].model_validate({**one["spec"], "surplus": 1})


def test_patches_are_of_the_resource() -> None:
    """What is patched into a model is valid there."""
    [model] = [one for _, one in ALL if one.get("kind") == "EncryptedModel"]
    patches = [words[words.index("-p") + 1] for words in calls("kubectl") if "-p" in words]
    assert len(patches) >= 3
    for text in patches:
        KINDS[0].spec.model_validate(merged(model["spec"], json.loads(text)["spec"]))


def merged(into: Object, patch: Object) -> Object:
    """As `kubectl patch --type=merge` does it."""
    both = {
        key: merged(into[key], value) if isinstance(into.get(key), dict) else value
        for key, value in patch.items()
    }
    return {**into, **both}


def place(values: Object, path: str) -> Any:
    for name in path.split("."):
        assert isinstance(values, dict), path
        assert name in values, f"{path}: the chart has no such value"
        values = values[name]
    return values


def schema_at(schema: Object, path: str) -> Object:
    for name in path.split("."):
        assert name in schema.get("properties", {}), f"{path}: the chart's schema has no such value"
        schema = schema["properties"][name]
    return schema


@pytest.fixture(scope="module")
def schema() -> Object:
    read: Object = json.loads((CHART / "values.schema.json").read_text())
    return read


def test_values_that_are_set_exist(schema: Object) -> None:
    """Each ``--set`` of the page names a value of the chart."""
    found = [
        setting.partition("=")[0]
        for words in calls("helm")
        for option, setting in pairwise(words)
        if option in {"--set", "--set-json"}
    ]
    assert "servingCluster.spec.publicUrl" in found
    for path in found:
        schema_at(schema, path)


def test_values_in_text_exist(schema: Object) -> None:
    """Each value that a sentence names in code, such as `keysvc.replicas`, is one."""
    heads = "|".join(schema["properties"])
    text = re.sub(r"^```.*?^```$", "", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = set(re.findall(rf"`((?:{heads})(?:\.[\w*]+)+)`", text))
    named = {one for one in found if not one.endswith(".yaml")}
    assert len(named) > 15
    for path in named:
        known = [one for one in paths(schema) if re.fullmatch(re.escape(path).replace(r"\*", r"[^.]+"), one)]
        assert known, path


def paths(schema: Object, prefix: str = "") -> Iterator[str]:
    for name, child in schema.get("properties", {}).items():
        yield f"{prefix}{name}"
        yield from paths(child, f"{prefix}{name}.")


def test_values_files_are_valid(tmp_path: Path) -> None:
    """The production values of the page install, as does what the walk writes."""
    from tests.helm.chart import EVALUATION, KUBERNETES, helm

    shown = [yaml.safe_load(one.text) for one in blocks(PAGE.read_text()) if one.language == "yaml"]
    [production] = [one for one in shown if "keysvc" in one]
    [images] = [one for _, one in ALL if "images" in one]
    (tmp_path / "production.yaml").write_text(yaml.safe_dump(production))
    (tmp_path / "images.yaml").write_text(yaml.safe_dump(images))
    common: list[str | Path] = ["template", "anamorph", CHART, "-n", "anamorph", "--kube-version", KUBERNETES]
    common += ["--set", "networkPolicies.apiServer.cidrs={10.0.0.1/32}"]
    made = helm(*common, "-f", tmp_path / "production.yaml")
    assert "registry.example.com/anamorph/anamorph-keysvc:0.1.0" in made
    url = "servingCluster.spec.publicUrl=https://127.0.0.1:8000"
    made = helm(*common, "-f", EVALUATION, "-f", tmp_path / "images.yaml", "--set", url)
    assert "publicUrl: https://127.0.0.1:8000" in made
    names = {one["metadata"]["name"] for one in yaml.safe_load_all(made) if one}
    used = {
        "anamorph-bootstrap",
        "anamorph-ca",
        "anamorph-keysvc",
        "anamorph-operator",
        "anamorph-objectstore",
    }
    assert names >= used | {"anamorph-store-uploader", "main"}


def test_shell_keeps_what_a_script_leaves(tmp_path: Path) -> None:
    """Exports, functions and the background are there for the next script; all of it ends with the block."""
    with shell(tmp_path, os.environ) as bash:
        assert bash.run('export A=1\nf() { echo "f $A"; }\nsleep 600 & echo $!', 10).strip().isdigit()
        pid = int(bash.run("echo $!", 10))
        assert bash.run("f; pwd", 10) == f"f 1\n{tmp_path}\n"
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


@pytest.mark.parametrize(
    ("script", "says"), [("echo before\nfalse\necho after", "ended with 1"), ("sleep 60", "not ended")]
)
def test_shell_says_what_failed(tmp_path: Path, script: str, says: str) -> None:
    """Nothing after the first command that fails is run, neither there nor later."""
    with shell(tmp_path, os.environ) as bash:
        with pytest.raises(ScriptFailed, match=says) as failed:
            bash.run(script, 1)
        assert "after\n" not in str(failed.value).partition("printed")[2]
