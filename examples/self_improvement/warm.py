"""Run scripts in forks of one process that has loaded torch and transformers: four seconds less for each command.

    with serving(socket): ... `python warm.py SOCKET SCRIPT ARGUMENTS` ...

Only the experiment needs it, which runs some hundred commands that take a few seconds each.
"""

import json
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path


def run_script(arguments: list[str], outputs: list[int]) -> int:
    """Run a script as `python SCRIPT ARGUMENTS` would, with these for its standard output and error."""
    for descriptor, place in zip(outputs, (1, 2), strict=True):
        os.dup2(descriptor, place)
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def serve(server: socket.socket) -> None:
    """Answer each connection in a fork, with the exit status of its script."""
    sys.path.insert(0, str(Path(__file__).parent))
    import toy  # noqa: F401 - and with it torch and transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM  # noqa: F401

    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            message, outputs, _, _ = socket.recv_fds(connection, 1 << 16, 2)
            folder, *arguments = json.loads(message)
            os.chdir(folder)
            connection.sendall(bytes([run_script(arguments, outputs)]))
            os._exit(0)
        connection.close()
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass


@contextmanager
def serving(path: Path) -> Iterator[None]:
    """Serve at a socket while the block runs."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        with chdir(path.parent):  # a socket's whole path may be too long
            server.bind(path.name)
        server.listen()
        child = os.fork()
        if child == 0:
            try:
                serve(server)
            finally:
                os._exit(1)
    try:
        yield
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        path.unlink(missing_ok=True)


def main() -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        message = json.dumps([str(Path.cwd()), *sys.argv[2:]]).encode()
        socket.send_fds(connection, [message], [1, 2])
        status = connection.recv(1)
    sys.exit(status[0] if status else 1)


if __name__ == "__main__":
    main()
