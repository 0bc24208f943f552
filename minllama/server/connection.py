"""A connection over HTTP/1.1: uvicorn's, which clients cannot hold without using it."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """Ends where a client lets it wait: for a request's head, or for its answer to be read.

    uvicorn itself waits without end for the head of a first request, starts counting again with
    every byte of a later one, and keeps what nobody reads. The time for each is its
    `timeout_keep_alive`. How long a body may take is up to the application.
    """

    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._is_read()

    def data_received(self, data: bytes) -> None:
        self.conn.receive_data(data)
        self.handle_events()  # ends the waiting where there is a whole head

    def pause_writing(self) -> None:
        super().pause_writing()
        self._is_unread()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._is_read()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._is_unread()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._is_unread()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # the answer to this request has begun
            self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # without a line of the log for each request

    def _is_unread(self) -> None:
        """Give the client time to read what is left; a transport that closes would wait for it."""
        if self._unread is None:
            self._unread = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
