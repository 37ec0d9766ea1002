"""`tandem chat`: a conversation in the terminal."""

from __future__ import annotations

import asyncio
import contextlib

from rich.console import Console
from tandem.v1 import inference_pb2

from cli.client import Sampling, Stopwatch, Target
from shared.rpc import RpcError

HELP = "/clear begins anew, /exit or Ctrl-D leaves, Ctrl-C ends an answer"


def run(target: Target, sampling: Sampling, *, model: str, system: str | None) -> None:
    """Reads turns and prints answers as they come, until /exit or the end of input. Raises RpcError if none answers."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing and history for the prompt)

    console = Console(highlight=False)
    opening = [inference_pb2.ChatMessage(role="system", content=system)] if system else []
    turns = list(opening)
    with asyncio.Runner() as runner:
        name = runner.run(_check(target, model))
        console.print(f"[bold]{name}[/bold]  [dim]{HELP}[/dim]")
        while True:
            question: inference_pb2.ChatMessage | None = None
            answer: list[str] = []
            try:
                text = console.input("[bold green]> [/bold green]").strip()
                if text == "/exit":
                    return
                if text == "/clear":
                    turns = list(opening)
                if text in ("", "/clear"):
                    continue
                question = inference_pb2.ChatMessage(role="user", content=text)
                request = inference_pb2.GenerateRequest(
                    model=model,
                    messages=inference_pb2.ChatMessages(messages=[*turns, question]),
                    sampling=sampling.message(),
                )
                summary = runner.run(_answer(target, request, answer, console))
                console.print(f"[dim]{summary}[/dim]")
            except EOFError:
                console.print()
                return
            except RpcError as error:
                console.print(error.message, style="red", markup=False)
                continue
            except KeyboardInterrupt:
                # wherever it comes: before the question, or at any point of the answer
                console.print(f"\n[dim]{HELP if question is None else 'ended'}[/dim]")
            if question is not None:
                # an answer that was cut short stays part of the conversation
                turns += [question, inference_pb2.ChatMessage(role="assistant", content="".join(answer))]


async def _answer(target: Target, request: inference_pb2.GenerateRequest, answer: list[str], console: Console) -> str:
    """Streams one answer into `answer` and onto the console; returns its timing."""
    async with target.stub() as stub:
        watch = Stopwatch()
        async for chunk in stub.Generate(request, timeout=target.timeout_s):
            watch.take(chunk)
            for output in chunk.outputs:
                answer.append(output.text)
                console.out(output.text, end="", highlight=False)
    console.print()
    return watch.summary()


async def _check(target: Target, model: str) -> str:
    """The name of the model that will answer."""
    async with target.stub() as stub:
        models = (await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=10)).models
    return next((served.name for served in models if served.name == model), models[0].name)
