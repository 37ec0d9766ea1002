"""A small, complete client in Python: streams text, sets a deadline, reads error details, cancels on Ctrl-C.

    .venv/bin/python examples/client.py "The capital of France is"
    .venv/bin/python examples/client.py --address gateway.example:50051 --max-tokens 200 --timeout 20 "Once upon a time"

It needs only grpcio, grpcio-status and the stubs made from protos/ (in another language: made from the same files).
"""

import argparse
import sys

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from tandem.v1 import inference_pb2, inference_pb2_grpc, types_pb2

DETAILS: tuple[type[Message], ...] = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.QuotaFailure,
    error_details_pb2.ResourceInfo,
    error_details_pb2.PreconditionFailure,
)


def main() -> int:
    parser = argparse.ArgumentParser(description="Streams the continuation of a prompt.")
    parser.add_argument("prompt")
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port of the gateway")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, help="0 = greedy; default: the model's own")
    parser.add_argument("--timeout", type=float, default=60.0, help="deadline of the whole request, seconds")
    options = parser.parse_args()

    sampling = types_pb2.SamplingParams(max_tokens=options.max_tokens, temperature=options.temperature)
    request = inference_pb2.GenerateRequest(text=options.prompt, sampling=sampling)

    with grpc.insecure_channel(options.address) as channel:
        stream = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=options.timeout)
        try:
            for chunk in stream:
                for output in chunk.outputs:
                    print(output.text, end="", flush=True)
                if chunk.HasField("usage"):
                    print_end(chunk)
        except KeyboardInterrupt:
            stream.cancel()  # the workers drop the request at once
            print()
            return 130
        except grpc.RpcError as error:
            print_error(error)
            return 1
    return 0


def print_end(chunk: inference_pb2.GenerateResponse) -> None:
    """What the last message says about the request."""
    transport = types_pb2.Transport.Name(chunk.receipt.transport)
    print(
        f"\n\n{chunk.usage.prompt_tokens} prompt tokens, {chunk.usage.completion_tokens} generated; "
        f"first token after {chunk.timings.first_token_s * 1000:.0f} ms, all after {chunk.timings.total_s:.2f} s; "
        f"{chunk.receipt.handoff_bytes / 1e6:.2f} MB of KV handed over by {transport}",
        file=sys.stderr,
    )


def print_error(error: grpc.RpcError) -> None:
    """Code and message, and the google.rpc details: the field at fault, when to try again, and so on."""
    call: grpc.Call = error  # type: ignore[assignment] (what a stub raises is a Call too)
    print(f"{call.code().name}: {call.details()}", file=sys.stderr)
    status = rpc_status.from_call(call)
    for packed in status.details if status else ():
        for kind in DETAILS:
            detail = kind()
            if packed.Unpack(detail):
                print(f"{kind.__name__}: {str(detail).strip()}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
