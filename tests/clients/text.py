"""Networks of transformers, built from configurations, each as it is and with LoRA of peft."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tests.clients.registry import Project, Rows, client, images, loaders, sentences


class CallsForward(pl.LightningModule):
    """The pattern of Lightning's own GLUE example: keyword arguments through `forward`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch)[0]

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self(**batch)[0]
        self.log("val_loss", loss, batch_size=len(batch["labels"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-3)


class CallsModel(CallsForward):
    """The steps call the network themselves; there is no `forward`."""

    forward = pl.LightningModule.forward

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("val_loss", loss, batch_size=len(batch["labels"]))
        return loss


def padded_dict(rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """As a data collator: padded to the longest of the batch, with an attention mask."""
    tokens = pad_sequence([torch.tensor(tokens) for tokens, _ in rows], batch_first=True)
    return {
        "input_ids": tokens,
        "attention_mask": (tokens > 0).long(),
        "labels": torch.tensor([label for _, label in rows]),
    }


def language_dict(rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """The same for a language model: the labels are the tokens, -100 where there is padding."""
    batch = padded_dict(rows)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def with_lora(model: nn.Module, task: str | None, targets: list[str], **options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type=task, r=4, target_modules=targets, **options))


@client("bert_forward", "transformers", pattern=CallsForward)
@client("bert_model", "transformers", pattern=CallsModel)
@client("bert_forward_lora", "transformers", "peft", pattern=CallsForward, lora=True)
@client("bert_model_lora", "transformers", "peft", pattern=CallsModel, lora=True)
def bert(pattern: Any, lora: bool = False) -> Project:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(
        BertConfig(vocab_size=30, max_position_embeddings=32, num_labels=3, pad_token_id=0, **sizes)
    )
    if lora:
        model = with_lora(model, "SEQ_CLS", ["query", "value"])
    return Project(pattern(model), loaders(Rows(sentences(96)), Rows(sentences(72)), collate_fn=padded_dict))


@client("gpt2_lm", "transformers")
@client("gpt2_lm_lora", "transformers", "peft", lora=True)
def gpt2(lora: bool = False) -> Project:
    """A language model: one label a token; the head shares the weights of the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, bos_token_id=0, eos_token_id=0, **sizes))
    if lora:
        model = with_lora(model, "CAUSAL_LM", ["c_attn"], fan_in_fan_out=True)
    return Project(CallsForward(model), loaders(Rows(sentences(96)), Rows(sentences(72)), collate_fn=language_dict))


@client("vit_pixel_values", "transformers")
@client("vit_pixel_values_lora", "transformers", "peft", lora=True)
def vit(lora: bool = False) -> Project:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=4, **sizes))
    if lora:
        model = with_lora(model, None, ["query", "value", "q_proj", "v_proj"], modules_to_save=["classifier"])

    def data(num_samples: int) -> Rows:
        return Rows([{"pixel_values": x, "labels": y} for x, y in zip(*images(num_samples), strict=True)])

    return Project(CallsForward(model), loaders(data(96), data(72)))
