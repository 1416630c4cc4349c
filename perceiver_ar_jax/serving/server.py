"""The server's process: a socket on this machine, signals, limits."""

import signal
import socket
import sys

import uvicorn

from perceiver_ar_jax.pretrained import Pretrained
from perceiver_ar_jax.serving.app import make_app
from perceiver_ar_jax.serving.engine import Engine, Limits

TERMINATED = 128 + signal.SIGTERM
GRACE = 3  # seconds that a request has to end in after SIGTERM or Ctrl-C


def serve(pretrained: Pretrained, *, name: str, port: int, limits: Limits) -> None:
    """Serves a model on 127.0.0.1 until SIGTERM, which raises SystemExit(143), or Ctrl-C.

    Args:
      pretrained: the model, with a tokenizer.
      name: what clients call it.
      port: 0 takes a free one; the address is printed.
      limits: of requests.

    Raises:
      OSError: the port is not free.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        app = make_app(Engine(pretrained, limits), name=name)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            timeout_graceful_shutdown=GRACE,
        )
        # uvicorn stops gracefully and then raises the signal again.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
        print(f"{name} at http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        uvicorn.Server(config).run(sockets=[listener])
