"""Serve a model at two alphas in turn, to try which one to keep: no merged checkpoint is written.

    pip install 'mergekit-imm[analyze]'
    python examples/two_alphas.py base sft 0.3 0.7
    curl localhost:8000 -d '{"prompt": "Once", "alpha": 0.3}'

One model is in memory. A request for the other alpha merges and loads it first. Requests wait for each other. For many
users see the loader for vLLM in docs/python.md.
"""

import argparse
import contextlib
import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import transformers

from mergekit_imm import iter_merged

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("base")
parser.add_argument("sft")
parser.add_argument("alphas", type=float, nargs=2, metavar="ALPHA")
parser.add_argument("--drop", type=float, default=0.2)
parser.add_argument("--port", type=int, default=8000)
parser.add_argument("--new-tokens", type=int, default=64)
asked = parser.parse_args()

config = transformers.AutoConfig.from_pretrained(asked.sft)
tokenizer = transformers.AutoTokenizer.from_pretrained(asked.sft)
loaded: dict[float, Any] = {}  # the model, by its alpha


def model_at(alpha: float) -> Any:
    if alpha not in loaded:
        loaded.clear()  # before the next takes its place
        merged = dict(iter_merged(asked.base, asked.sft, alpha=alpha, drop=asked.drop))
        kind = getattr(transformers, config.architectures[0])
        loaded[alpha] = kind.from_pretrained(None, config=config, state_dict=merged)
        with contextlib.suppress(OSError):  # a model may have none
            loaded[alpha].generation_config = transformers.GenerationConfig.from_pretrained(asked.sft)
    return loaded[alpha]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        try:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt, alpha = request["prompt"], request["alpha"]
            if alpha not in asked.alphas:
                raise ValueError(f"alpha is {alpha}; served are {asked.alphas}")
        except (KeyError, TypeError, ValueError) as error:
            self.answer(400, {"error": f"send prompt and alpha: {error}"})
            return
        began = time.perf_counter()
        model = model_at(alpha)
        ready = time.perf_counter()
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, tokenizer=tokenizer, max_new_tokens=asked.new_tokens, do_sample=False)
        text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.answer(200, {"alpha": alpha, "text": text, "seconds_to_switch": round(ready - began, 3)})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


model_at(asked.alphas[0])
with HTTPServer(("127.0.0.1", asked.port), Handler) as server:
    print(f"http://127.0.0.1:{server.server_port} serves alpha {asked.alphas[0]} and {asked.alphas[1]}", flush=True)
    server.serve_forever()
