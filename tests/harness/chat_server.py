"""A small server of OpenAI's chat completions on stock transformers, for tests; it returns what vLLM returns."""

import base64
import io
import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import oracle
import torch
from PIL import Image


class Server:
    """The model that it serves, the requests that it got, and how it misbehaves."""

    def __init__(self, folder, model):
        self.folder, self.model, self.lock = str(folder), model, threading.Lock()
        self.tells = {"prompt_token_ids", "token_ids", "logprobs"}
        self.names = ["served"]
        self.requests, self.keys = [], []
        self.refuse = []  # (status, headers, body) of the answers to the next requests
        self.enlarge = 1  # factor by which images are enlarged before the model sees them
        self.url = ""

    def complete(self, body):
        images = []
        messages = [{**message, "content": self._content(message["content"], images)} for message in body["messages"]]
        with self.lock:
            inputs = oracle.ask(oracle.conversation, folder=self.folder, messages=messages, images=images, prompt=True)
            inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}
            with torch.no_grad():
                found = self.model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=body["max_tokens"],
                    output_scores=True,
                    return_dict_in_generate=True,
                    top_k=None,
                    top_p=None,
                    temperature=None,
                )
            prompt = inputs["input_ids"][0].tolist()
            ids = found.sequences[0, len(prompt) :].tolist()
            text = oracle.ask(oracle.decoded, folder=self.folder, ids=ids)
        stops = self.model.generation_config.eos_token_id
        ended = ids[-1] in stops
        logs = [float(scores[0].log_softmax(-1)[token]) for scores, token in zip(found.scores, ids, strict=True)]
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = "stop" if ended else "length"
        if "token_ids" in self.tells:
            choice["token_ids"] = ids
        if body.get("logprobs") and "logprobs" in self.tells:
            choice["logprobs"] = {"content": [{"token": str(i), "logprob": x} for i, x in zip(ids, logs, strict=True)]}
        answer = {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}
        return answer | ({"prompt_token_ids": prompt} if "prompt_token_ids" in self.tells else {})

    def _content(self, content, images):
        if isinstance(content, str):
            return content
        parts = []
        for part in content:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition("base64,")[2])
                picture = Image.open(io.BytesIO(data)).convert("RGB")
                images.append(picture.resize((picture.width * self.enlarge, picture.height * self.enlarge)))
                parts.append({"type": "image"})
            else:
                parts.append(part)
        return parts


@contextmanager
def serving(server):
    """Run the server on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.keys.append(self.headers.get("Authorization"))
            if server.refuse:
                status, headers, said = server.refuse.pop(0)
                self._send(status, said, headers)
                return
            self._answer({"data": [{"id": name} for name in server.names]} if self.path == "/v1/models" else None)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(body)
            server.keys.append(self.headers.get("Authorization"))
            if server.refuse:
                status, headers, said = server.refuse.pop(0)
                self._send(status, said, headers)
                return
            self._answer(server.complete(body) if self.path == "/v1/chat/completions" else None)

        def _answer(self, found):
            self._send(404 if found is None else 200, json.dumps(found or {"error": {"message": "no such path"}}), {})

        def _send(self, status, text, headers):
            """Send a text, or let a function write it: the function may be slow, or never end."""
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if not callable(text):
                data = text if isinstance(text, bytes) else text.encode()
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(BrokenPipeError, ConnectionResetError):  # the client has closed the connection
                for piece in text() if callable(text) else [data]:
                    self.wfile.write(piece)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{listening.server_port}/v1"
    try:
        yield server
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
