"""A process that computes is killed, stopped, hangs, crashes, talks nonsense, loses its parent: no answer changes, and
nothing is left behind. The process computes with the strict executor of the engine's tests."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from engine_rig import Recorder, make_request
from fake_worker import CAPACITY
from null_executor import reference

from headrace.core import clock
from headrace.core.config import DeviceSettings, EngineSettings
from headrace.core.ports import ExecutorLost
from headrace.core.shape import ModelShape
from headrace.core.step import Lane, StepPlan
from headrace.core.types import FinishReason, HeadraceError, Output
from headrace.device import wire
from headrace.device.apart import ApartExecutor, Launch, NotLoaded, StepFailed
from headrace.device.kvstore import Kept
from headrace.device.reference.tensorstore import TensorStore
from headrace.engine.loop import Engine
from headrace.engine.scheduler import Scheduler
from headrace.engine.watch import Watch

SHAPE, CPU = ModelShape(2, 8, 2, 2, 4, 16, 50, 64), torch.device("cpu")
WORKER = Path(__file__).with_name("fake_worker.py")
PARENT = """
import sys
sys.path[:0] = {path!r}
from test_apart import started
executor = started({folder!r})
print(executor.pid, flush=True)
sys.stdin.read()
"""


def executor_of(folder: Path | str) -> ApartExecutor:
    load = wire.Load(str(folder), DeviceSettings(), 4, 8, 64)
    return ApartExecutor(Launch((sys.executable, str(WORKER)), load))


def started(folder: Path | str) -> ApartExecutor:
    executor = executor_of(folder)
    executor.start()
    return executor


def serve(folder: Path, main: Callable[[Engine, ApartExecutor], Coroutine[Any, Any, Any]], **more: Any) -> Any:
    """An engine over such a process while `main` runs; afterwards the process is gone."""
    executor = started(folder)
    watch = executor.watch = Watch(0.001, 0.0001)
    scheduler = Scheduler(EngineSettings(**more), CAPACITY, token_budget=32, observer=Recorder())
    engine = Engine("model", scheduler, executor, watch=watch)

    async def both() -> Any:
        await executor.attend(engine.lost)
        serving = asyncio.create_task(engine.run())
        try:
            return await main(engine, executor)
        finally:
            serving.cancel()
            with suppress(asyncio.CancelledError):
                await serving
            await executor.close()
            scheduler.check()

    result = clock.run(both())
    assert not children()
    return result


def children() -> list[psutil.Process]:
    """Processes of ours that are left, zombies too."""
    return [child for child in psutil.Process().children() if WORKER.name in " ".join(child.cmdline()) or _dead(child)]


def _dead(process: psutil.Process) -> bool:
    return bool(process.status() == psutil.STATUS_ZOMBIE)


async def eight(engine: Engine, tokens: int = 40) -> list[list[Output]]:
    async def one(name: int) -> list[Output]:
        request = make_request(f"{engine.status().steps}-{name}", range(name, name + 12), tokens)
        return [output async for output in engine.generate(request)]

    return await asyncio.gather(*map(one, range(8)))


def check_right(answers: list[list[Output]], tokens: int = 40) -> None:
    for name, outputs in enumerate(answers):
        drawn = [token for output in outputs for token in output.token_ids]
        assert drawn == reference(make_request("", range(name, name + 12), tokens), CAPACITY)
        assert outputs[-1].finish is FinishReason.LENGTH


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "model.gguf").write_text("weights")
    yield tmp_path
    assert not children(), "a process is left"


# -- its life ----------------------------------------------------------------------------------------------------------


def test_it_loads_says_what_it_does_and_leaves_nothing(folder: Path) -> None:
    phases, models = list[str](), list[Any]()
    executor = executor_of(folder)
    loaded = executor.start(phases.append, models.append)
    assert phases == ["start the process that computes", "open the folder", "think"]
    assert models[0] is executor.model and models[0].name == "fake"
    assert executor.capacity == loaded.capacity == CAPACITY
    pid = executor.pid
    assert pid is not None and psutil.pid_exists(pid)
    clock.run(executor.close())
    assert not psutil.pid_exists(pid)
    assert executor.pid is None


def test_a_refusal_is_told_in_its_own_words(folder: Path) -> None:
    (folder / "refuse").write_text("it does not fit; take --kv-memory 1GiB")
    with pytest.raises(NotLoaded, match=r"^it does not fit; take --kv-memory 1GiB$"):
        started(folder)
    (folder / "break").touch()
    with pytest.raises(NotLoaded, match="ZeroDivisionError: nobody foresaw this"):
        started(folder)


def test_a_process_that_ends_while_it_loads_says_how() -> None:
    executor = ApartExecutor(Launch((sys.executable, "-c", "raise SystemExit(3)"), executor_of("x")._launch.load))
    with pytest.raises(NotLoaded, match="status 3"):
        executor.start()
    assert not children()


def test_it_goes_when_its_parent_is_killed(folder: Path) -> None:
    path = [str(WORKER.parent), str(WORKER.parents[1] / "engine"), *sys.path]
    code = PARENT.format(path=path, folder=str(folder))
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdin is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    worker.wait(10)  # raises TimeoutExpired
    parent.stdin.close()
    parent.stdout.close()


# -- its work ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"lanes": "fixed"}])
def test_streams_come_out_as_from_one_process(folder: Path, more: dict[str, Any]) -> None:
    check_right(serve(folder, lambda engine, executor: eight(engine), **more))


def test_a_step_that_fails_is_that_steps_business(folder: Path) -> None:
    async def main(engine: Engine, executor: ApartExecutor) -> None:
        (folder / "fail").touch()
        failed = await eight(engine, 5)
        assert {outputs[-1].finish for outputs in failed} <= {FinishReason.ERROR, FinishReason.LENGTH}
        assert any("RuntimeError: the device fell over" in (outputs[-1].error or "") for outputs in failed)
        check_right(await eight(engine))
        assert engine.status().restarts == 0

    serve(folder, main)


def test_texts_are_encoded_between_steps_and_survive_a_kill(folder: Path) -> None:
    async def main(engine: Engine, executor: ApartExecutor) -> None:
        assert await executor.encode([[1, 2], [3]]) == [b"\1\2", b"\3"]
        with pytest.raises(StepFailed):
            await executor.encode([[1000]])
        assert executor.pid is not None
        os.kill(executor.pid, signal.SIGKILL)
        assert await executor.encode([[4]]) == [b"\4"]
        assert executor.encoding.dimensions == 4

    serve(folder, main)


# -- losing it ---------------------------------------------------------------------------------------------------------


def test_killed_amid_streams_and_nobody_notices(folder: Path) -> None:
    async def main(engine: Engine, executor: ApartExecutor) -> None:
        for _ in range(3):
            before = engine.status().steps
            answers = asyncio.create_task(eight(engine))
            while engine.status().steps < before + 15:
                await clock.sleep(0.001)
            assert executor.pid is not None
            os.kill(executor.pid, signal.SIGKILL)
            check_right(await answers)
        assert engine.status().restarts == 3
        assert engine.status().state == "ready"

    serve(folder, main)


@pytest.mark.parametrize("harm", ["die", "stop", "endless", "nonsense"])
def test_whatever_happens_in_a_step_the_answers_are_right(folder: Path, harm: str) -> None:
    async def main(engine: Engine, executor: ApartExecutor) -> tuple[list[list[Output]], float]:
        (folder / harm).write_text("9")
        answers = await eight(engine)
        assert engine.status().restarts == 1
        return answers, clock.now()

    answers, _ = serve(folder, main)
    check_right(answers)


def test_killed_while_idle_it_is_back_before_anybody_asks(folder: Path) -> None:
    async def main(engine: Engine, executor: ApartExecutor) -> None:
        assert executor.pid is not None
        os.kill(executor.pid, signal.SIGKILL)
        while engine.status().state != "restarting":
            await clock.sleep(0.005)
        assert "SIGKILL" in (engine.status().error or "")
        while engine.status().state != "ready":
            await clock.sleep(0.01)
        check_right(await eight(engine))

    serve(folder, main)


def test_a_model_that_changed_is_not_served_in_the_midst_of_answers(folder: Path) -> None:
    async def main(engine: Engine, executor: ApartExecutor) -> list[list[Output]]:
        (folder / "model.gguf").write_text("other weights")
        (folder / "die").write_text("9")
        executor._again = _at_once(executor._again)  # type: ignore[method-assign]
        return await eight(engine)

    answers = serve(folder, main)
    assert {outputs[-1].finish for outputs in answers} == {FinishReason.ERROR}
    assert "model.gguf changed while the model was served" in (answers[0][-1].error or "")


def _at_once(again: Callable[[float], Coroutine[Any, Any, None]]) -> Callable[[float], Coroutine[Any, Any, None]]:
    return lambda delay_s: again(0.0)


def test_a_lost_process_is_an_error_of_its_own(folder: Path) -> None:
    executor = started(folder)

    async def main() -> None:
        with pytest.raises(HeadraceError):
            await executor.run(StepPlan(0, (), lanes=(Lane(), Lane()), released=("nobody",)))
        await executor.close()
        with pytest.raises(ExecutorLost, match="closed"):
            await executor.run(StepPlan(0, ()))

    clock.run(main())


# -- memory that outlives it -------------------------------------------------------------------------------------------


def test_kv_in_kept_memory_outlives_the_store_that_wrote_it() -> None:
    fd = os.memfd_create("kv")
    try:
        first = TensorStore(SHAPE, 4, 16, torch.float32, CPU, Kept(fd))
        keys, values = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
        first.write(1, torch.tensor([0, 17, 63]), keys, values)
        del first
        again = TensorStore(SHAPE, 4, 16, torch.float32, CPU, Kept(fd, good=True))
        assert torch.equal(again.keys[1][:, [0, 17, 63]], keys.transpose(0, 1))
        assert torch.equal(again.values[1][:, [0, 17, 63]], values.transpose(0, 1))
        assert not again.keys[0].any() and not again.values[0].any()
        with pytest.raises(HeadraceError, match="kept"):
            TensorStore(SHAPE, 400, 16, torch.float32, CPU, Kept(fd, good=True))
        emptied = TensorStore(SHAPE, 4, 16, torch.float32, CPU, Kept(fd))
        assert not emptied.keys[1].any()
    finally:
        os.close(fd)
