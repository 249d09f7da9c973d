"""Transformers as their libraries write them: cut, trained and merged, to the bits of uncut training."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import TensorDataset

from cutlayer import Method, Optimizer, Training, cut_points, fit, split
from cutlayer.data.batches import Batches


class PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.img_size, self.proj, self.norm = (16, 16), nn.Conv2d(3, width, 4, stride=4), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        _, _, height, width = x.shape
        if (height, width) != self.img_size:  # a look at sizes, which no tracer takes
            raise ValueError(f"expected {self.img_size}")
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj, self.proj_drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(0.0)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = scaled_dot_product_attention(*qkv.unbind(0), attn_mask=attn_mask, is_causal=is_causal)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, length, width)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.drop_path = nn.LayerNorm(width), nn.Identity()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """In the manner of timm's, with its names, optional arguments and methods; own code."""

    def __init__(self, width: int = 16, heads: int = 2, depth: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.patch_embed, self.cls_token = PatchEmbed(width), nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed, self.pos_drop = nn.Parameter(torch.randn(1, 17, width) * 0.02), nn.Dropout(0.0)
        self.norm_pre = nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def _pos_embed(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + self.pos_embed)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        if attn_mask is not None or is_causal:
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=5,
    )
    return transformers.BertForSequenceClassification(config)


def equals_uncut_training(model: nn.Module, cut: str, inputs: Tensor) -> None:
    data = TensorDataset(inputs, torch.randint(0, 5, (len(inputs),)))
    optimizer = Optimizer(name="adamw", lr=0.01, weight_decay=0.01, schedule="constant")
    training = Training(epochs=3, batch_size=16, client=optimizer, server=optimizer, seed=3)
    uncut, feed, expected = copy.deepcopy(model).train(), Batches(data, batch_size=16, seed=3), []
    adamw = torch.optim.AdamW(uncut.parameters(), 0.01, weight_decay=0.01)
    for epoch in range(training.epochs):
        total = torch.zeros((), dtype=torch.float64)
        for batch in feed.epoch(epoch):
            loss = cross_entropy(logits(uncut(batch.inputs)), batch.labels)
            adamw.zero_grad()
            loss.backward()
            adamw.step()
            total += loss.detach().double() * len(batch.labels)
        expected.append(total.item() / len(data))

    result = fit(split(model, cut), data, data, method=Method(), training=training)

    assert result.history.losses == expected
    weights = result.model.state_dict()
    assert [name for name, value in uncut.state_dict().items() if not torch.equal(weights[name], value)] == []
    assert type(result.model) is type(model)
    with torch.no_grad():
        right = (logits(result.model(inputs)).argmax(1) == data.tensors[1]).float().mean().item()
    assert result.history.test("accuracy") == pytest.approx(right)


def logits(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs.logits


def test_a_vision_transformer_in_the_manner_of_timm() -> None:
    torch.manual_seed(0)
    model = VisionTransformer()
    assert {"patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm"} <= {*cut_points(model)}
    equals_uncut_training(model, "blocks.0", torch.randn(40, 3, 16, 16))


@pytest.mark.parametrize("cut", ["bert.encoder.layer.0", "bert.encoder.layer.1"])
def test_bert_with_its_mask_given_by_default(cut: str) -> None:
    torch.manual_seed(0)
    equals_uncut_training(bert(), cut, torch.randint(0, 50, (40, 12)))
