"""One loop that serves many requests: a fixed number of slots, each a row of one batch with a state of constant size.

Between two decoded tokens of all slots one request reads one piece of its prompt, in turns, so that no one waits for
another's long prompt. A request joins the batch when its prompt is read, and leaves it between steps. Four programs are
compiled, whatever comes: a piece of one row, a small one for what is left of a prompt, the seating of a row, and a step
of all.
"""

import collections
import dataclasses
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allmem_jax.decoding import generation
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.model import state as state_lib
from allmem_jax.serving import prefix_store, prefixes, programs


class Busy(Exception):
    """As many requests wait as may."""


class Stopped(Exception):
    """The engine has been stopped, or has failed."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What a request goes on from: the state of one row, and a name for all that it has read."""

    state: state_lib.DecodeState
    origin: bytes


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
      id, logprob: the token and the logarithm of its probability before temperature.
      top: (id, logprob) of the most likely tokens, as many as were asked for.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Read:
    """So many tokens of the prompt are read; `cached` of them had been read before."""

    count: int
    cached: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event: "stop" (an end of text), "length", "cancelled" or "error"; the state where none was to follow."""

    reason: str
    error: str = ""
    state: state_lib.DecodeState | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """A request and where it stands. Events are delivered in the engine's thread.

    Attributes:
      prompt: token ids, at least one.
      deliver: takes `Read`, `Token` and, once, `Finished`.
      max_tokens: to draw at most; 0 reads the prompt and finishes with the state.
      sampling, seed, stop_tokens: as in `generation.stream`.
      told: most likely tokens to tell beside each drawn one.
      start: what was read before; None for nothing.
    """

    prompt: Sequence[int]
    deliver: Callable[[Any], Any]
    max_tokens: int
    sampling: generation.Sampling = generation.GREEDY
    seed: int = 0
    stop_tokens: Sequence[int] = ()
    told: int = 0
    start: Start | None = None
    cancelled: bool = False
    _count: int = 0  # tokens drawn
    _read: int = 0  # tokens of the prompt that the state has read
    _cached: int = 0
    _state: Any = None
    _logits: Any = None
    _keys: Sequence[bytes] = ()

    def cancel(self) -> None:
        """Ends the request before its next token; its slot is free then."""
        self.cancelled = True


class Engine:
    """The loop, in a thread of its own, which alone computes."""

    def __init__(
        self,
        params: lm.Params,
        config: config_lib.ModelConfig,
        *,
        slots: int = 8,
        piece: int = 256,
        waiting: int = 64,
        cache_bytes: int = 2**30,
        store: prefix_store.PrefixStore | None = None,
    ):
        """Compiles nothing yet.

        Args:
          params: of the model.
          config: the model, with a mixer that has a constant state.
          slots: requests served at once.
          piece: tokens of a prompt that are read between two decoded tokens.
          waiting: requests that may wait for a slot.
          cache_bytes: of the states of beginnings that were read before.
          store: for such states, beyond those.
        """
        if config.mixer == "full":
            raise ValueError("full attention has no state of constant size: serve with --memory, or --mixer swa")
        for name, value, least in (("slots", slots, 1), ("piece", piece, 1), ("waiting", waiting, 0)):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if store is not None and cache_bytes < state_lib.state_bytes(config):
            raise ValueError(f"cache_bytes={cache_bytes} must hold a state from the store: give more")
        self.params, self.config = lm.unstack(params, dtype=config.dtype), config
        self.slots, self.piece, self.waiting = slots, piece, waiting
        self.prefixes = prefixes.Prefixes(piece, cache_bytes, store)
        self.ready = False  # the programs are compiled
        self.read_tokens = self.drawn_tokens = self.steps = 0
        self._queue: collections.deque[Job] = collections.deque()
        self._reading: collections.deque[Job] = collections.deque()
        self._rows: list[Job | None] = [None] * slots
        self._wake = threading.Condition()
        self._failed = ""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="allmem-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread, which compiles all programs first."""
        if self.prefixes.store is not None:
            self.prefixes.store.start()
        self._thread.start()

    def stop(self) -> None:
        """Ends every request as cancelled, and the thread."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        if self.prefixes.store is not None:
            self.prefixes.store.stop()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Takes all of `jobs`, or none. With a store, a state may be read first.

        Raises:
          ValueError: a prompt that is empty or not of this vocabulary.
          Busy: they would wait behind as many as may.
          Stopped: nobody serves any more.
        """
        for job in jobs:
            if not len(job.prompt) or min(job.prompt) < 0 or max(job.prompt) >= self.config.vocab_size:
                raise ValueError(f"a prompt must have token ids in [0, {self.config.vocab_size}), at least one")
            job._keys = self.prefixes.keys(job.prompt, job.start.origin if job.start else b"")
            self.prefixes.fetch(self._before(job))
        with self._wake:
            if self._failed or self._stopping:
                raise Stopped(self._failed or "the server is stopping")
            free = self.slots - self.active
            if len(self._queue) + len(jobs) > self.waiting + free:
                raise Busy(f"{len(self._queue)} requests wait already")
            self._queue.extend(jobs)
            self._wake.notify()

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return len(self._reading) + sum(job is not None for job in self._rows)

    @property
    def queued(self) -> int:
        """Requests that wait for one."""
        return len(self._queue)

    @property
    def failed(self) -> str:
        """Why the loop ended, or nothing."""
        return self._failed

    def _run(self) -> None:
        try:
            self._state = self._fitting(state_lib.init_state(self.config, self.slots))
            self._logits = jnp.zeros((self.slots, self.config.vocab_size), jnp.float32)
            self._fresh = self._fitting(state_lib.init_state(self.config, 1))
            self._blank = jnp.zeros((1, self.config.vocab_size), jnp.float32)
            self._compile()
            self.ready = True
            while self._next():
                if self._reading:
                    self._read_piece()
                if any(job is not None for job in self._rows):
                    self._step()
        except Exception as error:  # a device that fails leaves no request without an answer
            traceback.print_exc()
            self._failed = f"{type(error).__name__}: {error}"
        with self._wake:
            self._failed = self._failed or "the server has stopped"
            left = [*self._queue, *self._reading, *(job for job in self._rows if job is not None)]
            self._queue.clear()
        for job in left:
            job.deliver(Finished("cancelled" if self._stopping else "error", self._failed))

    def _compile(self) -> None:
        """Runs each program once, on rows that nobody has."""
        for size in (generation.fitting_piece(left, self.piece) for left in (self.piece, 0)):
            tokens, none = np.zeros((1, size), np.int32), np.zeros(1, np.int32)
            logits, state = generation.prefill_piece(self.params, self.config, tokens, none, self._fresh, self._blank)
        self._seat(0, state, logits)
        self._draw()

    def _next(self) -> bool:
        """Waits for work and gives free slots to those who wait; False when the engine is stopped."""
        with self._wake:
            while not (self._stopping or self._queue or self.active):
                self._wake.wait()
            if self._stopping:
                return False
            self._drop_cancelled()
            come: list[Job] = []
            while self._queue and self.active + len(come) < self.slots:
                come.append(self._queue.popleft())
            self._reading.extendleft(reversed(come))  # whoever comes reads a piece at once, and then in turns
        return True

    def _drop_cancelled(self) -> None:
        gone = [job for job in (*self._queue, *self._reading, *self._rows) if job is not None and job.cancelled]
        for job in gone:
            if job in self._queue:
                self._queue.remove(job)
            elif job in self._reading:
                self._reading.remove(job)
            else:
                self._rows[self._rows.index(job)] = None
            job.deliver(Finished("cancelled"))

    def _read_piece(self) -> None:
        """One piece of the prompt of the request whose turn it is, or what is left of it in small ones."""
        job = self._reading.popleft()
        self._skip(job)
        end = min(len(job.prompt), job._read + self.piece)
        size = generation.fitting_piece(end - job._read, self.piece)
        for start in range(job._read, end, size):
            part = job.prompt[start : start + size]
            tokens, length = np.zeros((1, size), np.int32), np.asarray([len(part)], np.int32)
            tokens[0, : len(part)] = part
            job._logits, job._state = generation.prefill_piece(
                self.params, self.config, tokens, length, job._state, job._logits
            )
            jax.block_until_ready(job._logits)  # or the device would be given all of a prompt, and others wait for it
            job._read += len(part)
            self.read_tokens += len(part)
            if len(part) == self.piece:
                self.prefixes.keep(job._keys[job._read // self.piece - 1], job._state)
        job.deliver(Read(job._read, job._cached))
        if job._read < len(job.prompt):
            self._reading.append(job)
        elif job.max_tokens == 0:
            job.deliver(Finished("length", state=job._state))
        else:
            slot = self._rows.index(None)
            self._seat(slot, job._state, job._logits)
            self._rows[slot] = job
            job._state = job._logits = None

    def _skip(self, job: Job) -> None:
        """Goes on from the longest beginning of the prompt that anyone has read; at first, from its start."""
        if job._state is None:
            job._state, job._logits = job.start.state if job.start else self._fresh, self._blank
        count, state = self.prefixes.longest(self._before(job))
        if state is not None and count * self.piece > job._read:
            job._cached += count * self.piece - job._read
            job._read = count * self.piece
            job._state = state
        job._state = self._fitting(job._state)

    def _fitting(self, state: state_lib.DecodeState) -> state_lib.DecodeState:
        """A state as the programs were compiled for it."""
        return generation.fitting_state(self.params, state)

    def _before(self, job: Job) -> Sequence[bytes]:
        """Keys of the pieces that leave something to read, as the answer begins with what the last token predicts."""
        return job._keys[: (len(job.prompt) - 1) // self.piece]

    def _seat(self, slot: int, state: state_lib.DecodeState, logits: jax.Array) -> None:
        where = jnp.asarray(slot, jnp.int32)
        self._state, self._logits = programs.seat(self._state, self._logits, state, logits, where)

    def _draw(self) -> programs.Drawn:
        """One step of all slots, on the host."""
        rows = self._rows

        def by_row(of: Callable[[Job], Any], dtype: Any) -> np.ndarray:
            return np.asarray([0 if job is None else of(job) for job in rows], dtype)

        draws = programs.Draws(
            live=np.asarray([job is not None for job in rows]),
            seed=by_row(lambda job: job.seed % 2**32, np.uint32),
            count=by_row(lambda job: job._count, np.int32),
            temperature=by_row(lambda job: job.sampling.temperature, np.float32),
            top_k=by_row(lambda job: job.sampling.top_k, np.int32),
            top_p=by_row(lambda job: job.sampling.top_p, np.float32),
            told=by_row(lambda job: job.told > 0, bool),
        )
        drawn, self._logits, self._state = programs.step(self.params, self.config, self._logits, self._state, draws)
        return programs.Drawn(*map(np.asarray, drawn))

    def _step(self) -> None:
        """Draws a token for every seated request; those that end leave their slots."""
        drawn = self._draw()
        self.steps += 1
        for slot, job in enumerate(self._rows):
            if job is None:
                continue
            token = int(drawn.token[slot])
            job._count += 1
            self.drawn_tokens += 1
            ended = token in job.stop_tokens
            if not ended:
                top, logprobs = (each[slot, : job.told].tolist() for each in (drawn.top, drawn.top_logprobs))
                told = tuple(zip(top, logprobs, strict=True))
                job.deliver(Token(token, float(drawn.logprob[slot]), told))
            if ended or job._count >= job.max_tokens:
                self._rows[slot] = None
                job.deliver(Finished("stop" if ended else "length"))
