"""Transformers written out step by step, with one bit of one value flipped by hand: what spaces are held against.

Nothing of flipproof is used here. Each function takes the library's module for its weights alone, and computes with
plain products and sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Fault = tuple[str, int, int, int]
"""Name of a value, number of the sample, flat index in what the sample has of it, bit."""


class Hand:
    """Sees every value by name, and flips a bit of one.

    Attention is "eager", which adds the lowest number there is where a token does not see another; "fused" in one
    kernel; or "apart", the kernel's steps, which puts −inf there.
    """

    def __init__(self, fault: Fault | None = None, attention: str = "eager") -> None:
        self.fault, self.attention, self.seen = fault, attention, {}

    def __call__(self, name: str, value: Tensor, axis: int = 0) -> Tensor:
        assert name not in self.seen, name
        rows = value.movedim(axis, 0).contiguous().clone()
        self.seen[name] = tuple(rows.shape[1:])
        if self.fault is None or self.fault[0] != name:
            return value
        _, row, place, bit = self.fault
        rows[row].reshape(-1).numpy().view(np.uint32)[place] ^= np.uint32(1 << bit)
        return rows.movedim(0, axis)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)  # how it overflows is the kernel's affair


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:2], count, -1).permute(0, 2, 1, 3)


def attend(hit: Hand, at: str, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """(N, heads, T, d) each to (N, T, width)."""
    q, k = hit(f"{at}:query", q), hit(f"{at}:key", k)
    if hit.attention == "fused":  # how the kernel overflows is its own affair
        context = F.scaled_dot_product_attention(q, k, hit(f"{at}:value", v), is_causal=causal)
    else:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1) & causal
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        eager = hit.attention == "eager"
        scores = scores + later * torch.finfo(torch.float32).min if eager else scores.masked_fill(later, -math.inf)
        scores = hit(f"{at}:scores", scores)
        raised = (scores - scores.amax(-1, keepdim=True)).exp()
        probabilities = hit(f"{at}:probabilities", raised / raised.sum(-1, keepdim=True))
        context = probabilities @ hit(f"{at}:value", v)
    return hit(f"{at}:context", context).permute(0, 2, 1, 3).flatten(2)


def gpt2(model: nn.Module, ids: Tensor, hit: Hand) -> Tensor:
    """Hugging Face's GPT2LMHeadModel, eager attention."""
    body, steps = model.transformer, ids.shape[1]
    x = hit("transformer.wte", body.wte.weight[ids]) + body.wpe.weight[:steps]
    for i, block in enumerate(body.h):
        at = f"transformer.h.{i}"

        def conv1d(name: str, x: Tensor, at: str = at) -> Tensor:
            layer = model.get_submodule(f"{at}.{name}")
            return hit(f"{at}.{name}", x @ layer.weight + layer.bias)

        mixed = conv1d("attn.c_attn", hit(f"{at}.ln_1", norm(block.ln_1, x)))
        q, k, v = (heads(part, block.attn.num_heads) for part in mixed.chunk(3, dim=2))
        x = hit(f"{at}:residual", x + conv1d("attn.c_proj", attend(hit, f"{at}.attn", q, k, v, causal=True)))
        wide = conv1d("mlp.c_fc", hit(f"{at}.ln_2", norm(block.ln_2, x)))
        gelu = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
        x = hit(f"{at}:residual[1]", x + conv1d("mlp.c_proj", hit(f"{at}.mlp.act", gelu)))
    return hit("lm_head", linear(model.lm_head, hit("transformer.ln_f", norm(body.ln_f, x))))


def bert(model: nn.Module, ids: Tensor, hit: Hand) -> Tensor:
    """Hugging Face's BertForSequenceClassification, eager attention, no padding."""
    body = model.bert
    table = body.embeddings
    words = hit("bert.embeddings.word_embeddings", table.word_embeddings.weight[ids])
    kinds = hit("bert.embeddings.token_type_embeddings", table.token_type_embeddings.weight[torch.zeros_like(ids)])
    x = hit("bert.embeddings:residual", words + kinds) + table.position_embeddings.weight[: ids.shape[1]]
    x = hit("bert.embeddings.LayerNorm", norm(table.LayerNorm, x))
    for i, block in enumerate(body.encoder.layer):
        at = f"bert.encoder.layer.{i}"
        own = block.attention.self
        q, k, v = (
            heads(hit(f"{at}.attention.self.{name}", linear(layer, x)), own.num_attention_heads)
            for name, layer in (("query", own.query), ("key", own.key), ("value", own.value))
        )
        mixed = attend(hit, f"{at}.attention.self", q, k, v)
        mixed = hit(f"{at}.attention.output.dense", linear(block.attention.output.dense, mixed))
        x = hit(f"{at}.attention.output:residual", mixed + x)
        x = hit(f"{at}.attention.output.LayerNorm", norm(block.attention.output.LayerNorm, x))
        wide = hit(f"{at}.intermediate.dense", linear(block.intermediate.dense, x))
        wide = hit(f"{at}.intermediate.intermediate_act_fn", F.gelu(wide))
        x = hit(f"{at}.output:residual", hit(f"{at}.output.dense", linear(block.output.dense, wide)) + x)
        x = hit(f"{at}.output.LayerNorm", norm(block.output.LayerNorm, x))
    pooled = hit("bert.pooler.dense", linear(body.pooler.dense, x[:, 0]))
    return hit("classifier", linear(model.classifier, hit("bert.pooler.activation", pooled.tanh())))


def vit(model: nn.Module, images: Tensor, hit: Hand) -> Tensor:
    """Hugging Face's ViTForImageClassification, eager attention."""
    body = model.vit
    front = body.embeddings.patch_embeddings.projection
    patches = F.conv2d(images, front.weight, front.bias, stride=front.stride)
    x = hit("vit.embeddings.patch_embeddings.projection", patches).flatten(2).transpose(1, 2)
    x = torch.cat([body.embeddings.cls_token.expand(len(x), -1, -1), x], dim=1) + body.embeddings.position_embeddings
    for i, block in enumerate(body.layers):
        at, own = f"vit.layers.{i}", block.attention
        y = hit(f"{at}.layernorm_before", norm(block.layernorm_before, x))
        names = [name for name, module in own.named_children() if isinstance(module, nn.Linear)]
        q, k, v = (
            heads(hit(f"{at}.attention.{name}", linear(own.get_submodule(name), y)), own.num_attention_heads)
            for name in names[:3]
        )
        mixed = linear(own.get_submodule(names[3]), attend(hit, f"{at}.attention", q, k, v))
        x = hit(f"{at}:residual", hit(f"{at}.attention.{names[3]}", mixed) + x)
        y = hit(f"{at}.layernorm_after", norm(block.layernorm_after, x))
        wide = hit(f"{at}.mlp.activation_fn", F.gelu(hit(f"{at}.mlp.fc1", linear(block.mlp.fc1, y))))
        x = hit(f"{at}:residual[1]", hit(f"{at}.mlp.fc2", linear(block.mlp.fc2, wide)) + x)
    x = hit("vit.layernorm", norm(body.layernorm, x))
    return hit("classifier", linear(model.classifier, x[:, 0]))


def self_attention(hit: Hand, at: str, layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """`nn.MultiheadAttention` of x (N, T, width) with itself."""
    mixed = x @ layer.in_proj_weight.T + layer.in_proj_bias
    q, k, v = (heads(part, layer.num_heads) for part in hit(f"{at}:linear", mixed).chunk(3, dim=2))
    return hit(f"{at}:linear[1]", linear(layer.out_proj, attend(hit, at, q, k, v)))


def torch_encoder(model: nn.TransformerEncoder, x: Tensor, hit: Hand) -> Tensor:
    """`nn.TransformerEncoder` of layers with ReLU, LayerNorm behind each sum."""
    for i, layer in enumerate(model.layers):
        at = f"layers.{i}"
        x = hit(f"{at}:residual", x + self_attention(hit, f"{at}.self_attn", layer.self_attn, x))
        x = hit(f"{at}.norm1", norm(layer.norm1, x))
        wide = hit(f"{at}:relu", hit(f"{at}.linear1", linear(layer.linear1, x)).clamp(min=0))
        x = hit(f"{at}:residual[1]", x + hit(f"{at}.linear2", linear(layer.linear2, wide)))
        x = hit(f"{at}.norm2", norm(layer.norm2, x))
    return x


def torchvision_vit(model: nn.Module, images: Tensor, hit: Hand) -> Tensor:
    """torchvision's VisionTransformer."""
    patches = F.conv2d(images, model.conv_proj.weight, model.conv_proj.bias, stride=model.patch_size)
    x = hit("conv_proj", patches).flatten(2).transpose(1, 2)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], dim=1) + model.encoder.pos_embedding
    for i, block in enumerate(model.encoder.layers):
        at = f"encoder.layers.encoder_layer_{i}"
        y = hit(f"{at}.ln_1", norm(block.ln_1, x))
        x = hit(f"{at}:residual", x + self_attention(hit, f"{at}.self_attention", block.self_attention, y))
        y = hit(f"{at}.ln_2", norm(block.ln_2, x))
        wide = hit(f"{at}.mlp.1", F.gelu(hit(f"{at}.mlp.0", linear(block.mlp[0], y))))
        x = hit(f"{at}:residual[1]", x + hit(f"{at}.mlp.3", linear(block.mlp[3], wide)))
    return hit("heads.head", linear(model.heads.head, hit("encoder.ln", norm(model.encoder.ln, x))[:, 0]))


def recurrent(model: nn.LSTM | nn.GRU, x: Tensor, hit: Hand) -> Tensor:
    """Outputs of an LSTM or GRU of one layer or more, in one direction or both (Cho et al. 2014; Hochreiter 1997)."""
    steps = x if not model.batch_first else x.transpose(0, 1)
    for layer in range(model.num_layers):
        ways = []
        for end in [f"_l{layer}", *([f"_l{layer}_reverse"] if model.bidirectional else [])]:
            w, u, b, d = (getattr(model, f"{name}{end}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            h = torch.zeros(steps.shape[1], model.hidden_size)
            c = h
            out: list[Tensor] = [h] * len(steps)
            for t in range(len(steps)) if not end.endswith("reverse") else reversed(range(len(steps))):
                at: Callable[[str], str] = lambda role, t=t, end=end: f":{role}{end}{f'[{t}]' if t else ''}"  # noqa: E731
                given, before = steps[t] @ w.T + b, h @ u.T + d
                if isinstance(model, nn.LSTM):
                    i, f, g, o = (given + before).chunk(4, 1)
                    gates = [1 / (1 + (-i).exp()), 1 / (1 + (-f).exp()), g.tanh(), 1 / (1 + (-o).exp())]
                    i, f, g, o = hit(at("gates"), torch.cat(gates, 1)).chunk(4, 1)
                    c = hit(at("cell"), f * c + i * g)
                    h = o * c.tanh()
                else:
                    (a, b2, n), (e, f2, m) = given.chunk(3, 1), before.chunk(3, 1)
                    r, z = hit(at("gates"), 1 / (1 + (-torch.cat([a + e, b2 + f2], 1)).exp())).chunk(2, 1)
                    n = hit(at("candidate"), (n + r * m).tanh())
                    h = hit(at("state"), (1 - z) * n + z * h)
                out[t] = h
            ways.append(torch.stack(out))
        steps = torch.cat(ways, 2)
    axis = 0 if model.batch_first else 1
    return hit("", steps if not model.batch_first else steps.transpose(0, 1), axis)
