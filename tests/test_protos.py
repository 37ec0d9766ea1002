"""The contracts on the wire: what a client or worker built from today's .proto files sends must be understood for good.

golden_wire.json holds, for every field, the bytes of a message in which that field alone is set (SAMPLES), every enum
value and every method. A field that was renumbered, retyped or removed no longer matches. After an addition,
`python tests/test_protos.py` appends what is missing; it never changes what is there.
"""

import json
import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from tandem.v1 import decode_pb2, inference_pb2, kv_pb2, prefill_pb2, types_pb2, worker_pb2

FILES = [module.DESCRIPTOR for module in (decode_pb2, inference_pb2, kv_pb2, prefill_pb2, types_pb2, worker_pb2)]
PROTOS = Path(__file__).resolve().parent.parent / "protos"
GOLDEN = Path(__file__).with_name("golden_wire.json")

SAMPLES = {
    Field.CPPTYPE_INT32: -3,
    Field.CPPTYPE_INT64: -(2**40),
    Field.CPPTYPE_UINT32: 2**32 - 2,
    Field.CPPTYPE_UINT64: 2**64 - 2,
    Field.CPPTYPE_DOUBLE: 0.1,
    Field.CPPTYPE_FLOAT: 0.5,
    Field.CPPTYPE_BOOL: True,
    Field.CPPTYPE_ENUM: 1,
}


def messages():
    todo = [message for file in FILES for message in file.message_types_by_name.values()]
    while todo:
        message = todo.pop(0)
        if not message.GetOptions().map_entry:
            yield message
            todo += message.nested_types


FIELDS = {f"{m.full_name}.{f.name}": f for m in messages() for f in m.fields}


def sample(field) -> Message:
    """A message in which this field alone is set: twice if repeated, a nested message left empty."""
    message = GetMessageClass(field.containing_type)()
    entry = field.message_type if field.message_type and field.message_type.GetOptions().map_entry else None
    if entry:
        getattr(message, field.name)[_scalar(entry.fields_by_name["key"])] = _scalar(entry.fields_by_name["value"])
    elif field.message_type:
        target = getattr(message, field.name)
        target.add() if field.is_repeated else target.SetInParent()
    elif field.is_repeated:
        getattr(message, field.name).extend([_scalar(field)] * 2)
    else:
        setattr(message, field.name, _scalar(field))
    return message


def _scalar(field):
    if field.cpp_type == Field.CPPTYPE_STRING:
        return b"\x00\xff" if field.type == Field.TYPE_BYTES else "ü"
    return SAMPLES[field.cpp_type]


def _bytes_of(field) -> str:
    return sample(field).SerializeToString(deterministic=True).hex()


def _type_name(field) -> str:
    """Of a message or enum field, since its sample's bytes do not tell."""
    named = field.message_type or field.enum_type
    return named.full_name if named else ""


def current() -> dict[str, dict[str, str | int]]:
    """The contracts as they are now, in the shape of the golden file."""
    return {
        "fields": {name: f"{_bytes_of(field)} {_type_name(field)}".strip() for name, field in FIELDS.items()},
        "enums": {
            f"{enum.full_name}.{value.name}": value.number
            for file in FILES
            for enum in file.enum_types_by_name.values()
            for value in enum.values
        },
        "methods": {
            f"/{service.full_name}/{method.name}": " -> ".join(
                ("stream " if streams else "") + message.full_name
                for message, streams in (
                    (method.input_type, method.client_streaming),
                    (method.output_type, method.server_streaming),
                )
            )
            for file in FILES
            for service in file.services_by_name.values()
            for method in service.methods
        },
    }


def golden() -> dict[str, dict[str, str | int]]:
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("kind", ["fields", "enums", "methods"])
def test_contracts_are_as_promised(kind: str):
    promised, now = golden()[kind], current()[kind]
    assert {name: now.get(name) for name in promised} == promised
    assert not now.keys() - promised.keys(), "additions: run `python tests/test_protos.py` and commit the result"


@pytest.mark.parametrize("name", FIELDS)
def test_promised_bytes_are_understood(name: str):
    field = FIELDS[name]
    data = bytes.fromhex(str(golden()["fields"][name]).partition(" ")[0])
    parsed = GetMessageClass(field.containing_type).FromString(data)
    assert parsed == sample(field)
    assert [known.name for known, _ in parsed.ListFields()] == [field.name]


def test_sampling_parameters_tell_zero_from_unset():
    """Of most parameters 0 is a legal value that is not the default: each scalar has presence."""
    scalars = [f for f in types_pb2.SamplingParams.DESCRIPTOR.fields if not f.is_repeated and not f.message_type]
    assert [f.name for f in scalars if not f.has_presence] == []
    zeros = types_pb2.SamplingParams(**{f.name: 0 for f in scalars if f.cpp_type != Field.CPPTYPE_BOOL})
    parsed = types_pb2.SamplingParams.FromString(zeros.SerializeToString())
    for field in scalars:
        assert parsed.HasField(field.name) == (field.cpp_type != Field.CPPTYPE_BOOL)


LINE = re.compile(r"^ +(?:optional |repeated )?(?:map<.+?>|[\w.]+) \w+ = (?P<number>\d+);(?P<rest>.*)$", re.MULTILINE)
ENUM_LINE = re.compile(r"^ +[A-Z_]+ = \d+;(?P<rest>.*)$", re.MULTILINE)
BLOCK = re.compile(r"^(?P<above>.*)\n *(?:message|service|enum|rpc) (?P<name>\w+).*$", re.MULTILINE)


@pytest.mark.parametrize("path", sorted(PROTOS.rglob("*.proto")), ids=lambda path: path.name)
def test_everything_has_a_comment(path: Path):
    text = path.read_text()
    lines = [*LINE.finditer(text), *ENUM_LINE.finditer(text)]
    bare = [match.group().strip() for match in lines if not re.match(r" // \S.{2,}", match["rest"])]
    assert bare == []
    assert [match["name"] for match in BLOCK.finditer(text) if not match["above"].strip().startswith("//")] == []


def test_the_comment_check_sees_every_field():
    text = "\n".join(path.read_text() for path in PROTOS.rglob("*.proto"))
    assert len(LINE.findall(text)) == len(FIELDS)


def write() -> None:
    """Appends to the golden file what it lacks."""
    held = golden() if GOLDEN.exists() else {}
    merged = {kind: {**values, **held.get(kind, {})} for kind, values in current().items()}
    GOLDEN.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
