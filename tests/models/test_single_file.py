"""Single files as other tools write them, through diffusers' converter: the images of the folder they are of."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import single_file_utils
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastinvdpo.errors import InvalidInput
from fastinvdpo.evaluation.comparing import compare
from fastinvdpo.evaluation.sampling import Sampling
from fastinvdpo.evaluation.scorers import open_scorers
from fastinvdpo.models import checkpoint_files, load_model, resolve_family
from fastinvdpo.models.base import Origin
from fastinvdpo.models.checkpoints import ENCODERS
from fastinvdpo.trainer import train
from tests.models import tiny
from tests.trainer.test_families import LORA, _config, images, write_two_pairs

# From diffusers' names to those of the original code, in this order.
_RESNET = [(r"\bnorm1\b", "in_layers.0"), (r"\bconv1\b", "in_layers.2"), (r"\bnorm2\b", "out_layers.0"),
           (r"\bconv2\b", "out_layers.3"), ("time_emb_proj", "emb_layers.1"),
           ("conv_shortcut", "skip_connection")]  # fmt: skip
_OUTER = [(r"^time_embedding.linear_1", "time_embed.0"), (r"^time_embedding.linear_2", "time_embed.2"),
          (r"^add_embedding.linear_1", "label_emb.0.0"), (r"^add_embedding.linear_2", "label_emb.0.2"),
          (r"^conv_in", "input_blocks.0.0"), (r"^conv_norm_out", "out.0"), (r"^conv_out", "out.2"),
          (r"^mid_block.resnets.0", "middle_block.0"), (r"^mid_block.attentions.0", "middle_block.1"),
          (r"^mid_block.resnets.1", "middle_block.2")]  # fmt: skip
_VAE = [("conv_norm_out", "norm_out"), (r"mid_block.resnets.0", "mid.block_1"), (r"mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0", "mid.attn_1"), ("conv_shortcut", "nin_shortcut"), ("group_norm", "norm"),
        (r"to_(q|k|v)\.", r"\1."), (r"to_out\.0", "proj_out"),
        (r"down_blocks.(\d+).resnets.(\d+)", r"down.\1.block.\2"),
        (r"down_blocks.(\d+).downsamplers.0", r"down.\1.downsample")]  # fmt: skip


def renamed(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def unet_name(name: str) -> str:
    """Of a UNet with two blocks of one layer, attention in the inner one."""
    found = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(conv\.)?", name)
    if found is not None:
        way, block, kind, layer = found[1], int(found[2]), found[3], int(found[4])
        if way == "down":
            number = 1 + 2 * block + (1 if kind == "downsamplers" else layer)
            place = {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
        else:
            number = 2 * block + (1 if kind == "upsamplers" else layer)
            place = {"resnets": "0", "attentions": "1", "upsamplers": f"{2 if block == 0 else 1}.conv"}[kind]
        name = f"{'input' if way == 'down' else 'output'}_blocks.{number}.{place}.{name[found.end() :]}"
        return renamed(name, _RESNET) if kind == "resnets" else name
    return renamed(renamed(name, _OUTER), _RESNET if ".resnets." in name else [])


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    found = {}
    for name, tensor in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{last - int(match[1])}", renamed(name, _VAE))
        name = name.replace(".resnets.", ".block.").replace(".upsamplers.0", ".upsample")
        linear = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        found[name] = tensor[..., None, None].contiguous() if linear else tensor
    return found


def clip_tensors(encoder: Any) -> dict[str, Tensor]:
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in encoder.state_dict().items()}


def open_clip_tensors(encoder: Any) -> dict[str, Tensor]:
    """As OpenCLIP stores a text encoder: the three projections of attention as one."""
    names = {"embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm": "ln_final",
             "embeddings.token_embedding": "token_embedding", "encoder.layers": "transformer.resblocks",
             "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
             "self_attn": "attn"}  # fmt: skip
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}
    found = {"text_projection": tensors.pop("text_projection.weight").T.contiguous()}
    for name, tensor in tensors.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if ".q_proj." in name:
            others = [tensors[key.replace("q_proj", part)] for key in tensors for part in ("k_proj", "v_proj")
                      if tensors[key] is tensor]  # fmt: skip
            found[name.replace(".q_proj.", ".in_proj_")] = torch.cat([tensor, *others])
        elif "k_proj" not in name and "v_proj" not in name:
            found[name] = tensor
    return found


def sd_file(pipeline: Any) -> dict[str, Tensor]:
    parts = {"model.diffusion_model.": {unet_name(name): t for name, t in pipeline.unet.state_dict().items()},
             "first_stage_model.": vae_tensors(pipeline.vae)}  # fmt: skip
    if hasattr(pipeline, "text_encoder_2"):
        parts["conditioner.embedders.0.transformer."] = clip_tensors(pipeline.text_encoder)
        parts["conditioner.embedders.1.model."] = open_clip_tensors(pipeline.text_encoder_2)
    else:
        parts["cond_stage_model.transformer."] = clip_tensors(pipeline.text_encoder)
    found = {prefix + name: tensor.clone() for prefix, tensors in parts.items() for name, tensor in tensors.items()}
    return {**found, "model_ema.decay": torch.ones(()), "betas": torch.ones(3)}  # no weights, and left out


def flux_file(pipeline: Any) -> dict[str, Tensor]:
    """FLUX.1's transformer alone, as it is published: projections of attention and MLP as one."""
    weights, found = pipeline.transformer.state_dict(), {}
    outer = {"time_text_embed.timestep_embedder.linear_1": "time_in.in_layer", "x_embedder": "img_in",
             "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer", "context_embedder": "txt_in",
             "time_text_embed.text_embedder.linear_1": "vector_in.in_layer", "proj_out": "final_layer.linear",
             "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
             "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
             "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
             "norm_out.linear": "final_layer.adaLN_modulation.1"}  # fmt: skip
    double = {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin", "ff.net.0.proj": "img_mlp.0",
              "attn.to_q attn.to_k attn.to_v": "img_attn.qkv", "ff.net.2": "img_mlp.2",
              "attn.to_out.0": "img_attn.proj",
              "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "txt_attn.qkv", "attn.to_add_out": "txt_attn.proj",
              "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2"}  # fmt: skip
    single = {"norm.linear": "modulation.lin", "attn.to_q attn.to_k attn.to_v proj_mlp": "linear1",
              "proj_out": "linear2"}  # fmt: skip
    norms = {"transformer_blocks.0.attn.norm_q": "double_blocks.0.img_attn.norm.query_norm.scale",
             "transformer_blocks.0.attn.norm_k": "double_blocks.0.img_attn.norm.key_norm.scale",
             "transformer_blocks.0.attn.norm_added_q": "double_blocks.0.txt_attn.norm.query_norm.scale",
             "transformer_blocks.0.attn.norm_added_k": "double_blocks.0.txt_attn.norm.key_norm.scale",
             "single_transformer_blocks.0.attn.norm_q": "single_blocks.0.norm.query_norm.scale",
             "single_transformer_blocks.0.attn.norm_k": "single_blocks.0.norm.key_norm.scale"}  # fmt: skip
    blocks = (("", "", outer), ("transformer_blocks.0.", "double_blocks.0.", double),
              ("single_transformer_blocks.0.", "single_blocks.0.", single))  # fmt: skip
    for ours, theirs, names in blocks:
        for sources, target in names.items():
            for kind in ("weight", "bias"):
                tensors = [weights[f"{ours}{source}.{kind}"] for source in sources.split()]
                if target.startswith("final_layer.adaLN"):  # shift before scale there
                    tensors = list(reversed(tensors[0].chunk(2)))
                found[f"{theirs}{target}.{kind}"] = torch.cat(tensors)
    return {**found, **{name: weights[f"{source}.weight"].clone() for source, name in norms.items()}}


def sd3_file(pipeline: Any) -> dict[str, Tensor]:
    """Everything in one file, T5's embedding under one of its names."""
    names = [("^pos_embed.proj", "x_embedder.proj"), ("^pos_embed.pos_embed", "pos_embed"),
             ("proj_out", "final_layer.linear"),
             (r"time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"), ("norm_added_", "ln_"),
             (r"time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"), (r"norm_(q|k)\b", r"ln_\1"),
             (r"time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"), (r"to_out\.0|to_add_out", "proj"),
             (r"time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"), (r"ff(_context)?\.net\.2", "mlp.fc2"),
             (r"norm_out.linear", "final_layer.adaLN_modulation.1"), (r"ff(_context)?\.net\.0\.proj", "mlp.fc1"),
             (r"norm1(_context)?\.linear", "adaLN_modulation.1"), (r"(to|add)_q(_proj)?", "qkv")]  # fmt: skip
    weights = pipeline.transformer.state_dict()
    last, found = f"transformer_blocks.{pipeline.transformer.config.num_layers - 1}.", dict[str, Tensor]()
    for name, tensor in weights.items():
        if re.search(r"(to|add)_(k|v)", name):
            continue
        if "to_q" in name or "add_q" in name:
            tensor = torch.cat([weights[re.sub("_q", f"_{part}", name)] for part in "qkv"])
        if name.startswith((f"{last}norm1_context", "norm_out")):  # shift before scale there
            tensor = torch.cat(tensor.chunk(2)[::-1])
        of_text = re.search("add|context", name) is not None
        block = re.match(r"transformer_blocks\.(\d+)\.", name)
        place = f"joint_blocks.{block[1]}.{'context' if of_text else 'x'}_block." if block else ""
        found[f"model.diffusion_model.{place}{renamed(name[block.end() if block else 0 :], names)}"] = tensor
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    for name, encoder in zip(("clip_l", "clip_g", "t5xxl"), encoders, strict=True):
        tensors = encoder.state_dict() if name == "t5xxl" else clip_tensors(encoder)
        for key, tensor in tensors.items():
            key = key.replace("text_model.text_projection", "text_projection")
            if key != "encoder.embed_tokens.weight":
                found[f"text_encoders.{name}.transformer.{key}"] = tensor
    found |= {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(pipeline.vae).items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def sd3_pipeline() -> Any:
    """With the projection of published checkpoints, the identity."""
    pipeline = tiny.sd3_pipeline()
    pipeline.text_encoder.text_projection.weight.data = torch.eye(16)
    return pipeline


PIPELINES = {**tiny.PIPELINES, "sd3": sd3_pipeline}


@pytest.fixture(autouse=True)
def any_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers' converter of FLUX.1 knows the published width alone: here it is the tiny transformer's."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count("inner_dim = 3072") == 1
    names = dict(vars(single_file_utils))
    exec(source.replace("inner_dim = 3072", "inner_dim = 16"), names)
    converters = SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    monkeypatch.setitem(converters, "checkpoint_mapping_fn", names["convert_flux_transformer_checkpoint_to_diffusers"])


FILES = {"sd15": sd_file, "sdxl": sd_file, "sd3": sd3_file, "flux": flux_file}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders, and beside each ``NAME.safetensors`` and what describes it, without weights where the file has them."""
    root = tmp_path_factory.mktemp("single")
    for name, write in FILES.items():
        pipeline = PIPELINES[name]()
        pipeline.save_pretrained(root / name, safe_serialization=True)
        save_file({key: t.contiguous() for key, t in write(pipeline).items()}, root / f"{name}.safetensors")
        pipeline.save_pretrained(root / f"{name}-config", safe_serialization=True)
        for part in ("unet", "transformer", *(ENCODERS if name != "flux" else ())):
            for file in (root / f"{name}-config" / part).glob("*.safetensors"):
                file.unlink()
    return root


def origin(root: Path, name: str) -> Origin:
    return Origin(root / f"{name}.safetensors", config=root / f"{name}-config")


@pytest.mark.parametrize("name", list(FILES))
def test_a_single_file_gives_the_images_of_its_folder_and_is_saved_as_one(
    root: Path, tmp_path: Path, name: str
) -> None:
    model: Any = load_model("auto", origin(root, name))
    folder: Any = load_model("auto", root / name)
    assert model.family == folder.family == resolve_family("auto", origin(root, name))
    assert images(model.pipeline, name) == images(folder.pipeline, name)
    alone = load_model("auto", origin(root, name), frozen_parts=False)
    assert alone.frozen_modules() == () and alone.latent_shape == folder.latent_shape
    for number, saved in enumerate((model, alone)):
        saved.save(tmp_path / str(number))
        assert images(DiffusionPipeline.from_pretrained(tmp_path / str(number)), name) == images(folder.pipeline, name)
    half = load_model("auto", origin(root, name), dtype=torch.bfloat16)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    files = checkpoint_files("auto", origin(root, name))
    assert files[model.network_folder][0] == root / f"{name}.safetensors" and files["model_index"]


@pytest.mark.parametrize("name", list(FILES))
def test_every_tensor_of_a_file_finds_its_place(root: Path, tmp_path: Path, name: str) -> None:
    """What diffusers' converter would leave empty or leave out, and shapes that differ, are errors with their names."""
    tensors, file = load_file(root / f"{name}.safetensors"), tmp_path / "other.safetensors"
    deep, problem = {
        "flux": ("double_blocks.0.img_mlp.0.weight", "holds no FluxTransformer2DModel .*img_mlp.0.weight"),
        "sd3": ("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.bias", "holds no SD3Transformer.*mlp.fc1.bias"),
    }.get(name, ("model.diffusion_model.middle_block.0.in_layers.0.bias", "lacks mid_block.resnets.0.norm1.bias"))
    cases = [
        ({key: t for key, t in tensors.items() if key != deep}, problem),
        ({**tensors, f"{deep}.more": torch.ones(2)}, r"has unknown .*\.more"),
        ({**tensors, "lora_up.weight": torch.ones(2)}, r"has unknown lora_up\.weight"),
        ({**tensors, deep: torch.ones(3, *tensors[deep].shape[1:])}, "expected shape"),
        ({"lora_up.weight": torch.ones(2)}, "holds no .*2D.*Model of the configuration"),
    ]
    for changed, problem in cases:
        save_file(changed, file)
        with pytest.raises(InvalidInput, match=rf"other\.safetensors.*{problem}"):
            load_model("auto", Origin(file, config=root / f"{name}-config"))


def test_what_a_single_file_is_not_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    file, config, pickle, bare = root / "sd15.safetensors", root / "sd15-config", tmp_path / "m.ckpt", tmp_path / "bare"
    pickle.write_bytes(b"\x80\x04N.")
    shutil.copytree(root / "flux-config", bare)
    (bare / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    for given, problem in (
        (Origin(pickle, config=config), r"model\.path = .*is no \.safetensors file"),
        (Origin(root / "not-there.safetensors", config=config), r"model\.path = .*does not exist"),
        (Origin(file), r"model\.path = .*is a single file, and nothing says what it holds"),
        (Origin(file, config=tmp_path / "none"), r"model\.config = .*is no directory"),
        (Origin(file, revision="main", config=config), r"model\.revision = 'main': means nothing for a single file"),
        (Origin(file, variant="fp16", config=config), r"model\.variant = 'fp16': means nothing for a single file"),
        (Origin(root / "sd15", config=config), r"model\.config = .*means nothing for a directory"),
        (Origin(root / "flux.safetensors", config=config), "type flux-dev, which is not that of .*sd15-config"),
        (Origin(file, config=root / "flux-config"), r"sd15\.safetensors.*holds no FluxTransformer2DModel"),
        (Origin(root / "flux.safetensors", config=bare), r"model\.config = .*vae.*holds no safetensors weights"),
    ):
        with pytest.raises(InvalidInput, match=problem):
            load_model("auto", given)


def test_a_run_from_a_single_file_is_that_from_its_folder(root: Path, tmp_path: Path) -> None:
    """Precompute, train an adapter, evaluate: the same bits, and a result that is a folder."""
    write_two_pairs(root)
    results, scores = [], []
    for name, config in (("sd15.safetensors", str(root / "sd15-config")), ("sd15", None)):
        model = {"path": str(root / name), "config": config, "lora": LORA}
        run, cache = tmp_path / name, {"cache": {"path": str(tmp_path / f"{name}-cache")}}
        result = train(_config(root, run, "sd15", "diffusion-dpo", model=model, **cache), progress=False)
        results.append(images(DiffusionPipeline.from_pretrained(result.model_directory), "sd15"))
        card = (result.directory / "adapter" / "README.md").read_text()
        assert ("StableDiffusionPipeline.from_single_file(" in card) == (config is not None)
        base = Origin(root / name, config=config)
        scorers, sampling = [open_scorers(["tests.evaluation.tiny:brightness"])[0]], Sampling(num_inference_steps=2)
        summary = compare(base, run / "adapter", ["a cat"], scorers, tmp_path / f"{name}-out", sampling=sampling)
        scores.append(summary["samples"][0]["scores"])
        assert not [note for note in summary["notes"] if "trained on" not in note]
    assert results[0] == results[1] and scores[0] == scores[1]
