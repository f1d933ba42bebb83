"""One ONNX base, many adapters, one small HTTP server: each request names the adapter that it wants.

python examples/serve_adapters.py FOLDER    # that export_onnx(mode="multi") wrote: model.onnx, *.onnx_adapter
curl -d '{"adapter": "small", "inputs": {"input": [[0.1, 0.2]]}}' http://127.0.0.1:8000/
"""

from __future__ import annotations

import argparse
import json
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from lora2fx import Lora2fxError
from lora2fx.exporters import OnnxModel

LONGEST = 2**20
"""Bytes of a request."""


def load(folder: Path) -> tuple[OnnxModel, list[str]]:
    """The base and the names of its adapters; each file is checked against the base before it is used."""
    model = OnnxModel(folder / "model.onnx")
    files = {
        path.name.removesuffix(".onnx_adapter").removeprefix("model."): path for path in folder.glob("*.onnx_adapter")
    }
    for name, path in sorted(files.items()):
        model.load_adapter(name, path)
    return model, sorted(files)


def server(folder: Path, port: int = 8000) -> ThreadingHTTPServer:
    """A server on this machine alone; port 0 takes a free one."""
    model, names = load(folder)
    turn = threading.Lock()

    class Requests(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(HTTPStatus.OK, {"adapters": names})

        def do_POST(self) -> None:
            try:
                length = int(self.headers.get("Content-Length", 0))
                if not 0 < length <= LONGEST:
                    raise ValueError(f"a request of 1 to {LONGEST} bytes, please; this one has {length}")
                asked = json.loads(self.rfile.read(length))
                inputs = {name: np.asarray(rows, np.float32) for name, rows in asked["inputs"].items()}
                with turn:
                    found = model.run(inputs, adapter=asked.get("adapter"))
                self.answer(HTTPStatus.OK, {name: value.tolist() for name, value in found.items()})
            except (ValueError, KeyError, TypeError, AttributeError, Lora2fxError) as error:
                self.answer(HTTPStatus.BAD_REQUEST, {"error": str(error)})

        def answer(self, status: HTTPStatus, body: dict[str, object]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    return ThreadingHTTPServer(("127.0.0.1", port), Requests)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    with server(options.folder, options.port) as running:
        print(f"http://127.0.0.1:{running.server_port}/")
        running.serve_forever()
