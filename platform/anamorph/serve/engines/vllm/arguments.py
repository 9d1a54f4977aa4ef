"""What stock vLLM is told when it starts: arguments and environment of one application."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from anamorph.errors import SetupError
from anamorph.serve.engines.ranks.layout import Layout, check_layout
from anamorph.serve.engines.vllm import plugin
from anamorph.wire.serving import EngineSettings

PAGE = 32  # tokens per block of the cache, as in the torch engine
# vLLM's share of a device, or of the part of it that Ray reserves.
_GPU_SHARE = 0.9
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Ranks wait for each other as long while they load, and one may read its slices more slowly.
_LOADING_S = 60
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# As good as eager, but the model runs once before the first request. Without that, in vLLM 0.32 on the CPU,
# stages after the first have no room for what they receive, and the first request fails.
_TRACED = {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}
# Read by vLLM when it is imported, and by the processes that it starts.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # Plugins are code of whatever else is installed: none but ours, which ends orphans.
    "VLLM_PLUGINS": plugin.NAME,
    # A fork of a process with threads may hang.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Warnings and errors only, and never the dump of a failed step: it quotes requests' options.
    "VLLM_LOGGING_CONFIG_PATH": str(Path(__file__).with_name("logging.json")),
    # Binding would put every engine of a machine on the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def environment(settings: EngineSettings, threads: int | None) -> dict[str, str]:
    """Environment variables; ``threads`` are for arithmetic on the CPU, all ranks together."""
    # A whole step, hence also every collective in it; vLLM's own five minutes are no request's time.
    chosen = {**_ENVIRONMENT, "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(step_s(settings))}
    if threads is None:
        return chosen
    return {**chosen, "OMP_NUM_THREADS": str(max(1, threads // Layout.of(settings).ranks))}


def step_s(settings: EngineSettings) -> int:
    """Longest step of several ranks, in whole seconds: a rank that hangs is one that takes longer.

    It leaves a request time to hear of it. Longer than a collective of the torch engine: a step is
    all the arithmetic of a batch.
    """
    return max(1, int(settings.request_timeout_s / 3))


def arguments(folder: Path, config: Mapping[str, Any], settings: EngineSettings) -> dict[str, Any]:
    """``AsyncEngineArgs`` of one application.

    Args:
        folder: whose safetensors say the type where ``config`` does not.
        config: of config.json.
        settings: of the application.

    Raises:
        UnsupportedOption: ranks that the model cannot be split into.
        SetupError: shares of GPUs for several ranks, or a stored type that is none of float32,
            bfloat16 and float16.
    """
    dtype = _dtype(folder, config, settings)
    return {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        "load_format": "safetensors",
        "generation_config": "vllm",
        "dtype": dtype,
        "max_model_len": context_length(config, settings),
        "block_size": PAGE,
        "num_gpu_blocks_override": settings.num_blocks,
        "max_num_seqs": settings.max_concurrent,
        "max_num_batched_tokens": max(settings.max_batch_tokens, settings.max_concurrent),
        "enable_prefix_caching": True,
        "enable_log_requests": False,
        "disable_log_stats": True,
        **_ranks(config, settings),
        **_device(config, settings, dtype),
    }


def _dtype(folder: Path, config: Mapping[str, Any], settings: EngineSettings) -> str:
    """The type to compute in; vLLM's own ``auto`` would make float32 narrower."""
    if settings.dtype != "auto":
        return settings.dtype
    named = config.get("dtype", config.get("torch_dtype"))
    if named in _BYTES:
        return str(named)
    first = min(folder.glob("*.safetensors"), default=None)
    if first is None:
        raise SetupError("the folder holds no safetensors")
    with safe_open(first, framework="np") as tensors:
        stored = tensors.get_slice(next(iter(tensors.keys()))).get_dtype()
    if stored not in _STORED:
        raise SetupError(f"weights are stored as {stored}: name the type to compute in")
    return _STORED[stored]


def context_length(config: Mapping[str, Any], settings: EngineSettings) -> int:
    """Ids of prompt and answer together: what is asked for, the cache holds and the model can."""
    # One block of the cache stays empty, in vLLM as in the torch engine.
    fits = min(settings.context_length, (settings.num_blocks - 1) * PAGE)
    return min(fits, int(config.get("max_position_embeddings", fits)))


def _ranks(config: Mapping[str, Any], settings: EngineSettings) -> dict[str, Any]:
    layout = Layout.of(settings)
    check_layout(config, layout, settings.num_gpus)
    several = "ray" if settings.num_gpus else "mp"
    wait_s = max(_LOADING_S, step_s(settings))
    return {
        "tensor_parallel_size": layout.tensor,
        "pipeline_parallel_size": layout.pipeline,
        "distributed_executor_backend": several if layout.ranks > 1 else None,
        "distributed_timeout_seconds": wait_s,
        "cpu_distributed_timeout_seconds": wait_s,
    }


def _device(config: Mapping[str, Any], settings: EngineSettings, dtype: str) -> dict[str, Any]:
    if settings.num_gpus:
        return {"gpu_memory_utilization": _GPU_SHARE * min(1.0, settings.num_gpus)}
    # On the CPU vLLM would reserve a share of all memory before it counts blocks; and its
    # compiler takes longer than a test engine's whole life.
    eager = {"enforce_eager": True} if settings.pipeline_parallel == 1 else {"compilation_config": _TRACED}
    return {**eager, "kv_cache_memory_bytes": _cache_bytes(config, settings, dtype)}


def _cache_bytes(config: Mapping[str, Any], settings: EngineSettings, dtype: str) -> int:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    per_token = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width
    return int(settings.num_blocks * PAGE * per_token * _BYTES[dtype])
