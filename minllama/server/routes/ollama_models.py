"""Ollama's lists and descriptions of models, and its version."""

import hashlib
import json
from typing import Any

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import Field

from minllama.quantization.modules import QuantizedWeight
from minllama.server.errors import RequestError
from minllama.server.ollama_fields import named_model, timestamp
from minllama.server.registry import ServedModel
from minllama.server.routing import Body, answered_as, service_of
from minllama.server.routing import router as make_router
from minllama.text import VERSION

router = make_router()

NEVER = "2318-01-01T00:00:00Z"  # Ollama's word for a model that stays loaded
UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K"))


class ShowBody(Body):
    """The name of a model; `name` is its older field."""

    model: str | None = Field(None, max_length=512)
    name: str | None = Field(None, max_length=512)
    verbose: bool | None = None


@router.head("/", responses=answered_as("text/plain"))
async def alive() -> Response:
    """Clients ask so whether a server is there."""
    return PlainTextResponse("minllama is running")


@router.get("/api/version")
@router.head("/api/version")
async def version() -> dict[str, str]:
    """The version of this server."""
    return {"version": VERSION}


@router.get("/api/tags")
@router.head("/api/tags")
async def tags(request: Request) -> dict[str, Any]:
    """The models that generate."""
    return {"models": [_entry(model) for model in _generative(request)]}


@router.get("/api/ps")
async def running(request: Request) -> dict[str, Any]:
    """The models that are loaded, which are all."""
    entries = []
    for model in _generative(request):
        entry = _entry(model)
        on_gpu = model.engine.device.type != "cpu"
        entry |= {
            "expires_at": NEVER,
            "size_vram": entry["size"] if on_gpu else 0,
            "context_length": model.context_len,
        }
        del entry["modified_at"]
        entries.append(entry)
    return {"models": entries}


@router.post("/api/show")
async def show(request: Request, body: ShowBody) -> dict[str, Any]:
    """What a model is."""
    service = service_of(request)
    name = body.model or body.name
    if not name:
        raise RequestError("model is required: the name of a model", param="model")
    model = named_model(service, name).generative()
    config = model.llama.config
    try:
        template = model.template().source
    except RequestError:
        template = None
    said = {} if model.defaults is None else model.defaults.options
    return {
        "modelfile": f"FROM {model.id}\n",
        "parameters": "\n".join(f"{name} {json.dumps(value)}" for name, value in said.items()),
        "template": template or "{{ .Prompt }}",
        "details": _details(model),
        "model_info": {
            "general.architecture": "llama",
            "general.parameter_count": _n_parameters(model),
            "llama.attention.head_count": config.n_heads,
            "llama.attention.head_count_kv": config.n_kv_heads,
            "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
            "llama.block_count": config.n_layers,
            "llama.context_length": config.context_len,
            "llama.embedding_length": config.dim,
            "llama.feed_forward_length": config.hidden_dim,
            "llama.rope.freq_base": config.rope_theta,
            "llama.vocab_size": config.vocab_size,
        },
        "capabilities": ["completion", "tools"] if template else ["completion"],
        "modified_at": _modified(model),
    }


def _generative(request: Request) -> list[ServedModel]:
    models = service_of(request).registry.models.values()
    return [model for model in models if model.kind != "classifier"]


def _entry(model: ServedModel) -> dict[str, Any]:
    details = _details(model)
    size = sum(t.nbytes for t in _tensors(model))
    about = json.dumps([model.id, model.released, size, repr(model.llama.config)])
    return {
        "name": model.id,
        "model": model.id,
        "modified_at": _modified(model),
        "size": size,
        "digest": hashlib.sha256(about.encode()).hexdigest(),  # of its description
        "details": details,
    }


def _details(model: ServedModel) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "minllama",
        "family": "llama",
        "families": ["llama"],
        "parameter_size": shown_count(_n_parameters(model)),
        "quantization_level": _weight_format(model),
    }


def shown_count(n: int) -> str:
    """A count of parameters as Ollama shows it: 134.5M."""
    for size, unit in UNITS:
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(n)


def _tensors(model: ServedModel) -> list[Any]:
    """Weights, each once: what is shared counts for one."""
    llama = model.llama
    every = (*llama.parameters(), *llama.buffers())
    return list({tensor.data_ptr(): tensor for tensor in every}.values())


def _n_parameters(model: ServedModel) -> int:
    """Weights of the model as it is not quantized."""
    matrices = {
        module.quants.data_ptr(): module.out_features * module.in_features
        for module in model.llama.modules()
        if isinstance(module, QuantizedWeight)
    }
    return sum(matrices.values()) + sum(p.numel() for p in model.llama.parameters())


def _weight_format(model: ServedModel) -> str:
    """The kind of its largest weights: int4, int8, or a data type."""
    bits = [m.bits for m in model.llama.modules() if isinstance(m, QuantizedWeight)]
    if bits:
        return f"int{min(bits)}"
    return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(
        str(next(model.llama.parameters()).dtype).removeprefix("torch."), "F32"
    )


def _modified(model: ServedModel) -> str:
    return f"{model.released}T00:00:00Z" if model.released else timestamp(model.created)
