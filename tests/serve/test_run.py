"""The server's main thread, which waits to be asked to end."""

import signal
import socket
from threading import Event, Thread, Timer, get_ident

from dots1_local.serve.run import ApiServer


def test_hears_a_signal_that_linux_gave_to_another_thread() -> None:
    over, late = Event(), Event()
    other = Thread(target=over.wait)
    other.start()
    assert other.ident

    def give_up() -> None:
        late.set()
        signal.pthread_kill(main, signal.SIGTERM)

    main = get_ident()
    timers = [Timer(0.3, signal.pthread_kill, [other.ident, signal.SIGTERM]), Timer(20, give_up)]
    try:
        with ApiServer(socket.create_server(("127.0.0.1", 0)), "dots1") as server:
            for timer in timers:
                timer.start()
            server.wait()
    finally:
        for timer in timers:
            timer.cancel()
        over.set()
        other.join()
    assert not late.is_set()
