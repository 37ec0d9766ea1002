"""init_inference of encoders: the model's own interface and output, with the engine's layers behind it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.bert import BertConfig, BertModel

from shared.engine import init_inference
from tests.tiny_encoders import random_encoder, tiny_encoder

MODELS = {
    "BertModel": "bert",
    "BertForSequenceClassification": "bert",
    "BertForMaskedLM": "bert",
    "BertForTokenClassification": "bert",
    "RobertaModel": "roberta",
    "RobertaForSequenceClassification": "roberta",
    "DistilBertModel": "distilbert",
    "DistilBertForMaskedLM": "distilbert",
    "CLIPTextModel": "clip_text",
    "CLIPTextModelWithProjection": "clip_text",
    "CLIPVisionModel": "clip_vision",
    "CLIPVisionModelWithProjection": "clip_vision",
    "CLIPModel": "clip",
}


def inputs(kind: str) -> dict[str, Tensor]:
    """Three rows padded behind, not at all and before."""
    generator = torch.Generator().manual_seed(3)
    given: dict[str, Tensor] = {}
    if kind != "clip_vision":
        ids = torch.randint(3, 384, (3, 20), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 12:] = 0
        mask[2, :7] = 0
        pad = 1 if kind == "roberta" else 0
        given |= {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}
        if kind.startswith("clip"):
            given["input_ids"][:, 11] = 2
    if kind.startswith("clip") and kind != "clip_text":
        given["pixel_values"] = torch.randn(3, 3, 30, 30, generator=generator)
    return given


def assert_alike(ours: object, theirs: object, mask: Tensor | None) -> None:
    """The same outputs under the same names; of hidden states, what is not masked."""
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor)
        if mask is not None and theirs.shape[:2] == mask.shape:
            ours, theirs = ours[mask != 0], theirs[mask != 0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    elif isinstance(theirs, dict):
        assert isinstance(ours, dict)
        assert list(ours) == list(theirs)
        for name in theirs:
            assert_alike(ours[name], theirs[name], mask)


@pytest.mark.parametrize(("architecture", "kind"), MODELS.items())
@torch.inference_mode()
def test_outputs_are_those_of_transformers(architecture: str, kind: str) -> None:
    model, given = random_encoder(kind, architecture), inputs(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = init_inference(model, kernel_inject=True, dtype="fp32")
    assert isinstance(engine.module, type(model))
    expected = model(**given)
    assert_alike(engine(**given), expected, given.get("attention_mask"))
    if kind != "clip":
        assert_alike(engine(**given, return_dict=False)[0], expected[0], given.get("attention_mask"))
    without_mask = {name: value for name, value in given.items() if name != "attention_mask"}
    assert_alike(engine(**without_mask), model(**without_mask), None)
    engine.destroy()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.inference_mode()
def test_what_stands_beside_a_row_changes_none_of_its_bits() -> None:
    engine, given = init_inference(random_encoder("bert"), kernel_inject=True, dtype="bf16"), inputs("bert")
    together = engine(**given).last_hidden_state
    assert together.dtype == torch.bfloat16
    for row in range(3):
        real = given["attention_mask"][row] != 0
        alone = engine(**{name: value[row : row + 1] for name, value in given.items()}).last_hidden_state
        assert torch.equal(alone[0, real], together[row, real])
    unpadded = engine(given["input_ids"][:1, :12]).last_hidden_state
    assert torch.equal(unpadded[0], together[0, :12])


@torch.inference_mode()
def test_types_labels_and_positions() -> None:
    model, given = random_encoder("bert", "BertForSequenceClassification"), inputs("bert")
    engine = init_inference(model, kernel_inject=True, dtype="fp32")
    given |= {"token_type_ids": torch.arange(20).expand(3, 20) % 2, "labels": torch.tensor([0, 1, 1])}
    expected, found = model(**given), engine(**given)
    assert_alike(found, expected, None)
    assert_alike(engine(**given, position_ids=torch.arange(20)[None]), expected, None)
    with pytest.raises(ValueError, match="position_ids"):
        engine(**given, position_ids=torch.arange(1, 21)[None])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("inputs_embeds", torch.zeros(1, 4, 64)),
        ("past_key_values", "a cache"),
    ],
)
def test_what_the_fused_layers_do_not_keep_is_refused_by_name(name: str, value: object) -> None:
    engine = init_inference(random_encoder("bert"), kernel_inject=True, dtype="fp32")
    with pytest.raises(ValueError, match=name):
        engine(torch.zeros(1, 4, dtype=torch.int64), **{name: value})


def test_inputs_of_a_wrong_shape_are_refused_by_name() -> None:
    texts = init_inference(random_encoder("bert"), kernel_inject=True, dtype="fp32")
    vision = init_inference(random_encoder("clip_vision"), kernel_inject=True, dtype="fp32")
    ids = torch.zeros(2, 81, dtype=torch.int64)
    with pytest.raises(ValueError, match="input_ids: 81 columns, and the model has positions for 80"):
        texts(ids)
    with pytest.raises(ValueError, match="attention_mask"):
        texts(ids[:, :4], attention_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="pixel_values"):
        vision(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="interpolate_pos_encoding"):
        vision(torch.zeros(1, 3, 30, 30), interpolate_pos_encoding=True)
    with pytest.raises(AttributeError, match="generate"):
        texts.generate(ids[:, :4])


@torch.inference_mode()
def test_int8_is_near() -> None:
    model, given = random_encoder("bert"), inputs("bert")
    engine = init_inference(model, kernel_inject=True, dtype="int8")
    found, expected = engine(**given).last_hidden_state.float(), model(**given).last_hidden_state
    assert 0 < (found - expected).abs().mean() < 0.1 * expected.std()


@torch.inference_mode()
def test_a_folder_and_a_model_on_meta_with_a_checkpoint(tmp_path: Path) -> None:
    model, given = random_encoder("bert", "BertForMaskedLM"), inputs("bert")
    model.save_pretrained(tmp_path)
    expected = model(**given).logits[given["attention_mask"] != 0]
    of_folder = init_inference(str(tmp_path), kernel_inject=True, dtype="fp32")
    plain = init_inference(str(tmp_path), dtype="fp32")
    with torch.device("meta"):
        on_meta = type(model)(model.config)
    with pytest.raises(ValueError, match="checkpoint"):
        init_inference(on_meta, kernel_inject=True, dtype="fp32")
    of_checkpoint = init_inference(on_meta, kernel_inject=True, dtype="fp32", checkpoint=str(tmp_path))
    for engine in (of_folder, plain, of_checkpoint):
        assert isinstance(engine.module, type(model))
        found = engine(**given).logits[given["attention_mask"] != 0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(init_inference(str(tiny_encoder("bert")), kernel_inject=True, dtype="fp32").module, BertModel)


@torch.inference_mode()
def test_an_encoder_within_another_module() -> None:
    class Mean(PreTrainedModel):
        config_class = BertModel.config_class
        _supports_sdpa = True

        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.inner = BertModel(config)
            self.head = nn.Linear(64, 2)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.inner(input_ids).last_hidden_state.mean(1))

    config = random_encoder("bert").config
    assert isinstance(config, BertConfig)
    model, ids = Mean(copy.deepcopy(config)).eval(), inputs("bert")["input_ids"]
    found = init_inference(model, kernel_inject=True, dtype="fp32")(ids)
    torch.testing.assert_close(found, model(ids), rtol=1e-4, atol=1e-4)
