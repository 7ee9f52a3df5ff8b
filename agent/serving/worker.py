"""The inference worker: a process that loads models and answers requests. It knows no MQTT and keeps nothing on disk.

Started by the supervisor, told what to do over the inherited socket (`agent.serving.ipc`), ends when that stream ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from agent.commands.ring import TEXT_CHARS, RingHandler
from agent.protocol.errors import WireErrorCode
from agent.protocol.logs import log_to_stderr
from agent.runtimes import let_go, open_runtime
from agent.runtimes.base import Runtime, RuntimeLoadError
from agent.serving.connection import Connection
from agent.serving.framing import borrow, pack, read_frame
from agent.serving.http import Api
from agent.serving.ipc import (
    Activate,
    Activated,
    AskFigures,
    ChooseSamples,
    Collect,
    Declare,
    Expect,
    Expose,
    Exposed,
    FromWorker,
    GrpcServed,
    Load,
    Loaded,
    Logged,
    Peek,
    Peeked,
    Ready,
    Sampled,
    Shutdown,
    TellFigures,
    TellPeers,
    ToWorker,
    Unload,
    Unservable,
    Window,
)
from agent.serving.models import LoadedModel
from agent.serving.processors import pin, yielding
from agent.serving.registry import Registry
from agent.telemetry.figures import SupervisorFigures
from agent.telemetry.host import free_memory_mb, own_memory_mb
from agent.trial import golden

if TYPE_CHECKING:  # at run time only where gRPC is configured
    from agent.serving.rpc.server import GrpcServer

log = logging.getLogger("agent.worker")
ResultT = TypeVar("ResultT")
DRAIN_S = 10.0
OPEN_WITHIN_S = 2.0
SETTLE_S = 3.0
SETTLED = 5  # looks at clients, of whom nobody asks
FIGURES_S = 2.0
MEMORY_WAIT_S = 3.0


def main() -> None:
    """Serve until the supervisor's stream ends."""
    if sys.argv[1:2] != ["--fd"]:
        sys.exit("agent.serving.worker is started by shoal-agent, not by people")
    sock = socket.socket(fileno=int(sys.argv[2]))
    borrowed = borrow(sock)
    if borrowed is None:
        return
    told, listeners = borrowed
    log_to_stderr("INFO", told.log_format, device=told.device)
    mine = len(listeners) - told.for_peers
    asyncio.run(Worker(listeners[:mine], list(told.grpc), listeners[mine:]).run(sock))


class Worker:
    """The process's parts.

    Args:
        listeners: sockets that listen; they stay open when this process ends, for the supervisor has them too.
        grpc_addresses: where gRPC is to be served; empty for nowhere.
        for_peers: sockets that listen for peers of the LAN.
    """

    def __init__(
        self, listeners: list[socket.socket], grpc_addresses: list[str], for_peers: list[socket.socket]
    ) -> None:
        self._listeners = listeners
        self._for_peers = for_peers
        self._grpc_addresses = grpc_addresses
        self._grpc: GrpcServer | None = None
        self._servers: list[asyncio.Server] = []
        self._registry = Registry()
        self._api = Api(self._registry)
        self._api.ask_supervisor = self._ask_supervisor
        self._asking: asyncio.Future[SupervisorFigures] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._stop = asyncio.Event()
        self._jobs: set[asyncio.Task[None]] = set()
        self._loading: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()
        self._unservable: dict[str, str] | None = {}  # as was said; None: to be said in any case

    async def run(self, sock: socket.socket) -> None:
        """Serve until told to stop or left alone."""
        loop = asyncio.get_running_loop()
        reader, self._writer = await asyncio.open_connection(sock=sock)
        logging.getLogger().addHandler(RingHandler(lambda *record: _tell(loop, self._log, record)))
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is the supervisor's to handle
        for one in self._listeners:
            create = loop.create_unix_server if one.family == socket.AF_UNIX else loop.create_server
            self._servers.append(await create(lambda: Connection(self._api), sock=one, start_serving=False))
        self._send(Ready(*_addresses(self._listeners)))
        listening = asyncio.create_task(self._listen(reader))
        await self._stop.wait()
        listening.cancel()
        self._api.draining = True
        if self._api.lan is not None:
            self._api.lan.close()
        for server in self._servers:
            server.close()
        await self._settle()
        await asyncio.wait_for(self._drain(), DRAIN_S)

    async def _settle(self) -> None:
        """Let those who ask be answered while there is something that answers; who has just come is about to ask."""
        loop, quiet = asyncio.get_running_loop(), 0
        until = loop.time() + SETTLE_S
        while quiet < SETTLED and loop.time() < until:
            await asyncio.sleep(0.02)
            quiet = 0 if self._api.clients.asking or self._api.clients.about_to_ask else quiet + 1

    async def _drain(self) -> None:
        if self._grpc is not None:
            await self._grpc.stop(DRAIN_S / 2)
        await self._api.ensembles.finished()
        for model in self._registry.all():
            await asyncio.to_thread(model.close)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        decoder = msgspec.msgpack.Decoder(ToWorker)
        while (message := await read_frame(reader, decoder)) is not None:
            match message:
                case Declare():
                    self._api.ensembles.declare(message.ensembles)
                    self._unservable = None
                case Expect():
                    self._api.expected = frozenset(message.models)
                    self._begin(self._take_requests())
                case ChooseSamples():
                    self._registry.choose_samples(message.models)
                case TellPeers():
                    self._tell_peers(message)
                case Collect() | Peek() | TellFigures():
                    self._count(message)
                case Shutdown():
                    break
                case _:
                    self._change(message)
            self._say_unservable()
        self._stop.set()

    def _tell_peers(self, message: TellPeers) -> None:
        if self._api.lan is None:
            from agent.serving.balancing.lan import Lan

            self._api.lan = Lan(self._registry, self._api.inferring, self._api.buffers, self._for_peers)
        self._api.lan.told(message)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        job = asyncio.create_task(work)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return job

    async def _take_requests(self) -> None:
        """Take requests from now on. What is just being loaded is waited for: until then who comes waits in a queue."""
        loading = [job for job in self._loading if not job.done()]
        if loading:
            await asyncio.wait(loading, timeout=OPEN_WITHIN_S)
        for server in self._servers:
            await server.start_serving()
        await self._serve_grpc()

    def _count(self, message: Collect | Peek | TellFigures) -> None:
        """Say what was counted, or take what the supervisor counted."""
        match message:
            case Collect():
                for samples in self._registry.take_samples():
                    self._send(Sampled(samples))
                self._send(Window(message.request_id, tuple(self._registry.collect()), own_memory_mb()))
            case Peek():
                counts = tuple(model.totals() for model in self._registry.all())
                self._send(Peeked(message.request_id, counts, own_memory_mb()))
            case TellFigures() if self._asking is not None and not self._asking.done():
                self._asking.set_result(message.figures)

    async def _ask_supervisor(self) -> SupervisorFigures | None:
        """What the supervisor says of itself; None when it is busy. Who asks meanwhile gets the same answer."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_future()
            self._send(AskFigures())
        try:
            return await asyncio.wait_for(asyncio.shield(self._asking), FIGURES_S)
        except TimeoutError:
            return None

    def _say_unservable(self) -> None:
        problems = self._api.ensembles.problems()
        if problems != self._unservable:
            self._unservable = problems
            self._send(Unservable(problems))

    async def _serve_grpc(self) -> None:
        """Listen for gRPC too, where that is wanted and not done yet. Without it HTTP is served all the same."""
        addresses, self._grpc_addresses = self._grpc_addresses, []
        if not addresses:
            return
        try:
            from agent.serving.rpc.server import GrpcServer

            server = GrpcServer(self._api, addresses)
            listens_at = await server.start()
        except ImportError as error:
            detail = f"its libraries can't be imported ({error}): pip install 'shoal[grpc]'"
        except (RuntimeError, OSError) as error:
            detail = f"{' or '.join(addresses)} can't be had ({error}): end what listens there, or change grpc.listen"
        else:
            self._grpc = server
            self._send(GrpcServed(listens_at))
            return
        self._send(GrpcServed(problem=f"gRPC is not served, HTTP is: {detail}"))

    def _change(self, message: Load | Activate | Expose | Unload) -> None:
        """Change what is loaded, and what answers."""
        match message:
            case Load():
                self._loading.add(self._begin(self._load(message)))
            case Activate():
                ok = self._registry.activate(message.model, message.digest)
                self._send(Activated(message.request_id, ok))
            case Expose():
                ok = self._registry.expose(message.model, message.digest, message.exposure)
                self._send(Exposed(message.request_id, ok))
            case Unload():
                model = self._registry.remove(message.model, message.digest)
                if model is not None:
                    threading.Thread(target=model.close, daemon=True).start()

    async def _load(self, message: Load) -> None:
        started, before_mb = time.monotonic(), own_memory_mb()
        try:
            runtime, allowed = await _in_quiet_thread(
                lambda: _proven(message),
                starts_threads=message.manifest.threads > 1,
                yields=any(self._registry.all()),  # while nobody is answered, to load is the most urgent there is
            )
        except RuntimeLoadError as error:
            self._send(Loaded(message.request_id, code=error.code, detail=error.detail))
            return
        except Exception as error:
            log.exception("loading failed")
            detail = f"{type(error).__name__}: {str(error)[:500]}"
            self._send(Loaded(message.request_id, code=WireErrorCode.LOAD_FAILED, detail=detail))
            return
        # Made here, not in the loading thread: its thread would inherit that one's niceness.
        self._registry.add(LoadedModel(message.manifest, message.deployment_id, runtime, allowed))
        if message.serve and self._registry.serving(message.manifest.model) is None:
            self._registry.activate(message.manifest.model, message.manifest.digest)
        self._say_unservable()
        took = time.monotonic() - started
        self._send(
            Loaded(message.request_id, runtime.version, runtime.provider, took, before_mb, fell_back=runtime.fell_back)
        )

    def _log(self, at: float, level: str, logger: str, text: str) -> None:
        self._send(Logged(at, level, logger, text[:TEXT_CHARS]))

    def _send(self, message: FromWorker) -> None:
        assert self._writer is not None
        self._writer.write(pack(message))


def _tell(loop: asyncio.AbstractEventLoop, log_it: Callable[..., None], record: tuple[float, str, str, str]) -> None:
    """Called from whatever thread logs; when the loop has ended nobody listens any more."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(log_it, *record)


def _addresses(listeners: list[socket.socket]) -> tuple[str, str]:
    """Of the local inference API: its URL, and the path of its Unix socket."""
    url = path = ""
    for one in listeners:
        if one.family == socket.AF_UNIX:
            path = one.getsockname()
        elif not url:
            host, port = one.getsockname()[:2]
            url = f"http://[{host}]:{port}" if one.family == socket.AF_INET6 else f"http://{host}:{port}"
    return url, path


def _proven(message: Load) -> tuple[Runtime, dict[str, float]]:
    """An artifact loaded, warmed up, and found to answer as it did where it was built.

    Returns:
        It, and by output how far another version's answers may be from its that count as the same.

    Raises:
        RuntimeLoadError: otherwise; then nothing of it is left.
    """
    free_mb, until = free_memory_mb(), time.monotonic() + MEMORY_WAIT_S
    while free_mb < message.need_mb and time.monotonic() < until:  # what was unloaded a moment ago is given back now
        time.sleep(0.1)
        free_mb = free_memory_mb()
    if free_mb < message.need_mb:
        detail = (
            f"loading it beside what serves needs {message.need_mb:.0f} MiB, and {free_mb:.0f} MiB are free: free "
            "some, or let the version before go first, which answers nothing meanwhile (on_memory_short=replace)"
        )
        raise RuntimeLoadError(WireErrorCode.MEMORY_SHORT, detail)
    pin(message.manifest.scheduling.cores)  # for the threads that the runtime starts
    compiled = Path(message.compiled) if message.compiled else None
    runtime = open_runtime(message.manifest, Path(message.path), may_fall_back=message.may_fall_back, compiled=compiled)
    if not message.golden_path:
        return runtime, {}
    allowed: dict[str, float] = {}
    try:
        known = golden.read(Path(message.golden_path), message.manifest)
        problem, allowed = golden.check(known, runtime), golden.differences(known)
    except golden.GoldenError as error:
        problem = f"the golden inputs can't be read: {error}"
    if problem is None:
        return runtime, allowed
    detail = f"{problem}; it ran on {runtime.provider} by {runtime.version}. It never served"
    let_go(runtime)
    raise RuntimeLoadError(WireErrorCode.GOLDEN_MISMATCH, detail)


async def _in_quiet_thread(function: Callable[[], ResultT], *, starts_threads: bool, yields: bool) -> ResultT:
    """Run a load in a thread of its own that yields to those which answer requests, where there are any."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[ResultT] = loop.create_future()

    def work() -> None:
        try:
            with yielding(starts_threads=starts_threads) if yields else contextlib.nullcontext():
                result = function()
        except Exception as error:  # noqa: BLE001 (carried over to the caller)
            loop.call_soon_threadsafe(future.set_exception, error)
        else:
            loop.call_soon_threadsafe(future.set_result, result)

    threading.Thread(target=work, name="load", daemon=True).start()
    return await future


if __name__ == "__main__":
    main()
