"""A small server of OpenAI's chat completions over stock transformers and PEFT: one request at a time, greedy.

It imports nothing of ours, so that it runs with any Python that has transformers, PEFT, torchvision and PyAV:

    python stock.py MODEL --adapter ADAPTER --served-model-name mine --port 8000
"""

import argparse
import base64
import io
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import av
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoVideoProcessor,
)

CHAT = "/v1/chat/completions"


class Served:
    """A loaded model with its processor, and the name that it has here."""

    def __init__(self, args: argparse.Namespace) -> None:
        folder, adapter = args.model, args.adapter
        config = AutoConfig.from_pretrained(folder)
        for section, values in args.overrides.items():
            for key, value in values.items():
                setattr(getattr(config, section), key, value)
        model = AutoModelForImageTextToText.from_pretrained(folder, config=config, dtype=args.dtype)
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.name: str = args.served_model_name
        # arguments of a call would not reach the rules by which frames are chosen
        if images := args.processor.get("images_kwargs"):
            self.processor.image_processor = AutoImageProcessor.from_pretrained(folder, **images)
        if videos := args.processor.get("videos_kwargs"):
            self.processor.video_processor = AutoVideoProcessor.from_pretrained(folder, **videos)

    @torch.inference_mode()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Answer one request, with the ids and log-probabilities that vLLM tells as well."""
        if body.get("temperature"):
            raise ValueError(f"temperature is {body['temperature']}; this server is greedy, 0")
        inputs = self._inputs(body).to(self.model.device)
        prompt = inputs["input_ids"][0].tolist()
        done = self.model.generate(
            **inputs,
            max_new_tokens=body.get("max_completion_tokens") or body.get("max_tokens") or 256,
            do_sample=False,
            top_k=None,
            top_p=None,
            temperature=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = done.sequences[0, len(prompt) :].tolist()
        logs = [step[0].float().log_softmax(-1)[token].item() for step, token in zip(done.logits, ids, strict=True)]
        stops = self.model.generation_config.eos_token_id
        ended = ids[-1] in (stops if isinstance(stops, list) else [stops])
        tokens = self.processor.tokenizer
        choice = {
            "index": 0,
            "finish_reason": "stop" if ended else "length",
            "message": {"role": "assistant", "content": tokens.decode(ids, skip_special_tokens=True)},
            "token_ids": ids,
            "logprobs": {
                "content": [
                    {"token": tokens.decode([token]), "logprob": log} for token, log in zip(ids, logs, strict=True)
                ]
            },
        }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
        return {
            "id": "chat-0",
            "object": "chat.completion",
            "created": 0,
            "model": self.name,
            "choices": [choice],
            "usage": usage,
            "prompt_token_ids": prompt,
        }

    def _inputs(self, body: dict[str, Any]) -> Any:
        """Return what the model's own processor makes of a conversation."""
        images: list[Any] = []
        videos: list[Any] = []
        metadata: list[dict[str, Any]] = []
        messages = [_message(message, images, videos, metadata) for message in body["messages"]]
        text = self.processor.apply_chat_template(
            messages, tools=body.get("tools"), tokenize=False, add_generation_prompt=True
        )
        video = {"video_metadata": metadata, "do_sample_frames": True} if videos else {}
        return self.processor(text=[text], images=images or None, videos=videos or None, return_tensors="pt", **video)


def _message(
    message: dict[str, Any], images: list[Any], videos: list[Any], metadata: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return a message as chat templates take it; its media go into the lists."""
    parts: list[dict[str, str]] = []
    content = message.get("content") or ""
    for part in [] if isinstance(content, str) else content:
        if part["type"] == "image_url":
            images.append(Image.open(io.BytesIO(_bytes(part["image_url"]["url"]))).convert("RGB"))
            parts.append({"type": "image"})
        elif part["type"] == "video_url":
            frames, facts = _frames(_bytes(part["video_url"]["url"]))
            videos.append(frames)
            metadata.append(facts)
            parts.append({"type": "video"})
        else:
            parts.append(part)
    calls = [
        call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or []
    ]
    return message | {"content": parts or content} | ({"tool_calls": calls} if calls else {})


def _bytes(url: str) -> bytes:
    head, mark, data = url.partition(";base64,")
    if not head.startswith("data:") or not mark:
        raise ValueError(f"media must be data URLs, as data:image/png;base64,..., and one begins with {url[:40]!r}")
    return base64.b64decode(data)


def _frames(data: bytes) -> tuple[list[Any], dict[str, Any]]:
    """Return all frames of a video, and what the processor must know to choose some of them."""
    with av.open(io.BytesIO(data), "r") as container:
        rate = float(container.streams.video[0].average_rate or 24)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return frames, {"fps": rate, "total_num_frames": len(frames), "duration": len(frames) / rate}


def handler(served: Served) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers requests with this model."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/v1/models"
            listed = {"object": "list", "data": [{"id": served.name, "object": "model"}]}
            self._send(200 if known else 404, listed if known else _error(f"no such path: {self.path}"))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != CHAT:
                self._send(404, _error(f"no such path: {self.path}"))
            elif body.get("model") != served.name:
                self._send(404, _error(f"no model is called {body.get('model')!r}; this server has {served.name!r}"))
            else:
                try:
                    self._send(200, served.complete(body))
                except ValueError as error:
                    self._send(400, _error(str(error)))

        def _send(self, status: int, tree: dict[str, Any]) -> None:
            data = json.dumps(tree).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


def _error(text: str) -> dict[str, Any]:
    return {"error": {"message": text}}


def main() -> None:
    """Load the model, then answer until the process is ended."""
    parser = argparse.ArgumentParser(description="Serve a model, with an adapter or without, by stock transformers.")
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--adapter", default="", help="an adapter folder in PEFT's format")
    parser.add_argument("--served-model-name", default="served", help="the model's name in requests")
    parser.add_argument("--dtype", default="auto", help="type of the weights: auto, float32, bfloat16")
    parser.add_argument("--overrides", type=json.loads, default={}, help="changes of config.json by section, as JSON")
    parser.add_argument("--processor", type=json.loads, default={}, help="images_kwargs and videos_kwargs, as JSON")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at")
    args = parser.parse_args()
    HTTPServer((args.host, args.port), handler(Served(args))).serve_forever()


if __name__ == "__main__":
    main()
