# SPDX-License-Identifier: Apache-2.0
"""One hostile header for each sentence of the safetensors format, and a fuzz.

The sentences are those of https://github.com/huggingface/safetensors#format.
"""

import json
import os
import string
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchworks_core.checkpoint import TensorEntry, parse_header, read_header
from torchworks_core.errors import CorruptFile, MissingFile


def write(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(raw) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **extra):
    return {
        "dtype": dtype,
        "shape": list(shape),
        "data_offsets": list(offsets),
        **extra,
    }


def test_what_the_library_writes_is_read(tmp_path):
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16]
    tensors = {str(d): torch.zeros(3, 2, dtype=d) for d in dtypes}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)}
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"a": "b"})
    found = read_header(path)
    assert {name: e.shape for name, e in found.items()} == {
        name: tuple(t.shape) for name, t in tensors.items()
    }
    raw = path.read_bytes()
    for name, e in found.items():
        assert (
            raw[e.begin : e.end]
            == safetensors.torch.save({"x": tensors[name]})[
                len(safetensors.torch.save({"x": tensors[name]}))
                - tensors[name].nbytes :
            ]
        )
    assert isinstance(found["scalar"], TensorEntry)


@pytest.mark.critical
@pytest.mark.parametrize(
    ("sentence", "header", "data"),
    [
        ("the header is JSON in UTF-8", b"{" + b"\xff" * 9 + b"}", b""),
        ("the header is JSON in UTF-8", b'{"a": }', b""),
        ("the header is an object", b"[]", b""),
        ("the header MUST begin with {", b" {}", b""),
        ("the header MAY be padded with spaces (only)", b"{}\n\n", b""),
        ("the header is not empty", b"", b""),
        (
            "duplicate keys are disallowed",
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"x",
        ),
        ("__metadata__ maps text to text", {"__metadata__": {"a": 1}}, b""),
        ("__metadata__ maps text to text", {"__metadata__": ["a"]}, b""),
        ("a tensor is an object", {"a": 3}, b""),
        ("a tensor has three keys", {"a": {"dtype": "F32", "shape": [0]}}, b""),
        ("a tensor has no other key", {"a": entry(strides=[1])}, b"x" * 8),
        ("the dtype is a known one", {"a": entry("F33")}, b"x" * 8),
        ("the dtype is text", {"a": entry(["F32"])}, b"x" * 8),
        ("sizes are integers", {"a": entry(shape=[2.0])}, b"x" * 8),
        ("sizes are integers", {"a": entry(shape=[True, 2])}, b"x" * 8),
        ("sizes are not negative", {"a": entry(shape=[-1, -2])}, b"x" * 8),
        ("sizes fit 64 bits", {"a": entry(shape=[2**64, 0], offsets=[0, 0])}, b""),
        (
            "their product fits 64 bits",
            {"a": entry(shape=[2**62, 4, 0], offsets=[0, 0])},
            b"",
        ),
        ("a scalar has one element", {"a": entry(shape=[], offsets=[0, 8])}, b"x" * 8),
        ("shape x dtype is the length", {"a": entry(shape=[3])}, b"x" * 8),
        ("shape x dtype is whole bytes", {"a": entry("F4", [3], [0, 1])}, b"x"),
        ("offsets are two", {"a": entry(offsets=[0, 8, 8])}, b"x" * 8),
        ("offsets are integers", {"a": entry(offsets=[0, "8"])}, b"x" * 8),
        ("offsets are not negative", {"a": entry(offsets=[-8, 0])}, b"x" * 8),
        ("offsets ascend", {"a": entry(offsets=[8, 0])}, b"x" * 8),
        ("offsets lie in the buffer", {"a": entry(offsets=[8, 16])}, b"x" * 8),
        (
            "tensors do not overlap",
            {"a": entry(), "b": entry(offsets=[4, 12])},
            b"x" * 12,
        ),
        ("tensors are not the same", {"a": entry(), "b": entry()}, b"x" * 8),
        ("the buffer has no holes", {"a": entry(offsets=[4, 12])}, b"x" * 12),
        ("the buffer ends with a tensor", {"a": entry()}, b"x" * 9),
        ("a header without tensors has no data", {}, b"x"),
        ("names are text", b'{"\\ud800": 1}', b""),
        ("numbers are JSON's", b'{"a": NaN}', b""),
        ("numbers are of bounded length", b'{"a": ' + b"9" * 5000 + b"}", b""),
        ("nesting is bounded", b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", b""),
    ],
)
def test_breach_of_the_format(tmp_path, sentence, header, data):
    path = write(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CorruptFile, match=r"a\.safetensors") as caught:
        read_header(path)
    assert len(str(caught.value)) < 1000, sentence


@pytest.mark.parametrize("size", range(8))
def test_file_shorter_than_the_length_field(tmp_path, size):
    path = tmp_path / "a"
    path.write_bytes(b"\0" * size)
    with pytest.raises(CorruptFile):
        read_header(path)


def test_length_beyond_the_file_or_the_cap_allocates_nothing(tmp_path):
    path = write(tmp_path / "a", b"{}", length=2**63)
    with pytest.raises(CorruptFile, match=str(2**63)):
        read_header(path)
    path = write(tmp_path / "b", b"{}", length=3)
    with pytest.raises(CorruptFile):
        read_header(path)
    # A sparse file as long as its header claims: only the cap stops the read.
    path = write(tmp_path / "c", b"{}", length=200_000_000)
    os.truncate(path, 300_000_000)
    with pytest.raises(CorruptFile, match="100000000"):
        read_header(path)
    path = write(tmp_path / "d", b"{}" + b" " * 98)
    with pytest.raises(CorruptFile):
        read_header(path, max_header_bytes=99)
    assert read_header(path, max_header_bytes=100) == {}


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(MissingFile, match="no such file"):
            read_header(path)


def test_hostile_sizes_cost_no_time():
    begin = time.process_time()
    shape = "[" + ",".join(["9223372036854775807"] * 200_000) + "]"
    raw = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}'
    with pytest.raises(CorruptFile):
        parse_header(raw.encode(), 0, 0)
    many = ",".join(f'"k{n}":1' for n in range(100_000))
    with pytest.raises(CorruptFile, match="k99999"):
        parse_header(f'{{{many},"k99999":1}}'.encode(), 0, 0)
    assert time.process_time() - begin < 2


def test_offsets_are_counted_from_the_base():
    raw = json.dumps({"a": entry(), "b": entry("F4", [4], [8, 10])}).encode()
    found = parse_header(raw, 10, 1000)
    assert found["a"] == TensorEntry("F32", (2,), 1000, 1008)
    assert found["b"] == TensorEntry("F4", (4,), 1008, 1010)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "F4", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 2**65) | st.integers(0, 3)) | json_values,
        "data_offsets": st.lists(st.integers(-1, 12), min_size=2, max_size=2)
        | json_values,
    }
)


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.binary(max_size=40).map(lambda b: b"{" + b + b"}")
    | st.text(string.printable, max_size=40).map(lambda t: ("{" + t + "}").encode())
    | st.dictionaries(st.text(max_size=3), near_entries | json_values, max_size=3).map(
        lambda d: json.dumps(d).encode()
    ),
    st.integers(0, 12),
)
def test_nothing_but_corrupt_file_is_raised(raw, size):
    try:
        found = parse_header(raw, size, 8 + len(raw))
    except CorruptFile:
        return
    assert sum(e.end - e.begin for e in found.values()) == size


@settings(max_examples=100, deadline=None, database=None)
@given(st.data())
def test_a_damaged_valid_file_is_refused_or_read_in_bounds(tmp_path_factory, data):
    raw = bytearray(safetensors.torch.save({"a": torch.ones(2), "b": torch.ones(3)}))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]
    path = tmp_path_factory.mktemp("fuzz") / "a"
    path.write_bytes(raw)
    try:
        found = read_header(path)
    except CorruptFile:
        return
    assert all(8 <= e.begin <= e.end <= len(raw) for e in found.values())
