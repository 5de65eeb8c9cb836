"""Early exits for a model of transformers: this file lies beside a model that was exported with exits.

The model itself is a stock one, which `AutoModelForCausalLM` loads without this file. With it,

    model = EarlyExitForCausalLM.from_pretrained(directory)
    output = model(input_ids)
    output.logits           # of the whole model
    output.exit_logits[4]   # of the exit behind layer 4

or `AutoModel.from_pretrained(directory, trust_remote_code=True)`. It needs torch, transformers and safetensors only.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import cached_file

_OF_AUTO_MODEL = ("config", "trust_remote_code", "adapter_kwargs", "code_revision", "_from_auto")


@dataclass
class EarlyExitOutput:
    """Logits [batch, length, vocabulary] of the whole model, and those of each exit by its layer, counted from 1."""

    logits: Tensor
    exit_logits: dict[int, Tensor]


class ExitHead(nn.Module):
    """What stands between a layer and an exit's logits: MLP beside the layer's own, block, norm and output matrix,
    each optional. Modules of the model serve as patterns."""

    def __init__(self, model: nn.Module, layer: nn.Module, exits: dict) -> None:
        super().__init__()
        self.branch = copy.deepcopy(layer.mlp) if exits["use_exit_mlp"] else None
        self.block = copy.deepcopy(layer) if exits["use_exit_block"] else None
        self.norm = copy.deepcopy(_final_norm(model)) if exits["exit_norm"] == "own" else None
        self.output = copy.deepcopy(model.get_output_embeddings()) if exits["untie_exit_output_weights"] else None

    def forward(self, tap: "_Tap", final_norm: nn.Module | None, tied: Tensor) -> Tensor:
        """Logits of a tap. `final_norm`: where exits share it. `tied`: the output matrix of heads that own none."""
        hidden = tap.hidden if self.branch is None else tap.residual + self.branch(tap.normed)
        if self.block is not None:
            hidden = _first(self.block(hidden, *tap.arguments, **tap.keywords))
        norm = final_norm if final_norm is not None else self.norm
        features = hidden if norm is None else norm(hidden)
        return F.linear(features, tied if self.output is None else self.output.weight)


class EarlyExitForCausalLM(nn.Module):
    """A stock causal language model (`model`) and the heads of its exits (`exits`, by layer counted from 1)."""

    def __init__(self, model: nn.Module, exits: dict) -> None:
        """`exits`: the content of exits.json."""
        super().__init__()
        self.model, self.config = model, model.config
        self.pre_exit, self.shares_final_norm = exits["pre_exit"], exits["exit_norm"] == "final"
        layers = _layers(model)
        self.exits = nn.ModuleDict(
            {str(n): ExitHead(model, layers[n - 1], exits) for n in sorted(exits["exit_layer_nums"])}
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """AutoModel calls it; there is nothing to note down."""

    @classmethod
    def from_pretrained(cls, directory: str, **kwargs) -> "EarlyExitForCausalLM":
        """Load model and exits; `kwargs` as for AutoModelForCausalLM."""
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_AUTO_MODEL}
        backbone = AutoModelForCausalLM.from_pretrained(directory, **kwargs)
        model = cls(backbone, json.loads(Path(cached_file(directory, "exits.json")).read_text(encoding="utf-8")))
        own = model.exits.state_dict()
        if own:
            stored = load_file(cached_file(directory, "exits.safetensors"))
            model.exits.load_state_dict({name.removeprefix("exits."): tensor for name, tensor in stored.items()})
        return model.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs) -> EarlyExitOutput:
        """Token ids [batch, length] -> logits of all heads. All positions are computed: there is no cache."""
        layers = _layers(self.model)
        taps = {number: _Tap(layers[int(number) - 1], self.pre_exit) for number in self.exits}
        try:
            logits = self.model(input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).logits
        finally:
            for tap in taps.values():
                tap.remove()
        norm = _final_norm(self.model) if self.shares_final_norm else None
        tied = self.model.get_input_embeddings().weight
        return EarlyExitOutput(logits, {int(n): self.exits[n](tap, norm, tied) for n, tap in taps.items()})


class _Tap:
    """Watches one layer during a forward pass: what goes into it and comes out, and what its MLP starts from."""

    def __init__(self, layer: nn.Module, before: bool) -> None:
        self._before = before
        self._hooks = [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            layer.register_forward_hook(self._leave),
            _mlp_norm(layer).register_forward_hook(self._normalise),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, layer: nn.Module, arguments: tuple, keywords: dict) -> None:
        self.keywords = {name: value for name, value in keywords.items() if name != "hidden_states"}
        self.hidden = arguments[0] if arguments else keywords["hidden_states"]
        self.arguments = arguments[1:]

    def _leave(self, layer: nn.Module, arguments: tuple, result: Tensor | tuple) -> None:
        if not self._before:
            self.hidden = _first(result)

    def _normalise(self, norm: nn.Module, arguments: tuple, result: Tensor) -> None:
        self.residual, self.normed = arguments[0], result


def _first(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _layers(model: nn.Module) -> nn.ModuleList:
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def _final_norm(model: nn.Module) -> nn.Module:
    base = model.base_model
    return base.ln_f if hasattr(base, "ln_f") else base.norm


def _mlp_norm(layer: nn.Module) -> nn.Module:
    return layer.ln_2 if hasattr(layer, "ln_2") else layer.post_attention_layernorm
