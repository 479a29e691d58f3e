"""Settings of the server and of the engine; every default lives here and nowhere else.

"Auto" values (None) are resolved when the engine starts, from the model and the machine, and are
reported in its notes.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from compressor.errors import UsageError

DTYPES = ("auto", "float32", "bfloat16", "float16")
CPU_ACTIVATIONS = ("auto", "int8", "float")
# What a person may write -> the name used here; the long ones are those of vLLM.
KV_CACHE_DTYPES = {
    "auto": "auto", "fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8",
    "int8": "int8", "int4": "int4", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16",
    "fp8_e4m3": "fp8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Everything `compress serve` can be told.

    Attributes:
        host: address to listen on; an address that others can reach needs `api_key`.
        api_key: when set, every route but `/health`, `/livez` and `/readyz` needs it.
        served_model_name: name in `/v1/models`; None takes the folder's name.
        max_model_len: longest prompt plus output, in tokens; None takes the model's own limit.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens per step, decode and prefill together; None is 256 on a
            CPU and 2048 on a GPU (a larger chunk makes the others wait longer for a token).
        kv_cache_bytes: size of the key-value pool; None takes a share of the free memory.
        kv_cache_dtype: how keys and values are kept (kv_format.py): "fp8", "int8" and "int4" take
            a half or a quarter of the bytes of "bf16"; "auto" follows the artifact, then the model.
        num_blocks: size of the pool in blocks; wins over `kv_cache_bytes`.
        block_size: tokens per block.
        prefix_cache: reuse the blocks of prompts that start alike.
        max_queue: sequences that may wait; above it a request gets 429.
        max_body_bytes: largest request body; above it 413.
        body_timeout_s: longest time a client may take to send its body.
        drain_timeout_s: how long running requests may go on after SIGTERM.
        stream_buffer: chunks a slow reader may leave unread before it is cut off.
        stall_timeout_s: `/health` fails when one step takes longer than this.
        strict_api: unknown request fields get 400 instead of a warning header.
        verify: check digests of the artifact before loading it.
        self_check: compare paged attention with plain attention on this model before serving.
        cuda_graphs: on a GPU, record decode steps once and replay them (graphs.py).
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto", "cpu" or "cuda".
        cpu_activations: "int8" lets the C kernels of a CPU round the inputs of packed linears to
            eight bits, 32 at a time; "float" keeps them exact, at half the speed; "auto" rounds
            only where the weights have at most 4 bits.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    served_model_name: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    num_blocks: int | None = None
    block_size: int = 16
    prefix_cache: bool = True
    max_queue: int = 256
    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0
    stream_buffer: int = 256
    stall_timeout_s: float = 120.0
    strict_api: bool = False
    verify: bool = True
    self_check: bool = True
    cuda_graphs: bool = True
    dtype: str = "auto"
    device: str = "auto"
    cpu_activations: str = "auto"

    def __post_init__(self) -> None:
        at_least_one = (
            "max_num_seqs", "block_size", "max_body_bytes", "stream_buffer",
            "max_model_len", "max_num_batched_tokens", "kv_cache_bytes", "num_blocks",
        )  # fmt: skip
        for name in at_least_one:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1", code="SV33")
        for name in ("max_queue", "port"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative", code="SV33")
        choices = {
            "dtype": DTYPES, "cpu_activations": CPU_ACTIVATIONS, "kv_cache_dtype": KV_CACHE_DTYPES
        }  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(
                    f"{name} {getattr(self, name)!r} is none of {', '.join(known)}", code="SV33"
                )
        if self.token_budget("cuda") < self.max_num_seqs:
            raise UsageError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below "
                f"max_num_seqs ({self.max_num_seqs})",
                code="SV33",
                why="each running sequence takes one token of every step.",
                fix="raise max_num_batched_tokens or lower max_num_seqs.",
            )
        if not self.api_key and not is_loopback(self.host):
            raise UsageError(
                f"{self.host} can be reached by others, and no API key is set",
                code="SV33",
                why="anyone on the network could use this model.",
                fix="set --api-key, or listen on 127.0.0.1.",
            )

    def token_budget(self, device_type: str) -> int:
        """Tokens per step on this kind of device."""
        auto = 2048 if device_type == "cuda" else 256
        return self.max_num_batched_tokens or max(auto, self.max_num_seqs)


def is_loopback(host: str) -> bool:
    """True when only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
