"""`compress serve | generate | bench`: run a model or an artifact.

Flags that are not given are not passed on, so that every default stays in `ServeOptions`,
`SamplingParams` and `BenchOptions`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli import flags
from compressor.errors import UsageError, VerificationError, Where

if TYPE_CHECKING:
    from compressor.serve.options import ServeOptions

Given = dict[str, Any]
Folder = Annotated[str, typer.Argument(help="Folder of a model or an artifact, or a hub id.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="COMPRESS_API_KEY", help="Key that requests must carry.")
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt plus output, in tokens.")]
NumBlocks = Annotated[int | None, typer.Option(help="Blocks of the key-value pool.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda.")]
CpuActivations = Annotated[
    str | None, typer.Option(help="Inputs of packed linears on a CPU: auto, int8 or float.")
]
KvCacheDtype = Annotated[
    str | None,
    typer.Option(help="Keys and values as auto, fp32, bf16, fp16, fp8, int8 or int4."),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option("--cuda-graphs/--no-cuda-graphs", help="Record decode steps on a GPU."),
]
Verify = Annotated[
    bool | None, typer.Option("--verify/--no-verify", help="Check digests before loading.")
]


def serve(
    path: Folder,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    api_key: ApiKey = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name in /v1/models.")] = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="Sequences at once.")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="Tokens a step.")] = None,
    num_blocks: NumBlocks = None,
    kv_cache: Annotated[str | None, typer.Option(help="Key-value pool, as in 2GiB.")] = None,
    max_queue: Annotated[int | None, typer.Option(help="Sequences that may wait.")] = None,
    kv_cache_dtype: KvCacheDtype = None,
    cuda_graphs: CudaGraphs = None,
    prefix_cache: Annotated[bool | None, typer.Option("--prefix-cache/--no-prefix-cache")] = None,
    strict_api: Annotated[bool | None, typer.Option("--strict-api/--no-strict-api")] = None,
    drain_timeout: Annotated[float | None, typer.Option(help="Seconds after SIGTERM.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    cpu_activations: CpuActivations = None,
    verify: Verify = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Check the model and exit.")] = False,
    as_json: flags.AsJson = False,
) -> None:
    """Answer OpenAI-style requests over HTTP; with --smoke test the model and stop."""
    given: Given = {"host": host, "port": port, "api_key": api_key, "max_model_len": max_model_len}
    given |= {"served_model_name": served_model_name, "max_num_seqs": max_num_seqs}
    given |= {"max_num_batched_tokens": max_num_batched_tokens, "num_blocks": num_blocks}
    given |= {"max_queue": max_queue, "prefix_cache": prefix_cache, "strict_api": strict_api}
    given |= {"drain_timeout_s": drain_timeout, "dtype": dtype, "device": device, "verify": verify}
    given |= {"cpu_activations": cpu_activations, "kv_cache_dtype": kv_cache_dtype}
    given |= {"cuda_graphs": cuda_graphs}
    options = _options(given | {"kv_cache_bytes": _bytes(kv_cache)})
    if smoke:
        _smoke(path, options, as_json)
    else:
        _serve(path, options, as_json)


def generate(
    path: Folder,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Text to go on from.")],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to produce.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option()] = None,
    seed: flags.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are user messages.")] = False,
    max_model_len: MaxModelLen = None,
    dtype: Dtype = None,
    device: Device = None,
    cpu_activations: CpuActivations = None,
    kv_cache_dtype: KvCacheDtype = None,
    verify: Verify = None,
    as_json: flags.AsJson = False,
) -> None:
    """Continue prompts with a model, without a server."""
    from compressor import console

    wanted: Given = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }
    given: Given = {
        "dtype": dtype,
        "device": device,
        "cpu_activations": cpu_activations,
        "kv_cache_dtype": kv_cache_dtype,
        "verify": verify,
        "max_model_len": max_model_len,
    }
    with console.session(as_json=as_json):
        from compressor.serve.offline import generate_text
        from compressor.serve.sequence import SamplingParams

        params = SamplingParams(**_present(wanted), stop=tuple(stop or ()))
        folder, options = _folder(path), _options(given)
        answers = generate_text(folder, prompt, params=params, options=options, chat=chat)
    if as_json:
        rows = [{"text": a.text, "token_ids": a.token_ids, "finish_reason": a.finish_reason}
                for a in answers]  # fmt: skip
        console.show_json({"answers": rows})
        return
    for text, answer in zip(prompt, answers, strict=True):
        console.show_text(answer.text if chat else text + answer.text)


def bench(
    target: Annotated[str, typer.Argument(help="Folder of a model, or a server's URL.")],
    num_requests: Annotated[int | None, typer.Option()] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    request_rate: Annotated[float | None, typer.Option(help="Arrivals a second.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option()] = None,
    output_tokens: Annotated[int | None, typer.Option()] = None,
    max_ttft_ms: Annotated[float | None, typer.Option(help="Limit for goodput.")] = None,
    max_tpot_ms: Annotated[float | None, typer.Option(help="Limit for goodput.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Measure the engine itself, without HTTP.")
    ] = False,
    seed: flags.Seed = None,
    api_key: ApiKey = None,
    dtype: Dtype = None,
    device: Device = None,
    cpu_activations: CpuActivations = None,
    kv_cache_dtype: KvCacheDtype = None,
    cuda_graphs: CudaGraphs = None,
    verify: Verify = None,
    as_json: flags.AsJson = False,
) -> None:
    """Measure latency and throughput of a server or of a model folder."""
    from compressor import console

    load: Given = {"num_requests": num_requests, "concurrency": concurrency, "seed": seed}
    load |= {"request_rate": request_rate, "prompt_tokens": prompt_tokens, "api_key": api_key}
    load |= {"output_tokens": output_tokens, "max_ttft_ms": max_ttft_ms, "max_tpot_ms": max_tpot_ms}
    with console.session(as_json=as_json):
        served: Given = {"dtype": dtype, "device": device, "verify": verify}
        served |= {"cpu_activations": cpu_activations, "kv_cache_dtype": kv_cache_dtype}
        served |= {"cuda_graphs": cuda_graphs}
        result = _measure(target, _present(load), _options(served), offline)
    if as_json:
        console.show_json(result)
    else:
        console.show_facts(result)


def _measure(target: str, load: Given, served: ServeOptions, offline: bool) -> dict[str, Any]:
    from compressor.serve.bench import BenchOptions, run_bench
    from compressor.serve.bench_offline import run_offline

    is_url = target.startswith(("http://", "https://"))
    if offline and is_url:
        raise UsageError("--offline takes a folder, not a URL", code="SV33")
    place = target if is_url else _folder(target)
    options = BenchOptions(**load)
    if offline:
        return run_offline(Path(place), options, serve=served)
    return run_bench(place, options, serve=served)


def _folder(path: str) -> Path:
    from compressor.modeling.hub import resolve_model

    return resolve_model(path).path


def _present(items: dict[str, Any]) -> dict[str, Any]:
    return {name: item for name, item in items.items() if item is not None}


def _options(given: dict[str, Any]) -> ServeOptions:
    from compressor.serve.options import ServeOptions

    return ServeOptions(**_present(given))


def _bytes(text: str | None) -> int | None:
    from compressor.recipe import parse_size

    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise UsageError(str(error), code="US01", where=Where(key="--kv-cache")) from error


def _serve(path: str, options: ServeOptions, as_json: bool) -> None:
    from compressor import console

    with console.session(as_json=as_json):
        from compressor.serve.server import serve as run_server

        address = f"[{options.host}]" if ":" in options.host else options.host
        run_server(
            _folder(path),
            options,
            on_ready=lambda port: console.say(f"serving on http://{address}:{port}"),
        )


def _smoke(path: str, options: ServeOptions, as_json: bool) -> None:
    from compressor import console

    with console.session(as_json=as_json):
        from compressor.serve.smoke import run_smoke

        folder = _folder(path)
        result = run_smoke(folder, options)
    failed = [check["name"] for check in result["checks"] if not check["ok"]]
    if not failed and as_json:
        console.show_json(result)
    elif not as_json:
        console.show_table(result["checks"], title=folder.name)
        console.show_facts(result["speed"])
    if failed:
        raise VerificationError(
            f"the model does not serve as it should: {', '.join(failed)}",
            where=Where(file=folder.name), fix="see the failed checks above",
        )  # fmt: skip
