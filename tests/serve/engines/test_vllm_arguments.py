"""What vLLM is told, and what is refused before it is asked; vLLM itself is not needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from safetensors.numpy import save_file

from anamorph.errors import SetupError, Unavailable, UnsupportedOption
from anamorph.serve.applications.engine import deployment
from anamorph.serve.engines.base import Sampling
from anamorph.serve.engines.folder import eos_ids, read, refuse_code, refuse_decoding_rules
from anamorph.serve.engines.vllm import plugin
from anamorph.serve.engines.vllm.arguments import arguments, environment
from anamorph.serve.engines.vllm.engine import engine_of, load
from anamorph.wire.serving import EngineSettings

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 4096,
    "dtype": "float32",
    "eos_token_id": 5,
}
PARENT = """
import multiprocessing, os, time

def child(ready):
    from anamorph.serve.engines.vllm.plugin import end_with_parent
    end_with_parent()
    ready.set()
    time.sleep(600)

context = multiprocessing.get_context("fork")
ready = context.Event()
started = context.Process(target=child, args=(ready,))
started.start()
ready.wait()
print(started.pid, flush=True)
time.sleep(600)
"""
CHANGED = "generation_config.json"


def settings(**changes: Any) -> EngineSettings:
    fields = {"tenant": "acme", "model": "smol", "version": 1, "replica": "unused", "engine": "vllm"}
    return EngineSettings.model_validate({**fields, "context_length": 2048, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file({"w": np.zeros(2, np.float16)}, tmp_path / "model.safetensors")
    return tmp_path


def told(folder: Path, **changes: Any) -> dict[str, Any]:
    return arguments(folder, read(folder, "config.json"), settings(**changes))


def test_nothing_is_read_that_the_compute_zone_must_not_have(folder: Path) -> None:
    """No tokenizer, no code, no pickles, no rules of the folder, no log of requests."""
    chosen = told(folder)
    assert (chosen["skip_tokenizer_init"], chosen["trust_remote_code"]) == (True, False)
    assert (chosen["load_format"], chosen["generation_config"]) == ("safetensors", "vllm")
    assert not chosen["enable_log_requests"]


def test_an_environment_without_vllm_says_what_to_install(folder: Path) -> None:
    """The extra is optional: this very environment has none."""
    with pytest.raises(SetupError, match=r"anamorph\[vllm\]"):
        load(folder, settings())


def test_float32_stays_float32(folder: Path) -> None:
    """``auto`` is the stored type; vLLM's own would make float32 narrower."""
    assert told(folder)["dtype"] == "float32"
    assert told(folder, dtype="bfloat16")["dtype"] == "bfloat16"
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "dtype"}))
    assert told(folder)["dtype"] == "float16"


def test_the_context_fits_model_and_cache(folder: Path) -> None:
    """The smallest of what is asked for, what the model can and what the cache holds."""
    assert told(folder)["max_model_len"] == 2048
    assert told(folder, context_length=9000)["max_model_len"] == 4096
    assert told(folder, num_blocks=11)["max_model_len"] == 320


@pytest.mark.parametrize(
    ("ranks", "name"),
    [({"tensor_parallel": 2}, "num_attention_heads 9"), ({"tensor_parallel": 9}, "num_key_value_heads 3")],
)
def test_ranks_that_do_not_divide_the_heads_are_refused(
    folder: Path, ranks: dict[str, int], name: str
) -> None:
    """The message names the size; vLLM would copy key and value heads instead."""
    with pytest.raises(UnsupportedOption, match=name):
        told(folder, **ranks)


def test_several_ranks_run_under_ray_on_gpus_only(folder: Path) -> None:
    """vLLM's own processes on the CPU, Ray's executor on GPUs, one process for one rank."""
    assert told(folder)["distributed_executor_backend"] is None
    assert told(folder, tensor_parallel=3)["distributed_executor_backend"] == "mp"
    assert told(folder, pipeline_parallel=2, num_gpus=1)["distributed_executor_backend"] == "ray"
    stages = told(folder, pipeline_parallel=2)  # on a CPU they must have run once before the first request
    assert ("enforce_eager" in stages, stages["compilation_config"]["backend"]) == (False, "eager")
    with pytest.raises(SetupError, match="num_gpus"):
        told(folder, tensor_parallel=3, num_gpus=0.5)


def test_ray_places_ranks_on_gpus_and_leaves_the_devices_to_vllm() -> None:
    """One bundle per rank, none of them the replica's; on the CPU vLLM's ranks are its own processes."""
    chosen = deployment(settings(tensor_parallel=2, num_gpus=1))
    assert chosen._replica_config.placement_group_bundles == [{"CPU": 1.0, "GPU": 1.0}] * 2
    assert chosen.ray_actor_options["num_gpus"] == 0
    alone = deployment(settings(num_gpus=0.5))
    assert alone._replica_config.placement_group_bundles is None
    assert alone.ray_actor_options["num_gpus"] == 0.5
    assert deployment(settings(tensor_parallel=2))._replica_config.placement_group_bundles is None


def test_a_share_of_a_gpu_is_a_share_of_its_memory(folder: Path) -> None:
    """Two engines that Ray places on one device do not both take all of it."""
    assert told(folder, num_gpus=0.5)["gpu_memory_utilization"] == pytest.approx(0.45)
    assert "kv_cache_memory_bytes" not in told(folder, num_gpus=1)


def test_threads_are_divided_among_ranks() -> None:
    """Two ranks of four threads take two each; network, statistics and others' plugins are off."""
    chosen = environment(settings(tensor_parallel=2), 4)
    assert chosen["OMP_NUM_THREADS"] == "2"
    assert (chosen["HF_HUB_OFFLINE"], chosen["VLLM_NO_USAGE_STATS"]) == ("1", "1")
    assert chosen["VLLM_PLUGINS"] == "anamorph"
    log = json.loads(Path(chosen["VLLM_LOGGING_CONFIG_PATH"]).read_text())
    assert log["loggers"]["vllm.logging_utils.dump_input"]["level"] > 50  # over CRITICAL: says nothing


@pytest.mark.parametrize(("deadline", "step"), [(300, 100), (40, 13), (2, 1)])
def test_a_rank_that_hangs_ends_a_step_before_the_request(folder: Path, deadline: float, step: int) -> None:
    """A third of the deadline; without it vLLM waits five minutes, and its collectives longer still."""
    asked = {"tensor_parallel": 3, "request_timeout_s": deadline}
    assert environment(settings(**asked), None)["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] == str(step)
    # Ranks that load wait for each other as long: no deadline of a request may end that.
    waits = {told(folder, **asked)[f"{kind}distributed_timeout_seconds"] for kind in ("", "cpu_")}
    assert waits == {max(60, step)}


class Started:
    """Stands for vLLM's ``AsyncLLM``, which is not here: takes down what it is asked, answers nothing."""

    def __init__(self) -> None:
        self.logger_manager = SimpleNamespace(stat_loggers=[None])
        self.salts: list[str | None] = []

    async def generate(self, prompt: Any, *_: Any) -> AsyncGenerator[Any, None]:
        self.salts.append(prompt["cache_salt"])
        return
        yield


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two functions of vLLM that a request goes through."""
    inputs, params = ModuleType("vllm.inputs.engine"), ModuleType("vllm.sampling_params")
    inputs.__dict__["tokens_input"] = lambda ids, cache_salt: {"ids": ids, "cache_salt": cache_salt}
    params.__dict__.update(SamplingParams=dict, RequestOutputKind=SimpleNamespace(DELTA=1))
    for module in (ModuleType("vllm"), ModuleType("vllm.inputs"), inputs, params):
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("key_id", ["acme.smol.v1.0123456789abcdef", "globex.smol.v1.0123456789abcdef", None])
async def test_every_request_is_salted_with_the_key_id(folder: Path, key_id: str | None) -> None:
    """Of the application's settings; the plaintext baseline has none."""
    started = Started()
    engine = engine_of(started, folder, settings(key_id=key_id))
    with pytest.raises(Unavailable):  # no token came
        await anext(engine.submit([1, 2], Sampling(max_tokens=1)))
    assert started.salts == [key_id]


def test_a_child_ends_with_its_parent() -> None:
    """What vLLM loads in its own processes: killed, a replica leaves none of them behind."""
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert psutil.wait_procs([child], timeout=20)[1] == []


def test_end_of_text_is_generation_configs_then_configs(folder: Path) -> None:
    """As transformers reads them."""
    assert eos_ids(folder) == {5}
    (folder / CHANGED).write_text('{"eos_token_id": [7, 8]}')
    assert eos_ids(folder) == {7, 8}


@pytest.mark.parametrize(
    "rule", [{"repetition_penalty": 1.2}, {"suppress_tokens": [3]}, {"num_beams": 4}, {"min_new_tokens": 5}]
)
def test_decoding_rules_that_would_be_ignored_are_refused(folder: Path, rule: dict[str, Any]) -> None:
    """By name; neutral values and sampling defaults are no rules."""
    (folder / CHANGED).write_text('{"repetition_penalty": 1.0, "num_beams": 1, "temperature": 0.3}')
    refuse_decoding_rules(folder)
    (folder / CHANGED).write_text(json.dumps(rule))
    with pytest.raises(UnsupportedOption, match=next(iter(rule))):
        refuse_decoding_rules(folder)


def test_folders_that_name_code_are_refused(folder: Path) -> None:
    """``auto_map`` in either file."""
    refuse_code(folder)
    (folder / CHANGED).write_text('{"auto_map": {"AutoConfig": "here.Config"}}')
    with pytest.raises(UnsupportedOption, match="auto_map"):
        refuse_code(folder)


def test_an_installation_without_the_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself would only log it, and its processes outlive a replica that is killed."""
    plugin.check_installed()
    monkeypatch.setattr(plugin, "NAME", "renamed since")
    with pytest.raises(SetupError, match="install anamorph again"):
        plugin.check_installed()
