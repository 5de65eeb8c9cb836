"""The whole model and its objective once more, in plain torch and autograd: slow, unfused, and sharing no code with
the package. Weights come by the package's parameter names; everything is [b, s, h].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config.model import ExitConfig, ModelConfig

Weights = dict[str, Tensor]


def norm(weights: Weights, name: str, x: Tensor, config: ModelConfig) -> Tensor:
    scale = weights[f"{name}.weight"] + (1 if config.apply_layernorm_1p else 0)
    if config.normalization == "RMSNorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_epsilon) * scale
    centred = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt((centred * centred).mean(-1, keepdim=True) + config.norm_epsilon)
    return centred / deviation * scale + weights[f"{name}.bias"]


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def activation(config: ModelConfig, x: Tensor) -> Tensor:
    if config.squared_relu:
        return x.clamp(min=0) ** 2
    if config.swiglu:
        return x * torch.sigmoid(x)
    if config.openai_gelu or config.geglu or (config.bias_gelu_fusion and config.add_bias_linear):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def mlp(weights: Weights, name: str, x: Tensor, config: ModelConfig) -> Tensor:
    inner = linear(weights, f"{name}.up", x)
    if config.gated:
        gate, up = inner.chunk(2, -1)
        return linear(weights, f"{name}.down", activation(config, gate) * up)
    return linear(weights, f"{name}.down", activation(config, inner))


def frequencies(config: ModelConfig, rotated: int) -> Tensor:
    plain = [1 / config.rotary_base ** (i / rotated) for i in range(0, rotated, 2)]
    if config.rotary_seq_len_interpolation_factor:
        plain = [f / config.rotary_seq_len_interpolation_factor for f in plain]
    if not config.use_rope_scaling:
        return torch.tensor(plain, dtype=torch.float64)
    length, low, high = (
        config.rope_original_max_position_embeddings, config.rope_low_freq_factor, config.rope_high_freq_factor
    )  # fmt: skip
    scaled = []
    for f in plain:
        wavelength = 2 * math.pi / f
        if wavelength < length / high:
            scaled.append(f)
        elif wavelength > length / low:
            scaled.append(f / config.rope_scaling_factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * f / config.rope_scaling_factor + smooth * f)
    return torch.tensor(scaled, dtype=torch.float64)


def rotate(config: ModelConfig, x: Tensor) -> Tensor:
    """x [b, s, head dim] by its positions."""
    if config.position_embedding_type != "rope":
        return x
    rotated = int(x.shape[-1] * config.rotary_percent)
    angles = torch.outer(torch.arange(x.shape[1]).to(x), frequencies(config, rotated).to(x)).repeat(1, 2)
    turning, rest = x[..., :rotated], x[..., rotated:]
    first, second = turning.chunk(2, -1)
    turned = turning * angles.cos() + torch.cat((-second, first), -1) * angles.sin()
    return torch.cat((turned, rest), -1)


def visible(config: ModelConfig, length: int, documents: Tensor | None) -> Tensor:
    """[b or 1, s, s]: who may look at whom."""
    key, query = torch.arange(length)[None], torch.arange(length)[:, None]
    seen = key <= query
    if config.window_size:
        seen = seen & (query - key < config.window_size)
    return seen[None] if documents is None else seen[None] & (documents[:, :, None] == documents[:, None])


def attention(weights: Weights, name: str, x: Tensor, config: ModelConfig, seen: Tensor) -> Tensor:
    heads = config.num_attention_heads
    groups = config.num_query_groups if config.group_query_attention else heads
    width = config.kv_channels or config.hidden_size // heads
    outputs = []
    for group in linear(weights, f"{name}.qkv", x).split((heads // groups + 2) * width, -1):
        *queries, k, v = group.split(width, -1)
        if config.qk_layernorm:
            k = norm(weights, f"{name}.k_norm", k, config)
            queries = [norm(weights, f"{name}.q_norm", q, config) for q in queries]
        for q in queries:
            scores = rotate(config, q) @ rotate(config, k).transpose(1, 2) / math.sqrt(width)
            outputs.append(torch.softmax(scores.masked_fill(~seen, -1e300), -1) @ v)
    return linear(weights, f"{name}.proj", torch.cat(outputs, -1))


def layer(weights: Weights, name: str, x: Tensor, config: ModelConfig, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output, and residual and input of its MLP."""
    normed = norm(weights, f"{name}.input_norm", x, config)
    residual = normed if config.apply_residual_connection_post_layernorm else x
    x = residual + attention(weights, f"{name}.attention", normed, config, seen)
    normed = norm(weights, f"{name}.mlp_norm", x, config)
    residual = normed if config.apply_residual_connection_post_layernorm else x
    return residual + mlp(weights, f"{name}.mlp", normed, config), residual, normed


def head_inputs(weights: Weights, batch, config: ModelConfig, exits: ExitConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Head -> (what its output matrix multiplies [b, s, h], the matrix)."""
    seen = visible(config, batch.tokens.shape[1], batch.document_ids)
    embedding = weights["embedding.word.weight"]
    x = embedding[batch.tokens]
    if "embedding.position.weight" in weights:
        plain = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
        x = x + weights["embedding.position.weight"][plain if batch.position_ids is None else batch.position_ids]
    heads = {}
    for i in range(config.num_layers):
        before = x
        x, residual, normed = layer(weights, f"layers.{i}", x, config, seen)
        if i + 1 not in exits.exit_layer_nums:
            continue
        exit_name, tap = f"exits.{i + 1}", before if exits.pre_exit else x
        if exits.use_exit_mlp:
            tap = residual + mlp(weights, f"{exit_name}.branch", normed, config)
        if exits.use_exit_block:
            tap = layer(weights, f"{exit_name}.block", tap, config, seen)[0]
        if exits.exit_norm != "none":
            tap = norm(weights, f"{exit_name}.norm" if exits.exit_norm == "own" else "final_norm", tap, config)
        heads[str(i + 1)] = tap, weights.get(f"{exit_name}.output.weight", embedding)
    heads["final"] = norm(weights, "final_norm", x, config), weights.get("output.weight", embedding)
    return heads


def scores(parameters: Weights, batch, config: ModelConfig, exits: ExitConfig, vocab_size: int) -> dict[str, tuple]:
    """By head, over the unmasked tokens: sum of plain cross-entropy, right top tokens, and those that are the final
    head's. Padding rows count in the cross-entropy, and are no predictions.
    """
    mask, labels = batch.loss_mask.bool(), batch.labels
    rows = {}
    for head, (features, matrix) in head_inputs(parameters, batch, config, exits).items():
        logits = features @ matrix.T
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
        rows[head] = losses[mask].sum(), logits[..., :vocab_size].argmax(-1)
    final = rows["final"][1]
    return {head: (loss, (top == labels)[mask].sum(), (top == final)[mask].sum()) for head, (loss, top) in rows.items()}


def losses_and_gradients(
    parameters: Weights, batches, config: ModelConfig, exits: ExitConfig, *, per_token: bool
) -> tuple[list[dict[str, Tensor]], Weights]:
    """Per microbatch and head the loss before its exit weight, and the gradient of the weighted sum of all.

    per_token: every unmasked token of all microbatches counts alike; else every microbatch does.
    """
    weights = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    exit_weights = dict(zip(map(str, exits.exit_layer_nums), exits.exit_layer_weight, strict=True)) | {"final": 1.0}
    temperatures = dict(zip(map(str, exits.exit_layer_nums), exits.exit_layer_temperature, strict=True))
    tokens = sum(batch.loss_mask.sum() for batch in batches)
    records, total = [], torch.zeros((), dtype=torch.float64)
    for batch in batches:
        record = {}
        for head, (features, matrix) in head_inputs(weights, batch, config, exits).items():
            log_probs = torch.log_softmax(features @ matrix.T / temperatures.get(head, 1.0), -1)
            each = F.nll_loss(log_probs.flatten(0, 1), batch.labels.flatten(), reduction="none")
            if exits.use_dynamic_exit_layer_weight and head != "final":
                each = each * log_probs.exp().amax(-1).detach().flatten()
            divisor = tokens if per_token else batch.loss_mask.sum() * len(batches)
            record[head] = (each * batch.loss_mask.flatten()).sum() / divisor
            total = total + exit_weights[head] * record[head]
        records.append({head: loss.detach() for head, loss in record.items()})
    gradients = torch.autograd.grad(total, tuple(weights.values()), allow_unused=True)
    zeros = (torch.zeros_like(w) if g is None else g for w, g in zip(weights.values(), gradients, strict=True))
    return records, dict(zip(weights, zeros, strict=True))
