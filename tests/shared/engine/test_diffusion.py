"""Pipelines of diffusers on the engine's layers against themselves as they were, random weights, images of 32 x 32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.quantization import Quantization
from shared.engine import diffusion, image_layers, init_inference
from shared.engine.image_bindings import OPS, Binding, bindings
from shared.module_graph import ModuleGraph
from tests.tiny_pipelines import stable_diffusion, stable_diffusion_xl

pytest.importorskip("diffusers")

PROMPT = "a small boat"
ALL_OURS = {op: Binding(op, "engine", "asked for") for op in OPS}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Layers so small are computed before a second thread wakes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op is the engine's, whatever this machine's are."""
    monkeypatch.setattr(diffusion, "bindings", lambda *_: ALL_OURS)


def images(pipeline: Any, **kwargs: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    wants = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt", **kwargs}
    return pipeline(PROMPT, generator=torch.Generator().manual_seed(3), **wants).images


def difference(a: Tensor, b: Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def unet(**fields: Any) -> nn.Module:
    return stable_diffusion(**fields).unet.eval().requires_grad_(False)


def injected(model: nn.Module, whose: dict[str, Binding] = ALL_OURS) -> nn.Module:
    from shared.engine.diffusers_models import Replacer, check

    check("model", model)
    Replacer(whose, None, []).replace(model)
    return model


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
@pytest.mark.usefixtures("ours")
def test_images_are_those_of_the_plain_pipeline(make: Any) -> None:
    expected = images(make())
    engine = init_inference(make(), kernel_inject=True, dtype="fp32")
    assert expected.std() > 0.05
    assert difference(images(engine), expected) < 1e-4
    assert difference(images(engine.module), expected) < 1e-4  # the pipeline itself
    near = init_inference(make(), kernel_inject=True, dtype="bf16")
    assert near.unet.dtype == near.vae.dtype == near.text_encoder.dtype == torch.bfloat16
    assert 0 < difference(images(near), expected) < 0.1


def test_what_is_used_is_in_a_table() -> None:
    pipeline = stable_diffusion()
    expected = images(pipeline)
    engine = init_inference(pipeline, kernel_inject=True, dtype="fp32")
    assert difference(images(engine), expected) < 1e-4
    table = engine.bindings()
    counts = {(model, op): count for model, op, _, count in table}
    # 8 attentions and 4 feed-forwards of 4 blocks; 8 residual blocks; a norm before each block, and the last one
    assert counts["unet", "attention"] == 8
    assert counts["unet", "activation"] == 4
    assert counts["unet", "layer_norm"] == 12
    assert counts["unet", "group_norm_silu"] == 2 * 8 + 1
    assert counts["unet", "group_norm"] == 4
    assert counts["unet", "linear"] == 4 * (2 + 3) + 4 * 2
    assert counts["vae", "attention"] == 2
    assert counts["vae", "group_norm_silu"] == 2 * 10 + 2
    assert counts["vae", "group_norm"] == 2
    whose = {binding.op: binding.implementation for binding in bindings("cpu", torch.float32).values()}
    assert {op: implementation for _, op, implementation, _ in table} == whose
    left = [type(part) for model in (engine.unet, engine.vae) for part in model.modules()]
    assert not {nn.GroupNorm, nn.LayerNorm} & set(left)


def test_a_machines_bindings() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cpu, cuda, int8 = bindings("cpu", dtype), bindings("cuda", dtype), bindings("cpu", dtype, Quantization(8))
        assert list(cpu) == list(cuda) == list(int8) == list(OPS)
        assert {binding.implementation for binding in cuda.values()} == {"engine"}
        assert (cpu["linear"].implementation, int8["linear"].implementation) == ("torch", "engine")
        assert all(binding.op == op and binding.why for op, binding in cpu.items())
    assert bindings("cpu", torch.float32)["attention"].implementation == "torch"


def test_the_pipeline_keeps_its_interface() -> None:
    pipeline = stable_diffusion()
    engine = init_inference(pipeline, kernel_inject=True, dtype="fp32")
    assert engine.module is pipeline
    assert engine.unet is pipeline.unet
    assert engine.scheduler is pipeline.scheduler
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = engine.nothing
    with pytest.raises(AttributeError, match="StableDiffusionPipeline does not generate"):
        engine.generate(PROMPT)
    wants = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent"}
    pipeline.set_progress_bar_config(disable=True)
    latents, flagged = engine([PROMPT] * 2, return_dict=False, **wants)
    assert latents.shape == (2, 4, 16, 16)
    assert flagged is None
    engine.profile_model_time()
    engine(PROMPT, **wants)
    assert [time > 0 for time in engine.model_times()] == [True]
    with pytest.raises(ValueError, match="layers: a pipeline has none"):
        engine.profile_model_time(layers=True)
    engine.destroy()
    assert not hasattr(engine, "unet")
    assert pipeline(PROMPT, **wants).images.shape == (1, 4, 16, 16)


def test_without_injection_the_pipeline_computes_as_it_did() -> None:
    pipeline = stable_diffusion()
    layers = [type(part) for part in pipeline.unet.modules()]
    expected = images(pipeline)
    engine = init_inference(pipeline, dtype="fp32")
    assert torch.equal(images(engine), expected)
    assert [type(part) for part in engine.unet.modules()] == layers
    assert init_inference(pipeline, dtype="bf16").unet.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="quant: of a pipeline the engine's linears are quantized"):
        init_inference(pipeline, dtype="int8")


def test_int8_quantizes_the_linears() -> None:
    expected = images(stable_diffusion())
    engine = init_inference(stable_diffusion(), kernel_inject=True, dtype="int8")
    projections = [part for part in engine.unet.modules() if isinstance(part, image_layers.Projection)]
    assert {part.packed.form for part in projections if part.packed} == {"int8"}
    assert all(part.packed is not None for part in projections)
    assert 0 < difference(images(engine), expected) < 0.2


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift", "use_linear_projection": True},
        {"act_fn": "gelu", "only_cross_attention": True, "upcast_attention": True},
        {"dual_cross_attention": False, "resnet_skip_time_act": True, "mid_block_scale_factor": 2.0},
        {"down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D")},
        {"attention_head_dim": 16},  # of 2 and 4 dimensions, which the engine's op does not take
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_unet_of_any_kind_computes_the_same(fields: dict[str, Any], masked: bool) -> None:
    model = unet(cross_attention_dim=32, **fields)
    sample, states = torch.randn(2, 4, 16, 16), torch.randn(2, 5, 32)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]]) if masked else None
    with torch.inference_mode():
        expected = model(sample, 7, states, encoder_attention_mask=mask).sample
        got = injected(model)(sample, 7, states, encoder_attention_mask=mask).sample
    assert difference(got, expected) < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", ["gelu", "gelu-approximate", "geglu", "geglu-approximate", "swiglu", "linear-silu"])
@pytest.mark.parametrize("whose", [ALL_OURS, bindings("cpu", torch.float32)], ids=["ours", "bound"])
def test_feed_forwards(kind: str, whose: dict[str, Binding]) -> None:
    from diffusers.models.attention import FeedForward

    model = nn.Sequential(FeedForward(24, activation_fn=kind)).requires_grad_(False)
    x = torch.randn(2, 7, 24)
    expected = model(x)
    got = injected(model, whose)(x)
    assert isinstance(model[0], image_layers.FeedForward)
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("ours")
def test_an_autoencoder_encodes_and_decodes_the_same() -> None:
    vae = stable_diffusion().vae
    image, latents = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 16, 16)
    with torch.inference_mode():
        expected = vae.encode(image).latent_dist.mean, vae.decode(latents).sample
        injected(vae)
        got = vae.encode(image).latent_dist.mean, vae.decode(latents).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_attention_that_is_not_known_is_refused_and_nothing_changed() -> None:
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0

    def refused(pipeline: Any, match: str) -> None:
        before = [type(part) for part in pipeline.unet.modules()]
        with pytest.raises(ValueError, match=match):
            init_inference(pipeline, kernel_inject=True, dtype="bf16")
        assert [type(part) for part in pipeline.unet.modules()] == before
        assert pipeline.unet.dtype == torch.float32

    pipeline = stable_diffusion()
    block = pipeline.unet.mid_block.attentions[0].transformer_blocks[0]
    processor, linear = block.attn2.processor, block.attn2.to_k
    block.attn2.set_processor(AttnAddedKVProcessor2_0())
    refused(pipeline, r"unet\.mid_block\..*\.attn2: the attention processor AttnAddedKVProcessor2_0 is not known")
    block.attn2.set_processor(processor)

    class LoraLinear(nn.Linear):
        pass

    block.attn2.to_k = LoraLinear(32, 64)
    refused(pipeline, r"attn2: attention with a projection of the kind LoraLinear")
    block.attn2.to_k = linear
    block.ff.net[2] = LoraLinear(256, 64)
    refused(pipeline, r"unet\..*\.ff: a linear with an adapter")
    block.ff.net[2] = nn.Linear(256, 64)
    block.attn1 = Attention(64, heads=4, dim_head=16, qk_norm="layer_norm")
    refused(pipeline, r"attn1: attention with norm_q")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint", "model.json"),
        ("save_mp_checkpoint_path", "out"),
        ("set_empty_params", True),
        ("config", {"in_channels": 3}),
        ("triangular_masking", False),
        ("max_out_tokens", 7),
        ("injection_policy", {nn.Linear: "to_q"}),
    ],
)
def test_options_of_other_models_are_refused(tiny: Any, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name}: not taken for a pipeline"):
        init_inference(tiny, {name: value, "dtype": "fp32"})


@pytest.fixture(scope="module")
def tiny() -> Any:
    """A pipeline that nobody changes."""
    return stable_diffusion()


@pytest.fixture(scope="module")
def changed() -> nn.Module:
    return init_inference(stable_diffusion(), kernel_inject=True, dtype="fp32").unet


def test_what_an_injected_model_cannot_do_is_an_error(changed: Any) -> None:
    from diffusers.models.attention_processor import AttnProcessor2_0

    sample, states = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 32)
    assert len(changed.attn_processors) == 8
    with pytest.raises(ValueError, match="AttnProcessor2_0: an injected model's attention is not exchanged"):
        changed.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(RuntimeError, match="Save it before init_inference"):
        changed.state_dict()
    with torch.no_grad(), pytest.raises(ValueError, match="cross_attention_kwargs: gate not taken"):
        changed(sample, 3, states, cross_attention_kwargs={"gate": 0.5})
    with torch.no_grad(), pytest.raises(ValueError, match=r"attention_mask: \[1, 1, 4\], wants"):
        changed(sample, 3, states, encoder_attention_mask=torch.ones(1, 4))
    with pytest.raises(RuntimeError, match="injected layers give no gradients"):
        changed(sample.requires_grad_(), 3, states)


class Spy(ModuleGraph):
    """What a graph is called with."""

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        Spy.calls.append((args, kwargs))
        return super().forward(*args, **kwargs)


def test_models_are_graphs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = stable_diffusion()
    expected = images(pipeline)
    names = set(pipeline.unet.state_dict())
    monkeypatch.setattr(diffusion, "ModuleGraph", Spy)
    Spy.calls = []
    for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        diffusion.capture(model.requires_grad_(False))
    assert torch.equal(images(pipeline), expected)
    # two prompts, the one and the empty one; two steps; an image
    assert len(Spy.calls) == 2 + 2 + 1
    assert set(pipeline.unet.state_dict()) == names
    Spy.calls.clear()
    sample, states = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 32)
    by_position = pipeline.unet(sample, 7, states)
    by_name = pipeline.unet(sample, timestep=7, encoder_hidden_states=states, return_dict=False)
    assert type(by_position).__name__ == "UNet2DConditionOutput"
    assert torch.equal(by_position.sample, by_name[0])
    # a number would be another graph for each step
    (args, _), (_, kwargs) = Spy.calls
    assert torch.equal(args[1], torch.tensor(7))
    assert torch.equal(kwargs["timestep"], torch.tensor(7))
    pipeline.vae.encode(torch.randn(1, 3, 32, 32))
    assert len(Spy.calls) == 3


def test_on_a_cpu_nothing_is_captured() -> None:
    engine = init_inference(stable_diffusion(), kernel_inject=True, dtype="fp32", enable_cuda_graph=True)
    assert "forward" not in vars(engine.unet)


@pytest.mark.gpu
def test_replayed_images_are_those_of_the_plain_pipeline() -> None:
    expected = images(stable_diffusion())
    engine = init_inference(stable_diffusion(), kernel_inject=True, dtype="fp32", enable_cuda_graph=True)
    assert "forward" in vars(engine.unet)
    for _ in range(2):
        assert difference(images(engine).cpu(), expected) < 1e-3


@pytest.mark.slow
@pytest.mark.usefixtures("interpreter", "ours")
def test_tritons_kernels_compute_the_same_unet() -> None:
    model = unet(cross_attention_dim=32)
    sample, states = torch.randn(1, 4, 4, 4), torch.randn(1, 5, 32)
    with torch.inference_mode():
        expected = model(sample, 7, states).sample
        got = injected(model)(sample, 7, states).sample
    assert difference(got, expected) < 1e-4 * expected.abs().max()
