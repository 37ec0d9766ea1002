"""The forward of an injected model: Hugging Face's interface and results, over caches that it passes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.injected import KINDS, MAX_OUT_TOKENS, injected, mask_of, num_free, prompts, reference


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_padded_batch_are_those_of_the_rows_alone(kind: str, side: str) -> None:
    engine, model = injected(kind), reference(kind)
    ids, mask = prompts(), mask_of(side)
    first = engine(ids, attention_mask=mask)
    assert type(first) is CausalLMOutputWithPast
    step = prompts(3, 1)
    more = torch.ones(3, 1, dtype=torch.int64)
    second = engine(step, attention_mask=torch.cat((mask, more), 1), past_key_values=first.past_key_values)
    third = engine(step + 1, past_key_values=second.past_key_values)  # without a mask: they are tokens
    for row in range(3):
        real = mask[row].bool()
        alone = torch.cat((ids[row][real], step[row], step[row] + 1))[None]
        expected = model(alone).logits[0]
        near(first.logits[row][real], expected[:-2])
        near(second.logits[row, 0], expected[-2])
        near(third.logits[row, 0], expected[-1])
        if side == "right":  # a column without a token has the logits of the last one
            assert torch.equal(first.logits[row, -1], first.logits[row][real][-1])


def test_a_row_without_any_token_yet_waits(capsys: Any) -> None:
    engine, ids = injected("llama"), prompts(2, 4)
    first = engine(ids, attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    assert not first.logits[1].any()
    second = engine(ids, attention_mask=torch.tensor([[0] * 4, [1] * 4]), past_key_values=first.past_key_values)
    near(second.logits[1], reference("llama")(ids[1:]).logits[0])
    assert torch.equal(second.logits[0], first.logits[0, -1:].expand(4, -1))
    neither = engine(ids[:, :2], attention_mask=torch.zeros(2, 2), past_key_values=first.past_key_values)
    assert torch.equal(neither.logits[0], first.logits[0, -1:].expand(2, -1))
    assert torch.equal(neither.logits[1], second.logits[1, -1:].expand(2, -1))


def test_logits_are_the_callers_own() -> None:
    engine, ids = injected("llama"), prompts()
    first = engine(ids)
    step = engine(ids[:, :1], past_key_values=first.past_key_values)
    kept = step.logits.clone()
    engine(ids[:, 1:2], past_key_values=first.past_key_values)
    assert torch.equal(step.logits, kept)
    with torch.inference_mode():
        step.logits.zero_()
    nothing = engine(ids[:, :1], attention_mask=torch.zeros(3, 1), past_key_values=first.past_key_values)
    assert nothing.logits.abs().sum() > 0


@pytest.mark.parametrize("wanted", [0, 1, 3, torch.tensor([2, 0, 5])], ids=["all", "last", "last 3", "chosen"])
def test_logits_to_keep(wanted: int | Tensor) -> None:
    ids, mask = prompts(), mask_of("left")
    expected = reference("llama")(ids, attention_mask=mask, logits_to_keep=wanted).logits
    logits = injected("llama")(ids, attention_mask=mask, logits_to_keep=wanted).logits
    assert logits.shape == expected.shape
    all_logits = injected("llama")(ids, attention_mask=mask).logits
    chosen = all_logits[:, wanted] if isinstance(wanted, Tensor) else all_logits[:, -wanted:]
    assert torch.equal(logits, chosen)


def test_the_loss_is_hugging_faces() -> None:
    ids = prompts()
    labels = ids.clone()
    labels[0, :5] = -100
    expected = reference("llama")(ids, labels=labels)
    out = injected("llama")(ids, labels=labels, logits_to_keep=0)
    near(out.loss, expected.loss)
    first, second, *_ = injected("llama")(ids, labels=labels, return_dict=False)
    near(first, expected.loss)
    near(second, expected.logits)


def test_a_tuple_where_no_dict_is_wanted() -> None:
    out = injected("llama")(prompts(), return_dict=False, use_cache=False)
    assert isinstance(out, tuple)
    assert len(out) == 1


def test_without_use_cache_nothing_is_kept() -> None:
    engine = injected("llama")
    before = num_free(engine)
    assert engine(prompts(), use_cache=False).past_key_values is None
    assert num_free(engine) == before
    out = engine(prompts())
    assert num_free(engine) < before
    del out  # the cache goes with whoever holds it
    assert num_free(engine) == before


def test_a_cropped_cache_goes_on_from_there() -> None:
    engine, ids = injected("llama"), prompts()
    cache = engine(ids, attention_mask=mask_of("left")).past_key_values
    assert (cache.get_seq_length(), cache.get_max_cache_shape()) == (12, MAX_OUT_TOKENS)
    cache.crop(0)
    cache.crop(-5)
    assert cache.get_seq_length() == 7
    again = engine(ids[:, 7:], attention_mask=mask_of("left"), past_key_values=cache).logits
    assert torch.equal(again, engine(ids, attention_mask=mask_of("left")).logits[:, 7:])
    unpadded = engine(ids).past_key_values
    unpadded.crop(-2)
    assert torch.equal(engine(ids[:, 10:], past_key_values=unpadded).logits, engine(ids).logits[:, 10:])
    for wrong in (3, -20):
        with pytest.raises(ValueError, match="crop: "):
            cache.crop(wrong)
    cache.reset()
    assert torch.equal(engine(ids, past_key_values=cache).logits, engine(ids).logits)


def test_positions_that_count_the_tokens_are_taken() -> None:
    engine, ids, mask = injected("llama"), prompts(), mask_of("left")
    positions = mask.cumsum(1) - 1
    out = engine(ids, attention_mask=mask, position_ids=positions.clamp(min=0))
    assert torch.equal(out.logits, engine(ids, attention_mask=mask).logits)
    step = engine(ids[:, :1], position_ids=positions[:, -1:] + 1, past_key_values=out.past_key_values)
    assert step.logits.shape == (3, 1, 384)
    assert torch.equal(engine(ids, position_ids=torch.arange(12)[None]).logits, engine(ids).logits)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "output_attentions": ({"output_attentions": True}, ValueError, "output_attentions: the fused layers keep none"),
    "output_hidden_states": ({"output_hidden_states": True}, ValueError, "output_hidden_states: the fused layers"),
    "inputs_embeds": ({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 64)}, ValueError, "inputs_embeds: not"),
    "no input": ({"input_ids": None}, ValueError, r"input_ids: wants token ids \[rows, columns\]"),
    "flat ids": ({"input_ids": torch.arange(5)}, ValueError, "input_ids: wants token ids"),
    "floats": ({"input_ids": torch.zeros(3, 5)}, ValueError, "input_ids: wants token ids"),
    "no token": ({"input_ids": torch.tensor([[5, 384]])}, ValueError, "input_ids: 384 is no token; .* 0 to 383"),
    "negative": ({"input_ids": torch.tensor([[-1, 5]])}, ValueError, "input_ids: -1 is no token"),
    "another argument": ({"token_type_ids": torch.zeros(3, 12)}, ValueError, "token_type_ids: not taken"),
    "positions": ({"position_ids": torch.arange(1, 13)[None]}, ValueError, "position_ids: must count the tokens"),
    "positions' shape": ({"position_ids": torch.arange(5)[None]}, ValueError, r"position_ids: \[1, 5\], wants one for"),
    "a foreign cache": ({"past_key_values": DynamicCache()}, ValueError, "past_key_values: wants .* a DynamicCache"),
    "a mask's shape": ({"attention_mask": torch.ones(3, 9)}, ValueError, r"attention_mask: \[3, 9\], wants \[3, 12\]"),
    "a mask of four dimensions": ({"attention_mask": torch.ones(3, 1, 12, 12)}, ValueError, "attention_mask: "),
    "length": (
        {"input_ids": torch.full((1, MAX_OUT_TOKENS + 1), 7)},
        RuntimeError,
        "Input with size 97 exceeds maximum length of 96. Please increase max_tokens in the DeepSpeed Inference Config",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_kept_is_refused_by_name_and_leaves_nothing_behind(what: str) -> None:
    engine = injected("llama")
    arguments, error, text = REFUSED[what]
    before = num_free(engine)
    with pytest.raises(error, match=text) as raised:
        engine(**{"input_ids": prompts(), **arguments})
    assert raised.traceback  # its frames are alive still
    assert num_free(engine) == before


def test_a_cache_is_gone_on_with_by_its_own_rows_and_mask_alone() -> None:
    engine, ids, mask = injected("llama"), prompts(), mask_of("left")
    cache = engine(ids, attention_mask=mask).past_key_values
    changed = torch.ones(3, 13)
    with pytest.raises(ValueError, match="attention_mask: differs from that of earlier calls"):
        engine(ids[:, :1], attention_mask=changed, past_key_values=cache)
    with pytest.raises(ValueError, match="input_ids: 2 rows, and the cache holds 3"):
        engine(ids[:2, :1], past_key_values=cache)
    with pytest.raises(RuntimeError, match="Input with size 100 exceeds"):
        engine(prompts(3, 88), past_key_values=cache)
    assert cache.get_seq_length() == 12
    changed[:, :12] = mask
    step = engine(ids[:, :1], attention_mask=changed, past_key_values=cache)
    assert step.past_key_values is cache


def test_a_model_with_fewer_positions_than_max_out_tokens_says_so() -> None:
    from shared.engine.session import too_long

    assert "The model has positions for no more" in too_long(3000, 2048, 2048)
    assert "increase max_tokens" in too_long(3000, 2048, 4096)


def test_a_batch_larger_than_the_pool_grows_it() -> None:
    engine = injected("gpt2")
    ids = prompts(40, 30)
    out = engine(ids)
    near(out.logits[::13], reference("gpt2")(ids[::13]).logits)
    step = engine(ids[:, :1], past_key_values=out.past_key_values)
    near(step.logits[39, 0], reference("gpt2")(torch.cat((ids[39:], ids[39:, :1]), 1)).logits[0, -1])
    del out, step
