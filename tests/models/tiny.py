"""Checkpoints of the real diffusers and transformers classes at tiny widths, written where a test wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from tests.cases import SD_SCHEDULER

TOKENS = 12  # length that prompts are padded to


def tokenizer() -> CLIPTokenizer:
    """Every letter is a token of its own, inside a word and at its end."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def text_encoder(width: int, projected: bool = False) -> CLIPTextModel:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": TOKENS}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPTextConfig(vocab_size=len(tokenizer()), **sizes, **ids)
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def vae(**changes: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "sample_size": 16}
    return AutoencoderKL(**{**blocks, **sizes, **changes})


def unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1, "norm_num_groups": 8}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (16, 32)}
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "attention_head_dim": 2, "cross_attention_dim": 16}
    return UNet2DConditionModel(**{**blocks, **sizes, **changes})


def sd_pipeline(*, prediction_type: str = "epsilon", **parts: Any) -> StableDiffusionPipeline:
    """SD 1.x and 2.x at 16 x 16 pixels, latents 4 x 8 x 8."""
    torch.manual_seed(1)
    own = {
        "vae": vae(),
        "text_encoder": text_encoder(16),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": DDIMScheduler(**{**SD_SCHEDULER, "prediction_type": prediction_type}),
    }
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**{**own, **parts}, **none)


def pixel_pipeline(**parts: Any) -> StableDiffusionPipeline:
    """SD 1.x at 8 x 8 pixels, latents 4 x 8 x 8: the smallest that trains, for tests of everything around a model."""
    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    sizes = {"block_out_channels": (8,), "norm_num_groups": 1, "sample_size": 8, "scaling_factor": 4.0}
    plain = vae(**blocks, **sizes, mid_block_add_attention=False)
    narrow = unet(block_out_channels=(8, 16), norm_num_groups=4)
    return sd_pipeline(**{"vae": plain, "unet": narrow, **parts})


def write_model(directory: Path, **parts: Any) -> Path:
    """A directory of :func:`pixel_pipeline`."""
    pixel_pipeline(**parts).save_pretrained(directory, safe_serialization=True)
    return directory


def sdxl_unet(*, cross_attention_dim: int, time_ids: int) -> UNet2DConditionModel:
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 24 + time_ids * 4}
    return unet(cross_attention_dim=cross_attention_dim, addition_embed_type="text_time", **sizes)


def sdxl_pipeline(*, force_zeros: bool = True, **parts: Any) -> StableDiffusionXLPipeline:
    """SDXL at 16 x 16 pixels: two text encoders (16 + 24 wide), pooled 24, six time ids of 4 numbers each."""
    torch.manual_seed(2)
    own = {
        "vae": vae(force_upcast=True),
        "text_encoder": text_encoder(16),
        "text_encoder_2": text_encoder(24, projected=True),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": sdxl_unet(cross_attention_dim=40, time_ids=6),
        "scheduler": EulerDiscreteScheduler.from_config(SD_SCHEDULER),
    }
    return StableDiffusionXLPipeline(**{**own, **parts}, force_zeros_for_empty_prompt=force_zeros)


def turbo_pipeline() -> StableDiffusionXLPipeline:
    """SDXL-Turbo: SDXL with the scheduler of its checkpoint."""
    config = {**SD_SCHEDULER, "timestep_spacing": "trailing"}
    return sdxl_pipeline(scheduler=EulerAncestralDiscreteScheduler.from_config(config))


def refiner_pipeline(**parts: Any) -> StableDiffusionXLImg2ImgPipeline:
    """SDXL's refiner: the second text encoder alone, and an aesthetic score in the place of the target size."""
    torch.manual_seed(3)
    own = {
        "vae": vae(force_upcast=True),
        "text_encoder": None,
        "text_encoder_2": text_encoder(24, projected=True),
        "tokenizer": None,
        "tokenizer_2": tokenizer(),
        "unet": sdxl_unet(cross_attention_dim=24, time_ids=5),
        "scheduler": EulerDiscreteScheduler.from_config(SD_SCHEDULER),
    }
    settings = {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    return StableDiffusionXLImg2ImgPipeline(**{**own, **parts}, **settings)


def t5_tokenizer() -> T5TokenizerFast:
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("\u2581", -2.0)]
    return T5TokenizerFast(vocab=[*special, *letters], extra_ids=0)


def t5_encoder(width: int) -> T5EncoderModel:
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, num_heads=2, d_ff=2 * width, num_layers=2)
    return T5EncoderModel(config).eval()


def flow_vae() -> AutoencoderKL:
    return vae(shift_factor=0.1, scaling_factor=0.7, use_quant_conv=False, use_post_quant_conv=False)


def sd3_pipeline(*, t5: bool = True, **parts: Any) -> StableDiffusion3Pipeline:
    """SD3.5 at 16 x 16 pixels: CLIP 16 and 24 wide, T5 40 wide, one block of two with attention of its own."""
    torch.manual_seed(4)
    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    sizes |= {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 40}
    sizes |= {"caption_projection_dim": 16, "pooled_projection_dim": 40}
    own = {
        "transformer": SD3Transformer2DModel(**sizes, dual_attention_layers=(0,), qk_norm="rms_norm"),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": flow_vae(),
        "text_encoder": text_encoder(16, projected=True),
        "tokenizer": tokenizer(),
        "text_encoder_2": text_encoder(24, projected=True),
        "tokenizer_2": tokenizer(),
        "text_encoder_3": t5_encoder(40) if t5 else None,
        "tokenizer_3": t5_tokenizer() if t5 else None,
    }
    return StableDiffusion3Pipeline(**{**own, **parts})


def flux_pipeline(*, distilled: bool = True, **parts: Any) -> FluxPipeline:
    """FLUX.1-dev, or -schnell where not ``distilled``: 4 latent channels packed to 16, CLIP 16 wide, T5 24 wide."""
    torch.manual_seed(5)
    sizes = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 16}
    shift = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    own = {
        "transformer": FluxTransformer2DModel(**sizes, guidance_embeds=distilled, axes_dims_rope=(2, 2, 4)),
        "scheduler": FlowMatchEulerDiscreteScheduler(**shift if distilled else {"shift": 1.0}),
        "vae": flow_vae(),
        "text_encoder": text_encoder(16),
        "tokenizer": tokenizer(),
        "text_encoder_2": t5_encoder(24),
        "tokenizer_2": t5_tokenizer(),
    }
    return FluxPipeline(**{**own, **parts})


def kontext_pipeline() -> FluxKontextPipeline:
    """The parts of FLUX.1-dev."""
    parts = flux_pipeline().components
    return FluxKontextPipeline(**{name: part for name, part in parts.items() if part is not None})


IMAGE_TOKENS = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")


def chat_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """A word, a mark and a line's end are tokens, as far as known; with a template of one role. What Qwen-Image puts
    before a prompt has 34 tokens, as it has to.
    """
    words = [*"abcdefghijklmnopqrstuvwxyz", "user", "model", "cat", "zebra", "longer", "prompt", "than", "that", *more]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(["<pad>", "<unk>", *words])}, "<unk>"))
    model.pre_tokenizer = Split(Regex(r"<\|\w+\|>|\n|\w+|[^\w\s]"), "removed", invert=True)
    template = "{% for message in messages %}user {{ message['content'] }} model{% endfor %}"
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "right"}
    return PreTrainedTokenizerFast(tokenizer_object=model, chat_template=template, **special)


_DECODER = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": 600, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip


def qwen3(layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**_DECODER, num_hidden_layers=layers, head_dim=4)).eval()


def flux2_pipeline(*, distilled: bool = False, **parts: Any) -> Flux2KleinPipeline:
    """FLUX.2-klein: 4 latent channels, 2 x 2 of them a token of 16, and three layers of Qwen3 as the prompt's."""
    torch.manual_seed(6)
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": 24, "timestep_guidance_channels": 16}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    image = {"block_out_channels": (8, 16), "latent_channels": 4, "norm_num_groups": 4, "layers_per_block": 1}
    own = {
        "transformer": Flux2Transformer2DModel(**sizes, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "vae": AutoencoderKLFlux2(**blocks, **image),
        "text_encoder": qwen3(28),
        "tokenizer": chat_tokenizer(),
    }
    own["vae"].bn.running_mean.uniform_(-0.2, 0.2)
    own["vae"].bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(**{**own, **parts}, is_distilled=distilled)


def qwen_pipeline(**parts: Any) -> QwenImagePipeline:
    """Qwen-Image: 4 latent channels packed to 16, and a VAE with a time axis."""
    torch.manual_seed(7)
    sizes = {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
    image = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    statistics = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.5, 0.7, 1.0, 2.0]}
    text = {**_DECODER, "num_hidden_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 8}
    shift = {"shift": 1.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    own = {
        "transformer": QwenImageTransformer2DModel(**sizes, joint_attention_dim=8, axes_dims_rope=(2, 2, 4)),
        "scheduler": FlowMatchEulerDiscreteScheduler(**shift),
        "vae": AutoencoderKLQwenImage(**image, **statistics),
        "text_encoder": encoder,
        "tokenizer": chat_tokenizer(),
    }
    return QwenImagePipeline(**{**own, **parts})


class ImagesOnly(Qwen2VLProcessor):
    """Qwen's processor without its part for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **_: Any) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token_id = -1
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


ImagesOnly.__name__ = ImagesOnly.__qualname__ = "Qwen2VLProcessor"
ImagesOnly.__module__ = Qwen2VLProcessor.__module__


def qwen_edit_pipeline(*, plus: bool = False) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    """The parts of Qwen-Image, and a processor that makes four tokens of an image."""
    parts = qwen_pipeline().components
    parts["tokenizer"] = tokenizer = chat_tokenizer(*IMAGE_TOKENS)
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)
    for name, token in zip(
        ("image_token_id", "vision_start_token_id", "vision_end_token_id"), IMAGE_TOKENS, strict=True
    ):
        setattr(parts["text_encoder"].config, name, tokenizer.convert_tokens_to_ids(token))
    kind = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    return kind(**parts, processor=ImagesOnly(images, tokenizer))


def z_image_pipeline(*, turbo: bool = False, **parts: Any) -> ZImagePipeline:
    """Z-Image, or -Turbo: FLUX.1's VAE, and the second layer from the end of Qwen3 as the prompt's."""
    torch.manual_seed(8)
    sizes = {"in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    places = {"axes_dims": [2, 2, 4], "axes_lens": [600, 64, 64]}
    own = {
        "transformer": ZImageTransformer2DModel(**sizes, cap_feat_dim=8, **places),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0 if turbo else 6.0),
        "vae": flow_vae(),
        "text_encoder": qwen3(2),
        "tokenizer": chat_tokenizer(),
    }
    return ZImagePipeline(**{**own, **parts})


def wan_pipeline(*, ti2v: bool = False, **parts: Any) -> WanPipeline:
    """Wan 2.1 with its own UniPC, or the 5B of 2.2 (``ti2v``): a VAE of 4 x 4 pixels and of 4 frames a latent."""
    torch.manual_seed(9)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8}
    image = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [True, True]}
    statistics = {"latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.5, 0.7, 1.0, 2.0]}
    text = {"vocab_size": len(t5_tokenizer()), "d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 2}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    own = {
        "transformer": WanTransformer3DModel(**sizes, freq_dim=16, ffn_dim=32, num_layers=2),
        "scheduler": UniPCMultistepScheduler(**flow),
        "vae": AutoencoderKLWan(**image, **statistics, scale_factor_spatial=4),
        "text_encoder": UMT5EncoderModel(UMT5Config(**text)).eval(),
        "tokenizer": t5_tokenizer(),
    }
    return WanPipeline(**{**own, **parts}, expand_timesteps=ti2v)


PIPELINES = {
    "sd15": sd_pipeline,
    "sd21": lambda: sd_pipeline(prediction_type="v_prediction"),
    "sdxl": sdxl_pipeline,
    "refiner": refiner_pipeline,
    "sd3": sd3_pipeline,
    "flux": flux_pipeline,
    "schnell": lambda: flux_pipeline(distilled=False),
    "klein": flux2_pipeline,
    "qwen": qwen_pipeline,
    "z-image": z_image_pipeline,
    "wan": wan_pipeline,
}
"""Every family at its smallest."""
EDITING = {
    "kontext": kontext_pipeline,
    "qwen-edit": qwen_edit_pipeline,
    "qwen-edit-plus": lambda: qwen_edit_pipeline(plus=True),
}
"""Those that edit a source image."""
FLOW = ("sd3", "flux", "schnell", "klein", "qwen", "z-image", "wan")
