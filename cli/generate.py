"""`tandem generate`: one prompt, its text as it comes."""

from __future__ import annotations

import asyncio
import sys

from google.protobuf.json_format import MessageToJson
from tandem.v1 import inference_pb2

from cli.client import Sampling, Stopwatch, Target


def run(target: Target, request: inference_pb2.GenerateRequest, *, as_json: bool, quiet: bool) -> None:
    """Prints the text of one output as it comes, of several when they are done; as_json: each chunk as a line.

    The timing goes to standard error unless quiet. Raises RpcError.
    """
    asyncio.run(_run(target, request, as_json, quiet))


def request_for(prompt: str, sampling: Sampling, model: str) -> inference_pb2.GenerateRequest:
    """A request; the prompt `-` is read from standard input."""
    text = sys.stdin.read() if prompt == "-" else prompt
    return inference_pb2.GenerateRequest(model=model, text=text, sampling=sampling.message())


async def _run(target: Target, request: inference_pb2.GenerateRequest, as_json: bool, quiet: bool) -> None:
    several = request.sampling.n > 1
    texts: dict[int, str] = {}
    async with target.stub() as stub:
        watch = Stopwatch()
        call = stub.Generate(request, timeout=target.timeout_s)
        async for chunk in call:
            watch.take(chunk)
            if as_json:
                print(MessageToJson(chunk, indent=None, preserving_proto_field_name=True), flush=True)
                continue
            for output in chunk.outputs:
                texts[output.index] = texts.get(output.index, "") + output.text
                if not several:
                    print(output.text, end="", flush=True)
    if several and not as_json:
        print("\n\n".join(f"[{index}]{texts[index]}" for index in sorted(texts)))
    elif not as_json:
        print(flush=True)
    if not quiet:
        print(watch.summary(), file=sys.stderr)
