"""generate of an injected model, against Hugging Face's own; of one that is not injected, the same limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from shared.engine import InferenceEngine, init_inference
from tests.injected import KINDS, MAX_OUT_TOKENS, injected, mask_of, num_free, plain_model, prompts, reference
from tests.tiny_models import tiny_tokenizer

GREEDY = {"max_new_tokens": 10, "do_sample": False}


def tokens_after(model: Any, prompt: Tensor, **arguments: Any) -> Tensor:
    return model.generate(prompt[None], **arguments)[0, len(prompt) :]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_of_a_padded_batch_are_those_of_the_rows_alone(kind: str, side: str) -> None:
    engine, ids, mask = injected(kind), prompts(), mask_of(side)
    before = num_free(engine)
    out = engine.generate(ids, attention_mask=mask, pad_token_id=0, **GREEDY)
    assert num_free(engine) == before
    assert torch.equal(out[:, :12], ids)
    for row in range(3):
        expected = tokens_after(reference(kind), ids[row][mask[row].bool()], **GREEDY)
        assert torch.equal(out[row, 12 : 12 + len(expected)], expected)
        assert not out[row, 12 + len(expected) :].any()  # behind its end there is padding


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_p and temperature": {"do_sample": True, "top_p": 0.7, "temperature": 1.7},
    "repetition_penalty": {"do_sample": False, "repetition_penalty": 1.8},
    "no_repeat_ngram_size": {"do_sample": False, "no_repeat_ngram_size": 1},
    "several of each": {"do_sample": True, "num_return_sequences": 3},
    "min_new_tokens": {"do_sample": False, "min_new_tokens": 8, "eos_token_id": list(range(0, 384, 2))},
    "eos": {"do_sample": False, "eos_token_id": list(range(0, 384, 3))},
    "max_length": {"do_sample": False, "max_length": 15, "max_new_tokens": None},
    "without a cache": {"do_sample": False, "use_cache": False},
    "a prompt in chunks": {"do_sample": False, "prefill_chunk_size": 5},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
    "bad words": {"do_sample": False, "bad_words_ids": [[n] for n in range(380)]},
    "stop strings": {"do_sample": False, "stop_strings": ["a", "e", "t"], "tokenizer": tiny_tokenizer()},
    "a config": {"generation_config": GenerationConfig(max_new_tokens=7, do_sample=False)},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_choosing_tokens_is_hugging_faces(way: str) -> None:
    engine, ids, mask = injected("llama"), prompts(), mask_of("left")
    arguments = {"attention_mask": mask, "pad_token_id": 0, "max_new_tokens": 10, **WAYS[way]}
    if "generation_config" in arguments:
        del arguments["max_new_tokens"], arguments["pad_token_id"]
    before = num_free(engine)
    torch.manual_seed(5)
    out = engine.generate(ids, **arguments)
    torch.manual_seed(5)
    assert torch.equal(out, reference("llama").generate(ids, **arguments))
    assert num_free(engine) == before


@pytest.mark.parametrize("way", ["prompt_lookup_num_tokens", "assistant_model"])
def test_drafted_tokens_change_nothing(way: str) -> None:
    engine, prompt = injected("llama"), prompts(1, 6).repeat(1, 3)
    draft = {"prompt_lookup_num_tokens": 3, "assistant_model": reference("llama")}[way]
    before = num_free(engine)
    out = engine.generate(prompt, **GREEDY, **{way: draft})
    assert torch.equal(out, reference("llama").generate(prompt, **GREEDY))
    assert num_free(engine) == before


def test_prompts_are_given_by_place_or_by_either_name() -> None:
    engine, ids = injected("llama"), prompts(2)
    out = engine.generate(ids, **GREEDY)
    assert torch.equal(engine.generate(inputs=ids, **GREEDY), out)
    assert torch.equal(engine.generate(input_ids=ids, **GREEDY), out)
    assert torch.equal(engine.generate(ids, GenerationConfig(**GREEDY)), out)
    assert torch.equal(engine.module.generate(ids, **GREEDY), out)
    assert torch.equal(engine.generate(**GREEDY), reference("llama").generate(**GREEDY))  # from the first token on


def test_scores_come_with_the_tokens() -> None:
    engine, ids = injected("llama"), prompts(2)
    wants = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out, expected = engine.generate(ids, **wants), reference("llama").generate(ids, **wants)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="past_key_values: their call of generate has ended"):
        engine(ids[:, :1], past_key_values=out.past_key_values)


def test_a_cache_of_the_callers_outlives_the_call() -> None:
    engine, ids = injected("llama"), prompts(1)
    cache = engine(ids[:, :-1]).past_key_values
    first = engine.generate(ids, past_key_values=cache, **GREEDY)
    expected = reference("llama").generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(first, expected[:, : first.shape[1]])
    assert cache.get_seq_length() == first.shape[1] - 1
    second = engine.generate(first, past_key_values=cache, **GREEDY)
    assert torch.equal(second, expected[:, : second.shape[1]])


def test_a_streamer_is_told_every_token(capsys: pytest.CaptureFixture[str]) -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.has_ended = False

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.has_ended = True

    kept, ids = Kept(), prompts(1)
    out = injected("llama").generate(ids, streamer=kept, **GREEDY)
    assert (kept.tokens, kept.has_ended) == (out[0].tolist(), True)
    tokenizer = tiny_tokenizer()
    injected("llama").generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=True), **GREEDY)  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0, 12:]).strip()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize("who", ["streamer", "stopping_criteria", "logits_processor"])
def test_what_ends_a_call_in_the_middle_ends_its_cache(who: str, error: type[BaseException]) -> None:
    engine, ids = injected("llama"), prompts()
    num_calls = 0

    class Raises(BaseStreamer):
        def __call__(self, *_: Any, **__: Any) -> Any:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 4:
                raise error

        put = __call__

        def end(self) -> None:
            raise AssertionError

    def never(*arguments: Any, **_: Any) -> Any:
        Raises()()
        return arguments[1] if who == "logits_processor" else torch.zeros(3, dtype=torch.bool)

    given: Any = {
        "streamer": Raises(),
        "stopping_criteria": StoppingCriteriaList([never]),  # pyright: ignore[reportArgumentType]
        "logits_processor": [never],
    }[who]
    if who == "streamer":
        ids = ids[:1]
    before = num_free(engine)
    with pytest.raises(error) as raised:
        engine.generate(ids, **GREEDY, **{who: given})
    assert raised.traceback
    assert num_calls == 4
    assert num_free(engine) == before
    out = engine.generate(prompts(1), **GREEDY)
    assert torch.equal(out, reference("llama").generate(prompts(1), **GREEDY))


def test_a_criterion_stops_it() -> None:
    def after_three(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 15)

    arguments: Any = {"stopping_criteria": StoppingCriteriaList([after_three]), **GREEDY}  # pyright: ignore[reportArgumentType]
    out = injected("llama").generate(prompts(), **arguments)
    assert out.shape == (3, 15)
    assert torch.equal(out, reference("llama").generate(prompts(), **arguments))


@pytest.fixture(scope="module")
def not_injected() -> InferenceEngine:
    return init_inference(plain_model("llama"), dtype="float32", max_out_tokens=MAX_OUT_TOKENS)


@pytest.fixture(params=["injected", "not injected"])
def engine(request: pytest.FixtureRequest, not_injected: InferenceEngine) -> InferenceEngine:
    return injected("llama") if request.param == "injected" else not_injected


def test_a_model_that_is_not_injected_generates_as_it_did(not_injected: InferenceEngine) -> None:
    ids, mask = prompts(), mask_of("left")
    torch.manual_seed(3)
    out = not_injected.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(out, reference("llama").generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=True))
    assert torch.equal(not_injected(ids).logits, reference("llama")(ids).logits)


def beams_of_the_model(engine: InferenceEngine) -> Any:
    engine.generation_config.num_beams = 4
    try:
        return engine.generate(prompts())
    finally:
        engine.generation_config.num_beams = None


BEAMS: dict[str, Callable[[InferenceEngine], Any]] = {
    "argument": lambda engine: engine.generate(prompts(), num_beams=2),
    "config": lambda engine: engine.generate(prompts(), generation_config=GenerationConfig(num_beams=2)),
    "config by place": lambda engine: engine.generate(prompts(), GenerationConfig(num_beams=2)),
    "the model's config": beams_of_the_model,
}


@pytest.mark.parametrize("way", BEAMS)
def test_beams_are_refused(engine: InferenceEngine, way: str) -> None:
    with pytest.raises(NotImplementedError, match="DeepSpeed does not support `num_beams` > 1"):
        BEAMS[way](engine)


LONG = prompts(1, MAX_OUT_TOKENS + 1)
TOO_LONG: dict[str, tuple[Callable[[InferenceEngine], Any], int]] = {
    "by place": (lambda engine: engine.generate(LONG), 97),
    "input_ids": (lambda engine: engine.generate(input_ids=LONG), 97),
    "inputs": (lambda engine: engine.generate(inputs=LONG), 97),
    "max_new_tokens": (lambda engine: engine.generate(prompts(1, 90), max_new_tokens=7), 97),
    "max_new_tokens of a config": (
        lambda engine: engine.generate(prompts(1, 90), GenerationConfig(max_new_tokens=9)),
        99,
    ),
    "max_length": (lambda engine: engine.generate(input_ids=prompts(1, 90), max_length=100), 100),
    "max_length of a config": (
        lambda engine: engine.generate(prompts(1, 90), generation_config=GenerationConfig(max_length=200)),
        200,
    ),
    "by default": (lambda engine: engine.generate(prompts(1, 90)), 110),
    "from nothing": (lambda engine: engine.generate(max_new_tokens=96), 97),
}


@pytest.mark.parametrize("way", TOO_LONG)
def test_what_exceeds_max_out_tokens_is_refused_before_anything_is_computed(
    engine: InferenceEngine, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, size = TOO_LONG[way]
    monkeypatch.setattr(type(engine.module), "forward", None)
    with pytest.raises(
        RuntimeError, match=f"^Input with size {size} exceeds maximum length of 96. Please increase max"
    ):
        call(engine)


def test_as_many_tokens_as_there_may_be(engine: InferenceEngine) -> None:
    out = engine.generate(prompts(1, 90), max_new_tokens=6, min_new_tokens=6)
    assert out.shape == (1, MAX_OUT_TOKENS)


REFUSED: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, NotImplementedError),
    "dola_layers": ({"dola_layers": "high"}, NotImplementedError),
    "assistant_early_exit": ({"assistant_early_exit": 1}, NotImplementedError),
    "force_words_ids": ({"force_words_ids": [[5]]}, NotImplementedError),
    "cache_implementation": ({"cache_implementation": "static"}, ValueError),
    "output_hidden_states": ({"output_hidden_states": True, "return_dict_in_generate": True}, ValueError),
    "output_attentions": ({"output_attentions": True, "return_dict_in_generate": True}, ValueError),
    "inputs_embeds": ({"inputs_embeds": torch.zeros(1, 3, 64)}, ValueError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_way_of_decoding_that_fused_layers_do_not_have_is_refused_by_name(name: str) -> None:
    engine, (arguments, error) = injected("llama"), REFUSED[name]
    before = num_free(engine)
    prompt = {} if name == "inputs_embeds" else {"input_ids": prompts()}
    with pytest.raises(error, match=name):
        engine.generate(**prompt, max_new_tokens=4, **arguments)
    assert num_free(engine) == before


def test_a_cache_that_the_models_own_config_wishes_for_is_not_made() -> None:
    engine = init_inference(plain_model("llama"), kernel_inject=True, dtype="float32")
    engine.generation_config.cache_implementation = "static"
    expected = reference("llama").generate(prompts(), **GREEDY)
    assert torch.equal(engine.generate(prompts(), **GREEDY), expected)


def test_ids_that_are_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input_ids: \[5\], wants"):
        injected("llama").generate(torch.arange(5, 10), max_new_tokens=3)


def test_a_model_that_does_not_generate_says_so() -> None:
    engine = init_inference(torch.nn.Linear(2, 2), dtype="float32")
    with pytest.raises(AttributeError, match="Linear does not generate"):
        engine.generate(prompts())
