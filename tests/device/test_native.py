"""Native kernels against torch, against each other, and against what a file says."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MIXTURE, TINY, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import Given, NativeModel
from test_llama import MODELS, build, forward, hub_tensors, ours

from headrace.core.config import DeviceSettings
from headrace.core.shape import BF16, FP32, KV_BF16, KV_FP32, KV_INT8, Q4, Q8, KVFormat, WeightFormat
from headrace.core.types import HeadraceError
from headrace.device import load as loading
from headrace.device.arrays import Arena
from headrace.device.checkpoint import Checkpoint
from headrace.device.forward import Rows
from headrace.device.native import library
from headrace.device.native.forward import NativeForward, OutOfBounds, shared_tiles, why_not
from headrace.device.reference.llama import LlamaConfig

HERE = [name for name in library.VARIANTS if library.variant(name)]
DENSE = {
    name: (family, extra | {"head_dim": 16})
    for name, (family, extra) in MODELS.items()
    if not family.startswith(("Mixtral", "Qwen3Moe"))
}


def spans(works: list[tuple[int, int, int]], per_request: int = 16) -> list[Rows]:
    """(request, start, count) as rows over blocks that are the request's own, in no order."""
    tables = np.random.default_rng(0).permutation(8 * per_request).reshape(8, per_request).astype(np.int64)
    found, row = [], 0
    for request, start, count in works:
        found.append(Rows(row, start, count, tables[request]))
        row += count
    return found


def logits(model: NativeForward, works: list[tuple[int, int, int]], ids: list[list[int]]) -> torch.Tensor:
    rows = spans(works)
    tokens = [token for request, start, count in works for token in ids[request][start : start + count]]
    hidden = model.layers(rows, 0, model.shape.layers, tokens, None)
    return torch.from_numpy(model.logits(hidden, np.arange(len(tokens))).copy())


def some_ids(vocab: int, requests: int = 8, tokens: int = 200) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(vocab, (requests, tokens), generator=generator).tolist()


@pytest.mark.parametrize("name", DENSE)
def test_every_dense_member_of_the_family(name: str) -> None:
    """Rope variants, windows, biases, norms of heads, sandwich norms: the logits of torch, in fp32."""
    model = build(*DENSE[name])
    ids = some_ids(131, tokens=100)[0]
    with torch.inference_mode():
        expected = forward(ours(model), torch.tensor(ids))
    native = NativeModel(model.config.to_dict(), Given(hub_tensors(model).__getitem__)).forward(128)
    assert (logits(native, [(0, 0, 100)], [ids]) - expected).abs().max() < 3e-5


@pytest.mark.parametrize("kv", [KV_FP32, KV_BF16, KV_INT8], ids=lambda kv: kv.name)
@pytest.mark.parametrize("weights", [FP32, BF16, Q8, Q4], ids=lambda weights: weights.name)
def test_variants_agree_to_the_last_bit(weights: WeightFormat, kv: KVFormat) -> None:
    """Also with inputs and outputs that fill neither a group nor a panel."""
    ids = some_ids(500)
    odd = build("Gemma3", MODELS["gemma3"][1])
    models: list[tuple[dict[str, object], Callable[[str], torch.Tensor]]] = [
        (TINY, random_weights(3)),
        (odd.config.to_dict(), hub_tensors(odd).__getitem__),
    ]
    for config, tensor in models:
        found = []
        for variant in HERE:
            native = NativeModel(config, Given(tensor), weights, kv, variant).forward(128)
            short = [[token % 131 for token in row] for row in ids]
            found.append(logits(native, [(0, 0, 70), (1, 0, 1), (2, 0, 9)], short))
        assert all(torch.equal(each, found[0]) for each in found)
        assert found[0].std() > 0.1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=8), st.sampled_from([1, 3]), st.integers(1, 7))
def test_rows_do_not_know_their_step(cuts: list[int], threads: int, others: int) -> None:
    """One request in chunks beside others, over one to three threads, equals it alone in one go."""
    ids = some_ids(500)
    model = NativeModel(TINY, Given(random_weights(3)), Q4, KV_INT8, threads=threads)
    whole = logits(model.forward(128), [(0, 0, 200)], ids)
    beside, parts, at = model.forward(128), [], 0
    for cut in [*cuts, 200]:
        count = min(cut, 200 - at)
        if count:
            works = [(other, at, count) for other in range(1, 1 + others)]
            works.insert(others // 2, (0, at, count))
            parts.append(logits(beside, works, ids)[others // 2 * count :][:count])
            at += count
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kv", [KV_FP32, KV_BF16, KV_INT8], ids=lambda kv: kv.name)
def test_a_shared_prefix_is_read_once_and_changes_nothing(kv: KVFormat) -> None:
    """Twelve requests decode after the same 150 tokens, ten blocks of which they share, and one after others."""
    ids = some_ids(500, tokens=161)[0]
    model = NativeModel(TINY, Given(random_weights(3)), FP32, kv).forward(256)
    tables = [np.array([*range(8), *range(20 + 10 * n, 30 + 10 * n)]) for n in range(12)]
    tables[5] = np.arange(200, 218)

    def rows(which: Sequence[int], start: int, count: int) -> list[Rows]:
        return [Rows(row * count, start, count, tables[n]) for row, n in enumerate(which)]

    def run(spans: list[Rows], start: int, count: int) -> torch.Tensor:
        return torch.from_numpy(model.layers(spans, 0, 3, ids[start : start + count] * len(spans), None))

    for n in range(12):
        run(rows([n], 0, 160), 0, 160)
    together = run(rows(range(12), 160, 1), 160, 1)
    found = [shared_tiles(a, b, 16) for a, b in pairwise(rows(range(12), 160, 1))]
    assert found == [2, 2, 2, 2, 0, 0, 2, 2, 2, 2, 2]
    assert torch.equal(torch.cat([run(rows([n], 160, 1), 160, 1) for n in range(12)]), together)
    assert torch.equal(together[:1].expand(12, -1), together)  # the same tokens, wherever their KV lies


@pytest.mark.parametrize(
    "change",
    [
        {"table": [0, 1, 128]}, {"table": [0, -1, 2]}, {"table": [0, 2**32, 2]}, {"table": [0, 1]}, {"start": -1},
        {"count": 0}, {"row": 1}, {"ids": [7] * 32 + [500]}, {"ids": [-1] * 33}, {"ids": [7] * 32}, {"layers": (0, 4)},
        {"layers": (-1, 3)}, {"layers": (2, 1)}, {"asked": [33]}, {"asked": [-1]}, {"layers": (1, 3)},
    ],
    ids=str,
)  # fmt: skip
def test_nothing_outside_of_memory_is_touched(change: dict[str, Any]) -> None:
    """A step is good, and with any one thing changed it is refused before native code sees it."""
    model = NativeModel(TINY, Given(random_weights(3))).forward(128)

    def run(
        table: Sequence[int] = (0, 1, 127), start: int = 0, count: int = 33, row: int = 0,
        ids: Sequence[int] = (7,) * 33, layers: tuple[int, int] = (0, 3), asked: Sequence[int] = (0, 32),
    ) -> None:  # fmt: skip
        rows = Rows(row, start, count, np.array(table, dtype=np.int64))
        x = np.zeros((34, model.shape.hidden), np.float32) if layers[0] > 0 else None
        model.logits(model.layers([rows], *layers, ids, x), np.array(asked))

    run()
    with pytest.raises(OutOfBounds):
        run(**change)


def test_a_file_s_own_blocks_are_not_rounded_again(smollm2_checkpoint: Checkpoint) -> None:
    """Without layers, hidden states are rows of the embedding; it is Q8_0 in the file and equal bit for bit."""
    model = NativeModel(smollm2_checkpoint.config, smollm2_checkpoint.tensors, None)
    assert model.packer.bits.keys() == {"q4", "q8"}
    ids = [0, 1, 31, 32, 777, 49151]
    embedding = smollm2_checkpoint.tensor("model.embed_tokens.weight")[ids]
    assert np.array_equal(model.forward(128).layers(spans([(0, 0, 6)]), 0, 0, ids, None), embedding)
    assert model.packer.nbytes < 1.01 * smollm2_checkpoint.file_bytes


def test_the_default_format_thinks_like_the_dequantised_file(smollm2_checkpoint: Checkpoint) -> None:
    """Fourth token and later of an English text; 8-bit inputs are the only difference left."""
    from tokenizers import Tokenizer

    text = "The mill stands by the river, and the wheel turns day and night. Water comes through a channel that the " \
           "miller's father dug, and in a dry summer it carries little. Then the miller waits for rain."  # fmt: skip
    ids = [Tokenizer.from_str(smollm2_checkpoint.tokenizer_json).encode(text).ids]
    checkpoint = (smollm2_checkpoint.config, smollm2_checkpoint.tensors)
    exact, default = (
        logits(NativeModel(*checkpoint, weights, kv).forward(128), [(0, 0, len(ids[0]))], ids)[3:].log_softmax(-1)
        for weights, kv in ((FP32, KV_FP32), (None, KV_BF16))
    )
    divergence = torch.nn.functional.kl_div(default, exact, log_target=True, reduction="batchmean")
    assert divergence < 0.005
    assert (default.argmax(-1) == exact.argmax(-1)).float().mean() > 0.92


def test_what_native_kernels_do_not_do_is_said() -> None:
    tiny, mixture = LlamaConfig.from_hf(TINY), LlamaConfig.from_hf(MIXTURE)
    assert why_not(tiny, 16, "portable") is None
    assert "mixture" in str(why_not(mixture, 16, "portable"))
    assert "multiples of 16" in str(why_not(tiny, 8, "portable"))
    assert "not built" in str(why_not(tiny, 16, "vliw"))


def test_settings_that_need_native_kernels_say_so(smollm2_checkpoint: Checkpoint) -> None:
    for asked in ({"dtype": "q4"}, {"kv_dtype": "int8"}):
        with pytest.raises(HeadraceError, match=r"needs the native kernels.*--kernels torch"):
            loading.load(smollm2_checkpoint, DeviceSettings(kernels="torch", **asked), 16, 4)


def test_a_default_start(smollm2_checkpoint: Checkpoint) -> None:
    if library.variant() == "portable":
        pytest.skip("torch is the default here")
    loaded = loading.load(smollm2_checkpoint, DeviceSettings(max_context=512), 16, 4)
    assert (loaded.dtype, loaded.kv, loaded.kernels) == ("q4+q8", "bf16", f"native {library.variant()}")
    shape = loaded.executor.shape
    assert loaded.memory.block_bytes == 16 * KV_BF16.bytes_per_token(shape)


@pytest.mark.slow
def test_the_wheel_carries_the_library(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(root)]
    subprocess.run(command, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert any(name.startswith("headrace/device/native/kernels.") and name.endswith((".so", ".pyd")) for name in names)


def test_an_arena_hands_out_memory_once() -> None:
    arena = Arena()
    found = [arena.empty(count) for count in (1, 64, 65, 3 << 20, (64 << 20) - 5, 100 << 20, 7)]
    for number, array in enumerate(found, 1):
        array[0] = array[-1] = number
    for number, array in enumerate(found, 1):
        assert array[0] == array[-1] == number and array.ctypes.data % 64 == 0
