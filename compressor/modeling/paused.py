"""Forward passes that wait in the middle, so that a block is changed while it is being run.

Sequential calibration wants the inputs of the second linear after the first one was compressed.
Running the block again from its start for each linear repeats all its attention; here every
micro-batch runs once and waits at each linear of interest:

    runs = PausedRuns(block, heads, forwards)      nothing has run yet
    runs.inputs("self_attn.o_proj")                each pass goes on until it gets there
    ... change that linear ...
    runs.outputs()                                 each pass goes on to its end

Every pass has a thread of its own; as many of them run at once as torch has threads
(`algorithms.side_by_side`), and the one that stops wakes the next. Numbers and their order are
those of plain calls.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Self

import torch
from torch import Tensor, nn

from compressor.algorithms.side_by_side import CPU, at_once, shared_threads
from compressor.modeling.block import Block

Forward = Callable[[], Tensor]
_here = threading.local()  # which pass the present thread runs


class _Closed(Exception):
    """Raised inside a waiting pass that nobody will continue."""


class PausedRun:
    """One forward pass in a thread of its own; it runs between `resume` and `stopped`."""

    def __init__(self, forward: Forward, turns: deque[PausedRun]) -> None:
        self.output: Tensor | None = None
        self._forward, self._turns = forward, turns
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._at: tuple[str, Tensor] | None = None
        self._error: BaseException | None = None
        self._ended = self._closing = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def resume(self) -> None:
        """Go on, until `stopped`."""
        self._at = None
        self._go.release()

    def stopped(self) -> tuple[str, Tensor] | None:
        """Wait for the next stop: the linear's name and input there, None at the end.

        Raises whatever the forward pass raises.
        """
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._at

    def close(self) -> None:
        """End a pass that still waits."""
        if not self._ended:
            self._closing = True
            self._go.release()
        self._thread.join()

    def pause(self, name: str, x: Tensor) -> None:
        """Called in the pass's thread: hand out an input and wait."""
        self._at = (name, x)
        self._hand_over()
        self._go.acquire()
        if self._closing:
            raise _Closed

    def _work(self) -> None:
        self._go.acquire()
        _here.run = self
        try:
            if not self._closing:
                with torch.no_grad():
                    self.output = self._forward()
        except _Closed:
            pass
        except BaseException as error:  # handed to the thread that waits in `stopped`
            self._error = error
        finally:
            self._ended = True
            self._hand_over()

    def _hand_over(self) -> None:
        """Let the next pass go on in place of this one."""
        with suppress(IndexError):  # there is none
            self._turns.popleft().resume()
        self._stopped.release()


class PausedRuns:
    """All micro-batches of one block; close it, or use it in a `with` block."""

    def __init__(
        self,
        block: Block,
        heads: Sequence[str],
        forwards: Sequence[Forward],
        *,
        device: torch.device = CPU,
    ) -> None:
        """Prepare.

        Args:
            block: its linears `heads` make a pass wait.
            heads: in the order in which the block calls them.
            forwards: one for each micro-batch.
            device: where they compute.
        """
        self._count = at_once(device)
        self._handles = [block.linears[n].register_forward_pre_hook(_stop(n)) for n in heads]
        self._turns = deque[PausedRun]()  # passes that go on as soon as another one stops
        self._runs = [PausedRun(forward, self._turns) for forward in forwards]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inputs(self, name: str) -> list[Tensor]:
        """Input [..., I] of a linear in every micro-batch."""
        found = []
        for _, at in self._resumed():
            if at is None or at[0] != name:
                raise RuntimeError(f"a pass was to stop at {name}, it is at {at and at[0]}")
            found.append(at[1])
        return found

    def outputs(self) -> Iterator[Tensor]:
        """Output [B, T, D] of the block for each micro-batch, after its last stop."""
        for run, at in self._resumed():
            if at is not None or run.output is None:
                raise RuntimeError(f"a pass was to end, it is at {at and at[0]}")
            yield run.output
            run.output = None

    def _resumed(self) -> Iterator[tuple[PausedRun, tuple[str, Tensor] | None]]:
        """All passes and where they are, after each was resumed; as many at once as may be."""
        with shared_threads(self._count):
            self._turns.extend(self._runs[self._count :])
            for run in self._runs[: self._count]:
                run.resume()
            for run in self._runs:
                yield run, run.stopped()

    def close(self) -> None:
        """End what still waits; the block runs plainly again."""
        self._turns.clear()
        for handle in self._handles:
            handle.remove()
        for run in self._runs:
            run.close()


def _stop(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        run: PausedRun | None = getattr(_here, "run", None)
        if run is not None:
            run.pause(name, args[0])

    return hook
