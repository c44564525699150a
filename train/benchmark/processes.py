"""Engines that are measured in processes of their own."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import jax

from jaxformer.errors import UserError


@contextlib.contextmanager
def in_a_process(name: str, build: Callable[..., Callable], *arguments: Any) -> Iterator[Callable]:
    """Yield a function that calls what `build(*arguments)` returns, in a process of its own.

    In a shared process, two engines would compete for threads and for a GPU's memory.

    Raises:
      UserError: `build` raised one, or the process has died; then it says that `name` has failed.
    """
    context = multiprocessing.get_context("spawn")
    connection, far_end = context.Pipe()
    process = context.Process(target=_serve, args=(far_end, build, arguments), daemon=True)
    process.start()
    far_end.close()

    def answer(*sent: Any) -> Any:
        """Return the reply to what is sent or, without arguments, to the start."""
        try:
            for values in sent:
                connection.send(values)
            result, error = connection.recv()
        except (EOFError, OSError) as problem:
            raise UserError(f"{name} has failed: see above") from problem
        if error is not None:
            raise UserError(error)
        return result

    try:
        answer()
        yield lambda *values: answer(values)
    except BaseException:  # such as Ctrl-C: the process need not finish its work
        process.terminate()
        raise
    finally:
        connection.close()
        process.join()


def _serve(connection: Connection, build: Callable[..., Callable], arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and that ends this
    jax.config.update("jax_platforms", "cpu")  # a GPU and its memory are the other engine's
    try:
        function = build(*arguments)
    except UserError as error:
        connection.send((None, str(error)))
        return
    connection.send((None, None))
    while True:
        try:
            values = connection.recv()
        except EOFError:
            return
        connection.send((function(*values), None))
