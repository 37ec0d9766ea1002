"""What two workers agree on, over real sockets."""

import asyncio
import socket
from dataclasses import replace

import pytest
from tandem.v1 import kv_pb2, kv_pb2_grpc, types_pb2

from shared import rpc
from shared.config import TransportConfig
from shared.transport import exporter as exporter_module
from shared.transport import importer as importer_module
from shared.transport.importer import Importer
from shared.transport.target import HostTarget
from shared.transport.wire import LAYOUT_FIELDS, layout_to_proto

INLINE, SHARED_MEMORY = types_pb2.TRANSPORT_INLINE, types_pb2.TRANSPORT_SHARED_MEMORY


async def test_agrees_on_shared_memory(serve, importing, layout):
    served, decode = await serve(), importing()
    pair = await decode.importer.connect(served.kv_endpoint)
    assert (pair.transport, pair.refusals) == (SHARED_MEMORY, ())
    assert (pair.worker_id, pair.epoch, pair.num_blocks) == ("prefill-1", served.exporter.epoch, 32)
    assert decode.importer.pairs() == [pair]
    assert decode.untouched()


async def test_many_at_once_make_one_handshake(serve, importing):
    served, decode = await serve(), importing()
    pairs = await asyncio.gather(*(decode.importer.connect(served.kv_endpoint) for _ in range(20)))
    assert len(set(map(id, pairs))) == 1
    assert await decode.importer.connect(served.kv_endpoint) is pairs[0]


@pytest.mark.parametrize("field", sorted({*LAYOUT_FIELDS} - {"block_tokens"}))
async def test_names_the_layout_field_that_differs(serve, importing, layout, field, monkeypatch):
    if field == "digest":  # the two sides disagree on how a digest is made
        other = layout
        real = exporter_module.layout_to_proto

        def altered(record):
            proto = real(record)
            proto.digest = "00" * 32
            return proto

        monkeypatch.setattr(exporter_module, "layout_to_proto", altered)
    else:
        value = getattr(layout, field)
        change = {
            "dtype": "bfloat16",
            "model_digest": "cd" * 32,
            "order": "layer,block,kv,head,token,dim",
            "first_kv_head": 1,
        }
        other = replace(layout, **{field: change.get(field) or value * 2})
    served, decode = await serve(), importing(layout=other)
    with pytest.raises(rpc.RpcError) as caught:
        await decode.importer.connect(served.kv_endpoint)
    assert caught.value.code.name == "FAILED_PRECONDITION"
    assert caught.value.message.startswith(f"layout.{field}: ")
    [failure] = [d for d in caught.value.details if hasattr(d, "violations")]
    assert failure.violations[0].subject == f"layout.{field}"
    assert decode.importer.pairs() == []


async def test_names_every_layout_field_that_differs(serve, importing, layout):
    served = await serve()
    decode = importing(layout=replace(layout, num_layers=3, head_dim=16))
    with pytest.raises(
        rpc.RpcError, match=r"layout.num_layers: .*num_layers is 2 on prefill and 3 on decode; head_dim is 8 on prefill"
    ):
        await decode.importer.connect(served.kv_endpoint)


@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_disable_leaves_inline_and_says_so(serve, importing, side):
    disable = {"disable": ["shared_memory"]}
    served = await serve(**(disable if side == "prefill" else {}))
    decode = importing(**(disable if side == "decode" else {}))
    pair = await decode.importer.connect(served.kv_endpoint)
    assert pair.transport == INLINE
    [refusal] = pair.refusals
    assert refusal.transport == SHARED_MEMORY
    assert refusal.reason == f"the {side} worker's transport.disable names it"


async def break_socket(served, tmp_path, monkeypatch):
    next(tmp_path.glob("*.sock")).unlink()


async def replace_socket(served, tmp_path, monkeypatch):
    path = next(tmp_path.glob("*.sock"))
    path.unlink()
    path.write_text("no socket")


async def other_host(served, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter_module, "host_id", lambda: "another")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(break_socket, "No such file"), (replace_socket, "refused"), (other_host, "different hosts")],
)
@pytest.mark.parametrize("require", [None, "inline", "shared_memory"])
async def test_falls_back_with_a_reason_or_refuses(serve, importing, tmp_path, monkeypatch, fault, reason, require):
    served, decode = await serve(), importing(require=require)
    await fault(served, tmp_path, monkeypatch)
    if require == "shared_memory":
        with pytest.raises(rpc.RpcError, match=f"transport.require: shared_memory is required.*{reason}") as caught:
            await decode.importer.connect(served.kv_endpoint)
        assert caught.value.code.name == "FAILED_PRECONDITION"
        assert decode.importer.pairs() == []
    else:
        pair = await decode.importer.connect(served.kv_endpoint)
        assert pair.transport == INLINE
        assert [reason in r.reason for r in pair.refusals] == [True]


async def test_tries_the_better_transport_again(serve, importing, tmp_path):
    served, decode = await serve(), importing()
    path = next(tmp_path.glob("*.sock"))
    hidden = path.rename(tmp_path / "hidden")
    assert (await decode.importer.connect(served.kv_endpoint)).transport == INLINE
    hidden.rename(path)
    assert (await decode.importer.connect(served.kv_endpoint)).transport == SHARED_MEMORY
    assert [pair.transport for pair in decode.importer.pairs()] == [SHARED_MEMORY]


async def test_an_exporter_that_requires_shared_memory_offers_nothing_less(serve, importing):
    served = await serve(require="shared_memory")
    assert (await importing().importer.connect(served.kv_endpoint)).transport == SHARED_MEMORY
    with pytest.raises(rpc.RpcError, match="no transport is left: inline: the prefill worker's"):
        await importing(disable=["shared_memory"]).importer.connect(served.kv_endpoint)


async def test_an_exporter_that_cannot_have_what_it_requires_does_not_start(serve, importing, tmp_path):
    with pytest.raises(rpc.RpcError, match=r"transport\.require: shared_memory is required.*socket_dir"):
        await serve(require="shared_memory", socket_dir=tmp_path / ("x" * 100))
    served = await serve(socket_dir=tmp_path / ("x" * 100))
    pair = await importing().importer.connect(served.kv_endpoint)
    assert pair.transport == INLINE
    assert "socket_dir" in pair.refusals[0].reason


async def test_nobody_there_is_unavailable_at_once(importing):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{closed.getsockname()[1]}"
        async with asyncio.timeout(1):
            with pytest.raises(rpc.RpcError) as caught:
                await importing().importer.connect(endpoint)
    assert caught.value.code.name == "UNAVAILABLE"


@pytest.mark.parametrize(
    "endpoint",
    ["", "localhost", "localhost:", ":1", "localhost:0", "localhost:70000", "unix:/run/x", "dns:///h:1", "a b:1"],
)
async def test_an_endpoint_is_host_and_port(importing, endpoint):
    with pytest.raises(rpc.RpcError) as caught:
        await importing().importer.connect(endpoint)
    assert (caught.value.code.name, caught.value.field) == ("INVALID_ARGUMENT", "kv_endpoint")


class Liar(kv_pb2_grpc.KvServiceServicer):
    """A peer whose handshake says what it is told to."""

    def __init__(self, response: kv_pb2.HandshakeResponse) -> None:
        self.response = response

    async def Handshake(self, request, context):
        return self.response


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_blocks": 0}, "handshake"),
        ({"epoch": 0}, "handshake"),
        ({"handles": []}, "transports"),
        ({"handles": [kv_pb2.KvHandle(nixl=kv_pb2.NixlHandle())]}, "transports"),
        ({"handles": [kv_pb2.KvHandle(shared_memory={"num_bytes": 1 << 60})]}, "shared_memory.num_bytes"),
        ({"layout": None}, "layout.contract_version"),
        ({"layout": {"block_tokens": 0}}, "layout.block_tokens"),
        ({"layout": {"block_tokens": 32}}, "layout.digest"),
        ({"layout": {"num_kv_heads": 0}}, "layout.first_kv_head"),
        ({"layout": {"dtype": "int3"}}, "layout.dtype"),
    ],
)
async def test_checks_what_the_exporter_says(stack, importing, layout, change, expected):
    proto = layout_to_proto(layout)
    if fields := change.get("layout"):
        for name, value in fields.items():
            setattr(proto, name, value)
        change = {}
    truth = {
        "layout": proto,
        "epoch": 1,
        "num_blocks": 8,
        "handles": [kv_pb2.KvHandle(inline=kv_pb2.InlineHandle(chunk_bytes=1))],
    }
    server = rpc.create_server()
    port = server.add_insecure_port("127.0.0.1:0")
    kv_pb2_grpc.add_KvServiceServicer_to_server(Liar(kv_pb2.HandshakeResponse(**{**truth, **change})), server)
    await server.start()
    stack.push_async_callback(server.stop, 0)
    with pytest.raises(rpc.RpcError, match=f"{expected}: ") as caught:
        await importing().importer.connect(f"127.0.0.1:{port}")
    assert caught.value.code.name == "FAILED_PRECONDITION"


async def test_unknown_transports_are_refused_with_a_reason(serve, layout, stack):
    served = await serve()
    channel = await stack.enter_async_context(rpc.connect(served.kv_endpoint))
    request = kv_pb2.HandshakeRequest(layout=layout_to_proto(layout), transports=[types_pb2.TRANSPORT_NIXL, 77, INLINE])
    response = await kv_pb2_grpc.KvServiceStub(channel).Handshake(request)
    assert [handle.WhichOneof("kind") for handle in response.handles] == ["inline"]
    assert [(r.transport, bool(r.reason)) for r in response.refusals] == [(77, True), (types_pb2.TRANSPORT_NIXL, True)]


async def test_keeps_a_bounded_number_of_pairs(serve, importing, monkeypatch, held):
    monkeypatch.setattr(importer_module, "MAX_PAIRS", 2)
    before = held()[1]
    decode = importing()
    served = [await serve(num_blocks=4) for _ in range(4)]
    for each in served:
        await decode.importer.connect(each.kv_endpoint)
    assert [pair.kv_endpoint for pair in decode.importer.pairs()] == [each.kv_endpoint for each in served[2:]]
    assert held()[1] == before + 4 + 2


async def test_a_closed_importer_connects_no_more(serve, layout):
    served = await serve()
    target = HostTarget(layout, bytearray(2 * layout.block_bytes))
    importer = Importer([target], worker_id="d", config=TransportConfig())
    connecting = asyncio.create_task(importer.connect(served.kv_endpoint))
    await asyncio.sleep(0)
    await importer.close()
    assert (await connecting).closed.is_set()
    assert importer.pairs() == []
    with pytest.raises(rpc.RpcError, match="stopping"):
        await importer.connect(served.kv_endpoint)
