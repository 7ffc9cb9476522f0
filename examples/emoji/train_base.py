"""The base model of the demo: a small Stable Diffusion, trained from nothing on the drawings of both designers.

    python -m fastinvdpo._examples.emoji.train_base --output runs/emoji [--steps 9500] [--device cuda]

Two stages: the autoencoder (32x32x3 to 4x8x8), then text encoder and UNet together on its latents. Both run at a
constant learning rate that falls to zero over the last steps, and the exponential average of their weights is what is
kept; so a longer run continues a shorter one. Each stage writes a checkpoint every few minutes, and the same command
continues from it. What a step draws depends on the seed and its number alone: an interrupted run ends as an
uninterrupted one.

``OUTPUT/pipeline`` is a diffusers ``StableDiffusionPipeline`` in fp16, written at every checkpoint of the second stage.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastinvdpo._examples.emoji.data import Emoji, load_emoji
from fastinvdpo._examples.emoji.judge import to_tensor
from fastinvdpo._extras import require
from fastinvdpo.atomic import atomic_directory, atomic_file

WIDTH = 128
TOKENS = 16
CAPTION_DROPOUT = 0.1
MIN_SNR = 5.0
"""Squared errors count ``min(SNR, 5) / SNR`` times (Hang et al., 2023, equation 5, for noise prediction)."""
KL_WEIGHT = 1e-5
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 32,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (64, 128),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
"""The noise schedule of Stable Diffusion 1.x, on which the model is trained."""
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "projection_dim": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
}


@dataclass(frozen=True)
class Stage:
    """How one of the stages trains: AdamW without weight decay, ``decay`` last steps down to a rate of zero."""

    name: str
    steps: int
    batch_size: int
    learning_rate: float
    decay: int
    warmup: int = 100
    average: float = 0.999

    def rate(self, step: int) -> float:
        """Factor of the learning rate at a step, counted from 0."""
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / max(self.decay, 1))


Loss = Callable[[Tensor, torch.Generator], Tensor]
"""From the places of a batch's images, int64 ``(b,)``, and what to draw from, to a scalar."""


def train_stage(
    stage: Stage,
    networks: nn.ModuleDict,
    loss: Loss,
    images: int,
    output: Path,
    *,
    seed: int = 0,
    minutes: float = 5.0,
    written: Callable[[nn.ModuleDict], None] = lambda average: None,
) -> nn.ModuleDict:
    """Train ``networks`` in place, or continue from ``OUTPUT/NAME.pt``; returns the average of their weights.

    ``written(average)`` is called after every checkpoint. A line a hundred steps goes to ``OUTPUT/NAME.jsonl``. The
    checkpoint before the rate falls is kept as ``NAME-constant.pt``: a run with more steps continues from that one.
    """
    average = copy.deepcopy(networks).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        networks.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, foreach=True
    )
    newest, constant = output / f"{stage.name}.pt", output / f"{stage.name}-constant.pt"
    step = _resume(stage, newest, constant, networks, average, optimizer)
    log, began, since, losses = output / f"{stage.name}.jsonl", time.perf_counter(), step, []
    saved = began
    while step < stage.steps:
        if step == stage.steps - stage.decay:
            _save(constant, stage, step, networks, average, optimizer)
        draws = torch.Generator().manual_seed((seed << 32) + step)
        places = batch_places(step, stage.batch_size, images, seed)
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate * stage.rate(step)
        value = loss(places, draws)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(networks.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            kept = min(stage.average, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.parameters()), list(networks.parameters()), 1 - kept)
        losses.append(value.detach())
        now = time.perf_counter()
        if step % 100 == 0 or step == stage.steps:
            row = {
                "step": step,
                "loss": torch.stack(losses).mean().item(),
                "steps_per_minute": 60 * (step - since) / (now - began),
            }
            losses.clear()
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if now - saved > 60 * minutes or step == stage.steps:
            _save(newest, stage, step, networks, average, optimizer)
            written(average)
            saved = time.perf_counter()
    return average


def batch_places(step: int, batch_size: int, images: int, seed: int) -> Tensor:
    """The images of one batch, int64 ``(batch_size,)``: every epoch is a new permutation of all of them."""
    first = step * batch_size
    epochs = range(first // images, (first + batch_size - 1) // images + 1)
    orders = [torch.randperm(images, generator=torch.Generator().manual_seed((seed << 32) + e)) for e in epochs]
    start = first - epochs[0] * images
    return torch.cat(orders)[start : start + batch_size]


def _save(
    path: Path, stage: Stage, step: int, networks: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    state = {
        "step": step,
        "falls_after": stage.steps - stage.decay,
        "networks": networks.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_file(path) as partial:
        torch.save(state, partial)


def _resume(
    stage: Stage,
    newest: Path,
    constant: Path,
    networks: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> int:
    """Load the newest checkpoint whose rate is the one that this stage has there; the number of its step."""
    for path in (newest, constant):
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)
            falls_after = stage.steps - stage.decay
            if state["step"] <= min(state["falls_after"], falls_after) or state["falls_after"] == falls_after:
                networks.load_state_dict(state["networks"])
                average.load_state_dict(state["average"])
                optimizer.load_state_dict(state["optimizer"])
                return int(state["step"])
    return 0


def train_autoencoder(stage: Stage, pixels: Tensor, output: Path, **options: Any) -> nn.Module:
    """The autoencoder, from images ``(n, 3, 32, 32)`` in [-1, 1]: L1 + ½ L2 + KL_WEIGHT times the KL divergence.

    Its ``scaling_factor`` makes the standard deviation of the images' latents 1.
    """
    diffusers = require("diffusers", extra="train", purpose="training the demo's base model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae: Any = diffusers.AutoencoderKL(**VAE)
    vae.to(pixels.device, memory_format=torch.channels_last)
    networks = nn.ModuleDict({"vae": vae})

    def loss(places: Tensor, draws: torch.Generator) -> Tensor:
        images = pixels[places].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draws).to(pixels.device)
        error = vae.decode(posterior.mean + posterior.std * noise).sample - images
        return error.abs().mean() + 0.5 * error.square().mean() + KL_WEIGHT * posterior.kl().mean()

    trained: Any = train_stage(stage, networks, loss, len(pixels), output, **options)["vae"]
    trained.register_to_config(scaling_factor=1 / encode(trained, pixels).std().item())
    return trained


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Means of the latents ``(n, 4, 8, 8)``, not scaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(256)])


def train_diffusion(
    stage: Stage, latents: Tensor, tokens: Tensor, empty: Tensor, text_config: Any, output: Path, **options: Any
) -> nn.ModuleDict:
    """Text encoder and UNet, from scaled latents ``(n, 4, 8, 8)`` and the captions' tokens ``(n, TOKENS)``.

    Noise prediction; the timesteps of a batch are one from each of as many equal strata. ``empty``, ``(TOKENS,)``,
    takes the place of a share CAPTION_DROPOUT of the captions.
    """
    diffusers = require("diffusers", extra="train", purpose="training the demo's base model")
    transformers = require("transformers", extra="train", purpose="training the demo's base model")
    device = latents.device
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(**UNET)
        text = transformers.CLIPTextModel(text_config)
    networks = nn.ModuleDict({"unet": unet.to(memory_format=torch.channels_last), "text_encoder": text}).to(device)
    alphas = diffusers.DDIMScheduler(**SCHEDULER).alphas_cumprod.to(device)
    weights = (MIN_SNR * (1 - alphas) / alphas).clamp(max=1.0)

    def loss(places: Tensor, draws: torch.Generator) -> Tensor:
        n = len(places)
        strata = (torch.arange(n) + torch.rand(n, generator=draws)) / n
        t = (strata * len(alphas)).long().to(device)
        noise = torch.randn(n, *latents.shape[1:], generator=draws).to(device)
        dropped = (torch.rand(n, 1, generator=draws) < CAPTION_DROPOUT).to(device)
        clean, level = latents[places], alphas[t].view(-1, 1, 1, 1)
        noisy = level.sqrt() * clean + (1 - level).sqrt() * noise
        encoded = text(torch.where(dropped, empty, tokens[places])).last_hidden_state
        predicted = unet(noisy.contiguous(memory_format=torch.channels_last), t, encoded, return_dict=False)[0]
        return (weights[t] * (predicted - noise).square().mean((1, 2, 3))).mean()

    return train_stage(stage, networks, loss, len(latents), output, **options)


def make_tokenizer(captions: list[str], directory: Path) -> Any:
    """A CLIPTokenizer of the captions' own words, each one token, saved in ``directory``."""
    tokenizers = require("tokenizers", extra="train", purpose="making the demo's tokenizer")
    transformers = require("transformers", extra="train", purpose="making the demo's tokenizer")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    words = tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")  # CLIP's
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(words, behavior="removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1 << 20, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    pairs.train_from_iterator(captions, trainer)
    model = json.loads(pairs.to_str())["model"]
    # As CLIP's: every byte, inside a word and at its end, then the merges. So an unknown word becomes letters.
    merged = ["".join(pair) for pair in model["merges"]]
    ends = [f"{byte}</w>" for byte in alphabet]
    vocabulary = [*dict.fromkeys([*alphabet, *ends, *merged]), "<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(vocabulary)}))
    merges = "".join(f"{first} {second}\n" for first, second in model["merges"])
    (directory / "merges.txt").write_text("#version: 0.2\n" + merges)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(directory, model_max_length=TOKENS)
    tokenizer.save_pretrained(directory)
    return tokenizer


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token numbers ``(n, TOKENS)``, as the pipeline computes them."""
    found: Tensor = tokenizer(
        captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    return found


def save_pipeline(directory: Path, tokenizer: Any, vae: nn.Module, text: nn.Module, unet: nn.Module) -> None:
    """Write a ``StableDiffusionPipeline`` without safety checker, in fp16."""
    diffusers = require("diffusers", extra="train", purpose="saving the demo's base model")
    half = [copy.deepcopy(network).to("cpu", torch.float16) for network in (vae, text, unet)]
    pipeline = diffusers.StableDiffusionPipeline(
        vae=half[0],
        text_encoder=half[1],
        tokenizer=tokenizer,
        unet=half[2],
        scheduler=diffusers.DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with atomic_directory(directory, ours=lambda name: True) as new:
        pipeline.save_pretrained(new, safe_serialization=True)


def train_base(
    emoji: Emoji,
    output: Path,
    autoencoder: Stage,
    diffusion: Stage,
    *,
    device: str = "cpu",
    seed: int = 0,
    minutes: float = 5.0,
) -> Path:
    """Both stages, with a checkpoint every ``minutes``; the directory of the pipeline."""
    output.mkdir(parents=True, exist_ok=True)
    transformers = require("transformers", extra="train", purpose="training the demo's base model")
    images = emoji.images.reshape(-1, *emoji.images.shape[2:])
    pixels = to_tensor(images).to(device)
    options = {"seed": seed, "minutes": minutes}
    vae: Any = train_autoencoder(autoencoder, pixels, output, **options)
    tokenizer = make_tokenizer(emoji.names, output / "tokenizer")
    tokens = tokenize(tokenizer, [*emoji.names, ""]).to(device)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text_config = transformers.CLIPTextConfig(**TEXT, vocab_size=len(tokenizer), **ends)
    latents = encode(vae, pixels) * vae.config.scaling_factor

    def write(average: Any) -> None:
        save_pipeline(output / "pipeline", tokenizer, vae, average["text_encoder"], average["unet"])

    train_diffusion(
        diffusion, latents, tokens[:-1].repeat(2, 1), tokens[-1], text_config, output, written=write, **options
    )
    return output / "pipeline"


def main(arguments: list[str] | None = None) -> None:
    """Train with the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=9_500, help="of text encoder and UNet, 64 images each")
    parser.add_argument("--decay", type=int, default=1_000, help="last steps, in which the learning rate falls")
    parser.add_argument("--vae-steps", type=int, default=2_400, help="of the autoencoder, 16 images each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0, help="between two checkpoints")
    chosen = parser.parse_args(arguments)
    train_base(
        load_emoji(),
        chosen.output,
        Stage("autoencoder", chosen.vae_steps, 16, 2e-3, decay=chosen.vae_steps // 3, average=0.99),
        Stage("diffusion", chosen.steps, 64, 1e-3, decay=chosen.decay),
        device=chosen.device,
        seed=chosen.seed,
        minutes=chosen.minutes,
    )


if __name__ == "__main__":
    main()
