"""A proxy that shows a server under a path, as nginx does with `proxy_pass`."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def under(path: str, port: int, keeps: bool) -> Iterator[str]:
    """The address of http://127.0.0.1:`port` under `path`, which is taken away from requests unless the proxy keeps it.
    Anything outside of it is a 404."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
            method, target, version = first.split(" ")
            if target != path and not target.startswith(f"{path}/"):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                writer.close()
                return
            sent = target if keeps else target.removeprefix(path) or "/"
            kept = [line for line in lines if not line.lower().startswith("connection:")]
            # One request a connection, so that the rest of the bytes need not be understood.
            kept += ["Connection: close", "X-Forwarded-Proto: http"]
            behind, before = await asyncio.open_connection("127.0.0.1", port)
            before.write("\r\n".join([f"{method} {sent} {version}", *kept, "", ""]).encode("latin-1"))
            await asyncio.gather(pipe(reader, before), pipe(behind, writer))

    loop = asyncio.new_event_loop()  # in a thread of its own: a browser's driver has one in the test's
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(handle, "127.0.0.1", 0), loop).result()
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
