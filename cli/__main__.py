"""`./tandem`: the table of commands. What a command needs is imported when it runs, so that help answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="tandem",
    help="Language models over gRPC, with prefill and decode in separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models = typer.Typer(help="The models on this machine.", no_args_is_help=True)
app.add_typer(models, name="model")
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

ConfigPath = Annotated[
    Path | None, typer.Option("--config", metavar="PATH", help="YAML file; default: tandem.yaml, if there is one")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="any key of `tandem config`; may be repeated"),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text")]
Address = Annotated[
    str | None, typer.Option(envvar="TANDEM_ADDRESS", help="host:port of the gateway; default: the configured one")
]
ApiKey = Annotated[str | None, typer.Option(envvar="TANDEM_API_KEY", help="key to send, if the gateway asks for one")]
Timeout = Annotated[float | None, typer.Option(help="deadline of a request, seconds; default: the gateway's")]
ServedModel = Annotated[str, typer.Option("--model", help="served name; default: the first that is served")]
MaxTokens = Annotated[int | None, typer.Option(help="tokens to generate at most")]
Temperature = Annotated[float | None, typer.Option(help="0 = greedy; default: the model's own")]
TopP = Annotated[float | None, typer.Option(help="nucleus mass kept")]
TopK = Annotated[int | None, typer.Option(help="candidates kept, 0 = all")]
Seed = Annotated[int | None, typer.Option(help="the same seed draws the same tokens")]


@app.command()
def up(
    model: Annotated[str | None, typer.Option(help="built-in name, Hugging Face id, folder or .gguf file")] = None,
    prefill: Annotated[int | None, typer.Option(help="prefill workers; 0: decode workers compute prompts too")] = None,
    decode: Annotated[int | None, typer.Option(help="decode workers")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16")] = None,
    quantization: Annotated[str | None, typer.Option(help="none, int8, int8_dynamic, int4, fp8 or fp6")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16, int8 or fp8")] = None,
    tp: Annotated[int | None, typer.Option(help="processes that compute each worker's model in parallel")] = None,
    device: Annotated[str | None, typer.Option(help="auto or cpu")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port; 0 = a free one here and for all other ports")] = None,
    http_port: Annotated[int | None, typer.Option(help="port of the OpenAI HTTP service")] = None,
    config: ConfigPath = None,
    settings: Settings = None,
) -> None:
    """Start the gateway and workers on this machine, and serve until Ctrl-C."""
    from cli import up

    flags = {
        "model": model,
        "up.prefill": prefill,
        "up.decode": decode,
        "dtype": dtype,
        "quantization": quantization,
        "kv_dtype": kv_dtype,
        "tp": tp,
        "device": device,
        "gateway.port": port,
        "gateway.http_port": http_port,
    }
    assignments = [f"{key}={value}" for key, value in flags.items() if value is not None]
    up.run(config, [*(up.ANY_PORT if port == 0 else ()), *assignments, *(settings or ())])


def _role(module: str, name: str, text: str) -> None:
    @app.command(name, help=f"{text} Its flags: tandem {name} --help", context_settings=PASS_ON)
    def run(context: typer.Context) -> None:
        os.execv(sys.executable, [sys.executable, "-m", module, *context.args])


_role("gateway", "gateway", "Run a gateway alone.")
_role("prefill_worker", "prefill-worker", "Run a prefill worker alone.")
_role("decode_worker", "decode-worker", "Run a decode worker alone.")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue; - reads standard input")],
    max_tokens: MaxTokens = 64,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    n: Annotated[int | None, typer.Option("-n", help="outputs")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="end before this string; may be repeated")] = None,
    logprobs: Annotated[int | None, typer.Option(help="alternatives per token, shown with --json")] = None,
    model: ServedModel = "",
    address: Address = None,
    api_key: ApiKey = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="no timing on standard error")] = False,
) -> None:
    """Continue a prompt, and print the text as it comes."""
    from cli import generate
    from cli.client import Sampling, Target

    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed, n, logprobs, stop=stop or ())
    request = generate.request_for(prompt, sampling, model)
    generate.run(Target(address, api_key, timeout), request, as_json=as_json, quiet=quiet)


@app.command()
def chat(
    system: Annotated[str | None, typer.Option(help="system message")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    model: ServedModel = "",
    address: Address = None,
    api_key: ApiKey = None,
    timeout: Timeout = None,
) -> None:
    """Talk to the model."""
    from cli import chat
    from cli.client import Sampling, Target

    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed)
    chat.run(Target(address, api_key, timeout), sampling, model=model, system=system)


@app.command()
def config(config: ConfigPath = None, settings: Settings = None, as_json: AsJson = False) -> None:
    """Print the effective configuration, from file, environment and flags, as a tandem.yaml."""
    from cli import configuration
    from shared.arguments import parse_overrides
    from shared.config import load_config

    effective = load_config(config, parse_overrides(settings or ()))
    print(configuration.as_json(effective) if as_json else configuration.as_yaml(effective), end="")


@app.command(context_settings=PASS_ON, help="Measure a running server. Its flags: tandem bench --help")
def bench(context: typer.Context) -> None:
    from benchmarks.serve import main

    raise typer.Exit(main(context.args))


@app.command()
def health(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="of a gateway or a worker")],
    service: Annotated[str, typer.Option(help="one gRPC service; default: all of the process")] = "",
    timeout: Annotated[float, typer.Option(help="seconds to wait for the answer")] = 3.0,
) -> None:
    """Ask a process whether it serves; the exit status is 0 if it does, else 1."""
    from cli.health import run

    raise typer.Exit(run(address, service=service, timeout_s=timeout))


@app.command()
def doctor(
    config: ConfigPath = None,
    settings: Settings = None,
    cluster: Annotated[
        bool | None,
        typer.Option("--cluster/--no-cluster", help="ask the running processes too; default: if they answer"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is amiss on this host, in its container, with its GPUs and in the cluster, and how to mend it."""
    from cli.doctor import run

    raise typer.Exit(run(config, settings or (), ask_cluster=cluster, as_json=as_json))


@models.command("pull")
def model_pull(
    source: Annotated[str, typer.Argument(help="built-in name, Hugging Face id[@revision], folder or .gguf file")],
    name: Annotated[str | None, typer.Option(help="name to keep it under")] = None,
    allow_pickle: Annotated[bool, typer.Option(help="accept .bin and .pt checkpoints")] = False,
) -> None:
    """Fetch a model unless it is here."""
    from cli.models import pull

    pull(source, name=name, allow_pickle=allow_pickle)


@models.command("list")
def model_list(as_json: AsJson = False) -> None:
    """List the models that are here."""
    from cli.models import list_all

    list_all(as_json=as_json)


@models.command("show")
def model_show(name: str, as_json: AsJson = False) -> None:
    """Show what is known of a model."""
    from cli.models import show

    show(name, as_json=as_json)


@models.command("remove")
def model_remove(name: str) -> None:
    """Delete a model from this machine."""
    from cli.models import remove

    remove(name)


def main() -> None:
    """Runs the command. What a user can mend ends it with a message and status 1, a wrong configuration with 2."""
    try:
        app(prog_name="tandem")
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        status = _status_of(error)
        if status is None:
            raise
        print(f"tandem: {error}", file=sys.stderr)
        raise SystemExit(status) from None


def _status_of(error: Exception) -> int | None:
    from cli.process import StartError
    from shared.config import ConfigError
    from shared.model_files import ModelError
    from shared.rpc import RpcError

    if isinstance(error, ConfigError):
        return 2
    return 1 if isinstance(error, (ModelError, RpcError, StartError)) else None


if __name__ == "__main__":
    main()
