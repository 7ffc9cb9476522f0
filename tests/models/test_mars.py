"""MARS: the layer against recorded ones and against the unrouted decoder, the model's promises, sampling, files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastinvdpo import InvalidInput
from fastinvdpo.models.mars import (
    MarsConfig,
    MarsModel,
    Sampling,
    caption_images,
    generate_images,
)
from fastinvdpo.models.mars.experts import Routed, Routing, add_experts
from tests.cases import load_golden

transformers = pytest.importorskip("transformers")

FAMILIES = ("Llama", "Qwen2", "Qwen3")
CODES, TEXT = 20, 50
SHAPE = {"vocab_size": TEXT, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
SHAPE |= {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
PROMPTS = [[3, 4, 5], [], [7, 8, 9, 10, 11]]
IMAGES = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 19, 7, 7, 3, 2], [9, 8, 7, 6, 5, 4]])


def decoder(family: str = "Llama", dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **changes})
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()


def mars(family: str = "Llama", config: MarsConfig | None = None, noise: float = 0.0, **changes: Any) -> MarsModel:
    """A model; ``noise``: added to the visual expert, as training would."""
    model = MarsModel(decoder(family, **changes), config or MarsConfig(CODES))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.visual_parameters().values():
            value += noise * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    return model


def trained(
    model: MarsModel, steps: int, lr: float = 3e-3, weights: tuple[float, float] = (1.0, 1.0)
) -> list[list[float]]:
    """Losses of both directions at every step."""
    optimizer = torch.optim.AdamW(model.visual_parameters().values(), lr)
    captions, found = [[*prompt, 1] for prompt in PROMPTS], []
    for _ in range(steps):
        losses = torch.stack([model.image_loss(PROMPTS, IMAGES), model.caption_loss(IMAGES, captions)])
        optimizer.zero_grad()
        (losses @ losses.new_tensor(weights)).backward()
        optimizer.step()
        found.append(losses.tolist())
    return found


# The layer


@pytest.mark.parametrize("name", ["sat_plain", "hf_gqa"])
def test_a_layer_is_the_recorded_one_of_cogvlm(name: str) -> None:
    """In float64: norms and tables of angles, which transformers rounds to float32, are PyTorch's and made here."""
    tensors, record = load_golden(f"cogvlm/{name}")
    config: Any = record["config"]
    layer = transformers.models.llama.modeling_llama.LlamaDecoderLayer(
        transformers.LlamaConfig(
            hidden_size=32, num_attention_heads=4, num_key_value_heads=config["kv_heads"], intermediate_size=48,
            head_dim=8, attn_implementation="sdpa",
        ), 0,
    ).double()  # fmt: skip
    for norm, own in (("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2")):
        setattr(layer, norm, nn.RMSNorm(32, config["rms_eps"], dtype=torch.float64))
        getattr(layer, norm).weight.data = tensors[f"w.0.{own}"].double()
    add_experts(nn.ModuleList([layer]), visual_norms=False)
    layer.requires_grad_(True)
    parts = {"dense": "self_attn.o_proj.{}", **{part: f"mlp.{{}}.{part}_proj" for part in ("gate", "up", "down")}}
    sizes = [32, 8 * config["kv_heads"], 8 * config["kv_heads"]]
    for modality, expert in (("text", "text"), ("image", "visual")):
        for part, place in parts.items():
            layer.get_submodule(place.format(expert)).weight.data = tensors[f"w.0.{modality}.{part}"].double()
        rows = tensors[f"w.0.{modality}.qkv"].double().split(sizes)
        biases = tensors.get(f"w.0.{modality}.qkv_bias")
        for letter, weight, bias in zip(
            "qkv", rows, [None] * 3 if biases is None else biases.split(sizes), strict=True
        ):
            linear = layer.get_submodule(f"self_attn.{letter}_proj.{expert}")
            linear.weight.data = weight
            if bias is not None:
                linear.bias = nn.Parameter(bias.double())
    positions = tensors["in.position_ids"].double()
    frequencies = config["rope_base"] ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    angles = (positions.unsqueeze(-1) * frequencies).repeat(1, 1, 2)
    hidden = tensors["in.hidden"].double().requires_grad_()
    causal = torch.ones(16, 16, dtype=torch.bool).tril()[None, None]
    seen: list[Tensor] = []
    layer.self_attn.register_forward_hook(lambda module, given, output: seen.append(output[0]))
    routing = Routing.of(tensors["in.expert"])
    output = layer(hidden, causal, position_embeddings=(angles.cos(), angles.sin()), routing=routing)
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(output, tensors["out.hidden"], **close)
    torch.testing.assert_close(seen[0], tensors["mid.attention_out"][0], **close)
    loss = (output * tensors["in.projection"].double()).sum()
    torch.testing.assert_close(loss, tensors["out.loss"][0], **close)
    loss.backward()

    def near(found: Tensor, expected: Tensor) -> None:
        assert (found - expected).norm() <= 1e-12 * expected.norm()

    near(hidden.grad, tensors["grad.hidden"])
    for norm, own in (("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2")):
        near(getattr(layer, norm).weight.grad, tensors[f"grad.0.{own}"])
    for modality, expert in (("text", "text"), ("image", "visual")):
        for part, place in parts.items():
            near(layer.get_submodule(place.format(expert)).weight.grad, tensors[f"grad.0.{modality}.{part}"])
        linears = [layer.get_submodule(f"self_attn.{letter}_proj.{expert}") for letter in "qkv"]
        near(torch.cat([linear.weight.grad for linear in linears]), tensors[f"grad.0.{modality}.qkv"])
        if f"grad.0.{modality}.qkv_bias" in tensors:
            near(torch.cat([linear.bias.grad for linear in linears]), tensors[f"grad.0.{modality}.qkv_bias"])


@pytest.mark.parametrize("places", ["some", "none", "all"])
def test_gathered_routing_is_dense_masked_computation(places: str) -> None:
    visual = {"some": torch.rand(3, 7) < 0.4, "none": torch.zeros(3, 7).bool(), "all": torch.ones(3, 7).bool()}[places]
    routed = Routed(nn.Linear(5, 4).double(), nn.Linear(5, 4).double())
    hidden, slope = torch.randn(3, 7, 5).double().requires_grad_(), torch.randn(3, 7, 4).double()
    leaves = [hidden, *routed.parameters()]
    routed.routing = Routing.of(visual)
    found, dense = routed(hidden), torch.where(visual.unsqueeze(-1), routed.visual(hidden), routed.text(hidden))
    torch.testing.assert_close(found, dense, rtol=1e-13, atol=1e-13)
    ours, masked = (torch.autograd.grad(value, leaves, slope, allow_unused=True) for value in (found, dense))
    for one, other in zip(ours, masked, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [MarsConfig(CODES), MarsConfig(CODES, shared_output=True, visual_norms=True)])
def test_a_copied_expert_is_the_unrouted_decoder_and_image_codes_are_equally_likely(
    family: str, config: MarsConfig
) -> None:
    plain, model = decoder(family), mars(family, config)
    ids = torch.cat([torch.tensor([[3, 4, 5], [6, 7, 8]]), model.image_ids(IMAGES[:2])], 1)
    found = model(ids)
    embedded = torch.where((ids >= TEXT).unsqueeze(-1), model.visual_embedding[0], plain.model.embed_tokens(ids % TEXT))
    torch.testing.assert_close(found, plain.model(inputs_embeds=embedded).last_hidden_state, rtol=1e-6, atol=1e-7)
    assert model.image_loss(PROMPTS, IMAGES).item() == pytest.approx(math.log(CODES), rel=1e-12)
    mean = plain.model.embed_tokens.weight.mean(0)
    torch.testing.assert_close(model.visual_embedding, mean.expand(CODES + 2, -1), rtol=1e-6, atol=1e-8)


# The model


@pytest.mark.parametrize("family", FAMILIES)
def test_training_learns_a_small_set_in_both_directions_and_leaves_the_text_bit_for_bit(family: str) -> None:
    plain, model = decoder(family, torch.float32), mars(family, dtype=torch.float32)
    frozen = {name: value.clone() for name, value in plain.state_dict().items()}
    losses = trained(model, 60)
    assert losses[-1][0] < 0.3 * losses[0][0] and losses[-1][1] < 0.3 * losses[0][1]
    own = model.visual_parameters()
    assert {name for name, value in model.named_parameters() if value.requires_grad} == set(own)
    assert all(value.grad is None for name, value in model.named_parameters() if name not in own)
    assert all(bool((value.grad != 0).any()) for value in own.values())
    for name, value in model.decoder.state_dict().items():
        if ".visual." not in name:
            assert torch.equal(value, frozen[name.replace(".text.", ".")]), name
    ids = torch.tensor([[3, 4, 5, 6], [9, 8, 7, 2]])
    with torch.no_grad():
        assert torch.equal(model.decoder(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert torch.equal(model(ids) @ model.text_head.T, plain(input_ids=ids).logits)
        # What was overfitted is also what is sampled and captioned.
        greedy = generate_images(model, PROMPTS, 6, sampling=Sampling(temperature=0))
    assert torch.equal(greedy, IMAGES)
    assert caption_images(model, IMAGES, 8, end=1) == PROMPTS


def test_a_decoder_without_experts_drifts_on_text_and_one_with_them_does_not() -> None:
    """The ablation of shared parameters: the same training of the text weights themselves."""
    text = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])

    def drift(shared: bool) -> float:
        model = mars(dtype=torch.float32)
        before = (model(text) @ model.text_head.T).log_softmax(-1).detach()
        if shared:
            for routed in [module for module in model.modules() if isinstance(module, Routed)]:
                routed.visual = routed.text.requires_grad_(True)
            parameters = [value for value in model.parameters() if value.requires_grad]
            optimizer = torch.optim.AdamW(parameters, 3e-3)
            for _ in range(10):
                optimizer.zero_grad()
                model.image_loss(PROMPTS, IMAGES).backward()
                optimizer.step()
        else:
            trained(model, 10)
        after = (model(text) @ model.text_head.T).log_softmax(-1).detach()
        return float((before.exp() * (before - after)).sum(-1).mean())

    assert drift(shared=False) == 0 and drift(shared=True) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_by_definition_whatever_is_beside_them(family: str) -> None:
    model = mars(family, noise=0.05)
    found = model.image_log_probs(PROMPTS, IMAGES)
    captions = [[5, 6, 1], [7, 1], [1]]
    spoken = model.caption_log_probs(IMAGES, captions)
    for row, (prompt, codes, caption) in enumerate(zip(PROMPTS, IMAGES, captions, strict=True)):
        ids = torch.tensor([[*prompt, model.begin, *(codes + TEXT).tolist()]])
        exact = (model(ids)[0, -7:-1] @ model.visual_head.T).log_softmax(-1)
        torch.testing.assert_close(found[row], exact[range(6), codes], rtol=1e-6, atol=1e-6)
        ids = torch.cat([model.image_ids(codes[None]), torch.tensor([caption])], 1)
        exact = (model(ids)[0, 7 : 7 + len(caption)] @ model.text_head.T).log_softmax(-1)
        torch.testing.assert_close(
            spoken[row, : len(caption)], exact[range(len(caption)), caption], rtol=1e-6, atol=1e-6
        )
        assert not spoken[row, len(caption) :].any()
    for reduced, values, lengths in (
        (model.image_log_probs, found, torch.tensor(6)), (model.caption_log_probs, spoken, torch.tensor([3, 2, 1]))
    ):  # fmt: skip
        given = (PROMPTS, IMAGES) if values is found else (IMAGES, captions)
        torch.testing.assert_close(reduced(*given, "sum"), values.sum(1))
        torch.testing.assert_close(reduced(*given, "mean"), values.sum(1) / lengths)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_each_direction_by_itself_and_a_small_image_stands_before_its_image(family: str) -> None:
    model = mars(family, noise=0.05)
    text = torch.tensor([[3, 4, 5, 1], [1, 1, 1, 1], [7, 8, 9, 10]])
    length, spoken = torch.tensor([3, 0, 4]), torch.tensor([4, 1, 4])
    low = torch.tensor([[5, 6], [7, 8], [9, 1]])
    for captioning in torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 1]]).bool():
        for small in (None, low):
            found = model.mixed_log_probs(IMAGES, captioning, text, length, spoken, small)
            for row in range(3):
                codes = IMAGES[row : row + 1]
                image = model.image_ids(codes)
                image = image if small is None else torch.cat([model.image_ids(small[row : row + 1]), image], 1)
                prompt, caption = text[row : row + 1, : length[row]], text[row : row + 1, : spoken[row]]
                if captioning[row]:
                    hidden, head, targets = model(torch.cat([image, caption], 1)), model.text_head, caption[0]
                else:
                    hidden, head, targets = model(torch.cat([prompt, image[:, :-1]], 1)), model.visual_head, codes[0]
                exact = (hidden[0, -1 - len(targets) : -1] @ head.T).log_softmax(-1)[range(len(targets)), targets]
                torch.testing.assert_close(found[row, : len(targets)], exact, rtol=1e-6, atol=1e-6)
                assert not found[row, len(targets) :].any()
    model.decoder.config.max_position_embeddings = 10
    with pytest.raises(InvalidInput, match=r"^data\.resolution = '8 image tokens': .* of 11 tokens"):
        model.mixed_log_probs(IMAGES, captioning, text, length, spoken)


def test_checkpointed_activations_route_each_pass_by_its_own_tokens() -> None:
    """Two forwards of different layouts before their backward, whose layers run again."""

    def gradients(checkpointed: bool) -> list[Tensor]:
        model = mars(noise=0.05).train()
        if checkpointed:
            model.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model.image_loss(PROMPTS, IMAGES) + model.caption_loss(IMAGES[:2], [[5, 6, 1], [7, 1]])
        return list(torch.autograd.grad(loss, list(model.visual_parameters().values())))

    for one, other in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# Sampling


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_is_full_decoding_with_guidance(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits that each token was drawn from, again without a cache."""
    model, seen = mars(family, noise=0.1), []
    draw = Sampling.draw
    monkeypatch.setattr(
        Sampling, "draw", lambda self, logits, generator: seen.append(logits) or draw(self, logits, generator)
    )
    codes = generate_images(model, PROMPTS, 5, guidance=3.0, generator=torch.Generator().manual_seed(0))
    assert codes.shape == (3, 5) and int(codes.min()) >= 0 and int(codes.max()) < CODES
    for row, prompt in enumerate(PROMPTS):
        both = [
            model(torch.tensor([[*given, model.begin, *(codes[row] + TEXT).tolist()]]))[0, -6:-1] @ model.visual_head.T
            for given in (prompt, [])
        ]
        expected = both[1] + 3.0 * (both[0] - both[1])
        torch.testing.assert_close(
            torch.stack([logits[row] for logits in seen]).double(), expected, rtol=1e-4, atol=1e-4
        )
    again = generate_images(model, PROMPTS, 5, guidance=3.0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, codes)
    greedy = generate_images(model, PROMPTS, 2, low=IMAGES, sampling=Sampling(temperature=0))
    for row, prompt in enumerate(PROMPTS):
        ids = torch.cat([torch.tensor([prompt], dtype=torch.int64), model.image_ids(IMAGES[row : row + 1])], 1)
        ids = torch.cat([ids, torch.tensor([[model.begin, int(greedy[row, 0]) + TEXT]])], 1)
        assert torch.equal((model(ids)[0, -2:] @ model.visual_head.T).argmax(-1), greedy[row])


def test_what_sampling_keeps() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.06, 0.04]]).log()
    kept = {
        Sampling(): [0.5, 0.2, 0.2, 0.06, 0.04],
        Sampling(temperature=0): [1, 0, 0, 0, 0],
        Sampling(temperature=0.5): [0.25, 0.04, 0.04, 0.0036, 0.0016],
        Sampling(top_k=1): [1, 0, 0, 0, 0],
        Sampling(top_k=99): [0.5, 0.2, 0.2, 0.06, 0.04],
        Sampling(top_p=0.5): [1, 0, 0, 0, 0],
        Sampling(top_p=0.95): [0.5, 0.2, 0.2, 0.06, 0],
        Sampling(top_p=1e-9): [1, 0, 0, 0, 0],
    }
    for sampling, expected in kept.items():
        weights = torch.tensor([expected])
        torch.testing.assert_close(sampling.probabilities(logits), weights / weights.sum(), msg=str(sampling))


BAD = [
    ("codes", lambda model: MarsConfig(0)),
    ("temperature", lambda model: Sampling(temperature=-1)),
    ("top_k", lambda model: Sampling(top_k=-1)),
    ("top_p", lambda model: Sampling(top_p=0.0)),
    ("codes", lambda model: model.image_log_probs(PROMPTS, IMAGES + 1)),
    ("codes", lambda model: model.image_log_probs(PROMPTS, IMAGES.float())),
    ("prompts", lambda model: model.image_log_probs(PROMPTS[:2], IMAGES)),
    ("reduction", lambda model: model.image_log_probs(PROMPTS, IMAGES, "max")),
    ("captions", lambda model: model.caption_log_probs(IMAGES, PROMPTS)),
    ("texts", lambda model: model.image_log_probs("a cat", IMAGES)),
    ("texts[0]", lambda model: model.image_log_probs(["a cat", [], []], IMAGES)),
    ("texts[1]", lambda model: model.image_log_probs([[], [TEXT], []], IMAGES)),
    ("prompts", lambda model: generate_images(model, [], 4)),
    ("tokens", lambda model: generate_images(model, PROMPTS, 0)),
    ("guidance", lambda model: generate_images(model, PROMPTS, 4, guidance=math.nan)),
    ("decoder", lambda model: MarsModel(nn.Linear(2, 2), MarsConfig(CODES))),
    ("decoder", lambda model: add_experts(nn.ModuleList([nn.Linear(2, 2)]))),
]


def test_bad_input_is_named() -> None:
    model = mars()
    for name, call in BAD:
        with pytest.raises(InvalidInput, match="Remedy: ") as caught:
            call(model)
        assert str(caught.value).startswith(f"{name} = "), (name, str(caught.value))


class Words:
    """A tokenizer: letters are ids."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) - 95 for letter in text]}


def test_texts_are_split_by_the_tokenizer_and_captions_end() -> None:
    model = MarsModel(decoder(), MarsConfig(CODES), Words())
    assert model.text_ids(["ab", ""]) == [[2, 3], []] and model.text_ids(["ab", [4]], end=True) == [[2, 3, 1], [4]]
    torch.testing.assert_close(model.image_loss(["ab"], IMAGES[:1]), model.image_loss([[2, 3]], IMAGES[:1]))
    torch.testing.assert_close(model.caption_loss(IMAGES[:1], ["ab"]), model.caption_loss(IMAGES[:1], [[2, 3, 1]]))
