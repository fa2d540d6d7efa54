"""Prints the table of `layers.md`: the default layers of networks of other libraries, with random weights.

Needs timm, transformers and pytorch-forecasting, which are no dependencies of this package:
`python docs/make_layer_table.py`.
"""

from collections.abc import Callable
from typing import Any

import timm
import torch
from pytorch_forecasting import TemporalFusionTransformer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_neuro.call_trace import call_trace
from lightning_neuro.default_layers import default_layers

TOKENS = torch.arange(20).reshape(2, 10)
IMAGES = torch.randn(2, 3, 64, 64)
SMALL: dict[str, Any] = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}

Run = Callable[[nn.Module], object]


class Recurrent(nn.Module):
    """An LSTM with a linear head on the last time step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(8, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Run the network."""
        return self.head(self.rnn(x)[0][:, -1])


def forecaster() -> tuple[nn.Module, Run]:
    """A temporal fusion transformer with two inputs, and its call."""
    features = ["a", "b"]
    model = TemporalFusionTransformer(
        hidden_size=8,
        x_reals=features,
        time_varying_reals_encoder=features,
        time_varying_reals_decoder=["a"],
        output_transformer=lambda output: output["prediction"],
    )
    x = {
        "encoder_lengths": torch.tensor([6, 6]),
        "decoder_lengths": torch.tensor([3, 3]),
        "encoder_cat": torch.zeros(2, 6, 0, dtype=torch.long),
        "decoder_cat": torch.zeros(2, 3, 0, dtype=torch.long),
        "encoder_cont": torch.randn(2, 6, 2),
        "decoder_cont": torch.randn(2, 3, 2),
        "target_scale": torch.ones(2, 2),
    }
    return model, lambda module: module(x)


def networks() -> dict[str, tuple[nn.Module, Run]]:
    """Title -> network and a function that runs it."""
    text: Run = lambda module: module(input_ids=TOKENS)  # noqa: E731
    image: Run = lambda module: module(IMAGES)  # noqa: E731
    gpt = GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    found = {
        "transformers BERT": (BertForSequenceClassification(BertConfig(vocab_size=50, **SMALL)), text),
        "transformers GPT-2": (GPT2LMHeadModel(gpt), text),
        "transformers ViT": (ViTForImageClassification(ViTConfig(image_size=64, **SMALL)), image),
        "LSTM with a linear head": (Recurrent(), lambda module: module(torch.randn(2, 5, 8))),
        "pytorch-forecasting TFT": forecaster(),
    }
    for name in ("vit_tiny_patch16_224", "resnet18", "resnet50", "convnext_atto", "mobilenetv3_small_050"):
        options = {"img_size": 64} if name.startswith("vit") else {}
        found[f"timm {name}"] = (timm.create_model(name, num_classes=10, **options), image)
    for name in ("efficientnet_b0", "regnety_002", "densenet121", "swin_tiny_patch4_window7_224", "mixer_s32_224"):
        large: Run = lambda module: module(torch.randn(2, 3, 224, 224))  # noqa: E731
        found[f"timm {name}"] = (timm.create_model(name, num_classes=10), large)
    return found


def main() -> None:
    """Print a row for each network."""
    print("| network | default layers |\n|---|---|")
    for title, (model, run) in networks().items():
        with torch.no_grad(), call_trace(model.eval()) as seen:
            run(model)
        print(f"| {title} | {', '.join(f'`{name}`' for name in default_layers(seen))} |")


if __name__ == "__main__":
    main()
