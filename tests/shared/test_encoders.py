"""Every encoder against transformers: sequences of any lengths together and alone, and CLIP's images."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.clip import CLIPModel

from shared.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from shared.checkpoint.state_dict import StateDictCheckpoint
from shared.model_files import ModelFiles, find_weights
from shared.models.encoder import Encoder
from shared.models.loading import load_weights
from shared.policies.clip import CLIP_TEXT, CLIP_VISION
from shared.policies.policy import UnsupportedModelError
from shared.policies.table import architecture_of
from tests.tiny_encoders import ENCODERS, random_encoder, tiny_encoder

TEXTS = ["bert", "roberta", "distilbert", "clip_text"]
LENGTHS = (1, 15, 2, 50)


@functools.cache
def encoder(kind: str, dtype: torch.dtype = torch.float32) -> Encoder:
    folder = tiny_encoder(kind)
    files = ModelFiles(kind, folder, find_weights(folder), "")
    architecture = architecture_of(files.config)
    return Encoder(architecture, load_weights(architecture, open_checkpoint(files), dtype=dtype, device="cpu"))


@functools.cache
def reference(kind: str) -> PreTrainedModel:
    return random_encoder(kind)


def sequences(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, encoder(kind).architecture.vocab_size, (n,), generator=generator) for n in LENGTHS]


def run(model: Encoder, *rows: Tensor, types: Tensor | None = None) -> Tensor:
    lengths = torch.tensor([0, *map(len, rows)])
    return model.forward(torch.cat(rows), lengths.cumsum(0).int(), types)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 30, 30, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", TEXTS)
@torch.inference_mode()
def test_hidden_states_equal_transformers(kind: str) -> None:
    model, rows = encoder(kind), sequences(kind)
    together = run(model, *rows)
    expected = torch.cat([reference(kind)(row[None]).last_hidden_state[0] for row in rows])
    assert expected.std() > 0.3, "flat states would prove nothing"
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat([run(model, row) for row in rows]), together)
    half = run(encoder(kind, torch.bfloat16), *rows).float()
    assert 0 < (half - together).abs().mean() < 0.05 * together.std()


@torch.inference_mode()
def test_types_of_tokens_are_embedded() -> None:
    [*_, row] = sequences("bert")
    types = (torch.arange(len(row)) > 20).long()
    expected = reference("bert")(row[None], token_type_ids=types[None]).last_hidden_state[0]
    torch.testing.assert_close(run(encoder("bert"), row, types=types), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(run(encoder("bert"), row), run(encoder("bert"), row, types=types))


@torch.inference_mode()
def test_images_equal_transformers() -> None:
    expected = reference("clip_vision")(images()).last_hidden_state
    model = encoder("clip_vision")
    together = model.forward_images(images())
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.cat([model.forward_images(image[None]) for image in images()]), together)
    half = encoder("clip_vision", torch.bfloat16).forward_images(images()).float()
    assert 0 < (half - together).abs().mean() < 0.05 * together.std()


@torch.inference_mode()
def test_both_towers_are_read_from_the_checkpoint_of_a_whole_clip() -> None:
    folder = tiny_encoder("clip")
    files = ModelFiles("clip", folder, find_weights(folder), "")
    checkpoint, model = open_checkpoint(files), reference("clip")
    assert isinstance(model, CLIPModel)
    texts, vision = (
        Encoder(architecture, load_weights(architecture, checkpoint, dtype=torch.float32, device="cpu", policy=policy))
        for policy, half in ((CLIP_TEXT, "text_config"), (CLIP_VISION, "vision_config"))
        for architecture in (policy.architecture(_table(files, half)),)
    )
    [*_, row] = sequences("clip_text")
    expected = model.text_model(row[None]).last_hidden_state[0]
    torch.testing.assert_close(run(texts, row), expected, rtol=1e-4, atol=1e-4)
    expected = model.vision_model(images()).last_hidden_state
    torch.testing.assert_close(vision.forward_images(images()), expected, rtol=1e-4, atol=1e-4)


def test_what_an_encoder_cannot_do_is_refused_by_name() -> None:
    config = {**ENCODERS["bert"], "type_vocab_size": 2}
    for field, value in (("is_decoder", True), ("position_embedding_type", "relative_key")):
        with pytest.raises(UnsupportedModelError, match=field):
            architecture_of({**config, field: value})
    with pytest.raises(UnsupportedModelError, match="patch_size"):
        architecture_of({**ENCODERS["clip_vision"], "patch_size": 31})
    with pytest.raises(IndexError, match="token_ids"):
        run(encoder("bert"), torch.tensor([384]))
    with pytest.raises(IndexError, match="positions"):
        run(encoder("bert"), torch.zeros(81, dtype=torch.int64))


def test_a_patch_embedding_of_another_size_is_named() -> None:
    state = dict(reference("clip_vision").state_dict())
    state["embeddings.patch_embedding.weight"] = state["embeddings.patch_embedding.weight"][:, :, :5]
    architecture = architecture_of(ENCODERS["clip_vision"])
    checkpoint: Checkpoint = StateDictCheckpoint(state, "memory")
    with pytest.raises(CheckpointError, match="patch_embedding"):
        load_weights(architecture, checkpoint, dtype=torch.float32, device="cpu")


def _table(files: ModelFiles, half: str) -> dict[str, object]:
    found = files.config[half]
    assert isinstance(found, dict)
    return found
